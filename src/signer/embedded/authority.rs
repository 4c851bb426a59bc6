//! One CA that can sign: its key, its certificate, and what stands above it up to the roots.
//!
//! What is wrong with an operator's CA is found when it is read and not when a workload waits: [`Authority::prove`] signs
//! a certificate and verifies it. Which CA signs when is not decided here.

use std::time::{Duration, SystemTime};

use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyUsagePurpose, SerialNumber};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use zeroize::Zeroizing;

use super::leaf::{self, Leaf};
use crate::{
    signer::SignError,
    x509::{
        Bundle, CaCertificate, Chain, ChainError, Expected, KeyAlgorithm, KeyError, Names, PrivateKey, PublicKey,
        Usage, Usages, VerifyError, chain::MAX_CHAIN_CERTIFICATES, pem,
    },
};

/// How far NotBefore is set back, for verifiers whose clocks run late.
pub const BACKDATE: Duration = Duration::from_secs(30);

/// A key and the certificates that belong to it.
#[derive(Debug)]
pub(super) struct Authority {
    key: PrivateKey,
    certificate: CaCertificate,
    /// Ends a leaf's chain: the CA's own certificate and what is above it, without roots. Empty for a root.
    above: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    key_id: Vec<u8>,
    /// The first end of `certificate` and `above`.
    not_after: SystemTime,
}

impl Authority {
    /// Makes a root that signs leaves only, valid from now for `lifetime`.
    pub(super) fn make(lifetime: Duration, now: SystemTime) -> Result<Self, AuthorityError> {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256)?;
        let mut name = DistinguishedName::new();
        // A name of its own for each root: a verifier that finds issuers by name finds the right one.
        let id: String = leaf::key_id(key.public_key()).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        name.push(DnType::OrganizationName, "csrd");
        name.push(DnType::CommonName, format!("csrd embedded CA {id}"));
        let mut params = CertificateParams::default();
        params.distinguished_name = name;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.serial_number = Some(SerialNumber::from_slice(&leaf::random_serial()));
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + lifetime).into();
        let certificate = params.self_signed(&key).map_err(|_| KeyError::Sign)?;
        Self::new(key, vec![certificate.into()])
    }

    /// Reads a CA: the first of `certificates` is its own, the others and those `above` stand above it; self-signed ones
    /// are roots.
    pub(super) fn from_pem(key: &[u8], certificates: &[u8], above: &[u8]) -> Result<Self, AuthorityError> {
        let key = PrivateKey::from_pem(key)?;
        let mut own = CertificateDer::pem_slice_iter(certificates).peekable();
        if own.peek().is_none() {
            return Err(ChainError::Empty.into());
        }
        let read = own.chain(CertificateDer::pem_slice_iter(above)).take(MAX_CHAIN_CERTIFICATES + 1);
        let certificates = read.collect::<Result<Vec<_>, _>>().map_err(|_| ChainError::Pem)?;
        Self::new(key, certificates)
    }

    fn new(key: PrivateKey, certificates: Vec<CertificateDer<'static>>) -> Result<Self, AuthorityError> {
        let (count, max) = (certificates.len(), MAX_CHAIN_CERTIFICATES);
        if count > max {
            return Err(ChainError::TooMany { count, max }.into());
        }
        let parsed = certificates.into_iter().enumerate();
        let parsed = parsed.map(|(index, der)| CaCertificate::parse(der).ok_or(ChainError::Certificate { index }));
        let parsed = parsed.collect::<Result<Vec<_>, _>>()?;
        let certificate = parsed.first().ok_or(ChainError::Empty)?.clone();
        if !certificate.may_sign {
            return Err(AuthorityError::NotCa);
        }
        if certificate.public_key.as_ref() != Ok(key.public_key()) {
            return Err(AuthorityError::KeyMismatch);
        }
        let (roots, above): (Vec<_>, Vec<_>) = parsed.into_iter().partition(|certificate| certificate.is_root);
        if roots.is_empty() {
            return Err(AuthorityError::NoRoot);
        }
        let not_after = above.iter().map(|above| above.not_after).fold(certificate.not_after, SystemTime::min);
        let key_id = certificate.key_id.clone().unwrap_or_else(|| leaf::key_id(key.public_key()).to_vec());
        let der = |list: Vec<CaCertificate>| list.into_iter().map(|certificate| certificate.der).collect();
        Ok(Self { key, certificate, above: der(above), roots: der(roots), key_id, not_after })
    }

    /// Signs a certificate and verifies it, so that what is above the CA is known to lead to its root.
    pub(super) fn prove(&self, now: SystemTime) -> Result<(), AuthorityError> {
        if self.not_after <= now {
            return Err(AuthorityError::Expired);
        }
        if now < self.not_before() {
            return Err(AuthorityError::NotYetValid);
        }
        let (names, public_key, lifetime) = (&Names::default(), self.key.public_key(), BACKDATE);
        let usages = Usages::empty().with(Usage::DigitalSignature);
        let chain = self.sign(names, usages, public_key, lifetime, now)?;
        let bundle = Bundle::new(self.roots.clone())?;
        chain.verify(&bundle, &Expected { names, usages, public_key, lifetime, now }).map_err(AuthorityError::Unproven)
    }

    /// Signs a leaf valid from [`BACKDATE`] ago for `lifetime` from now, cut to the CA's own validity.
    pub(super) fn sign(
        &self,
        names: &Names,
        usages: Usages,
        public_key: &PublicKey,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Chain, SignError> {
        if !usages.contains(Usage::DigitalSignature) && !usages.contains(Usage::KeyEncipherment) {
            return Err(SignError::NoKeyUsage);
        }
        let leaf = Leaf {
            names,
            usages,
            public_key,
            not_before: (now - BACKDATE).max(self.not_before()),
            not_after: now.checked_add(lifetime).map_or(self.not_after, |end| end.min(self.not_after)),
            issuer: &self.certificate.subject,
            issuer_key_id: &self.key_id,
        };
        let mut certificates = Vec::with_capacity(1 + self.above.len());
        certificates.push(leaf.sign(&self.key)?.into());
        certificates.extend(self.above.iter().cloned());
        Chain::new(certificates).map_err(|_| SignError::Malformed)
    }

    /// Whether it may sign at `now`.
    pub(super) fn is_valid(&self, now: SystemTime) -> bool {
        self.not_before() <= now && now < self.not_after
    }

    pub(super) fn not_before(&self) -> SystemTime {
        self.certificate.not_before
    }

    pub(super) fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The CA's own certificate.
    pub(super) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate.der
    }

    pub(super) fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Key and certificate in one text, so that no crash can part them.
    pub(super) fn to_pem(&self) -> Zeroizing<String> {
        let (key, certificate) = (self.key.to_pem(), pem::encode("CERTIFICATE", &self.certificate.der));
        let mut both = Zeroizing::new(String::with_capacity(key.len() + certificate.len()));
        both.extend([key.as_str(), certificate.as_str()]);
        both
    }
}

/// Why certificates and a key make no CA.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    /// The certificates cannot be read.
    #[error("the certificates cannot be used")]
    Certificates(#[from] ChainError),
    /// The key cannot be read, made or used.
    #[error("the private key cannot be used")]
    Key(#[from] KeyError),
    /// The certificate may not sign others.
    #[error("the first certificate is no CA: basicConstraints CA:TRUE and keyUsage keyCertSign are needed")]
    NotCa,
    /// The key and the certificate are two pairs.
    #[error("the private key does not belong to the first certificate")]
    KeyMismatch,
    /// The CA's validity is past.
    #[error("the CA certificate, or one above it, has expired")]
    Expired,
    /// The CA's validity is to come.
    #[error("the CA certificate is not valid yet; is the clock right?")]
    NotYetValid,
    /// An intermediate without what is above it.
    #[error("no root found: add the certificates above the CA up to a self-signed root")]
    NoRoot,
    /// What it signs does not verify.
    #[error("what the CA signs does not verify with its root")]
    Unproven(#[source] VerifyError),
    /// It cannot sign.
    #[error("the CA cannot sign")]
    Sign(#[from] SignError),
}

#[cfg(test)]
mod tests {
    use rcgen::{DnValue, Issuer};

    use super::*;

    const HOUR: Duration = Duration::from_secs(60 * 60);

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000)
    }

    fn ca(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.not_before = (now() - HOUR).into();
        params.not_after = (now() + HOUR).into();
        params
    }

    /// PEM of an intermediate's key, of the intermediate and of its root; the intermediate can be changed before signing.
    fn intermediate(change: impl FnOnce(&mut CertificateParams)) -> [String; 3] {
        let (root_key, key) = (key(), key());
        let (root, mut params) = (ca("root"), ca("intermediate"));
        change(&mut params);
        let certificate = params.signed_by(&key, &Issuer::from_params(&root, &root_key)).unwrap();
        [key.to_pem().to_string(), certificate.pem(), root.self_signed(&root_key).unwrap().pem()]
    }

    fn key() -> PrivateKey {
        PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap()
    }

    fn read(key: &str, certificates: &[&str]) -> Result<Authority, AuthorityError> {
        let (certificate, above) =
            certificates.split_first().map_or(("", String::new()), |(own, above)| (*own, above.concat()));
        let authority = Authority::from_pem(key.as_bytes(), certificate.as_bytes(), above.as_bytes())?;
        authority.prove(now()).map(|()| authority)
    }

    #[track_caller]
    fn check(key: &str, certificates: &[&str], error: AuthorityError) {
        assert_eq!(read(key, certificates).map(|_| ()), Err(error));
    }

    #[test]
    fn a_ca_made_here_proves_itself_and_reads_back() {
        let made = Authority::make(HOUR, now()).unwrap();
        made.prove(now()).unwrap();
        let pem = made.to_pem();
        let read = read(&pem, &[&pem]).unwrap();
        assert_eq!(read.certificate(), made.certificate());
        assert_eq!(read.roots(), [made.certificate().clone()]);
        assert_ne!(Authority::make(HOUR, now()).unwrap().certificate.subject, made.certificate.subject);
    }

    #[test]
    fn an_intermediate_signs_with_what_is_above_it() {
        let [key, certificate, root] = &intermediate(|_| ());
        let authority = read(key, &[certificate, root]).unwrap();
        let usages = Usages::DEFAULT;
        let chain = authority.sign(&Names::default(), usages, authority.key.public_key(), HOUR, now()).unwrap();
        assert_eq!(chain.certificates()[1..], [authority.certificate().clone()]);
        assert_eq!(authority.roots().len(), 1);
    }

    #[test]
    fn an_issuers_name_is_copied_as_it_is_spelt() {
        let odd = |params: &mut CertificateParams| {
            let name = &mut params.distinguished_name;
            name.push(
                DnType::CustomDnType(vec![0, 9, 2342, 19200300, 100, 1, 25]),
                DnValue::Ia5String("dc".try_into().unwrap()),
            );
            name.push(DnType::OrganizationName, DnValue::PrintableString("Corp".try_into().unwrap()));
            name.push(DnType::CommonName, DnValue::BmpString("\u{fc}".try_into().unwrap()));
        };
        let [key, certificate, root] = &intermediate(odd);
        read(key, &[certificate, root]).unwrap();
    }

    #[test]
    fn validity_is_cut_to_the_cas_own() {
        let authority = Authority::make(HOUR, now()).unwrap();
        let validity = |lifetime, now| {
            let chain = authority.sign(&Names::default(), Usages::DEFAULT, authority.key.public_key(), lifetime, now);
            chain.map(|chain| (chain.not_before(), chain.not_after())).unwrap()
        };
        let second = Duration::from_secs(1);
        assert_eq!(validity(HOUR - second, now()), (now() - BACKDATE, now() + HOUR - second));
        assert_eq!(validity(HOUR, now() + second), (now() + second - BACKDATE, now() + HOUR));
        assert_eq!(validity(Duration::MAX, now() - BACKDATE), (now() - BACKDATE, now() + HOUR));
        assert!(authority.is_valid(now() + HOUR - second) && !authority.is_valid(now() + HOUR));
        assert!(authority.is_valid(now() - BACKDATE) && !authority.is_valid(now() - BACKDATE - second));
    }

    #[test]
    fn what_makes_no_ca_is_refused_when_it_is_read() {
        let [key, certificate, root] = &intermediate(|_| ());
        check(key, &[root], AuthorityError::KeyMismatch);
        check(key, &[certificate], AuthorityError::NoRoot);
        check(key, &[], ChainError::Empty.into());
        check(key, &["", root], ChainError::Empty.into());
        check(key, &["-----BEGIN CERTIFICATE-----\n!"], ChainError::Pem.into());
        check(key, &[&pem::encode("CERTIFICATE", b"garbage")], ChainError::Certificate { index: 0 }.into());
        let (count, max) = (MAX_CHAIN_CERTIFICATES + 1, MAX_CHAIN_CERTIFICATES);
        let most = root.repeat(max - 1);
        read(key, &[certificate, &most]).unwrap();
        check(key, &[certificate, &most, root], ChainError::TooMany { count, max }.into());
        check("no key", &[certificate, root], KeyError::NoKey.into());

        let [key, certificate, root] = &intermediate(|params| params.is_ca = IsCa::ExplicitNoCa);
        check(key, &[certificate, root], AuthorityError::NotCa);
        let [key, certificate, root] = &intermediate(|params| params.key_usages = vec![KeyUsagePurpose::CrlSign]);
        check(key, &[certificate, root], AuthorityError::NotCa);
        let [key, certificate, root] = &intermediate(|params| params.not_after = now().into());
        check(key, &[certificate, root], AuthorityError::Expired);
        let [key, certificate, root] = &intermediate(|params| params.not_before = (now() + HOUR / 2).into());
        check(key, &[certificate, root], AuthorityError::NotYetValid);
        let [key, certificate, _] = &intermediate(|_| ());
        let error = VerifyError::Path(webpki::Error::InvalidSignatureForPublicKey);
        check(key, &[certificate, root], AuthorityError::Unproven(error));
    }

    #[test]
    fn a_certificate_needs_a_key_usage() {
        let authority = Authority::make(HOUR, now()).unwrap();
        let usages = Usages::empty().with(Usage::ServerAuth);
        let signed = authority.sign(&Names::default(), usages, authority.key.public_key(), HOUR, now());
        assert_eq!(signed.map(|_| ()), Err(SignError::NoKeyUsage));
    }
}
