//! Patterns and templates: text from a policy, with `{fact}` slots and `*` segments, compared with what a caller asks for.
//!
//! Invariant: a value never escapes its slot. A slot lies inside one label, one path segment or one subject attribute; a
//! value that could end that part, or that is no valid part by itself, fills nothing. There is at most one slot in a part,
//! because the border between two neighbouring values would be ambiguous: `ab` + `c` is also `a` + `bc`. A fact with
//! several values fills a name once for each, so it is at most once in a pattern.
//!
//! Matching walks pattern and text side by side, part by part, once. A part is one literal, one slot, or one `*`, never
//! a repetition, so there is nothing to backtrack into and no pattern can be slow. No regular expressions, on purpose.

use std::fmt;

use super::fact::{Callers, Fact, MAX_SERVICES};
use crate::{
    attest::Facts,
    x509::{
        DnsName, Names,
        name::{MAX_DNS_LABEL_BYTES, MAX_SUBJECT_CHARS, NameError},
    },
};

/// Bytes in one pattern, template or glob of a policy (a SPIFFE ID's own bound, SPIFFE-ID section 2.3).
pub const MAX_PATTERN_BYTES: usize = 2048;

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
pub(super) enum Unfilled {
    Absent(Fact),
    Unfit { fact: Fact, value: String, kind: Kind },
    TooManyServices(usize),
}

impl Pattern {
    /// Parses and checks `text` for a policy about `callers`; the error is a sentence for the policy's author.
    pub(super) fn parse(kind: Kind, callers: Callers, text: &str) -> Result<Self, String> {
        if text.len() > MAX_PATTERN_BYTES {
            return Err(format!("it has {} bytes, at most {MAX_PATTERN_BYTES} are allowed", text.len()));
        }
        let (head, rest) = kind.split_head(text)?;
        let parts = match kind.separator() {
            Some(separator) => {
                let parts = split_outside_slots(rest, separator).map(|part| Part::parse(part, callers));
                parts.collect::<Result<Vec<_>, _>>()?
            }
            None => vec![Part::parse(rest, callers)?],
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
        self.count(wanted) > 0
    }

    fn count(&self, wanted: Fact) -> usize {
        self.parts.iter().filter(|part| matches!(part, Part::Slot { fact, .. } if *fact == wanted)).count()
    }

    /// Whether some value of its facts makes a subject attribute that begins with `prefix`, whose last character no value
    /// can hold.
    pub(super) fn could_begin_with(&self, prefix: &str) -> bool {
        match self.parts.first() {
            Some(Part::Literal(literal)) => literal.starts_with(prefix),
            Some(Part::Slot { before, after, .. }) => {
                // The value is some of what is left of the prefix, and what follows the value begins with the rest.
                let completes = |left: &str| {
                    (1..left.len()).any(|at| self.kind.fits(&left[..at]) && after.starts_with(&left[at..]))
                };
                before.starts_with(prefix) || prefix.strip_prefix(before.as_str()).is_some_and(completes)
            }
            Some(Part::Any) | None => true,
        }
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
                Part::Slot { before, fact, after } => {
                    self.slot(before, *fact, after, facts)?.iter().any(|part| part == asked)
                }
            };
            if !same {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The text with its slots filled, once for each Service if it names them; `*` stays as it is.
    pub(super) fn fill(&self, facts: &Facts) -> Result<Vec<String>, Unfilled> {
        let mut texts = vec![self.head.clone()];
        for (i, part) in self.parts.iter().enumerate() {
            let values = match part {
                Part::Any => vec!["*".to_owned()],
                Part::Literal(literal) => vec![literal.clone()],
                Part::Slot { before, fact, after } => self.slot(before, *fact, after, facts)?,
            };
            let separator = self.kind.separator().filter(|_| i > 0).map_or(String::new(), String::from);
            let with =
                |text: &String| values.iter().map(|value| format!("{text}{separator}{value}")).collect::<Vec<_>>();
            texts = texts.iter().flat_map(with).collect();
        }
        Ok(texts)
    }

    /// The part that a slot makes, for each of the fact's values that fits; an error when there is none, except that a pod
    /// may have no Service.
    fn slot(&self, before: &str, fact: Fact, after: &str, facts: &Facts) -> Result<Vec<String>, Unfilled> {
        let values = fact.of(facts);
        if values.len() > MAX_SERVICES {
            return Err(Unfilled::TooManyServices(values.len()));
        }
        let first = values.first().ok_or(Unfilled::Absent(fact))?.to_string();
        // The value must be a whole part by itself, and the part that it completes must be one too. A subject attribute
        // may hold more around the value; it is compared with one that has been checked.
        let whole =
            |value: &str, part: &str| self.kind.fits(value) && (self.kind == Kind::Subject || self.kind.fits(part));
        let parts = values.iter().map(|value| (value, format!("{before}{value}{after}")));
        let parts: Vec<_> = parts.filter(|(value, part)| whole(value, part)).map(|(_, part)| part).collect();
        if parts.is_empty() { Err(Unfilled::Unfit { fact, value: first, kind: self.kind }) } else { Ok(parts) }
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
        if self.count(Fact::Service) > 1 {
            return Err(format!("{{{}}} may be in it only once", Fact::Service.name()));
        }
        let sample = self.sample();
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

    /// A text that it would allow, with `x` in place of every slot.
    fn sample(&self) -> String {
        let parts = self.parts.iter().map(|part| match part {
            Part::Any => "*".to_owned(),
            Part::Literal(literal) => literal.clone(),
            Part::Slot { before, after, .. } => format!("{before}x{after}"),
        });
        let separator = self.kind.separator().map_or(String::new(), String::from);
        self.head.clone() + &parts.collect::<Vec<_>>().join(&separator)
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
    fn parse(text: &str, callers: Callers) -> Result<Self, String> {
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
        let mut known = Fact::ALL.into_iter().filter(|fact| fact.callers() == callers);
        let fact = known.clone().find(|fact| fact.name() == name).ok_or_else(|| {
            let known = known.by_ref().map(Fact::name).collect::<Vec<_>>().join(", ");
            format!("callers of this policy have no fact named {}; a slot may hold {known}", super::shown(name))
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
        match self {
            Self::Absent(Fact::Service) => write!(f, "no Service selects the caller"),
            Self::Absent(fact) => write!(f, "the caller has no {}", fact.name()),
            Self::Unfit { fact, value, kind } => {
                write!(f, "{} {} is not {}", fact.name(), super::shown(value), kind.part_name())
            }
            Self::TooManyServices(count) => {
                write!(f, "{count} Services select the caller, and at most {MAX_SERVICES} are taken")
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
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::attest::{PodFacts, UnixFacts};

    fn facts(user: &str) -> UnixFacts {
        UnixFacts {
            uid: 1000,
            owner: 1000,
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
        Pattern::parse(kind, Callers::Processes, text).unwrap_or_else(|error| panic!("{text}: {error}"))
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
        assert_eq!(filled, Ok(vec!["*.u1000.org".to_owned()]));
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
            (Kind::Dns, "{uid}.org", "have no fact named \"uid\"; a slot may hold unix.uid, unix.gid"),
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
            let error = Pattern::parse(kind, Callers::Processes, text).expect_err(text);
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn a_pattern_has_a_bound_in_bytes() {
        let uri = |bytes: usize| format!("https://e/{}", "a".repeat(bytes - 10));
        assert!(Pattern::parse(Kind::Uri, Callers::Processes, &uri(MAX_PATTERN_BYTES)).is_ok());
        let error = Pattern::parse(Kind::Uri, Callers::Processes, &uri(MAX_PATTERN_BYTES + 1)).unwrap_err();
        assert_eq!(error, "it has 2049 bytes, at most 2048 are allowed");
        assert!(Glob::parse(&"a".repeat(MAX_PATTERN_BYTES)).is_ok());
        assert!(Glob::parse(&"a".repeat(MAX_PATTERN_BYTES + 1)).is_err());
    }

    #[test]
    fn every_slot_names_a_fact_that_the_caller_is_shown() {
        let unix = Facts::Process(UnixFacts { group: Some("g".to_owned()), ..facts("web") });
        let pod = Facts::Pod(pod(&["web", "web-api"]));
        for fact in Fact::ALL {
            let facts = if fact.callers() == Callers::Pods { &pod } else { &unix };
            // The one with several values is shown as a list.
            let shown = if fact == Fact::Service { "kubernetes.services" } else { fact.name() };
            assert_eq!(Some(&fact.of(facts).join(", ")), facts.named().get(shown), "{}", fact.name());
        }
    }

    fn pod(services: &[&str]) -> PodFacts {
        PodFacts {
            namespace: "production".to_owned(),
            name: "web-0".to_owned(),
            uid: "7f5a4c3e".to_owned(),
            service_account: "web.v1".to_owned(),
            node: "node1.example.org".to_owned(),
            labels: BTreeMap::new(),
            namespace_labels: BTreeMap::new(),
            ips: Vec::new(),
            services: services.iter().map(ToString::to_string).collect(),
        }
    }

    fn of_pod(kind: Kind, text: &str) -> Pattern {
        Pattern::parse(kind, Callers::Pods, text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn slots_hold_the_pods_facts() {
        let facts = Facts::Pod(pod(&[]));
        for (kind, text, filled) in [
            (Kind::Dns, "{kubernetes.pod}.{kubernetes.namespace}.svc", "web-0.production.svc"),
            (
                Kind::Uri,
                "spiffe://e/ns/{kubernetes.namespace}/sa/{kubernetes.serviceAccount}",
                "spiffe://e/ns/production/sa/web.v1",
            ),
            (Kind::Uri, "https://e/{kubernetes.node}/{kubernetes.podUid}", "https://e/node1.example.org/7f5a4c3e"),
            (Kind::Subject, "ns {kubernetes.namespace}", "ns production"),
        ] {
            let pattern = of_pod(kind, text);
            assert_eq!(pattern.fill(&facts), Ok(vec![filled.to_owned()]));
            assert_eq!(pattern.matches(filled, &facts), Ok(true), "{text}");
        }
        let why = of_pod(Kind::Dns, "{kubernetes.serviceAccount}.example.org").fill(&facts).unwrap_err().to_string();
        assert_eq!(why, r#"kubernetes.serviceAccount "web.v1" is not a single lower-case DNS label"#);
    }

    #[test]
    fn a_service_is_each_one_that_selects_the_pod() {
        let pattern = of_pod(Kind::Dns, "{kubernetes.service}.{kubernetes.namespace}.svc");
        let (none, both) = (Facts::Pod(pod(&[])), Facts::Pod(pod(&["web", "web-api"])));
        assert_eq!(pattern.fill(&both).unwrap(), ["web.production.svc", "web-api.production.svc"]);
        for (asked, allowed) in [
            ("web-api.production.svc", true),
            ("web.production.svc", true),
            ("db.production.svc", false),
            ("web.test.svc", false),
        ] {
            assert_eq!(pattern.matches(asked, &both), Ok(allowed), "{asked}");
        }
        assert_eq!(
            pattern.matches("web.production.svc", &none).unwrap_err().to_string(),
            "no Service selects the caller"
        );
        assert_eq!(pattern.fill(&none), Err(Unfilled::Absent(Fact::Service)));
        let twice =
            Pattern::parse(Kind::Dns, Callers::Pods, "{kubernetes.service}.{kubernetes.service}.svc").unwrap_err();
        assert_eq!(twice, "{kubernetes.service} may be in it only once");
    }

    #[test]
    fn the_services_of_a_pod_have_a_bound() {
        let pattern = of_pod(Kind::Dns, "{kubernetes.service}.svc");
        let of = |n: usize| Facts::Pod(PodFacts { services: (0..n).map(|i| format!("s{i}")).collect(), ..pod(&[]) });
        assert_eq!(pattern.fill(&of(MAX_SERVICES)).unwrap().len(), MAX_SERVICES);
        assert_eq!(pattern.matches("s0.svc", &of(MAX_SERVICES)), Ok(true));
        let why = pattern.matches("s0.svc", &of(MAX_SERVICES + 1)).unwrap_err().to_string();
        assert_eq!(why, "65 Services select the caller, and at most 64 are taken");
    }

    #[test]
    fn a_fact_of_other_callers_is_refused() {
        let error = Pattern::parse(Kind::Dns, Callers::Pods, "{unix.user}.org").unwrap_err();
        let expected = "callers of this policy have no fact named \"unix.user\"; a slot may hold kubernetes.namespace, \
                        kubernetes.pod, kubernetes.podUid, kubernetes.serviceAccount, kubernetes.node, kubernetes.service";
        assert_eq!(error, expected);
        let error = Pattern::parse(Kind::Dns, Callers::Processes, "{kubernetes.pod}.org").unwrap_err();
        assert!(error.contains("\"kubernetes.pod\"; a slot may hold unix.uid"), "{error}");
    }

    #[test]
    fn a_prefix_is_found_wherever_a_slot_could_make_it() {
        for (text, could) in [
            ("system:node", true),
            ("system:", true),
            ("system", false),
            ("systems:x", false),
            ("a system:x", false),
            ("{kubernetes.pod}", false),
            ("{kubernetes.pod}:masters", true),
            ("sys{kubernetes.pod}:x", true),
            ("sys{kubernetes.pod}em:x", true),
            ("{kubernetes.pod}m:x", true),
            ("{kubernetes.pod}system:x", false),
            ("system{kubernetes.pod}:x", false),
            ("system:{kubernetes.pod}", true),
            ("x{kubernetes.pod}:masters", false),
        ] {
            assert_eq!(of_pod(Kind::Subject, text).could_begin_with("system:"), could, "{text}");
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
            let filled = |kind, text| pattern(kind, text).fill(&Facts::Process(facts(&user))).map(|texts| texts.concat());
            if let Ok(name) = filled(Kind::Dns, "a.x{unix.user}.example.org") {
                prop_assert!(DnsName::parse(&name).is_ok());
                let labels: Vec<_> = name.split('.').collect();
                prop_assert_eq!((labels.len(), labels[0], labels[2], labels[3]), (4, "a", "example", "org"));
            }
            if let Ok(uri) = filled(Kind::Uri, "spiffe://example.org/a/{unix.user}/b") {
                prop_assert!(crate::spiffe::SpiffeId::parse(&uri).is_ok());
                let segments: Vec<_> = uri.split('/').collect();
                prop_assert_eq!((segments.len(), segments[2], segments[3], segments[5]), (6, "example.org", "a", "b"));
            }
            if let Ok(name) = filled(Kind::Subject, "CN {unix.user}") {
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
                prop_assert_eq!(matched, pattern.fill(&facts) == Ok(vec![asked]));
            }
        }

        /// Whatever the API server said: a name has the parts of its template, and each value is in its own.
        #[test]
        fn facts_of_a_pod_stay_in_their_slots(
            namespace in "[a-z*./:-]{0,6}",
            services in proptest::collection::btree_set("[a-z*./-]{0,6}", 0..4),
            account in any::<String>(),
        ) {
            let facts = Facts::Pod(PodFacts { namespace: namespace.clone(), services, service_account: account, ..pod(&[]) });
            let dns = of_pod(Kind::Dns, "{kubernetes.service}.{kubernetes.namespace}.svc");
            for name in dns.fill(&facts).unwrap_or_default() {
                prop_assert!(DnsName::parse(&name).is_ok());
                let labels: Vec<_> = name.split('.').collect();
                prop_assert_eq!(&labels[1..], [namespace.as_str(), "svc"]);
                prop_assert!(Fact::Service.of(&facts).iter().any(|service| service == labels[0]));
                prop_assert_eq!(dns.matches(&name, &facts), Ok(true));
            }
            let uri = of_pod(Kind::Uri, "spiffe://e/ns/{kubernetes.namespace}/sa/{kubernetes.serviceAccount}");
            for uri in uri.fill(&facts).unwrap_or_default() {
                prop_assert!(crate::spiffe::SpiffeId::parse(&uri).is_ok());
                let segments: Vec<_> = uri.split('/').collect();
                prop_assert_eq!((segments.len(), segments[2], segments[3], segments[5]), (7, "e", "ns", "sa"));
            }
        }

        /// What [`Pattern::could_begin_with`] rules out, no value makes.
        #[test]
        fn no_value_makes_a_prefix_that_was_ruled_out(
            before in "(s|sys|system|system:|x)?",
            after in "(:|:x|tem:|m:x|x)?",
            name in "(s|sys|system|tem|ystem|m|[a-z]{1,3})",
        ) {
            let facts = Facts::Pod(PodFacts { name, ..pod(&[]) });
            let pattern = of_pod(Kind::Subject, &format!("{before}{{kubernetes.pod}}{after}"));
            let begins = pattern.fill(&facts).is_ok_and(|texts| texts[0].starts_with("system:"));
            prop_assert!(!begins || pattern.could_begin_with("system:"));
        }

        #[test]
        fn no_text_breaks_the_parser(text in "[a-z*{}./:]{0,40}|\\PC{0,40}", asked in "\\PC{0,40}") {
            for kind in [Kind::Dns, Kind::WildcardDns, Kind::Uri, Kind::Subject] {
                if let Ok(pattern) = Pattern::parse(kind, Callers::Processes, &text) {
                    let _ = pattern.matches(&asked, &Facts::Process(facts("web")));
                }
            }
            if let Ok(glob) = Glob::parse(&text) {
                glob.matches(&asked);
            }
        }
    }
}
