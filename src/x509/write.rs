//! Names and requests written in DER: what certificates and PKCS#10 requests have in common.
//!
//! Written here and not by rcgen because its distinguished names hold one organization at most.

use std::net::IpAddr;

use yasna::{DERWriter, DERWriterSeq, Tag, models::ObjectIdentifier};

use super::{KeyError, Names, PrivateKey};

const COMMON_NAME: &[u64] = &[2, 5, 4, 3];
const ORGANIZATION: &[u64] = &[2, 5, 4, 10];
/// Type of the extension that [`write_alternative_names`] fills.
pub(crate) const SUBJECT_ALT_NAME: &[u64] = &[2, 5, 29, 17];
const EXTENSION_REQUEST: &[u64] = &[1, 2, 840, 113549, 1, 9, 14];

/// A PKCS#10 request (RFC 2986) for `names` with `key`, in DER. It says nothing of usages: Kubernetes asks for them beside it.
pub(crate) fn request(names: &Names, key: &PrivateKey) -> Result<Vec<u8>, KeyError> {
    let algorithm = key.algorithm().signature_identifier();
    let info = yasna::construct_der(|writer| {
        writer.write_sequence(|fields| {
            fields.next().write_u8(0);
            write_subject(fields.next(), names);
            fields.next().write_der(key.public_key().spki_der());
            fields.next().write_tagged_implicit(Tag::context(0), |attributes| {
                attributes.write_set(|set| {
                    if names.san_count() > 0 {
                        write_extension_request(set.next(), names);
                    }
                });
            });
        });
    });
    let signature = key.sign(&info)?;
    Ok(yasna::construct_der(|writer| {
        writer.write_sequence(|fields| {
            fields.next().write_der(&info);
            fields.next().write_der(algorithm);
            fields.next().write_bitvec_bytes(&signature, signature.len() * 8);
        });
    }))
}

/// The extensionRequest attribute (RFC 2985 section 5.4.2) with the alternative names.
fn write_extension_request(writer: DERWriter<'_>, names: &Names) {
    writer.write_sequence(|attribute| {
        write_oid(attribute.next(), EXTENSION_REQUEST);
        attribute.next().write_set(|values| {
            values.next().write_sequence(|extensions| {
                let critical = names.has_no_subject();
                write_extension(extensions, SUBJECT_ALT_NAME, critical, |writer| {
                    write_alternative_names(writer, names)
                });
            });
        });
    });
}

/// Organizations, then the common name, each its own RDN, as UTF8String.
pub(crate) fn write_subject(writer: DERWriter<'_>, names: &Names) {
    let organizations = names.organizations.iter().map(|name| (ORGANIZATION, name));
    let common_name = names.common_name.iter().map(|name| (COMMON_NAME, name));
    writer.write_sequence(|rdns| {
        for (oid, text) in organizations.chain(common_name) {
            rdns.next().write_set(|rdn| {
                rdn.next().write_sequence(|attribute| {
                    write_oid(attribute.next(), oid);
                    attribute.next().write_utf8_string(text);
                });
            });
        }
    });
}

/// GeneralNames (RFC 5280 section 4.2.1.6).
pub(crate) fn write_alternative_names(writer: DERWriter<'_>, names: &Names) {
    const DNS: u64 = 2;
    const URI: u64 = 6;
    const IP: u64 = 7;
    writer.write_sequence(|list| {
        let mut name = |kind, bytes: &[u8]| {
            list.next().write_tagged_implicit(Tag::context(kind), |writer| writer.write_bytes(bytes));
        };
        names.dns.iter().for_each(|dns| name(DNS, dns.as_str().as_bytes()));
        for ip in &names.ips {
            match ip {
                IpAddr::V4(ip) => name(IP, &ip.octets()),
                IpAddr::V6(ip) => name(IP, &ip.octets()),
            }
        }
        names.uris.iter().for_each(|uri| name(URI, uri.as_bytes()));
    });
}

/// One extension, with `value` in its octets (RFC 5280 section 4.2).
pub(crate) fn write_extension(
    list: &mut DERWriterSeq<'_>,
    oid: &[u64],
    critical: bool,
    value: impl FnOnce(DERWriter<'_>),
) {
    list.next().write_sequence(|fields| {
        write_oid(fields.next(), oid);
        if critical {
            fields.next().write_bool(true);
        }
        fields.next().write_bytes(&yasna::construct_der(value));
    });
}

/// An object identifier.
pub(crate) fn write_oid(writer: DERWriter<'_>, oid: &[u64]) {
    writer.write_oid(&ObjectIdentifier::from_slice(oid));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x509::{Csr, DnsName, KeyAlgorithm, Usages};

    #[test]
    fn a_request_reads_back_as_it_was_written() {
        let all = Names {
            common_name: Some("web".to_owned()),
            organizations: vec!["one".to_owned(), "two".to_owned()],
            dns: vec![DnsName::parse("web.example").unwrap()],
            ips: vec!["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            uris: vec!["spiffe://example.org/web".to_owned()],
        };
        let only_dns = Names { dns: all.dns.clone(), ..Names::default() };
        let only_subject = Names { common_name: all.common_name.clone(), ..Names::default() };
        for names in [all, only_dns, only_subject] {
            for algorithm in
                [KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Ed25519, KeyAlgorithm::Rsa2048]
            {
                let key = PrivateKey::generate(algorithm).unwrap();
                let csr = Csr::parse(&request(&names, &key).unwrap()).unwrap();
                assert_eq!((csr.names(), csr.usages()), (&names, Usages::empty()));
                assert_eq!(csr.public_key(), key.public_key());
            }
        }
    }
}
