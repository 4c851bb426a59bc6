//! X.509: names, usages, keys, requests and chains, parsed into types that cannot hold what this product refuses.
//!
//! Nothing here knows who asks or what is allowed. Parsing is total: bytes in, a value or an error that names the field
//! and the bound.

mod ca;
pub mod chain;
pub mod csr;
mod der;
pub mod key;
pub mod name;
pub(crate) mod pem;
mod read;
pub mod usage;
pub mod verify;
pub(crate) mod write;

pub(crate) use ca::CaCertificate;
pub use chain::{Bundle, Chain, ChainError};
pub use csr::{Csr, CsrError};
pub use key::{KeyAlgorithm, KeyError, PrivateKey, PublicKey};
pub use name::{DnsName, NameError, Names};
pub use read::FieldError;
pub use usage::{Usage, Usages};
pub use verify::{Expected, VerifyError};
