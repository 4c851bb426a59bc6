//! Who is calling: from the connected peer to a [`Workload`].
#![allow(missing_docs)]
mod workload;
pub use workload::{UnixFacts, Workload};
