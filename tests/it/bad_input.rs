//! Input that nobody should send, through a real agent's socket: each gets its code, its reason, the field and the bound.

use csrd::{
    proto::v1::{self, CertificateRequest, certificate_request::Key},
    server::MAX_REQUEST_BYTES,
};
use prost::Message as _;
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, KeyPair, SanType};
use tonic::Code;

use crate::agent::{Agent, ask, follow, policy, reason};

/// Sends `request` to both calls that take one: both refuse it, for `expected` and in `words`.
async fn check(agent: &Agent, request: CertificateRequest, code: Code, expected: &str, words: &str) {
    let issued = agent.issue(request.clone()).await.map(drop);
    let subscribed = agent.subscribe(follow(request)).await.map(drop);
    for answer in [issued, subscribed] {
        let refused = answer.expect_err(words);
        assert_eq!((refused.code(), reason(&refused).as_str()), (code, expected), "{}", refused.message());
        assert!(refused.message().contains(words), "{:?} does not say {words:?}", refused.message());
    }
}

fn named(count: usize) -> CertificateRequest {
    CertificateRequest { dns_names: (0..count).map(|n| format!("n{n}.example.org")).collect(), ..Default::default() }
}

/// A good request, but for one thing.
fn but(change: impl FnOnce(&mut CertificateRequest)) -> CertificateRequest {
    let mut request = ask("a.example.org");
    change(&mut request);
    request
}

fn held(pkcs10: impl Into<Vec<u8>>) -> CertificateRequest {
    let held = v1::HeldKey { pkcs10: pkcs10.into().into(), rotate_key: false };
    CertificateRequest { key: Some(Key::Held(held)), ..Default::default() }
}

#[tokio::test]
async fn a_name_that_no_certificate_can_carry_is_refused_with_its_rule() {
    let agent = Agent::start(&policy()).await;
    let bad = async |request, words: &str| check(&agent, request, Code::InvalidArgument, "NAME_INVALID", words).await;
    for (name, words) in [
        ("A.example.org", "a-z"),
        ("a.example.org.", "1 to 63 bytes"),
        ("a\0.example.org", "a-z"),
        ("ä.example.org", "xn--"),
        ("a.*.example.org", "whole first label"),
        ("*.org", "two labels"),
        ("10.0.0.1", "IP name"),
        (&format!("{}.example.org", "a".repeat(64)), "63 bytes"),
        (&"a.".repeat(127), "253 bytes"),
    ] {
        bad(ask(name), words).await;
    }
    bad(but(|request| request.ip_addresses = vec!["10.0.0.300".into()]), "no IPv4 or IPv6 address").await;
    bad(but(|request| request.uris = vec!["spiffe://Example.org/x".into()]), "no SPIFFE ID").await;
    let long = format!("https://example.org/{}", "x".repeat(2048));
    bad(but(|request| request.uris = vec![long]), "2048 bytes").await;

    bad(named(10_000), "10000 given, at most 64 allowed").await;
    bad(named(65), "65 given, at most 64 allowed").await;
    agent.issue(named(64)).await.expect("at the bound");
    let common = |chars| CertificateRequest { common_name: "x".repeat(chars), ..Default::default() };
    bad(common(65), "1 to 64").await;
    agent.issue(common(64)).await.expect("at the bound");
}

#[tokio::test]
async fn a_field_beside_the_names_is_refused_with_its_bound() {
    let agent = Agent::start(&policy()).await;
    let bad =
        async |request, words: &str| check(&agent, request, Code::InvalidArgument, "REQUEST_INVALID", words).await;
    bad(but(|request| request.usages = vec![99]), "usages: 99").await;
    bad(but(|request| request.usages = vec![1; 17]), "usages: 17 given, at most 16 allowed").await;
    bad(but(|request| request.key = Some(Key::Generate(99))), "generate: 99").await;
    bad(but(|request| request.policy = "x".repeat(254)), "policy: 254 bytes given, at most 253 allowed").await;
    for (seconds, nanos) in [(0, 0), (-1, 0), (60, 1), (i64::MAX, 0)] {
        let lifetime = Some(prost_types::Duration { seconds, nanos });
        bad(but(|request| request.lifetime = lifetime), "lifetime: it must be whole seconds").await;
    }
    let missing = agent.client().await.issue_certificate(v1::IssueCertificateRequest { request: None }).await;
    assert_eq!(reason(&missing.expect_err("nothing asked")), "REQUEST_INVALID");
}

#[tokio::test]
async fn a_message_is_read_up_to_its_bound_and_refused_one_past_it() {
    let agent = Agent::start(&policy()).await;
    for (past, code, words) in
        [(0, Code::InvalidArgument, "longer than 2048 bytes"), (1, Code::OutOfRange, &*MAX_REQUEST_BYTES.to_string())]
    {
        let of = |bytes| {
            let request = CertificateRequest { uris: vec!["x".repeat(bytes)], ..Default::default() };
            v1::IssueCertificateRequest { request: Some(request) }
        };
        let around = of(MAX_REQUEST_BYTES).encoded_len() - MAX_REQUEST_BYTES;
        let message = of(MAX_REQUEST_BYTES - around + past);
        assert_eq!(message.encoded_len(), MAX_REQUEST_BYTES + past);
        let refused = agent.client().await.issue_certificate(message).await.expect_err("too long");
        assert_eq!(refused.code(), code, "{refused:?}");
        assert!(refused.message().contains(words), "{:?} does not say {words:?}", refused.message());
    }
}

/// `openssl req -new -newkey rsa:1024 -subj /CN=web -sha256`
const RSA_1024: &str = "-----BEGIN CERTIFICATE REQUEST-----
MIIBTTCBtwIBADAOMQwwCgYDVQQDDAN3ZWIwgZ8wDQYJKoZIhvcNAQEBBQADgY0A
MIGJAoGBAMEIDzgvl75uGHM3qIFhfA6qVPVNk76w4E5AW7iaZsHG1JShxocW/O5/
uJJVCLy1QnHVM7DQ0bbPI4QSNOH4BsGDq4CKhlWqUlttPT9MY7JfCK/7v8vtof1u
7f2Y629beaAhVdAOJsOMPYcfeTXfq7qDnkZL40EhExFFqM4jm1P5AgMBAAGgADAN
BgkqhkiG9w0BAQsFAAOBgQBs6qqW/F2sqW7YY5+0wDRaQXu6oFcYou3uNTP+do0q
rX12IHH3LMdWOGjOuGtP9xCMMJyHxEmYYbHcm6Ru4Ukg6usc5lGG80Q120ipWvG0
KA9eVSadzmxE9WrQ9BkxMUnmpzp6xExEZrBAhf4mpP1/NTXTtReM5AoBG9DBr1eJ
mg==
-----END CERTIFICATE REQUEST-----
";

/// A PKCS#10 request with these DNS names and extensions, signed with a key of its own.
fn pkcs10(names: &[&str], extensions: &[(&[u64], &[u8])]) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names.iter().map(|name| SanType::DnsName((*name).try_into().unwrap())).collect();
    params.custom_extensions = extensions
        .iter()
        .map(|(oid, content)| {
            let mut extension = CustomExtension::from_oid_content(oid, content.to_vec());
            extension.set_criticality(true);
            extension
        })
        .collect();
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
}

#[tokio::test]
async fn a_pkcs10_request_that_is_wrong_in_any_part_is_refused_with_its_rule() {
    let agent = Agent::start(&policy()).await;
    let bad = async |pkcs10: Vec<u8>, reason: &str, words: &str| {
        let words = format!("held.pkcs10: {words}");
        check(&agent, held(pkcs10), Code::InvalidArgument, reason, &words).await;
    };
    for garbage in [&b"garbage"[..], &[]] {
        bad(garbage.to_vec(), "CSR_MALFORMED", "no PKCS#10 request found").await;
    }
    let good = pkcs10(&["a.example.org"], &[]);
    agent.issue(held(good.clone())).await.expect("a good one is granted");
    bad(good[..good.len() - 1].to_vec(), "CSR_MALFORMED", "the PKCS#10 request is truncated").await;
    bad([good.as_slice(), &[0]].concat(), "CSR_MALFORMED", "1 bytes follow the end").await;
    let mut other = good.clone();
    *other.last_mut().unwrap() ^= 1;
    bad(other, "CSR_SIGNATURE", "the signature of the PKCS#10 request does not verify").await;
    bad(RSA_1024.into(), "CSR_KEY", "the public key is refused").await;

    // basicConstraints with CA:TRUE, and an extension of nobody's.
    let ca: (&[u64], &[u8]) = (&[2, 5, 29, 19], &[0x30, 3, 1, 1, 0xff]);
    bad(pkcs10(&["a.example.org"], &[ca]), "CSR_CERTIFICATE_AUTHORITY", "extensions: basicConstraints").await;
    let unknown: (&[u64], &[u8]) = (&[1, 3, 6, 1, 4, 1, 55555, 1], &[5, 0]);
    let words = "extensions: 1.3.6.1.4.1.55555.1 is critical and not supported";
    bad(pkcs10(&["a.example.org"], &[unknown]), "CSR_EXTENSION", words).await;

    let names: Vec<_> = (0..10_000).map(|n| format!("n{n}.example.org")).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    bad(pkcs10(&names, &[]), "CSR_TOO_LONG", "a PKCS#10 request has at most 16384 bytes").await;
    bad(pkcs10(&names[..65], &[]), "CSR_NAME", "subject alternative names: 65 given, at most 64 allowed").await;
    agent.issue(held(pkcs10(&names[..64], &[]))).await.expect("at the bound");
    for name in ["a.example.org\0.example.com", "a.*.example.org", "*.org"] {
        bad(pkcs10(&[name], &[]), "CSR_NAME", &format!("dns_names: {name:?} is refused")).await;
    }

    let beside = CertificateRequest { dns_names: vec!["a.example.org".into()], ..held(good) };
    check(&agent, beside, Code::InvalidArgument, "REQUEST_INVALID", "with held.pkcs10").await;
}

#[tokio::test]
async fn what_no_policy_allows_is_denied_in_its_words() {
    let agent = Agent::start(&policy()).await;
    let denied = async |request, reason: &str, words: &str| {
        check(&agent, request, Code::PermissionDenied, reason, words).await;
    };
    denied(ask("a.example.com"), "NAME_NOT_ALLOWED", "policy test: dnsNames: \"a.example.com\"").await;
    denied(ask("*.example.org"), "NAME_NOT_ALLOWED", "policy test: wildcardDnsNames: \"*.example.org\"").await;
    denied(held(pkcs10(&["*.example.org"], &[])), "NAME_NOT_ALLOWED", "wildcardDnsNames: \"*.example.org\"").await;
    let lifetime = Some(prost_types::Duration { seconds: 86_401, nanos: 0 });
    denied(but(|request| request.lifetime = lifetime), "LIFETIME_NOT_ALLOWED", "24h").await;
    denied(but(|request| request.policy = "other".into()), "NO_POLICY_MATCHES", "no policy named \"other\"").await;
}

#[tokio::test]
async fn what_this_agent_does_not_have_is_not_found() {
    let agent = Agent::start(&policy()).await;
    let unknown = v1::SubscribeRequest { certificate_id: "no such id".into(), ..Default::default() };
    let unknown = agent.subscribe(unknown).await.expect_err("no such id");
    assert_eq!((unknown.code(), reason(&unknown).as_str()), (Code::NotFound, "CERTIFICATE_UNKNOWN"));
    let bundle = v1::WatchTrustBundleRequest { signer_name: "none".into() };
    let unknown = agent.client().await.watch_trust_bundle(bundle).await.expect_err("no such signer");
    assert_eq!((unknown.code(), reason(&unknown).as_str()), (Code::FailedPrecondition, "SIGNER_UNKNOWN"));
}
