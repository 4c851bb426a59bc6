//! What a signer must know of a CA certificate to issue under it.

use std::time::SystemTime;

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::ParsedExtension;

use super::{
    KeyError, PublicKey,
    chain::{is_ca, parse, system_time},
};

/// A certificate above a leaf, read and not believed.
#[derive(Clone, Debug)]
pub(crate) struct CaCertificate {
    pub(crate) der: CertificateDer<'static>,
    /// The subject in DER, as the certificate spells it.
    pub(crate) subject: Vec<u8>,
    /// subjectKeyIdentifier, when there is one.
    pub(crate) key_id: Option<Vec<u8>>,
    /// The certified key, or why we do not know such keys.
    pub(crate) public_key: Result<PublicKey, KeyError>,
    /// basicConstraints CA:TRUE and keyUsage keyCertSign.
    pub(crate) may_sign: bool,
    /// Issuer and subject are the same: a root.
    pub(crate) is_root: bool,
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
}

impl CaCertificate {
    /// `None` if it does not parse.
    pub(crate) fn parse(der: CertificateDer<'static>) -> Option<Self> {
        let certificate = parse(&der)?;
        let key_id = certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
            _ => None,
        });
        let subject = certificate.subject().as_raw().to_vec();
        Some(Self {
            key_id,
            public_key: PublicKey::from_spki(certificate.public_key()),
            may_sign: is_ca(&certificate),
            is_root: subject == certificate.issuer().as_raw(),
            not_before: system_time(certificate.validity().not_before),
            not_after: system_time(certificate.validity().not_after),
            subject,
            der,
        })
    }
}
