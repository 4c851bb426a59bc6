//! csrd.
pub mod attest;
pub mod clock;
pub mod policy;
pub mod proto;
pub mod server;
pub mod spiffe;
pub mod x509;
