//! csrd.
pub mod attest;
pub mod backoff;
pub mod clock;
pub mod metrics;
pub mod policy;
pub mod proto;
pub mod server;
pub mod spiffe;
pub mod tasks;
pub mod x509;
