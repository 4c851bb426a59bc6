//! Protocol in, protocol out.

pub mod admin;
