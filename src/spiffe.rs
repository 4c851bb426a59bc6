//! SPIFFE IDs, parsed into the one form that the standard allows.
//!
//! A [`SpiffeId`] is valid by construction and keeps exactly what was parsed: there is nothing to normalize, because the
//! standard forbids percent-encoding, empty and relative segments, ports, queries and fragments (SPIFFE-ID section 2).

/// Bytes in a SPIFFE ID (SPIFFE-ID section 2.3).
pub const MAX_SPIFFE_ID_BYTES: usize = 2048;
/// Bytes in a trust domain name (SPIFFE-ID section 2.3).
pub const MAX_TRUST_DOMAIN_BYTES: usize = 255;

const SCHEME: &str = "spiffe://";

/// A SPIFFE ID, for example `spiffe://example.org/ns/web/sa/api`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    text: String,
    path_at: usize,
}

impl SpiffeId {
    /// Parses the URI form.
    pub fn parse(text: &str) -> Result<Self, SpiffeError> {
        if text.len() > MAX_SPIFFE_ID_BYTES {
            return Err(SpiffeError::TooLong { bytes: text.len() });
        }
        let rest = text.strip_prefix(SCHEME).ok_or(SpiffeError::Scheme)?;
        let trust_domain = rest.split('/').next().unwrap_or_default();
        check_trust_domain(trust_domain)?;
        check_path(&rest[trust_domain.len()..])?;
        Ok(Self { text: text.to_owned(), path_at: SCHEME.len() + trust_domain.len() })
    }

    /// The URI.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain's own SPIFFE ID: `spiffe://` and its name.
    pub fn trust_domain(&self) -> &str {
        &self.text[..self.path_at]
    }

    /// The path with its leading slash; empty for the trust domain itself, which no workload may have.
    pub fn path(&self) -> &str {
        &self.text[self.path_at..]
    }
}

/// The clause that a text breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeError {
    /// SPIFFE-ID section 2.
    #[error("a SPIFFE ID begins with spiffe:// in lower case")]
    Scheme,
    /// SPIFFE-ID section 2.3.
    #[error("a SPIFFE ID has at most {MAX_SPIFFE_ID_BYTES} bytes, this one {bytes}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// SPIFFE-ID section 2.1; a port, user info or upper case ends here too.
    #[error("a trust domain has 1 to {MAX_TRUST_DOMAIN_BYTES} bytes, all of a-z, 0-9, '.', '-' and '_'")]
    TrustDomain,
    /// SPIFFE-ID section 2.2; a query, fragment or percent-encoding ends here too.
    #[error("a path segment holds only letters, digits, '.', '-' and '_'")]
    PathCharacters,
    /// SPIFFE-ID section 2.2.
    #[error("a path has no empty, '.' or '..' segment and no trailing slash")]
    PathSegment,
}

fn check_trust_domain(name: &str) -> Result<(), SpiffeError> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
    if name.is_empty() || name.len() > MAX_TRUST_DOMAIN_BYTES || !name.bytes().all(allowed) {
        return Err(SpiffeError::TrustDomain);
    }
    Ok(())
}

/// `path` is empty or begins with the slash that ended the trust domain.
fn check_path(path: &str) -> Result<(), SpiffeError> {
    for segment in path.split('/').skip(1) {
        if matches!(segment, "" | "." | "..") {
            return Err(SpiffeError::PathSegment);
        }
        if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b)) {
            return Err(SpiffeError::PathCharacters);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn valid_ids_are_kept_as_they_were_written() {
        let longest_path = format!("/{}", "a".repeat(MAX_SPIFFE_ID_BYTES - "spiffe://td/".len()));
        for (trust_domain, path) in
            [("example.org", "/ns/web/sa/api"), ("td_1-x", "/A.b_c-9"), ("td", ""), ("td", longest_path.as_str())]
        {
            let text = format!("spiffe://{trust_domain}{path}");
            let id = SpiffeId::parse(&text).unwrap();
            assert_eq!((id.as_str(), id.path()), (text.as_str(), path));
            assert_eq!(id.trust_domain(), format!("spiffe://{trust_domain}"));
        }
    }

    #[test]
    fn each_clause_refuses_what_breaks_it() {
        use SpiffeError::*;
        let long = format!("spiffe://td/{}", "a".repeat(MAX_SPIFFE_ID_BYTES - "spiffe://td/".len() + 1));
        let long_domain = format!("spiffe://{}/a", "d".repeat(MAX_TRUST_DOMAIN_BYTES + 1));
        for (text, error) in [
            ("https://td/a", Scheme),
            ("SPIFFE://td/a", Scheme),
            ("", Scheme),
            (&long, TooLong { bytes: MAX_SPIFFE_ID_BYTES + 1 }),
            (&long_domain, TrustDomain),
            ("spiffe:///a", TrustDomain),
            ("spiffe://Td/a", TrustDomain),
            ("spiffe://td:443/a", TrustDomain),
            ("spiffe://user@td/a", TrustDomain),
            ("spiffe://td?q", TrustDomain),
            ("spiffe://t\u{f6}d/a", TrustDomain),
            ("spiffe://td/a%20b", PathCharacters),
            ("spiffe://td/a?q", PathCharacters),
            ("spiffe://td/a#f", PathCharacters),
            ("spiffe://td/a\0", PathCharacters),
            ("spiffe://td/", PathSegment),
            ("spiffe://td/a/", PathSegment),
            ("spiffe://td//a", PathSegment),
            ("spiffe://td/./a", PathSegment),
            ("spiffe://td/a/..", PathSegment),
        ] {
            assert_eq!(SpiffeId::parse(text), Err(error), "{text}");
        }
        assert!(SpiffeId::parse(&format!("spiffe://{}/a", "d".repeat(MAX_TRUST_DOMAIN_BYTES))).is_ok());
    }

    proptest! {
        #[test]
        fn any_text_is_judged_without_panic(text in "\\PC*") {
            if let Ok(id) = SpiffeId::parse(&text) {
                prop_assert_eq!(id.as_str(), text);
            }
        }
    }
}
