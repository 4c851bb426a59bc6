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
    #[error("the certificate is not valid yet: the signer's clock and ours differ by more than {} s", MAX_CLOCK_SKEW.as_secs())]
    NotYetValid,
    /// NotAfter has passed.
    #[error("the certificate has expired: compare the clocks of this host and of the signer")]
    Expired,
    /// NotBefore set back by more than [`MAX_BACKDATE`].
    #[error("the certificate's validity begins more than {} s ago", MAX_BACKDATE.as_secs())]
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
    #[error(
        "the chain does not lead to a root of the trust bundle, so other workloads would not trust it: give the agent the bundle of the CA that signs"
    )]
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
        if san.critical != names.has_no_subject() {
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

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
        GeneralSubtree, IsCa, Issuer, KeyUsagePurpose, NameConstraints, SanType,
    };

    use super::*;
    use crate::x509::{DnsName, KeyAlgorithm, PrivateKey};

    const LIFETIME: Duration = Duration::from_secs(3600);

    /// A root, an intermediate and a leaf, each of which a test may spoil before it is signed.
    struct Fixture {
        now: SystemTime,
        key: PrivateKey,
        names: Names,
        usages: Usages,
        root: CertificateParams,
        intermediate: CertificateParams,
        leaf: CertificateParams,
    }

    impl Fixture {
        fn new() -> Self {
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000);
            let mut leaf = CertificateParams::default();
            leaf.distinguished_name = DistinguishedName::new();
            leaf.distinguished_name.push(DnType::CommonName, "web");
            leaf.subject_alt_names = vec![SanType::DnsName("web.example".try_into().unwrap())];
            leaf.is_ca = IsCa::ExplicitNoCa;
            leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            leaf.not_before = now.into();
            leaf.not_after = (now + LIFETIME).into();
            Self {
                now,
                key: PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap(),
                names: Names {
                    common_name: Some("web".to_owned()),
                    dns: vec![DnsName::parse("web.example").unwrap()],
                    ..Names::default()
                },
                usages: Usages::DEFAULT,
                root: ca("root", now),
                intermediate: ca("intermediate", now),
                leaf,
            }
        }

        fn verify(&self) -> Result<(), VerifyError> {
            self.verify_chain(|_| ())
        }

        /// Verifies after `change` has been made to the signed chain: leaf, intermediate, and the root at the end.
        fn verify_chain(&self, change: impl FnOnce(&mut Vec<Vec<u8>>)) -> Result<(), VerifyError> {
            let root_key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
            let intermediate_key = PrivateKey::generate(KeyAlgorithm::EcdsaP384).unwrap();
            let root = self.root.self_signed(&root_key).unwrap();
            let by_root = Issuer::from_params(&self.root, &root_key);
            let intermediate = self.intermediate.signed_by(&intermediate_key, &by_root).unwrap();
            let by_intermediate = Issuer::from_params(&self.intermediate, &intermediate_key);
            let leaf = self.leaf.signed_by(&self.key, &by_intermediate).unwrap();
            let bundle = Bundle::from_der(vec![root.der().to_vec()]).unwrap();
            let mut chain = vec![leaf.der().to_vec(), intermediate.der().to_vec(), root.der().to_vec()];
            change(&mut chain);
            if chain.last() == Some(&root.der().to_vec()) {
                chain.pop();
            }
            let expected = Expected {
                names: &self.names,
                usages: self.usages,
                public_key: self.key.public_key(),
                lifetime: LIFETIME,
                now: self.now,
            };
            Chain::from_der(chain).unwrap().verify(&bundle, &expected)
        }
    }

    fn ca(name: &str, now: SystemTime) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.not_before = (now - LIFETIME).into();
        params.not_after = (now + 10 * LIFETIME).into();
        params
    }

    fn extension(oid: &[u64], critical: bool, value: &[u8]) -> CustomExtension {
        let mut extension = CustomExtension::from_oid_content(oid, value.to_vec());
        extension.set_criticality(critical);
        extension
    }

    #[track_caller]
    fn check(spoil: impl FnOnce(&mut Fixture), error: VerifyError) {
        let mut fixture = Fixture::new();
        spoil(&mut fixture);
        assert_eq!(fixture.verify(), Err(error));
    }

    #[test]
    fn what_was_granted_verifies() {
        Fixture::new().verify().unwrap();
    }

    #[test]
    fn a_certificate_without_extensions_is_refused() {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let algorithm = key.algorithm().signature_identifier();
        let tbs = yasna::construct_der(|writer| {
            writer.write_sequence(|fields| {
                fields.next().write_u8(1);
                fields.next().write_der(algorithm);
                fields.next().write_sequence(|_| ());
                fields.next().write_sequence(|validity| {
                    for _ in 0..2 {
                        let time = yasna::models::UTCTime::parse(b"300101000000Z").unwrap();
                        validity.next().write_utctime(&time);
                    }
                });
                fields.next().write_sequence(|_| ());
                fields.next().write_der(key.public_key().spki_der());
            });
        });
        let version_1 = yasna::construct_der(|writer| {
            writer.write_sequence(|fields| {
                fields.next().write_der(&tbs);
                fields.next().write_der(algorithm);
                fields.next().write_bitvec_bytes(&[0], 8);
            });
        });
        assert_eq!(Fixture::new().verify_chain(|chain| chain[0] = version_1), Err(VerifyError::Version));
    }

    #[test]
    fn another_key_is_refused() {
        let other = |fixture: &mut Fixture| {
            let public_key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
            std::mem::replace(&mut fixture.key, public_key)
        };
        let mut fixture = Fixture::new();
        let chain = |chain: &mut Vec<Vec<u8>>| {
            let mut elsewhere = Fixture::new();
            other(&mut elsewhere);
            elsewhere.verify_chain(|signed| *chain = signed.clone()).unwrap();
        };
        assert_eq!(fixture.verify_chain(chain), Err(VerifyError::PublicKey));
        other(&mut fixture);
        fixture.verify().unwrap();
    }

    #[test]
    fn one_name_more_or_less_is_refused() {
        let dns = |name: &str| SanType::DnsName(name.try_into().unwrap());
        check(|f| f.leaf.subject_alt_names.push(dns("more.example")), VerifyError::Names);
        check(|f| f.names.dns.push(DnsName::parse("less.example").unwrap()), VerifyError::Names);
        check(|f| f.leaf.subject_alt_names[0] = dns("other.example"), VerifyError::Names);
        check(|f| f.leaf.distinguished_name.push(DnType::OrganizationName, "more"), VerifyError::Names);
        check(|f| f.names.common_name = None, VerifyError::Names);
        let kind = FieldError::NameKind { kind: "email" };
        let email = SanType::Rfc822Name("a@example.org".try_into().unwrap());
        check(|f| f.leaf.subject_alt_names.push(email), kind.into());
        let unit = FieldError::SubjectAttribute { oid: "2.5.4.11".to_owned() };
        check(|f| f.leaf.distinguished_name.push(DnType::OrganizationalUnitName, "unit"), unit.into());
    }

    #[test]
    fn alternative_names_are_critical_exactly_without_a_subject() {
        /// GeneralNames with `web.example`.
        const NAMES: &[u8] = b"\x30\x0d\x82\x0bweb.example";
        let critical = |critical| {
            move |fixture: &mut Fixture| {
                fixture.leaf.subject_alt_names.clear();
                fixture.leaf.custom_extensions.push(extension(&[2, 5, 29, 17], critical, NAMES));
            }
        };
        check(critical(true), VerifyError::SanCriticality);
        let mut fixture = Fixture::new();
        fixture.leaf.distinguished_name = DistinguishedName::new();
        fixture.names.common_name = None;
        fixture.verify().unwrap();
        critical(false)(&mut fixture);
        assert_eq!(fixture.verify(), Err(VerifyError::SanCriticality));
        let twice =
            |fixture: &mut Fixture| fixture.leaf.custom_extensions.push(extension(&[2, 5, 29, 17], false, NAMES));
        check(twice, VerifyError::Extension { extension: "subjectAltName" });
    }

    #[test]
    fn a_leaf_must_say_that_it_is_no_ca() {
        check(|f| f.leaf.is_ca = IsCa::NoCa, VerifyError::BasicConstraints);
        check(|f| f.leaf.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)), VerifyError::BasicConstraints);
    }

    #[test]
    fn key_usage_is_present_critical_and_exact() {
        check(|f| f.leaf.key_usages.clear(), VerifyError::KeyUsage);
        check(|f| f.leaf.key_usages.push(KeyUsagePurpose::KeyEncipherment), VerifyError::KeyUsage);
        let cert_sign = FieldError::KeyUsage { names: "Digital Signature, Key Cert Sign".to_owned() };
        check(|f| f.leaf.key_usages.push(KeyUsagePurpose::KeyCertSign), cert_sign.into());
        let not_critical = |fixture: &mut Fixture| {
            fixture.leaf.key_usages.clear();
            fixture.leaf.custom_extensions.push(extension(&[2, 5, 29, 15], false, &[3, 2, 7, 0x80]));
        };
        check(not_critical, VerifyError::KeyUsage);
        let encipherment = |fixture: &mut Fixture| {
            fixture.leaf.key_usages.push(KeyUsagePurpose::KeyEncipherment);
            fixture.usages = fixture.usages.with(Usage::KeyEncipherment);
        };
        check(encipherment, VerifyError::KeyEncipherment);
        let mut rsa = Fixture::new();
        encipherment(&mut rsa);
        rsa.key = PrivateKey::generate(KeyAlgorithm::Rsa2048).unwrap();
        rsa.verify().unwrap();
    }

    #[test]
    fn extended_key_usage_is_exact() {
        check(|f| drop(f.leaf.extended_key_usages.pop()), VerifyError::ExtendedKeyUsage);
        check(|f| f.leaf.extended_key_usages.clear(), VerifyError::ExtendedKeyUsage);
        let server_only = Usages::empty().with(Usage::DigitalSignature).with(Usage::ServerAuth);
        check(|f| f.usages = server_only, VerifyError::ExtendedKeyUsage);
        let any = |fixture: &mut Fixture| fixture.leaf.extended_key_usages.push(ExtendedKeyUsagePurpose::Any);
        check(any, FieldError::ExtendedKeyUsage.into());
    }

    #[test]
    fn validity_is_within_the_grant_at_the_bound_and_one_second_past_it() {
        let second = Duration::from_secs(1);
        for (not_before, not_after, now_after, expected) in [
            (MAX_BACKDATE, LIFETIME, Duration::ZERO, Ok(())),
            (MAX_BACKDATE + second, LIFETIME, Duration::ZERO, Err(VerifyError::Backdated)),
            (Duration::ZERO, LIFETIME + MAX_CLOCK_SKEW, Duration::ZERO, Ok(())),
            (Duration::ZERO, LIFETIME + MAX_CLOCK_SKEW + second, Duration::ZERO, Err(VerifyError::Lifetime)),
            (Duration::ZERO, second, second, Err(VerifyError::Expired)),
        ] {
            let mut fixture = Fixture::new();
            fixture.leaf.not_before = (fixture.now - not_before).into();
            fixture.leaf.not_after = (fixture.now + not_after).into();
            fixture.now += now_after;
            assert_eq!(fixture.verify(), expected, "{not_before:?} {not_after:?}");
        }
        let mut fixture = Fixture::new();
        fixture.leaf.not_before = (fixture.now + MAX_CLOCK_SKEW).into();
        fixture.verify().unwrap();
        fixture.leaf.not_before = (fixture.now + MAX_CLOCK_SKEW + second).into();
        assert_eq!(fixture.verify(), Err(VerifyError::NotYetValid));
    }

    #[test]
    fn every_intermediate_may_sign() {
        let error = VerifyError::Intermediate { index: 1 };
        check(|f| f.intermediate.is_ca = IsCa::ExplicitNoCa, error.clone());
        check(|f| f.intermediate.key_usages = vec![KeyUsagePurpose::CrlSign], error.clone());
        check(|f| f.intermediate.key_usages.clear(), error.clone());
        let not_critical = |fixture: &mut Fixture| {
            fixture.intermediate.key_usages.clear();
            fixture.intermediate.custom_extensions.push(extension(&[2, 5, 29, 15], false, &[3, 2, 2, 4]));
        };
        check(not_critical, error);
    }

    #[test]
    fn the_chain_holds_the_path_and_nothing_else() {
        let fixture = Fixture::new();
        let root_last = |chain: &mut Vec<Vec<u8>>| chain.extend([chain[2].clone(), chain[1].clone()]);
        assert_eq!(fixture.verify_chain(root_last), Err(VerifyError::RootInChain { index: 2 }));
        let missing = |chain: &mut Vec<Vec<u8>>| drop(chain.remove(1));
        assert_eq!(fixture.verify_chain(missing), Err(VerifyError::Path(webpki::Error::UnknownIssuer)));
        let twice = |chain: &mut Vec<Vec<u8>>| chain.insert(1, chain[1].clone());
        assert_eq!(fixture.verify_chain(twice), Err(VerifyError::Unrelated));
        let stranger = |chain: &mut Vec<Vec<u8>>| {
            let elsewhere = Fixture::new();
            elsewhere.verify_chain(|signed| chain.insert(2, signed[1].clone())).unwrap();
        };
        assert_eq!(fixture.verify_chain(stranger), Err(VerifyError::Unrelated));
    }

    #[test]
    fn the_path_obeys_its_cas() {
        let path = |error| VerifyError::Path(error);
        let constraints = NameConstraints {
            permitted_subtrees: vec![GeneralSubtree::DnsName("other.example".to_owned())],
            excluded_subtrees: Vec::new(),
        };
        let constrained = constraints.clone();
        check(|f| f.intermediate.name_constraints = Some(constrained), path(webpki::Error::NameConstraintViolation));
        check(|f| f.root.name_constraints = Some(constraints), path(webpki::Error::NameConstraintViolation));
        let mut fixture = Fixture::new();
        fixture.intermediate.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        assert!(matches!(fixture.verify(), Err(VerifyError::Path(webpki::Error::RequiredEkuNotFoundContext(_)))));
        fixture.intermediate.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        fixture.verify().unwrap();
        let expired = |fixture: &mut Fixture| fixture.root.not_after = (fixture.now - Duration::from_secs(1)).into();
        check(expired, VerifyError::RootExpired);
        let mut fixture = Fixture::new();
        fixture.intermediate.not_after = (fixture.now - Duration::from_secs(1)).into();
        assert!(matches!(fixture.verify(), Err(VerifyError::Path(webpki::Error::CertExpired { .. }))));
        let critical = extension(&[1, 2, 3, 4], true, &[5, 0]);
        check(|f| f.leaf.custom_extensions.push(critical), path(webpki::Error::UnsupportedCriticalExtension));
    }
}
