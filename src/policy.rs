//! What a workload may have: [`decide`] turns a [`Workload`] and an [`Ask`] into a [`Grant`], or a [`Denial`] that says why.
//!
//! Deny by default. An ask is granted only if one policy allows all of it; policies never add up. `decide` is pure and
//! total: no I/O, no clock, no panic, bounded work for any input. A [`Grant`] has no constructor outside this module, so
//! whoever holds one holds a decision.
#![allow(missing_docs)]

use std::time::Duration;

use crate::{
    attest::Workload,
    x509::{KeyAlgorithm, Names, Usages},
};

/// What a caller asks for, parsed and within bounds, not yet judged.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ask {
    /// Names wanted; none means the policy's first offer.
    pub names: Names,
    /// Usages wanted.
    pub usages: Usages,
    /// Kind of the key that will be certified.
    pub key: KeyAlgorithm,
    /// Validity wanted; `None` means the policy's default.
    pub lifetime: Option<Duration>,
    /// Signer wanted; `None` means the policy's.
    pub signer: Option<String>,
    /// Policy to be judged by; `None` means any, in order of name.
    pub policy: Option<String>,
}

/// What one policy allows one workload: everything a signer needs to know, and nothing a caller can change.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Grant {
    names: Names,
    usages: Usages,
    key: KeyAlgorithm,
    lifetime: Duration,
    signer: String,
    policy: String,
}

impl Grant {
    /// Subject and SANs, exactly as the certificate must carry them.
    pub fn names(&self) -> &Names {
        &self.names
    }
    /// Usages, exactly.
    pub fn usages(&self) -> Usages {
        self.usages
    }
    /// Kind of key.
    pub fn key(&self) -> KeyAlgorithm {
        self.key
    }
    /// Validity from issuance; the certificate may end earlier, never later.
    pub fn lifetime(&self) -> Duration {
        self.lifetime
    }
    /// Name of the signer.
    pub fn signer(&self) -> &str {
        &self.signer
    }
    /// Name of the policy that allowed it.
    pub fn policy(&self) -> &str {
        &self.policy
    }
}

/// The policies in force.
#[derive(Clone, Debug, Default)]
pub struct PolicySet(());

/// A refusal in words: which policy, which rule, what to do.
#[derive(Clone, Debug)]
pub struct Denial(());

/// Decides.
pub fn decide(_policies: &PolicySet, _workload: &Workload, _ask: &Ask) -> Result<Grant, Denial> {
    Err(Denial(()))
}
