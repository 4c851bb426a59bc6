//! csrd.
//!
//! Who may import whom; `tests/it/tidy.rs` keeps it true.
//!
//! | module | may import |
//! |---|---|
//! | `proto` | nothing of ours |
//! | `clock` | nothing of ours |
//! | `tasks` | nothing of ours |
//! | `backoff` | nothing of ours |
//! | `metrics` | nothing of ours |
//! | `spiffe` | nothing of ours |
//! | `files` | nothing of ours |
//! | `socket` | nothing of ours |
//! | `telemetry` | nothing of ours |
//! | `x509` | `spiffe` |
//! | `attest::workload` | `spiffe` |
//! | `policy` | `spiffe`, `x509`, `attest::workload` |
//! | `attest` | `attest::workload`, `spiffe`, `metrics`, `clock`, `telemetry` |
//! | `policy::watch` | `policy`, `x509`, `files`, `tasks`, `metrics` |
//! | `signer` | `attest::workload`, `policy`, `x509`, `clock`, `backoff`, `tasks`, `metrics`, `telemetry` |
//! | `issue` | `attest::workload`, `policy`, `x509`, `signer`, `clock`, `metrics`, `telemetry` |
//! | `hub` | `attest::workload`, `policy`, `x509`, `signer`, `issue`, `clock`, `backoff`, `tasks`, `metrics`, `telemetry` |
//! | `server` | `proto`, `spiffe`, `x509`, `attest`, `attest::workload`, `policy`, `policy::watch`, `signer`, `issue`, `hub`, `clock`, `backoff`, `tasks`, `metrics`, `telemetry` |
//! | `client` | `proto`, `spiffe`, `x509`, `socket`, `backoff`, `telemetry` |
//! | `config` | `policy`, `signer`, `files`, `socket`, `telemetry` |
//! | `agent` | everything |
//! | `cli` | everything |
//! | `main` | everything |
//! | `test_util` | everything |
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may spawn, and reads what its own fakes wrote"))]
pub mod agent;
pub mod attest;
pub mod backoff;
pub mod cli;
pub mod client;
pub mod clock;
pub mod config;
pub mod files;
pub mod hub;
pub mod issue;
pub mod metrics;
pub mod policy;
pub mod proto;
pub mod server;
pub mod signer;
pub mod socket;
pub mod spiffe;
pub mod tasks;
pub mod telemetry;
pub mod x509;
