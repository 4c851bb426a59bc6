//! What the holder of a stolen agent token can do, on a real API server with `deploy/kubernetes` as it is shipped: nothing
//! of what is here.
//!
//! Each test is a row of the table in README, "Trust model", and prints a line for each way that it tries: what is
//! tried, what must be said, and what the API server or the controller said. To see them:
//!
//! ```console
//! $ cargo test --test it stolen_token -- --include-ignored --nocapture --test-threads=1
//! ```
//!
//! Every refusal is recorded, which each line makes sure of: the controller's is the request's condition, and the API
//! server's is in its audit log, with the node and the pod that the token was stolen from. After each row, the agent of the
//! other node still gets its certificate.

#![allow(clippy::print_stderr, reason = "this is a table to read")]
#![allow(clippy::disallowed_methods, reason = "real servers, whose time is the real one")]

use std::time::{Duration, SystemTime};

use csrd::{
    clock::Clock,
    kubernetes::{Identity as Agent, extra, node_label},
    metrics::Metrics,
    signer::kubernetes::{Cleaner, ORPHAN_AGE},
    telemetry::with_causes,
};
use futures_util::StreamExt as _;
use k8s_openapi::{
    ByteString,
    api::{certificates::v1::CertificateSigningRequest as Request, core::v1::Pod, events::v1::Event},
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Map, Value, json};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    cluster::{Identity, Overlay, eventually, unique},
    controller::deployment::{Answer, Deployment, make, pkcs10},
};

const NODE: &str = "csrd.dev/node";
const POD_NAME: &str = "csrd.dev/pod-name";
const POD_UID: &str = "csrd.dev/pod-uid";

struct Scene {
    deployment: Deployment<'static>,
    /// Whoever has the token of node 1's agent.
    thief: Client,
    /// The agent of node 2.
    neighbour: Client,
    /// A pod of node 1.
    own: Pod,
    /// A pod of node 2.
    others: Pod,
}

impl Scene {
    async fn new(overlay: Overlay) -> Option<Self> {
        let deployment = Deployment::shipped(overlay).await?;
        let (thief, neighbour) = (deployment.agent(0).await, deployment.agent(1).await);
        let (own, others) = (deployment.workload(0).await, deployment.workload(1).await);
        eprintln!("\n  {:<46} {:<58} got", "tried", "expected");
        Some(Self { deployment, thief, neighbour, own, others })
    }

    /// The request of `pod`, with these annotations in place of the true ones.
    fn forged(&self, pod: &Pod, annotations: &[(&str, &str)]) -> Value {
        let mut request = self.deployment.request(pod);
        for (key, value) in annotations {
            request["metadata"]["annotations"][key] = (*value).into();
        }
        request
    }

    fn requests(&self, client: &Client) -> Api<Request> {
        Api::all(client.clone())
    }

    /// A line: what `by` is told of this request.
    async fn asks(&self, attempt: &str, expected: &str, by: &Client, request: Value) {
        match make(by, request).await {
            Err(error) => self.refused(attempt, expected, error).await,
            Ok(made) => match self.deployment.answer(&made.name_any()).await {
                Answer::Denied(it) | Answer::Failed(it) => {
                    let said = [it.reason, it.message].map(Option::unwrap_or_default);
                    line(attempt, expected, &format!("controller: {}", said.join(" ")));
                }
                Answer::Signed { .. } => line(attempt, expected, "signed"),
            },
        }
    }

    /// A line: what the API server says.
    async fn refused(&self, attempt: &str, expected: &str, error: kube::Error) {
        let kube::Error::Api(status) = error else { panic!("{attempt}: {}", with_causes(&error)) };
        let event = self.deployment.cluster.audited(&status.message).await;
        if event["user"]["username"] == format!("system:serviceaccount:{}:csrd-agent", self.deployment.home) {
            let bound = event.pointer(&format!("/user/extra/{}/0", extra::NODE_NAME.replace('/', "~1")));
            assert!(bound.is_none_or(|node| *node == self.deployment.nodes[0]), "whose token it is: {event}");
        }
        let said = status.message.split_once(" is forbidden: ").map_or(&*status.message, |(_, said)| said);
        let said = match (said.split_once("denied request: "), said.split_once("\" cannot ")) {
            (Some((_, rule)), _) => format!("admission: {rule}"),
            (None, Some((_, what))) => format!("RBAC: cannot {what}"),
            (None, None) => format!("API server: {said}"),
        };
        line(attempt, expected, &said);
    }

    /// The rest is unharmed: node 2 gets what it asks for.
    async fn ends(self) {
        let answer = self.deployment.ask(&self.neighbour, self.deployment.request(&self.others)).await;
        assert!(matches!(answer, Answer::Signed { .. }), "{answer:?}");
    }
}

/// What starts with `expected` is what had to be said.
#[track_caller]
fn line(attempt: &str, expected: &str, got: &str) {
    const GOT: usize = 110;
    let abridged: String = got.chars().take(GOT).collect();
    eprintln!("  {attempt:<46} {expected:<58} {abridged}");
    assert!(got.starts_with(expected), "{attempt}: expected {expected:?}, got {got:?}");
}

fn approval() -> Patch<Value> {
    Patch::Strategic(json!({"status": {"conditions": [{"type": "Approved", "status": "True", "reason": "Stolen"}]}}))
}

#[tokio::test]
async fn a_pod_of_another_node() {
    let Some(scene) = Scene::new(Overlay::ApprovalController).await else { return };
    let Scene { deployment, thief, own, others, .. } = &scene;
    let here = deployment.nodes[0].as_str();
    let (their_name, their_uid) = (others.name_any(), others.uid().unwrap());
    let unscheduled = json!({"metadata": {"namespace": deployment.work, "name": "unscheduled"}, "spec": {
        "serviceAccountName": "web", "containers": [{"name": "main", "image": "test.invalid/app:1"}]}});
    let pods: Api<Pod> = Api::namespaced(deployment.admin.clone(), &deployment.work);
    let unscheduled = pods.create(&PostParams::default(), &serde_json::from_value(unscheduled).unwrap()).await.unwrap();
    let elsewhere = "controller: POD_ON_OTHER_NODE";
    let differs = "controller: POD_DIFFERS";
    for (attempt, expected, request) in [
        ("all as it is", "admission: annotation csrd.dev/node", scene.forged(others, &[])),
        ("as if it were here", elsewhere, scene.forged(others, &[(NODE, here)])),
        ("its UID under the name of one here", elsewhere, scene.forged(own, &[(POD_UID, &their_uid)])),
        ("its name with the UID of one here", differs, scene.forged(own, &[(POD_NAME, &their_name)])),
        (
            "its UID and name, and the path of a Secret",
            "controller: ANNOTATION_MISSING",
            scene.forged(others, &[(NODE, here), ("csrd.dev/pod-namespace", "csrd-system/secrets/csrd-ca?x=")]),
        ),
        ("one here, as another ServiceAccount", differs, scene.forged(own, &[("csrd.dev/service-account", "admin")])),
        ("one that no node has yet", elsewhere, scene.forged(&unscheduled, &[(NODE, here)])),
    ] {
        scene.asks(attempt, expected, thief, request).await;
    }

    // Whoever runs the pod is told that somebody tried.
    let events: Api<Event> = Api::namespaced(deployment.admin.clone(), &deployment.work);
    let told = eventually("an Event of the pod", async || {
        let all = events.list(&ListParams::default()).await.unwrap();
        all.into_iter().find(|event| event.regarding.as_ref().is_some_and(|it| it.uid == others.uid()))
    });
    let told = told.await;
    assert_eq!(
        (told.reason.as_deref(), told.action.as_deref()),
        (Some("CertificateDenied"), Some("POD_ON_OTHER_NODE"))
    );
    scene.ends().await;
}

#[tokio::test]
async fn a_token_of_the_agents_that_is_bound_to_no_pod() {
    let Some(scene) = Scene::new(Overlay::ApprovalController).await else { return };
    let Scene { deployment, own, others, .. } = &scene;
    let unbound = deployment.cluster.unbound_token(&deployment.home, "csrd-agent", &[]).await;
    let unbound = deployment.cluster.access.client(&Identity::Token(unbound)).await;
    let expected = "admission: the agent's token is not bound";
    scene.asks("a pod of node 1", expected, &unbound, scene.forged(own, &[])).await;
    scene.asks("a pod of node 2", expected, &unbound, scene.forged(others, &[])).await;
    scene.asks("one that says no node", expected, &unbound, scene.forged(others, &[(NODE, "")])).await;
    scene.ends().await;
}

#[tokio::test]
async fn a_token_of_another_service_account() {
    let Some(scene) = Scene::new(Overlay::ApprovalController).await else { return };
    let Scene { deployment, own, .. } = &scene;
    let (cluster, name) = (deployment.cluster, unique("not-the-agent"));
    cluster.service_account(&deployment.home, &name).await;
    let pod = cluster.pod(&deployment.home, &name, &deployment.nodes[0], &name, &[]).await;
    let token = cluster.token(&pod, &[]).await;
    let other = cluster.access.client(&Identity::Token(token)).await;
    scene.asks("one without rights", "RBAC: cannot create resource", &other, scene.forged(own, &[])).await;
    deployment.allow_requests(&format!("system:serviceaccount:{}:{name}", deployment.home)).await;
    scene.asks("one that may make requests", "controller: NOT_AN_AGENT", &other, scene.forged(own, &[])).await;
    scene.ends().await;
}

#[tokio::test]
async fn a_request_of_a_plain_user_under_our_label() {
    let Some(scene) = Scene::new(Overlay::ApprovalController).await else { return };
    let Scene { deployment, own, .. } = &scene;
    let name = unique("developer");
    deployment.allow_requests(&name).await;
    let user = deployment.cluster.access.client(&deployment.cluster.user(&name, None)).await;
    scene.asks("with all annotations", "controller: NOT_AN_AGENT", &user, scene.forged(own, &[])).await;
    let posing = format!("system:serviceaccount:{}:csrd-agent", deployment.home);
    let posing = deployment.cluster.access.client(&deployment.cluster.user(&posing, None)).await;
    let expected = "admission: the agent's token is not bound";
    scene.asks("with the agent's name in a client certificate", expected, &posing, scene.forged(own, &[])).await;
    scene.ends().await;
}

#[tokio::test]
async fn a_pod_that_was_deleted_or_is_elsewhere_now() {
    let Some(scene) = Scene::new(Overlay::ApprovalController).await else { return };
    let Scene { deployment, thief, own, .. } = &scene;
    deployment.cluster.delete_pod(own).await;
    // The controller is told of pods and of requests by two watches.
    eventually("the controller knows", async || {
        let answer = deployment.ask(thief, scene.forged(own, &[])).await;
        (!matches!(answer, Answer::Signed { .. })).then_some(())
    })
    .await;
    scene.asks("a deleted pod's UID", "controller: POD_GONE", thief, scene.forged(own, &[])).await;
    let again = deployment.cluster.pod(&deployment.work, &own.name_any(), &deployment.nodes[1], "web", &[]).await;
    scene.asks("and when its name is on node 2", "controller: POD_GONE", thief, scene.forged(own, &[])).await;
    let here = [(NODE, deployment.nodes[0].as_str())];
    scene.asks("the UID that it has there", "controller: POD_ON_OTHER_NODE", thief, scene.forged(&again, &here)).await;
    scene.ends().await;
}

#[tokio::test]
async fn names_of_others() {
    let Some(scene) = Scene::new(Overlay::ApprovalController).await else { return };
    let Scene { deployment, thief, .. } = &scene;
    let work = &deployment.work;
    let policy = unique("services");
    deployment.write_policy(&policy, json!({
        "match": {"kubernetes": {"namespaces": [work]}},
        "allow": {"dnsNames": ["{kubernetes.service}.{kubernetes.namespace}.svc"], "ipAddresses": ["{kubernetes.podIP}"]},
    })).await;
    deployment.condition(&policy, "True").await;
    deployment.cluster.service(work, "api", &[("app", "api")]).await;
    deployment.cluster.service(work, "web", &[("app", "web")]).await;
    // The name of the Service that does select a pod is granted once the controller has read Services.
    let own = &deployment.cluster.pod(work, &unique("web"), &deployment.nodes[0], "web", &[("app", "web")]).await;
    eventually("its own Service", async || {
        let mut request = scene.forged(own, &[]);
        request["spec"]["request"] = json!(pkcs10(&format!("web.{work}.svc")));
        matches!(deployment.ask(thief, request).await, Answer::Signed { .. }).then_some(())
    })
    .await;
    let expected = "controller: NAME_NOT_ALLOWED";
    for (attempt, name) in [
        ("a Service that does not select the pod", format!("api.{work}.svc")),
        ("a Service of another namespace", "kubernetes.default.svc".to_owned()),
        ("another ServiceAccount", format!("spiffe://example.org/ns/{work}/sa/admin")),
        ("another namespace", "spiffe://example.org/ns/kube-system/sa/web".to_owned()),
    ] {
        let mut request = scene.forged(own, &[]);
        request["spec"]["request"] = json!(pkcs10(&name));
        scene.asks(attempt, expected, thief, request).await;
    }
    scene.ends().await;
}

#[tokio::test]
async fn a_signer_outside_its_scope() {
    let Some(scene) = Scene::new(Overlay::ApprovalController).await else { return };
    let Scene { deployment, thief, own, .. } = &scene;
    for signer in ["kubernetes.io/kube-apiserver-client", "kubernetes.io/kubelet-serving", "example.org/any"] {
        let mut request = scene.forged(own, &[]);
        request["spec"]["signerName"] = signer.into();
        request["spec"]["usages"] = json!(["digital signature", "client auth"]);
        scene.asks(signer, "admission: agents make requests for their own", thief, request).await;
    }
    let people = deployment.cluster.namespace(&[]).await;
    deployment.cluster.service_account(&people, "web").await;
    let signer = "kubernetes.io/kube-apiserver-client";
    let whom = json!({"kubernetes": {"namespaces": [people]}});
    let allow =
        json!({"uris": [format!("spiffe://example.org/ns/{}/sa/web", deployment.work)], "usages": ["client auth"]});
    deployment.write_policy(&people, json!({"match": whom, "signer": signer, "allow": allow})).await;
    deployment.condition(&people, "True").await;
    let pod = deployment.cluster.pod(&people, "person", &deployment.nodes[0], "web", &[]).await;
    let mut request = scene.forged(&pod, &[]);
    request["spec"]["usages"] = json!(["client auth"]);
    scene.asks("ours, where policy names another", "controller: SIGNER_NOT_ALLOWED", thief, request).await;
    scene.ends().await;
}

#[tokio::test]
async fn approving_or_deleting_another_nodes_request() {
    let Some(scene) = Scene::new(Overlay::ApprovalController).await else { return };
    let made = make(&scene.neighbour, scene.forged(&scene.others, &[])).await.unwrap();
    let name = made.name_any();
    let by_thief = scene.requests(&scene.thief);
    let error = by_thief.patch_subresource("approval", &name, &PatchParams::default(), &approval()).await.unwrap_err();
    scene.refused("approving it", "RBAC: cannot patch resource \"certificatesigningrequests/app", error).await;
    let error = by_thief.delete(&name, &DeleteParams::default()).await.unwrap_err();
    scene.refused("deleting it", "admission: the request was made by another user or on", error).await;
    let answer = scene.deployment.answer(&name).await;
    assert!(matches!(answer, Answer::Signed { .. }), "{answer:?}");
}

/// Where agents approve, RBAC lets each of them approve for the signer, and only admission tells them apart.
#[tokio::test]
async fn approving_or_deleting_another_nodes_request_where_agents_approve() {
    let Some(scene) = Scene::new(Overlay::ApprovalAgent).await else { return };
    let Scene { deployment, thief, neighbour, own, others } = &scene;
    let made = make(neighbour, scene.forged(others, &[])).await.unwrap();
    let (by_thief, name, params) = (scene.requests(thief), made.name_any(), PatchParams::default());
    let elsewhere = "admission: the request was made by another user or on";
    let error = by_thief.patch_subresource("approval", &name, &params, &approval()).await.unwrap_err();
    scene.refused("approving it", elsewhere, error).await;
    let error = by_thief.delete(&name, &DeleteParams::default()).await.unwrap_err();
    scene.refused("deleting it", elsewhere, error).await;
    scene.asks("making one like it", "admission: annotation csrd.dev/node", thief, scene.forged(others, &[])).await;
    let mut foreign = scene.forged(own, &[]);
    foreign["spec"]["signerName"] = "kubernetes.io/kube-apiserver-client".into();
    foreign["spec"]["usages"] = json!(["client auth"]);
    let theirs = make(&deployment.admin, foreign).await.unwrap().name_any();
    let error = by_thief.patch_subresource("approval", &theirs, &params, &approval()).await.unwrap_err();
    scene.refused("approving one of another signer", "API server: user not permitted to approve", error).await;

    // An approval of one's own may change metadata too.
    let mine = make(thief, scene.forged(own, &[])).await.unwrap().name_any();
    for (attempt, expected, metadata) in [
        ("a finalizer", "admission: a request has no finalizers", json!({"finalizers": ["test.invalid/stays"]})),
        ("another node's annotation", "admission: annotation csrd.dev/node", json!({"annotations": {NODE: "n2"}})),
        ("another node's label", "admission: label csrd.dev/node", json!({"labels": {NODE: "n2"}})),
    ] {
        let approval = Patch::Merge(json!({"metadata": metadata}));
        let error = by_thief.patch_subresource("approval", &mine, &params, &approval).await.unwrap_err();
        scene.refused(&format!("approving with {attempt}"), expected, error).await;
    }

    let now = scene.requests(&deployment.admin).get(&name).await.unwrap();
    assert_eq!(now.resource_version(), made.resource_version(), "nobody has touched it");
    scene.requests(neighbour).patch_subresource("approval", &name, &params, &approval()).await.unwrap();
}

#[tokio::test]
async fn a_request_that_is_huge_or_that_nobody_could_delete() {
    let Some(scene) = Scene::new(Overlay::ApprovalController).await else { return };
    let changes: [(_, _, fn(&mut Value)); 6] = [
        ("with a finalizer", "admission: a request has no finalizers", |it| {
            it["metadata"]["finalizers"] = json!(["test.invalid/stays"]);
        }),
        ("with a long PKCS#10", "admission: spec.request has at most 32768 bytes", |it| {
            let pkcs10 = pkcs10("web.example.org").0;
            it["spec"]["request"] = json!(ByteString([pkcs10, vec![b'\n'; 32_768]].concat()));
        }),
        ("with many labels", "admission: spec.request has at most 32768 bytes; there are", |it| {
            it["metadata"]["labels"] =
                (0..9).map(|label| (format!("l{label}"), Value::from(""))).collect::<Map<_, _>>().into();
        }),
        ("with many annotations", "admission: spec.request has at most 32768 bytes; there are", |it| {
            for number in 0..16 {
                it["metadata"]["annotations"][format!("a{number}")] = "".into();
            }
        }),
        ("with a long annotation", "admission: spec.request has at most 32768 bytes; there are", |it| {
            it["metadata"]["annotations"]["note"] = "x".repeat(254).into();
        }),
        ("under the label of another node", "admission: label csrd.dev/node", |it| {
            it["metadata"]["labels"][NODE] = "n2".into();
        }),
    ];
    for (attempt, expected, change) in changes {
        let mut request = scene.forged(&scene.own, &[]);
        change(&mut request);
        scene.asks(attempt, expected, &scene.thief, request).await;
    }
    scene.ends().await;
}

/// A label has no room for all of such a name; see `node_label`.
#[tokio::test]
async fn the_label_of_another_node_where_names_are_long() {
    let Some(scene) = Scene::new(Overlay::ApprovalController).await else { return };
    let Deployment { cluster, home, .. } = &scene.deployment;
    // Cut at 63 bytes, it ends with a dot, which a label may not.
    let node = cluster.node(&format!("{}.example.org", "n".repeat(62))).await;
    let agent = cluster.pod(home, &unique("agent"), &node.name_any(), "csrd-agent", &[]).await;
    let agent = cluster.access.client(&Identity::Token(cluster.token(&agent, &[]).await)).await;
    let labelled = |label: &str| {
        let mut request = scene.forged(&scene.own, &[(NODE, &node.name_any())]);
        request["metadata"]["labels"][NODE] = label.into();
        request
    };
    make(&agent, labelled(node_label(&node.name_any()))).await.expect("the node's own label");
    for label in ["", "n", &"n".repeat(60), "m"] {
        let said = make(&agent, labelled(label)).await.expect_err(label).to_string();
        let (_, said) = said.split_once("denied request: ").expect("admission refuses");
        line(&format!("{} bytes of a label", label.len()), "label csrd.dev/node must be the node of the agent's", said);
    }
    scene.ends().await;
}

/// All are within policy, so none is denied: they wait, and are deleted by the agent that the node gets anew.
#[tokio::test]
#[ignore = "takes all there is of two cores: .ci/run, or --include-ignored"]
async fn ten_thousand_requests() {
    const MANY: usize = 10_000;
    const AT_ONCE: usize = 64;
    const MANY_MINUTES: Duration = Duration::from_secs(1800);
    let Some(scene) = Scene::new(Overlay::ApprovalController).await else { return };
    let Scene { deployment, thief, neighbour, own, others } = &scene;
    let node = &deployment.nodes[0];
    let mut template = scene.forged(own, &[]);
    template["metadata"]["labels"][NODE] = node.as_str().into();
    let flood = futures_util::stream::iter(0..MANY).for_each_concurrent(AT_ONCE, |_| {
        let mut request = template.clone();
        request["metadata"]["name"] = unique("flood").into();
        async { drop(make(thief, request).await.unwrap()) }
    });
    let mut served = 0;
    let serve = async {
        loop {
            let answer = deployment.ask(neighbour, deployment.request(others)).await;
            assert!(matches!(answer, Answer::Signed { .. }), "{answer:?}");
            served += 1;
        }
    };
    tokio::select! { () = flood => {}, () = serve => {} }
    let requests = scene.requests(&deployment.admin);
    let of_node = ListParams::default().labels(&format!("{NODE}={node}"));
    let all = requests.list(&of_node).await.unwrap().items;
    let conditions = |it: &Request| it.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    let waiting = all.iter().filter(|it| conditions(it).is_empty()).count();
    let denied = all.iter().filter(|it| conditions(it).iter().any(|it| it.type_ != "Approved")).count();
    let got = format!("{} made, {denied} denied; {waiting} wait, {served} of node 2 signed meanwhile", all.len());
    line("all within policy, 64 at a time", &format!("{MANY} made, 0 denied"), &got);
    assert!(served > 0 && waiting > 0, "{got}");

    let (agent, metrics, stop) = (Agent::ask(thief).await.unwrap(), Metrics::new(), CancellationToken::new());
    let later = Clock::paused(SystemTime::now() + ORPHAN_AGE);
    let (_cleaner, run) = Cleaner::new(thief.clone(), agent, node.clone(), later, metrics, stop);
    let cleaned = async {
        while !requests.list(&of_node.clone().limit(1)).await.unwrap().items.is_empty() {
            sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::select! {
        () = run => panic!("the cleaner ends before it is told to"),
        cleaned = timeout(MANY_MINUTES, cleaned) => cleaned.expect("they are deleted in the end"),
    }
    let left = requests.list(&of_node).await.unwrap().items.len();
    line("when node 1 gets its agent anew", "0 left", &format!("{left} left"));
    scene.ends().await;
}
