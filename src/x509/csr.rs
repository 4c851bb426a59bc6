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
    #[error("a PKCS#10 request has at most {MAX_PKCS10_BYTES} bytes, this one {bytes}")]
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

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, sample::Index};
    use yasna::{DERWriter, DERWriterSeq, Tag, models::ObjectIdentifier};

    use super::*;
    use crate::x509::{
        KeyAlgorithm, PrivateKey,
        key::{MAX_RSA_EXPONENT_BYTES, MIN_RSA_EXPONENT},
        name::{MAX_NAMES, NameError},
        pem,
    };

    /// `openssl req -new -subj "/O=Example/O=Second/CN=web" -addext subjectAltName=...`, with everything we support.
    const OPENSSL: &str = "-----BEGIN CERTIFICATE REQUEST-----
MIIBrDCCAVICAQAwMTEQMA4GA1UECgwHRXhhbXBsZTEPMA0GA1UECgwGU2Vjb25k
MQwwCgYDVQQDDAN3ZWIwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASCw74ZPmtC
bZp1bFYK3q0C26KpYLtIbS2YY12aEn9YAjCKe/WZDEYcrgQWNIk62J6+880r/hWr
DNVHDi+b/YhqoIG+MIG7BgkqhkiG9w0BCQ4xga0wgaowTAYDVR0RBEUwQ4IPd2Vi
LmV4YW1wbGUub3JnhwQKAAABhxAgAQ24AAAAAAAAAAAAAAABhhhzcGlmZmU6Ly9l
eGFtcGxlLm9yZy93ZWIwDgYDVR0PAQH/BAQDAgeAMB0GA1UdJQQWMBQGCCsGAQUF
BwMBBggrBgEFBQcDAjAMBgNVHRMBAf8EAjAAMB0GA1UdDgQWBBSQCPkm9sgKuivo
8gSOZzsjy5MOaTAKBggqhkjOPQQDAgNIADBFAiAOSf2JoigzL2OSVoKIrwl836l1
sl2YyJVMz8x+QMlOqwIhAINC/4n3x7ZDC0MRejY0xkdq67ZAHiYRn4YxhIjTNY/+
-----END CERTIFICATE REQUEST-----
";

    const SAN: &[u64] = &[2, 5, 29, 17];
    const KEY_USAGE: &[u64] = &[2, 5, 29, 15];
    const EXTENDED_KEY_USAGE: &[u64] = &[2, 5, 29, 37];
    const BASIC_CONSTRAINTS: &[u64] = &[2, 5, 29, 19];
    const NAME_CONSTRAINTS: &[u64] = &[2, 5, 29, 30];
    const ECDSA_SHA256: &[u64] = &[1, 2, 840, 10045, 4, 3, 2];

    /// A request written by hand, so that each part of it can be wrong.
    struct Request {
        key: PrivateKey,
        subject: Vec<(&'static [u64], &'static str)>,
        /// The string type of the subject's values.
        subject_tag: Tag,
        /// Content of the [0] field: whole attributes.
        attributes: Vec<u8>,
        spki: Option<Vec<u8>>,
        signature_algorithm: &'static [u64],
    }

    impl Default for Request {
        fn default() -> Self {
            let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
            Self {
                key,
                subject: Vec::new(),
                subject_tag: yasna::tags::TAG_UTF8STRING,
                attributes: Vec::new(),
                spki: None,
                signature_algorithm: ECDSA_SHA256,
            }
        }
    }

    impl Request {
        fn der(&self) -> Vec<u8> {
            let info = sequence(|fields| {
                fields.next().write_u8(0);
                fields.next().write_sequence(|rdns| {
                    for (oid, text) in &self.subject {
                        rdns.next().write_set(|rdn| {
                            rdn.next().write_sequence(|attribute| {
                                attribute.next().write_oid(&ObjectIdentifier::from_slice(oid));
                                attribute
                                    .next()
                                    .write_tagged_implicit(self.subject_tag, |writer| writer.write_utf8_string(text));
                            });
                        });
                    }
                });
                fields.next().write_der(self.spki.as_deref().unwrap_or(self.key.public_key().spki_der()));
                fields.next().write_tagged_implicit(Tag::context(0), |writer| {
                    writer.write_sequence(|list| list.next().write_der(&self.attributes));
                });
            });
            let signature = self.key.sign(&info).unwrap();
            sequence(|fields| {
                fields.next().write_der(&info);
                fields.next().write_sequence(|algorithm| {
                    algorithm.next().write_oid(&ObjectIdentifier::from_slice(self.signature_algorithm));
                });
                fields.next().write_bitvec_bytes(&signature, signature.len() * 8);
            })
        }
    }

    fn sequence(content: impl FnOnce(&mut DERWriterSeq<'_>)) -> Vec<u8> {
        yasna::construct_der(|writer| writer.write_sequence(content))
    }

    fn oid(oid: &[u64]) -> Vec<u8> {
        yasna::construct_der(|writer| writer.write_oid(&ObjectIdentifier::from_slice(oid)))
    }

    fn attribute(kind: &[u64], values: &[Vec<u8>]) -> Vec<u8> {
        sequence(|fields| {
            fields.next().write_der(&oid(kind));
            fields.next().write_set(|set| values.iter().for_each(|value| set.next().write_der(value)));
        })
    }

    fn extension_request(extensions: &[Vec<u8>]) -> Vec<u8> {
        attribute(&[1, 2, 840, 113549, 1, 9, 14], &[extensions_of(extensions)])
    }

    fn extensions_of(extensions: &[Vec<u8>]) -> Vec<u8> {
        sequence(|list| extensions.iter().for_each(|extension| list.next().write_der(extension)))
    }

    fn extension(kind: &[u64], critical: bool, value: &[u8]) -> Vec<u8> {
        sequence(|fields| {
            fields.next().write_der(&oid(kind));
            if critical {
                fields.next().write_bool(true);
            }
            fields.next().write_bytes(value);
        })
    }

    fn san(names: &[(u64, &[u8])]) -> Vec<u8> {
        let value = sequence(|list| {
            for (kind, bytes) in names {
                list.next()
                    .write_tagged_implicit(Tag::context(*kind), |writer: DERWriter<'_>| writer.write_bytes(bytes));
            }
        });
        extension(SAN, false, &value)
    }

    fn bits(byte: u8, count: usize) -> Vec<u8> {
        yasna::construct_der(|writer| writer.write_bitvec_bytes(&[byte], count))
    }

    fn with(extensions: &[Vec<u8>]) -> Vec<u8> {
        Request { attributes: extension_request(extensions), ..Request::default() }.der()
    }

    fn with_spki(spki: Vec<u8>) -> Vec<u8> {
        Request { spki: Some(spki), ..Request::default() }.der()
    }

    fn rsa_spki(modulus_bits: usize, exponent: &[u8]) -> Vec<u8> {
        let mut modulus = vec![0xff; modulus_bits.div_ceil(8)];
        modulus[0] >>= modulus.len() * 8 - modulus_bits;
        let key = sequence(|fields| {
            fields.next().write_bigint_bytes(&modulus, true);
            fields.next().write_bigint_bytes(exponent, true);
        });
        spki(&[&[1, 2, 840, 113549, 1, 1, 1]], &key)
    }

    fn spki(algorithm: &[&[u64]], key: &[u8]) -> Vec<u8> {
        sequence(|fields| {
            fields.next().write_sequence(|list| algorithm.iter().for_each(|part| list.next().write_der(&oid(part))));
            fields.next().write_bitvec_bytes(key, key.len() * 8);
        })
    }

    #[test]
    fn an_openssl_request_is_read_whole_from_pem_and_der() {
        let csr = Csr::parse(OPENSSL.as_bytes()).unwrap();
        let names = Names {
            common_name: Some("web".to_owned()),
            organizations: vec!["Example".to_owned(), "Second".to_owned()],
            dns: vec![super::super::DnsName::parse("web.example.org").unwrap()],
            ips: vec!["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            uris: vec!["spiffe://example.org/web".to_owned()],
        };
        assert_eq!((csr.names(), csr.usages()), (&names, Usages::DEFAULT));
        assert_eq!(csr.public_key().algorithm(), KeyAlgorithm::EcdsaP256);
        assert_eq!(Csr::parse(csr.der()).unwrap().names(), &names);
        assert!(!format!("{csr:?}").contains("der"));
    }

    #[test]
    fn every_kind_of_key_proves_itself() {
        for algorithm in
            [KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Ed25519, KeyAlgorithm::Rsa2048]
        {
            let key = PrivateKey::generate(algorithm).unwrap();
            let request = rcgen::CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
            let csr = Csr::parse(request.serialize_request(&key).unwrap().der()).unwrap();
            assert_eq!(csr.public_key(), key.public_key());
        }
    }

    #[test]
    fn an_empty_request_asks_for_nothing() {
        let csr = Csr::parse(&Request::default().der()).unwrap();
        assert!(csr.names().is_empty() && csr.usages().is_empty());
    }

    #[track_caller]
    fn check(bytes: &[u8], error: CsrError) {
        assert_eq!(Csr::parse(bytes).map(|_| ()), Err(error));
    }

    #[test]
    fn what_is_no_single_request_is_refused() {
        let good = Request::default().der();
        check(&[], CsrError::NotFound);
        check(b"garbage", CsrError::NotFound);
        check(&[0x30, 0x80, 0, 0], CsrError::Malformed);
        check(&good[..good.len() - 1], CsrError::Malformed);
        check(&[good.as_slice(), &[0]].concat(), CsrError::TrailingData { bytes: 1 });
        check(pem::encode("NEW CERTIFICATE REQUEST", &good).as_bytes(), CsrError::NotFound);
        check(OPENSSL.repeat(2).as_bytes(), CsrError::OtherBlocks);
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap().to_pem();
        check(key.as_bytes(), CsrError::OtherBlocks);
        check(format!("{OPENSSL}{}", *key).as_bytes(), CsrError::OtherBlocks);
    }

    #[test]
    fn the_length_bound_holds_at_the_bound_and_one_past_it() {
        let mut text = OPENSSL.to_owned();
        text.extend(std::iter::repeat_n('\n', MAX_PKCS10_BYTES - OPENSSL.len()));
        Csr::parse(text.as_bytes()).unwrap();
        text.push('\n');
        check(text.as_bytes(), CsrError::TooLong { bytes: MAX_PKCS10_BYTES + 1 });
    }

    #[test]
    fn weak_and_unknown_keys_are_refused() {
        let exponent = MIN_RSA_EXPONENT.to_be_bytes();
        for bits in [1024, 2047, 2049, 4097, 8192] {
            check(&with_spki(rsa_spki(bits, &exponent)), KeyError::RsaSize { bits }.into());
        }
        for exponent in [&[3][..], &[1, 0, 0], &[1; MAX_RSA_EXPONENT_BYTES + 1]] {
            check(&with_spki(rsa_spki(2048, exponent)), KeyError::RsaExponent.into());
        }
        const EC: &[u64] = &[1, 2, 840, 10045, 2, 1];
        let p521: &[u64] = &[1, 3, 132, 0, 35];
        let p256: &[u64] = &[1, 2, 840, 10045, 3, 1, 7];
        check(&with_spki(spki(&[EC, p521], &[4; 133])), KeyError::Curve.into());
        check(&with_spki(spki(&[EC], &[4; 65])), KeyError::Curve.into());
        check(&with_spki(spki(&[EC, p256], &[2; 33])), KeyError::Point.into());
        check(&with_spki(spki(&[&[1, 3, 101, 112]], &[1; 31])), KeyError::Point.into());
        check(&with_spki(spki(&[&[1, 2, 840, 10040, 4, 1]], &[1; 31])), KeyError::Unsupported.into());
        check(&with_spki(spki(&[&[1, 2, 840, 113549, 1, 1, 1]], &[0x30, 0])), KeyError::RsaEncoding.into());
        // Of the right form, but on no curve.
        check(&with_spki(spki(&[EC, p256], &[4; 65])), CsrError::Signature);
    }

    #[test]
    fn a_signature_that_proves_nothing_is_refused() {
        let other = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        check(&with_spki(other.public_key().spki_der().to_vec()), CsrError::Signature);
        let sha1: &[u64] = &[1, 2, 840, 10045, 4, 1];
        let request = Request { signature_algorithm: sha1, ..Request::default() };
        check(&request.der(), CsrError::SignatureAlgorithm { oid: "1.2.840.10045.4.1".to_owned() });
        // The key's own kind decides: the same signature under another algorithm is none.
        let rsa: &[u64] = &[1, 2, 840, 113549, 1, 1, 11];
        check(&Request { signature_algorithm: rsa, ..Request::default() }.der(), CsrError::Signature);
    }

    #[test]
    fn attributes_are_read_to_their_end() {
        let attributes = |attributes: Vec<u8>| Request { attributes, ..Request::default() }.der();
        let good = extension_request(&[san(&[(2, b"a.example")])]);
        Csr::parse(&attributes(good.clone())).unwrap();
        let password: &[u64] = &[1, 2, 840, 113549, 1, 9, 7];
        let text = yasna::construct_der(|writer| writer.write_utf8_string("secret"));
        let unsupported = CsrError::Attribute { oid: "1.2.840.113549.1.9.7".to_owned() };
        check(&attributes(attribute(password, &[text])), unsupported);
        check(&attributes(good.repeat(2)), CsrError::DuplicateAttribute);
        // A second value, which the library would not see.
        let extensions = extensions_of(&[san(&[(2, b"a.example")])]);
        let kind: &[u64] = &[1, 2, 840, 113549, 1, 9, 14];
        check(&attributes(attribute(kind, &[extensions.clone(), extensions])), CsrError::DuplicateAttribute);
        check(&attributes(attribute(kind, &[])), CsrError::Malformed);
    }

    #[test]
    fn extensions_that_no_certificate_carries_are_refused() {
        let ca = sequence(|fields| fields.next().write_bool(true));
        check(&with(&[extension(BASIC_CONSTRAINTS, true, &ca)]), CsrError::CertificateAuthority);
        check(&with(&[extension(BASIC_CONSTRAINTS, false, &ca)]), CsrError::CertificateAuthority);
        let critical = |oid: &str| CsrError::CriticalExtension { oid: oid.to_owned() };
        check(&with(&[extension(&[1, 2, 3, 4], true, &[5, 0])]), critical("1.2.3.4"));
        Csr::parse(&with(&[extension(&[1, 2, 3, 4], false, &[5, 0])])).unwrap();
        let constraints = sequence(|fields| {
            fields.next().write_tagged_implicit(Tag::context(0), |writer| {
                writer.write_sequence(|list| {
                    list.next().write_sequence(|subtree| {
                        subtree
                            .next()
                            .write_tagged_implicit(Tag::context(2), |writer| writer.write_bytes(b"a.example"));
                    });
                });
            });
        });
        check(&with(&[extension(NAME_CONSTRAINTS, true, &constraints)]), critical("2.5.29.30"));
        let duplicate = CsrError::DuplicateExtension { oid: "2.5.29.17".to_owned() };
        check(&with(&[san(&[(2, b"a.example")]), san(&[(2, b"b.example")])]), duplicate);
        let malformed = |oid: &str| CsrError::MalformedExtension { oid: oid.to_owned() };
        check(&with(&[extension(SAN, false, &[0x30, 5, 1])]), malformed("2.5.29.17"));
        check(&with(&[extension(SAN, false, &[0x30, 0, 0x30, 0])]), malformed("2.5.29.17"));
        check(&with(&[extension(SAN, false, &[2, 1, 1])]), malformed("2.5.29.17"));
    }

    #[test]
    fn usages_that_no_policy_can_allow_are_refused() {
        let usage = |byte, count| with(&[extension(KEY_USAGE, true, &bits(byte, count))]);
        Csr::parse(&usage(0b1000_0000, 1)).unwrap();
        check(&usage(0b1010_0000, 3), CsrError::KeyEncipherment);
        let names = "Key Cert Sign".to_owned();
        check(&usage(0b0000_0100, 6), FieldError::KeyUsage { names }.into());
        let any = sequence(|list| list.next().write_der(&oid(&[2, 5, 29, 37, 0])));
        check(&with(&[extension(EXTENDED_KEY_USAGE, false, &any)]), FieldError::ExtendedKeyUsage.into());
        let own = sequence(|list| list.next().write_der(&oid(&[1, 2, 3])));
        check(&with(&[extension(EXTENDED_KEY_USAGE, false, &own)]), FieldError::ExtendedKeyUsage.into());
    }

    #[test]
    fn names_of_other_kinds_and_shapes_are_refused() {
        let name = |kind, bytes: &[u8]| with(&[san(&[(kind, bytes)])]);
        let refused = |kind| CsrError::Field(FieldError::NameKind { kind });
        check(&name(1, b"a@example.org"), refused("email"));
        check(&name(8, &[42, 3]), refused("registered id"));
        check(&name(3, b""), refused("X.400 address"));
        check(&name(5, b""), refused("EDI party name"));
        check(&name(0, &oid(&[1, 2, 3])), refused("other name"));
        check(&name(4, &[0x30, 0]), refused("directory name"));
        check(&name(2, b"\xff"), FieldError::NameEncoding.into());
        check(&name(7, &[10, 0, 0]), FieldError::NameEncoding.into());
        let mapped = "::ffff:10.0.0.1".parse::<std::net::Ipv6Addr>().unwrap();
        check(&name(7, &mapped.octets()), FieldError::Name(NameError::Ip(mapped.to_string())).into());
        for (dns, part) in [
            (&b"a\0.example"[..], "may hold only"),
            (b"A.example", "may hold only"),
            (b"*", "may hold only"),
            ("b\u{fc}cher.example".as_bytes(), "xn--"),
            (b"", "1 to 253"),
        ] {
            let error = Csr::parse(&name(2, dns)).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
        let subject = |oid: &'static [u64], text| Request { subject: vec![(oid, text)], ..Request::default() }.der();
        let unit = FieldError::SubjectAttribute { oid: "2.5.4.11".to_owned() };
        check(&subject(&[2, 5, 4, 11], "unit"), unit.into());
        let error = Csr::parse(&subject(&[2, 5, 4, 3], "a\0b")).unwrap_err();
        assert!(error.to_string().starts_with("common_name"), "{error}");
        let subject_tag = yasna::tags::TAG_BMPSTRING;
        let wide = Request { subject: vec![(&[2, 5, 4, 3], "a")], subject_tag, ..Request::default() };
        check(&wide.der(), FieldError::SubjectText { oid: "2.5.4.3".to_owned() }.into());
        let twice = Request { subject: vec![(&[2, 5, 4, 3], "a"), (&[2, 5, 4, 3], "b")], ..Request::default() };
        check(&twice.der(), FieldError::CommonNames.into());
    }

    #[test]
    fn the_number_of_names_is_bounded() {
        let many = |count: usize| {
            let names: Vec<_> = (0..count).map(|i| format!("n{i}.example")).collect();
            with(&[san(&names.iter().map(|name| (2, name.as_bytes())).collect::<Vec<_>>())])
        };
        Csr::parse(&many(MAX_NAMES)).unwrap();
        let too_many = NameError::TooMany { field: "subject alternative names", count: MAX_NAMES + 1, max: MAX_NAMES };
        check(&many(MAX_NAMES + 1), FieldError::Name(too_many).into());
        let huge = many(10_000);
        check(&huge, CsrError::TooLong { bytes: huge.len() });
    }

    proptest! {
        #[test]
        fn a_changed_request_is_refused_without_panic(changes in proptest::collection::vec((any::<Index>(), any::<u8>()), 1..4)) {
            let original = Csr::parse(OPENSSL.as_bytes()).unwrap();
            let mut der = original.der().to_vec();
            for (index, byte) in changes {
                let index = index.index(der.len());
                der[index] = byte;
            }
            if let Ok(csr) = Csr::parse(&der) {
                // Only the encoding of the signature may vary; what was signed may not.
                prop_assert_eq!(csr.names(), original.names());
                prop_assert_eq!(csr.public_key(), original.public_key());
            }
        }

        #[test]
        fn a_cut_or_grown_request_is_refused_without_panic(cut in any::<Index>(), more in proptest::collection::vec(any::<u8>(), 1..9)) {
            let der = Csr::parse(OPENSSL.as_bytes()).unwrap().der().to_vec();
            prop_assert!(Csr::parse(&der[..cut.index(der.len())]).is_err());
            let grown = [der.as_slice(), &more].concat();
            prop_assert!(Csr::parse(&grown).is_err());
        }

        #[test]
        fn signed_extensions_of_any_bytes_are_judged_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64), kind in 14_u64..38) {
            let _ = Csr::parse(&with(&[extension(&[2, 5, 29, kind], false, &bytes)]));
            let _ = Csr::parse(&Request { attributes: bytes, ..Request::default() }.der());
        }
    }
}
