//! From documents to checked policies: every text is parsed once, at load, into what `judge` compares.
//!
//! Invariant: a [`Policy`] cannot hold what would never work or would not mean what it says: an empty match, a pattern
//! that no name can equal, a rule that may run long, a signer that refuses workloads. All problems of a set are
//! reported together, with their lines.

use std::collections::BTreeMap;

use serde_saphyr::Spanned;

use super::{
    MAX_NAME_BYTES, MAX_POLICIES, MAX_PROBLEMS, Source,
    address::Addresses,
    cel::Rule,
    check::{Check, MAX_ENTRIES},
    document::{self, API_VERSION, Document, KIND, List, Problem},
    fact::Fact,
    is_object_name, lifetime, shown,
    signers::Signer,
    template::{Kind, Pattern},
    whom::Whom,
};
use crate::x509::{KeyAlgorithm, Usage, Usages};

/// Rules in one policy.
pub const MAX_RULES: usize = 16;
/// Offers in one policy.
pub const MAX_OFFERS: usize = 16;
/// Bytes in an offer's hint (SPIFFE Workload API section 8).
pub const MAX_HINT_BYTES: usize = 1024;
/// Characters in a rule's message.
pub const MAX_MESSAGE_CHARS: usize = 256;

/// Keys that a policy allows when it names none. RSA must be named: making such a key costs the host thousands of times
/// the CPU of an elliptic one.
const DEFAULT_KEYS: [KeyAlgorithm; 3] = [KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Ed25519];

/// A checked policy.
#[derive(Debug)]
pub(super) struct Policy {
    pub(super) name: String,
    pub(super) whom: Whom,
    pub(super) signer: Signer,
    pub(super) allow: Allow,
    pub(super) rules: Vec<Rule>,
    pub(super) offers: Vec<Offer>,
}

/// What may be asked.
#[derive(Debug)]
pub(super) struct Allow {
    pub(super) common_names: Vec<Pattern>,
    pub(super) organizations: Vec<Pattern>,
    pub(super) dns_names: Vec<Pattern>,
    pub(super) wildcard_dns_names: Vec<Pattern>,
    pub(super) ip_addresses: Vec<Addresses>,
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
pub(super) fn compile(sources: &[Source], default_signer: &str) -> Result<Vec<Policy>, Vec<Problem>> {
    let mut policies: BTreeMap<String, (String, Policy)> = BTreeMap::new();
    let mut problems = Vec::new();
    for source in sources {
        let before = problems.len();
        let (documents, unread) = document::read(source);
        problems.extend(unread);
        for document in &documents {
            let callers = document.spec.r#match.value.callers();
            let mut check = Check { file: &source.origin, default_signer, callers, problems: &mut problems };
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
        problems[before..].sort_by_key(|problem| problem.line);
    }
    problems.truncate(MAX_PROBLEMS);
    match problems.is_empty() {
        true => Ok(policies.into_values().map(|(_, policy)| policy).collect()),
        false => Err(problems),
    }
}

impl Check<'_> {
    fn patterns(&mut self, list: &List<String>, field: &str, kind: Kind) -> Vec<Pattern> {
        self.list(list, field, MAX_ENTRIES, |check, entry, field| {
            check.text(entry, field, Pattern::parse(kind, check.callers, &entry.value))
        })
    }

    fn subjects(&mut self, list: &List<String>, field: &str, signer: &Signer) -> Vec<Pattern> {
        self.list(list, field, MAX_ENTRIES, |check, entry, field| {
            let pattern = Pattern::parse(Kind::Subject, check.callers, &entry.value);
            check.text(entry, field, pattern.and_then(|pattern| signer.check_subject(&pattern).map(|()| pattern)))
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
        if !is_object_name(&name.value) {
            let message = format!("it must have 1 to {MAX_NAME_BYTES} bytes of a-z, 0-9, '-' and '.'");
            self.problem(name, "metadata.name", message);
        }
        let spec = &document.spec;
        let whom = self.whom(&spec.r#match);
        let signer = match &spec.signer {
            Some(signer) => self.text(signer, "spec.signer", Signer::parse(&signer.value)),
            None => Signer::parse(self.default_signer).ok(),
        };
        // With a signer that is refused, the rest is checked as for one that takes anything.
        let allow = self.allow(&spec.allow, signer.as_ref().unwrap_or(&Signer::embedded()));
        let rules = self.list(&spec.rules, "spec.rules", MAX_RULES, Self::rule);
        let offers = self.list(&spec.offer, "spec.offer", MAX_OFFERS, Self::offer);
        self.unique_hints(&spec.offer);
        if self.problems.len() > before {
            return None;
        }
        Some(Policy { name: name.value.clone(), whom: whom?, signer: signer?, allow: allow?, rules, offers })
    }

    fn allow(&mut self, allow: &document::Allow, signer: &Signer) -> Option<Allow> {
        let field = |name: &str| format!("spec.allow.{name}");
        let ip_addresses = self.list(&allow.ip_addresses, &field("ipAddresses"), MAX_ENTRIES, |check, at, field| {
            check.text(at, field, Addresses::parse(&at.value, check.callers))
        });
        let keys = self.list(&allow.keys, &field("keys"), MAX_ENTRIES, |check, at, field| {
            let known = || KeyAlgorithm::ALL.map(KeyAlgorithm::name).join(", ");
            let key = KeyAlgorithm::from_name(&at.value).ok_or_else(|| format!("it must be one of {}", known()));
            check.text(at, field, key)
        });
        Some(Allow {
            common_names: self.subjects(&allow.common_names, &field("commonNames"), signer),
            organizations: self.subjects(&allow.organizations, &field("organizations"), signer),
            dns_names: self.patterns(&allow.dns_names, &field("dnsNames"), Kind::Dns),
            wildcard_dns_names: self.patterns(&allow.wildcard_dns_names, &field("wildcardDnsNames"), Kind::WildcardDns),
            ip_addresses,
            uris: self.patterns(&allow.uris, &field("uris"), Kind::Uri),
            usages: self.usages(&allow.usages, signer),
            keys: if allow.keys.is_some() { keys } else { DEFAULT_KEYS.to_vec() },
            lifetime: self.lifetime(&allow.lifetime, signer)?,
        })
    }

    /// An empty list allows none; only an absent one means the default.
    fn usages(&mut self, list: &List<String>, signer: &Signer) -> Usages {
        let field = "spec.allow.usages";
        let usages: Usages = self
            .list(list, field, MAX_ENTRIES, |check, at, field| {
                let known = || Usage::ALL.map(Usage::name).join(", ");
                let usage = Usage::from_name(&at.value).ok_or_else(|| format!("it must be one of {}", known()));
                check.text(at, field, usage)
            })
            .into_iter()
            .collect();
        match list.as_ref().map(|list| list.first()) {
            None => signer.default_usages(),
            Some(None) => usages,
            Some(Some(first)) => {
                self.text(first, field, signer.check_usages(usages));
                usages
            }
        }
    }

    fn lifetime(&mut self, lifetime: &Option<document::Lifetime>, signer: &Signer) -> Option<lifetime::Range> {
        let (min, default, max) = lifetime
            .as_ref()
            .map_or((None, None, None), |given| (given.min.as_ref(), given.default.as_ref(), given.max.as_ref()));
        let given = [(min, "min"), (default, "default"), (max, "max")];
        let mut parsed = [None; 3];
        for ((at, name), parsed) in given.iter().zip(&mut parsed) {
            if let Some(at) = at {
                let field = format!("spec.allow.lifetime.{name}");
                *parsed = Some(self.text(at, &field, signer.parse_lifetime(&at.value))?);
            }
        }
        let [min, default, max] = parsed;
        match lifetime::Range::new(signer.min_lifetime(), min, default, max) {
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
        let rule = Rule::compile(&expression.value, &message.value, self.callers);
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
                let pattern = Pattern::parse(Kind::Uri, self.callers, &id.value).and_then(no_wildcard);
                Some(self.text(id, &spiffe_field, pattern.and_then(one_name))?)
            }
            None => None,
        };
        let dns_field = format!("{field}.dnsNames");
        let dns_names = self.list(&offer.dns_names, &dns_field, MAX_ENTRIES - 1, |check, at, field| {
            check.text(at, field, Pattern::parse(Kind::Dns, check.callers, &at.value).and_then(no_wildcard))
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

fn no_wildcard(pattern: Pattern) -> Result<Pattern, String> {
    match pattern.has_wildcard() {
        true => Err("an offer must say the whole name: no '*'".to_owned()),
        false => Ok(pattern),
    }
}

fn one_name(pattern: Pattern) -> Result<Pattern, String> {
    match pattern.uses(Fact::Service) {
        true => Err(format!("{{{}}} can be several, and a certificate has one SPIFFE ID", Fact::Service.name())),
        false => Ok(pattern),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::signers::EMBEDDED;

    fn problems(text: &str) -> Vec<String> {
        let source = Source { origin: "p.yaml".to_owned(), text: text.to_owned() };
        compile(&[source], EMBEDDED).map(drop).err().unwrap_or_default().iter().map(ToString::to_string).collect()
    }

    /// A good policy whose lines from 6 on are `spec`, indented by two spaces.
    fn document(spec: &str) -> String {
        let head = "apiVersion: csrd.dev/v1alpha1\nkind: CertificatePolicy\nmetadata: {name: web}\nspec:\n  \
                    match: {unix: {uids: [1]}}\n";
        format!("{head}{spec}\n")
    }

    fn check(spec: &str, expected: &[&str]) {
        assert_eq!(problems(&document(spec)), expected, "{spec}");
    }

    #[test]
    fn every_field_may_be_absent_or_full() {
        check("", &[]);
        check(
            "  signer: csrd.dev/workload
  allow:
    commonNames: [web]
    organizations: []
    dnsNames: ['*.example.org']
    wildcardDnsNames: ['*.example.org']
    ipAddresses: ['::1', 10.0.0.0/8]
    uris: ['spiffe://example.org/{unix.user}']
    usages: [digital signature]
    keys: [rsa-4096]
    lifetime: {min: 10m, default: 20m, max: 8784h}
  rules:
  - {expression: 'true', message: always}
  offer:
  - {spiffeId: 'spiffe://example.org/a', dnsNames: [a], hint: a}
  - {dnsNames: [b], hint: b}
  - {spiffeId: 'spiffe://example.org/b', dnsNames: []}",
            &[],
        );
    }

    #[test]
    fn all_problems_are_reported_with_line_and_field() {
        let text = document(
            "  signer: kubernetes.io/kubelet-serving
  allow:
    dnsNames:
    - good.example.org
    - Bad.example.org
    uris: ['spiffe://*/a']
    ipAddresses: [10.0.0.1/8, ten]
    usages: [email]
    keys: [dsa]
    lifetime: {max: 1h, default: 2h}
  rules:
  - {expression: request.nothing, message: ''}
  offer:
  - {hint: nothing}
  - {spiffeId: 'https://a/b'}",
        );
        let text =
            text.replace("v1alpha1", "v1").replace("CertificatePolicy", "Policy").replace("name: web", "name: Web");
        insta::assert_snapshot!(problems(&text).join("\n"), @r#"
        p.yaml:1: apiVersion: it must be csrd.dev/v1alpha1
        p.yaml:2: kind: it must be CertificatePolicy
        p.yaml:3: metadata.name: it must have 1 to 253 bytes of a-z, 0-9, '-' and '.'
        p.yaml:6: spec.signer: kubernetes.io/kubelet-serving is refused: it signs only for kubelets: organization system:nodes, a common name that begins with system:node:, server auth alone and no URI; a workload certificate from it would fail or claim to be a node. Use a signer of your own, for example csrd.dev/workload
        p.yaml:10: spec.allow.dnsNames[1]: labels may hold only a-z, 0-9 and '-'; a wildcard must be the whole first label; write IDNs as xn--
        p.yaml:11: spec.allow.uris[0]: scheme and trust domain (or host) must be literal: no '*' and no slot
        p.yaml:12: spec.allow.ipAddresses[0]: it has host bits set; write 10.0.0.0/8
        p.yaml:12: spec.allow.ipAddresses[1]: it must be a network such as 10.0.0.0/8 or an address
        p.yaml:13: spec.allow.usages[0]: it must be one of digital signature, key encipherment, server auth, client auth
        p.yaml:14: spec.allow.keys[0]: it must be one of ecdsa-p256, ecdsa-p384, ed25519, rsa-2048, rsa-3072, rsa-4096
        p.yaml:15: spec.allow.lifetime.default: 2h is more than max, 1h
        p.yaml:17: spec.rules[0].message: it must have 1 to 256 printable characters
        p.yaml:17: spec.rules[0].expression: request has no field "nothing"; it has commonName, organizations, dnsNames, ipAddresses, uris, usages, key, lifetimeSeconds, signer
        p.yaml:19: spec.offer[0]: it names nothing; it needs spiffeId or dnsNames
        p.yaml:20: spec.offer[1].spiffeId: it must begin with spiffe://
        "#);
    }

    #[test]
    fn lists_have_bounds() {
        let refused = |spec: &str, words: &str| {
            let found = problems(&document(spec));
            assert!(found.len() == 1 && found[0].ends_with(words), "{found:?}");
        };
        let names = |n: usize| format!("  allow: {{dnsNames: [{}]}}", "a, ".repeat(n));
        check(&names(MAX_ENTRIES), &[]);
        refused(&names(MAX_ENTRIES + 1), "spec.allow.dnsNames: 65 entries, at most 64 are allowed");
        let rules = |n: usize| format!("  rules: [{}]", "{expression: 'true', message: m}, ".repeat(n));
        check(&rules(MAX_RULES), &[]);
        refused(&rules(MAX_RULES + 1), "spec.rules: 17 entries, at most 16 are allowed");
        let offers = |n: usize| format!("  offer: [{}]", "{dnsNames: [a]}, ".repeat(n));
        check(&offers(MAX_OFFERS), &[]);
        refused(&offers(MAX_OFFERS + 1), "spec.offer: 17 entries, at most 16 are allowed");
        // One more for the SPIFFE ID.
        let offered = |n: usize| format!("  offer: [{{dnsNames: [{}]}}]", "a, ".repeat(n));
        check(&offered(MAX_ENTRIES - 1), &[]);
        refused(&offered(MAX_ENTRIES), "spec.offer[0].dnsNames: 64 entries, at most 63 are allowed");
        let hint = |n: usize| format!("  offer: [{{dnsNames: [a], hint: {}}}]", "h".repeat(n));
        check(&hint(MAX_HINT_BYTES), &[]);
        refused(&hint(MAX_HINT_BYTES + 1), "spec.offer[0].hint: it must have at most 1024 bytes, all printable");
        let message = |n: usize| format!("  rules: [{{expression: 'true', message: {}}}]", "m".repeat(n));
        check(&message(MAX_MESSAGE_CHARS), &[]);
        refused(&message(MAX_MESSAGE_CHARS + 1), "spec.rules[0].message: it must have 1 to 256 printable characters");
        let uids = |n: usize| document("").replace("uids: [1]", &format!("uids: [{}]", "1, ".repeat(n)));
        assert_eq!(problems(&uids(MAX_ENTRIES)), [""; 0]);
        assert_eq!(problems(&uids(MAX_ENTRIES + 1)).len(), 1);
    }

    #[test]
    fn names_are_unique_and_bounded() {
        let named = |name: &str| document("").replace("name: web", &format!("name: {name}"));
        assert_eq!(problems(&named(&"a".repeat(MAX_NAME_BYTES))), [""; 0]);
        assert_eq!(problems(&named("a.b-1")), [""; 0]);
        for name in ["''", "A", "a_b", "-a", "a-", "a..b", "a/b", &"a".repeat(MAX_NAME_BYTES + 1)] {
            assert_eq!(
                problems(&named(name)),
                ["p.yaml:3: metadata.name: it must have 1 to 253 bytes of a-z, 0-9, '-' and '.'"]
            );
        }
        let twice = compile(
            &["a.yaml", "b.yaml"].map(|origin| Source { origin: origin.to_owned(), text: named("a") }),
            EMBEDDED,
        );
        let twice: Vec<_> = twice.map(drop).unwrap_err().iter().map(ToString::to_string).collect();
        assert_eq!(twice, ["b.yaml:3: metadata.name: \"a\" is also the name of a policy in a.yaml"]);
    }

    #[test]
    fn a_set_has_a_bound_in_policies_and_a_report_in_problems() {
        let many = |n: usize, text: &str| {
            let text = |i| text.replace("name: web", &format!("name: p{i}"));
            let sources: Vec<_> = (0..n).map(|i| Source { origin: format!("{i}.yaml"), text: text(i) }).collect();
            compile(&sources, EMBEDDED).map(|policies| policies.len()).map_err(|problems| problems.len())
        };
        assert_eq!(many(MAX_POLICIES, &document("")), Ok(MAX_POLICIES));
        assert_eq!(many(MAX_POLICIES + 1, &document("")), Err(1));
        assert_eq!(many(MAX_PROBLEMS, &document("  signer: ''")), Err(MAX_PROBLEMS));
        assert_eq!(many(MAX_PROBLEMS + 1, &document("  signer: ''")), Err(MAX_PROBLEMS));
    }

    #[test]
    fn an_offer_is_checked() {
        for (offer, words) in [
            ("{}", "spec.offer[0]: it names nothing; it needs spiffeId or dnsNames"),
            ("{dnsNames: ['*.example.org']}", "spec.offer[0].dnsNames[0]: an offer must say the whole name: no '*'"),
            ("{spiffeId: 'spiffe://a/*'}", "spec.offer[0].spiffeId: an offer must say the whole name: no '*'"),
            ("{spiffeId: 'spiffe://a'}", "spec.offer[0].spiffeId: a workload's SPIFFE ID needs a path"),
            ("{spiffeId: 'https://a/b'}", "spec.offer[0].spiffeId: it must begin with spiffe://"),
            ("{dnsNames: [a], hint: x}, {dnsNames: [b], hint: x}", "spec.offer[1].hint: another offer of this policy"),
            ("{dnsNames: [a], hint: \"\\n\"}", "spec.offer[0].hint: it must have at most 1024 bytes, all printable"),
        ] {
            let found = problems(&document(&format!("  offer: [{offer}]")));
            assert!(found.len() == 1 && found[0].contains(words), "{offer}: {found:?}");
        }
    }
}
