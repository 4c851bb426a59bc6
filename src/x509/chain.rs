//! Certificate chains and trust bundles: parsed and bounded, not yet believed; `verify` is where belief comes from.

use std::{
    collections::HashSet,
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use aws_lc_rs::digest::{SHA256, digest};
use bytes::Bytes;
use rustls::pki_types::{CertificateDer, TrustAnchor, pem::PemObject as _};
use webpki::anchor_from_trusted_cert;
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _, time::ASN1Time};

use super::pem;

/// Certificates in a chain, the leaf included; the strictest SPIFFE client takes no more.
pub const MAX_CHAIN_CERTIFICATES: usize = 16;
/// Roots in a bundle.
pub const MAX_BUNDLE_CERTIFICATES: usize = 64;
/// Bytes of one certificate in DER.
pub const MAX_CERTIFICATE_BYTES: usize = 64 * 1024;
/// Bytes of PEM that are read as a chain or bundle.
pub const MAX_CERTIFICATES_PEM_BYTES: usize = 1024 * 1024;

/// A leaf and its intermediates, leaf first, no root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    certificates: Vec<CertificateDer<'static>>,
    not_before: SystemTime,
    not_after: SystemTime,
    serial: String,
}

impl Chain {
    /// Takes certificates in DER, leaf first.
    pub fn from_der(certificates: Vec<Vec<u8>>) -> Result<Self, ChainError> {
        Self::new(certificates.into_iter().map(CertificateDer::from).collect())
    }

    /// Reads the CERTIFICATE blocks of `text`, leaf first; other blocks and text between them are passed over.
    pub fn from_pem(text: &[u8]) -> Result<Self, ChainError> {
        Self::new(read_pem(text)?)
    }

    /// As [`Chain::from_der`], for certificates that are shared already.
    pub(crate) fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, ChainError> {
        check_count(certificates.len(), MAX_CHAIN_CERTIFICATES)?;
        for (index, certificate) in certificates.iter().enumerate().skip(1) {
            parse(certificate).ok_or(ChainError::Certificate { index })?;
        }
        let leaf = parse(&certificates[0]).ok_or(ChainError::Certificate { index: 0 })?;
        let validity = leaf.validity();
        let (not_before, not_after) = (system_time(validity.not_before), system_time(validity.not_after));
        let serial = match leaf.raw_serial() {
            // The sign of a number whose first bit is set, no part of its value.
            [0, digits @ ..] if !digits.is_empty() => hex(digits),
            digits => hex(digits),
        };
        Ok(Self { not_before, not_after, serial, certificates })
    }

    /// This chain less the certificates that are roots in `bundle`, which some signers send along.
    pub(crate) fn without(mut self, bundle: &Bundle) -> Result<Self, ChainError> {
        self.certificates.retain(|certificate| !bundle.roots.contains(certificate));
        Self::new(self.certificates)
    }

    /// The leaf in DER.
    pub fn leaf_der(&self) -> &CertificateDer<'static> {
        &self.certificates[0]
    }

    /// Leaf first.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// PEM, leaf first.
    pub fn to_pem(&self) -> String {
        to_pem(&self.certificates)
    }

    /// DER, leaf first, without separators, as the Workload API sends it (SPIFFE Workload API section 5.2.1).
    pub fn concatenated_der(&self) -> Vec<u8> {
        concat(&self.certificates)
    }

    /// Start of the leaf's validity.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// End of the leaf's validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The leaf's serial number, lower-case hexadecimal without separators.
    pub fn serial_hex(&self) -> String {
        self.serial.clone()
    }
}

/// The roots by which certificates of one signer are verified. Equal bundles hold the same roots in order.
#[derive(Clone, Debug, Default)]
pub struct Bundle {
    roots: Vec<CertificateDer<'static>>,
    /// The roots as path building wants them, in the same order.
    anchors: Vec<TrustAnchor<'static>>,
    /// Start and end of each root's validity, which path building does not look at.
    validity: Vec<(SystemTime, SystemTime)>,
    pem: OnceLock<Bytes>,
}

impl Bundle {
    /// Takes CA certificates in DER.
    pub fn from_der(roots: Vec<Vec<u8>>) -> Result<Self, ChainError> {
        Self::new(roots.into_iter().map(CertificateDer::from).collect())
    }

    /// Reads the CERTIFICATE blocks of `text`.
    pub fn from_pem(text: &[u8]) -> Result<Self, ChainError> {
        Self::new(read_pem(text)?)
    }

    /// As [`Bundle::from_der`], without a root twice.
    pub(crate) fn new(mut roots: Vec<CertificateDer<'static>>) -> Result<Self, ChainError> {
        check_count(roots.len(), MAX_BUNDLE_CERTIFICATES)?;
        let mut seen = HashSet::new();
        roots.retain(|root| seen.insert(root.clone()));
        let (mut anchors, mut validity) = (Vec::new(), Vec::new());
        for (index, root) in roots.iter().enumerate() {
            let certificate = parse(root).ok_or(ChainError::Certificate { index })?;
            if !is_ca(&certificate) {
                return Err(ChainError::NotCa { index });
            }
            anchors.push(anchor_from_trusted_cert(root).map_err(|_| ChainError::Certificate { index })?.to_owned());
            let dates = certificate.validity();
            validity.push((system_time(dates.not_before), system_time(dates.not_after)));
        }
        Ok(Self { roots, anchors, validity, pem: OnceLock::new() })
    }

    /// No roots, because they have not been learned yet: nothing verifies. Never read from anywhere.
    pub(crate) fn none() -> Self {
        Self::default()
    }

    /// Whether the roots have not been learned yet.
    pub fn is_empty(&self) -> bool {
        self.roots.is_empty()
    }

    /// The roots in DER.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// PEM, written once for all who ask.
    pub fn pem(&self) -> Bytes {
        self.pem.get_or_init(|| to_pem(&self.roots).into()).clone()
    }

    /// DER without separators, as the Workload API sends it.
    pub fn concatenated_der(&self) -> Vec<u8> {
        concat(&self.roots)
    }

    pub(super) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }

    /// Whether `anchor` is the anchor of a root that is valid at `now`.
    pub(super) fn is_valid(&self, anchor: &TrustAnchor<'_>, now: SystemTime) -> bool {
        let valid = |(from, to): &(SystemTime, SystemTime)| *from <= now && now < *to;
        self.anchors.iter().zip(&self.validity).any(|(root, dates)| root == anchor && valid(dates))
    }

    /// SHA-256 of each root's DER, lower-case hexadecimal, in the order of [`Bundle::roots`].
    pub fn fingerprints(&self) -> Vec<String> {
        self.roots.iter().map(|root| hex(digest(&SHA256, root).as_ref())).collect()
    }
}

impl PartialEq for Bundle {
    fn eq(&self, other: &Self) -> bool {
        self.roots == other.roots
    }
}

impl Eq for Bundle {}

/// Certificates that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// Nothing there.
    #[error("no certificate found")]
    Empty,
    /// Over [`MAX_CHAIN_CERTIFICATES`] or [`MAX_BUNDLE_CERTIFICATES`].
    #[error("{count} certificates given, at most {max} allowed")]
    TooMany {
        /// How many.
        count: usize,
        /// The bound.
        max: usize,
    },
    /// Over [`MAX_CERTIFICATES_PEM_BYTES`].
    #[error("certificates have at most {MAX_CERTIFICATES_PEM_BYTES} bytes of PEM, these {bytes}")]
    TooLong {
        /// How many bytes.
        bytes: usize,
    },
    /// A block of PEM that is cut short or no base64.
    #[error("the PEM is malformed")]
    Pem,
    /// A certificate that does not parse, has bytes after its end, or is over [`MAX_CERTIFICATE_BYTES`].
    #[error("certificate {index} (counted from 0) is malformed or longer than {MAX_CERTIFICATE_BYTES} bytes")]
    Certificate {
        /// Its place.
        index: usize,
    },
    /// A root that may not sign certificates.
    #[error("certificate {index} (counted from 0) is no CA: basicConstraints CA:TRUE and keyCertSign are needed")]
    NotCa {
        /// Its place.
        index: usize,
    },
}

/// One certificate and nothing after it.
pub(super) fn parse(der: &[u8]) -> Option<X509Certificate<'_>> {
    if der.len() > MAX_CERTIFICATE_BYTES {
        return None;
    }
    match X509Certificate::from_der(der) {
        Ok((&[], certificate)) => Some(certificate),
        _ => None,
    }
}

/// Whether it may sign certificates (RFC 5280 sections 4.2.1.3 and 4.2.1.9); a CA without KeyUsage may not.
pub(super) fn is_ca(certificate: &X509Certificate<'_>) -> bool {
    let signs = matches!(certificate.key_usage(), Ok(Some(usage)) if usage.value.key_cert_sign());
    signs && matches!(certificate.basic_constraints(), Ok(Some(constraints)) if constraints.value.ca)
}

/// Times before 1970 are taken as 1970: no certificate of ours reaches there.
pub(super) fn system_time(time: ASN1Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or_default())
}

fn read_pem(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, ChainError> {
    if text.len() > MAX_CERTIFICATES_PEM_BYTES {
        return Err(ChainError::TooLong { bytes: text.len() });
    }
    CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>().map_err(|_| ChainError::Pem)
}

fn check_count(count: usize, max: usize) -> Result<(), ChainError> {
    match count {
        0 => Err(ChainError::Empty),
        count if count > max => Err(ChainError::TooMany { count, max }),
        _ => Ok(()),
    }
}

fn concat(certificates: &[CertificateDer<'_>]) -> Vec<u8> {
    certificates.iter().flat_map(|certificate| certificate.iter().copied()).collect()
}

fn to_pem(certificates: &[CertificateDer<'_>]) -> String {
    certificates.iter().map(|certificate| pem::encode("CERTIFICATE", certificate)).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyUsagePurpose};

    use super::*;
    use crate::x509::{KeyAlgorithm, PrivateKey};

    fn certificate(change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        change(&mut params);
        params.self_signed(&PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn a_chain_reads_back_from_pem_and_tells_its_leaf() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000);
        let leaf = certificate(|params| {
            params.not_before = start.into();
            params.not_after = (start + Duration::from_secs(60)).into();
            params.serial_number = Some(rcgen::SerialNumber::from_slice(&[0x80, 0x0a]));
        });
        let chain = Chain::from_der(vec![leaf.clone(), certificate(|_| ())]).unwrap();
        assert_eq!(Chain::from_pem(format!("text\n{}", chain.to_pem()).as_bytes()).unwrap(), chain);
        assert_eq!((chain.not_before(), chain.not_after()), (start, start + Duration::from_secs(60)));
        assert_eq!(chain.serial_hex(), "800a");
        assert_eq!(chain.leaf_der().as_ref(), leaf);
        assert!(chain.concatenated_der().starts_with(&leaf));
    }

    #[test]
    fn a_chain_loses_the_roots_that_its_signer_sent_along() {
        let [leaf, intermediate, root] = [(); 3].map(|()| certificate(|_| ()));
        let bundle = Bundle::from_der(vec![root.clone()]).unwrap();
        let whole = Chain::from_der(vec![leaf.clone(), intermediate.clone(), root.clone()]).unwrap();
        assert_eq!(whole.without(&bundle).unwrap(), Chain::from_der(vec![leaf, intermediate]).unwrap());
        assert_eq!(Chain::from_der(vec![root]).unwrap().without(&bundle), Err(ChainError::Empty));
        assert!(Bundle::none().is_empty() && !bundle.is_empty());
    }

    #[test]
    fn a_bundle_reads_back_and_holds_no_root_twice() {
        let (a, b) = (certificate(|_| ()), certificate(|_| ()));
        let bundle = Bundle::from_der(vec![a.clone(), b.clone(), a.clone()]).unwrap();
        assert_eq!(bundle.roots().len(), 2);
        assert_eq!(Bundle::from_pem(&bundle.pem()).unwrap(), bundle);
        assert_ne!(Bundle::from_der(vec![a]).unwrap(), bundle);
        assert_eq!(bundle.fingerprints()[1].len(), 64);
        assert!(bundle.concatenated_der().ends_with(&b));
    }

    #[test]
    fn what_is_no_certificate_is_refused_with_its_place() {
        let good = certificate(|_| ());
        let cut = good[..good.len() - 1].to_vec();
        let grown = [good.as_slice(), &[0]].concat();
        for bad in [cut, grown, Vec::new(), vec![0x30; MAX_CERTIFICATE_BYTES + 1]] {
            let error = Err(ChainError::Certificate { index: 1 });
            assert_eq!(Chain::from_der(vec![good.clone(), bad.clone()]).map(|_| ()), error);
            assert_eq!(Bundle::from_der(vec![good.clone(), bad]).map(|_| ()), error);
        }
        assert_eq!(Chain::from_pem(b"").map(|_| ()), Err(ChainError::Empty));
        assert_eq!(Bundle::from_pem(b"").map(|_| ()), Err(ChainError::Empty));
        assert_eq!(Chain::from_pem(b"-----BEGIN CERTIFICATE-----\n!").map(|_| ()), Err(ChainError::Pem));
        let long = vec![b'\n'; MAX_CERTIFICATES_PEM_BYTES + 1];
        assert_eq!(Chain::from_pem(&long).map(|_| ()), Err(ChainError::TooLong { bytes: long.len() }));
        assert_eq!(Chain::from_pem(&long[1..]).map(|_| ()), Err(ChainError::Empty));
    }

    #[test]
    fn a_root_must_be_allowed_to_sign() {
        let error = Err(ChainError::NotCa { index: 0 });
        let usage = certificate(|params| params.key_usages = vec![KeyUsagePurpose::CrlSign]);
        assert_eq!(Bundle::from_der(vec![usage]).map(|_| ()), error);
        let leaf = certificate(|params| params.is_ca = IsCa::ExplicitNoCa);
        assert_eq!(Bundle::from_der(vec![leaf]).map(|_| ()), error);
    }

    #[test]
    fn the_numbers_of_certificates_are_bounded() {
        let one = certificate(|_| ());
        Chain::from_der(vec![one.clone(); MAX_CHAIN_CERTIFICATES]).unwrap();
        let (count, max) = (MAX_CHAIN_CERTIFICATES + 1, MAX_CHAIN_CERTIFICATES);
        assert_eq!(Chain::from_der(vec![one.clone(); count]).map(|_| ()), Err(ChainError::TooMany { count, max }));
        Bundle::from_der(vec![one.clone(); MAX_BUNDLE_CERTIFICATES]).unwrap();
        let (count, max) = (MAX_BUNDLE_CERTIFICATES + 1, MAX_BUNDLE_CERTIFICATES);
        assert_eq!(Bundle::from_der(vec![one; count]).map(|_| ()), Err(ChainError::TooMany { count, max }));
    }
}
