//! The one integration test binary, so that everything links once.

mod authority;
mod raw_h2;
mod telemetry;
mod tidy;
