//! `csrd controller` as a process, on a real control plane, with no more rights than it needs.

pub(crate) mod agent;
pub(crate) mod deployment;
mod shipped;

use std::{sync::Arc, time::Duration};

use csrd::{
    clock::Clock,
    controller::MAX_WAITING_PER_NODE,
    metrics::Metrics,
    signer::{
        Sign as _,
        embedded::{DEFAULT_CA_LIFETIME, Embedded},
    },
    x509::{Bundle, Chain},
};
use http::StatusCode;
use k8s_openapi::api::{
    certificates::v1::{CertificateSigningRequest as Request, ClusterTrustBundle},
    core::v1::{ConfigMap, Namespace, Node, Secret},
    discovery::v1::EndpointSlice,
    events::v1::Event,
};
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use opentelemetry_proto::tonic::trace::v1::Span;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use self::deployment::{Answer, Deployment, NEVER, make, pkcs10, pkcs10_of};
use crate::{
    cluster::{ControlPlane, Identity, Options, eventually, unique},
    telemetry::{Collector, Received},
};

#[track_caller]
fn signed(answer: Answer) -> Chain {
    match answer {
        Answer::Signed { chain, .. } => Chain::from_pem(chain.as_bytes()).unwrap(),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn denied(answer: Answer, reason: &str, words: &str) {
    match answer {
        Answer::Denied(condition) => {
            let message = condition.message.unwrap();
            assert_eq!(condition.reason.as_deref(), Some(reason), "{message}");
            assert!(message.contains(words), "{message:?} does not say {words:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_an_agent_asks_within_policy_is_approved_and_signed_by_the_published_root() {
    let Some(deployment) = Deployment::new().await else { return };
    let _controller = deployment.controller("").await;
    let (agent, pod) = (deployment.agent(0).await, deployment.workload(0).await);
    let Answer::Signed { chain, approval } = deployment.ask(&agent, deployment.request(&pod)).await else {
        panic!("it is not signed")
    };
    assert_eq!(approval.reason.as_deref(), Some("ALLOWED_BY_POLICY"));
    let message = approval.message.unwrap();
    assert!(message.starts_with(&format!("policy \"{}\" allows it for pod", deployment.work)), "{message}");
    let chain = Chain::from_pem(chain.as_bytes()).unwrap();
    assert_eq!(chain.certificates().len(), 1, "the root itself is in no chain");
    let roots = deployment.roots(&deployment.home, |_| true).await;
    assert_eq!(Bundle::from_pem(roots.as_bytes()).unwrap().roots().len(), 1);
    if !deployment.cluster.serves("certificates.k8s.io/v1", "clustertrustbundles").await {
        return;
    }
    let bundles: Api<ClusterTrustBundle> = Api::all(deployment.admin.clone());
    let bundle = bundles.get(&format!("{}:csrd", deployment.signer.replace('/', ":"))).await.unwrap();
    assert_eq!(bundle.spec.trust_bundle, roots);
}

#[tokio::test]
async fn the_name_of_its_service_is_a_pods_as_soon_as_a_policy_says_so() {
    let Some(deployment) = Deployment::new().await else { return };
    let _controller = deployment.controller("").await;
    let work = &deployment.work;
    let agent = deployment.agent(0).await;
    let pod = deployment.cluster.pod(work, "api", &deployment.nodes[0], "web", &[("app", "api")]).await;
    deployment.cluster.service(work, "api", &[("app", "api")]).await;
    signed(deployment.ask(&agent, deployment.request(&pod)).await);
    deployment.policy(json!({"dnsNames": ["{kubernetes.service}.{kubernetes.namespace}.svc"]})).await;
    let named = |service: &str| {
        let mut request = deployment.request(&pod);
        request["spec"]["request"] = json!(pkcs10(&format!("{service}.{work}.svc")));
        request
    };
    signed(deployment.ask(&agent, named("api")).await);
    denied(deployment.ask(&agent, named("db")).await, "NAME_NOT_ALLOWED", "matches none of its entries");
}

/// The controller does not count on it; what gets past it, `stolen_token` shows.
#[tokio::test]
async fn what_admission_would_refuse_is_denied_where_there_is_none() {
    let Some(deployment) = Deployment::new().await else { return };
    let _controller = deployment.controller("").await;
    let (agent, own, others) = (deployment.agent(0).await, deployment.workload(0).await, deployment.workload(1).await);
    let of = |pod, change: fn(&mut Value)| {
        let mut request = deployment.request(pod);
        change(&mut request);
        request
    };
    let stolen = of(&others, |_| ());
    denied(deployment.ask(&agent, stolen).await, "OTHER_NODE_CLAIMED", "the requester's token is bound to node");
    let silent = of(&own, |it| it["metadata"]["annotations"] = json!({}));
    denied(deployment.ask(&agent, silent).await, "ANNOTATION_MISSING", "csrd.dev/node");
    let forever = of(&own, |it| it["spec"]["expirationSeconds"] = Value::Null);
    denied(deployment.ask(&agent, forever).await, "EXPIRATION_MISSING", "spec.expirationSeconds");
    let signs = of(&own, |it| it["spec"]["usages"] = json!(["cert sign"]));
    denied(deployment.ask(&agent, signs).await, "USAGE_NOT_ALLOWED", "cert sign");
    let unbound = deployment.cluster.unbound_token(&deployment.home, "csrd-agent", &[]).await;
    let unbound = deployment.cluster.access.client(&Identity::Token(unbound)).await;
    denied(deployment.ask(&unbound, deployment.request(&own)).await, "TOKEN_NOT_BOUND", "node-name");
    // The agent's token outlives its pod for some seconds, and the controller is told of pods and requests by two watches.
    deployment.cluster.delete_pod(&deployment.agents[0]).await;
    let answer = eventually("the agent's end", async || match make(&agent, deployment.request(&own)).await {
        Ok(made) => match deployment.answer(&made.name_any()).await {
            Answer::Signed { .. } => None,
            answer => Some(Some(answer)),
        },
        Err(_) => Some(None),
    });
    if let Some(answer) = answer.await {
        denied(answer, "AGENT_GONE", "is gone");
    }
}

#[tokio::test]
async fn what_is_not_addressed_to_us_is_left_alone_and_what_others_approved_is_judged() {
    let Some(deployment) = Deployment::new().await else { return };
    let _controller = deployment.controller("").await;
    let (agent, pod) = (deployment.agent(0).await, deployment.workload(0).await);
    let mut foreign = deployment.request(&pod);
    foreign["spec"]["signerName"] = "kubernetes.io/kube-apiserver-client".into();
    foreign["spec"]["usages"] = json!(["digital signature", "client auth"]);
    let foreign = make(&agent, foreign).await.unwrap();
    let mut by_hand = deployment.request(&pod);
    by_hand["metadata"]["labels"] = json!({});
    let by_hand = make(&deployment.admin, by_hand).await.unwrap();
    // What came before has been seen when this is answered.
    signed(deployment.ask(&agent, deployment.request(&pod)).await);
    let requests: Api<Request> = Api::all(deployment.admin.clone());
    for left in [&foreign, &by_hand] {
        let now = requests.get(&left.name_any()).await.unwrap();
        assert_eq!(now.resource_version(), left.resource_version(), "nobody has touched it");
    }
    let approve = json!({"status": {"conditions": [{"type": "Approved", "status": "True", "reason": "ByHand"}]}});
    let name = by_hand.name_any();
    requests.patch_subresource("approval", &name, &PatchParams::default(), &Patch::Merge(approve)).await.unwrap();
    match deployment.answer(&name).await {
        Answer::Failed(condition) => assert_eq!(condition.reason.as_deref(), Some("NOT_AN_AGENT")),
        other => panic!("{other:?}"),
    }
}

/// What the API server must do for a verdict to be about the request that was judged.
#[tokio::test]
async fn a_verdict_on_a_request_that_was_made_anew_under_its_name_is_a_conflict() {
    let Some(deployment) = Deployment::new().await else { return };
    let pod = deployment.workload(0).await;
    let request = deployment.request(&pod);
    let judged = make(&deployment.admin, request.clone()).await.unwrap();
    let requests: Api<Request> = Api::all(deployment.admin.clone());
    requests.delete(&judged.name_any(), &DeleteParams::default()).await.unwrap();
    let another = make(&deployment.admin, request).await.unwrap();
    for (subresource, status) in [
        ("approval", json!({"conditions": [{"type": "Approved", "status": "True"}]})),
        ("status", json!({"certificate": "aaaa"})),
    ] {
        let patch = json!({"metadata": {"resourceVersion": judged.resource_version()}, "status": status});
        let (parameters, patch) = (PatchParams::default(), Patch::Merge(&patch));
        match requests.patch_subresource(subresource, &another.name_any(), &parameters, &patch).await {
            Err(kube::Error::Api(status)) => assert!(status.is_conflict(), "{status}"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn requests_for_another_signer_are_approved_where_the_controller_is_told_to_and_signed_there() {
    let Some(deployment) = Deployment::new().await else { return };
    let signer = "kubernetes.io/kube-apiserver-client";
    deployment.let_approve(signer).await;
    let people = deployment.cluster.namespace(&[]).await;
    deployment.cluster.service_account(&people, "web").await;
    deployment
        .write_policy(&people, json!({
            "match": {"kubernetes": {"namespaces": [people]}},
            "signer": signer,
            "allow": {"uris": [format!("spiffe://example.org/ns/{}/sa/web", deployment.work)], "usages": ["client auth"]},
        }))
        .await;
    let _controller = deployment.controller(&format!("approve: [{signer}]")).await;
    let pod = deployment.cluster.pod(&people, "person", &deployment.nodes[0], "web", &[]).await;
    let mut request = deployment.request(&pod);
    request["spec"]["signerName"] = signer.into();
    request["spec"]["usages"] = json!(["client auth"]);
    let Answer::Signed { approval, .. } = deployment.ask(&deployment.agent(0).await, request).await else {
        panic!("it is not signed")
    };
    assert_eq!(approval.reason.as_deref(), Some("ALLOWED_BY_POLICY"));
}

#[tokio::test]
async fn a_kubelets_own_serving_certificate_is_approved_where_the_controller_is_told_to() {
    let Some(deployment) = Deployment::new().await else { return };
    let signer = "kubernetes.io/kubelet-serving";
    deployment.let_approve(signer).await;
    let node = &deployment.nodes[0];
    let nodes: Api<Node> = Api::all(deployment.admin.clone());
    let (own, others) = (format!("{node}.example.org"), format!("{}.example.org", deployment.nodes[1]));
    let user = format!("system:node:{node}");
    let kubelet = deployment.cluster.access.client(&deployment.cluster.user(&user, Some("system:nodes"))).await;
    let endpoint = "192.0.2.77";
    let slice = json!({
        "metadata": {"namespace": "default", "name": unique("kubernetes"), "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [endpoint]}],
    });
    let slices: Api<EndpointSlice> = Api::namespaced(deployment.admin.clone(), "default");
    slices.create(&Default::default(), &serde_json::from_value(slice).unwrap()).await.unwrap();
    let host = deployment.cluster.access.url.strip_prefix("https://").unwrap().split(':').next().unwrap();
    let claimed =
        ["10.96.0.1", "10.96.255.7", "169.254.169.254", endpoint, host, "kubernetes.default.svc", "kubernetes"];
    // The kubelet of the first writes that, to have the certificates of others and of the API server.
    let lies = Api::<Node>::all(kubelet.clone());
    let all_lies: Vec<_> = claimed.iter().copied().chain([own.as_str(), &others, "198.51.100.7"]).collect();
    for (nodes, node, names) in [(&lies, node, all_lies), (&nodes, &deployment.nodes[1], vec![others.as_str()])] {
        let type_of = |name: &str| if name.parse::<std::net::IpAddr>().is_ok() { "InternalIP" } else { "InternalDNS" };
        let addresses: Vec<_> = names.iter().map(|name| json!({"type": type_of(name), "address": name})).collect();
        let addresses = json!({"status": {"addresses": addresses}});
        nodes.patch_status(node, &PatchParams::default(), &Patch::Merge(&addresses)).await.unwrap();
    }
    let request = |name: &str| {
        json!({"metadata": {"name": unique("kubelet")}, "spec": {
            "request": pkcs10_of(&user, "system:nodes", name),
            "signerName": signer,
            "usages": ["digital signature", "server auth"],
        }})
    };
    let left = make(&deployment.admin, request(&own)).await.unwrap();
    let _controller = deployment.controller("kubeletServing: true").await;
    let Answer::Signed { approval, .. } = deployment.ask(&kubelet, request(&own)).await else {
        panic!("it is not signed")
    };
    assert_eq!(approval.reason.as_deref(), Some("NODES_OWN_ADDRESSES"));
    for name in claimed {
        denied(deployment.ask(&kubelet, request(name)).await, "NAME_NOT_ALLOWED", &format!("{name:?} is no Node's: "));
    }
    let Answer::Signed { .. } = deployment.ask(&kubelet, request("198.51.100.7")).await else {
        panic!("it is its own")
    };
    let words = format!("{others:?} is an address of Node {} too", deployment.nodes[1]);
    denied(deployment.ask(&kubelet, request(&others)).await, "NAME_NOT_ALLOWED", &words);
    let requests: Api<Request> = Api::all(deployment.admin.clone());
    let now = requests.get(&left.name_any()).await.unwrap();
    assert_eq!(now.resource_version(), left.resource_version(), "it was made by no node");
}

#[tokio::test]
async fn of_two_replicas_one_leads_and_the_other_takes_over() {
    let Some(deployment) = Deployment::new().await else { return };
    let (first, second) = (deployment.controller("").await, deployment.controller("").await);
    let (agent, pod) = (deployment.agent(0).await, deployment.workload(0).await);
    let before = signed(deployment.ask(&agent, deployment.request(&pod)).await);
    eventually("one leads", async || (first.leads() != second.leads()).then_some(())).await;
    let (leader, heir) = if first.leads() { (first, second) } else { (second, first) };
    leader.kill();
    let after = signed(deployment.ask(&agent, deployment.request(&pod)).await);
    eventually("the heir leads", async || heir.leads().then_some(())).await;
    let roots = Bundle::from_pem(deployment.roots(&deployment.home, |_| true).await.as_bytes()).unwrap();
    assert_eq!(roots.roots().len(), 1, "one CA for both: {} {}", before.serial_hex(), after.serial_hex());

    // One that is told to stop gives the lease back.
    let successor = deployment.controller("").await;
    assert_eq!(heir.stop().await, Some(0));
    signed(deployment.ask(&agent, deployment.request(&pod)).await);
    eventually("the successor leads", async || successor.leads().then_some(())).await;
}

#[tokio::test]
async fn replicas_that_race_make_one_ca_and_follow_it() {
    let Some(deployment) = Deployment::new().await else { return };
    let open = |_| {
        let (client, home) = (deployment.admin.clone(), deployment.home.clone());
        async move {
            let (clock, metrics) = (Clock::system(), Metrics::new().signer("test"));
            Embedded::open_secret(client, &home, "csrd-ca", DEFAULT_CA_LIFETIME, &clock, metrics).await.unwrap()
        }
    };
    let replicas = futures_util::future::join_all((0..6).map(open)).await;
    let roots: Vec<_> = replicas.iter().map(|it| it.bundle().borrow().pem()).collect();
    assert!(roots.iter().all(|it| *it == roots[0]), "all have the same root");
    let secrets: Api<Secret> = Api::namespaced(deployment.admin.clone(), &deployment.home);
    let secret = secrets.get("csrd-ca").await.unwrap();
    let keys: Vec<_> = secret.data.iter().flatten().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys, ["ca-1.pem"]);
    assert_eq!(secret.labels()["app.kubernetes.io/managed-by"], "csrd");

    // What somebody else put there is followed; what is no CA, or is gone, changes nothing.
    let replica = Arc::new(replicas.into_iter().next().unwrap());
    let reload = || {
        let replica = replica.clone();
        async move { tokio::task::spawn_blocking(move || replica.reload()).await.unwrap() }
    };
    let patch = |data: Value| Patch::Merge(json!({"data": data}));
    let write = |data: Value| {
        let (secrets, patch) = (secrets.clone(), patch(data));
        async move { secrets.patch("csrd-ca", &PatchParams::default(), &patch).await.unwrap() }
    };
    write(json!({"ca-1.pem": "Z2FyYmFnZQ=="})).await;
    let error = reload().await.unwrap_err().to_string();
    assert!(error.ends_with("csrd-ca/ca-1.pem cannot be used"), "{error}");
    secrets.delete("csrd-ca", &DeleteParams::default()).await.unwrap();
    let error = reload().await.unwrap_err().to_string();
    assert!(error.contains("is gone, and the CA it held signs on"), "{error}");
    assert_eq!(replica.bundle().borrow().pem(), roots[0]);
}

#[tokio::test]
async fn roots_are_put_right_where_others_change_them_and_go_where_they_are_asked_for() {
    // Controllers of other tests would put their own roots where the label asks for any.
    let Some(cluster) = ControlPlane::start(Options::default()).await else { return };
    let deployment = Deployment::on(&cluster).await;
    let (asked, labelled) = (deployment.cluster.namespace(&[]).await, deployment.cluster.namespace(&[]).await);
    let controller = deployment.controller(&format!("trustBundle: {{namespaces: [{asked}]}}")).await;
    let roots = deployment.roots(&deployment.home, |_| true).await;
    assert_eq!(deployment.roots(&asked, |_| true).await, roots);
    let namespaces: Api<Namespace> = Api::all(deployment.admin.clone());
    let label = Patch::Merge(json!({"metadata": {"labels": {"csrd.dev/trust-bundle": "enabled"}}}));
    namespaces.patch(&labelled, &PatchParams::default(), &label).await.unwrap();
    assert_eq!(deployment.roots(&labelled, |_| true).await, roots);

    for namespace in [&deployment.home, &labelled] {
        let maps: Api<ConfigMap> = Api::namespaced(deployment.admin.clone(), namespace);
        maps.delete("csrd-trust-bundle", &DeleteParams::default()).await.unwrap();
        assert_eq!(deployment.roots(namespace, |_| true).await, roots);
        let change = Patch::Merge(json!({"data": {"ca.crt": "evil"}}));
        maps.patch("csrd-trust-bundle", &PatchParams::default(), &change).await.unwrap();
        assert_eq!(deployment.roots(namespace, |it| it != "evil").await, roots);
    }
    if !deployment.cluster.serves("certificates.k8s.io/v1", "clustertrustbundles").await {
        return;
    }
    let name = format!("{}:csrd", deployment.signer.replace('/', ":"));
    let bundles: Api<ClusterTrustBundle> = Api::all(deployment.admin.clone());
    let restored = async {
        while bundles.get_opt(&name).await.unwrap().is_none_or(|it| it.spec.trust_bundle != roots) {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(NEVER, restored).await.unwrap_or_else(|_| panic!("{}", controller.said()));
}

#[tokio::test]
async fn a_node_with_very_many_requests_delays_no_other_node() {
    const MANY: usize = 400;
    let Some(deployment) = Deployment::new().await else { return };
    let limits = "limits: {perNode: {perSecond: 1, burst: 5}}";
    let (greedy, modest) = (deployment.agent(0).await, deployment.agent(1).await);
    let (pod, other) = (deployment.workload(0).await, deployment.workload(1).await);
    for _ in 0..MANY {
        let mut request = deployment.request(&pod);
        request["metadata"]["labels"]["test"] = deployment.work.clone().into();
        make(&greedy, request).await.unwrap();
    }
    let _controller = deployment.controller(limits).await;
    for _ in 0..3 {
        signed(deployment.ask(&modest, deployment.request(&other)).await);
    }
    let requests: Api<Request> = Api::all(deployment.admin.clone());
    let all = requests.list(&ListParams::default().labels(&format!("test={}", deployment.work))).await.unwrap();
    let conditions = |it: &Request| it.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    let waiting = all.iter().filter(|it| conditions(it).is_empty()).count();
    assert!(waiting > MANY / 2, "{waiting} of {MANY} wait, and none is denied");
    assert!(all.iter().all(|it| conditions(it).iter().all(|condition| condition.type_ == "Approved")));
}

#[tokio::test]
async fn what_found_no_room_at_first_is_answered_in_the_end() {
    let Some(deployment) = Deployment::new().await else { return };
    let (agent, pod) = (deployment.agent(0).await, deployment.workload(0).await);
    let mut names = Vec::new();
    for _ in 0..2 * MAX_WAITING_PER_NODE {
        names.push(make(&agent, deployment.request(&pod)).await.unwrap().name_any());
    }
    let _controller = deployment.controller("limits: {perNode: {perSecond: 1000, burst: 1000}}").await;
    for name in names {
        signed(deployment.answer(&name).await);
    }
}

#[tokio::test]
async fn a_policy_says_in_its_status_what_became_of_it() {
    // Controllers of other tests would say what they found.
    let Some(cluster) = ControlPlane::start(Options::default()).await else { return };
    let deployment = Deployment::on(&cluster).await;
    let _controller = deployment.controller("").await;
    let accepted = deployment.condition(&deployment.work, "True").await;
    assert_eq!((accepted["reason"].as_str(), accepted["observedGeneration"].as_i64()), (Some("Valid"), Some(1)));
    deployment.policy(json!({"dnsNames": ["*"]})).await;
    let refused = deployment.condition(&deployment.work, "False").await;
    let message = refused["message"].as_str().unwrap();
    assert!(message.starts_with("generation 1 stays in force; spec.allow.dnsNames[0]: "), "{message}");
    assert_eq!((refused["reason"].as_str(), refused["observedGeneration"].as_i64()), (Some("Invalid"), Some(2)));
    let events: Api<Event> = Api::all(deployment.admin.clone());
    let told = async |wanted: [&str; 3]| {
        eventually(wanted[1], async || {
            let all = events.list(&ListParams::default()).await.unwrap();
            all.into_iter().find(|it| {
                let about = it.regarding.as_ref().and_then(|it| it.name.as_deref());
                let said = [&it.type_, &it.reason, &it.note].map(Option::as_deref);
                about == Some(&*deployment.work) && said == wanted.map(Some)
            })
        })
        .await
    };
    told(["Warning", "PolicyRejected", message]).await;
    // The last good version decides.
    let (agent, pod) = (deployment.agent(0).await, deployment.workload(0).await);
    signed(deployment.ask(&agent, deployment.request(&pod)).await);
    deployment.policy(json!({"dnsNames": ["web.example.org"]})).await;
    deployment.condition(&deployment.work, "True").await;
    told(["Normal", "PolicyAccepted", "the policy is in force"]).await;
    denied(deployment.ask(&agent, deployment.request(&pod)).await, "NAME_NOT_ALLOWED", "spiffe://example.org/ns/");
}

#[tokio::test]
async fn a_verdict_is_a_part_of_the_trace_that_the_request_names() {
    let Some(deployment) = Deployment::new().await else { return };
    let mut collector = Collector::http(StatusCode::OK).await;
    let endpoint = format!("http://{}", collector.address);
    let variables = [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "10")];
    let _controller = deployment.controller_with("", &variables).await;
    let (agent, pod) = (deployment.agent(0).await, deployment.workload(0).await);
    let (trace, parent) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    let mut request = deployment.request(&pod);
    request["metadata"]["annotations"]["csrd.dev/traceparent"] = format!("00-{trace}-{parent}-01").into();
    signed(deployment.ask(&agent, request).await);

    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let ours = |received: &Received| -> Vec<Span> {
        received.all.iter().filter(|span| hex(&span.trace_id) == trace).cloned().collect()
    };
    let spans = ours(&collector.until(|received| ours(received).len() >= 3).await);
    let named =
        |name: &str| spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("no {name} in {spans:?}"));
    let verdict = named("verdict");
    assert_eq!(hex(&verdict.parent_span_id), parent);
    for write in ["approve", "sign"] {
        let write = named(write);
        assert_eq!(write.parent_span_id, verdict.span_id);
        let audit_id = write.attributes.iter().find(|attribute| attribute.key == "csrd.audit_id");
        assert!(format!("{audit_id:?}").len() > 36, "{audit_id:?}");
    }
}
