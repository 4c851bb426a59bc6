//! From the messages of `csrd.v1` to the chain's own types, and back.
//!
//! A request that gets through here is within every bound and holds only names that a certificate of ours can carry;
//! whether the caller may have them is policy's business.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::{
    attest::Workload,
    hub::{Held, Live, Row},
    policy::{Ask, MAX_NAME_BYTES, MAX_SIGNER_BYTES, View},
    proto::v1,
    x509::{
        Csr, DnsName, KeyAlgorithm, Names, Usage, Usages,
        csr::CsrError,
        name::{MAX_NAMES, NameError, parse_ip},
    },
};

/// Usages in one request, repeated ones counted.
pub(super) const MAX_USAGES: usize = 16;
/// The longest lifetime that can be asked for: 100 years of 365 days, far above what any policy allows.
pub(super) const MAX_LIFETIME: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// What is wrong with a request.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    /// A message that must be there is not.
    #[error("{0} must be set")]
    Missing(&'static str),
    /// A name is refused.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A PKCS#10 request is refused.
    #[error("held.pkcs10: {0}")]
    Csr(#[from] CsrError),
    /// Names beside a PKCS#10 request.
    #[error(
        "with held.pkcs10 the names are those of the PKCS#10 request; leave common_name, organizations, dns_names, ip_addresses and uris empty"
    )]
    NamesTwice,
    /// An enum value that this agent does not know.
    #[error("{field}: {value} is not a value that this agent knows")]
    Enum {
        /// The field.
        field: &'static str,
        /// Its value.
        value: i32,
    },
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
    /// A text over its bound.
    #[error("{field}: {bytes} bytes given, at most {max} allowed")]
    TooLong {
        /// The field.
        field: &'static str,
        /// How many were given.
        bytes: usize,
        /// The bound.
        max: usize,
    },
    /// A lifetime that is negative, zero, absurd, or has a fraction of a second.
    #[error("lifetime: it must be whole seconds, at least 1 and at most {}", MAX_LIFETIME.as_secs())]
    Lifetime,
}

impl RequestError {
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Csr(error) => error.reason(),
            Self::Name(_) => "NAME_INVALID",
            _ => "REQUEST_INVALID",
        }
    }
}

/// What a request asks for, and the key that its caller holds.
pub(super) fn ask(request: Option<v1::CertificateRequest>) -> Result<(Ask, Option<Held>), RequestError> {
    let request = request.ok_or(RequestError::Missing("request"))?;
    let lifetime = request.lifetime.map(lifetime).transpose()?;
    let signer = signer_name(request.signer_name)?;
    let policy = optional_name("policy", request.policy, MAX_NAME_BYTES)?;
    let given =
        names(request.common_name, request.organizations, &request.dns_names, &request.ip_addresses, request.uris)?;
    let asked = usages(&request.usages)?;
    let (names, key, held) = match request.key {
        Some(v1::certificate_request::Key::Held(held)) => {
            if !given.is_empty() {
                return Err(RequestError::NamesTwice);
            }
            let csr = Arc::new(Csr::parse(&held.pkcs10)?);
            let (names, key) = (csr.names().clone(), csr.public_key().algorithm());
            (names, key, Some(Held { csr, rotate_key: held.rotate_key }))
        }
        Some(v1::certificate_request::Key::Generate(value)) => (given, key_algorithm(value)?, None),
        None => (given, KeyAlgorithm::EcdsaP256, None),
    };
    // What the message leaves open the PKCS#10 request may say, and what both leave open has a default.
    let in_csr = held.as_ref().map(|held| held.csr.usages());
    let usages =
        [Some(asked), in_csr].into_iter().flatten().find(|usages| !usages.is_empty()).unwrap_or(Usages::DEFAULT);
    Ok((Ask { names, usages, key, lifetime, signer, policy }, held))
}

fn names(
    common_name: String,
    organizations: Vec<String>,
    dns: &[String],
    ips: &[String],
    uris: Vec<String>,
) -> Result<Names, NameError> {
    // Counted before anything is parsed, so that a flood of names costs nothing.
    let count = dns.len() + ips.len() + uris.len();
    if count > MAX_NAMES {
        return Err(NameError::TooMany { field: "dns_names, ip_addresses and uris", count, max: MAX_NAMES });
    }
    let names = Names {
        common_name: (!common_name.is_empty()).then_some(common_name),
        organizations,
        dns: dns.iter().map(|name| DnsName::parse(name)).collect::<Result<_, _>>()?,
        ips: ips.iter().map(|ip| parse_ip(ip)).collect::<Result<_, _>>()?,
        uris,
    };
    names.check()?;
    Ok(names)
}

fn usages(values: &[i32]) -> Result<Usages, RequestError> {
    if values.len() > MAX_USAGES {
        return Err(RequestError::TooMany { field: "usages", count: values.len(), max: MAX_USAGES });
    }
    values.iter().map(|value| usage(*value)).collect()
}

fn usage(value: i32) -> Result<Usage, RequestError> {
    match v1::Usage::try_from(value) {
        Ok(v1::Usage::DigitalSignature) => Ok(Usage::DigitalSignature),
        Ok(v1::Usage::KeyEncipherment) => Ok(Usage::KeyEncipherment),
        Ok(v1::Usage::ServerAuth) => Ok(Usage::ServerAuth),
        Ok(v1::Usage::ClientAuth) => Ok(Usage::ClientAuth),
        Ok(v1::Usage::Unspecified) | Err(_) => Err(RequestError::Enum { field: "usages", value }),
    }
}

fn key_algorithm(value: i32) -> Result<KeyAlgorithm, RequestError> {
    match v1::KeyAlgorithm::try_from(value) {
        Ok(v1::KeyAlgorithm::Unspecified | v1::KeyAlgorithm::EcdsaP256) => Ok(KeyAlgorithm::EcdsaP256),
        Ok(v1::KeyAlgorithm::EcdsaP384) => Ok(KeyAlgorithm::EcdsaP384),
        Ok(v1::KeyAlgorithm::Ed25519) => Ok(KeyAlgorithm::Ed25519),
        Ok(v1::KeyAlgorithm::Rsa2048) => Ok(KeyAlgorithm::Rsa2048),
        Ok(v1::KeyAlgorithm::Rsa3072) => Ok(KeyAlgorithm::Rsa3072),
        Ok(v1::KeyAlgorithm::Rsa4096) => Ok(KeyAlgorithm::Rsa4096),
        Err(_) => Err(RequestError::Enum { field: "generate", value }),
    }
}

fn lifetime(lifetime: prost_types::Duration) -> Result<Duration, RequestError> {
    let seconds = u64::try_from(lifetime.seconds).map_err(|_| RequestError::Lifetime)?;
    if lifetime.nanos != 0 || seconds == 0 || seconds > MAX_LIFETIME.as_secs() {
        return Err(RequestError::Lifetime);
    }
    Ok(Duration::from_secs(seconds))
}

/// The signer that a message names, if it names one.
pub(super) fn signer_name(name: String) -> Result<Option<String>, RequestError> {
    optional_name("signer_name", name, MAX_SIGNER_BYTES)
}

fn optional_name(field: &'static str, name: String, max: usize) -> Result<Option<String>, RequestError> {
    if name.len() > max {
        return Err(RequestError::TooLong { field, bytes: name.len(), max });
    }
    Ok((!name.is_empty()).then_some(name))
}

/// A certificate as its caller gets it, with the private key when the agent made it.
pub(super) fn certificate(id: &str, live: &Live) -> v1::Certificate {
    let credential = &live.credential;
    v1::Certificate {
        certificate_id: id.to_owned(),
        sequence: live.issued,
        certificate_chain: credential.chain_pem(),
        private_key: credential.key_pem().unwrap_or_default(),
        trust_bundle: live.bundle.1.pem(),
        serial_number: credential.chain().serial_hex(),
        not_before: Some(timestamp(credential.not_before())),
        not_after: Some(timestamp(credential.not_after())),
        renew_at: Some(timestamp(live.renew_at)),
        policy: credential.grant().policy().to_owned(),
        signer_name: credential.grant().signer().to_owned(),
    }
}

/// A live credential as `csrd status` shows it.
pub(super) fn credential_status(row: &Row) -> v1::CredentialStatus {
    let Row { id, workload, live, subscribers } = row;
    let grant = live.credential.grant();
    let renew_at = live.delay.as_ref().map_or(live.renew_at, |(_, delay)| delay.retry_at);
    v1::CredentialStatus {
        certificate_id: id.clone(),
        workload: Workload::to_string(workload),
        names: grant.names().to_strings(),
        signer_name: grant.signer().to_owned(),
        policy: grant.policy().to_owned(),
        not_after: Some(timestamp(live.credential.not_after())),
        renew_at: Some(timestamp(renew_at)),
        last_error: live.delay.as_ref().map(|(_, delay)| delay.message.clone()).unwrap_or_default(),
        subscribers: u32::try_from(*subscribers).unwrap_or(u32::MAX),
        serial_number: live.credential.chain().serial_hex(),
    }
}

/// One policy as the caller may see it.
pub(super) fn policy_view(view: View) -> v1::PolicyView {
    let View { policy, matches, mismatch, grants, offers } = view;
    v1::PolicyView { name: policy, matches, mismatch, grants, offers }
}

pub(super) fn timestamp(time: SystemTime) -> prost_types::Timestamp {
    time.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    type Request = v1::CertificateRequest;

    /// What the service says of a request that is `change`d from an empty one; empty when it says nothing.
    fn check(change: impl FnOnce(&mut Request), reason: &str, words: &str) {
        let mut request = Request::default();
        change(&mut request);
        let (said, why) = match ask(Some(request)) {
            Ok(_) => (String::new(), ""),
            Err(error) => (error.to_string(), error.reason()),
        };
        assert!(why == reason && said.contains(words), "{why}: {said}\nwanted {reason}: {words}");
    }

    fn lasting(seconds: i64, nanos: i32) -> impl FnOnce(&mut Request) {
        move |request| request.lifetime = Some(prost_types::Duration { seconds, nanos })
    }

    #[test]
    fn a_lifetime_is_whole_seconds_from_one_to_its_bound() {
        let most = i64::try_from(MAX_LIFETIME.as_secs()).unwrap();
        for seconds in [1, most] {
            check(lasting(seconds, 0), "", "");
        }
        for (seconds, nanos) in [(0, 0), (-1, 0), (i64::MIN, 0), (most + 1, 0), (i64::MAX, 0), (1, 1), (1, -1)] {
            check(lasting(seconds, nanos), "REQUEST_INVALID", "lifetime: it must be whole seconds");
        }
    }

    #[test]
    fn lists_and_texts_are_taken_up_to_their_bounds() {
        let server = i32::from(v1::Usage::ServerAuth);
        check(|it| it.usages = vec![server; MAX_USAGES], "", "");
        check(|it| it.usages = vec![server; MAX_USAGES + 1], "REQUEST_INVALID", "usages: 17 given, at most 16");
        let text = |bytes| "x".repeat(bytes);
        check(|it| it.signer_name = text(MAX_SIGNER_BYTES), "", "");
        check(|it| it.policy = text(MAX_NAME_BYTES), "", "");
        check(|it| it.signer_name = text(MAX_SIGNER_BYTES + 1), "REQUEST_INVALID", "signer_name: 572 bytes given");
        check(|it| it.policy = text(MAX_NAME_BYTES + 1), "REQUEST_INVALID", "policy: 254 bytes given");
        let names = |count: usize| (0..count).map(|n| format!("n{n}.example.org")).collect();
        check(|it| it.dns_names = names(MAX_NAMES), "", "");
        check(|it| it.dns_names = names(MAX_NAMES + 1), "NAME_INVALID", "65");
        let mixed = |ips: usize| {
            move |it: &mut Request| {
                it.dns_names = vec!["a.example.org".into()];
                it.uris = vec!["spiffe://example.org/a".into()];
                it.ip_addresses = (0..ips).map(|n| format!("10.0.0.{n}")).collect();
            }
        };
        check(mixed(MAX_NAMES - 2), "", "");
        check(mixed(MAX_NAMES - 1), "NAME_INVALID", "dns_names, ip_addresses and uris");
    }

    #[test]
    fn what_the_agent_does_not_know_is_refused_by_field_and_value() {
        check(|it| it.usages = vec![0], "REQUEST_INVALID", "usages: 0 is not a value");
        check(|it| it.usages = vec![99], "REQUEST_INVALID", "usages: 99 is not a value");
        let generate = |value| move |it: &mut Request| it.key = Some(v1::certificate_request::Key::Generate(value));
        check(generate(0), "", "");
        check(generate(99), "REQUEST_INVALID", "generate: 99 is not a value");
        check(|it| it.dns_names = vec!["A b".into()], "NAME_INVALID", "");
        let held = |it: &mut Request| it.key = Some(v1::certificate_request::Key::Held(v1::HeldKey::default()));
        check(held, "CSR_MALFORMED", "held.pkcs10: ");
        let named_twice = |it: &mut Request| {
            held(it);
            it.dns_names = vec!["a.example.org".into()];
        };
        check(named_twice, "REQUEST_INVALID", "with held.pkcs10 the names are those of the PKCS#10 request");
        assert_eq!(ask(None).unwrap_err().to_string(), "request must be set");
    }
}
