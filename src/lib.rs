//! csrd.
pub mod attest;
pub mod clock;
pub mod issue;
pub mod policy;
pub mod proto;
pub mod signer;
pub mod spiffe;
pub mod x509;
