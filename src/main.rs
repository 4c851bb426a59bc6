//! The `csrd` binary.
fn main() {}
