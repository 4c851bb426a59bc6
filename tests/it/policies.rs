//! CertificatePolicies in a real cluster: what the API server makes of their definition, and what follows them.

#![allow(clippy::disallowed_methods, reason = "a test owns the task that it starts")]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use csrd::{
    attest::{PodFacts, Workload},
    kubernetes::SIGNER,
    metrics::Metrics,
    policy::{
        self, Ask, PolicySet, Source, schema,
        watch::{ClusterPolicies, Examined, resource},
    },
    x509::{DnsName, KeyAlgorithm, Names, Usages},
};
use http::Method;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::cluster::{ControlPlane, Fault, FaultProxy, Identity, Options, Part, eventually, unique};

/// What is not seen within this time will never be; far more than anything takes.
const NEVER: Duration = Duration::from_secs(180);

/// Makes the kind known to the cluster, and returns its definition once it is served.
pub(crate) async fn define(cluster: &ControlPlane) -> CustomResourceDefinition {
    let definitions: Api<CustomResourceDefinition> = Api::all(cluster.admin().await);
    let definition = schema::custom_resource_definition();
    let name = definition["metadata"]["name"].as_str().unwrap().to_owned();
    definitions.patch(&name, &PatchParams::apply("test").force(), &Patch::Apply(&definition)).await.unwrap();
    let served = async {
        loop {
            let found = definitions.get(&name).await.unwrap();
            // It is served a moment later.
            let list = policies(cluster.admin().await).list(&ListParams::default().limit(1)).await;
            if condition(&found, "Established") == Some("True") && list.is_ok() {
                return found;
            }
            sleep(Duration::from_millis(25)).await;
        }
    };
    timeout(NEVER, served).await.expect("the definition is established")
}

fn condition<'a>(definition: &'a CustomResourceDefinition, name: &str) -> Option<&'a str> {
    let conditions = definition.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == name).map(|condition| condition.status.as_str())
}

fn policies(client: Client) -> Api<DynamicObject> {
    Api::all_with(client, &resource())
}

fn document(name: &str, spec: &Value) -> Value {
    json!({"apiVersion": policy::API_VERSION, "kind": policy::KIND, "metadata": {"name": name}, "spec": spec})
}

async fn apply(client: &Client, name: &str, spec: &Value) -> kube::Result<DynamicObject> {
    let apply = Patch::Apply(document(name, spec));
    policies(client.clone()).patch(name, &PatchParams::apply("test").force(), &apply).await
}

/// What the API server says of a new object, as kubectl asks: unknown fields are errors. Nothing is kept.
async fn try_out(client: &Client, spec: &Value) -> Result<(), String> {
    let path = format!("/apis/{}/{}?dryRun=All&fieldValidation=Strict", policy::API_VERSION, policy::PLURAL);
    let request = http::Request::post(path).header("content-type", "application/json");
    let request = request.body(document("tried-out", spec).to_string().into_bytes()).unwrap();
    match client.request::<Value>(request).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) => Err(status.message.clone()),
        Err(other) => panic!("no answer: {other}"),
    }
}

/// The reader's problems with the same document in a file.
fn read(spec: &Value) -> Result<PolicySet, Vec<policy::Problem>> {
    let source = Source { origin: "p.yaml".to_owned(), text: document("a", spec).to_string() };
    PolicySet::parse(&[source], SIGNER)
}

fn matching(clauses: Value) -> Value {
    json!({"match": {"kubernetes": clauses}})
}

/// A policy with these fields beside its match section.
fn with(fields: Value) -> Value {
    let mut spec = matching(json!({"namespaces": ["a"]}));
    spec.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    spec
}

#[tokio::test]
async fn the_definition_is_established_and_kubectl_shows_its_columns() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let definition = define(cluster).await;
    assert_eq!(condition(&definition, "NamesAccepted"), Some("True"));
    assert_eq!(condition(&definition, "NonStructuralSchema"), None);

    let name = unique("columns");
    // Refused, as the controllers of other tests say too.
    let refused = with(json!({"signer": SIGNER, "allow": {"dnsNames": ["*"]}}));
    apply(&cluster.admin().await, &name, &refused).await.unwrap();
    let condition = json!({"type": "Accepted", "status": "False", "reason": "Invalid", "message": "it grants nothing",
        "observedGeneration": 1, "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let status = json!({"status": {"observedGeneration": 1, "conditions": [condition]}});
    let api = policies(cluster.admin().await);
    api.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    // kubectl learns of new kinds in its own time.
    let shown = eventually("its row", async || {
        let shown = cluster.kubectl(&["get", "certpol", &name, "-o", "wide"]).await;
        shown.status.success().then_some(shown.stdout)
    });
    let shown = String::from_utf8(shown.await).unwrap();
    let lines: Vec<Vec<&str>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["NAME", "ACCEPTED", "SIGNER", "AGE", "MESSAGE"], "{shown}");
    assert_eq!((lines[1][1], lines[1][2], &lines[1][4..6]), ("False", SIGNER, &["it", "grants"][..]), "{shown}");
}

/// All fields, in one document.
fn full() -> Value {
    json!({
        "match": {"kubernetes": {
            "namespaces": ["production"],
            "namespaceSelector": {"matchLabels": {"example.org/team": "a"}, "matchExpressions": []},
            "podSelector": {"matchExpressions": [
                {"key": "app", "operator": "In", "values": ["web", ""]},
                {"key": "tier", "operator": "NotIn", "values": ["db"]},
                {"key": "a", "operator": "Exists"},
                {"key": "b", "operator": "DoesNotExist", "values": []},
            ]},
            "serviceAccounts": ["web.v1"],
        }},
        "signer": SIGNER,
        "allow": {
            "commonNames": ["{kubernetes.service}.production.svc"],
            "organizations": ["Example"],
            "dnsNames": ["{kubernetes.service}.{kubernetes.namespace}.svc"],
            "wildcardDnsNames": ["*.web.example.org"],
            "ipAddresses": ["{kubernetes.podIP}", "10.0.0.0/8", "::1"],
            "uris": ["spiffe://example.org/ns/{kubernetes.namespace}/sa/{kubernetes.serviceAccount}"],
            "usages": ["digital signature", "server auth", "client auth"],
            "keys": ["ecdsa-p256", "rsa-4096"],
            "lifetime": {"min": "10m", "default": "1h30m", "max": "8784h"},
        },
        "rules": [{"expression": "size(request.dnsNames) <= 2", "message": "at most two DNS names"}],
        "offer": [
            {"spiffeId": "spiffe://example.org/{kubernetes.podUid}", "dnsNames": ["a"], "hint": "internal"},
            {"dnsNames": ["{kubernetes.service}.production.svc"]},
        ],
    })
}

#[tokio::test]
async fn what_the_reader_accepts_the_api_server_accepts() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    define(cluster).await;
    let client = cluster.admin().await;
    let many = |n: usize| (0..n).map(|i| format!("n{i}")).collect::<Vec<_>>();
    let long = |n: usize| "a".repeat(n);
    for spec in [
        full(),
        matching(json!({"namespaces": ["a"]})),
        matching(json!({"namespaceSelector": {}})),
        matching(json!({"namespaces": many(policy::MAX_ENTRIES), "serviceAccounts": [long(policy::MAX_NAME_BYTES)]})),
        with(json!({"signer": policy::EMBEDDED, "allow": {"lifetime": {"min": "1s", "max": "90s"}}})),
        with(json!({"signer": "kubernetes.io/kube-apiserver-client", "allow": {"commonNames": ["dev"]}})),
        with(json!({"allow": {"usages": [], "keys": [], "lifetime": {}}, "rules": [], "offer": []})),
        with(json!({"offer": [{"dnsNames": ["a"], "hint": long(policy::MAX_HINT_BYTES)}]})),
        with(json!({"rules": [{"expression": "true", "message": long(policy::MAX_MESSAGE_CHARS)}]})),
    ] {
        read(&spec).unwrap_or_else(|problems| panic!("{problems:?}\n{spec:#}"));
        try_out(&client, &spec).await.unwrap_or_else(|error| panic!("{error}\n{spec:#}"));
    }
}

#[tokio::test]
async fn kubectl_takes_the_example_of_the_readme() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    define(cluster).await;
    let readme = include_str!("../../README.md");
    let example =
        readme.split("```yaml\n").find(|block| block.contains("kubernetes:")).and_then(|rest| rest.split("```").next());
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), example.unwrap()).unwrap();
    let path = file.path().to_str().unwrap();
    // Again while it does not know the new kind.
    let taken = eventually("kubectl knows the kind", async || {
        let taken = cluster.kubectl(&["create", "--dry-run=server", "-f", path]).await;
        (!String::from_utf8_lossy(&taken.stderr).contains("no matches for kind")).then_some(taken)
    });
    let taken = taken.await;
    assert!(taken.status.success(), "{taken:?}");
}

#[tokio::test]
async fn what_the_api_server_refuses_the_reader_refuses() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    define(cluster).await;
    let client = cluster.admin().await;
    let expression = |requirement: Value| matching(json!({"namespaceSelector": {"matchExpressions": [requirement]}}));
    let unknown = |path: &str| {
        let mut spec = full();
        spec.pointer_mut(path).unwrap()["oops"] = json!(1);
        spec
    };
    let rows = [
        (json!({}), "spec.match: Required value"),
        (json!({"match": {}}), "name a kubernetes section"),
        (json!({"match": {"unix": {"uids": [0]}}}), "put one about processes of a host into a file on that host"),
        (
            json!({"match": {"unix": {"uids": [0]}, "kubernetes": {"namespaces": ["a"]}}}),
            "a policy in a cluster is about pods",
        ),
        (matching(json!({})), "it needs namespaces or a namespaceSelector"),
        (matching(json!({"podSelector": {}, "serviceAccounts": ["a"]})), "it needs namespaces or a namespaceSelector"),
        (matching(json!({"namespaces": []})), "should have at least 1 items"),
        (matching(json!({"namespaces": vec!["a"; policy::MAX_ENTRIES + 1]})), "must have at most 64 items"),
        (matching(json!({"namespaces": ["A"]})), "should match"),
        (matching(json!({"namespaces": ["a".repeat(64)]})), "may not be more than 63"),
        (matching(json!({"namespaces": ["a"], "serviceAccounts": ["a/b"]})), "should match"),
        (matching(json!({"namespaceSelector": {"matchLabels": {"app": "a b"}}})), "should match"),
        (expression(json!({"key": "app", "operator": "In"})), "In and NotIn need at least one value"),
        (expression(json!({"key": "app", "operator": "Exists", "values": ["a"]})), "Exists and DoesNotExist take none"),
        (expression(json!({"key": "app", "operator": "Is", "values": ["a"]})), "supported values"),
        (with(json!({"signer": "kubernetes.io/kubelet-serving"})), "it signs only for kubelets"),
        (with(json!({"signer": "kubernetes.io/kube-apiserver-client-kubelet"})), "is a node to the API server"),
        (with(json!({"signer": "kubernetes.io/legacy-unknown"})), "refuses every request addressed to it"),
        (with(json!({"signer": ""})), "should be at least 1 chars long"),
        (with(json!({"allow": {"usages": ["email"]}})), "supported values"),
        (with(json!({"allow": {"keys": ["dsa"]}})), "supported values"),
        (with(json!({"allow": {"lifetime": {"max": "1d"}}})), "should match"),
        (with(json!({"allow": {"lifetime": {"max": "8784h1s"}}})), "it must lie between 1s and 8784h"),
        (with(json!({"allow": {"lifetime": {"min": "0s"}}})), "it must lie between 1s and 8784h"),
        (with(json!({"allow": {"lifetime": {"min": "2h", "max": "1h"}}})), "min is more than max"),
        (with(json!({"allow": {"lifetime": {"default": "2h", "max": "1h"}}})), "default is more than max"),
        (with(json!({"allow": {"dnsNames": [""]}})), "should be at least 1 chars long"),
        (with(json!({"rules": [{"expression": "true"}]})), "spec.rules[0].message: Required value"),
        (with(json!({"offer": [{"hint": "a"}]})), "it names nothing; it needs spiffeId or dnsNames"),
        (with(json!({"offer": [{"spiffeId": "https://a/b"}]})), "should match"),
        (unknown(""), "\"spec.oops\""),
        (unknown("/match"), "\"spec.match.oops\""),
        (unknown("/match/kubernetes"), "\"spec.match.kubernetes.oops\""),
        (unknown("/match/kubernetes/podSelector"), "\"spec.match.kubernetes.podSelector.oops\""),
        (unknown("/match/kubernetes/podSelector/matchExpressions/0"), "matchExpressions[0].oops\""),
        (unknown("/allow"), "\"spec.allow.oops\""),
        (unknown("/allow/lifetime"), "\"spec.allow.lifetime.oops\""),
        (unknown("/rules/0"), "\"spec.rules[0].oops\""),
        (unknown("/offer/1"), "\"spec.offer[1].oops\""),
    ];
    for (spec, words) in rows {
        let refused = try_out(&client, &spec).await.expect_err(words);
        assert!(refused.contains(words), "{spec:#}\n{refused}");
        let of_a_host = spec["match"]["unix"].is_object() && spec["match"]["kubernetes"].is_null();
        assert!(read(&spec).is_err() || of_a_host, "{spec:#}");
    }
}

#[tokio::test]
async fn the_reader_knows_the_names_of_signers_as_the_api_server_does() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let client = cluster.admin().await;
    let long = |n: usize| "a".repeat(n);
    let domain = |n: usize| [long(63), long(63), long(63), long(n - 192)].join(".");
    let rows = [
        "csrd.dev/workload",
        "a.b/c.d",
        "a.b/c--d",
        "a/b",
        "a.b/",
        "/b",
        "a.b",
        "a.b/c/d",
        "A.b/c",
        "a.b/c_d",
        "a.b/C",
    ];
    let long = [
        format!("{}/a", domain(253)),
        format!("{}/a", domain(254)),
        format!("a.{}/a", long(63)),
        format!("a.{}/a", long(64)),
        format!("a.b/{}", long(253)),
        format!("a.b/{}", long(254)),
        format!("{}/{}.{}", domain(253), long(253), long(63)),
        format!("{}/{}.{}", domain(253), long(253), long(64)),
    ];
    for name in rows.map(str::to_owned).into_iter().chain(long) {
        let request = json!({"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
            "metadata": {"name": "tried-out"}, "spec": {"signerName": name, "request": "", "usages": ["client auth"]}});
        let path = "/apis/certificates.k8s.io/v1/certificatesigningrequests?dryRun=All";
        let request =
            http::Request::post(path).header("content-type", "application/json").body(request.to_string().into());
        let Err(kube::Error::Api(status)) = client.request::<Value>(request.unwrap()).await else {
            panic!("no PKCS#10")
        };
        let refused = status.message.contains("spec.signerName");
        assert_eq!(read(&with(json!({"signer": name}))).is_err(), refused, "{name}: {}", status.message);
    }
}

/// Follows the policies of a cluster, for one test.
struct Following {
    policies: watch::Receiver<Arc<PolicySet>>,
    problems: watch::Receiver<BTreeMap<String, Examined>>,
    synced: watch::Receiver<bool>,
    metrics: Metrics,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<()>,
}

impl Following {
    fn start(client: Client) -> Self {
        let metrics = Metrics::new();
        let followed = ClusterPolicies::new(client, metrics.clone());
        let (policies, problems, synced) = (followed.subscribe(), followed.problems(), followed.synced());
        let stop = CancellationToken::new();
        let running = tokio::spawn(followed.run(stop.clone()));
        Self { policies, problems, synced, metrics, stop, running }
    }

    async fn synced(&mut self) {
        timeout(NEVER, self.synced.wait_for(|synced| *synced)).await.expect("a first list").unwrap();
    }

    /// Waits until this has been found of the policy.
    async fn found(&mut self, name: &str, found: impl Fn(&Examined) -> bool) -> Examined {
        let found = |problems: &BTreeMap<String, Examined>| problems.get(name).is_some_and(&found);
        timeout(NEVER, self.problems.wait_for(found)).await.expect("it is examined").unwrap()[name].clone()
    }

    async fn gone(&mut self, name: &str) {
        let gone = self.problems.wait_for(|problems| !problems.contains_key(name));
        timeout(NEVER, gone).await.expect("it is gone").unwrap();
    }

    /// Whether a pod of that namespace gets the DNS name `a`.
    fn grants(&self, namespace: &str) -> bool {
        let pod = Workload::of_pod(PodFacts {
            namespace: namespace.to_owned(),
            name: "web-0".to_owned(),
            uid: "7f5a4c3e".to_owned(),
            service_account: "default".to_owned(),
            node: "node1".to_owned(),
            labels: [].into(),
            namespace_labels: [].into(),
            ips: Vec::new(),
            services: [].into(),
        });
        let ask = Ask {
            names: Names { dns: vec![DnsName::parse("a").unwrap()], ..Names::default() },
            usages: Usages::DEFAULT,
            key: KeyAlgorithm::EcdsaP256,
            lifetime: None,
            signer: Some(SIGNER.to_owned()),
            policy: None,
        };
        policy::decide(&self.policies.borrow(), &pod, &ask).is_ok()
    }

    async fn end(self) {
        self.stop.cancel();
        timeout(NEVER, self.running).await.expect("it stops").unwrap();
    }
}

fn granting(namespace: &str) -> Value {
    json!({"match": {"kubernetes": {"namespaces": [namespace]}}, "allow": {"dnsNames": ["a"]}})
}

/// Accepted by the schema, and never by the reader.
fn bad(namespace: &str) -> Value {
    json!({"match": {"kubernetes": {"namespaces": [namespace]}}, "allow": {"dnsNames": ["*"]}})
}

#[tokio::test]
async fn policies_are_followed_through_cuts_and_a_history_that_is_lost() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    define(cluster).await;
    let proxy = FaultProxy::start(cluster, &cluster.admin_identity()).await;
    let admin = cluster.admin().await;
    let [name, other] = ["followed", "other"].map(unique);
    apply(&admin, &name, &granting(&name)).await.unwrap();
    let mut following = Following::start(proxy.access.client(&Identity::Anonymous).await);
    assert!(!following.grants(&name), "nothing is granted before the first list");
    following.synced().await;
    assert!(following.grants(&name));

    apply(&admin, &name, &bad("elsewhere")).await.unwrap();
    let examined = following.found(&name, |examined| examined.generation == 2).await;
    assert_eq!(examined.in_force, Some(1));
    let problem = &examined.problems[0];
    assert_eq!((problem.field.as_str(), problem.line), ("spec.allow.dnsNames[0]", 0), "{problem}");
    assert!(following.grants(&name), "the last good version");
    assert!(following.metrics.encode().contains("csrd_policy_loads_total{result=\"error\"}"));

    // Cut, and told by the next watch that its place in history is gone: what happened meanwhile is listed.
    proxy.fail(Method::GET, "watch=", 1, Fault::too_old());
    apply(&admin, &other, &granting(&other)).await.unwrap();
    following.found(&other, |examined| examined.in_force == Some(1)).await;
    proxy.fail(Method::GET, "/certificatepolicies", 2, Fault::status(503, "ServiceUnavailable", "etcd is away"));
    proxy.cut();
    policies(admin.clone()).delete(&name, &DeleteParams::default()).await.unwrap();
    following.gone(&name).await;
    assert!(!following.grants(&name) && following.grants(&other));

    // Made anew under the old name with a mistake in it, it has no last good version.
    apply(&admin, &name, &bad(&name)).await.unwrap();
    assert_eq!(following.found(&name, |examined| !examined.problems.is_empty()).await.in_force, None);
    assert!(!following.grants(&name));
    apply(&admin, &name, &granting(&name)).await.unwrap();
    following.found(&name, |examined| examined.in_force == Some(2)).await;
    assert!(following.grants(&name));
    policies(admin).delete(&name, &DeleteParams::default()).await.unwrap();
    following.gone(&name).await;
    following.end().await;
}

#[tokio::test]
async fn policies_stay_in_force_while_the_api_server_is_away() {
    let Some(cluster) = ControlPlane::start(Options::default()).await else { return };
    let admin = cluster.admin().await;
    // Followed before the kind is known: there is no policy, and no list of them either.
    let mut following = Following::start(cluster.admin().await);
    define(&cluster).await;
    apply(&admin, "first", &granting("first")).await.unwrap();
    following.found("first", |examined| examined.in_force == Some(1)).await;
    following.policies.mark_unchanged();

    cluster.kill(Part::ApiServer);
    while admin.apiserver_version().await.is_ok() {}
    assert!(following.grants("first"));
    cluster.restart(Part::ApiServer).await;
    assert!(!following.policies.has_changed().unwrap(), "what says the same is not published again");
    // A definition is served a moment after its API server.
    let again = async { while apply(&admin, "second", &granting("second")).await.is_err() {} };
    timeout(NEVER, again).await.unwrap();
    following.found("second", |examined| examined.in_force == Some(1)).await;
    assert!(following.grants("first") && following.grants("second"));
    following.end().await;
}
