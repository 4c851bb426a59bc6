//! The SPIFFE Workload API: each status of its standard, each push. Time is paused, and connections are pipes.

use std::{fmt::Debug, num::NonZeroU32, sync::atomic::Ordering, time::Duration};

use csrd::{
    account::Limits,
    proto::spiffe::{
        JwtBundlesRequest, JwtsvidRequest, ValidateJwtsvidRequest, WitBundlesRequest, WitsvidRequest,
        X509BundlesRequest, X509BundlesResponse, X509svidRequest, X509svidResponse,
        spiffe_workload_api_client::SpiffeWorkloadApiClient,
    },
    rate::Rate,
    server::MAX_IDENTITIES,
    signer::embedded::NAME,
    x509::PrivateKey,
};
use tokio::time::timeout;
use tonic::{Code, Request, Status, Streaming, transport::Channel};

use crate::{
    agent::reason,
    host::{Host, Signer, UID},
};

const OTHER: &str = "example.org/other";
pub(crate) const TD: &str = "spiffe://example.org";
/// Far above any timer of the agent's; paused time costs nothing.
pub(crate) const NEVER: Duration = Duration::from_secs(24 * 3600);

/// A policy named `name`, signed by `signer`, that offers `offers`.
pub(crate) fn policy(name: &str, signer: &str, offers: &[&str]) -> String {
    let offers = offers.iter().map(|offer| format!("  - {{{offer}}}\n")).collect::<String>();
    let offers = if offers.is_empty() { String::new() } else { format!("  offer:\n{offers}") };
    format!(
        "apiVersion: csrd.dev/v1alpha1\nkind: CertificatePolicy\nmetadata: {{name: {name}}}\nspec:\n  \
         match: {{unix: {{uids: [{UID}]}}}}\n  signer: {signer}\n  \
         allow: {{lifetime: {{min: 10m, default: 1h, max: 24h}}}}\n{offers}---\n"
    )
}

pub(crate) fn id(path: &str) -> String {
    format!("spiffeId: '{TD}/{path}'")
}

fn web_and_db() -> String {
    policy(
        "web",
        NAME,
        &[&format!("{}, hint: internal", id("web")), &format!("{}, dnsNames: [db.example.org]", id("db"))],
    )
}

struct Scene {
    host: Host,
    client: SpiffeWorkloadApiClient<Channel>,
}

impl Scene {
    async fn new(policy: &str) -> Self {
        Self::of(Host::new(policy, &[Signer::new(NAME, Duration::ZERO)], Limits::default())).await
    }

    async fn of(mut host: Host) -> Self {
        let client = SpiffeWorkloadApiClient::new(host.connect().await);
        Self { host, client }
    }

    async fn svids(&mut self) -> Result<Streaming<X509svidResponse>, Status> {
        Ok(self.client.fetch_x509svid(with_header(X509svidRequest {})).await?.into_inner())
    }

    async fn bundles(&mut self) -> Result<Streaming<X509BundlesResponse>, Status> {
        Ok(self.client.fetch_x509_bundles(with_header(X509BundlesRequest {})).await?.into_inner())
    }

    /// What a workload is told to which nothing is given.
    async fn refused(&mut self) -> Status {
        let svids = match self.svids().await {
            Ok(mut stream) => end(&mut stream).await,
            Err(status) => status,
        };
        let bundles = self.bundles().await.err();
        if let Some(bundles) = bundles {
            assert_eq!((bundles.code(), bundles.message()), (svids.code(), svids.message()));
        }
        svids
    }
}

fn with_header<T>(message: T) -> Request<T> {
    with_headers(&["true"], message)
}

fn with_headers<T>(values: &[&'static str], message: T) -> Request<T> {
    let mut request = Request::new(message);
    for value in values {
        request.metadata_mut().append("workload.spiffe.io", value.parse().unwrap());
    }
    request
}

pub(crate) async fn next<T: Debug>(stream: &mut Streaming<T>) -> T {
    let message = timeout(NEVER, stream.message()).await.expect("a message in time");
    message.expect("no error").expect("a stream never ends with OK")
}

/// The status after which nothing comes.
pub(crate) async fn end<T: Debug>(stream: &mut Streaming<T>) -> Status {
    let message = timeout(NEVER, stream.message()).await.expect("an end in time");
    let status = message.map(|message| panic!("{message:?}, and not an error")).unwrap_err();
    assert!(stream.message().await.unwrap().is_none());
    status
}

pub(crate) async fn silent<T: Debug>(stream: &mut Streaming<T>, period: Duration) {
    assert!(timeout(period, stream.message()).await.is_err());
}

fn ids(response: &X509svidResponse) -> Vec<&str> {
    response.svids.iter().map(|svid| svid.spiffe_id.trim_start_matches(TD)).collect()
}

#[tokio::test(start_paused = true)]
async fn every_method_wants_the_security_header_once_and_exactly() {
    let mut scene = Scene::new(&web_and_db()).await;
    let client = &mut scene.client;
    let none: [&[&str]; 5] = [&[], &["false"], &["True"], &["true", "true"], &["true", "false"]];
    for headers in none {
        let statuses = [
            client.fetch_x509svid(with_headers(headers, X509svidRequest {})).await.unwrap_err(),
            client.fetch_x509_bundles(with_headers(headers, X509BundlesRequest {})).await.unwrap_err(),
            client.fetch_jwtsvid(with_headers(headers, JwtsvidRequest::default())).await.unwrap_err(),
            client.fetch_jwt_bundles(with_headers(headers, JwtBundlesRequest {})).await.unwrap_err(),
            client.validate_jwtsvid(with_headers(headers, ValidateJwtsvidRequest::default())).await.unwrap_err(),
            client.fetch_witsvid(with_headers(headers, WitsvidRequest::default())).await.unwrap_err(),
            client.fetch_wit_bundles(with_headers(headers, WitBundlesRequest {})).await.unwrap_err(),
        ];
        for status in statuses {
            assert_eq!((status.code(), reason(&status).as_str()), (Code::InvalidArgument, "SECURITY_HEADER_MISSING"));
            assert!(status.message().starts_with("security header missing from request"), "{status}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_profiles_that_are_switched_off_are_unimplemented() {
    let mut scene = Scene::new(&web_and_db()).await;
    let client = &mut scene.client;
    let statuses = [
        client.fetch_jwtsvid(with_header(JwtsvidRequest::default())).await.unwrap_err(),
        client.fetch_jwt_bundles(with_header(JwtBundlesRequest {})).await.unwrap_err(),
        client.validate_jwtsvid(with_header(ValidateJwtsvidRequest::default())).await.unwrap_err(),
        client.fetch_witsvid(with_header(WitsvidRequest::default())).await.unwrap_err(),
        client.fetch_wit_bundles(with_header(WitBundlesRequest {})).await.unwrap_err(),
    ];
    for status in statuses {
        assert_eq!((status.code(), reason(&status).as_str()), (Code::Unimplemented, "PROFILE_DISABLED"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_workload_without_identity_is_told_so_in_the_words_of_the_standards_clients_and_why() {
    let other = web_and_db().replace(&UID.to_string(), "7");
    let ruled_out = policy("web", NAME, &[&id("web")])
        .replace("  offer:", "  rules: [{expression: 'false', message: not today}]\n  offer:");
    for (policies, expected, words) in [
        (String::new(), "NO_POLICY_MATCHES", "no policy matches uid 1000 /usr/bin/test"),
        (other, "NO_POLICY_MATCHES", "no policy matches uid 1000 /usr/bin/test"),
        (policy("web", NAME, &[]), "NOTHING_OFFERED", "policy web: it offers nothing unasked"),
        (
            policy("web", NAME, &["dnsNames: [a.example.org]"]),
            "NOTHING_OFFERED",
            "policy web: an offer has no spiffeId",
        ),
        (policy("web", NAME, &[&id("{unix.user}")]), "NOTHING_OFFERED", "policy web: an offer is void: "),
        (ruled_out, "RULE_NOT_MET", "policy web: rule not met: not today"),
    ] {
        let mut scene = Scene::new(&policies).await;
        let status = scene.refused().await;
        assert_eq!((status.code(), reason(&status).as_str()), (Code::PermissionDenied, expected), "{status}");
        assert!(status.message().starts_with(&format!("no identity issued: {words}")), "{status}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_message_is_the_whole_state_in_the_form_of_the_standard() {
    let mut scene = Scene::new(&web_and_db()).await;
    let message = next(&mut scene.svids().await.unwrap()).await;
    assert_eq!(ids(&message), ["/web", "/db"], "as offered: the first is the default");
    assert_eq!([&message.svids[0].hint, &message.svids[1].hint], ["internal", ""]);
    assert!(message.crl.is_empty() && message.federated_bundles.is_empty());
    for svid in &message.svids {
        let (rest, leaf) = x509_parser::parse_x509_certificate(&svid.x509_svid).unwrap();
        assert!(rest.is_empty(), "the embedded CA is a root and has no intermediates");
        let names = format!("{:?}", leaf.subject_alternative_name().unwrap().unwrap().value.general_names);
        assert!(names.contains(&format!("URI({:?})", svid.spiffe_id)), "{names}");
        assert_eq!(names.contains("db.example.org"), svid.spiffe_id.ends_with("/db"), "{names}");
        let key = PrivateKey::from_pem(pem::encode(&pem::Pem::new("PRIVATE KEY", &*svid.x509_svid_key)).as_bytes());
        assert_eq!(key.unwrap().public_key().spki_der(), leaf.public_key().raw);
        let (rest, root) = x509_parser::parse_x509_certificate(&svid.bundle).unwrap();
        assert!(rest.is_empty() && root.is_ca());
        leaf.verify_signature(Some(root.public_key())).unwrap();
    }
    let bundles = next(&mut scene.bundles().await.unwrap()).await;
    assert_eq!(bundles.bundles.keys().collect::<Vec<_>>(), [TD]);
    assert_eq!(bundles.bundles[TD], message.svids[0].bundle);
}

#[tokio::test(start_paused = true)]
async fn renewals_are_pushed_with_everything_that_is_still_in_force() {
    let mut scene = Scene::new(&web_and_db()).await;
    let mut stream = scene.svids().await.unwrap();
    let mut last = next(&mut stream).await;
    for _ in 0..5 {
        let message = next(&mut stream).await;
        assert_eq!(ids(&message), ["/web", "/db"]);
        let chains =
            |message: &X509svidResponse| message.svids.iter().map(|it| it.x509_svid.clone()).collect::<Vec<_>>();
        let (before, now) = (chains(&last), chains(&message));
        let renewed = (0..2).filter(|at| before[*at] != now[*at]).count();
        assert!(renewed > 0, "a message says something new");
        last = message;
    }
    assert!(scene.host.counts(r#"csrd_renewals_total{result="ok",reason=""} 5"#), "{}", scene.host.metrics.encode());
}

#[tokio::test(start_paused = true)]
async fn streams_of_one_workload_share_their_certificates_and_roots_alone_cost_none() {
    let mut scene = Scene::new(&web_and_db()).await;
    let mut bundles = scene.bundles().await.unwrap();
    next(&mut bundles).await;
    assert!(scene.host.counts("csrd_credentials 0") && scene.host.counts("csrd_subscribers 1"));
    let (mut first, mut second) = (scene.svids().await.unwrap(), scene.svids().await.unwrap());
    assert_eq!(next(&mut first).await, next(&mut second).await);
    assert!(scene.host.counts("csrd_credentials 2") && scene.host.counts("csrd_subscribers 3"));
    drop((bundles, first, second));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(scene.host.counts("csrd_subscribers 0"));
}

#[tokio::test(start_paused = true)]
async fn new_roots_are_pushed_to_both_kinds_of_stream() {
    let (ca, next_ca) = (Signer::new(NAME, Duration::ZERO), Signer::new(NAME, Duration::ZERO));
    let mut scene = Scene::of(Host::new(&web_and_db(), std::slice::from_ref(&ca), Limits::default())).await;
    let (mut svids, mut bundles) = (scene.svids().await.unwrap(), scene.bundles().await.unwrap());
    let (before, _) = (next(&mut svids).await, next(&mut bundles).await);
    ca.add_root_of(&next_ca);
    let both = ca.roots.borrow().concatenated_der();
    let (after, roots) = (next(&mut svids).await, next(&mut bundles).await);
    assert!(after.svids.iter().all(|svid| svid.bundle == both));
    assert_eq!(after.svids[0].x509_svid, before.svids[0].x509_svid);
    assert_eq!(roots.bundles[TD], both);
    ca.roots.send_modify(|_| {});
    silent(&mut bundles, NEVER).await;
}

#[tokio::test(start_paused = true)]
async fn identities_follow_the_policies_and_the_last_one_takes_the_stream_with_it() {
    let mut scene = Scene::new(&policy("web", NAME, &[&id("web")])).await;
    let (mut svids, mut bundles) = (scene.svids().await.unwrap(), scene.bundles().await.unwrap());
    let first = next(&mut svids).await;
    next(&mut bundles).await;
    assert_eq!(ids(&first), ["/web"]);

    scene.host.set_policy(&web_and_db());
    let hinted = next(&mut svids).await;
    assert_eq!((ids(&hinted), hinted.svids[0].hint.as_str()), (vec!["/web"], "internal"), "at once, what is at hand");
    let both = next(&mut svids).await;
    assert_eq!(ids(&both), ["/web", "/db"]);
    assert_eq!(both.svids[0].x509_svid, first.svids[0].x509_svid, "what is at hand stays");

    scene.host.set_policy(&policy("web", NAME, &[&id("db"), &id("web")]));
    let turned = next(&mut svids).await;
    assert_eq!(ids(&turned), ["/db", "/web"], "the default is the first one offered");

    scene.host.set_policy(&policy("web", NAME, &["spiffeId: spiffe://other.org/web", &id("web")]));
    let (moved, roots) = (next(&mut svids).await, next(&mut bundles).await);
    assert_eq!(ids(&moved), ["spiffe://other.org/web", "/web"]);
    let mut domains: Vec<_> = roots.bundles.into_keys().collect();
    domains.sort();
    assert_eq!(domains, [TD, "spiffe://other.org"]);

    scene.host.set_policy("");
    for status in [end(&mut svids).await, end(&mut bundles).await] {
        assert_eq!(status.code(), Code::PermissionDenied);
        assert!(status.message().starts_with("no identity issued: no policy matches"), "{status}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_right_that_comes_back_before_anybody_looks_ends_nothing() {
    let mut scene = Scene::new(&web_and_db()).await;
    let mut svids = scene.svids().await.unwrap();
    let before = next(&mut svids).await;
    scene.host.set_policy("");
    scene.host.set_policy(&web_and_db());
    silent(&mut svids, Duration::from_secs(60)).await;
    scene.host.set_policy(&policy("web", NAME, &[&id("web")]));
    let after = next(&mut svids).await;
    assert_eq!((ids(&after), &after.svids[0].x509_svid), (vec!["/web"], &before.svids[0].x509_svid));
}

#[tokio::test(start_paused = true)]
async fn an_identity_whose_signer_fails_holds_up_no_other_and_joins_when_it_can() {
    let (ca, other) = (Signer::new(NAME, Duration::ZERO), Signer::new(OTHER, Duration::ZERO));
    other.down.store(true, Ordering::Relaxed);
    let policies = policy("a", NAME, &[&id("a")]) + &policy("b", OTHER, &[&id("b")]);
    let mut scene = Scene::of(Host::new(&policies, &[ca.clone(), other.clone()], Limits::default())).await;
    let mut svids = scene.svids().await.unwrap();
    assert_eq!(ids(&next(&mut svids).await), ["/a"]);
    silent(&mut svids, Duration::from_secs(60)).await;
    other.down.store(false, Ordering::Relaxed);
    let both = next(&mut svids).await;
    assert_eq!(ids(&both), ["/a", "/b"]);
    let roots = [&ca, &other].map(|signer| signer.roots.borrow().concatenated_der()).concat();
    assert!(both.svids.iter().all(|svid| svid.bundle == roots), "one trust domain has one set of roots");
}

#[tokio::test(start_paused = true)]
async fn nothing_takes_the_place_of_the_default_identity() {
    let (ca, other) = (Signer::new(NAME, Duration::ZERO), Signer::new(OTHER, Duration::ZERO));
    ca.down.store(true, Ordering::Relaxed);
    let policies = policy("a", NAME, &[&id("a")]) + &policy("b", OTHER, &[&id("b")]);
    let mut scene = Scene::of(Host::new(&policies, &[ca.clone(), other], Limits::default())).await;
    let status = end(&mut scene.svids().await.unwrap()).await;
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "CA_NOT_VALID"));
    assert_eq!(next(&mut scene.bundles().await.unwrap()).await.bundles.len(), 1, "roots are there all the same");
    ca.down.store(false, Ordering::Relaxed);
    assert_eq!(ids(&next(&mut scene.svids().await.unwrap()).await), ["/a", "/b"]);
}

#[tokio::test(start_paused = true)]
async fn what_has_expired_is_told_to_nobody() {
    for (down, left) in [(OTHER, Some("/a")), (NAME, None)] {
        let signers = [Signer::new(NAME, Duration::ZERO), Signer::new(OTHER, Duration::ZERO)];
        let policies = policy("a", NAME, &[&id("a")]) + &policy("b", OTHER, &[&id("b")]);
        let mut scene = Scene::of(Host::new(&policies, &signers, Limits::default())).await;
        let mut svids = scene.svids().await.unwrap();
        assert_eq!(ids(&next(&mut svids).await), ["/a", "/b"]);
        signers[usize::from(down != NAME)].down.store(true, Ordering::Relaxed);
        let mut last = svids.message().await;
        for _ in 0..3 {
            // Certificates last an hour, and are renewed before it is over.
            last = match last {
                Ok(_) => svids.message().await,
                Err(status) => Err(status),
            };
        }
        match (last, left) {
            (Ok(message), Some(left)) => assert_eq!(ids(&message.unwrap()), [left]),
            (Err(status), None) => {
                assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "CERTIFICATE_EXPIRED"))
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_may_pass_by_itself_is_unavailable() {
    let mut unknown = Scene::new(&policy("a", "example.org/nobody", &[&id("a")])).await;
    let (mut svids, mut bundles) = (unknown.svids().await.unwrap(), unknown.bundles().await.unwrap());
    for status in [end(&mut svids).await, end(&mut bundles).await] {
        assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "SIGNER_UNKNOWN"));
    }
    let known = policy("0", NAME, &[&id("known")]) + &policy("a", "example.org/nobody", &[&id("a")]);
    let mut beside = Scene::new(&known).await;
    assert_eq!(ids(&next(&mut beside.svids().await.unwrap()).await), ["/known"]);

    let one = Rate { per_second: NonZeroU32::MIN, burst: NonZeroU32::MIN };
    let ca = Signer::new(NAME, Duration::ZERO);
    let host = Host::with_rate(&policy("a", NAME, &[&id("a")]), &[ca], Limits::default(), one);
    let mut limited = Scene::of(host).await;
    next(&mut limited.svids().await.unwrap()).await;
    limited.host.set_policy(&policy("a", NAME, &[&id("b")]));
    let status = end(&mut limited.svids().await.unwrap()).await;
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "RATE_LIMITED"));
}

#[tokio::test(start_paused = true)]
async fn streams_end_at_the_stop_with_unavailable() {
    let mut scene = Scene::new(&web_and_db()).await;
    let (mut svids, mut bundles) = (scene.svids().await.unwrap(), scene.bundles().await.unwrap());
    next(&mut svids).await;
    next(&mut bundles).await;
    scene.host.stop.cancel();
    for status in [end(&mut svids).await, end(&mut bundles).await] {
        assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "AGENT_STOPPING"));
    }
    let slow = Signer::new(NAME, Duration::from_secs(3600));
    let mut waiting = Scene::of(Host::new(&web_and_db(), &[slow], Limits::default())).await;
    let mut svids = waiting.svids().await.unwrap();
    silent(&mut svids, Duration::from_secs(1)).await;
    waiting.host.stop.cancel();
    assert_eq!(end(&mut svids).await.code(), Code::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn a_workload_has_identities_up_to_the_bound() {
    let offers: Vec<_> = (0..=MAX_IDENTITIES).map(|n| id(&format!("n{n}"))).collect();
    let policies = |count: usize| {
        let policies = offers[..count].chunks(16).enumerate();
        let policy = |(n, offers): (usize, &[String])| {
            let offers: Vec<_> = offers.iter().map(String::as_str).collect();
            policy(&format!("p{}", n + 10), NAME, &offers)
        };
        policies.map(policy).collect::<String>()
    };
    for count in [MAX_IDENTITIES, MAX_IDENTITIES + 1] {
        let mut scene = Scene::new(&policies(count)).await;
        let message = next(&mut scene.svids().await.unwrap()).await;
        assert_eq!(message.svids.len(), MAX_IDENTITIES);
        assert_eq!(message.svids[MAX_IDENTITIES - 1].spiffe_id, format!("{TD}/n{}", MAX_IDENTITIES - 1));
    }
}
