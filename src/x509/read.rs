//! Subject, alternative names and usages of a request or certificate, read into [`Names`] and [`Usages`].
//!
//! What those types cannot say is an error, never dropped: a name that we do not understand is still a name.

use std::net::IpAddr;

use x509_parser::{
    asn1_rs::Tag,
    extensions::{ExtendedKeyUsage, GeneralName, KeyUsage, SubjectAlternativeName},
    oid_registry::{OID_X509_COMMON_NAME, OID_X509_ORGANIZATION_NAME},
    x509::X509Name,
};

use super::{DnsName, Names, Usage, Usages, name::NameError};

/// A name or usage that [`Names`] or [`Usages`] cannot say.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    /// A subject attribute other than common name and organization.
    #[error("subject: attribute {oid} is not supported, only common name and organization are")]
    SubjectAttribute {
        /// Its type.
        oid: String,
    },
    /// A subject attribute that is no UTF8String, PrintableString or IA5String.
    #[error("subject: attribute {oid} must be a UTF8String, PrintableString or IA5String")]
    SubjectText {
        /// Its type.
        oid: String,
    },
    /// A second common name.
    #[error("subject: at most one common name is allowed")]
    CommonNames,
    /// A SAN of a kind that no policy can allow.
    #[error("subject alternative names: a name of kind {kind} is not supported, only DNS, IP and URI names are")]
    NameKind {
        /// The kind.
        kind: &'static str,
    },
    /// A SAN that is not what its kind must be.
    #[error("subject alternative names: a name is malformed")]
    NameEncoding,
    /// A name out of bounds.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A KeyUsage bit that no policy can allow.
    #[error("key usage: {names} asked for, only digital signature and key encipherment are supported")]
    KeyUsage {
        /// All bits set.
        names: String,
    },
    /// An ExtendedKeyUsage purpose that no policy can allow.
    #[error("extended key usage: only server auth and client auth are supported")]
    ExtendedKeyUsage,
}

/// Adds the subject to `names`.
pub(super) fn subject(subject: &X509Name<'_>, names: &mut Names) -> Result<(), FieldError> {
    for attribute in subject.iter_attributes() {
        let oid = || attribute.attr_type().to_id_string();
        let value = attribute.attr_value();
        let text = match value.tag() {
            Tag::Utf8String | Tag::PrintableString | Tag::Ia5String => std::str::from_utf8(value.data).ok(),
            _ => None,
        };
        let text = text.ok_or_else(|| FieldError::SubjectText { oid: oid() })?.to_owned();
        if *attribute.attr_type() == OID_X509_ORGANIZATION_NAME {
            names.organizations.push(text);
        } else if *attribute.attr_type() == OID_X509_COMMON_NAME {
            if names.common_name.replace(text).is_some() {
                return Err(FieldError::CommonNames);
            }
        } else {
            return Err(FieldError::SubjectAttribute { oid: oid() });
        }
    }
    Ok(())
}

/// Adds the subject alternative names to `names`.
pub(super) fn alternative_names(san: &SubjectAlternativeName<'_>, names: &mut Names) -> Result<(), FieldError> {
    for name in &san.general_names {
        let kind = match name {
            GeneralName::DNSName(text) => {
                names.dns.push(DnsName::parse(text)?);
                continue;
            }
            GeneralName::IPAddress(octets) => {
                names.ips.push(address(octets)?);
                continue;
            }
            GeneralName::URI(text) => {
                names.uris.push((*text).to_owned());
                continue;
            }
            GeneralName::RFC822Name(_) => "email",
            GeneralName::DirectoryName(_) => "directory name",
            GeneralName::OtherName(..) => "other name",
            GeneralName::RegisteredID(_) => "registered id",
            GeneralName::X400Address(_) => "X.400 address",
            GeneralName::EDIPartyName(_) => "EDI party name",
            GeneralName::Invalid(..) => return Err(FieldError::NameEncoding),
        };
        return Err(FieldError::NameKind { kind });
    }
    Ok(())
}

/// 4 or 16 octets (RFC 5280 section 4.2.1.6); an IPv4 address in IPv6 form is a second spelling and refused.
fn address(octets: &[u8]) -> Result<IpAddr, FieldError> {
    if let Ok(v4) = <[u8; 4]>::try_from(octets) {
        return Ok(IpAddr::from(v4));
    }
    let v6 = IpAddr::from(<[u8; 16]>::try_from(octets).map_err(|_| FieldError::NameEncoding)?);
    match v6 {
        IpAddr::V6(address) if address.to_ipv4_mapped().is_some() => Err(NameError::Ip(address.to_string()).into()),
        v6 => Ok(v6),
    }
}

/// The usages of a KeyUsage extension.
pub(super) fn key_usage(usage: &KeyUsage) -> Result<Usages, FieldError> {
    /// Bits 0 and 2 of RFC 5280 section 4.2.1.3.
    const SUPPORTED: u16 = 0b101;
    if usage.flags & !SUPPORTED != 0 {
        return Err(FieldError::KeyUsage { names: usage.to_string() });
    }
    let signature = usage.digital_signature().then_some(Usage::DigitalSignature);
    let encipherment = usage.key_encipherment().then_some(Usage::KeyEncipherment);
    Ok(signature.into_iter().chain(encipherment).collect())
}

/// The usages of an ExtendedKeyUsage extension.
pub(super) fn extended_key_usage(usage: &ExtendedKeyUsage<'_>) -> Result<Usages, FieldError> {
    let ExtendedKeyUsage {
        any,
        server_auth,
        client_auth,
        code_signing,
        email_protection,
        time_stamping,
        ocsp_signing,
        other,
    } = usage;
    if *any || *code_signing || *email_protection || *time_stamping || *ocsp_signing || !other.is_empty() {
        return Err(FieldError::ExtendedKeyUsage);
    }
    let server = server_auth.then_some(Usage::ServerAuth);
    let client = client_auth.then_some(Usage::ClientAuth);
    Ok(server.into_iter().chain(client).collect())
}
