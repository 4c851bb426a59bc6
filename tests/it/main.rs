//! The one integration test binary, so that everything links once.

mod telemetry;
mod tidy;
//! it

mod authority;
mod raw_h2;
