//! The hub under paused time, over a real embedded CA whose answers a script can delay and fail.

mod bounds;
mod model;
mod pods;
mod renewal;
mod turns;

use std::{
    collections::BTreeSet,
    num::NonZeroU32,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    account::Limits,
    attest::{PodFacts, UnixFacts, pods::Scope},
    policy::{EMBEDDED, Source},
    signer::{SignError, Signing, SigningRequest, embedded, kubernetes},
    x509::{DnsName, KeyAlgorithm, Names, PrivateKey, Usages},
};

const HOUR: Duration = Duration::from_secs(3600);

/// A signer that counts, waits and fails as it is told, and never lets two flights for one certificate pass.
#[derive(Debug)]
struct Scripted {
    ca: embedded::Embedded,
    delay: Mutex<Duration>,
    failing: Mutex<Option<SignError>>,
    calls: AtomicUsize,
    /// Names whose certificates are being signed.
    flying: Mutex<BTreeSet<Vec<String>>>,
    bundle: watch::Sender<Arc<Bundle>>,
}

impl Sign for Scripted {
    fn name(&self) -> &str {
        embedded::NAME
    }

    fn sign<'a>(&'a self, request: SigningRequest<'a>) -> Signing<'a> {
        Box::pin(async move {
            self.calls.fetch_add(1, Ordering::Relaxed);
            let mut names = request.grant.names().to_strings();
            names.push(request.workload.to_string());
            assert!(self.flying.lock().unwrap().insert(names.clone()), "two flights for {names:?}");
            let delay = *self.delay.lock().unwrap();
            sleep(delay).await;
            self.flying.lock().unwrap().remove(&names);
            let failing = self.failing.lock().unwrap().clone();
            match failing {
                Some(error) => Err(error),
                None => self.ca.sign(request).await,
            }
        })
    }

    fn bundle(&self) -> watch::Receiver<Arc<Bundle>> {
        self.bundle.subscribe()
    }

    fn ready(&self) -> Result<(), SignError> {
        self.ca.ready()
    }
}

/// A hub that runs, and what it stands on.
struct Bench {
    hub: Hub,
    signer: Arc<Scripted>,
    policies: watch::Sender<Arc<PolicySet>>,
    pods: Pods,
    clock: Clock,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl Bench {
    fn new() -> Self {
        Self::with_rates(1_000_000, 1_000_000)
    }

    fn with_rates(signer: u32, principal: u32) -> Self {
        Self::with(rate(signer), rate(principal))
    }

    fn with(signer_rate: Rate, principal_rate: Rate) -> Self {
        Self::with_all(signer_rate, principal_rate, Limits::default())
    }

    fn with_limits(limits: Limits) -> Self {
        Self::with_all(rate(1_000_000), rate(1_000_000), limits)
    }

    fn with_all(signer_rate: Rate, principal_rate: Rate, limits: Limits) -> Self {
        let clock = Clock::paused(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        let metrics = Metrics::new();
        let ca = embedded::Embedded::ephemeral(embedded::DEFAULT_CA_LIFETIME, &clock, metrics.signer("embedded"));
        let ca = ca.expect("an embedded CA");
        let bundle = watch::Sender::new(ca.bundle().borrow().clone());
        let signer = Arc::new(Scripted {
            ca,
            delay: Mutex::new(Duration::from_millis(10)),
            failing: Mutex::default(),
            calls: AtomicUsize::new(0),
            flying: Mutex::default(),
            bundle,
        });
        let policies = watch::Sender::new(policy(&["*.example.org"]));
        let pods = Pods::new(Scope::Cluster, clock.clone());
        let hub = Hub::new(Parts {
            clock: clock.clone(),
            policies: policies.subscribe(),
            pods: Some(pods.clone()),
            signers: vec![signer.clone()],
            signer_rate,
            principal_rate,
            account: Account::new(limits, 0, &metrics),
            seed: 7,
            metrics,
        });
        let stop = CancellationToken::new();
        let running = tokio::spawn(hub.clone().run(stop.clone()));
        Self { hub, signer, policies, pods, clock, stop, running }
    }

    async fn subscribe(&self, uid: u32, name: &str) -> Result<Subscription, HubError> {
        self.hub.subscribe(Arc::new(Workload::of_uid(uid)), ask(name), None).await
    }

    fn fail(&self, error: Option<SignError>) {
        *self.signer.failing.lock().unwrap() = error;
    }

    fn calls(&self) -> usize {
        self.signer.calls.load(Ordering::Relaxed)
    }
}

fn rate(per_second: u32) -> Rate {
    let per_second = NonZeroU32::new(per_second).unwrap();
    Rate { per_second, burst: per_second }
}

fn unavailable() -> SignError {
    SignError::CaNotValid
}

/// Lets every test's users have the names that match `dns`.
fn policy(dns: &[&str]) -> Arc<PolicySet> {
    let text = format!(
        "apiVersion: csrd.dev/v1alpha1
kind: CertificatePolicy
metadata: {{name: test}}
spec:
  match: {{unix: {{uids: {:?}}}}}
  allow: {{dnsNames: [{}], lifetime: {{default: 1h, max: 24h}}}}
",
        (1..=40).collect::<Vec<_>>(),
        dns.iter().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ")
    );
    Arc::new(PolicySet::parse(&[Source { origin: "test".into(), text }], EMBEDDED).expect("the policy is valid"))
}

fn ask(name: &str) -> Ask {
    Ask {
        names: Names { dns: vec![DnsName::parse(name).unwrap()], ..Names::default() },
        usages: Usages::DEFAULT,
        key: KeyAlgorithm::EcdsaP256,
        lifetime: None,
        signer: None,
        policy: None,
    }
}

fn certificate(event: Event) -> Live {
    match event {
        Event::Certificate(_, live) => live,
        other => panic!("a certificate was expected, not {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn equal_requests_of_equal_workloads_share_one_flight_and_one_certificate() {
    let bench = Bench::new();
    let (a, b) = tokio::join!(bench.subscribe(1, "a.example.org"), bench.subscribe(1, "a.example.org"));
    let (mut a, mut b) = (a.unwrap(), b.unwrap());
    let serial = |live: &Live| live.credential.chain().serial_hex();
    assert_eq!(serial(&certificate(a.next().await)), serial(&certificate(b.next().await)));
    assert_eq!((bench.calls(), a.id()), (1, b.id()));
    let other = bench.subscribe(2, "a.example.org").await.unwrap();
    assert_ne!(other.id(), a.id(), "another user has another certificate");
    assert_eq!(bench.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_lost_right_ends_the_subscription_with_its_reason_and_nothing_after_it() {
    let bench = Bench::new();
    let mut subscription = bench.subscribe(1, "a.example.org").await.unwrap();
    certificate(subscription.next().await);
    bench.policies.send_replace(policy(&["*.example.com"]));
    let Event::Denied(_, denial) = subscription.next().await else { panic!("a denial was expected") };
    assert!(denial.to_string().contains("a.example.org"), "{denial}");
    assert!(bench.hub.lock().entries.is_empty(), "the key is gone with the right");
    bench.policies.send_replace(policy(&["*.example.org"]));
    sleep(HOUR).await;
    assert!(!matches!(subscription.next().await, Event::Certificate(..)), "a denied subscription stays denied");
}

#[tokio::test(start_paused = true)]
async fn a_right_that_was_lost_before_the_sweep_is_refused_to_a_newcomer() {
    let bench = Bench::new();
    let _kept = bench.subscribe(1, "a.example.org").await.unwrap();
    bench.policies.send_replace(policy(&["*.example.com"]));
    // No await in between: the sweep has not run.
    let error = bench.subscribe(1, "a.example.org").await.expect_err("the policies in force say no");
    assert!(matches!(error, HubError::Denied(_)), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_policy_change_that_leaves_the_right_leaves_the_certificate() {
    let bench = Bench::new();
    let mut subscription = bench.subscribe(1, "a.example.org").await.unwrap();
    certificate(subscription.next().await);
    bench.policies.send_replace(policy(&["a.example.org"]));
    let quiet = timeout(Duration::from_secs(60), subscription.next()).await;
    assert!(quiet.is_err(), "nothing to tell: {quiet:?}");
    assert_eq!(bench.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn new_roots_reach_every_follower_once() {
    let bench = Bench::new();
    let mut subscription = bench.subscribe(1, "a.example.org").await.unwrap();
    certificate(subscription.next().await);
    let other = embedded::Embedded::ephemeral(HOUR, &bench.clock, Metrics::new().signer("other")).unwrap();
    let roots = other.bundle().borrow().clone();
    bench.signer.bundle.send_replace(roots.clone());
    let Event::Bundle(_, seen) = subscription.next().await else { panic!("new roots were expected") };
    assert_eq!(seen, roots);
    let quiet = timeout(Duration::from_secs(60), subscription.next()).await;
    assert!(quiet.is_err(), "told once: {quiet:?}");
}

#[tokio::test(start_paused = true)]
async fn an_id_leads_back_to_its_own_workload_only_and_after_the_last_sequence() {
    let bench = Bench::new();
    let mut subscription = bench.subscribe(1, "a.example.org").await.unwrap();
    let (id, first) = (subscription.id(), certificate(subscription.next().await));
    drop(subscription);
    let (owner, other) = (Workload::of_uid(1), Workload::of_uid(2));
    assert!(bench.hub.resume(&other, &id, 0).await.unwrap().is_none(), "another's id is as unknown as none");
    for unknown in ["", "0", "x", &format!("{id}0")] {
        assert!(bench.hub.resume(&owner, unknown, 0).await.unwrap().is_none(), "{unknown:?}");
    }
    let mut resumed = bench.hub.resume(&owner, &id, first.issued).await.unwrap().expect("it is there");
    assert!(timeout(Duration::from_secs(1), resumed.next()).await.is_err(), "nothing is told twice");
    let mut from_the_future = bench.hub.resume(&owner, &id, u64::MAX).await.unwrap().expect("it is there");
    assert_eq!(certificate(from_the_future.next().await).issued, first.issued);
    assert!(certificate(resumed.next().await).issued > first.issued, "and nothing is missed");
}

#[tokio::test(start_paused = true)]
async fn an_entry_that_nobody_follows_is_forgotten_after_it_has_lingered() {
    let bench = Bench::new();
    let subscription = bench.subscribe(1, "a.example.org").await.unwrap();
    let id = subscription.id();
    drop(subscription);
    sleep(LINGER - Duration::from_secs(1)).await;
    let back = bench.hub.resume(&Workload::of_uid(1), &id, 0).await.unwrap();
    drop(back.expect("it lingers"));
    sleep(LINGER - Duration::from_secs(1)).await;
    assert_eq!(bench.hub.lock().entries.len(), 1, "coming back began the time anew");
    sleep(Duration::from_secs(2)).await;
    assert!(bench.hub.lock().entries.is_empty());
    assert!(bench.hub.lock().is_clean(), "no index remembers it");
}

#[tokio::test(start_paused = true)]
async fn who_comes_back_needs_nobody_else_to_be_served() {
    let bench = Bench::new();
    let text = "apiVersion: csrd.dev/v1alpha1\nkind: CertificatePolicy\nmetadata: {name: short}\n\
        spec: {match: {unix: {uids: [1]}}, allow: {dnsNames: [a.example.org], lifetime: {default: 8s, min: 8s}}}\n";
    let sources = [Source { origin: "test".into(), text: text.into() }];
    bench.policies.send_replace(Arc::new(PolicySet::parse(&sources, EMBEDDED).unwrap()));
    let subscribe = || bench.subscribe(1, "a.example.org");
    // After its end, and before its renewal.
    for away in [9, 1] {
        drop(subscribe().await.unwrap());
        sleep(Duration::from_secs(away)).await;
        let (before, mut back) = (bench.clock.now(), subscribe().await.unwrap());
        let first = certificate(back.next().await);
        let renewed = certificate(back.next().await);
        assert!(renewed.credential.not_after() > first.credential.not_after());
        let took = bench.clock.now().duration_since(before).unwrap();
        assert!(took < Duration::from_secs(8), "away for {away} s: {took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_certificate_that_policy_has_replaced_is_given_to_nobody_new() {
    let bench = Bench::new();
    let offering = |id: &str| {
        let text = format!(
            "apiVersion: csrd.dev/v1alpha1\nkind: CertificatePolicy\nmetadata: {{name: test}}\n\
             spec: {{match: {{unix: {{uids: [1]}}}}, offer: [{{spiffeId: '{id}'}}]}}\n"
        );
        Arc::new(PolicySet::parse(&[Source { origin: "test".into(), text }], EMBEDDED).unwrap())
    };
    let whatever = Ask { names: Names::default(), ..ask("a.example.org") };
    let subscribe = || bench.hub.subscribe(Arc::new(Workload::of_uid(1)), whatever.clone(), None);
    bench.policies.send_replace(offering("spiffe://example.org/old"));
    let mut first = subscribe().await.unwrap();
    certificate(first.next().await);
    bench.policies.send_replace(offering("spiffe://example.org/new"));
    let mut second = subscribe().await.unwrap();
    for follower in [&mut first, &mut second] {
        let live = certificate(follower.next().await);
        assert_eq!(live.credential.grant().names().uris, ["spiffe://example.org/new"]);
    }
    bench.fail(Some(unavailable()));
    bench.policies.send_replace(offering("spiffe://example.org/newer"));
    assert_eq!(subscribe().await.expect_err("only the replaced one is there").reason(), "CERTIFICATE_EXPIRED");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_of_what_policy_has_replaced_meanwhile_is_not_the_callers() {
    let with = |policy: &str| {
        let text = format!(
            "apiVersion: csrd.dev/v1alpha1\nkind: CertificatePolicy\nmetadata: {{name: test}}\n\
             spec: {{match: {{unix: {{uids: [1]}}}}, {policy}}}\n"
        );
        Arc::new(PolicySet::parse(&[Source { origin: "test".into(), text }], EMBEDDED).unwrap())
    };
    for (old, new) in [
        ("offer: [{spiffeId: 'spiffe://example.org/old'}]", "offer: [{spiffeId: 'spiffe://example.org/new'}]"),
        ("offer: [{dnsNames: [a.b]}], allow: {lifetime: {default: 2h}}", "offer: [{dnsNames: [a.b]}]"),
    ] {
        let bench = Bench::new();
        bench.policies.send_replace(with(old));
        *bench.signer.delay.lock().unwrap() = Duration::from_secs(2);
        bench.fail(Some(unavailable()));
        let whatever = Ask { names: Names::default(), ..ask("a.example.org") };
        let change = async {
            sleep(Duration::from_secs(1)).await;
            bench.policies.send_replace(with(new));
            sleep(Duration::from_secs(2)).await;
            bench.fail(None);
        };
        let (subscribed, ()) = tokio::join!(bench.hub.subscribe(Arc::new(Workload::of_uid(1)), whatever, None), change);
        certificate(subscribed.expect(new).next().await);
        assert_eq!(bench.calls(), 2, "{new}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_credential_is_for_its_owner_even_if_its_user_has_lost_its_name() {
    let bench = Bench::new();
    let with = |user: Option<&str>, executable: Option<&str>| {
        let (user, executable) = (user.map(str::to_owned), executable.map(str::to_owned));
        Workload::for_test(UnixFacts { user, executable, ..Workload::of_uid(1).unix().unwrap().clone() })
    };
    let (name, path) = (Some("web"), Some("/usr/bin/test"));
    let owner = Arc::new(with(name, path));
    let subscription = bench.hub.subscribe(owner.clone(), ask("a.example.org"), None).await.unwrap();
    assert!(subscription.is_for(&owner));
    assert!(subscription.is_for(&with(None, path)), "no policy looks at the name");
    assert!(!subscription.is_for(&with(name, None)), "a program without a path is another program");
    assert!(!subscription.is_for(&with(name, Some("/usr/bin/other"))), "another program");
    assert!(!subscription.is_for(&Workload::of_uid(2)), "another user, though policy grants it the same");
}

#[tokio::test(start_paused = true)]
async fn a_held_key_is_certified_again_unless_its_holder_wants_to_rotate_it() {
    let bench = Bench::new();
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let parameters = rcgen::CertificateParams::new(vec!["a.example.org".to_owned()]).unwrap();
    let csr = parameters.serialize_request(&key).unwrap();
    let csr = Arc::new(Csr::parse(csr.der()).unwrap());
    let workload = Arc::new(Workload::of_uid(1));
    let held = |rotate_key| Some(Held { csr: csr.clone(), rotate_key });
    let mut again = bench.hub.subscribe(workload.clone(), ask("a.example.org"), held(false)).await.unwrap();
    let first = certificate(again.next().await);
    assert!(first.credential.private_key().is_none());
    certificate(again.next().await);
    drop(again);
    let mut rotating = bench.hub.subscribe(workload, ask("a.example.org"), held(true)).await.unwrap();
    let first = certificate(rotating.next().await);
    let Event::RotationDue(_, live) = rotating.next().await else { panic!("a rotation was expected") };
    assert_eq!(live.credential.chain().serial_hex(), first.credential.chain().serial_hex());
    assert!(timeout(HOUR, rotating.next()).await.is_err(), "told once, and never certified again");
}

#[tokio::test(start_paused = true)]
async fn at_the_stop_flights_under_way_land_and_those_that_wait_do_not_begin() {
    let bench = Bench::with_rates(1, 1_000_000);
    *bench.signer.delay.lock().unwrap() = Duration::from_secs(2);
    let first = bench.subscribe(1, "a.example.org");
    let second = bench.subscribe(1, "b.example.org");
    let stop = async {
        sleep(Duration::from_millis(500)).await;
        bench.stop.cancel();
    };
    let (first, second, ()) = tokio::join!(first, timeout(STOP_GRACE, second), stop);
    first.expect("it was under way");
    assert!(second.is_err(), "it waited for a token");
    assert!(bench.running.is_finished());
}

#[tokio::test(start_paused = true)]
async fn a_lost_flight_fails_its_own_caller_only() {
    #[derive(Debug)]
    struct Panics(watch::Sender<Arc<Bundle>>);
    impl Sign for Panics {
        fn name(&self) -> &str {
            embedded::NAME
        }
        fn sign<'a>(&'a self, _: SigningRequest<'a>) -> Signing<'a> {
            Box::pin(async { panic!("on purpose") })
        }
        fn bundle(&self) -> watch::Receiver<Arc<Bundle>> {
            self.0.subscribe()
        }
        fn ready(&self) -> Result<(), SignError> {
            Ok(())
        }
    }
    let bench = Bench::new();
    let bundle = bench.signer.bundle.borrow().clone();
    let hub = Hub::new(Parts {
        clock: bench.clock.clone(),
        policies: bench.policies.subscribe(),
        pods: None,
        signers: vec![Arc::new(Panics(watch::Sender::new(bundle)))],
        signer_rate: rate(100),
        principal_rate: rate(100),
        account: Account::new(Limits::default(), 0, &Metrics::new()),
        seed: 1,
        metrics: Metrics::new(),
    });
    let running = tokio::spawn(hub.clone().run(bench.stop.clone()));
    let error = hub.subscribe(Arc::new(Workload::of_uid(1)), ask("a.example.org"), None).await.expect_err("lost");
    assert_eq!(error.reason(), "ISSUANCE_LOST");
    assert!(!running.is_finished(), "the hub goes on");
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_names_an_unknown_signer_is_said_to() {
    let bench = Bench::new();
    let mut text = String::from("apiVersion: csrd.dev/v1alpha1\nkind: CertificatePolicy\nmetadata: {name: far}\n");
    text += "spec: {match: {unix: {uids: [1]}}, signer: example.com/far, allow: {dnsNames: ['*.example.org']}}\n";
    let set = PolicySet::parse(&[Source { origin: "test".into(), text }], EMBEDDED).unwrap();
    bench.policies.send_replace(Arc::new(set));
    let error = bench.subscribe(1, "a.example.org").await.expect_err("no such signer");
    assert_eq!(
        error.to_string(),
        "policy far names signer \"example.com/far\", and this agent has embedded: correct the policy, or give the agent that signer"
    );
}
