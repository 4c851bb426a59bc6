//! csrd.
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may spawn, and reads what its own fakes wrote"))]
pub mod attest;
pub mod clock;
pub mod policy;
pub mod proto;
pub mod spiffe;
pub mod x509;
