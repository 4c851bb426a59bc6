//! Protocol in, protocol out: the daemon's sockets.

pub mod authority;
