//! What runs inside a lab guest.
fn main() {}
