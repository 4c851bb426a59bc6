//! The leaf certificate, written in DER: the profile of RFC 5280 and X509-SVID section 4, nothing optional.
//!
//! Written here and not by rcgen because its distinguished names hold one organization at most, and because an issuer's
//! name must be copied byte for byte, in whatever string types another CA wrote it: path building compares bytes.

use std::time::{Duration, SystemTime};

use aws_lc_rs::{
    digest::{SHA256, digest},
    rand,
};
use rcgen::PublicKeyData as _;
use time::OffsetDateTime;
use yasna::{
    DERWriter, DERWriterSeq, Tag,
    models::{GeneralizedTime, UTCTime},
};

use crate::{
    signer::SignError,
    x509::{
        Names, PrivateKey, PublicKey, Usage, Usages,
        write::{SUBJECT_ALT_NAME, write_alternative_names, write_extension, write_oid, write_subject},
    },
};

/// Bytes of a serial number before encoding: 128 random bits, so that none is ever guessed or repeated.
pub(super) const SERIAL_BYTES: usize = 16;
/// Bytes of a key identifier: SHA-256 of the key cut to 160 bits (RFC 7093 section 2, method 1).
const KEY_ID_BYTES: usize = 20;

const SUBJECT_KEY_ID: &[u64] = &[2, 5, 29, 14];
const KEY_USAGE: &[u64] = &[2, 5, 29, 15];
const BASIC_CONSTRAINTS: &[u64] = &[2, 5, 29, 19];
const AUTHORITY_KEY_ID: &[u64] = &[2, 5, 29, 35];
const EXTENDED_KEY_USAGE: &[u64] = &[2, 5, 29, 37];
const SERVER_AUTH: &[u64] = &[1, 3, 6, 1, 5, 5, 7, 3, 1];
const CLIENT_AUTH: &[u64] = &[1, 3, 6, 1, 5, 5, 7, 3, 2];

/// What a leaf says.
#[derive(Debug)]
pub(super) struct Leaf<'a> {
    pub(super) names: &'a Names,
    pub(super) usages: Usages,
    pub(super) public_key: &'a PublicKey,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
    /// The issuer's subject in DER, as its certificate spells it.
    pub(super) issuer: &'a [u8],
    /// The issuer's subjectKeyIdentifier.
    pub(super) issuer_key_id: &'a [u8],
}

impl Leaf<'_> {
    /// The certificate in DER, signed with `key`.
    pub(super) fn sign(&self, key: &PrivateKey) -> Result<Vec<u8>, SignError> {
        let algorithm = key.algorithm().signature_identifier();
        let tbs = yasna::construct_der(|writer| writer.write_sequence(|fields| self.write(fields, algorithm)));
        let signature = key.sign(&tbs)?;
        Ok(yasna::construct_der(|writer| {
            writer.write_sequence(|fields| {
                fields.next().write_der(&tbs);
                fields.next().write_der(algorithm);
                fields.next().write_bitvec_bytes(&signature, signature.len() * 8);
            });
        }))
    }

    /// TBSCertificate (RFC 5280 section 4.1).
    fn write(&self, fields: &mut DERWriterSeq<'_>, algorithm: &[u8]) {
        const V3: u8 = 2;
        fields.next().write_tagged(Tag::context(0), |writer| writer.write_u8(V3));
        fields.next().write_bigint_bytes(&random_serial(), true);
        fields.next().write_der(algorithm);
        fields.next().write_der(self.issuer);
        fields.next().write_sequence(|validity| {
            write_time(validity.next(), self.not_before);
            write_time(validity.next(), self.not_after);
        });
        write_subject(fields.next(), self.names);
        fields.next().write_der(self.public_key.spki_der());
        fields.next().write_tagged(Tag::context(3), |writer| {
            writer.write_sequence(|extensions| self.write_extensions(extensions));
        });
    }

    fn write_extensions(&self, extensions: &mut DERWriterSeq<'_>) {
        write_extension(extensions, AUTHORITY_KEY_ID, false, |writer| {
            writer.write_sequence(|fields| {
                fields.next().write_tagged_implicit(Tag::context(0), |id| id.write_bytes(self.issuer_key_id));
            });
        });
        write_extension(extensions, SUBJECT_KEY_ID, false, |writer| writer.write_bytes(&key_id(self.public_key)));
        write_extension(extensions, KEY_USAGE, true, |writer| {
            // Bits 0 and 2 of RFC 5280 section 4.2.1.3, trailing zeros cut off as DER demands.
            match (self.usages.contains(Usage::DigitalSignature), self.usages.contains(Usage::KeyEncipherment)) {
                (signs, true) => writer.write_bitvec_bytes(&[if signs { 0b1010_0000 } else { 0b0010_0000 }], 3),
                (_, false) => writer.write_bitvec_bytes(&[0b1000_0000], 1),
            }
        });
        let purposes = [(Usage::ServerAuth, SERVER_AUTH), (Usage::ClientAuth, CLIENT_AUTH)];
        let mut purposes = purposes.into_iter().filter(|(usage, _)| self.usages.contains(*usage)).peekable();
        if purposes.peek().is_some() {
            write_extension(extensions, EXTENDED_KEY_USAGE, false, |writer| {
                writer.write_sequence(|list| purposes.for_each(|(_, oid)| write_oid(list.next(), oid)));
            });
        }
        // cA is FALSE by default, and DER leaves defaults out: present and empty.
        write_extension(extensions, BASIC_CONSTRAINTS, true, |writer| writer.write_sequence(|_| ()));
        if self.names.san_count() > 0 {
            let critical = self.names.has_no_subject();
            write_extension(extensions, SUBJECT_ALT_NAME, critical, |writer| {
                write_alternative_names(writer, self.names)
            });
        }
    }
}

/// The identifier of a key whose certificate carries none.
pub(super) fn key_id(key: &PublicKey) -> [u8; KEY_ID_BYTES] {
    let digest = digest(&SHA256, key.der_bytes());
    digest.as_ref()[..KEY_ID_BYTES].try_into().expect("SHA-256 is longer")
}

/// A random serial number, positive when read as unsigned and never zero (RFC 5280 section 4.1.2.2).
pub(super) fn random_serial() -> [u8; SERIAL_BYTES] {
    let mut serial = [0; SERIAL_BYTES];
    rand::fill(&mut serial).expect("the operating system has randomness");
    if serial == [0; SERIAL_BYTES] {
        serial[SERIAL_BYTES - 1] = 1;
    }
    serial
}

/// UTCTime to the end of 2049, GeneralizedTime from then on, in whole seconds (RFC 5280 section 4.1.2.5).
fn write_time(writer: DERWriter<'_>, time: SystemTime) {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let time = OffsetDateTime::from(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
    match UTCTime::from_datetime_opt(time) {
        Some(time) => writer.write_utctime(&time),
        None => writer.write_generalized_time(&GeneralizedTime::from_datetime(time)),
    }
}

#[cfg(test)]
mod tests {
    use x509_parser::{asn1_rs::Tag as Asn1Tag, prelude::*};

    use super::*;
    use crate::x509::{DnsName, KeyAlgorithm};

    const ISSUER: &[u8] = &[0x30, 0];
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    fn names() -> Names {
        Names {
            common_name: Some("web".to_owned()),
            organizations: vec!["one".to_owned(), "two".to_owned()],
            dns: vec![DnsName::parse("web.example").unwrap()],
            ips: vec!["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            uris: vec!["spiffe://example.org/web".to_owned()],
        }
    }

    fn check(names: &Names, usages: Usages, not_before: SystemTime, judge: impl FnOnce(&X509Certificate<'_>)) {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let (public_key, not_after) = (key.public_key(), not_before + DAY);
        let leaf = Leaf { names, usages, public_key, not_before, not_after, issuer: ISSUER, issuer_key_id: &[7; 20] };
        let der = leaf.sign(&key).unwrap();
        let (rest, certificate) = X509Certificate::from_der(&der).unwrap();
        assert!(rest.is_empty());
        certificate.verify_signature(Some(certificate.public_key())).unwrap();
        judge(&certificate);
    }

    #[test]
    fn the_profile_is_kept() {
        check(&names(), Usages::DEFAULT, SystemTime::UNIX_EPOCH + 20_000 * DAY, |leaf| {
            assert_eq!(leaf.version(), X509Version::V3);
            assert_eq!(leaf.issuer().as_raw(), ISSUER);
            let subject = leaf.subject();
            assert_eq!(subject.to_string(), "O=one, O=two, CN=web");
            assert!(subject.iter_attributes().all(|attribute| attribute.attr_value().tag() == Asn1Tag::Utf8String));
            let extensions: Vec<_> = leaf.extensions().iter().map(|e| (e.oid.to_id_string(), e.critical)).collect();
            let expected = [
                ("2.5.29.35", false),
                ("2.5.29.14", false),
                ("2.5.29.15", true),
                ("2.5.29.37", false),
                ("2.5.29.19", true),
                ("2.5.29.17", false),
            ];
            assert_eq!(extensions, expected.map(|(oid, critical)| (oid.to_owned(), critical)));
            // Present and empty.
            assert_eq!(leaf.extensions()[4].value, [0x30, 0]);
            let ParsedExtension::AuthorityKeyIdentifier(id) = leaf.extensions()[0].parsed_extension() else { panic!() };
            assert_eq!(id.key_identifier.as_ref().unwrap().0, [7; 20]);
        });
    }

    #[test]
    fn alternative_names_are_critical_without_a_subject_and_absent_without_names() {
        let only_dns = Names { dns: names().dns, ..Names::default() };
        check(&only_dns, Usages::DEFAULT, SystemTime::UNIX_EPOCH, |leaf| {
            assert!(leaf.subject_alternative_name().unwrap().unwrap().critical);
        });
        let only_subject = Names { common_name: Some("web".to_owned()), ..Names::default() };
        check(&only_subject, Usages::DEFAULT, SystemTime::UNIX_EPOCH, |leaf| {
            assert_eq!(leaf.subject_alternative_name(), Ok(None));
        });
    }

    #[test]
    fn usages_are_written_as_granted() {
        use Usage::{ClientAuth, DigitalSignature, KeyEncipherment, ServerAuth};
        for (usages, value) in [
            (vec![DigitalSignature], &[3, 2, 7, 0b1000_0000][..]),
            (vec![KeyEncipherment, ServerAuth], &[3, 2, 5, 0b0010_0000]),
            (vec![DigitalSignature, KeyEncipherment, ClientAuth], &[3, 2, 5, 0b1010_0000]),
        ] {
            let set: Usages = usages.iter().copied().collect();
            check(&names(), set, SystemTime::UNIX_EPOCH, |leaf| {
                assert_eq!(leaf.extensions()[2].value, value);
                let purposes = leaf.extended_key_usage().unwrap();
                let (server, client) = purposes.map_or((false, false), |p| (p.value.server_auth, p.value.client_auth));
                assert_eq!((server, client), (usages.contains(&ServerAuth), usages.contains(&ClientAuth)));
            });
        }
    }

    #[test]
    fn times_turn_to_generalized_time_with_the_year_2050() {
        let last = SystemTime::from(OffsetDateTime::from_unix_timestamp(2_524_607_999).unwrap());
        for (time, generalized) in [(last - DAY, [false, false]), (last, [false, true]), (last + DAY, [true, true])] {
            check(&names(), Usages::DEFAULT, time + Duration::from_millis(999), |leaf| {
                let validity = leaf.validity();
                assert_eq!(
                    [validity.not_before.is_generalizedtime(), validity.not_after.is_generalizedtime()],
                    generalized
                );
                let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
                assert_eq!(validity.not_before.timestamp() as u64, since_epoch);
            });
        }
    }

    #[test]
    fn serials_are_positive_and_differ() {
        let mut seen = std::collections::HashSet::new();
        for _ in 0..64 {
            check(&names(), Usages::DEFAULT, SystemTime::UNIX_EPOCH, |leaf| {
                let serial = leaf.raw_serial();
                assert!(serial[0] < 0x80 && serial.len() <= SERIAL_BYTES + 1 && serial.iter().any(|byte| *byte != 0));
                assert!(seen.insert(serial.to_vec()));
            });
        }
    }
}
