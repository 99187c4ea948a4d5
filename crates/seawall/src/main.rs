//! The seawall binary: command line, configuration, component lifecycle.
fn main() {}
