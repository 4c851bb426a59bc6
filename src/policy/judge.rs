//! One policy, one caller, one ask: [`judge`], the comparison behind every decision.
//!
//! Invariant: pure and total; what is not allowed is refused, and each refusal is a sentence that names the caller's own
//! value and fact, never what the policy says about anybody else.

use std::borrow::Cow;

use super::{
    Ask, MAX_REFUSALS, Reason, Terms,
    address::Addresses,
    cel::Variables,
    compile::{Allow, Offer, Policy},
    fact::Fact,
    lifetime, shown,
    template::{Pattern, Unfilled},
};
use crate::{
    attest::Facts,
    x509::{DnsName, KeyAlgorithm, Names, Usage, Usages},
};

/// One reason against an ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) reason: Reason,
    pub(super) text: String,
}

/// Judges an ask by a policy that matches the caller: what it gets, or everything that speaks against it.
pub(super) fn judge(policy: &Policy, facts: &Facts, ask: &Ask) -> Result<Terms, Vec<Refusal>> {
    let mut refusals = Refusals(Vec::new());
    if let Err(error) = ask.names.check() {
        refusals.add(Reason::NameNotAllowed, error.to_string());
        return Err(refusals.0);
    }
    let names = match ask.names.is_empty() {
        true => first_offer(policy, facts).map_err(|refusal| vec![refusal])?,
        false => {
            refuse_names(&mut refusals, policy, facts, &ask.names);
            ask.names.clone()
        }
    };
    refuse_usages(&mut refusals, policy, ask);
    if !policy.allow.keys.contains(&ask.key) {
        refusals.add(Reason::KeyNotAllowed, format!("key {} is not among its keys", ask.key));
    }
    let lifetime = ask.lifetime.unwrap_or(policy.allow.lifetime.default);
    let lifetime::Range { min, max, .. } = policy.allow.lifetime;
    if lifetime > max {
        let (asked, max) = (lifetime::print(lifetime), lifetime::print(max));
        refusals.add(Reason::LifetimeNotAllowed, format!("lifetime {asked} is more than its max, {max}"));
    } else if lifetime < min {
        let (asked, min) = (lifetime::print(lifetime), lifetime::print(min));
        refusals.add(Reason::LifetimeNotAllowed, format!("lifetime {asked} is less than its min, {min}"));
    }
    if let Some(signer) = ask.signer.as_ref().filter(|signer| *signer != policy.signer.name()) {
        refusals.add(Reason::SignerNotAllowed, format!("signer {} is not its signer", shown(signer)));
    }
    let signer = policy.signer.name().to_owned();
    let terms = Terms { names, usages: ask.usages, key: ask.key, lifetime, signer, policy: policy.name.clone() };
    // Rules come last: they see only what everything else allows, which also bounds what they can be given.
    if refusals.0.is_empty() {
        refuse_by_rules(&mut refusals, policy, facts, &terms);
    }
    match refusals.0.is_empty() {
        true => Ok(terms),
        false => Err(refusals.0),
    }
}

/// The ask that an offer stands for: its names, with those of the usual usages and keys that the policy allows.
pub(super) fn ask_of_offer(policy: &Policy, offer: &Offer, facts: &Facts) -> Result<Ask, Unfilled> {
    let allow = &policy.allow;
    let key = KeyAlgorithm::ALL.into_iter().find(|key| allow.keys.contains(key)).unwrap_or(KeyAlgorithm::EcdsaP256);
    Ok(Ask {
        names: offer_names(offer, facts)?,
        usages: Usages::DEFAULT.minus(Usages::DEFAULT.minus(allow.usages)),
        key,
        lifetime: None,
        signer: None,
        policy: None,
    })
}

/// The names of an offer, filled in; one name for each Service, where it names them.
pub(super) fn offer_names(offer: &Offer, facts: &Facts) -> Result<Names, Unfilled> {
    let fill = |pattern: &Pattern| match pattern.fill(facts) {
        // None is as good a number of Services as any.
        Err(Unfilled::Absent(Fact::Service)) => Ok(Vec::new()),
        filled => filled,
    };
    let dns = offer.dns_names.iter().map(fill).collect::<Result<Vec<_>, _>>()?.concat();
    let uris = offer.spiffe_id.iter().map(fill).collect::<Result<Vec<_>, _>>()?.concat();
    // A filled label is a label, but many of them may be too long together; such a name is nobody's.
    let dns = dns.iter().filter_map(|name| DnsName::parse(name).ok()).collect();
    Ok(Names { dns, uris, ..Names::default() })
}

/// Sentences of one policy, bounded.
struct Refusals(Vec<Refusal>);

impl Refusals {
    fn add(&mut self, reason: Reason, text: String) {
        if self.0.len() < MAX_REFUSALS {
            self.0.push(Refusal { reason, text });
        }
    }
}

fn first_offer(policy: &Policy, facts: &Facts) -> Result<Names, Refusal> {
    let nothing = |text| Refusal { reason: Reason::NothingOffered, text };
    let Some(offer) = policy.offers.first() else {
        return Err(nothing("it offers nothing unasked; say which names you need".to_owned()));
    };
    let names = offer_names(offer, facts).map_err(|why| nothing(format!("its first offer is void: {why}")))?;
    let void = match names.check() {
        Err(error) => error.to_string(),
        Ok(()) if !names.is_empty() => return Ok(names),
        Ok(()) if offer.dns_names.iter().any(|pattern| pattern.uses(Fact::Service)) => {
            "no Service selects the caller".to_owned()
        }
        Ok(()) => "a name is too long".to_owned(),
    };
    Err(nothing(format!("its first offer is void: {void}")))
}

fn refuse_names(refusals: &mut Refusals, policy: &Policy, facts: &Facts, asked: &Names) {
    let Allow { common_names, organizations, dns_names, wildcard_dns_names, ip_addresses, uris, .. } = &policy.allow;
    let offered: Vec<Names> = policy.offers.iter().filter_map(|offer| offer_names(offer, facts).ok()).collect();
    if let Some(text) = policy.signer.refuse_names(asked) {
        refusals.add(Reason::NameNotAllowed, text);
    }
    let mut compare = |field: &str, patterns: &[Pattern], value: &str| {
        if let Err(text) = allowed(field, patterns, value, facts) {
            refusals.add(Reason::NameNotAllowed, text);
        }
    };
    if let Some(common_name) = &asked.common_name {
        compare("commonNames", common_names, common_name);
    }
    for organization in &asked.organizations {
        compare("organizations", organizations, organization);
    }
    for name in asked.dns.iter().filter(|name| !offered.iter().any(|offer| offer.dns.contains(name))) {
        match name.is_wildcard() {
            true => compare("wildcardDnsNames", wildcard_dns_names, name.as_str()),
            false => compare("dnsNames", dns_names, name.as_str()),
        }
    }
    for uri in asked.uris.iter().filter(|uri| !offered.iter().any(|offer| offer.uris.contains(uri))) {
        compare("uris", uris, uri);
    }
    for ip in &asked.ips {
        if !ip_addresses.iter().any(|addresses| addresses.contain(ip, facts)) {
            let own = if ip_addresses.contains(&Addresses::Pod) { " and is not the pod's own" } else { "" };
            refusals.add(Reason::NameNotAllowed, format!("ipAddresses: {ip} is in none of its networks{own}"));
        }
    }
}

/// Whether one of `patterns` allows `value`; the error also says which entries grant nothing to this caller, and why.
fn allowed(field: &str, patterns: &[Pattern], value: &str, facts: &Facts) -> Result<(), String> {
    let mut void = None;
    for pattern in patterns {
        match pattern.matches(value, facts) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(why) => void = void.or(Some((pattern, why))),
        }
    }
    let entries = if patterns.is_empty() { "it allows none" } else { "it matches none of its entries" };
    let void = void.map(|(pattern, why)| Cow::from(format!(" ({} grants nothing: {why})", shown(pattern.as_str()))));
    Err(format!("{field}: {} is refused, {entries}{}", shown(value), void.unwrap_or_default()))
}

fn refuse_usages(refusals: &mut Refusals, policy: &Policy, ask: &Ask) {
    if ask.usages.is_empty() {
        refusals.add(Reason::UsageNotAllowed, "no usage is asked for".to_owned());
    }
    let extra = ask.usages.minus(policy.allow.usages);
    if !extra.is_empty() {
        refusals.add(Reason::UsageNotAllowed, format!("usages: {extra} not among its usages"));
    }
    if let Some(text) = policy.signer.refuse_usages(ask.usages) {
        refusals.add(Reason::UsageNotAllowed, text);
    }
    // RFC 5480 section 3 and RFC 8410 section 5: such keys encipher nothing.
    let rsa = matches!(ask.key, KeyAlgorithm::Rsa2048 | KeyAlgorithm::Rsa3072 | KeyAlgorithm::Rsa4096);
    if ask.usages.contains(Usage::KeyEncipherment) && !rsa {
        refusals.add(Reason::UsageNotAllowed, format!("usages: key encipherment needs an RSA key, not {}", ask.key));
    }
}

fn refuse_by_rules(refusals: &mut Refusals, policy: &Policy, facts: &Facts, terms: &Terms) {
    if policy.rules.is_empty() {
        return;
    }
    let variables = match Variables::new(facts, terms) {
        Ok(variables) => variables,
        Err(text) => return refusals.add(Reason::RuleNotMet, text),
    };
    for rule in &policy.rules {
        if let Err(text) = rule.check(&variables) {
            refusals.add(Reason::RuleNotMet, text);
        }
    }
}
