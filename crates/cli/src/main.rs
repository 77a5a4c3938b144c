//! `vmsight`: virtual machine monitoring for security.
fn main() {}
