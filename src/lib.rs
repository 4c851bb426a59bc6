//! csrd issues X.509 certificates to the processes of one host, over gRPC on a unix socket, and keeps them current.
//!
//! A caller says nothing about itself. The kernel says who it is, a policy of the operator says what it may have, and a
//! signer signs no more than that. A private key is made here or never leaves its caller; none is written to disk by the
//! agent, but the CA's own.
//!
//! # The chain
//!
//! ```text
//! Peer --attest--> Workload --policy::decide--> Grant --issue--> Credential --hub--> subscribers
//! ```
//!
//! Each type is made by one module and by nobody else, so whoever holds one holds the proof of the step before it:
//!
//! - A [`Peer`](attest::Peer) is the process at the other end of a socket, held by pidfd, and never another one that has
//!   its number later.
//! - A [`Workload`](attest::Workload) is what is proven about it now. Nothing it says of itself is in there.
//! - A [`Grant`](policy::Grant) is a decision: one policy allows all of what is asked. No policy, no grant.
//! - A [`Credential`](issue::Credential) is a certificate that has been checked against its grant and the signer's roots.
//!
//! In a cluster the controller goes the same way once more, from what the API server wrote:
//!
//! ```text
//! CSR --screen--> Claim --pods by UID--> Workload --policy::decide--> Grant --sign, verify--> status
//! ```
//!
//! A `Claim` is what an agent says, checked against its own token; the `Workload` there is the live pod that it names, and
//! the proof that the agent may ask for it is in `controller::verdict`. Serving certificates of kubelets, where they are
//! switched on, are approved by `controller::kubelet` alone and are nobody's `Workload`.
//!
//! # What always holds
//!
//! - No `Workload` is made outside `attest`, no `Grant` outside `policy`, no `Credential` outside `issue`. Tests have
//!   constructors of their own, behind `cfg(any(test, feature = "testing"))`, which no release build has.
//! - Nothing that signs takes a string: [`Sign::sign`](signer::Sign::sign) takes a grant.
//! - Before a certificate is sent, the process behind the stream is looked at again, unless that was a moment ago.
//! - Time is told by [`clock`] only, and the environment is read by [`config`] and [`cli`] only.
//! - The runtime has one thread. A lock is held for a moment and never across an await; what blocks or computes for long
//!   goes to a thread that may.
//! - Everything a caller can make grow is bounded by a named constant and charged to its principal in [`account`]. What is
//!   beyond it is refused, with a reason from the closed set in `server/refusal.rs`, or by the protocol's own error where
//!   the HTTP/2 stack judges it.
//! - What others chose is shown only as [`text`] prints it: in log lines, tables, messages, conditions and Events.
//! - Secrets have no `Debug` that shows them, are wiped when dropped, and are in no log, span or error. The buffers of the
//!   HTTP/2 stack through which an answer goes out are not ours and are not wiped.
//! - Everything stops: every answer ends at the stop, and each part has less time than what waits for it; see
//!   [`server::stop`]. The first long-lived task to end, for whatever reason, stops the process.
//!
//! # Who may import whom
//!
//! Imports go one way: the base knows nothing of ours, the domain is pure, engines talk to the kernel and to a CA, edges
//! turn protocol into the chain's types and back, and composition puts them together. `tests/it/tidy.rs` compares every
//! path in `src/` with this table, and fails on a permission that nobody uses. A parent showing its own children is no
//! import.
//!
//! | module | may import |
//! |---|---|
//! | `proto` | nothing of ours |
//! | `text` | nothing of ours |
//! | `clock` | nothing of ours |
//! | `tasks` | nothing of ours |
//! | `backoff` | nothing of ours |
//! | `metrics` | nothing of ours |
//! | `spiffe` | nothing of ours |
//! | `files` | nothing of ours |
//! | `socket` | nothing of ours |
//! | `telemetry` | `text` |
//! | `kubernetes` | `telemetry`, `backoff` |
//! | `rate` | nothing of ours |
//! | `x509` | `spiffe` |
//! | `account` | `metrics` |
//! | `attest::workload` | `account`, `text` |
//! | `policy` | `x509`, `attest::workload`, `text` |
//! | `attest` | `account`, `attest::workload`, `attest::pods`, `kubernetes`, `clock` |
//! | `attest::pods` | `attest`, `attest::workload`, `kubernetes`, `clock` |
//! | `policy::watch` | `policy`, `files`, `metrics`, `kubernetes` |
//! | `trust` | `x509`, `files`, `kubernetes` |
//! | `signer` | `attest::workload`, `policy`, `x509`, `clock`, `kubernetes`, `metrics`, `backoff`, `telemetry`, `text` |
//! | `issue` | `attest::workload`, `policy`, `x509`, `signer`, `clock` |
//! | `hub` | `account`, `attest::workload`, `policy`, `x509`, `signer`, `issue`, `clock`, `backoff`, `rate`, `metrics`, `telemetry`, `attest::pods` |
//! | `server` | `account`, `proto`, `spiffe`, `x509`, `attest`, `attest::workload`, `policy`, `signer`, `issue`, `hub`, `metrics`, `telemetry`, `text` |
//! | `controller` | `attest::pods`, `attest::workload`, `policy`, `policy::watch`, `x509`, `signer`, `kubernetes`, `clock`, `backoff`, `rate`, `metrics`, `telemetry`, `text` |
//! | `client` | `proto`, `socket`, `backoff`, `telemetry`, `text` |
//! | `config` | `controller`, `policy`, `signer`, `files`, `socket`, `telemetry`, `kubernetes`, `trust`, `x509` |
//! | `agent` | everything |
//! | `cli` | everything |
//! | `main` | everything |
//!
//! # Reading order
//!
//! 1. `proto/csrd/v1/certificate.proto`: what a caller can ask for, and what it gets.
//! 2. [`attest`], then `attest/peer.rs` and `attest/stream.rs`: who calls.
//! 3. [`policy`], then `policy/document.rs` and `policy/judge.rs`: who may have what.
//! 4. [`signer`] and [`issue`]: one attempt, from a key to a checked certificate.
//! 5. [`hub`]: many credentials over time; the only part with state and a schedule.
//! 6. [`server`], `server/issuance.rs` and `server/refusal.rs`: the socket, its bounds, and what a caller is told. Then
//!    `server/identities.rs`, with `server/workload_api.rs` and `server/sds.rs` on top: what is handed out unasked.
//! 7. [`agent`]: how the parts are put together, and how they stop.
//! 8. [`client`] and [`cli`]: the other end of the socket.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may spawn, and reads what its own fakes wrote"))]

pub mod account;
pub mod agent;
pub mod attest;
pub mod backoff;
pub mod cli;
pub mod client;
pub mod clock;
pub mod config;
pub mod controller;
pub mod files;
pub mod hub;
pub mod issue;
pub mod kubernetes;
pub mod metrics;
pub mod policy;
pub mod proto;
pub mod rate;
pub mod server;
pub mod signer;
pub mod socket;
pub mod spiffe;
pub mod tasks;
pub mod telemetry;
pub mod text;
pub mod trust;
pub mod x509;
