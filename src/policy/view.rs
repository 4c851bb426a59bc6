//! The policies as people see them: [`views`] for an attested caller, [`explain`] for facts that nobody attested.
//!
//! Invariant: words only. Nothing here makes a `Grant`, and nothing shows a caller what a match section says about anybody
//! else, or that there is a policy for pods of other namespaces.

use std::collections::BTreeMap;

use super::{
    Ask, Denial, PolicySet, Terms, candidates,
    compile::{self, Policy},
    judge::{self, judge},
    lifetime,
    template::Pattern,
};
use crate::attest::{Facts, Workload};

/// One policy, as far as it concerns one workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The policy's name.
    pub policy: String,
    /// Whether its match section accepts the workload.
    pub matches: bool,
    /// The first clause that does not hold; empty when it matches.
    pub mismatch: String,
    /// What it allows, one line for each field, with templates filled in; empty unless it matches.
    pub grants: Vec<String>,
    /// What it hands out unasked; empty unless it matches.
    pub offers: Vec<String>,
}

/// Every policy that concerns the workload, in order of name, as it may see it: its own facts and what it may have, nothing
/// about others.
pub fn views(policies: &PolicySet, workload: &Workload) -> Vec<View> {
    let facts = workload.facts();
    let view = |policy: &Policy| match policy.whom.mismatch(facts) {
        Some(mismatch) => {
            View { policy: policy.name.clone(), matches: false, mismatch, grants: Vec::new(), offers: Vec::new() }
        }
        None => View {
            policy: policy.name.clone(),
            matches: true,
            mismatch: String::new(),
            grants: grant_lines(policy, facts),
            offers: policy.offers.iter().map(|offer| offer_line(policy, offer, facts)).collect(),
        },
    };
    policies.policies.iter().filter(|policy| policy.whom.concerns(facts)).map(|policy| view(policy)).collect()
}

/// The verdicts on an ask, for people. Nothing in it entitles to anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The policy that grants and what it grants, one line for each field.
    pub granted: Option<(String, Vec<String>)>,
    /// Each policy that was consulted, in order of name, up to the one that grants.
    pub verdicts: Vec<Verdict>,
    /// [`Denial::reason`], when nothing is granted.
    pub reason: Option<&'static str>,
}

/// What one policy says to an ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Its name.
    pub policy: String,
    /// Whether it matches the described workload.
    pub matches: bool,
    /// The clause that does not match, or everything it refuses; empty when it grants.
    pub against: Vec<String>,
}

/// What [`decide`](super::decide)(super::decide) would say to a workload with these facts, for offline checks.
pub fn explain(policies: &PolicySet, facts: &Facts, ask: &Ask) -> Explanation {
    let mut refused = BTreeMap::new();
    let mut verdicts = Vec::new();
    for policy in candidates(policies, ask) {
        let name = policy.name.clone();
        if let Some(mismatch) = policy.whom.mismatch(facts) {
            verdicts.push(Verdict { policy: name, matches: false, against: vec![mismatch] });
            continue;
        }
        match judge(policy, facts, ask) {
            Ok(terms) => {
                verdicts.push(Verdict { policy: name.clone(), matches: true, against: Vec::new() });
                return Explanation { granted: Some((name, term_lines(&terms))), verdicts, reason: None };
            }
            Err(refusals) => {
                let against = refusals.iter().map(|refusal| refusal.text.clone()).collect();
                verdicts.push(Verdict { policy: name, matches: true, against });
                refused.insert(policy.name.as_str(), refusals);
            }
        }
    }
    Explanation { granted: None, verdicts, reason: Some(Denial::new(facts, ask.policy.as_deref(), &refused).reason()) }
}

fn term_lines(terms: &Terms) -> Vec<String> {
    let names = &terms.names;
    let mut lines = Vec::new();
    let mut line = |name: &str, values: Vec<String>| {
        if !values.is_empty() {
            lines.push(format!("{name}: {}", values.join(", ")));
        }
    };
    line("common name", names.common_name.iter().cloned().collect());
    line("organizations", names.organizations.clone());
    line("DNS names", names.dns.iter().map(ToString::to_string).collect());
    line("IP addresses", names.ips.iter().map(ToString::to_string).collect());
    line("URIs", names.uris.clone());
    line("usages", vec![terms.usages.to_string()]);
    line("key", vec![terms.key.to_string()]);
    line("lifetime", vec![lifetime::print(terms.lifetime)]);
    line("signer", vec![terms.signer.clone()]);
    lines
}

fn grant_lines(policy: &Policy, facts: &Facts) -> Vec<String> {
    let allow = &policy.allow;
    let fill = |pattern: &Pattern| match pattern.fill(facts) {
        Ok(texts) => texts.join(", "),
        Err(why) => format!("{} (grants nothing: {why})", pattern.as_str()),
    };
    let lists = [
        ("common names", &allow.common_names),
        ("organizations", &allow.organizations),
        ("DNS names", &allow.dns_names),
        ("wildcard DNS names", &allow.wildcard_dns_names),
        ("URIs", &allow.uris),
    ];
    let lists = lists.into_iter().map(|(name, patterns)| (name, patterns.iter().map(fill).collect::<Vec<_>>()));
    let lifetime::Range { min, default, max } = allow.lifetime;
    let [min, default, max] = [min, default, max].map(lifetime::print);
    let rest = [
        ("IP addresses", allow.ip_addresses.iter().map(|addresses| addresses.shown_to(facts)).collect()),
        ("usages", allow.usages.iter().map(|usage| usage.name().to_owned()).collect()),
        ("keys", allow.keys.iter().map(ToString::to_string).collect()),
        ("lifetime", vec![format!("{min} to {max}, {default} unless asked")]),
        ("signer", vec![policy.signer.name().to_owned()]),
        ("rules", policy.rules.iter().map(|rule| rule.message().to_owned()).collect()),
    ];
    let lines = lists.chain(rest).filter(|(_, values): &(_, Vec<String>)| !values.is_empty());
    lines.map(|(name, values)| format!("{name}: {}", values.join(", "))).collect()
}

fn offer_line(policy: &Policy, offer: &compile::Offer, facts: &Facts) -> String {
    let ask = match judge::ask_of_offer(policy, offer, facts) {
        Ok(ask) => ask,
        Err(why) => return format!("void: {why}"),
    };
    let names = ask.names.to_strings().join(", ");
    match judge(policy, facts, &ask) {
        Ok(_) if offer.hint.is_empty() => names,
        Ok(_) => format!("{names} (hint {})", offer.hint),
        Err(refusals) => {
            let why: Vec<_> = refusals.into_iter().map(|refusal| refusal.text).collect();
            format!("{names}: refused: {}", why.join("; "))
        }
    }
}
