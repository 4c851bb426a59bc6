//! The one integration test binary, so that everything links once.

mod authority;
mod client;
mod fake_agent;
mod help;
mod hostile_h2;
mod issue;
mod raw_h2;
mod telemetry;
mod tidy;
mod watch;
