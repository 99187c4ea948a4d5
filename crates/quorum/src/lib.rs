//! Election, terms, fencing, membership and time profiles: pure logic, no clock, no socket.
