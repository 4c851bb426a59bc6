//! Who signs: the one seam between an issuance and a certificate authority.
//!
//! A signer gets a [`Grant`], never a string of names, and returns a chain that nobody has believed yet: `issue` verifies
//! it against the grant and against [`Sign::bundle`] before anyone sees it. A signer keeps no schedule of its own for
//! leaves; it signs when asked.

pub mod embedded;
pub mod kubernetes;

use std::{fmt, pin::Pin, sync::Arc, time::Duration};

use tokio::sync::watch;

use crate::{
    attest::Workload,
    policy::Grant,
    x509::{Bundle, Chain, Csr, KeyError, PrivateKey, PublicKey},
};

use kubernetes::KubernetesError;

/// The answer of a signer, when it comes.
pub type Signing<'a> = Pin<Box<dyn Future<Output = Result<Chain, SignError>> + Send + 'a>>;

/// A certificate authority, near or far.
pub trait Sign: Send + Sync + fmt::Debug {
    /// The name that policies call it by.
    fn name(&self) -> &str;

    /// Signs one certificate: the grant's names and usages for the request's key, valid for at most the grant's lifetime.
    fn sign<'a>(&'a self, request: SigningRequest<'a>) -> Signing<'a>;

    /// Whether it could sign now; what readiness tells operators.
    fn ready(&self) -> Result<(), SignError>;

    /// The roots that verify this signer's certificates. A new root is in it before the first leaf from that root.
    fn bundle(&self) -> watch::Receiver<Arc<Bundle>>;
}

/// What a signer is given.
#[derive(Clone, Copy)]
pub struct SigningRequest<'a> {
    /// For whom.
    pub workload: &'a Workload,
    /// What was granted.
    pub grant: &'a Grant,
    /// The key to certify.
    pub key: &'a Key,
    /// Told of each stage as it is passed; must not block.
    pub progress: &'a (dyn Fn(Stage) + Send + Sync),
}

impl fmt::Debug for SigningRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningRequest").field("grant", self.grant).field("key", self.key).finish_non_exhaustive()
    }
}

/// The key of a credential, by who holds its private half.
#[derive(Debug)]
pub enum Key {
    /// The agent made it and hands it over.
    Made(PrivateKey),
    /// The workload holds it and proved so with a request.
    Held(Arc<Csr>),
}

impl Key {
    /// The half to certify.
    pub fn public_key(&self) -> &PublicKey {
        match self {
            Self::Made(key) => key.public_key(),
            Self::Held(csr) => csr.public_key(),
        }
    }
}

/// A stage of an issuance that has been passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Handed to the signer; the text names the request there.
    Requested(String),
    /// Approved by the signer's approver, whom the text names. A signer without an approver never says so.
    Approved(String),
    /// Signed, and checked against the grant.
    Issued,
}

/// Why a signer did not sign.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignError {
    /// The time is outside the CA's own validity.
    #[error("the CA's own certificate is not valid now: replace it, or correct the clock")]
    CaNotValid,
    /// A certificate without any key usage is malformed (RFC 5280 section 4.2.1.3).
    #[error("usages: digital signature or key encipherment must be granted")]
    NoKeyUsage,
    /// The library could not sign.
    #[error("the CA's private key cannot be used")]
    Key(#[from] KeyError),
    /// The chain just signed does not parse: a mistake of the signer.
    #[error("the signer made a malformed certificate")]
    Malformed,
    /// The API server, or who approves or signs there, brought no certificate.
    #[error(transparent)]
    Kubernetes(#[from] KubernetesError),
}

impl SignError {
    /// Stable reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::CaNotValid => "CA_NOT_VALID",
            Self::NoKeyUsage => "USAGES_INCOMPLETE",
            Self::Key(_) => "CA_KEY_UNUSABLE",
            Self::Malformed => "SIGNER_MALFORMED_CERTIFICATE",
            Self::Kubernetes(error) => error.reason(),
        }
    }

    /// Whether the same request may succeed later: after a rotation, or when an operator has replaced a file.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::CaNotValid | Self::Key(_) => true,
            Self::NoKeyUsage | Self::Malformed => false,
            Self::Kubernetes(error) => error.is_transient(),
        }
    }

    /// How long the signer wants to be left alone.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Kubernetes(error) => error.retry_after(),
            _ => None,
        }
    }
}
