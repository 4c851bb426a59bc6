//! Credentials of pods, which change while they live.

use super::*;

fn pod(uid: &str, labels: &[(&str, &str)], namespace_labels: &[(&str, &str)]) -> PodFacts {
    let map =
        |labels: &[(&str, &str)]| labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    PodFacts {
        namespace: "shop".to_owned(),
        name: "web".to_owned(),
        uid: uid.to_owned(),
        service_account: "web".to_owned(),
        node: "n1".to_owned(),
        labels: map(labels),
        namespace_labels: map(namespace_labels),
        ips: Vec::new(),
        services: BTreeSet::new(),
    }
}

/// A bench whose policy is for pods of app `web` in namespaces of tier `gold`, and a follower of such a pod.
async fn pod_bench() -> (Bench, Subscription) {
    let bench = Bench::new();
    let text = "apiVersion: csrd.dev/v1alpha1\nkind: CertificatePolicy\nmetadata: {name: pods}\nspec:\n  match: {kubernetes: {namespaceSelector: {matchLabels: {tier: gold}}, podSelector: {matchLabels: {app: web}}}}\n  allow: {dnsNames: ['*.example.org']}\n";
    let source = Source { origin: "test".into(), text: text.to_owned() };
    bench.policies.send_replace(Arc::new(PolicySet::parse(&[source], EMBEDDED).expect("the policy is valid")));
    bench.pods.list_for_test(vec![pod("u1", &[("app", "web")], &[("tier", "gold")])]);
    let workload = bench.pods.by_uid("u1").expect("it is listed");
    let mut subscription = bench.hub.subscribe(workload, ask("a.example.org"), None).await.expect("it is allowed");
    certificate(subscription.next().await);
    (bench, subscription)
}

#[tokio::test(start_paused = true)]
async fn a_relabelled_pod_keeps_what_it_still_may_have_and_shares_it_under_its_new_labels() {
    let (bench, mut subscription) = pod_bench().await;
    let before = bench.pods.by_uid("u1").unwrap();
    bench.pods.list_for_test(vec![pod("u1", &[("app", "web"), ("track", "canary")], &[("tier", "gold")])]);
    let resumed = bench.hub.resume(&bench.pods.by_uid("u1").unwrap(), &subscription.id(), 0).await.unwrap();
    assert!(resumed.is_some(), "by its id, even before the sweep");
    assert!(timeout(Duration::from_secs(60), subscription.next()).await.is_err(), "there is nothing to say");
    let now = bench.pods.by_uid("u1").unwrap();
    assert_ne!(before, now);
    bench.hub.subscribe(now.clone(), ask("a.example.org"), None).await.expect("it is still allowed");
    assert_eq!(bench.calls(), 1, "it is the same certificate");
    assert_eq!(bench.hub.rows(|_| true)[0].workload, now);
    bench.hub.subscribe(before, ask("a.example.org"), None).await.expect("attested a moment before");
    assert!(subscription.is_for(&now));
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_policy_no_longer_matches_is_denied_and_its_stream_ends() {
    for (labels, tier) in [(&[("app", "other")], "gold"), (&[("app", "web")], "lead")] {
        let (bench, mut subscription) = pod_bench().await;
        bench.pods.list_for_test(vec![pod("u1", labels, &[("tier", tier)])]);
        let Event::Denied(_, lost) = subscription.next().await else { panic!("a denial was expected") };
        assert_eq!(lost.reason(), "NO_POLICY_MATCHES");
        drop(subscription);
        assert!(bench.hub.lock().is_clean());
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_deleted_or_replaced_is_gone_and_its_stream_ends() {
    for left in [vec![], vec![pod("u2", &[("app", "web")], &[("tier", "gold")])]] {
        let (bench, mut subscription) = pod_bench().await;
        let workload = bench.pods.by_uid("u1").unwrap();
        bench.pods.list_for_test(left);
        let late = bench.hub.subscribe(workload.clone(), ask("a.example.org"), None).await;
        assert_eq!(late.expect_err("before the sweep").reason(), "POD_GONE");
        let late = bench.hub.subscribe(workload, ask("b.example.org"), None).await;
        assert_eq!(late.expect_err("nothing new either").reason(), "POD_GONE");
        let Event::Denied(_, lost) = subscription.next().await else { panic!("a denial was expected") };
        assert_eq!(lost.reason(), "POD_GONE");
        let said = "pod shop/web (ServiceAccount web) is gone: it has ended, or was deleted or replaced";
        assert_eq!(lost.to_string(), said);
        drop(subscription);
        assert!(bench.hub.lock().is_clean());
    }
}

#[tokio::test(start_paused = true)]
async fn while_nobody_says_that_a_pod_is_gone_it_is_served() {
    let (bench, _) = pod_bench().await;
    let nobody = Pods::new(Scope::Cluster, bench.clock.clone());
    let workload = bench.pods.by_uid("u1").unwrap();
    let hub = Hub::new(Parts {
        clock: bench.clock.clone(),
        policies: bench.policies.subscribe(),
        pods: Some(nobody),
        signers: vec![bench.signer.clone()],
        signer_rate: rate(100),
        principal_rate: rate(100),
        account: Account::new(Limits::default(), 0, &Metrics::new()),
        seed: 1,
        metrics: Metrics::new(),
    });
    tokio::spawn(hub.clone().run(bench.stop.clone()));
    let mut subscription = hub.subscribe(workload, ask("a.example.org"), None).await.unwrap();
    let first = certificate(subscription.next().await);
    let second = certificate(subscription.next().await);
    assert!(second.issued > first.issued, "and renewed");
}
