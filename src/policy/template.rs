//! Patterns and templates: text from a policy, with `{fact}` slots and `*` segments, compared with what a caller asks for.
//!
//! Invariant: a value never escapes its slot. A slot lies inside one label, one path segment or one subject attribute; a
//! value that could end that part, or that is no valid part by itself, fills nothing. There is at most one slot in a part,
//! because the border between two neighbouring values would be ambiguous: `ab` + `c` is also `a` + `bc`.
//!
//! Matching walks pattern and text side by side, part by part, once. A part is one literal, one slot, or one `*`, never
//! a repetition, so there is nothing to backtrack into and no pattern can be slow. No regular expressions, on purpose.

use std::{borrow::Cow, fmt};

use crate::{
    attest::Facts,
    x509::{
        DnsName, Names,
        name::{MAX_DNS_LABEL_BYTES, MAX_SUBJECT_CHARS, NameError},
    },
};

/// Bytes in one pattern, template or glob of a policy (a SPIFFE ID's own bound, SPIFFE-ID section 2.3).
pub const MAX_PATTERN_BYTES: usize = 2048;

/// A fact whose value may fill a slot. Paths are not among them: they never fit one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fact {
    Uid,
    Gid,
    User,
    Group,
    SystemdUnit,
    ExecutableSha256,
}

impl Fact {
    pub(super) const ALL: [Self; 6] =
        [Self::Uid, Self::Gid, Self::User, Self::Group, Self::SystemdUnit, Self::ExecutableSha256];

    /// The name between the braces.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Uid => "unix.uid",
            Self::Gid => "unix.gid",
            Self::User => "unix.user",
            Self::Group => "unix.group",
            Self::SystemdUnit => "unix.systemdUnit",
            Self::ExecutableSha256 => "unix.executableSha256",
        }
    }

    fn of(self, facts: &Facts) -> Option<Cow<'_, str>> {
        let Facts::Process(facts) = facts else {
            return None;
        };
        match self {
            Self::Uid => Some(facts.uid.to_string().into()),
            Self::Gid => Some(facts.gid.to_string().into()),
            Self::User => facts.user.as_deref().map(Cow::from),
            Self::Group => facts.group.as_deref().map(Cow::from),
            Self::SystemdUnit => facts.systemd_unit.as_deref().map(Cow::from),
            Self::ExecutableSha256 => facts.executable_sha256.as_deref().map(Cow::from),
        }
    }
}

/// What a pattern is matched against; decides where its parts end and what may stand in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A DNS name: parts are labels, `*` is exactly one label.
    Dns,
    /// A DNS name whose first label is literally `*`; the rest is as in `Dns`, without `*`.
    WildcardDns,
    /// A URI: scheme and authority are literal, parts are path segments, `*` is exactly one segment.
    Uri,
    /// A common name or organization: one part, no `*`.
    Subject,
}

/// A checked pattern.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    text: String,
    kind: Kind,
    head: String,
    parts: Vec<Part>,
}

#[derive(Clone, Debug)]
enum Part {
    Any,
    Literal(String),
    Slot { before: String, fact: Fact, after: String },
}

/// Why an entry grants nothing to this caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unfilled {
    fact: Fact,
    value: Option<String>,
    kind: Kind,
}

impl Pattern {
    /// Parses and checks `text`; the error is a sentence for the policy's author.
    pub(super) fn parse(kind: Kind, text: &str) -> Result<Self, String> {
        if text.len() > MAX_PATTERN_BYTES {
            return Err(format!("it has {} bytes, at most {MAX_PATTERN_BYTES} are allowed", text.len()));
        }
        let (head, rest) = kind.split_head(text)?;
        let parts = match kind.separator() {
            Some(separator) => split_outside_slots(rest, separator).map(Part::parse).collect::<Result<Vec<_>, _>>()?,
            None => vec![Part::parse(rest)?],
        };
        let pattern = Self { text: text.to_owned(), kind, head: head.to_owned(), parts };
        pattern.check()?;
        Ok(pattern)
    }

    /// The text it was parsed from.
    pub(super) fn as_str(&self) -> &str {
        &self.text
    }

    pub(super) fn has_wildcard(&self) -> bool {
        self.parts.iter().any(|part| matches!(part, Part::Any))
    }

    pub(super) fn uses(&self, wanted: Fact) -> bool {
        self.parts.iter().any(|part| matches!(part, Part::Slot { fact, .. } if *fact == wanted))
    }

    /// Whether `asked` is allowed, with slots filled from `facts`.
    pub(super) fn matches(&self, asked: &str, facts: &Facts) -> Result<bool, Unfilled> {
        let Some(rest) = asked.strip_prefix(&self.head) else {
            return Ok(false);
        };
        let asked_parts: Vec<&str> = match self.kind.separator() {
            Some(separator) => rest.split(separator).collect(),
            None => vec![rest],
        };
        if asked_parts.len() != self.parts.len() {
            return Ok(false);
        }
        for (part, asked) in self.parts.iter().zip(asked_parts) {
            let same = match part {
                Part::Any => self.kind.fits(asked),
                Part::Literal(literal) => literal == asked,
                Part::Slot { before, fact, after } => self.slot(before, *fact, after, facts)? == asked,
            };
            if !same {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The text with its slots filled; `*` stays as it is.
    pub(super) fn fill(&self, facts: &Facts) -> Result<String, Unfilled> {
        self.write(|before, fact, after| self.slot(before, fact, after, facts))
    }

    fn slot(&self, before: &str, fact: Fact, after: &str, facts: &Facts) -> Result<String, Unfilled> {
        let unfilled = |value| Unfilled { fact, value, kind: self.kind };
        let value = fact.of(facts).ok_or_else(|| unfilled(None))?;
        let part = format!("{before}{value}{after}");
        // The value must be a whole part by itself, and the part that it completes must be one too. A subject attribute
        // may hold more around the value; it is compared with one that has been checked.
        let whole = self.kind.fits(&value) && (self.kind == Kind::Subject || self.kind.fits(&part));
        if whole { Ok(part) } else { Err(unfilled(Some(value.into_owned()))) }
    }

    fn write<E>(&self, mut slot: impl FnMut(&str, Fact, &str) -> Result<String, E>) -> Result<String, E> {
        let mut text = self.head.clone();
        for (i, part) in self.parts.iter().enumerate() {
            if i > 0 {
                text.extend(self.kind.separator());
            }
            match part {
                Part::Any => text.push('*'),
                Part::Literal(literal) => text.push_str(literal),
                Part::Slot { before, fact, after } => text.push_str(&slot(before, *fact, after)?),
            }
        }
        Ok(text)
    }

    /// Checks the pattern by the rules of the names that it may grant, with `x` in place of every slot and `*`.
    fn check(&self) -> Result<(), String> {
        if self.has_wildcard() {
            match self.kind {
                Kind::Subject => return Err("'*' has no meaning here: write the exact name".to_owned()),
                Kind::WildcardDns => return Err("'*' may stand only as the first label here".to_owned()),
                Kind::Dns if self.parts.iter().all(|part| matches!(part, Part::Any)) => {
                    return Err("at least one label must not be '*'".to_owned());
                }
                Kind::Dns | Kind::Uri => {}
            }
        }
        // X509-SVID section 3.1: the ID of a leaf has a path.
        if self.kind == Kind::Uri && self.head.starts_with("spiffe://") && self.parts.len() < 2 {
            return Err("a workload's SPIFFE ID needs a path".to_owned());
        }
        let sample = self
            .write(|before, _, after| Ok::<_, std::convert::Infallible>(format!("{before}x{after}")))
            .unwrap_or_else(|never| match never {});
        let checked = match self.kind {
            Kind::Dns => DnsName::parse(&sample.replace('*', "x")).map(drop),
            Kind::WildcardDns => DnsName::parse(&sample).map(drop),
            Kind::Uri => Names { uris: vec![sample.replace('*', "x")], ..Names::default() }.check(),
            Kind::Subject => Names { common_name: Some(sample), ..Names::default() }.check(),
        };
        // The name in the error is the sample, which the author never wrote.
        checked.map_err(|error| match error {
            NameError::Dns { why, .. } | NameError::Uri { why, .. } => why,
            _ => format!("it must have 1 to {MAX_SUBJECT_CHARS} printable characters"),
        })
    }
}

impl Kind {
    fn separator(self) -> Option<char> {
        match self {
            Self::Dns | Self::WildcardDns => Some('.'),
            Self::Uri => Some('/'),
            Self::Subject => None,
        }
    }

    /// Splits off what is compared literally, before the first part. A URI's path begins with a slash, so its first
    /// part is empty, and an authority that merely begins like the pattern's does not match.
    fn split_head(self, text: &str) -> Result<(&str, &str), String> {
        match self {
            Self::Dns | Self::Subject => Ok(("", text)),
            Self::WildcardDns if text.starts_with("*.") => Ok(text.split_at(2)),
            Self::WildcardDns => Err("it must begin with '*.'; other names belong in dnsNames".to_owned()),
            Self::Uri => {
                let scheme = text.find("://").ok_or("it must be absolute: scheme://authority/path")? + 3;
                let path = text[scheme..].find('/').map_or(text.len(), |slash| scheme + slash);
                let (head, rest) = text.split_at(path);
                match head.contains(['*', '{', '}']) {
                    true => Err("scheme and trust domain (or host) must be literal: no '*' and no slot".to_owned()),
                    false => Ok((head, rest)),
                }
            }
        }
    }

    /// Whether `value` is exactly one part.
    fn fits(self, value: &str) -> bool {
        let all = |allowed: fn(u8) -> bool| !value.is_empty() && value.bytes().all(allowed);
        match self {
            Self::Dns | Self::WildcardDns => {
                value.len() <= MAX_DNS_LABEL_BYTES
                    && all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                    && !value.starts_with('-')
                    && !value.ends_with('-')
            }
            // SPIFFE-ID section 2.2; percent-encoding, queries and fragments end here too.
            Self::Uri => all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) && value != "." && value != "..",
            Self::Subject => {
                value.len() <= MAX_SUBJECT_CHARS && all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
            }
        }
    }

    fn part_name(self) -> &'static str {
        match self {
            Self::Dns | Self::WildcardDns => "a single lower-case DNS label",
            Self::Uri => "a single URI path segment of letters, digits, '.', '_' and '-'",
            Self::Subject => "a word of letters, digits, '_' and '-'",
        }
    }
}

impl Part {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::Any);
        }
        if text.contains('*') {
            return Err("'*' must be a whole label or path segment".to_owned());
        }
        let Some((before, rest)) = text.split_once('{') else {
            return match text.contains('}') {
                true => Err("'}' without '{'".to_owned()),
                false => Ok(Self::Literal(text.to_owned())),
            };
        };
        let (name, after) = rest.split_once('}').ok_or("'{' without '}' in the same label or path segment")?;
        if before.contains('}') || after.contains(['{', '}']) {
            return Err("at most one {fact} in a label, path segment or subject attribute".to_owned());
        }
        let fact = Fact::ALL.into_iter().find(|fact| fact.name() == name).ok_or_else(|| {
            let known: Vec<_> = Fact::ALL.into_iter().map(Fact::name).collect();
            format!("no fact is named {name:?}; a slot may hold {}", known.join(", "))
        })?;
        Ok(Self::Slot { before: before.to_owned(), fact, after: after.to_owned() })
    }
}

/// The names of facts hold dots of their own.
fn split_outside_slots(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let mut inside = false;
    text.split(move |c| {
        inside = c == '{' || (inside && c != '}');
        c == separator && !inside
    })
}

/// For a denial: names the caller's own fact.
impl fmt::Display for Unfilled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            None => write!(f, "the caller has no {}", self.fact.name()),
            Some(value) => {
                write!(f, "{} {} is not {}", self.fact.name(), super::shown(value), self.kind.part_name())
            }
        }
    }
}

/// A path or unit name in which `*` stands for one or more characters, at most once between two slashes. No slots: it
/// selects callers, so it must not depend on them.
#[derive(Clone, Debug)]
pub(super) struct Glob(Vec<(String, Option<String>)>);

impl Glob {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.len() > MAX_PATTERN_BYTES {
            return Err(format!("it must have 1 to {MAX_PATTERN_BYTES} bytes"));
        }
        if text.contains(['{', '}']) {
            return Err("no {fact} slots here".to_owned());
        }
        let segment = |segment: &str| match segment.split_once('*') {
            None => Ok((segment.to_owned(), None)),
            Some((_, after)) if after.contains('*') => Err("at most one '*' between two slashes".to_owned()),
            Some((before, after)) => Ok((before.to_owned(), Some(after.to_owned()))),
        };
        text.split('/').map(segment).collect::<Result<_, _>>().map(Self)
    }

    pub(super) fn matches(&self, text: &str) -> bool {
        let mut segments = text.split('/');
        let same = self.0.iter().all(|(before, after)| match (segments.next(), after) {
            (None, _) => false,
            (Some(segment), None) => segment == before,
            (Some(segment), Some(after)) => {
                segment.len() > before.len() + after.len() && segment.starts_with(before) && segment.ends_with(after)
            }
        });
        same && segments.next().is_none()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::attest::UnixFacts;

    fn facts(user: &str) -> UnixFacts {
        UnixFacts {
            uid: 1000,
            gid: 33,
            supplementary_gids: Vec::new(),
            user: Some(user.to_owned()),
            group: None,
            executable: None,
            executable_sha256: Some("0".repeat(64)),
            systemd_unit: Some("web.service".to_owned()),
            cgroup: None,
        }
    }

    fn pattern(kind: Kind, text: &str) -> Pattern {
        Pattern::parse(kind, text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn matches(kind: Kind, text: &str, yes: &[&str], no: &[&str]) {
        let pattern = pattern(kind, text);
        for asked in yes {
            assert_eq!(pattern.matches(asked, &Facts::Process(facts("web"))), Ok(true), "{text} allows {asked}");
        }
        for asked in no {
            assert_eq!(
                pattern.matches(asked, &Facts::Process(facts("web"))),
                Ok(false),
                "{text} does not allow {asked}"
            );
        }
    }

    #[test]
    fn a_dns_wildcard_is_exactly_one_label() {
        matches(
            Kind::Dns,
            "web.example.org",
            &["web.example.org"],
            &["example.org", "a.web.example.org", "webxexample.org"],
        );
        matches(
            Kind::Dns,
            "*.web.example.org",
            &["a.web.example.org"],
            &["web.example.org", "a.b.web.example.org", "*.web.example.org", ".web.example.org", "-.web.example.org"],
        );
        matches(Kind::Dns, "a.*.org", &["a.b.org"], &["a.org", "a.b.c.org"]);
        matches(Kind::Dns, "*.*.org", &["a.b.org"], &["*.b.org", "a.org"]);
    }

    #[test]
    fn a_literal_wildcard_has_its_own_kind() {
        matches(
            Kind::WildcardDns,
            "*.web.example.org",
            &["*.web.example.org"],
            &["a.web.example.org", "*.example.org"],
        );
        matches(Kind::WildcardDns, "*.{unix.user}.example.org", &["*.web.example.org"], &["*.db.example.org"]);
    }

    #[test]
    fn a_uri_wildcard_is_exactly_one_path_segment() {
        matches(
            Kind::Uri,
            "spiffe://example.org/host/*",
            &["spiffe://example.org/host/a", "spiffe://example.org/host/A._-9"],
            &[
                "spiffe://example.org/host",
                "spiffe://example.org/host/",
                "spiffe://example.org/host/a/b",
                "spiffe://example.org/host/..",
                "spiffe://example.org/host/.",
                "spiffe://example.org/host/a%2fb",
                "spiffe://example.org/host/a?b",
                "spiffe://example.org/host/a#b",
                "spiffe://example.org/host/*",
                "spiffe://example.organic/host/a",
                "spiffe://other.org/host/a",
            ],
        );
        matches(
            Kind::Uri,
            "https://example.org",
            &["https://example.org"],
            &["https://example.org/", "https://example.org.uk"],
        );
    }

    #[test]
    fn slots_hold_the_callers_fact() {
        matches(Kind::Dns, "{unix.user}.example.org", &["web.example.org"], &["db.example.org", "webb.example.org"]);
        matches(Kind::Dns, "u{unix.uid}-x.{unix.user}.org", &["u1000-x.web.org"], &["u1001-x.web.org"]);
        matches(Kind::Uri, "spiffe://example.org/{unix.systemdUnit}", &["spiffe://example.org/web.service"], &[]);
        matches(Kind::Uri, "spiffe://e/{unix.gid}/{unix.uid}", &["spiffe://e/33/1000"], &["spiffe://e/1000/33"]);
        matches(Kind::Subject, "Team {unix.user}", &["Team web"], &["Team db", "Team", "web"]);
        let filled = pattern(Kind::Dns, "*.u{unix.uid}.org").fill(&Facts::Process(facts("web")));
        assert_eq!(filled.as_deref(), Ok("*.u1000.org"));
    }

    #[test]
    fn a_value_that_does_not_fit_its_slot_grants_nothing() {
        let dns = pattern(Kind::Dns, "{unix.user}.example.org");
        for user in ["a.b", "*", "", "-a", "a-", "A", "a_b", "ü", "a b", "a/b", &"a".repeat(64)] {
            let why = dns.matches("web.example.org", &Facts::Process(facts(user))).unwrap_err().to_string();
            assert!(why.ends_with("is not a single lower-case DNS label"), "{user}: {why}");
        }
        let uri = pattern(Kind::Uri, "spiffe://e/{unix.user}/x");
        for user in [".", "..", "a/b", "", "a%2fb", "*", "a?b", "a#b", "a b", "ü"] {
            let why = uri.matches("spiffe://e/web/x", &Facts::Process(facts(user))).unwrap_err().to_string();
            assert!(why.contains("is not a single URI path segment"), "{user}: {why}");
        }
        let subject = pattern(Kind::Subject, "{unix.user}.example.org");
        for user in ["a.b", "", "a b", "a,O=x", "a:b", &"a".repeat(65)] {
            let why = subject.matches("web.example.org", &Facts::Process(facts(user))).unwrap_err().to_string();
            assert!(why.contains("is not a word of letters"), "{user}: {why}");
        }
        let absent = pattern(Kind::Dns, "{unix.group}.example.org").fill(&Facts::Process(facts("web"))).unwrap_err();
        assert_eq!(absent.to_string(), "the caller has no unix.group");
        let long =
            pattern(Kind::Dns, "x{unix.user}.example.org").fill(&Facts::Process(facts(&"a".repeat(63)))).unwrap_err();
        assert!(long.to_string().contains("is not a single lower-case DNS label"));
    }

    #[test]
    fn a_pattern_that_could_not_mean_what_it_says_is_refused() {
        for (kind, text, words) in [
            (Kind::Dns, "", "it must have 1 to 253 bytes"),
            (Kind::Dns, "a..b", "each label"),
            (Kind::Dns, "Web.example.org", "labels may hold only a-z"),
            (Kind::Dns, "example.org.", "each label"),
            (Kind::Dns, "*", "at least one label must not be '*'"),
            (Kind::Dns, "*.*", "at least one label must not be '*'"),
            (Kind::Dns, "w*.example.org", "'*' must be a whole label"),
            (Kind::Dns, "**.example.org", "'*' must be a whole label"),
            (Kind::Dns, "{unix.user}{unix.uid}.org", "at most one {fact}"),
            (Kind::Dns, "{unix.user.org", "'{' without '}'"),
            (Kind::Dns, "unix.user}.org", "'}' without '{'"),
            (Kind::Dns, "{{unix.uid}}.org", "at most one {fact}"),
            (Kind::Dns, "{uid}.org", "no fact is named \"uid\"; a slot may hold unix.uid, unix.gid"),
            (Kind::Dns, "10.0.0.1", "its last label is all digits"),
            (Kind::WildcardDns, "web.example.org", "it must begin with '*.'"),
            (Kind::WildcardDns, "*.*.example.org", "only as the first label"),
            (Kind::WildcardDns, "*.org", "at least two labels"),
            (Kind::Uri, "example.org/a", "it must be absolute"),
            (Kind::Uri, "spiffe://*/a", "must be literal"),
            (Kind::Uri, "spiffe://{unix.user}/a", "must be literal"),
            (Kind::Uri, "spiffe://example.org", "needs a path"),
            (Kind::Uri, "SPIFFE://example.org/a", "its scheme must be lower case"),
            (Kind::Uri, "spiffe://example.org/a b", "printable ASCII"),
            (Kind::Uri, "spiffe://example.org/a*", "'*' must be a whole label or path segment"),
            (Kind::Subject, "*", "'*' has no meaning here"),
            (Kind::Subject, "*.example.org", "'*' must be a whole"),
            (Kind::Subject, "", "1 to 64 printable characters"),
            (Kind::Subject, "a\nb", "1 to 64 printable characters"),
            (Kind::Subject, "{unix.user}.{unix.uid}", "at most one {fact}"),
        ] {
            let error = Pattern::parse(kind, text).expect_err(text);
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn a_pattern_has_a_bound_in_bytes() {
        let uri = |bytes: usize| format!("https://e/{}", "a".repeat(bytes - 10));
        assert!(Pattern::parse(Kind::Uri, &uri(MAX_PATTERN_BYTES)).is_ok());
        let error = Pattern::parse(Kind::Uri, &uri(MAX_PATTERN_BYTES + 1)).unwrap_err();
        assert_eq!(error, "it has 2049 bytes, at most 2048 are allowed");
        assert!(Glob::parse(&"a".repeat(MAX_PATTERN_BYTES)).is_ok());
        assert!(Glob::parse(&"a".repeat(MAX_PATTERN_BYTES + 1)).is_err());
    }

    #[test]
    fn every_slot_names_a_fact_that_the_caller_is_shown() {
        let workload = crate::attest::Workload::for_test(UnixFacts { group: Some("g".to_owned()), ..facts("web") });
        for fact in Fact::ALL {
            let value = fact.of(workload.facts()).map(Cow::into_owned);
            assert_eq!(value.as_ref(), workload.facts().named().get(fact.name()), "{}", fact.name());
        }
    }

    #[test]
    fn a_glob_stays_within_a_segment() {
        for (glob, yes, no) in [
            ("/usr/bin/web", "/usr/bin/web", "/usr/bin/webb"),
            ("/opt/*/bin/web", "/opt/a/bin/web", "/opt/a/b/bin/web"),
            ("/opt/*/bin/web", "/opt/bin/bin/web", "/opt//bin/web"),
            ("/opt/web-*", "/opt/web-1", "/opt/web-"),
            ("/opt/web-*", "/opt/web-1.2", "/opt/web-1/x"),
            ("web@*.service", "web@a.service", "web@.service"),
            ("web@*.service", "web@a@b.service", "web@a.socket"),
            ("aa*aa", "aabaa", "aaa"),
        ] {
            let glob = Glob::parse(glob).unwrap();
            assert!(glob.matches(yes), "{glob:?} {yes}");
            assert!(!glob.matches(no), "{glob:?} {no}");
        }
        assert_eq!(Glob::parse("/a/*b*").unwrap_err(), "at most one '*' between two slashes");
        assert_eq!(Glob::parse("/a/{unix.uid}").unwrap_err(), "no {fact} slots here");
        assert_eq!(Glob::parse("").unwrap_err(), "it must have 1 to 2048 bytes");
    }

    proptest! {
        #[test]
        fn a_filled_slot_adds_no_part_and_changes_no_other(user in any::<String>()) {
            if let Ok(name) = pattern(Kind::Dns, "a.x{unix.user}.example.org").fill(&Facts::Process(facts(&user))) {
                prop_assert!(DnsName::parse(&name).is_ok());
                let labels: Vec<_> = name.split('.').collect();
                prop_assert_eq!((labels.len(), labels[0], labels[2], labels[3]), (4, "a", "example", "org"));
            }
            if let Ok(uri) = pattern(Kind::Uri, "spiffe://example.org/a/{unix.user}/b").fill(&Facts::Process(facts(&user))) {
                prop_assert!(crate::spiffe::SpiffeId::parse(&uri).is_ok());
                let segments: Vec<_> = uri.split('/').collect();
                prop_assert_eq!((segments.len(), segments[2], segments[3], segments[5]), (6, "example.org", "a", "b"));
            }
            if let Ok(name) = pattern(Kind::Subject, "CN {unix.user}").fill(&Facts::Process(facts(&user))) {
                prop_assert!(name[3..].bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b)));
            }
        }

        #[test]
        fn only_the_filled_text_matches_a_template_without_wildcards(
            user in "[a-z*./-]{0,6}",
            asked in "[a-z*./-]{0,6}(\\.example\\.org)?",
        ) {
            let pattern = pattern(Kind::Dns, "{unix.user}.example.org");
            let facts = Facts::Process(facts(&user));
            if let Ok(matched) = pattern.matches(&asked, &facts) {
                prop_assert_eq!(matched, pattern.fill(&facts).as_deref() == Ok(asked.as_str()));
            }
        }

        #[test]
        fn no_text_breaks_the_parser(text in "[a-z*{}./:]{0,40}|\\PC{0,40}", asked in "\\PC{0,40}") {
            for kind in [Kind::Dns, Kind::WildcardDns, Kind::Uri, Kind::Subject] {
                if let Ok(pattern) = Pattern::parse(kind, &text) {
                    let _ = pattern.matches(&asked, &Facts::Process(facts("web")));
                }
            }
            if let Ok(glob) = Glob::parse(&text) {
                glob.matches(&asked);
            }
        }
    }
}
