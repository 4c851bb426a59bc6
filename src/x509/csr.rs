//! PKCS#10 requests (RFC 2986): parsed whole, signature checked, nothing in them left unread.
//!
//! A [`Csr`] is proof that its sender holds the private key, and says only what [`Names`] and [`Usages`] can say. It
//! grants nothing: its names are an ask. Extensions that are neither critical nor names nor usages are not copied into
//! any certificate and therefore ignored; every other thing not understood is refused.

use std::{collections::HashSet, fmt};

use rustls::pki_types::pem::{PemObject as _, SectionKind};
use x509_parser::{
    asn1_rs::{Any, FromDer as _, Oid, Tag},
    certification_request::X509CertificationRequest,
    extensions::{ParsedExtension, X509Extension},
    oid_registry::{
        OID_PKCS1_SHA256WITHRSA, OID_PKCS1_SHA384WITHRSA, OID_PKCS1_SHA512WITHRSA, OID_PKCS9_EXTENSION_REQUEST,
        OID_SIG_ECDSA_WITH_SHA256, OID_SIG_ECDSA_WITH_SHA384, OID_SIG_ED25519,
    },
};

use super::{
    Names, PublicKey, Usage, Usages, der,
    key::KeyError,
    read::{self, FieldError},
};

/// Bytes of a request, DER or PEM.
pub const MAX_PKCS10_BYTES: usize = 16 * 1024;

/// A PKCS#10 request whose signature is good.
pub struct Csr {
    der: Vec<u8>,
    names: Names,
    usages: Usages,
    public_key: PublicKey,
}

impl Csr {
    /// Parses one request, DER or PEM ("CERTIFICATE REQUEST"), of at most [`MAX_PKCS10_BYTES`].
    pub fn parse(bytes: &[u8]) -> Result<Self, CsrError> {
        if bytes.len() > MAX_PKCS10_BYTES {
            return Err(CsrError::TooLong { bytes: bytes.len() });
        }
        // A SEQUENCE begins DER; nothing in PEM begins so.
        let der = if bytes.first() == Some(&0x30) { bytes.to_vec() } else { from_pem(bytes)? };
        let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|_| CsrError::Malformed)?;
        if !rest.is_empty() {
            return Err(CsrError::TrailingData { bytes: rest.len() });
        }
        let info = &request.certification_request_info;
        let public_key = PublicKey::from_spki(&info.subject_pki)?;
        check_signature(&request)?;

        let mut names = Names::default();
        read::subject(&info.subject, &mut names)?;
        let usages = match extension_request(info.raw)? {
            Some(extensions) => read_extensions(extensions, &mut names)?,
            None => Usages::empty(),
        };
        names.check().map_err(FieldError::Name)?;
        if usages.contains(Usage::KeyEncipherment) && !public_key.algorithm().is_rsa() {
            return Err(CsrError::KeyEncipherment);
        }
        Ok(Self { names, usages, public_key, der })
    }

    /// Subject and SANs asked for; empty when the request names nobody.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// Usages asked for; empty when the request leaves them open.
    pub fn usages(&self) -> Usages {
        self.usages
    }

    /// The key to certify, of which the sender holds the private half.
    pub fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// The request as it was signed.
    pub fn der(&self) -> &[u8] {
        &self.der
    }
}

/// Shows names and key, not the body.
impl fmt::Debug for Csr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Csr").field("names", &self.names).field("public_key", &self.public_key).finish_non_exhaustive()
    }
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Over [`MAX_PKCS10_BYTES`].
    #[error("a PKCS#10 request has at most 16384 bytes, this one {bytes}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// Neither DER nor the right PEM.
    #[error("no PKCS#10 request found: send DER, or PEM with one CERTIFICATE REQUEST block")]
    NotFound,
    /// A second PEM block of any kind.
    #[error("the PEM must hold one CERTIFICATE REQUEST block and no other: a private key must never be sent")]
    OtherBlocks,
    /// No CertificationRequest (RFC 2986 section 4.2).
    #[error("the PKCS#10 request is truncated or malformed")]
    Malformed,
    /// Bytes after the request.
    #[error("{bytes} bytes follow the end of the PKCS#10 request")]
    TrailingData {
        /// How many.
        bytes: usize,
    },
    /// An unsupported or weak key.
    #[error("the public key is refused")]
    Key(#[from] KeyError),
    /// A signature algorithm that is weak or unknown.
    #[error(
        "signature algorithm {oid} is not supported: use ECDSA or RSA (PKCS#1 1.5) with SHA-256 or more, or Ed25519"
    )]
    SignatureAlgorithm {
        /// Which.
        oid: String,
    },
    /// The sender does not hold the private key, or the request was changed.
    #[error("the signature of the PKCS#10 request does not verify with the key in it")]
    Signature,
    /// An attribute other than extensionRequest, challengePassword included.
    #[error("attributes: {oid} is not supported, only extensionRequest is")]
    Attribute {
        /// Its type.
        oid: String,
    },
    /// An attribute given twice, or with several values.
    #[error("attributes: extensionRequest must be given once, with one value")]
    DuplicateAttribute,
    /// A critical extension that no certificate of ours carries.
    #[error("extensions: {oid} is critical and not supported")]
    CriticalExtension {
        /// Its type.
        oid: String,
    },
    /// An extension given twice (RFC 5280 section 4.2).
    #[error("extensions: {oid} is given twice")]
    DuplicateExtension {
        /// Its type.
        oid: String,
    },
    /// An extension that is not what its type says.
    #[error("extensions: {oid} is malformed")]
    MalformedExtension {
        /// Its type.
        oid: String,
    },
    /// basicConstraints with CA:TRUE.
    #[error("extensions: basicConstraints asks for a CA certificate, which no workload gets")]
    CertificateAuthority,
    /// keyEncipherment asked for a key that only signs.
    #[error("key usage: key encipherment needs an RSA key")]
    KeyEncipherment,
    /// A name or usage that is not supported.
    #[error(transparent)]
    Field(#[from] FieldError),
}

impl CsrError {
    /// Stable reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLong { .. } => "CSR_TOO_LONG",
            Self::NotFound | Self::OtherBlocks | Self::Malformed | Self::TrailingData { .. } => "CSR_MALFORMED",
            Self::Key(_) => "CSR_KEY",
            Self::SignatureAlgorithm { .. } | Self::Signature => "CSR_SIGNATURE",
            Self::Attribute { .. } | Self::DuplicateAttribute => "CSR_ATTRIBUTE",
            Self::CriticalExtension { .. } | Self::DuplicateExtension { .. } | Self::MalformedExtension { .. } => {
                "CSR_EXTENSION"
            }
            Self::CertificateAuthority => "CSR_CERTIFICATE_AUTHORITY",
            Self::KeyEncipherment => "CSR_USAGE",
            Self::Field(FieldError::KeyUsage { .. } | FieldError::ExtendedKeyUsage) => "CSR_USAGE",
            Self::Field(_) => "CSR_NAME",
        }
    }
}

fn from_pem(text: &[u8]) -> Result<Vec<u8>, CsrError> {
    let mut blocks = <(SectionKind, Vec<u8>)>::pem_slice_iter(text);
    let Some(Ok((kind, der))) = blocks.next() else {
        return Err(CsrError::NotFound);
    };
    if kind != SectionKind::Csr || blocks.next().is_some() {
        return Err(CsrError::OtherBlocks);
    }
    Ok(der)
}

/// The library would verify SHA-1 too; we do not.
fn check_signature(request: &X509CertificationRequest<'_>) -> Result<(), CsrError> {
    const ALLOWED: [Oid<'static>; 6] = [
        OID_SIG_ECDSA_WITH_SHA256,
        OID_SIG_ECDSA_WITH_SHA384,
        OID_SIG_ED25519,
        OID_PKCS1_SHA256WITHRSA,
        OID_PKCS1_SHA384WITHRSA,
        OID_PKCS1_SHA512WITHRSA,
    ];
    let algorithm = &request.signature_algorithm.algorithm;
    if !ALLOWED.contains(algorithm) {
        return Err(CsrError::SignatureAlgorithm { oid: algorithm.to_id_string() });
    }
    request.verify_signature().map_err(|_| CsrError::Signature)
}

/// The extensions in the extensionRequest attribute (RFC 2985 section 5.4.2), which must be the only attribute.
///
/// Walked here because the library stops at the first value it understands and ignores what follows it.
fn extension_request(info: &[u8]) -> Result<Option<&[u8]>, CsrError> {
    let fields = der::only(info).and_then(|info| der::children(info.data)).ok_or(CsrError::Malformed)?;
    let [_version, _subject, _key, attributes] = fields.as_slice() else {
        return Err(CsrError::Malformed);
    };
    let mut extensions = None;
    for attribute in der::children(attributes.data).ok_or(CsrError::Malformed)? {
        let fields = der::children(attribute.data).ok_or(CsrError::Malformed)?;
        let [kind, values] = fields.as_slice() else {
            return Err(CsrError::Malformed);
        };
        let kind = kind.clone().oid().map_err(|_| CsrError::Malformed)?;
        if kind != OID_PKCS9_EXTENSION_REQUEST {
            return Err(CsrError::Attribute { oid: kind.to_id_string() });
        }
        let values = der::children(values.data).ok_or(CsrError::Malformed)?;
        let [value] = values.as_slice() else {
            return Err(CsrError::DuplicateAttribute);
        };
        if !der::is(value, Tag::Sequence) {
            return Err(CsrError::Malformed);
        }
        if extensions.replace(value.data).is_some() {
            return Err(CsrError::DuplicateAttribute);
        }
    }
    Ok(extensions)
}

/// Adds the names to `names` and returns the usages.
fn read_extensions(mut rest: &[u8], names: &mut Names) -> Result<Usages, CsrError> {
    let mut usages = Vec::new();
    let mut seen = HashSet::new();
    while !rest.is_empty() {
        let (after, whole) = Any::from_der(rest).map_err(|_| CsrError::Malformed)?;
        let (_, extension) = X509Extension::from_der(rest).map_err(|_| CsrError::Malformed)?;
        rest = after;
        let oid = extension.oid.to_id_string();
        let fields = 2 + usize::from(extension.critical);
        let exact = der::children(whole.data).is_some_and(|given| given.len() == fields);
        if !exact || der::only(extension.value).is_none() {
            return Err(CsrError::MalformedExtension { oid });
        }
        if !seen.insert(extension.oid.clone()) {
            return Err(CsrError::DuplicateExtension { oid });
        }
        match extension.parsed_extension() {
            ParsedExtension::SubjectAlternativeName(san) => read::alternative_names(san, names)?,
            ParsedExtension::KeyUsage(usage) => usages.extend(read::key_usage(usage)?.iter()),
            ParsedExtension::ExtendedKeyUsage(usage) => usages.extend(read::extended_key_usage(usage)?.iter()),
            ParsedExtension::BasicConstraints(constraints) if constraints.ca => {
                return Err(CsrError::CertificateAuthority);
            }
            ParsedExtension::BasicConstraints(_) => {}
            ParsedExtension::ParseError { .. } => return Err(CsrError::MalformedExtension { oid }),
            _ if extension.critical => return Err(CsrError::CriticalExtension { oid }),
            _ => {}
        }
    }
    Ok(usages.into_iter().collect())
}
