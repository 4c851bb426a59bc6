//! From documents to checked policies: every text is parsed once, at load, into what `judge` compares.
//!
//! Invariant: a [`Policy`] cannot hold what would never work or would not mean what it says: an empty match, a pattern
//! that no name can equal, a rule that may run long, a signer that refuses workloads. All problems of a set are
//! reported together, with their lines.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use serde_saphyr::Spanned;

use super::{
    MAX_NAME_BYTES, MAX_POLICIES, MAX_PROBLEMS, Source,
    cel::Rule,
    document::{self, API_VERSION, Document, KIND, List, Problem},
    lifetime, shown,
    template::{Glob, Kind, Pattern},
};
use crate::x509::{KeyAlgorithm, Usage, Usages, name::parse_ip};

/// Entries in one list of a policy.
pub const MAX_ENTRIES: usize = 64;
/// Rules in one policy.
pub const MAX_RULES: usize = 16;
/// Offers in one policy.
pub const MAX_OFFERS: usize = 16;
/// Bytes in an offer's hint (SPIFFE Workload API section 8).
pub const MAX_HINT_BYTES: usize = 1024;
/// Characters in a rule's message.
pub const MAX_MESSAGE_CHARS: usize = 256;
/// The signer of a policy that names none.
pub const DEFAULT_SIGNER: &str = "embedded";
/// Bytes in a signer name: a DNS subdomain, a slash and a path of the same size.
const MAX_SIGNER_BYTES: usize = 2 * MAX_NAME_BYTES + 1;

/// Signers that no workload certificate can come from, with the reason.
const REFUSED_SIGNERS: [(&str, &str); 2] = [
    (
        "kubernetes.io/kubelet-serving",
        "it signs only for kubelets: organization system:nodes, a common name that begins with system:node:, server auth \
         alone and no URI; a workload certificate from it would fail or claim to be a node. Use a signer of your own, for \
         example csrd.dev/workload",
    ),
    (
        "kubernetes.io/legacy-unknown",
        "certificates.k8s.io/v1 refuses every request addressed to it. Use a signer of your own, for example \
         csrd.dev/workload",
    ),
];

/// Keys that a policy allows when it names none. RSA must be named: making such a key costs the host thousands of times
/// the CPU of an elliptic one.
const DEFAULT_KEYS: [KeyAlgorithm; 3] = [KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Ed25519];

/// A checked policy.
#[derive(Debug)]
pub(super) struct Policy {
    pub(super) name: String,
    pub(super) unix: UnixMatch,
    pub(super) signer: String,
    pub(super) allow: Allow,
    pub(super) rules: Vec<Rule>,
    pub(super) offers: Vec<Offer>,
}

/// Whom it matches; every clause that is present must hold.
#[derive(Debug)]
pub(super) struct UnixMatch {
    pub(super) uids: Option<Vec<u32>>,
    pub(super) users: Option<Vec<String>>,
    pub(super) gids: Option<Vec<u32>>,
    pub(super) executables: Option<Vec<Glob>>,
    pub(super) executable_sha256: Option<Vec<String>>,
    pub(super) systemd_units: Option<Vec<Glob>>,
}

/// What may be asked.
#[derive(Debug)]
pub(super) struct Allow {
    pub(super) common_names: Vec<Pattern>,
    pub(super) organizations: Vec<Pattern>,
    pub(super) dns_names: Vec<Pattern>,
    pub(super) wildcard_dns_names: Vec<Pattern>,
    pub(super) ip_addresses: Vec<IpNet>,
    pub(super) uris: Vec<Pattern>,
    pub(super) usages: Usages,
    pub(super) keys: Vec<KeyAlgorithm>,
    pub(super) lifetime: lifetime::Range,
}

/// What is handed out unasked.
#[derive(Debug)]
pub(super) struct Offer {
    pub(super) spiffe_id: Option<Pattern>,
    pub(super) dns_names: Vec<Pattern>,
    pub(super) hint: String,
}

/// Checks all sources; one problem anywhere and there is no set.
pub(super) fn compile(sources: &[Source]) -> Result<Vec<Policy>, Vec<Problem>> {
    let mut policies: BTreeMap<String, (String, Policy)> = BTreeMap::new();
    let mut problems = Vec::new();
    for source in sources {
        let (documents, unread) = document::read(source);
        problems.extend(unread);
        let mut check = Check { file: &source.origin, problems: &mut problems };
        for document in &documents {
            let policy = check.policy(document);
            let name = &document.metadata.name;
            if let Some((other, _)) = policies.get(&name.value) {
                let message = format!("{} is also the name of a policy in {other}", shown(&name.value));
                check.problem(name, "metadata.name", message);
            } else if policies.len() == MAX_POLICIES {
                check.problem(name, "", format!("more than {MAX_POLICIES} policies in the set"));
            } else if let Some(policy) = policy {
                policies.insert(name.value.clone(), (source.origin.clone(), policy));
            }
        }
    }
    problems.truncate(MAX_PROBLEMS);
    match problems.is_empty() {
        true => Ok(policies.into_values().map(|(_, policy)| policy).collect()),
        false => Err(problems),
    }
}

struct Check<'a> {
    file: &'a str,
    problems: &'a mut Vec<Problem>,
}

impl Check<'_> {
    fn problem<T>(&mut self, at: &Spanned<T>, field: &str, message: impl Into<String>) {
        let (file, field) = (self.file.to_owned(), field.to_owned());
        self.problems.push(Problem { file, line: at.referenced.line(), field, message: message.into() });
    }

    fn text<T, U>(&mut self, at: &Spanned<T>, field: &str, parsed: Result<U, String>) -> Option<U> {
        parsed.map_err(|message| self.problem(at, field, message)).ok()
    }

    /// Parses each entry; reports what does not parse, and a list over its bound.
    fn list<T, U>(
        &mut self,
        list: &List<T>,
        field: &str,
        max: usize,
        mut parse: impl FnMut(&mut Self, &Spanned<T>, &str) -> Option<U>,
    ) -> Vec<U> {
        let Some(list) = list else {
            return Vec::new();
        };
        if let Some(extra) = list.get(max) {
            self.problem(extra, field, format!("{} entries, at most {max} are allowed", list.len()));
            return Vec::new();
        }
        let entries = list.iter().enumerate();
        entries.filter_map(|(i, entry)| parse(self, entry, &format!("{field}[{i}]"))).collect()
    }

    fn patterns(&mut self, list: &List<String>, field: &str, kind: Kind) -> Vec<Pattern> {
        self.list(list, field, MAX_ENTRIES, |check, entry, field| {
            check.text(entry, field, Pattern::parse(kind, &entry.value))
        })
    }

    fn policy(&mut self, document: &Document) -> Option<Policy> {
        let before = self.problems.len();
        if document.api_version.value != API_VERSION {
            self.problem(&document.api_version, "apiVersion", format!("it must be {API_VERSION}"));
        }
        if document.kind.value != KIND {
            self.problem(&document.kind, "kind", format!("it must be {KIND}"));
        }
        let name = &document.metadata.name;
        self.text(name, "metadata.name", check_name(&name.value));
        let spec = &document.spec;
        let unix = self.unix_match(&spec.r#match);
        let signer = match &spec.signer {
            Some(signer) => self.text(signer, "spec.signer", check_signer(&signer.value)),
            None => Some(DEFAULT_SIGNER.to_owned()),
        };
        let allow = self.allow(&spec.allow);
        let rules = self.list(&spec.rules, "spec.rules", MAX_RULES, Self::rule);
        let offers = self.list(&spec.offer, "spec.offer", MAX_OFFERS, Self::offer);
        self.unique_hints(&spec.offer);
        if self.problems.len() > before {
            return None;
        }
        Some(Policy { name: name.value.clone(), unix: unix?, signer: signer?, allow: allow?, rules, offers })
    }

    fn unix_match(&mut self, r#match: &Spanned<document::Match>) -> Option<UnixMatch> {
        let Some(unix) = &r#match.value.unix else {
            self.problem(r#match, "spec.match", "it is empty and would match nobody; name a unix section");
            return None;
        };
        let field = "spec.match.unix";
        let clauses = &unix.value;
        let lists = [
            ("uids", clauses.uids.as_ref().map(Vec::len)),
            ("users", clauses.users.as_ref().map(Vec::len)),
            ("gids", clauses.gids.as_ref().map(Vec::len)),
            ("systemdUnits", clauses.systemd_units.as_ref().map(Vec::len)),
            ("executables", clauses.executables.as_ref().map(Vec::len)),
            ("executableSha256", clauses.executable_sha256.as_ref().map(Vec::len)),
        ];
        for (name, _) in lists.iter().filter(|(_, len)| *len == Some(0)) {
            self.problem(unix, &format!("{field}.{name}"), "an empty list matches nobody; leave it out");
        }
        // Any user can run any program that it may read, preload code into it, and give it any path in a mount namespace
        // of its own. So the executable narrows an identity and never is one.
        if lists[..4].iter().all(|(_, len)| len.is_none()) {
            let message = "it needs uids, users, gids or systemdUnits; an executable alone proves nothing, because every \
                           user can run it";
            self.problem(unix, field, message);
        }
        let strings = |check: &mut Self, list: &List<String>, name: &str, parse: fn(&str) -> Result<String, String>| {
            list.as_ref()?;
            let field = format!("{field}.{name}");
            Some(check.list(list, &field, MAX_ENTRIES, |check, at, field| check.text(at, field, parse(&at.value))))
        };
        let users = strings(self, &clauses.users, "users", check_user);
        let executable_sha256 = strings(self, &clauses.executable_sha256, "executableSha256", check_sha256);
        let numbers = |check: &mut Self, list: &List<u32>, name: &str| {
            list.as_ref()?;
            Some(check.list(list, &format!("{field}.{name}"), MAX_ENTRIES, |_, at, _| Some(at.value)))
        };
        let globs = |check: &mut Self, list: &List<String>, name: &str, parse: fn(&str) -> Result<Glob, String>| {
            list.as_ref()?;
            let field = format!("{field}.{name}");
            Some(check.list(list, &field, MAX_ENTRIES, |check, at, field| check.text(at, field, parse(&at.value))))
        };
        Some(UnixMatch {
            uids: numbers(self, &clauses.uids, "uids"),
            users,
            gids: numbers(self, &clauses.gids, "gids"),
            executables: globs(self, &clauses.executables, "executables", parse_executable),
            executable_sha256,
            systemd_units: globs(self, &clauses.systemd_units, "systemdUnits", parse_unit),
        })
    }

    fn allow(&mut self, allow: &document::Allow) -> Option<Allow> {
        let field = |name: &str| format!("spec.allow.{name}");
        let ip_addresses = self.list(&allow.ip_addresses, &field("ipAddresses"), MAX_ENTRIES, |check, at, field| {
            check.text(at, field, parse_network(&at.value))
        });
        let usages = self.list(&allow.usages, &field("usages"), MAX_ENTRIES, |check, at, field| {
            let known = || Usage::ALL.map(Usage::name).join(", ");
            check.text(at, field, Usage::from_name(&at.value).ok_or_else(|| format!("it must be one of {}", known())))
        });
        let keys = self.list(&allow.keys, &field("keys"), MAX_ENTRIES, |check, at, field| {
            let known = || KeyAlgorithm::ALL.map(KeyAlgorithm::name).join(", ");
            let key = KeyAlgorithm::from_name(&at.value).ok_or_else(|| format!("it must be one of {}", known()));
            check.text(at, field, key)
        });
        Some(Allow {
            common_names: self.patterns(&allow.common_names, &field("commonNames"), Kind::Subject),
            organizations: self.patterns(&allow.organizations, &field("organizations"), Kind::Subject),
            dns_names: self.patterns(&allow.dns_names, &field("dnsNames"), Kind::Dns),
            wildcard_dns_names: self.patterns(&allow.wildcard_dns_names, &field("wildcardDnsNames"), Kind::WildcardDns),
            ip_addresses,
            uris: self.patterns(&allow.uris, &field("uris"), Kind::Uri),
            // An empty list allows none; only an absent one means the default.
            usages: if allow.usages.is_some() { usages.into_iter().collect() } else { Usages::DEFAULT },
            keys: if allow.keys.is_some() { keys } else { DEFAULT_KEYS.to_vec() },
            lifetime: self.lifetime(&allow.lifetime)?,
        })
    }

    fn lifetime(&mut self, lifetime: &Option<document::Lifetime>) -> Option<lifetime::Range> {
        let Some(given) = lifetime else {
            return self.range_of([(None, "min"), (None, "default"), (None, "max")]);
        };
        self.range_of([(given.min.as_ref(), "min"), (given.default.as_ref(), "default"), (given.max.as_ref(), "max")])
    }

    fn range_of(&mut self, given: [(Option<&Spanned<String>>, &str); 3]) -> Option<lifetime::Range> {
        let mut parsed = [None; 3];
        for ((at, name), parsed) in given.iter().zip(&mut parsed) {
            if let Some(at) = at {
                let field = format!("spec.allow.lifetime.{name}");
                *parsed = Some(self.text(at, &field, lifetime::parse(&at.value))?);
            }
        }
        let [min, default, max] = parsed;
        match lifetime::Range::new(min, default, max) {
            Ok(range) => Some(range),
            Err((name, message)) => {
                let at = given.iter().find_map(|(at, given)| at.filter(|_| *given == name));
                let at = at.or_else(|| given.iter().find_map(|(at, _)| *at))?;
                self.problem(at, &format!("spec.allow.lifetime.{name}"), message);
                None
            }
        }
    }

    fn rule(&mut self, at: &Spanned<document::Rule>, field: &str) -> Option<Rule> {
        let (expression, message) = (&at.value.expression, &at.value.message);
        let chars = message.value.chars().count();
        if chars == 0 || chars > MAX_MESSAGE_CHARS || message.value.chars().any(char::is_control) {
            let wanted = format!("it must have 1 to {MAX_MESSAGE_CHARS} printable characters");
            self.problem(message, &format!("{field}.message"), wanted);
        }
        let rule = Rule::compile(&expression.value, &message.value);
        self.text(expression, &format!("{field}.expression"), rule)
    }

    fn offer(&mut self, at: &Spanned<document::Offer>, field: &str) -> Option<Offer> {
        let offer = &at.value;
        let spiffe_field = format!("{field}.spiffeId");
        let spiffe_id = match &offer.spiffe_id {
            Some(id) if !id.value.starts_with("spiffe://") => {
                self.problem(id, &spiffe_field, "it must begin with spiffe://");
                None
            }
            Some(id) => {
                Some(self.text(id, &spiffe_field, Pattern::parse(Kind::Uri, &id.value).and_then(no_wildcard))?)
            }
            None => None,
        };
        let dns_field = format!("{field}.dnsNames");
        let dns_names = self.list(&offer.dns_names, &dns_field, MAX_ENTRIES - 1, |check, at, field| {
            check.text(at, field, Pattern::parse(Kind::Dns, &at.value).and_then(no_wildcard))
        });
        if offer.spiffe_id.is_none() && offer.dns_names.as_ref().is_none_or(Vec::is_empty) {
            self.problem(at, field, "it names nothing; it needs spiffeId or dnsNames");
        }
        let hint = offer.hint.as_ref().map_or("", |hint| hint.value.as_str());
        if hint.len() > MAX_HINT_BYTES || hint.contains(char::is_control) {
            let message = format!("it must have at most {MAX_HINT_BYTES} bytes, all printable");
            self.problem(at, &format!("{field}.hint"), message);
        }
        Some(Offer { spiffe_id, dns_names, hint: hint.to_owned() })
    }

    /// SPIFFE Workload API section 5.2.1: a hint is unique among the identities handed out together.
    fn unique_hints(&mut self, offers: &List<document::Offer>) {
        let mut seen = std::collections::BTreeSet::new();
        for (i, offer) in offers.iter().flatten().enumerate() {
            if let Some(hint) = &offer.value.hint
                && !hint.value.is_empty()
                && !seen.insert(hint.value.as_str())
            {
                self.problem(hint, &format!("spec.offer[{i}].hint"), "another offer of this policy has the same hint");
            }
        }
    }
}

/// An RFC 1123 subdomain, as Kubernetes demands of object names.
fn check_name(name: &str) -> Result<(), String> {
    let labels = name.split('.').all(|label| {
        !label.is_empty()
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    });
    match labels && name.len() <= MAX_NAME_BYTES {
        true => Ok(()),
        false => Err(format!("it must have 1 to {MAX_NAME_BYTES} bytes of a-z, 0-9, '-' and '.'")),
    }
}

fn check_signer(name: &str) -> Result<String, String> {
    if let Some((_, reason)) = REFUSED_SIGNERS.iter().find(|(refused, _)| *refused == name) {
        return Err(format!("{name} is refused: {reason}"));
    }
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._/".contains(&b);
    match !name.is_empty() && name.len() <= MAX_SIGNER_BYTES && name.bytes().all(allowed) {
        true => Ok(name.to_owned()),
        false => Err("it must be embedded, or a signer name such as csrd.dev/workload".to_owned()),
    }
}

/// The bounds of useradd(8): what a user database may hold is matched exactly, so only the size matters.
fn check_user(name: &str) -> Result<String, String> {
    const MAX_USER_BYTES: usize = 256;
    match !name.is_empty() && name.len() <= MAX_USER_BYTES && !name.contains(char::is_control) {
        true => Ok(name.to_owned()),
        false => Err(format!("it must have 1 to {MAX_USER_BYTES} bytes, all printable")),
    }
}

fn check_sha256(text: &str) -> Result<String, String> {
    match text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        true => Ok(text.to_owned()),
        false => Err("it must be 64 lower-case hexadecimal digits, as sha256sum prints them".to_owned()),
    }
}

fn parse_executable(text: &str) -> Result<Glob, String> {
    let odd = |segment: &str| segment.is_empty() || segment == "." || segment == "..";
    match text.strip_prefix('/').is_some_and(|path| !path.split('/').any(odd)) {
        true => Glob::parse(text),
        false => Err("it must be an absolute path without empty, '.' or '..' segments".to_owned()),
    }
}

fn parse_unit(text: &str) -> Result<Glob, String> {
    match text.contains('/') || text == "*" {
        true => Err("it must be a unit name such as web.service or web@*.service".to_owned()),
        false => Glob::parse(text),
    }
}

fn parse_network(text: &str) -> Result<IpNet, String> {
    let network = match text.contains('/') {
        true => {
            text.parse::<IpNet>().map_err(|_| "it must be a network such as 10.0.0.0/8 or an address".to_owned())?
        }
        false => parse_ip(text).map(IpNet::from).map_err(|error| error.to_string())?,
    };
    if network.addr() != network.network() {
        return Err(format!("it has host bits set; write {}", network.trunc()));
    }
    match network.addr() {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Err("write IPv4 addresses as IPv4".to_owned()),
        _ => Ok(network),
    }
}

fn no_wildcard(pattern: Pattern) -> Result<Pattern, String> {
    match pattern.has_wildcard() {
        true => Err("an offer must say the whole name: no '*'".to_owned()),
        false => Ok(pattern),
    }
}
