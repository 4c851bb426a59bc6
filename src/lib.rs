//! csrd.
pub mod attest;
pub mod cli;
pub mod clock;
pub mod policy;
pub mod proto;
pub mod spiffe;
pub mod x509;
