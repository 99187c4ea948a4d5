//! Election, terms, fencing, membership and time profiles: pure logic, no clock, no socket.

pub mod election;
pub mod fence;
pub mod membership;
pub mod timing;
