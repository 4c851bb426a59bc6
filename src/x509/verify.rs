//! Whether a chain is what was granted: every fact of the leaf compared with the grant, and a path to the bundle.
//!
//! The same check for every signer, our own included. Nothing more than the grant passes, and nothing less: a name, a
//! usage or a second of validity too much is as wrong as a missing one.

use std::time::{Duration, SystemTime};

use rustls::pki_types::UnixTime;
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeIdIter, KeyUsage, RequiredEkuNotFoundContext};
use x509_parser::{certificate::X509Certificate, x509::X509Version};

use super::{
    Bundle, Chain, Names, PublicKey, Usage, Usages,
    chain::{is_ca, parse},
    read::{self, FieldError},
};

/// How far a signer may set NotBefore back, against clocks that run late.
pub const MAX_BACKDATE: Duration = Duration::from_secs(10 * 60);
/// How far a signer's clock may run ahead of ours before its certificates look too long.
pub const MAX_CLOCK_SKEW: Duration = Duration::from_secs(60);

/// What a chain is compared with: the grant, the key it was asked for, and the time.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// Subject and SANs, exactly.
    pub names: &'a Names,
    /// KeyUsage and ExtendedKeyUsage, exactly.
    pub usages: Usages,
    /// The certified key.
    pub public_key: &'a PublicKey,
    /// Validity from now, at most.
    pub lifetime: Duration,
    /// The time of day.
    pub now: SystemTime,
}

impl Chain {
    /// Checks that the leaf is exactly what is `expected`, and that the chain leads to a root in `bundle`.
    pub fn verify(&self, bundle: &Bundle, expected: &Expected<'_>) -> Result<(), VerifyError> {
        let leaf = parse(self.leaf_der()).expect("a chain holds certificates that parse");
        if leaf.version() != X509Version::V3 {
            return Err(VerifyError::Version);
        }
        if PublicKey::from_spki(leaf.public_key()).as_ref() != Ok(expected.public_key) {
            return Err(VerifyError::PublicKey);
        }
        check_names(&leaf, expected.names)?;
        check_profile(&leaf, expected)?;
        self.check_lifetime(expected)?;
        self.check_intermediates(bundle)?;
        self.check_path(bundle, expected)
    }

    fn check_lifetime(&self, expected: &Expected<'_>) -> Result<(), VerifyError> {
        let Expected { lifetime, now, .. } = *expected;
        if self.not_before() > now + MAX_CLOCK_SKEW {
            return Err(VerifyError::NotYetValid);
        }
        if self.not_after() <= now {
            return Err(VerifyError::Expired);
        }
        if self.not_before() + MAX_BACKDATE < now {
            return Err(VerifyError::Backdated);
        }
        let left = self.not_after().duration_since(now).unwrap_or_default();
        if left > lifetime.saturating_add(MAX_CLOCK_SKEW) {
            return Err(VerifyError::Lifetime);
        }
        Ok(())
    }

    /// SPIFFE clients refuse a whole chain for one intermediate that may not sign (X509-SVID section 5.1).
    fn check_intermediates(&self, bundle: &Bundle) -> Result<(), VerifyError> {
        for (index, der) in self.certificates().iter().enumerate().skip(1) {
            let certificate = parse(der).expect("a chain holds certificates that parse");
            let key_usage_critical = matches!(certificate.key_usage(), Ok(Some(usage)) if usage.critical);
            if !is_ca(&certificate) || !key_usage_critical {
                return Err(VerifyError::Intermediate { index });
            }
            if bundle.roots().contains(der) || certificate.subject().as_raw() == certificate.issuer().as_raw() {
                return Err(VerifyError::RootInChain { index });
            }
        }
        Ok(())
    }

    fn check_path(&self, bundle: &Bundle, expected: &Expected<'_>) -> Result<(), VerifyError> {
        let since_epoch = expected.now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        // A certificate of a clock slightly ahead of ours is valid; see check_lifetime.
        let started = self.not_before().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let time = UnixTime::since_unix_epoch(since_epoch.max(started));
        let leaf = EndEntityCert::try_from(self.leaf_der()).map_err(VerifyError::Path)?;
        let path = leaf
            .verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                bundle.anchors(),
                &self.certificates()[1..],
                time,
                AllPurposes(expected.usages),
                None,
                None,
            )
            .map_err(VerifyError::Path)?;
        let used = path.intermediate_certificates().map(|certificate| certificate.der());
        if !used.eq(self.certificates()[1..].iter().cloned()) {
            return Err(VerifyError::Unrelated);
        }
        if !bundle.is_valid(path.anchor(), expected.now) {
            return Err(VerifyError::RootExpired);
        }
        Ok(())
    }
}

/// A chain that is not what was granted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Extensions need version 3.
    #[error("the certificate is not of version 3")]
    Version,
    /// Another key, or one of an unsupported kind.
    #[error("the certificate is for another public key than the one it was asked for")]
    PublicKey,
    /// A name or usage that is not supported.
    #[error("the certificate carries what was not granted")]
    Field(#[from] FieldError),
    /// Other names than granted.
    #[error("the certificate's subject and SANs differ from the grant")]
    Names,
    /// RFC 5280 section 4.2.1.6.
    #[error("subject alternative names must be critical when the subject is empty, and only then")]
    SanCriticality,
    /// RFC 5280 section 4.2: a malformed or repeated extension.
    #[error("extension {extension} is malformed or given twice")]
    Extension {
        /// Which.
        extension: &'static str,
    },
    /// X509-SVID section 4.1.
    #[error("basicConstraints with CA:FALSE must be present")]
    BasicConstraints,
    /// RFC 5280 section 4.2.1.3 and X509-SVID section 4.3.
    #[error("keyUsage must be present, critical and exactly as granted")]
    KeyUsage,
    /// Key encipherment with a key that only signs.
    #[error("keyUsage keyEncipherment needs an RSA key")]
    KeyEncipherment,
    /// Other purposes than granted.
    #[error("extendedKeyUsage must be exactly as granted")]
    ExtendedKeyUsage,
    /// NotBefore in the future by more than [`MAX_CLOCK_SKEW`].
    #[error("the certificate is not valid yet: the signer's clock and ours differ by more than 60 s")]
    NotYetValid,
    /// NotAfter has passed.
    #[error("the certificate has expired")]
    Expired,
    /// NotBefore set back by more than [`MAX_BACKDATE`].
    #[error("the certificate's validity begins more than 600 s ago")]
    Backdated,
    /// NotAfter past the grant by more than [`MAX_CLOCK_SKEW`].
    #[error("the certificate is valid for longer than granted")]
    Lifetime,
    /// RFC 5280 sections 4.2.1.3 and 4.2.1.9.
    #[error(
        "certificate {index} of the chain may not sign: CA:TRUE and a critical keyUsage with keyCertSign are needed"
    )]
    Intermediate {
        /// Its place, the leaf being 0.
        index: usize,
    },
    /// A root, or another self-issued certificate.
    #[error("certificate {index} of the chain is a root: roots belong into the trust bundle")]
    RootInChain {
        /// Its place, the leaf being 0.
        index: usize,
    },
    /// A certificate that the path does not need, or an order other than leaf to root.
    #[error("the chain holds certificates that are no part of the path to the root, or in another order")]
    Unrelated,
    /// No path, or one that breaks a name constraint or another rule.
    #[error("the chain does not lead to a root of the trust bundle")]
    Path(#[source] webpki::Error),
    /// The root itself is outside its validity.
    #[error("the root that the chain leads to is not valid now")]
    RootExpired,
}

impl VerifyError {
    /// Whether another attempt may pass: clocks move on, and a bundle may be a moment behind its signer.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::NotYetValid | Self::Expired | Self::Backdated | Self::Path(_) | Self::RootExpired)
    }
}

fn check_names(leaf: &X509Certificate<'_>, expected: &Names) -> Result<(), VerifyError> {
    let mut names = Names::default();
    read::subject(leaf.subject(), &mut names)?;
    let san = leaf.subject_alternative_name().map_err(|_| VerifyError::Extension { extension: "subjectAltName" })?;
    if let Some(san) = &san {
        read::alternative_names(san.value, &mut names)?;
        let no_subject = names.common_name.is_none() && names.organizations.is_empty();
        if san.critical != no_subject {
            return Err(VerifyError::SanCriticality);
        }
    }
    if !names.same_as(expected) {
        return Err(VerifyError::Names);
    }
    Ok(())
}

fn check_profile(leaf: &X509Certificate<'_>, expected: &Expected<'_>) -> Result<(), VerifyError> {
    let broken = |extension| move |_| VerifyError::Extension { extension };
    match leaf.basic_constraints().map_err(broken("basicConstraints"))? {
        Some(constraints) if !constraints.value.ca => {}
        _ => return Err(VerifyError::BasicConstraints),
    }
    let granted = |usages: [Usage; 2]| -> Usages {
        usages.into_iter().filter(|usage| expected.usages.contains(*usage)).collect()
    };
    match leaf.key_usage().map_err(broken("keyUsage"))? {
        Some(usage)
            if usage.critical
                && read::key_usage(usage.value)? == granted([Usage::DigitalSignature, Usage::KeyEncipherment]) => {}
        _ => return Err(VerifyError::KeyUsage),
    }
    if expected.usages.contains(Usage::KeyEncipherment) && !expected.public_key.algorithm().is_rsa() {
        return Err(VerifyError::KeyEncipherment);
    }
    let purposes = match leaf.extended_key_usage().map_err(broken("extendedKeyUsage"))? {
        Some(usage) => read::extended_key_usage(usage.value)?,
        None => Usages::empty(),
    };
    if purposes != granted([Usage::ServerAuth, Usage::ClientAuth]) {
        return Err(VerifyError::ExtendedKeyUsage);
    }
    Ok(())
}

/// Every granted purpose at once: a CA that names purposes must name all of them.
struct AllPurposes(Usages);

impl ExtendedKeyUsageValidator for AllPurposes {
    fn validate(&self, purposes: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        let present: Vec<_> =
            purposes.map(|purpose| Ok(purpose?.to_decoded_oid())).collect::<Result<_, webpki::Error>>()?;
        for (usage, required) in
            [(Usage::ServerAuth, KeyUsage::server_auth()), (Usage::ClientAuth, KeyUsage::client_auth())]
        {
            let named = present.is_empty() || present.iter().any(|oid| required.oid_values().eq(oid.iter().copied()));
            if self.0.contains(usage) && !named {
                let context = RequiredEkuNotFoundContext { required, present };
                return Err(webpki::Error::RequiredEkuNotFoundContext(context));
            }
        }
        Ok(())
    }
}
