//! What a workload may have: [`decide`] turns a [`Workload`] and an [`Ask`] into a [`Grant`], or a [`Denial`] that says why.
//!
//! Deny by default. An ask is granted only if one policy allows all of it; policies never add up. `decide` is pure and
//! total: no I/O, no clock, no panic, bounded work for any input. A [`Grant`] has no constructor outside this module and
//! is made only for an attested workload, so whoever holds one holds a decision. [`explain`] reaches the same verdicts
//! for facts that nobody attested, and hands out words only.
//!
//! `document` reads YAML, `compile` checks it, `template` and `cel` match, `judge` compares, `view` explains, `watch` keeps
//! files fresh.

mod cel;
mod compile;
mod document;
mod judge;
pub mod lifetime;
mod template;
mod view;
pub mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

pub use cel::{MAX_COST, MAX_DEPTH, MAX_EXPRESSION_BYTES, MAX_RULE_GROUPS};
pub use compile::{DEFAULT_SIGNER, MAX_ENTRIES, MAX_HINT_BYTES, MAX_MESSAGE_CHARS, MAX_OFFERS, MAX_RULES};
pub use document::{API_VERSION, KIND, MAX_DOCUMENTS, MAX_SOURCE_BYTES, Problem, Source};
pub use template::MAX_PATTERN_BYTES;
pub use view::{Explanation, Verdict, View, explain, views};

use self::{
    compile::Policy,
    judge::{Refusal, judge, mismatch},
    template::{Fact, Pattern},
};
use crate::{
    attest::{UnixFacts, Workload},
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
        let (signer, policy) = (DEFAULT_SIGNER.to_owned(), "test".to_owned());
        Self(Terms { names, usages, key, lifetime, signer, policy })
    }
}

/// The policies in force, in order of name.
#[derive(Debug, Default)]
pub struct PolicySet {
    policies: Vec<Policy>,
}

impl PolicySet {
    /// Reads and checks all sources. One problem anywhere and there is no set, so that a mistake never opens or closes
    /// half of what its author meant.
    ///
    /// # Errors
    ///
    /// Every problem found, at most [`MAX_PROBLEMS`], each with file, line and field.
    pub fn parse(sources: &[Source]) -> Result<Self, Vec<Problem>> {
        compile::compile(sources).map(|policies| Self { policies })
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
        self.policies.iter().map(|policy| policy.signer.as_str()).collect()
    }

    /// Whether any policy looks at the SHA-256 of the caller's executable; otherwise nobody needs to compute it.
    pub fn needs_executable_sha256(&self) -> bool {
        let wanted = Fact::ExecutableSha256;
        let name = wanted.name().rsplit('.').next().unwrap_or_default();
        self.policies.iter().any(|policy| {
            let mut patterns = policy.patterns();
            policy.unix.executable_sha256.is_some()
                || patterns.any(|pattern| pattern.uses(wanted))
                || policy.rules.iter().any(|rule| rule.mentions(name))
        })
    }
}

impl Policy {
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

    fn new(facts: &UnixFacts, ask: &Ask, refused: &BTreeMap<&str, Vec<Refusal>>) -> Self {
        let text = match (&ask.policy, refused.is_empty()) {
            // An unknown policy and one for somebody else read the same.
            (Some(name), true) => format!("no policy named {} matches {facts}", shown(name)),
            (None, true) => format!("no policy matches {facts}; csrd whoami says why for each of them"),
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
        // An executable's path may hold anything but a slash and NUL.
        let text = text.replace(char::is_control, "\u{fffd}");
        Self { reason, text: clipped_bytes(text, MAX_DENIAL_BYTES) }
    }
}

/// Decides. Policies are tried in order of name; the first that allows all of the ask grants it.
///
/// # Errors
///
/// What each policy that matches the workload has against the ask.
pub fn decide(policies: &PolicySet, workload: &Workload, ask: &Ask) -> Result<Grant, Denial> {
    let facts = workload.unix();
    let mut refused = BTreeMap::new();
    for policy in candidates(policies, ask) {
        if mismatch(&policy.unix, facts).is_some() {
            continue;
        }
        match judge(policy, facts, ask) {
            Ok(terms) => return Ok(Grant(terms)),
            Err(refusals) => {
                refused.insert(policy.name.as_str(), refusals);
            }
        }
    }
    Err(Denial::new(facts, ask, &refused))
}

fn candidates<'a>(policies: &'a PolicySet, ask: &Ask) -> impl Iterator<Item = &'a Policy> {
    policies.policies.iter().filter(move |policy| ask.policy.as_ref().is_none_or(|name| *name == policy.name))
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

/// Everything the policies hand out to `workload` unasked, in order of policy name and then as written. An offer whose
/// facts are absent or which the policy itself refuses is left out; [`views`] says so.
pub fn offers(policies: &PolicySet, workload: &Workload) -> Vec<Offer> {
    let facts = workload.unix();
    let mut hints = BTreeSet::new();
    let mut offers = Vec::new();
    for policy in policies.policies.iter().filter(|policy| mismatch(&policy.unix, facts).is_none()) {
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

fn clipped_bytes(mut text: String, max_bytes: usize) -> String {
    if text.len() > max_bytes {
        text.truncate(text.floor_char_boundary(max_bytes - "…".len()));
        text.push('…');
    }
    text
}
