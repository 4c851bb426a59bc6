//! it

mod authority;
mod raw_h2;
