//! X.509: names, usages, keys, requests and chains, parsed into types that cannot hold what this product refuses.
//!
//! Nothing here knows who asks or what is allowed. Parsing is total: bytes in, a value or an error that names the field
//! and the bound.

pub mod chain;
pub mod csr;
pub mod key;
pub mod name;
pub mod usage;

pub use chain::{Bundle, Chain};
pub use csr::Csr;
pub use key::{KeyAlgorithm, PrivateKey, PublicKey};
pub use name::{DnsName, Names};
pub use usage::{Usage, Usages};
