//! What a workload may have: [`decide`] turns a [`Workload`] and an [`Ask`] into a [`Grant`], or a [`Denial`] that says why.
//!
//! Deny by default. An ask is granted only if one policy allows all of it; policies never add up. `decide` is pure and
//! total: no I/O, no clock, no panic, bounded work for any input. A [`Grant`] has no constructor outside this module and
//! is made only for an attested workload, so whoever holds one holds a decision. [`explain`] reaches the same verdicts
//! for facts that nobody attested, and hands out words only.
//!
//! `document` reads YAML, `compile` checks it, `whom` matches callers, `template`, `address` and `cel` match asks, `judge`
//! compares, `view` explains, `watch` keeps policies fresh.

mod address;
mod cel;
mod check;
mod compile;
mod document;
mod fact;
mod judge;
pub mod lifetime;
pub mod schema;
mod selector;
mod signers;
mod template;
mod view;
pub mod watch;
mod whom;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

pub use cel::{MAX_COST, MAX_DEPTH, MAX_EXPRESSION_BYTES, MAX_RULE_GROUPS, MAX_RULE_LABELS};
pub use check::MAX_ENTRIES;
pub use compile::{MAX_HINT_BYTES, MAX_MESSAGE_CHARS, MAX_OFFERS, MAX_RULES};
pub use document::{API_VERSION, KIND, MAX_DOCUMENTS, MAX_SOURCE_BYTES, PLURAL, Problem, Source};
pub use fact::MAX_SERVICES;
pub use signers::{EMBEDDED, MAX_SIGNER_BYTES, MIN_REQUESTED_LIFETIME};
pub use template::MAX_PATTERN_BYTES;
pub use view::{Explanation, Verdict, View, explain, views};

use self::{
    compile::Policy,
    fact::Fact,
    judge::{Refusal, judge},
    template::Pattern,
    whom::Whom,
};
use crate::{
    attest::{Facts, Workload},
    text::printable_within,
    x509::{KeyAlgorithm, Names, Usages},
};

/// Policies in one set.
pub const MAX_POLICIES: usize = 256;
/// Bytes in a policy's name (a Kubernetes object name).
pub const MAX_NAME_BYTES: usize = 253;
/// Problems reported for one set.
pub const MAX_PROBLEMS: usize = 100;
/// Refusals kept for one policy.
pub const MAX_REFUSALS: usize = 8;
/// Bytes in a denial's text. gRPC carries it in a trailer, percent-encoded, and clients accept 8 KiB of trailers.
pub const MAX_DENIAL_BYTES: usize = 1024;
/// Characters of one value that are repeated in a sentence.
const MAX_SHOWN_CHARS: usize = 80;

/// What a caller asks for, parsed and within bounds, not yet judged.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ask {
    /// Names wanted; none means the policy's first offer.
    pub names: Names,
    /// Usages wanted.
    pub usages: Usages,
    /// Kind of the key that will be certified.
    pub key: KeyAlgorithm,
    /// Validity wanted; `None` means the policy's default.
    pub lifetime: Option<Duration>,
    /// Signer wanted; `None` means the policy's.
    pub signer: Option<String>,
    /// Policy to be judged by; `None` means any, in order of name.
    pub policy: Option<String>,
}

/// What one policy allows one workload: everything a signer needs to know, and nothing a caller can change.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Grant(Terms);

/// The content of a grant, before anybody is entitled to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Terms {
    names: Names,
    usages: Usages,
    key: KeyAlgorithm,
    lifetime: Duration,
    signer: String,
    policy: String,
}

impl Grant {
    /// Subject and SANs, exactly as the certificate must carry them.
    pub fn names(&self) -> &Names {
        &self.0.names
    }
    /// Usages, exactly.
    pub fn usages(&self) -> Usages {
        self.0.usages
    }
    /// Kind of key.
    pub fn key(&self) -> KeyAlgorithm {
        self.0.key
    }
    /// Validity from issuance; the certificate may end earlier, never later.
    pub fn lifetime(&self) -> Duration {
        self.0.lifetime
    }
    /// Name of the signer.
    pub fn signer(&self) -> &str {
        &self.0.signer
    }
    /// Name of the policy that allowed it.
    pub fn policy(&self) -> &str {
        &self.0.policy
    }
}

/// Grants made of the given terms, for tests of what stands on a decision.
#[cfg(any(test, feature = "testing"))]
impl Grant {
    /// What policy `test` with the embedded signer would have granted, decided by nobody.
    pub fn for_test(names: Names, usages: Usages, key: KeyAlgorithm, lifetime: Duration) -> Self {
        let (signer, policy) = (EMBEDDED.to_owned(), "test".to_owned());
        Self(Terms { names, usages, key, lifetime, signer, policy })
    }
}

/// The policies in force, in order of name.
#[derive(Debug, Default)]
pub struct PolicySet {
    policies: Vec<Arc<Policy>>,
}

impl PolicySet {
    /// Reads and checks all sources; `default_signer` is meant where a policy names none. One problem anywhere and there is
    /// no set, so that a mistake never opens or closes half of what its author meant.
    ///
    /// # Errors
    ///
    /// Every problem found, at most [`MAX_PROBLEMS`], each with file, line and field.
    pub fn parse(sources: &[Source], default_signer: &str) -> Result<Self, Vec<Problem>> {
        let policies = compile::compile(sources, default_signer)?;
        Ok(Self { policies: policies.into_iter().map(Arc::new).collect() })
    }

    /// One set of all these, which have different names. It takes as many as [`MAX_POLICIES`] and leaves out the rest.
    fn join<'a>(sets: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut policies: Vec<_> = sets.into_iter().flat_map(|set| &set.policies).take(MAX_POLICIES).cloned().collect();
        policies.sort_by(|a, b| a.name.cmp(&b.name));
        Self { policies }
    }

    /// Whether it holds the very same policies: equal texts read twice are two.
    fn is_same_as(&self, other: &Self) -> bool {
        self.policies.len() == other.policies.len()
            && self.policies.iter().zip(&other.policies).all(|(a, b)| Arc::ptr_eq(a, b))
    }

    /// How many policies there are.
    pub fn len(&self) -> usize {
        self.policies.len()
    }

    /// Whether there is none, so that everything is denied.
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// The signers that the policies name.
    pub fn signers(&self) -> BTreeSet<&str> {
        self.policies.iter().map(|policy| policy.signer.name()).collect()
    }

    /// Whether any policy looks at the SHA-256 of the caller's executable; otherwise nobody needs to compute it.
    pub fn needs_executable_sha256(&self) -> bool {
        let matched = |whom: &Whom| matches!(whom, Whom::Processes(unix) if unix.executable_sha256.is_some());
        self.policies.iter().any(|policy| {
            matched(&policy.whom) || policy.names(Fact::ExecutableSha256) || policy.mentions("executableSha256")
        })
    }

    /// Whether any policy looks at the Services that select a pod; otherwise nobody needs to watch them.
    pub fn needs_services(&self) -> bool {
        self.policies.iter().any(|policy| policy.names(Fact::Service) || policy.mentions("services"))
    }
}

impl Policy {
    fn names(&self, fact: Fact) -> bool {
        self.patterns().any(|pattern| pattern.uses(fact))
    }

    fn mentions(&self, field: &str) -> bool {
        self.rules.iter().any(|rule| rule.mentions(field))
    }

    fn patterns(&self) -> impl Iterator<Item = &Pattern> {
        let allow = &self.allow;
        let lists =
            [&allow.common_names, &allow.organizations, &allow.dns_names, &allow.wildcard_dns_names, &allow.uris];
        let offered = self.offers.iter().flat_map(|offer| offer.spiffe_id.iter().chain(&offer.dns_names));
        lists.into_iter().flatten().chain(offered)
    }
}

/// Why an ask was denied, for metric labels and `google.rpc.ErrorInfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    NoPolicyMatches,
    PolicyDenied,
    NameNotAllowed,
    UsageNotAllowed,
    KeyNotAllowed,
    LifetimeNotAllowed,
    SignerNotAllowed,
    RuleNotMet,
    NothingOffered,
}

/// A refusal in words: which policy, which rule, what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Denial {
    reason: Reason,
    text: String,
}

impl Denial {
    /// One of a closed set: `NO_POLICY_MATCHES`, the one thing that all matching policies refuse (`NAME_NOT_ALLOWED`,
    /// `USAGE_NOT_ALLOWED`, `KEY_NOT_ALLOWED`, `LIFETIME_NOT_ALLOWED`, `SIGNER_NOT_ALLOWED`, `RULE_NOT_MET`,
    /// `NOTHING_OFFERED`), or `POLICY_DENIED` when there are several.
    pub fn reason(&self) -> &'static str {
        match self.reason {
            Reason::NoPolicyMatches => "NO_POLICY_MATCHES",
            Reason::PolicyDenied => "POLICY_DENIED",
            Reason::NameNotAllowed => "NAME_NOT_ALLOWED",
            Reason::UsageNotAllowed => "USAGE_NOT_ALLOWED",
            Reason::KeyNotAllowed => "KEY_NOT_ALLOWED",
            Reason::LifetimeNotAllowed => "LIFETIME_NOT_ALLOWED",
            Reason::SignerNotAllowed => "SIGNER_NOT_ALLOWED",
            Reason::RuleNotMet => "RULE_NOT_MET",
            Reason::NothingOffered => "NOTHING_OFFERED",
        }
    }

    fn new(facts: &Facts, policy: Option<&str>, refused: &BTreeMap<&str, Vec<Refusal>>) -> Self {
        let text = match (policy, refused.is_empty()) {
            // An unknown policy and one for somebody else read the same.
            (Some(name), true) => format!("no policy named {} matches {facts}", shown(name)),
            (None, true) => {
                let each = if let Facts::Pod(_) = facts { "that is for its namespace" } else { "of them" };
                format!("no policy matches {facts}; csrd whoami says why for each {each}")
            }
            (_, false) => {
                let policies = refused.iter().map(|(name, refusals)| {
                    let texts: Vec<_> = refusals.iter().map(|refusal| refusal.text.as_str()).collect();
                    format!("policy {name}: {}", texts.join("; "))
                });
                policies.collect::<Vec<_>>().join(" | ")
            }
        };
        let mut reasons = refused.values().flatten().map(|refusal| refusal.reason);
        let reason = match reasons.next() {
            None => Reason::NoPolicyMatches,
            Some(first) if reasons.all(|reason| reason == first) => first,
            Some(_) => Reason::PolicyDenied,
        };
        Self { reason, text: printable_within(&text, MAX_DENIAL_BYTES) }
    }
}

/// Decides. Policies are tried in order of name; the first that allows all of the ask grants it.
///
/// # Errors
///
/// What each policy that matches the workload has against the ask.
pub fn decide(policies: &PolicySet, workload: &Workload, ask: &Ask) -> Result<Grant, Denial> {
    let facts = workload.facts();
    let mut refused = BTreeMap::new();
    for policy in candidates(policies, ask) {
        if policy.whom.mismatch(facts).is_some() {
            continue;
        }
        match judge(policy, facts, ask) {
            Ok(terms) => return Ok(Grant(terms)),
            Err(refusals) => {
                refused.insert(policy.name.as_str(), refusals);
            }
        }
    }
    Err(Denial::new(facts, ask.policy.as_deref(), &refused))
}

fn candidates<'a>(policies: &'a PolicySet, ask: &Ask) -> impl Iterator<Item = &'a Policy> {
    policies
        .policies
        .iter()
        .map(Arc::as_ref)
        .filter(move |policy| ask.policy.as_ref().is_none_or(|name| *name == policy.name))
}

/// A certificate that a policy hands out unasked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// What it is to contain, granted.
    pub grant: Grant,
    /// The operator's hint to a workload with several identities (SPIFFE Workload API section 5.2.1); unique among the
    /// offers of one call, may be empty.
    pub hint: String,
}

impl Offer {
    /// The ask to which the policy that offers it, and no other, says the same as to the offer.
    pub fn ask(&self) -> Ask {
        let Terms { names, usages, key, policy, .. } = &self.grant.0;
        let names = names.clone();
        Ask { names, usages: *usages, key: *key, lifetime: None, signer: None, policy: Some(policy.clone()) }
    }
}

/// Everything the policies hand out to `workload` unasked, in order of policy name and then as written. An offer whose
/// facts are absent or which the policy itself refuses is left out; [`views`] says so.
pub fn offers(policies: &PolicySet, workload: &Workload) -> Vec<Offer> {
    let facts = workload.facts();
    let mut hints = BTreeSet::new();
    let mut offers = Vec::new();
    for policy in policies.policies.iter().filter(|policy| policy.whom.mismatch(facts).is_none()) {
        for offer in &policy.offers {
            let granted =
                judge::ask_of_offer(policy, offer, facts).ok().and_then(|ask| judge(policy, facts, &ask).ok());
            if let Some(terms) = granted {
                // Two policies may use the same hint; the first keeps it, so that the response stays valid.
                let unique = hints.insert(offer.hint.as_str());
                let hint = if unique { offer.hint.clone() } else { String::new() };
                offers.push(Offer { grant: Grant(terms), hint });
            }
        }
    }
    offers
}

/// Why [`offers`] has nothing for `workload`, or nothing with a SPIFFE ID: what becomes of each offer of each policy that
/// matches.
pub fn nothing_offered(policies: &PolicySet, workload: &Workload) -> Denial {
    let facts = workload.facts();
    let nothing = |text: String| vec![Refusal { reason: Reason::NothingOffered, text }];
    let mut refused = BTreeMap::new();
    for policy in policies.policies.iter().filter(|policy| policy.whom.mismatch(facts).is_none()) {
        let against = |offer| match judge::ask_of_offer(policy, offer, facts) {
            Err(why) => nothing(format!("an offer is void: {why}")),
            Ok(ask) => match judge(policy, facts, &ask) {
                Err(refusals) => refusals,
                Ok(_) => nothing("an offer has no spiffeId".to_owned()),
            },
        };
        let mut refusals: Vec<_> = policy.offers.iter().flat_map(against).collect();
        if refusals.is_empty() {
            refusals = nothing("it offers nothing unasked".to_owned());
        }
        refused.insert(policy.name.as_str(), refusals);
    }
    Denial::new(facts, None, &refused)
}

/// Whether `name` is an RFC 1123 subdomain, as Kubernetes demands of most objects' names.
pub fn is_object_name(name: &str) -> bool {
    let is_label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= MAX_NAME_BYTES && name.split('.').all(is_label)
}

/// Foreign text made safe to show: quoted, control characters escaped, cut short.
fn shown(text: &str) -> String {
    format!("{:?}", clipped(text.to_owned(), MAX_SHOWN_CHARS))
}

fn clipped(text: String, max_chars: usize) -> String {
    match text.char_indices().nth(max_chars) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::attest::{PodFacts, UnixFacts};
    use crate::x509::{DnsName, Usage, name::parse_ip};

    /// A policy named `name` for uid 1000; `spec` lines are indented by two spaces.
    fn policy(name: &str, spec: &str) -> String {
        format!(
            "apiVersion: csrd.dev/v1alpha1\nkind: CertificatePolicy\nmetadata: {{name: {name}}}\nspec:\n  \
             match: {{unix: {{uids: [1000]}}}}\n{spec}\n---\n"
        )
    }

    fn parse(text: &str) -> Result<PolicySet, String> {
        let source = Source { origin: "p.yaml".to_owned(), text: text.to_owned() };
        let lines = |problems: Vec<Problem>| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        PolicySet::parse(&[source], EMBEDDED).map_err(lines)
    }

    fn set(text: &str) -> PolicySet {
        parse(text).unwrap_or_else(|problems| panic!("{problems}\n{text}"))
    }

    fn facts() -> UnixFacts {
        UnixFacts {
            uid: 1000,
            owner: 1000,
            gid: 100,
            supplementary_gids: vec![33],
            user: Some("web".to_owned()),
            group: None,
            executable: Some("/usr/bin/web".to_owned()),
            executable_sha256: None,
            systemd_unit: Some("web@1.service".to_owned()),
            cgroup: None,
        }
    }

    fn web() -> Workload {
        Workload::for_test(facts())
    }

    /// An ask for names given as `cn=`, `o=`, `dns=`, `ip=` and `uri=` words.
    fn ask(words: &str) -> Ask {
        let mut names = Names::default();
        for word in words.split_whitespace() {
            match word.split_once('=').unwrap() {
                ("cn", value) => names.common_name = Some(value.to_owned()),
                ("o", value) => names.organizations.push(value.to_owned()),
                ("dns", value) => names.dns.push(DnsName::parse(value).unwrap()),
                ("ip", value) => names.ips.push(parse_ip(value).unwrap()),
                ("uri", value) => names.uris.push(value.to_owned()),
                (kind, _) => panic!("{kind}"),
            }
        }
        let key = KeyAlgorithm::EcdsaP256;
        Ask { names, usages: Usages::DEFAULT, key, lifetime: None, signer: None, policy: None }
    }

    fn granted(policies: &PolicySet, ask: &Ask) -> Grant {
        decide(policies, &web(), ask).unwrap_or_else(|denial| panic!("{denial}\n{ask:?}"))
    }

    fn denied(policies: &PolicySet, ask: &Ask, reason: &str) -> String {
        let denial = decide(policies, &web(), ask).map(|grant| panic!("{grant:?}")).unwrap_err();
        assert_eq!(denial.reason(), reason, "{denial}");
        denial.to_string()
    }

    const ALLOW: &str = "
  allow:
    commonNames: ['{unix.user}.example.org']
    organizations: [Example, 'Group {unix.group}']
    dnsNames: [web.example.org, '*.web.example.org', '{unix.user}.example.org']
    wildcardDnsNames: ['*.apps.example.org']
    ipAddresses: [10.0.0.0/8, 127.0.0.1, '2001:db8::/32']
    uris: ['spiffe://example.org/host/{unix.uid}', 'https://example.org/*']
    lifetime: {min: 10m, default: 1h, max: 24h}";

    #[test]
    fn each_kind_of_name_is_judged_by_its_own_list() {
        let policies = set(&policy("web", ALLOW));
        for words in [
            "cn=web.example.org",
            "o=Example dns=web.example.org",
            "dns=web.example.org dns=a.web.example.org",
            "dns=*.apps.example.org",
            "ip=10.255.0.1 ip=127.0.0.1 ip=2001:db8::1",
            "uri=spiffe://example.org/host/1000",
            "uri=https://example.org/a",
        ] {
            let ask = ask(words);
            let grant = granted(&policies, &ask);
            assert_eq!((grant.names(), grant.policy(), grant.signer()), (&ask.names, "web", "embedded"));
            assert_eq!((grant.usages(), grant.key()), (ask.usages, ask.key));
            assert_eq!(grant.lifetime(), Duration::from_secs(3600));
        }
        for words in [
            "cn=db.example.org",
            "cn=web.example.org o=Other",
            "o=Group",
            "dns=db.example.org",
            "dns=web.example.org dns=db.example.org",
            "dns=a.b.web.example.org",
            "dns=*.web.example.org",
            "dns=a.apps.example.org",
            "ip=11.0.0.1",
            "ip=127.0.0.2",
            "ip=2001:db9::1",
            "uri=spiffe://example.org/host/1001",
            "uri=spiffe://example.org/host/1000/x",
            "uri=https://example.org/a/b",
            "uri=https://example.org/..",
        ] {
            denied(&policies, &ask(words), "NAME_NOT_ALLOWED");
        }
    }

    #[test]
    fn what_is_absent_from_allow_is_not_allowed() {
        let policies = set(&policy("web", ""));
        for words in ["cn=a", "o=a", "dns=a", "ip=127.0.0.1", "uri=spiffe://a/b", "dns=*.a.b"] {
            denied(&policies, &ask(words), "NAME_NOT_ALLOWED");
        }
        denied(&PolicySet::default(), &ask("dns=a"), "NO_POLICY_MATCHES");
    }

    #[test]
    fn usages_keys_lifetime_and_signer_are_judged() {
        let policies = set(&policy("web", "  allow: {dnsNames: [a], lifetime: {min: 10m, max: 2h}}"));
        let ask = ask("dns=a");
        let with = |change: fn(&mut Ask)| {
            let mut ask = ask.clone();
            change(&mut ask);
            ask
        };
        for key in [KeyAlgorithm::EcdsaP384, KeyAlgorithm::Ed25519] {
            assert_eq!(granted(&policies, &Ask { key, ..ask.clone() }).key(), key);
        }
        granted(&policies, &with(|ask| ask.lifetime = Some(Duration::from_secs(600))));
        granted(&policies, &with(|ask| ask.lifetime = Some(Duration::from_secs(7200))));
        granted(&policies, &with(|ask| ask.signer = Some("embedded".to_owned())));
        granted(&policies, &with(|ask| ask.usages = Usages::empty().with(Usage::ClientAuth)));
        denied(&policies, &with(|ask| ask.key = KeyAlgorithm::Rsa2048), "KEY_NOT_ALLOWED");
        denied(&policies, &with(|ask| ask.lifetime = Some(Duration::from_secs(599))), "LIFETIME_NOT_ALLOWED");
        denied(&policies, &with(|ask| ask.lifetime = Some(Duration::from_secs(7201))), "LIFETIME_NOT_ALLOWED");
        denied(&policies, &with(|ask| ask.signer = Some("a.b/c".to_owned())), "SIGNER_NOT_ALLOWED");
        denied(&policies, &with(|ask| ask.usages = Usages::empty()), "USAGE_NOT_ALLOWED");
        let encipher = with(|ask| ask.usages = Usages::DEFAULT.with(Usage::KeyEncipherment));
        denied(&policies, &encipher, "USAGE_NOT_ALLOWED");
        let rsa = "  allow: {dnsNames: [a], keys: [rsa-2048, ecdsa-p256], usages: [digital signature, key encipherment,
            server auth, client auth]}";
        let policies = set(&policy("web", rsa));
        granted(&policies, &Ask { key: KeyAlgorithm::Rsa2048, ..encipher.clone() });
        let why = denied(&policies, &encipher, "USAGE_NOT_ALLOWED");
        assert_eq!(why, "policy web: usages: key encipherment needs an RSA key, not ecdsa-p256");
    }

    #[test]
    fn one_policy_must_allow_all_of_it_and_the_first_by_name_wins() {
        let policies = set(&[
            policy("b", "  signer: b.example.org/b\n  allow: {dnsNames: [b, ab]}"),
            policy("a", "  allow: {dnsNames: [a, ab]}"),
        ]
        .concat());
        assert_eq!(granted(&policies, &ask("dns=a")).policy(), "a");
        assert_eq!(granted(&policies, &ask("dns=ab")).policy(), "a");
        assert_eq!(granted(&policies, &ask("dns=b")).signer(), "b.example.org/b");
        assert_eq!(granted(&policies, &Ask { policy: Some("b".to_owned()), ..ask("dns=ab") }).policy(), "b");
        denied(&policies, &ask("dns=a dns=b"), "NAME_NOT_ALLOWED");
        let other = Ask { policy: Some("a".to_owned()), ..ask("dns=b") };
        assert!(!denied(&policies, &other, "NAME_NOT_ALLOWED").contains("policy b"));
        assert_eq!(policies.signers(), BTreeSet::from(["b.example.org/b", "embedded"]));
        assert_eq!((policies.len(), policies.is_empty()), (2, false));
    }

    #[test]
    fn every_clause_of_a_match_must_hold() {
        let matches = |clauses: &str| {
            let text = policy("web", "  allow: {dnsNames: [a]}").replace("uids: [1000]", clauses);
            decide(&set(&text), &web(), &ask("dns=a")).is_ok()
        };
        for clauses in [
            "uids: [7, 1000]",
            "users: [web]",
            "gids: [100]",
            "gids: [33]",
            "systemdUnits: ['web@*.service']",
            "uids: [1000], executables: [/usr/bin/web]",
            "uids: [1000], executables: [/bin/x, '/usr/*/web']",
            "uids: [1000], users: [web], gids: [33], executables: ['/usr/bin/*'], systemdUnits: [web@1.service]",
        ] {
            assert!(matches(clauses), "{clauses}");
        }
        let zeros = format!("uids: [1000], executableSha256: ['{}']", "0".repeat(64));
        for clauses in [
            "uids: [7]",
            "users: [db]",
            "gids: [1000]",
            "systemdUnits: [web.service]",
            "uids: [1000], executables: [/usr/bin]",
            "uids: [1000], executables: ['/*/web']",
            "uids: [1000], users: [db]",
            &zeros,
        ] {
            assert!(!matches(clauses), "{clauses}");
        }
    }

    const OFFERS: &str = "
  allow: {usages: [digital signature, client auth], keys: [ed25519]}
  offer:
  - {spiffeId: 'spiffe://example.org/user/{unix.user}', dnsNames: ['{unix.user}.example.org'], hint: internal}
  - {dnsNames: ['{unix.group}.example.org']}
  - {spiffeId: 'spiffe://example.org/other'}";

    #[test]
    fn offers_are_granted_unasked_and_allowed_when_asked() {
        let policies = set(&[policy("a", OFFERS), policy("b", &OFFERS.replace("org/user", "org/b"))].concat());
        let offers = offers(&policies, &web());
        let summary: Vec<_> = offers
            .iter()
            .map(|offer| (offer.grant.policy(), offer.grant.names().to_strings().join(" "), offer.hint.as_str()))
            .collect();
        assert_eq!(
            summary,
            [
                ("a", "web.example.org spiffe://example.org/user/web".to_owned(), "internal"),
                ("a", "spiffe://example.org/other".to_owned(), ""),
                ("b", "web.example.org spiffe://example.org/b/web".to_owned(), ""),
                ("b", "spiffe://example.org/other".to_owned(), ""),
            ]
        );
        assert_eq!(offers[0].grant.key(), KeyAlgorithm::Ed25519);
        assert_eq!(offers[0].grant.usages().to_string(), "digital signature, client auth");
        let client = Usages::empty().with(Usage::ClientAuth);
        let unasked = Ask { key: KeyAlgorithm::Ed25519, usages: client, ..ask("") };
        assert_eq!(granted(&policies, &unasked).names(), offers[0].grant.names());
        let asked = Ask { names: ask("uri=spiffe://example.org/other").names, ..unasked.clone() };
        granted(&policies, &asked);
        // The rest of the ask is judged all the same.
        denied(&policies, &ask(""), "POLICY_DENIED");
        denied(&policies, &Ask { names: ask("uri=spiffe://example.org/user/db").names, ..unasked }, "NAME_NOT_ALLOWED");
        assert_eq!(super::offers(&policies, &Workload::of_uid(7)), []);
    }

    #[test]
    fn a_policy_without_a_usable_first_offer_offers_nothing() {
        let why = |offer: &str| denied(&set(&policy("web", offer)), &ask(""), "NOTHING_OFFERED");
        assert_eq!(why(""), "policy web: it offers nothing unasked; say which names you need");
        let absent = why("  offer: [{dnsNames: ['{unix.group}.example.org']}, {dnsNames: [a]}]");
        assert_eq!(absent, "policy web: its first offer is void: the caller has no unix.group");
        // 63 bytes in each of three labels and 5 in the slot's: 254 with the fact, one too many.
        let long = ["a", "b", "c"].map(|label| label.repeat(63)).join(".");
        let long = format!("  offer: [{{dnsNames: ['{}{{unix.uid}}.{long}']}}]", "x".repeat(58));
        assert_eq!(why(&long), "policy web: its first offer is void: a name is too long");
        assert_eq!(offers(&set(&policy("web", &long)), &web()), []);
        let policies = set(&[policy("a", ""), policy("b", "  offer: [{dnsNames: [b]}]")].concat());
        assert_eq!(granted(&policies, &ask("")).policy(), "b");
    }

    #[test]
    fn denials_say_which_policy_refused_what() {
        let rules = "  rules: [{expression: 'size(request.dnsNames) <= 1', message: at most one DNS name}]\n";
        let policies = set(&[
            policy(
                "web",
                &ALLOW.replace("'{unix.user}.example.org']\n    wild", "'{unix.group}.example.org']\n    wild"),
            ),
            policy("small", &format!("{rules}  allow: {{dnsNames: ['*']}}").replace("'*'", "'*.org'")),
            policy("db", "  allow: {dnsNames: [secret]}").replace("1000", "70"),
        ]
        .concat());
        let text = denied(&policies, &ask("dns=db.example.org o=Evil ip=8.8.8.8"), "NAME_NOT_ALLOWED");
        insta::assert_snapshot!(text, @r#"policy small: organizations: "Evil" is refused, it allows none; dnsNames: "db.example.org" is refused, it matches none of its entries; ipAddresses: 8.8.8.8 is in none of its networks | policy web: organizations: "Evil" is refused, it matches none of its entries ("Group {unix.group}" grants nothing: the caller has no unix.group); dnsNames: "db.example.org" is refused, it matches none of its entries ("{unix.group}.example.org" grants nothing: the caller has no unix.group); ipAddresses: 8.8.8.8 is in none of its networks"#);
        let small = Ask { policy: Some("small".to_owned()), ..ask("dns=a.org dns=b.org") };
        insta::assert_snapshot!(denied(&policies, &small, "RULE_NOT_MET"), @"policy small: rule not met: at most one DNS name");
        let mut several = ask("dns=a.b.org");
        several.key = KeyAlgorithm::Rsa4096;
        several.usages = Usages::empty().with(Usage::KeyEncipherment);
        several.lifetime = Some(Duration::from_secs(90_000));
        several.signer = Some("x".to_owned());
        several.policy = Some("small".to_owned());
        insta::assert_snapshot!(denied(&policies, &several, "POLICY_DENIED"), @r#"policy small: dnsNames: "a.b.org" is refused, it matches none of its entries; usages: key encipherment not among its usages; key rsa-4096 is not among its keys; lifetime 25h is more than its max, 24h; signer "x" is not its signer"#);
    }

    #[test]
    fn a_policy_of_somebody_else_reads_like_none() {
        let policies = set(&policy("db", "").replace("1000", "70"));
        let named =
            |name: &str| denied(&policies, &Ask { policy: Some(name.to_owned()), ..ask("") }, "NO_POLICY_MATCHES");
        assert_eq!(named("db"), r#"no policy named "db" matches uid 1000 (web) /usr/bin/web"#);
        assert_eq!(named("none"), r#"no policy named "none" matches uid 1000 (web) /usr/bin/web"#);
        let text = denied(&policies, &ask("dns=a"), "NO_POLICY_MATCHES");
        assert_eq!(text, "no policy matches uid 1000 (web) /usr/bin/web; csrd whoami says why for each of them");
    }

    #[test]
    fn a_denial_is_bounded_and_printable() {
        let many: String = (0..20).map(|i| policy(&format!("p{i}"), "")).collect();
        let text = denied(&set(&many), &ask("dns=a.b.c.d dns=b.c uri=https://a/b%0a"), "NAME_NOT_ALLOWED");
        assert_eq!((text.len(), text.chars().last()), (MAX_DENIAL_BYTES, Some('…')));
        let hostile = Workload::for_test(UnixFacts { executable: Some("/tmp/\n\u{1b}[31m".to_owned()), ..facts() });
        let text = decide(&PolicySet::default(), &hostile, &ask("dns=a")).unwrap_err().to_string();
        assert!(!text.contains(char::is_control), "{text:?}");
    }

    #[test]
    fn what_is_said_is_cut_one_past_its_bound() {
        let text = |chars| "\u{e9}".repeat(chars);
        assert_eq!(shown(&text(MAX_SHOWN_CHARS)), format!("{:?}", text(MAX_SHOWN_CHARS)));
        assert_eq!(shown(&text(MAX_SHOWN_CHARS + 1)), format!("\"{}…\"", text(MAX_SHOWN_CHARS)));
        let denial = |bytes| printable_within(&"a".repeat(bytes), MAX_DENIAL_BYTES);
        assert_eq!(denial(MAX_DENIAL_BYTES), "a".repeat(MAX_DENIAL_BYTES));
        assert_eq!(denial(MAX_DENIAL_BYTES + 1), "a".repeat(MAX_DENIAL_BYTES - "…".len()) + "…");
        let policies = set(&policy("p", ""));
        for names in [MAX_REFUSALS, MAX_REFUSALS + 1] {
            let names: String = (0..names).map(|n| format!("dns=n{n} ")).collect();
            let text = denied(&policies, &ask(&names), "NAME_NOT_ALLOWED");
            assert_eq!(text.matches("dnsNames: ").count(), MAX_REFUSALS, "{text}");
        }
    }

    #[test]
    fn to_the_ask_of_an_offer_its_own_policy_says_what_it_offers() {
        // The first policy would allow the same names, with another lifetime.
        let first = policy("a", "  allow: {uris: ['spiffe://example.org/*'], lifetime: {default: 2h, max: 24h}}");
        let policies = set(&(first + &policy("b", "  offer: [{spiffeId: 'spiffe://example.org/web'}]")));
        for offer in offers(&policies, &web()) {
            assert_eq!(granted(&policies, &offer.ask()), offer.grant);
        }
        assert_eq!(granted(&policies, &ask("uri=spiffe://example.org/web")).policy(), "a");
    }

    #[test]
    fn a_view_tells_the_caller_its_own_part() {
        let web = policy("web", &(ALLOW.to_owned() + "\n" + &OFFERS[OFFERS.find("  offer").unwrap()..]));
        let ruled = policy("ruled", "  rules: [{expression: 'false', message: never}]\n  offer: [{dnsNames: [a]}]");
        let views = views(&set(&[web, ruled, policy("db", "").replace("1000", "70")].concat()), &self::web());
        let lines = views.iter().flat_map(|view| {
            let head = format!("{} {} {}", view.policy, view.matches, view.mismatch);
            let grants = view.grants.iter().map(|line| format!("  grants {line}"));
            let offers = view.offers.iter().map(|line| format!("  offers {line}"));
            std::iter::once(head).chain(grants).chain(offers).collect::<Vec<_>>()
        });
        insta::assert_snapshot!(lines.collect::<Vec<_>>().join("\n"), @r#"
        db false uid 1000 is not among its uids
        ruled true 
          grants usages: digital signature, server auth, client auth
          grants keys: ecdsa-p256, ecdsa-p384, ed25519
          grants lifetime: 5m to 24h, 1h unless asked
          grants signer: embedded
          grants rules: never
          offers a: refused: rule not met: never
        web true 
          grants common names: web.example.org
          grants organizations: Example, Group {unix.group} (grants nothing: the caller has no unix.group)
          grants DNS names: web.example.org, *.web.example.org, web.example.org
          grants wildcard DNS names: *.apps.example.org
          grants URIs: spiffe://example.org/host/1000, https://example.org/*
          grants IP addresses: 10.0.0.0/8, 127.0.0.1/32, 2001:db8::/32
          grants usages: digital signature, server auth, client auth
          grants keys: ecdsa-p256, ecdsa-p384, ed25519
          grants lifetime: 10m to 24h, 1h unless asked
          grants signer: embedded
          offers web.example.org, spiffe://example.org/user/web (hint internal)
          offers void: the caller has no unix.group
          offers spiffe://example.org/other
        "#);
    }

    #[test]
    fn a_mismatch_names_the_first_clause_and_the_callers_fact() {
        let mismatch = |clauses: &str| {
            let text = policy("web", "").replace("uids: [1000]", clauses);
            views(&set(&text), &web()).remove(0).mismatch
        };
        let zeros = format!("uids: [1000], executableSha256: ['{}']", "0".repeat(64));
        for (clauses, expected) in [
            ("uids: [7], users: [db]", "uid 1000 is not among its uids"),
            ("users: [db]", "user \"web\" is not among its users"),
            ("gids: [7]", "neither gid 100 nor a supplementary group is among its gids"),
            ("gids: [33], executables: [/x]", "executable \"/usr/bin/web\" is not among its executables"),
            ("systemdUnits: [x]", "systemd unit \"web@1.service\" is not among its systemdUnits"),
            (&zeros, "it asks for executableSha256, and the caller has no known executable SHA-256"),
        ] {
            assert_eq!(mismatch(clauses), expected);
        }
    }

    #[test]
    fn of_policies_for_other_namespaces_a_pod_hears_nothing() {
        let of = |name: &str, clauses: &str| of_pods(name, "").replace("namespaces: [production]", clauses);
        let policies = set(&[
            of("account", "namespaces: [production], serviceAccounts: [db]"),
            of("bank", "namespaces: [bank]"),
            of("everywhere", "namespaceSelector: {}, podSelector: {matchLabels: {app: db}}"),
            of("gold", "namespaces: [production], namespaceSelector: {matchLabels: {tenant: gold}}"),
        ]
        .concat());
        let seen = |workload| views(&policies, workload).into_iter().map(|view| view.policy).collect::<Vec<_>>();
        let mine = Workload::of_pod(PodFacts { namespace_labels: BTreeMap::new(), ..pod() });
        assert_eq!(seen(&mine), ["account", "everywhere"]);
        assert_eq!(seen(&web()), [""; 0], "a process is in no namespace");
    }

    /// A policy named `name` for pods of namespace `production`; `spec` lines are indented by two spaces.
    fn of_pods(name: &str, spec: &str) -> String {
        policy(name, spec).replace("unix: {uids: [1000]}", "kubernetes: {namespaces: [production]}")
    }

    fn pod() -> PodFacts {
        PodFacts {
            namespace: "production".to_owned(),
            name: "web-0".to_owned(),
            uid: "7f5a4c3e".to_owned(),
            service_account: "web".to_owned(),
            node: "node1".to_owned(),
            labels: [("app".to_owned(), "web".to_owned())].into(),
            namespace_labels: BTreeMap::new(),
            ips: vec!["10.0.0.7".parse().unwrap()],
            services: ["web".to_owned(), "web-api".to_owned()].into(),
        }
    }

    const OF_PODS: &str = "
  allow:
    dnsNames: ['{kubernetes.service}.{kubernetes.namespace}.svc', '{kubernetes.service}.{kubernetes.namespace}.svc.cluster.local']
    ipAddresses: ['{kubernetes.podIP}', 192.0.2.0/24]
  rules: [{expression: 'workload.kubernetes.labels.app == \"web\"', message: only app web}]
  offer:
  - spiffeId: spiffe://example.org/ns/{kubernetes.namespace}/sa/{kubernetes.serviceAccount}
    dnsNames: ['{kubernetes.service}.{kubernetes.namespace}.svc']";

    #[test]
    fn a_pod_gets_the_names_that_are_proven_to_be_its_own() {
        let policies = set(&of_pods("web", OF_PODS));
        let decide = |pod: PodFacts, words: &str| decide(&policies, &Workload::of_pod(pod), &ask(words));
        for words in [
            "dns=web-api.production.svc dns=web-api.production.svc.cluster.local",
            "dns=web.production.svc ip=10.0.0.7 ip=192.0.2.1",
            "uri=spiffe://example.org/ns/production/sa/web",
        ] {
            assert_eq!(decide(pod(), words).unwrap().names(), &ask(words).names);
        }
        let why = |pod: PodFacts, words: &str| decide(pod, words).unwrap_err().to_string();
        let expected = r#"policy web: dnsNames: "db.production.svc" is refused, it matches none of its entries"#;
        assert_eq!(why(pod(), "dns=db.production.svc"), expected);
        let expected = "policy web: ipAddresses: 10.0.0.8 is in none of its networks and is not the pod's own";
        assert_eq!(why(pod(), "ip=10.0.0.8"), expected);
        let alone = PodFacts { services: BTreeSet::new(), ..pod() };
        assert!(why(alone, "dns=web.production.svc").ends_with("grants nothing: no Service selects the caller)"));
        let other = PodFacts { labels: BTreeMap::new(), ..pod() };
        assert!(why(other, "dns=web.production.svc").contains("cannot be evaluated: No such key: app"));
        let elsewhere = PodFacts { namespace: "test".to_owned(), ..pod() };
        let expected = "no policy matches pod test/web-0 (ServiceAccount web); csrd whoami says why for each that is for its namespace";
        assert_eq!(why(elsewhere, "dns=web.test.svc"), expected);
        denied(&policies, &ask("dns=web.production.svc"), "NO_POLICY_MATCHES");
    }

    #[test]
    fn an_offer_to_a_pod_has_a_name_for_each_service() {
        let policies = set(&of_pods("web", OF_PODS));
        let names = |pod: PodFacts| {
            let offers = offers(&policies, &Workload::of_pod(pod));
            offers.into_iter().map(|offer| offer.grant.names().to_strings().join(" ")).collect::<Vec<_>>()
        };
        let id = "spiffe://example.org/ns/production/sa/web";
        assert_eq!(names(pod()), [format!("web.production.svc web-api.production.svc {id}")]);
        assert_eq!(names(PodFacts { services: BTreeSet::new(), ..pod() }), [id]);
        let service_only = "  offer: [{dnsNames: ['{kubernetes.service}.{kubernetes.namespace}.svc']}]";
        let policies = set(&of_pods("web", service_only));
        let offered = |services: usize| {
            let services = (0..services).map(|i| format!("s{i}")).collect();
            let unasked = decide(&policies, &Workload::of_pod(PodFacts { services, ..pod() }), &ask(""));
            unasked.map(|grant| grant.names().dns.len()).map_err(|denial| denial.to_string())
        };
        assert_eq!(offered(MAX_SERVICES), Ok(MAX_SERVICES));
        let why = "policy web: its first offer is void: 65 Services select the caller, and at most 64 are taken";
        assert_eq!(offered(MAX_SERVICES + 1).unwrap_err(), why);
        assert_eq!(offered(0).unwrap_err(), "policy web: its first offer is void: no Service selects the caller");
        let twice = service_only.replace("svc'", "svc', '{kubernetes.service}.local'");
        let many = PodFacts { services: (0..MAX_SERVICES).map(|i| format!("s{i}")).collect(), ..pod() };
        let why = decide(&set(&of_pods("web", &twice)), &Workload::of_pod(many), &ask("")).unwrap_err().to_string();
        assert!(why.contains("its first offer is void: ") && why.contains("subject alternative names"), "{why}");
    }

    #[test]
    fn a_policy_says_nothing_of_other_callers_facts() {
        let problem = |spec: &str| parse(&of_pods("web", spec)).unwrap_err();
        for (spec, words) in [
            ("  allow: {dnsNames: ['{unix.user}.org']}", "have no fact named \"unix.user\""),
            ("  offer: [{spiffeId: 'spiffe://a/{kubernetes.service}'}]", "a certificate has one SPIFFE ID"),
            ("  rules: [{expression: workload.unix.uid == 0, message: m}]", "workload has no field \"unix\""),
            ("  allow: {ipAddresses: ['{kubernetes.service}']}", "the one slot here is {kubernetes.podIP}"),
        ] {
            let problem = problem(spec);
            assert!(problem.contains(words), "{problem}");
        }
    }

    #[test]
    fn services_are_needed_only_when_a_policy_looks_at_them() {
        let needs = |spec: &str| set(&of_pods("web", spec)).needs_services();
        assert!(!needs("  allow: {dnsNames: ['{kubernetes.pod}.org'], ipAddresses: ['{kubernetes.podIP}']}"));
        assert!(needs("  allow: {dnsNames: ['{kubernetes.service}.org']}"));
        assert!(needs("  offer: [{dnsNames: ['{kubernetes.service}.org']}]"));
        assert!(needs("  rules: [{expression: 'size(workload.kubernetes.services) > 0', message: m}]"));
    }

    #[test]
    fn the_signer_of_a_policy_that_names_none_is_its_readers() {
        let source = |text| Source { origin: "p.yaml".to_owned(), text };
        let signers = |signer: &str| {
            let set = PolicySet::parse(&[source(policy("web", ""))], signer).unwrap();
            set.signers().into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(signers(EMBEDDED), [EMBEDDED]);
        assert_eq!(signers("csrd.dev/workload"), ["csrd.dev/workload"]);
    }

    #[test]
    fn a_user_of_the_api_server_is_never_a_part_of_kubernetes() {
        let spec =
            "  signer: kubernetes.io/kube-apiserver-client\n  allow: {commonNames: [dev], organizations: [dev-team]}";
        let policies = set(&policy("dev", spec));
        let usages = Usages::empty().with(Usage::ClientAuth);
        let with = |words: &str| Ask { usages, ..ask(words) };
        assert_eq!(granted(&policies, &with("cn=dev o=dev-team")).signer(), "kubernetes.io/kube-apiserver-client");
        for words in ["cn=dev o=system:masters", "cn=system:admin", "cn=dev o=dev-team o=system:nodes"] {
            let why = denied(&policies, &with(words), "NAME_NOT_ALLOWED");
            assert!(why.contains("names that begin with system: belong to Kubernetes itself"), "{why}");
        }
        let usages = Usages::empty().with(Usage::DigitalSignature);
        let why = denied(&policies, &Ask { usages, ..ask("cn=dev") }, "USAGE_NOT_ALLOWED");
        assert_eq!(why, "policy dev: usages: kubernetes.io/kube-apiserver-client signs nothing without client auth");
        denied(&policies, &ask("cn=dev"), "USAGE_NOT_ALLOWED");
        let short = Ask {
            usages: Usages::empty().with(Usage::ClientAuth),
            lifetime: Some(Duration::from_secs(599)),
            ..ask("cn=dev")
        };
        denied(&policies, &short, "LIFETIME_NOT_ALLOWED");
    }

    #[test]
    fn the_examples_do_what_they_say() {
        let examples = [
            include_str!("../deploy/policies/10-web.yaml").to_owned(),
            "---\n".to_owned(),
            include_str!("../deploy/policies/20-identity.yaml").to_owned(),
        ];
        let policies = set(&examples.concat());
        let grant = granted(&policies, &ask("cn=web.example.org dns=web.example.org dns=a.web.example.org"));
        assert_eq!(grant.policy(), "web");
        denied(&policies, &ask("dns=a.web.example.org dns=b.web.example.org dns=c.web.example.org"), "POLICY_DENIED");
        assert_eq!(granted(&policies, &ask("")).names().uris, ["spiffe://example.org/user/web"]);
    }

    #[test]
    fn the_examples_of_the_readme_are_valid() {
        let blocks =
            include_str!("../README.md").split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
        let policies: Vec<_> = blocks.filter(|block| block.starts_with("apiVersion: csrd.dev/")).collect();
        assert_eq!(set(&policies.join("---\n")).len(), 2);
    }

    #[test]
    fn the_hash_of_an_executable_is_needed_only_when_a_policy_looks_at_it() {
        let needs = |spec: &str| set(&policy("web", spec)).needs_executable_sha256();
        assert!(!needs(ALLOW));
        assert!(needs("  allow: {uris: ['https://a/{unix.executableSha256}']}"));
        assert!(needs("  offer: [{spiffeId: 'spiffe://a/{unix.executableSha256}'}]"));
        assert!(needs("  rules: [{expression: 'has(workload.unix.executableSha256)', message: m}]"));
        let clause = format!("uids: [1000], executableSha256: ['{}']", "0".repeat(64));
        assert!(set(&policy("web", "").replace("uids: [1000]", &clause)).needs_executable_sha256());
    }

    fn any_ask() -> impl Strategy<Value = Ask> {
        let dns =
            proptest::sample::select(vec!["a", "web.example.org", "x.web.example.org", "*.a.b", "web.x", "b.org"]);
        let uri = prop_oneof![
            proptest::sample::select(vec!["spiffe://e/1000", "spiffe://e/x", "https://e/web"]).prop_map(str::to_owned),
            any::<String>(),
        ];
        let subject = prop_oneof![Just("web".to_owned()), Just("Example".to_owned()), any::<String>()];
        let names = (
            proptest::option::of(subject.clone()),
            proptest::collection::vec(subject, 0..3),
            proptest::collection::vec(dns.prop_map(|name| DnsName::parse(name).unwrap()), 0..4),
            proptest::collection::vec(any::<std::net::IpAddr>(), 0..2),
            proptest::collection::vec(uri, 0..3),
        )
            .prop_map(|(common_name, organizations, dns, ips, uris)| Names {
                common_name,
                organizations,
                dns,
                ips,
                uris,
            });
        let usages = proptest::collection::vec(proptest::sample::select(Usage::ALL.to_vec()), 0..4);
        let text = proptest::option::weighted(0.2, prop_oneof![Just("a".to_owned()), any::<String>()]);
        let lifetime = proptest::option::of((0_u64..100_000).prop_map(Duration::from_secs));
        (names, usages, proptest::sample::select(KeyAlgorithm::ALL.to_vec()), lifetime, text.clone(), text).prop_map(
            |(names, usages, key, lifetime, signer, policy)| Ask {
                names,
                usages: usages.into_iter().collect(),
                key,
                lifetime,
                signer,
                policy,
            },
        )
    }

    const ENTRIES: [&str; 12] = [
        "commonNames: ['{unix.user}']",
        "organizations: [Example]",
        "dnsNames: [a]",
        "dnsNames: [web.example.org, '*.web.example.org']",
        "dnsNames: ['{unix.user}.x', '*.org']",
        "wildcardDnsNames: ['*.a.b']",
        "ipAddresses: [0.0.0.0/0, '::/0']",
        "uris: ['spiffe://e/{unix.uid}']",
        "uris: ['spiffe://e/*', 'https://e/*']",
        "keys: [ecdsa-p256, rsa-2048, rsa-3072]",
        "usages: [digital signature, key encipherment, server auth]",
        "lifetime: {min: 1s, max: 48h}",
    ];

    const POD_ENTRIES: [&str; 10] = [
        "commonNames: [web, '{kubernetes.namespace}']",
        "organizations: [Example]",
        "dnsNames: [a]",
        "dnsNames: ['{kubernetes.service}.{kubernetes.namespace}.svc']",
        "dnsNames: ['*.{kubernetes.namespace}.svc']",
        "ipAddresses: ['{kubernetes.podIP}']",
        "ipAddresses: [10.0.0.0/8]",
        "uris: ['spiffe://e/{kubernetes.serviceAccount}']",
        "uris: ['spiffe://e/*']",
        "lifetime: {min: 1s, max: 48h}",
    ];
    const POD_CLAUSES: [&str; 4] = [
        "namespaces: [production]",
        "serviceAccounts: [web]",
        "podSelector: {matchLabels: {app: web}, matchExpressions: [{key: tier, operator: NotIn, values: [db]}]}",
        "namespaceSelector: {matchExpressions: [{key: team, operator: Exists}]}",
    ];

    fn any_pod() -> impl Strategy<Value = PodFacts> {
        let one_of = |values: &[&'static str]| proptest::sample::select(values.to_vec()).prop_map(str::to_owned);
        let labels =
            proptest::collection::btree_map(one_of(&["app", "tier", "team"]), one_of(&["web", "db", "a"]), 0..3);
        let services = proptest::collection::btree_set(prop_oneof![one_of(&["web", "web-api"]), any::<String>()], 0..3);
        let ips = prop_oneof![Just(pod().ips), proptest::collection::vec(any::<std::net::IpAddr>(), 0..2)];
        let namespace = prop_oneof![4 => one_of(&["production"]), 1 => one_of(&["test"]), 1 => any::<String>()];
        let account = prop_oneof![4 => one_of(&["web"]), 1 => one_of(&["x"]), 1 => any::<String>()];
        (namespace, account, labels.clone(), labels, ips, services).prop_map(
            |(namespace, service_account, labels, namespace_labels, ips, services)| PodFacts {
                namespace,
                service_account,
                labels,
                namespace_labels,
                ips,
                services,
                ..pod()
            },
        )
    }

    /// Any ask, or as likely one for names that a pod may have, or nearly.
    fn any_ask_of_pods() -> impl Strategy<Value = Ask> {
        let some_of = |words: &[&'static str]| proptest::sample::subsequence(words.to_vec(), 0..=1);
        let dns = ["dns=a", "dns=web.production.svc", "dns=web-api.production.svc", "dns=db.production.svc", "cn=web"];
        let dns = proptest::sample::select(dns.to_vec());
        let rest = (some_of(&["ip=10.0.0.7", "ip=192.0.2.1"]), some_of(&["uri=spiffe://e/web", "o=Example"]));
        let near = (dns, rest).prop_map(|(dns, (ips, other))| ask(&[vec![dns], ips, other].concat().join(" ")));
        prop_oneof![any_ask(), near]
    }

    /// Some entries of a policy about pods: more often many than few.
    fn any_entries() -> impl Strategy<Value = u16> {
        (any::<u16>(), any::<u16>()).prop_map(|(one, other)| one | other)
    }

    /// Some clauses: more often few than many.
    fn any_clauses() -> impl Strategy<Value = u8> {
        (any::<u8>(), any::<u8>()).prop_map(|(one, other)| one & other)
    }

    /// A policy `a` about pods with the clauses and entries that the bits select.
    fn pods_by(clauses: u8, entries: u16) -> PolicySet {
        let mut selected: BTreeMap<&str, &str> = BTreeMap::new();
        for (_, clause) in POD_CLAUSES.iter().enumerate().filter(|(i, _)| clauses & (1 << i) != 0) {
            let (name, value) = clause.split_once(": ").unwrap();
            selected.entry(name).or_insert(value);
        }
        if !selected.contains_key("namespaces") {
            selected.entry("namespaceSelector").or_insert("{}");
        }
        let clauses: Vec<_> = selected.iter().map(|(name, value)| format!("{name}: {value}")).collect();
        let text = of_pods("a", &spec_of(&POD_ENTRIES, entries));
        set(&text.replace("namespaces: [production]", &clauses.join(", ")))
    }

    proptest! {
        #[test]
        fn deciding_about_pods_never_panics_and_grants_what_was_asked(
            ask in any_ask_of_pods(), pod in any_pod(), clauses in any_clauses(), entries in any_entries(),
        ) {
            let policies = pods_by(clauses, entries);
            let workload = Workload::of_pod(pod);
            let decided = decide(&policies, &workload, &ask);
            if let Ok(grant) = &decided {
                prop_assert_eq!(grant.names(), &ask.names);
                prop_assert!(grant.names().check().is_ok());
            }
            prop_assert_eq!(explain(&policies, workload.facts(), &ask).granted.is_some(), decided.is_ok());
            views(&policies, &workload);
            offers(&policies, &workload);
        }

        #[test]
        fn adding_a_clause_or_removing_an_entry_never_grants_a_pod_more(
            ask in any_ask_of_pods(), pod in any_pod(), more in any_entries(), less in any_entries(),
            clauses in any_clauses(), clause in 0..POD_CLAUSES.len(),
        ) {
            // The lifetime has a default when it is absent.
            let (more, less) = (more | 0x200, (more & less) | 0x200);
            let workload = Workload::of_pod(pod);
            if decide(&pods_by(clauses | 1 << clause, less), &workload, &ask).is_ok() {
                prop_assert!(decide(&pods_by(clauses, more), &workload, &ask).is_ok());
            }
        }

        #[test]
        fn a_pod_that_loses_a_service_or_an_address_is_granted_no_more(
            ask in any_ask_of_pods(), pod in any_pod(), entries in any_entries(),
        ) {
            let policies = pods_by(0, entries);
            let mut less = pod.clone();
            less.services.pop_first();
            less.ips.pop();
            if decide(&policies, &Workload::of_pod(less), &ask).is_ok() {
                prop_assert!(decide(&policies, &Workload::of_pod(pod), &ask).is_ok());
            }
        }

        #[test]
        fn deciding_never_panics_and_grants_what_was_asked(ask in any_ask(), user in any::<String>(), bits: u16) {
            let workload = Workload::for_test(UnixFacts { user: Some(user), ..facts() });
            let policies = set(&policy("a", &spec(bits)));
            if let Ok(grant) = decide(&policies, &workload, &ask) {
                prop_assert!(ask.names.is_empty() || grant.names() == &ask.names);
                prop_assert!(grant.names().check().is_ok());
                prop_assert_eq!((grant.usages(), grant.key()), (ask.usages, ask.key));
                prop_assert_eq!(ask.lifetime.unwrap_or(grant.lifetime()), grant.lifetime());
            }
            let explained = explain(&policies, workload.facts(), &ask).granted.is_some();
            prop_assert_eq!(explained, decide(&policies, &workload, &ask).is_ok());
        }

        #[test]
        fn removing_an_entry_or_a_policy_never_grants(ask in any_ask(), more: u16, less: u16) {
            // Names and kinds only: an absent list of keys or usages means the default, not nothing.
            let (more, less) = (more | 0xe00, (more & less) | 0xe00);
            let all = set(&[policy("a", &spec(more)), policy("b", &spec(less))].concat());
            for fewer in [set(&policy("a", &spec(more))), set(&policy("b", &spec(less))), set(&policy("a", &spec(less)))] {
                if let Ok(grant) = decide(&fewer, &web(), &ask) {
                    // Asked by name, the smaller set may hold a policy of that name where the larger one holds another.
                    let anywhere = Ask { policy: None, ..ask.clone() };
                    prop_assert!(decide(&all, &web(), &anywhere).is_ok(), "{grant:?}");
                }
            }
        }
    }

    /// A spec with the entries of [`ENTRIES`] that `bits` select.
    fn spec(bits: u16) -> String {
        spec_of(&ENTRIES, bits)
    }

    fn spec_of(entries: &[&str], bits: u16) -> String {
        let mut lists: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (_, entry) in entries.iter().enumerate().filter(|(i, _)| bits & (1 << i) != 0) {
            let (name, values) = entry.split_once(": ").unwrap();
            lists.entry(name).or_default().push(values.trim_matches(['[', ']']));
        }
        let lines = lists.into_iter().map(|(name, values)| match name {
            "lifetime" => format!("    {name}: {}\n", values.join("")),
            _ => format!("    {name}: [{}]\n", values.join(", ")),
        });
        let lines: String = lines.collect();
        if lines.is_empty() { String::new() } else { format!("  allow:\n{lines}") }
    }
}
