//! Keys: private keys made or read here, redacted in `Debug` and zeroized when dropped, and public keys in one encoding.
//!
//! A [`PrivateKey`] keeps the library's key pair beside its PKCS#8 form, so that signing never parses; a [`PublicKey`] is
//! of a kind and size in [`KeyAlgorithm`] by construction and is encoded anew, so that equal keys are equal bytes.

use std::fmt;

use aws_lc_rs::{
    encoding::{AsDer, Pkcs8V1Der},
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm,
        Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256, RsaKeyPair,
    },
};
use rcgen::PublicKeyData;
use rustls::pki_types::{PrivateKeyDer, pem::PemObject as _};
use x509_parser::{
    oid_registry::{
        OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_PKCS1_RSAENCRYPTION, OID_SIG_ED25519,
    },
    x509::SubjectPublicKeyInfo,
};
use zeroize::{Zeroize as _, Zeroizing};

use super::{der, pem};

/// Bytes of PEM that [`PrivateKey::from_pem`] reads; an RSA key of 4096 bits takes 3.3 KiB.
pub const MAX_KEY_PEM_BYTES: usize = 16 * 1024;
/// The smallest RSA public exponent; smaller ones have a history of broken padding checks (FIPS 186-5 section A.1.1).
pub const MIN_RSA_EXPONENT: u64 = 65_537;
/// Significant bytes of an RSA public exponent; a longer one makes each verification slow.
pub const MAX_RSA_EXPONENT_BYTES: usize = 4;

/// A kind of key that may be made or asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyAlgorithm {
    /// ECDSA on NIST P-256; the default.
    EcdsaP256,
    /// ECDSA on NIST P-384.
    EcdsaP384,
    /// Ed25519 (RFC 8410).
    Ed25519,
    /// RSA, 2048-bit modulus.
    Rsa2048,
    /// RSA, 3072-bit modulus.
    Rsa3072,
    /// RSA, 4096-bit modulus.
    Rsa4096,
}

impl KeyAlgorithm {
    /// Every algorithm, weakest default first.
    pub const ALL: [Self; 6] =
        [Self::EcdsaP256, Self::EcdsaP384, Self::Ed25519, Self::Rsa2048, Self::Rsa3072, Self::Rsa4096];

    /// The name used in policies and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::EcdsaP256 => "ecdsa-p256",
            Self::EcdsaP384 => "ecdsa-p384",
            Self::Ed25519 => "ed25519",
            Self::Rsa2048 => "rsa-2048",
            Self::Rsa3072 => "rsa-3072",
            Self::Rsa4096 => "rsa-4096",
        }
    }

    /// The algorithm of that name, as [`KeyAlgorithm::name`] gives it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }

    /// Whether it is RSA of any size: making such a key takes up to seconds, and only such a key can encipher another.
    pub fn is_rsa(self) -> bool {
        matches!(self, Self::Rsa2048 | Self::Rsa3072 | Self::Rsa4096)
    }

    fn of_rsa_bits(bits: usize) -> Result<Self, KeyError> {
        match bits {
            2048 => Ok(Self::Rsa2048),
            3072 => Ok(Self::Rsa3072),
            4096 => Ok(Self::Rsa4096),
            bits => Err(KeyError::RsaSize { bits }),
        }
    }

    /// AlgorithmIdentifier in DER of the signatures made with such a key (RFC 5758, RFC 8410, RFC 4055).
    pub(crate) fn signature_identifier(self) -> &'static [u8] {
        match self {
            Self::EcdsaP256 => b"\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02",
            Self::EcdsaP384 => b"\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x03",
            Self::Ed25519 => b"\x30\x05\x06\x03\x2b\x65\x70",
            Self::Rsa2048 | Self::Rsa3072 | Self::Rsa4096 => {
                b"\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0b\x05\x00"
            }
        }
    }

    fn signature(self) -> &'static rcgen::SignatureAlgorithm {
        match self {
            Self::EcdsaP256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            Self::EcdsaP384 => &rcgen::PKCS_ECDSA_P384_SHA384,
            Self::Ed25519 => &rcgen::PKCS_ED25519,
            Self::Rsa2048 | Self::Rsa3072 | Self::Rsa4096 => &rcgen::PKCS_RSA_SHA256,
        }
    }
}

impl fmt::Display for KeyAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A private key. It leaves this type only as PKCS#8, for the workload it was made for.
pub struct PrivateKey {
    pair: Pair,
    pkcs8: Zeroizing<Vec<u8>>,
    public_key: PublicKey,
}

/// The library wipes its own copy of the key when it is dropped.
enum Pair {
    Ecdsa(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
    Rsa(RsaKeyPair),
}

impl PrivateKey {
    /// Makes a key from the operating system's randomness. RSA takes up to seconds: call it on a blocking thread.
    pub fn generate(algorithm: KeyAlgorithm) -> Result<Self, KeyError> {
        let rsa = |size| RsaKeyPair::generate(size).map(Pair::Rsa);
        let pair = match algorithm {
            KeyAlgorithm::EcdsaP256 => EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).map(Pair::Ecdsa),
            KeyAlgorithm::EcdsaP384 => EcdsaKeyPair::generate(&ECDSA_P384_SHA384_ASN1_SIGNING).map(Pair::Ecdsa),
            KeyAlgorithm::Ed25519 => Ed25519KeyPair::generate().map(Pair::Ed25519),
            KeyAlgorithm::Rsa2048 => rsa(KeySize::Rsa2048),
            KeyAlgorithm::Rsa3072 => rsa(KeySize::Rsa3072),
            KeyAlgorithm::Rsa4096 => rsa(KeySize::Rsa4096),
        };
        Self::new(algorithm, pair.map_err(|_| KeyError::Generate { algorithm })?)
    }

    /// Reads the first private key in `text`: PKCS#8, SEC 1 or PKCS#1, unencrypted, of at most [`MAX_KEY_PEM_BYTES`].
    pub fn from_pem(text: &[u8]) -> Result<Self, KeyError> {
        if text.len() > MAX_KEY_PEM_BYTES {
            return Err(KeyError::TooLong { bytes: text.len() });
        }
        let mut der = PrivateKeyDer::from_pem_slice(text).map_err(|_| KeyError::NoKey)?;
        let key = Self::from_der(der.secret_der());
        der.zeroize();
        key
    }

    fn from_der(der: &[u8]) -> Result<Self, KeyError> {
        let ecdsa = |algorithm: &'static EcdsaSigningAlgorithm| EcdsaKeyPair::from_private_key_der(algorithm, der).ok();
        if let Some(pair) = ecdsa(&ECDSA_P256_SHA256_ASN1_SIGNING) {
            return Self::new(KeyAlgorithm::EcdsaP256, Pair::Ecdsa(pair));
        }
        if let Some(pair) = ecdsa(&ECDSA_P384_SHA384_ASN1_SIGNING) {
            return Self::new(KeyAlgorithm::EcdsaP384, Pair::Ecdsa(pair));
        }
        if let Ok(pair) = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der) {
            return Self::new(KeyAlgorithm::Ed25519, Pair::Ed25519(pair));
        }
        let pair = RsaKeyPair::from_pkcs8(der).or_else(|_| RsaKeyPair::from_der(der));
        let pair = pair.map_err(|_| KeyError::Unsupported)?;
        let algorithm = check_rsa(pair.public_key().as_ref())?;
        Self::new(algorithm, Pair::Rsa(pair))
    }

    fn new(algorithm: KeyAlgorithm, pair: Pair) -> Result<Self, KeyError> {
        let failed = |_| KeyError::Generate { algorithm };
        let (pkcs8, public_key) = match &pair {
            Pair::Ecdsa(pair) => (pair.to_pkcs8v1().map_err(failed)?.as_ref().to_vec(), pair.public_key().as_ref()),
            // Version 1, without the public key: Go and older Java refuse version 2 (RFC 5958).
            Pair::Ed25519(pair) => (pair.to_pkcs8v1().map_err(failed)?.as_ref().to_vec(), pair.public_key().as_ref()),
            Pair::Rsa(pair) => {
                let pkcs8: Pkcs8V1Der<'_> = pair.as_der().map_err(failed)?;
                (pkcs8.as_ref().to_vec(), pair.public_key().as_ref())
            }
        };
        let public_key = PublicKey::new(algorithm, public_key);
        Ok(Self { pair, pkcs8: Zeroizing::new(pkcs8), public_key })
    }

    /// Kind of key.
    pub fn algorithm(&self) -> KeyAlgorithm {
        self.public_key.algorithm
    }

    /// The public half.
    pub fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// Unencrypted PKCS#8, version 1 (RFC 5208), in DER.
    pub fn to_der(&self) -> Zeroizing<Vec<u8>> {
        self.pkcs8.clone()
    }

    /// Likewise, as PEM.
    pub fn to_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(pem::encode("PRIVATE KEY", &self.pkcs8))
    }

    /// Signs `message` with the algorithm that [`rcgen::PublicKeyData::algorithm`] names.
    pub(crate) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        let random = SystemRandom::new();
        let signature = match &self.pair {
            Pair::Ecdsa(pair) => pair.sign(&random, message).map(|signature| signature.as_ref().to_vec()),
            Pair::Ed25519(pair) => pair.try_sign(message).map(|signature| signature.as_ref().to_vec()),
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).map(|()| signature)
            }
        };
        signature.map_err(|_| KeyError::Sign)
    }
}

/// Shows the kind and the public half only.
impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrivateKey").field("public_key", &self.public_key).finish_non_exhaustive()
    }
}

impl PublicKeyData for PrivateKey {
    fn der_bytes(&self) -> &[u8] {
        self.public_key.der_bytes()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.public_key.algorithm.signature()
    }
}

impl rcgen::SigningKey for PrivateKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.sign(message).map_err(|_| rcgen::Error::RemoteKeyError)
    }
}

/// A public key as SubjectPublicKeyInfo (RFC 5280 section 4.1.2.7), with its algorithm.
///
/// Whether an EC point is on its curve is for the signature check to find out, which every use is followed by.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PublicKey {
    algorithm: KeyAlgorithm,
    spki: Vec<u8>,
    /// Where the content of the subjectPublicKey bit string begins; it ends the structure.
    key_at: usize,
}

impl PublicKey {
    fn new(algorithm: KeyAlgorithm, key: &[u8]) -> Self {
        let spki = Bare(algorithm, key).subject_public_key_info();
        Self { algorithm, key_at: spki.len() - key.len(), spki }
    }

    /// Takes over a parsed key if it is of a kind and size in [`KeyAlgorithm`].
    pub(super) fn from_spki(spki: &SubjectPublicKeyInfo<'_>) -> Result<Self, KeyError> {
        let key: &[u8] = &spki.subject_public_key.data;
        let oid = &spki.algorithm.algorithm;
        let algorithm = if *oid == OID_KEY_TYPE_EC_PUBLIC_KEY {
            let curve = spki.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
            let (algorithm, bytes) = match curve {
                Some(curve) if curve == OID_EC_P256 => (KeyAlgorithm::EcdsaP256, 65),
                Some(curve) if curve == OID_NIST_EC_P384 => (KeyAlgorithm::EcdsaP384, 97),
                _ => return Err(KeyError::Curve),
            };
            // SEC 1 section 2.3.3: 4 marks an uncompressed point.
            if key.len() != bytes || key.first() != Some(&4) {
                return Err(KeyError::Point);
            }
            algorithm
        } else if *oid == OID_SIG_ED25519 {
            if key.len() != 32 {
                return Err(KeyError::Point);
            }
            KeyAlgorithm::Ed25519
        } else if *oid == OID_PKCS1_RSAENCRYPTION {
            check_rsa(key)?
        } else {
            return Err(KeyError::Unsupported);
        };
        Ok(Self::new(algorithm, key))
    }

    /// SubjectPublicKeyInfo in DER.
    pub fn spki_der(&self) -> &[u8] {
        &self.spki
    }

    /// Kind of key.
    pub fn algorithm(&self) -> KeyAlgorithm {
        self.algorithm
    }
}

/// Shows the kind and the first bytes of the key.
impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({}, ", self.algorithm)?;
        self.der_bytes().iter().take(8).try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str("..)")
    }
}

impl PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.spki[self.key_at..]
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.algorithm.signature()
    }
}

/// A subjectPublicKey bit string not yet wrapped.
struct Bare<'a>(KeyAlgorithm, &'a [u8]);

impl PublicKeyData for Bare<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.1
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.0.signature()
    }
}

/// A key that cannot be made, read or trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The library could not make or encode a key.
    #[error("cannot make a key of kind {algorithm}")]
    Generate {
        /// The kind.
        algorithm: KeyAlgorithm,
    },
    /// The library could not sign.
    #[error("cannot sign with the private key")]
    Sign,
    /// A key file over [`MAX_KEY_PEM_BYTES`].
    #[error("a private key has at most {MAX_KEY_PEM_BYTES} bytes of PEM, this one {bytes}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// No PEM block with a private key.
    #[error("no unencrypted private key in PEM found (PRIVATE KEY, EC PRIVATE KEY or RSA PRIVATE KEY)")]
    NoKey,
    /// A kind of key that no policy can name.
    #[error("the key is of no supported kind: use ECDSA P-256 or P-384, Ed25519, or RSA of 2048, 3072 or 4096 bits")]
    Unsupported,
    /// An EC key on another curve, or with explicit parameters.
    #[error("the curve of the EC key is not supported: use P-256 or P-384, as a named curve")]
    Curve,
    /// An EC or Ed25519 point of the wrong form.
    #[error("the key's point must be uncompressed and of its curve's length")]
    Point,
    /// An RSA modulus of another size.
    #[error("the RSA modulus has {bits} bits: 2048, 3072 or 4096 are allowed")]
    RsaSize {
        /// Its size.
        bits: usize,
    },
    /// An RSA exponent that is even, small or long.
    #[error(
        "the RSA public exponent must be odd, at least {MIN_RSA_EXPONENT}, and at most {MAX_RSA_EXPONENT_BYTES} bytes long"
    )]
    RsaExponent,
    /// An RSA key that is no RSAPublicKey (RFC 8017 section A.1.1).
    #[error("the RSA key is malformed")]
    RsaEncoding,
}

/// Judges an RSAPublicKey: exactly two positive integers, a known size, a sound exponent.
fn check_rsa(key: &[u8]) -> Result<KeyAlgorithm, KeyError> {
    let fields = der::only(key).and_then(|sequence| der::children(sequence.data)).ok_or(KeyError::RsaEncoding)?;
    let [modulus, exponent] = fields.as_slice() else {
        return Err(KeyError::RsaEncoding);
    };
    let modulus = der::positive(modulus).ok_or(KeyError::RsaEncoding)?;
    let exponent = der::positive(exponent).ok_or(KeyError::RsaEncoding)?;
    let bits = modulus.len() * 8 - modulus[0].leading_zeros() as usize;
    let algorithm = KeyAlgorithm::of_rsa_bits(bits)?;
    if exponent.len() > MAX_RSA_EXPONENT_BYTES {
        return Err(KeyError::RsaExponent);
    }
    let value = exponent.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
    if value < MIN_RSA_EXPONENT || value % 2 == 0 {
        return Err(KeyError::RsaExponent);
    }
    Ok(algorithm)
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::{encoding::EcPrivateKeyRfc5915Der, signature::UnparsedPublicKey};

    use super::*;
    use crate::x509::der::{children, only};

    /// RSA 3072 and 4096 differ from 2048 in nothing but time.
    const QUICK: [KeyAlgorithm; 4] =
        [KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Ed25519, KeyAlgorithm::Rsa2048];

    #[test]
    fn every_algorithm_has_a_name_of_its_own() {
        for algorithm in KeyAlgorithm::ALL {
            assert_eq!(KeyAlgorithm::from_name(algorithm.name()), Some(algorithm));
        }
        assert_eq!(KeyAlgorithm::from_name("rsa-1024"), None);
    }

    #[test]
    fn a_key_written_as_pem_is_the_same_key_when_read() {
        for algorithm in QUICK {
            let key = PrivateKey::generate(algorithm).unwrap();
            let read = PrivateKey::from_pem(key.to_pem().as_bytes()).unwrap();
            assert_eq!((read.algorithm(), read.public_key()), (algorithm, key.public_key()));
            assert_eq!(read.pkcs8, key.pkcs8);
        }
    }

    #[test]
    fn a_signature_verifies_with_the_public_key() {
        use aws_lc_rs::signature::{
            ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, ED25519, RSA_PKCS1_2048_8192_SHA256, VerificationAlgorithm,
        };
        let verifiers: [&dyn VerificationAlgorithm; 4] =
            [&ECDSA_P256_SHA256_ASN1, &ECDSA_P384_SHA384_ASN1, &ED25519, &RSA_PKCS1_2048_8192_SHA256];
        for (algorithm, verifier) in QUICK.into_iter().zip(verifiers) {
            let key = PrivateKey::generate(algorithm).unwrap();
            let signature = key.sign(b"message").unwrap();
            UnparsedPublicKey::new(verifier, key.der_bytes()).verify(b"message", &signature).unwrap();
        }
    }

    #[test]
    fn the_signature_identifier_is_the_librarys() {
        for algorithm in QUICK {
            let key = PrivateKey::generate(algorithm).unwrap();
            let request = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
            let fields = children(only(request.der()).unwrap().data).unwrap();
            let identifier = only(algorithm.signature_identifier()).unwrap();
            assert_eq!(identifier.data, fields[1].data, "{algorithm}");
        }
    }

    #[test]
    fn older_encodings_are_read() {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let Pair::Ecdsa(pair) = &key.pair else { unreachable!() };
        let sec1: EcPrivateKeyRfc5915Der<'_> = pair.private_key().as_der().unwrap();
        let read = PrivateKey::from_pem(pem::encode("EC PRIVATE KEY", sec1.as_ref()).as_bytes()).unwrap();
        assert_eq!(read.public_key(), key.public_key());

        let key = PrivateKey::generate(KeyAlgorithm::Rsa2048).unwrap();
        let fields = children(only(&key.pkcs8).unwrap().data).unwrap();
        let read = PrivateKey::from_pem(pem::encode("RSA PRIVATE KEY", fields[2].data).as_bytes()).unwrap();
        assert_eq!(read.public_key(), key.public_key());
    }

    #[test]
    fn what_is_no_key_of_ours_is_refused() {
        let check = |text: &[u8], error| assert_eq!(PrivateKey::from_pem(text).unwrap_err(), error);
        check(b"", KeyError::NoKey);
        check(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", KeyError::NoKey);
        check(pem::encode("ENCRYPTED PRIVATE KEY", &[0; 64]).as_bytes(), KeyError::NoKey);
        check(pem::encode("PRIVATE KEY", &[0; 64]).as_bytes(), KeyError::Unsupported);
        let mut text = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap().to_pem().as_bytes().to_vec();
        text.resize(MAX_KEY_PEM_BYTES, b'\n');
        PrivateKey::from_pem(&text).unwrap();
        text.push(b'\n');
        check(&text, KeyError::TooLong { bytes: MAX_KEY_PEM_BYTES + 1 });
    }

    #[test]
    fn debug_shows_nothing_secret() {
        let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        let shown = format!("{key:?}");
        assert!(shown.starts_with("PrivateKey { public_key: PublicKey(ed25519, "), "{shown}");
        assert!(shown.len() < 100, "{shown}");
    }
}
