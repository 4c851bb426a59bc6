//! The names a certificate carries: subject and subject alternative names, checked when they are made.

use std::{fmt, net::IpAddr};

use crate::spiffe::{MAX_SPIFFE_ID_BYTES, SpiffeId};

/// Names of all SAN kinds together in one request.
pub const MAX_NAMES: usize = 64;
/// Characters in a common name or an organization (RFC 5280 appendix A.1, ub-common-name and ub-organization-name).
pub const MAX_SUBJECT_CHARS: usize = 64;
/// Organizations in one subject.
pub const MAX_ORGANIZATIONS: usize = 8;
/// Bytes in a DNS name without the root dot (RFC 1035 section 2.3.4).
pub const MAX_DNS_NAME_BYTES: usize = 253;
/// Bytes in one DNS label (RFC 1035 section 2.3.4).
pub const MAX_DNS_LABEL_BYTES: usize = 63;
/// Bytes in a URI name.
pub const MAX_URI_BYTES: usize = MAX_SPIFFE_ID_BYTES;

/// The subject and subject alternative names of a request, a grant or a certificate.
///
/// Order is kept as given, so that a certificate reads as it was asked for; equality of sets is [`Names::same_as`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Names {
    /// Subject common name.
    pub common_name: Option<String>,
    /// Subject organizations.
    pub organizations: Vec<String>,
    /// dNSName entries.
    pub dns: Vec<DnsName>,
    /// iPAddress entries.
    pub ips: Vec<IpAddr>,
    /// uniformResourceIdentifier entries.
    pub uris: Vec<String>,
}

impl Names {
    /// Whether no name of any kind is set.
    pub fn is_empty(&self) -> bool {
        self.has_no_subject() && self.san_count() == 0
    }

    /// Whether the subject is empty, which makes alternative names critical (RFC 5280 section 4.2.1.6).
    pub(crate) fn has_no_subject(&self) -> bool {
        self.common_name.is_none() && self.organizations.is_empty()
    }

    /// Subject alternative names of all kinds.
    pub fn san_count(&self) -> usize {
        self.dns.len() + self.ips.len() + self.uris.len()
    }

    /// Checks every bound and the characters of subject and URIs; DNS names are checked when they are parsed.
    pub fn check(&self) -> Result<(), NameError> {
        if self.san_count() > MAX_NAMES {
            return Err(NameError::TooMany {
                field: "subject alternative names",
                count: self.san_count(),
                max: MAX_NAMES,
            });
        }
        if self.organizations.len() > MAX_ORGANIZATIONS {
            let count = self.organizations.len();
            return Err(NameError::TooMany { field: "organizations", count, max: MAX_ORGANIZATIONS });
        }
        if let Some(common_name) = &self.common_name {
            check_subject("common_name", common_name)?;
        }
        for organization in &self.organizations {
            check_subject("organizations", organization)?;
        }
        self.uris.iter().try_for_each(|uri| check_uri(uri))?;
        let svid = self.uris.iter().find(|uri| uri.starts_with("spiffe://"));
        match svid {
            Some(uri) if self.uris.len() > 1 => {
                let why = "a certificate with a SPIFFE ID has no other URI (X509-SVID section 2)";
                Err(NameError::Uri { uri: printable(uri), why: why.to_owned() })
            }
            _ => Ok(()),
        }
    }

    /// Whether both carry the same subject and the same sets of alternative names, whatever their order.
    pub fn same_as(&self, other: &Self) -> bool {
        fn set<T: Ord>(items: &[T]) -> std::collections::BTreeSet<&T> {
            items.iter().collect()
        }
        self.common_name == other.common_name
            && set(&self.organizations) == set(&other.organizations)
            && set(&self.dns) == set(&other.dns)
            && set(&self.ips) == set(&other.ips)
            && set(&self.uris) == set(&other.uris)
    }

    /// Every name as text: common name, DNS, IP, URI. For tables and logs.
    pub fn to_strings(&self) -> Vec<String> {
        let subject = self.common_name.iter().cloned();
        let dns = self.dns.iter().map(ToString::to_string);
        let ips = self.ips.iter().map(ToString::to_string);
        subject.chain(dns).chain(ips).chain(self.uris.iter().cloned()).collect()
    }
}

/// A DNS name in its one accepted form: lower-case letters, digits and inner hyphens (RFC 1123 section 2.1), no root dot,
/// a wildcard only as the whole first label and never above two labels (RFC 6125 section 6.4.3).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DnsName(String);

impl DnsName {
    /// Parses `text`, changing nothing: upper case, a trailing dot, U-labels and NUL are refused, not repaired.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let bad = |why: &str| NameError::Dns { name: printable(text), why: why.to_owned() };
        if text.is_empty() || text.len() > MAX_DNS_NAME_BYTES {
            return Err(bad(&format!("it must have 1 to {MAX_DNS_NAME_BYTES} bytes")));
        }
        let (wildcard, host) = match text.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let mut labels = 0;
        for label in host.split('.') {
            labels += 1;
            let bytes = label.as_bytes();
            if bytes.is_empty() || bytes.len() > MAX_DNS_LABEL_BYTES {
                return Err(bad(&format!("each label must have 1 to {MAX_DNS_LABEL_BYTES} bytes")));
            }
            if !bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-') {
                return Err(bad(
                    "labels may hold only a-z, 0-9 and '-'; a wildcard must be the whole first label; write IDNs as xn--",
                ));
            }
            if bytes.starts_with(b"-") || bytes.ends_with(b"-") {
                return Err(bad("a label must not begin or end with '-'"));
            }
        }
        if wildcard && labels < 2 {
            return Err(bad("a wildcard needs at least two labels below it"));
        }
        if host.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit())) {
            return Err(bad("its last label is all digits: write an address as an IP name"));
        }
        Ok(Self(text.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the first label is `*`.
    pub fn is_wildcard(&self) -> bool {
        self.0.starts_with("*.")
    }
}

impl fmt::Display for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A name that no certificate of ours may carry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A list over its bound.
    #[error("{field}: {count} given, at most {max} allowed")]
    TooMany {
        /// The list.
        field: &'static str,
        /// How many were given.
        count: usize,
        /// The bound.
        max: usize,
    },
    /// A common name or organization that is empty, too long or holds control characters.
    #[error("{field}: {value:?} must have 1 to {MAX_SUBJECT_CHARS} printable characters")]
    Subject {
        /// Which attribute.
        field: &'static str,
        /// Its value, cut short.
        value: String,
    },
    /// A DNS name outside the accepted form.
    #[error("dns_names: {name:?} is refused: {why}")]
    Dns {
        /// The name, cut short.
        name: String,
        /// The rule it breaks.
        why: String,
    },
    /// A URI outside the accepted form.
    #[error("uris: {uri:?} is refused: {why}")]
    Uri {
        /// The URI, cut short.
        uri: String,
        /// The rule it breaks.
        why: String,
    },
    /// Text that is no IP address.
    #[error("ip_addresses: {0:?} is no IPv4 or IPv6 address")]
    Ip(String),
}

/// Parses an IP name; IPv4-mapped and zoned IPv6 forms are refused by the standard library or here.
pub fn parse_ip(text: &str) -> Result<IpAddr, NameError> {
    match text.parse::<IpAddr>() {
        Ok(IpAddr::V6(v6)) if v6.to_ipv4_mapped().is_some() => Err(NameError::Ip(printable(text))),
        Ok(ip) => Ok(ip),
        Err(_) => Err(NameError::Ip(printable(text))),
    }
}

/// A URI is kept as text; it must be absolute, printable ASCII without spaces, and within its bound.
fn check_uri(uri: &str) -> Result<(), NameError> {
    let bad = |why: &str| NameError::Uri { uri: printable(uri), why: why.to_owned() };
    if uri.len() > MAX_URI_BYTES {
        return Err(bad(&format!("it is longer than {MAX_URI_BYTES} bytes")));
    }
    if !uri.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(bad("it may hold only printable ASCII without spaces"));
    }
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Err(bad("it must be absolute: scheme://authority/path"));
    };
    let letter_first = scheme.starts_with(|c: char| c.is_ascii_lowercase());
    if !letter_first || !scheme.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b)) {
        return Err(bad("its scheme must be lower case (RFC 3986 section 3.1)"));
    }
    if rest.is_empty() || rest.starts_with('/') {
        return Err(bad("its authority must not be empty"));
    }
    if scheme == "spiffe" {
        let id =
            SpiffeId::parse(uri).map_err(|error| bad(&format!("it is no SPIFFE ID: {error} (SPIFFE-ID section 2)")))?;
        if id.path().is_empty() {
            return Err(bad("a workload's SPIFFE ID needs a path (X509-SVID section 3.1)"));
        }
    }
    Ok(())
}

fn check_subject(field: &'static str, value: &str) -> Result<(), NameError> {
    let chars = value.chars().count();
    if chars == 0 || chars > MAX_SUBJECT_CHARS || value.chars().any(char::is_control) {
        return Err(NameError::Subject { field, value: printable(value) });
    }
    Ok(())
}

/// Hostile text made safe to show: at most 80 characters, control characters escaped by the `{:?}` of the error.
fn printable(text: &str) -> String {
    const MAX_SHOWN_CHARS: usize = 80;
    text.chars().take(MAX_SHOWN_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn dns_names_have_one_form() {
        let label = "a".repeat(MAX_DNS_LABEL_BYTES);
        let longest = format!("{label}.{label}.{label}.{}", "a".repeat(MAX_DNS_NAME_BYTES - 3 * 64));
        for good in ["a", "a.example", "xn--bcher-kva.example", "*.a.example", "1.a", &label, &longest] {
            assert_eq!(DnsName::parse(good).unwrap().as_str(), good);
        }
        assert!(DnsName::parse("*.a.example").unwrap().is_wildcard());
        let (label, long) = (format!("{label}a"), format!("{longest}a"));
        for (bad, why) in [
            ("", "1 to 253"),
            (long.as_str(), "1 to 253"),
            (&label, "1 to 63"),
            ("a..b", "1 to 63"),
            ("a.example.", "1 to 63"),
            ("A.example", "may hold only"),
            ("a b", "may hold only"),
            ("a\0", "may hold only"),
            ("b\u{fc}cher", "may hold only"),
            ("a.*.example", "may hold only"),
            ("a*.example", "may hold only"),
            ("-a", "begin or end"),
            ("a-.example", "begin or end"),
            ("*.example", "two labels"),
            ("10.0.0.1", "all digits"),
        ] {
            let error = DnsName::parse(bad).unwrap_err();
            assert!(matches!(&error, NameError::Dns { why: found, .. } if found.contains(why)), "{bad:?}: {error}");
        }
    }

    #[test]
    fn each_list_and_text_is_bounded() {
        let names = |count| Names { uris: vec!["https://a.example/".to_owned(); count], ..Names::default() };
        names(MAX_NAMES).check().unwrap();
        assert!(matches!(names(MAX_NAMES + 1).check(), Err(NameError::TooMany { max: MAX_NAMES, .. })));
        let names = |count| Names { organizations: vec!["a".to_owned(); count], ..Names::default() };
        names(MAX_ORGANIZATIONS).check().unwrap();
        assert!(matches!(names(MAX_ORGANIZATIONS + 1).check(), Err(NameError::TooMany { max: MAX_ORGANIZATIONS, .. })));
        let longest = "\u{fc}".repeat(MAX_SUBJECT_CHARS);
        let long = format!("{longest}a");
        for (text, good) in
            [("a", true), (&longest, true), (&long, false), ("", false), ("a\nb", false), ("a\0", false)]
        {
            let subject = Names { common_name: Some(text.to_owned()), ..Names::default() };
            assert_eq!(subject.check().is_ok(), good, "{text:?}");
            let organization = Names { organizations: vec![text.to_owned()], ..Names::default() };
            assert_eq!(organization.check().is_ok(), good, "{text:?}");
        }
    }

    #[test]
    fn uris_are_absolute_and_a_spiffe_id_is_alone() {
        let check = |uris: &[&str]| {
            let uris = uris.iter().map(|uri| (*uri).to_owned()).collect();
            Names { uris, ..Names::default() }.check()
        };
        let longest = format!("https://{}", "a".repeat(MAX_URI_BYTES - "https://".len()));
        check(&["https://a.example/x?y#z", &longest]).unwrap();
        check(&["spiffe://example.org/web"]).unwrap();
        let long = format!("{longest}a");
        for (uris, why) in [
            (&[long.as_str()][..], "longer than 2048"),
            (&["https://a b"], "printable ASCII"),
            (&["https://a\u{fc}"], "printable ASCII"),
            (&["a.example"], "absolute"),
            (&["HTTPS://a"], "lower case"),
            (&["1a://a"], "lower case"),
            (&["https:///x"], "authority"),
            (&["spiffe://example.org/a/../b"], "no SPIFFE ID: a path has no empty, '.' or '..' segment"),
            (&["spiffe://Example.org/a"], "no SPIFFE ID: a trust domain has 1 to 255 bytes"),
            (&["spiffe://example.org"], "needs a path"),
            (&["https://a", "spiffe://example.org/web"], "no other URI"),
            (&["spiffe://example.org/a", "spiffe://example.org/b"], "no other URI"),
        ] {
            let error = check(uris).unwrap_err();
            assert!(matches!(&error, NameError::Uri { why: found, .. } if found.contains(why)), "{uris:?}: {error}");
        }
    }

    #[test]
    fn an_address_has_one_spelling() {
        assert!(parse_ip("10.0.0.1").is_ok() && parse_ip("2001:db8::1").is_ok());
        for bad in ["::ffff:10.0.0.1", "fe80::1%eth0", "10.0.0", "a", ""] {
            assert_eq!(parse_ip(bad), Err(NameError::Ip(bad.to_owned())));
        }
    }

    #[test]
    fn names_are_the_same_whatever_their_order() {
        let names =
            |dns: [&str; 2]| Names { dns: dns.map(|name| DnsName::parse(name).unwrap()).into(), ..Names::default() };
        assert!(names(["a.b", "c.d"]).same_as(&names(["c.d", "a.b"])));
        assert!(!names(["a.b", "c.d"]).same_as(&names(["a.b", "a.b"])));
    }

    proptest! {
        #[test]
        fn any_text_is_judged_without_panic_and_kept_as_it_is(text in "\\PC{0,80}|[a-z0-9.*-]{0,40}") {
            if let Ok(name) = DnsName::parse(&text) {
                prop_assert_eq!(name.as_str(), &text);
                prop_assert!(!text[1..].contains('*'));
            }
            let _ = Names { uris: vec![text], ..Names::default() }.check();
        }
    }
}
