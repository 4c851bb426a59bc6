//! The one integration test binary, so that everything links once.

#![allow(clippy::print_stderr, reason = "a test says why it was skipped")]
#![allow(clippy::unwrap_used, reason = "a test panics to fail; the lint's own exception knows only #[test] functions")]

mod agent;
mod attest;
mod authority;
mod bad_input;
mod client;
mod cluster;
mod commands;
mod controller;
mod disk;
mod fake_agent;
mod forged_lines;
mod freeze;
mod giants;
mod health;
mod help;
mod host;
mod hostile_h2;
mod issue;
mod node;
mod openssl;
mod outage;
mod pods;
mod policies;
mod raw_h2;
mod sds;
mod signer;
mod socket_folder;
mod start;
mod stolen_token;
mod stop;
mod telemetry;
mod tidy;
mod traces;
mod trust;
mod watch;
mod workload_api;
