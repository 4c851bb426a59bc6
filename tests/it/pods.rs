//! Pods and their tokens, on a real API server; and processes in cgroups as the kubelet makes them, at a real socket.

mod caller;
pub(crate) mod cgroup;
mod joining;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use csrd::{
    attest::{Attestor, PodFacts, Pods, Token, Tokens, Workload, pods::Scope},
    clock::Clock,
};
use http::Method;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::cluster::{ControlPlane, Fault, FaultProxy, Identity, Options, Part, eventually};

/// Far above what anything here takes, for a machine under load.
const PATIENCE: Duration = Duration::from_secs(120);
const AUDIENCE: &str = "csrd";

/// Pods that are followed until this is dropped.
struct Followed {
    pods: Pods,
    _running: JoinSet<()>,
}

impl Followed {
    fn new(client: Client, scope: Scope) -> Self {
        let pods = Pods::new(scope, Clock::system());
        pods.want_services(false);
        let mut running = JoinSet::new();
        running.spawn(pods.clone().run(client, CancellationToken::new()));
        Self { pods, _running: running }
    }

    /// Waits until `is` is true of the pods.
    async fn until(&self, what: &str, is: impl Fn(&Pods) -> bool) {
        let mut changes = self.pods.changed();
        let becomes = async {
            while !is(&self.pods) {
                changes.changed().await.unwrap();
            }
        };
        timeout(PATIENCE, becomes).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    async fn until_pod(&self, pod: &Pod, what: &str, is: impl Fn(&PodFacts) -> bool) {
        let uid = pod.uid().unwrap();
        self.until(what, |pods| pods.by_uid(&uid).is_some_and(|workload| is(workload.pod().unwrap()))).await;
    }

    async fn until_gone(&self, pod: &Pod) {
        let uid = pod.uid().unwrap();
        self.until("the pod is gone", |pods| pods.by_uid(&uid).is_none()).await;
    }

    async fn workload(&self, pod: &Pod) -> Arc<Workload> {
        self.until_pod(pod, "the pod is known", |_| true).await;
        self.pods.by_uid(&pod.uid().unwrap()).unwrap()
    }
}

async fn relabel(cluster: &ControlPlane, pod: &Pod, labels: Value) {
    let pods: Api<Pod> = Api::namespaced(cluster.admin().await, &pod.namespace().unwrap());
    let patch = Patch::Merge(json!({"metadata": {"labels": labels}}));
    pods.patch(&pod.name_any(), &PatchParams::default(), &patch).await.unwrap();
}

#[tokio::test]
async fn pods_of_the_node_are_followed_through_every_change_of_them_and_of_their_namespace() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let namespace = cluster.namespace(&[("tier", "gold")]).await;
    let (node, other) = (cluster.node("n").await.name_any(), cluster.node("n").await.name_any());
    let followed = Followed::new(cluster.admin().await, Scope::Node(node.clone()));
    let web = cluster.pod(&namespace, "web", &node, "default", &[("app", "web")]).await;
    followed.until_pod(&web, "it runs and has an address", |pod| !pod.ips.is_empty()).await;
    let facts = followed.workload(&web).await.pod().unwrap().clone();
    let mut namespace_labels = facts.namespace_labels.clone();
    assert_eq!(namespace_labels.remove("kubernetes.io/metadata.name").as_ref(), Some(&namespace));
    let address = web.status.as_ref().unwrap().pod_ip.as_ref().unwrap().parse().unwrap();
    let expected = PodFacts {
        namespace: namespace.clone(),
        name: "web".to_owned(),
        uid: web.uid().unwrap(),
        service_account: "default".to_owned(),
        node: node.clone(),
        labels: [("app".to_owned(), "web".to_owned())].into(),
        namespace_labels: facts.namespace_labels.clone(),
        ips: vec![address],
        services: BTreeSet::new(),
    };
    assert_eq!(facts, expected);
    assert_eq!(namespace_labels, [("tier".to_owned(), "gold".to_owned())].into());

    relabel(cluster, &web, json!({"app": "other"})).await;
    followed.until_pod(&web, "it is relabelled", |pod| pod.labels["app"] == "other").await;
    let namespaces: Api<Namespace> = Api::all(cluster.admin().await);
    let lead = Patch::Merge(json!({"metadata": {"labels": {"tier": "lead"}}}));
    namespaces.patch(&namespace, &PatchParams::default(), &lead).await.unwrap();
    followed.until_pod(&web, "its namespace is relabelled", |pod| pod.namespace_labels["tier"] == "lead").await;

    let elsewhere = cluster.pod(&namespace, "elsewhere", &other, "default", &[]).await;
    cluster.delete_pod(&web).await;
    let replaced = cluster.pod(&namespace, "web", &node, "default", &[]).await;
    followed.until_gone(&web).await;
    followed.workload(&replaced).await;
    assert!(followed.pods.by_uid(&elsewhere.uid().unwrap()).is_none(), "of another node");

    let pods: Api<Pod> = Api::namespaced(cluster.admin().await, &namespace);
    let succeeded = Patch::Merge(json!({"status": {"phase": "Succeeded"}}));
    pods.patch_status("web", &PatchParams::default(), &succeeded).await.unwrap();
    followed.until_gone(&replaced).await;
}

#[tokio::test]
async fn while_the_api_server_is_silent_pods_stay_and_what_has_vanished_meanwhile_is_gone_afterwards() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let (namespace, node) = (cluster.namespace(&[]).await, cluster.node("n").await.name_any());
    let proxy = FaultProxy::start(cluster, &cluster.admin_identity()).await;
    let client = proxy.access.client(&cluster.admin_identity()).await;
    let (stays, goes) = (
        cluster.pod(&namespace, "stays", &node, "default", &[]).await,
        cluster.pod(&namespace, "goes", &node, "default", &[]).await,
    );
    let followed = Followed::new(client, Scope::Node(node.clone()));
    for pod in [&stays, &goes] {
        followed.workload(pod).await;
    }
    // A watch that is taken up again may still be served; one that is too old makes a new list.
    proxy.fail(Method::GET, "/api/v1/pods", usize::MAX, Fault::status(500, "InternalError", "not today"));
    proxy.cut();
    let seen = proxy.seen().len();
    cluster.delete_pod(&goes).await;
    let comes = cluster.pod(&namespace, "comes", &node, "default", &[]).await;
    let asked_again = async {
        while proxy.seen().len() < seen + 2 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, asked_again).await.expect("it tries again");
    assert!(followed.pods.by_uid(&goes.uid().unwrap()).is_some(), "nobody has said that it is gone");
    assert!(followed.pods.synced() && followed.pods.ready().is_ok());
    proxy.heal();
    proxy.fail(Method::GET, "/api/v1/pods?&watch=true", 1, Fault::too_old());
    followed.workload(&comes).await;
    followed.until_gone(&goes).await;
    assert!(followed.pods.by_uid(&stays.uid().unwrap()).is_some());
}

#[tokio::test]
async fn a_restarted_api_server_is_followed_on() {
    let Some(cluster) = ControlPlane::start(Options::default()).await else { return };
    let (namespace, node) = (cluster.namespace(&[]).await, cluster.node("n").await.name_any());
    let followed = Followed::new(cluster.admin().await, Scope::Node(node.clone()));
    let before = cluster.pod(&namespace, "before", &node, "default", &[]).await;
    followed.until_pod(&before, "it runs and has an address", |pod| !pod.ips.is_empty()).await;
    let workload = followed.workload(&before).await;
    cluster.kill(Part::ApiServer);
    assert!(followed.pods.by_uid(&before.uid().unwrap()).is_some());
    cluster.restart(Part::ApiServer).await;
    let after = cluster.pod(&namespace, "after", &node, "default", &[]).await;
    followed.workload(&after).await;
    assert!(Arc::ptr_eq(&workload, &followed.workload(&before).await), "a new list of the same is no news");
    cluster.delete_pod(&before).await;
    followed.until_gone(&before).await;
}

#[tokio::test]
async fn services_that_select_a_pod_are_followed_while_they_are_wanted() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let (namespace, node) = (cluster.namespace(&[]).await, cluster.node("n").await.name_any());
    let web = cluster.pod(&namespace, "web", &node, "default", &[("app", "web")]).await;
    cluster.service(&namespace, "web", &[("app", "web")]).await;
    cluster.service(&namespace, "other", &[("app", "other")]).await;
    cluster.service(&namespace, "by-hand", &[]).await;
    let followed = Followed::new(cluster.admin().await, Scope::Node(node));
    assert!(followed.workload(&web).await.pod().unwrap().services.is_empty());
    let services = |names: &'static [&str]| move |pod: &PodFacts| pod.services.iter().eq(names);
    followed.pods.want_services(true);
    followed.until_pod(&web, "one is known", services(&["web"])).await;
    let slice = json!({
        "metadata": {"namespace": namespace, "name": "by-hand-1", "labels": {"kubernetes.io/service-name": "by-hand"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.1.2.3"], "targetRef": {"kind": "Pod", "uid": web.uid()}}],
    });
    let slices: Api<k8s_openapi::api::discovery::v1::EndpointSlice> =
        Api::namespaced(cluster.admin().await, &namespace);
    slices.create(&Default::default(), &serde_json::from_value(slice).unwrap()).await.unwrap();
    followed.until_pod(&web, "two are", services(&["by-hand", "web"])).await;
    relabel(cluster, &web, json!({"app": "other"})).await;
    followed.until_pod(&web, "its labels select another", services(&["by-hand", "other"])).await;
    slices.delete("by-hand-1", &DeleteParams::default()).await.unwrap();
    followed.until_pod(&web, "nobody names it", services(&["other"])).await;
    followed.pods.want_services(false);
    assert!(followed.workload(&web).await.pod().unwrap().services.is_empty());
}

#[tokio::test]
async fn where_rbac_forbids_it_is_said_what_to_add() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let (namespace, node) = (cluster.namespace(&[]).await, cluster.node("n").await.name_any());
    let token = cluster.unbound_token(&namespace, "default", &[]).await;
    let followed = Followed::new(cluster.access.client(&Identity::Token(token)).await, Scope::Node(node));
    let said = async {
        loop {
            match followed.pods.ready() {
                Err(said) if said.contains("forbidden") => return said,
                _ => sleep(Duration::from_millis(10)).await,
            }
        }
    };
    let said = timeout(PATIENCE, said).await.expect("it is said");
    let user = format!("system:serviceaccount:{namespace}:default");
    let expected = format!(
        "pods cannot be listed: pods is forbidden: User \"{user}\" cannot list resource \"pods\" in API group \"\" at \
         the cluster scope; the ClusterRole needs {{apiGroups: [\"\"], resources: [pods], verbs: [list, watch]}}"
    );
    assert_eq!(said, expected);
    let account = json!({"kind": "ServiceAccount", "name": "default", "namespace": namespace});
    let rule = json!({"apiGroups": [""], "resources": ["pods", "namespaces"], "verbs": ["list", "watch"]});
    cluster.allow(account, json!([rule])).await;
    timeout(PATIENCE, followed.pods.until_synced()).await.expect("that was all that was missing");
}

fn attestor(client: Client, node: &str, followed: &Followed) -> Attestor {
    let tokens = Tokens::new(client, AUDIENCE.to_owned(), node.to_owned());
    Attestor::new().in_cluster(followed.pods.clone(), tokens, None).unwrap()
}

async fn verdict(attestor: &Attestor, workload: &Workload, token: &str) -> Result<(), &'static str> {
    let token = Token::in_headers([format!("Bearer {token}").as_bytes()].into_iter());
    attestor.confirm(workload, &token).await.map_err(|error| error.reason())
}

/// The verdict of a review that was made; an API server under load may take too long for one, and a client comes back.
async fn reviewed(attestor: &Attestor, workload: &Workload, token: &str) -> Result<(), &'static str> {
    let not_made = Err("TOKEN_NOT_REVIEWED");
    eventually("a review", async || Some(verdict(attestor, workload, token).await).filter(|it| *it != not_made)).await
}

#[tokio::test]
async fn a_token_counts_for_the_pod_that_it_is_bound_to_on_this_node_and_for_our_audience() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let (namespace, client) = (cluster.namespace(&[]).await, cluster.admin().await);
    let (node, other) = (cluster.node("n").await.name_any(), cluster.node("n").await.name_any());
    let web = cluster.pod(&namespace, "web", &node, "default", &[]).await;
    let beside = cluster.pod(&namespace, "beside", &node, "default", &[]).await;
    let elsewhere = cluster.pod(&namespace, "elsewhere", &other, "default", &[]).await;
    let followed = Followed::new(client.clone(), Scope::Node(node.clone()));
    let workload = followed.workload(&web).await;
    let attestor = attestor(client, &node, &followed);
    let own = cluster.token(&web, &[AUDIENCE]).await;
    // The last character has bits that say nothing.
    let (signed, signature) = own.rsplit_once('.').unwrap();
    let first = if signature.starts_with('A') { 'B' } else { 'A' };
    let forged = format!("{signed}.{first}{}", &signature[1..]);
    for (what, token, expected) in [
        ("its own", own.clone(), Ok(())),
        ("for several audiences", cluster.token(&web, &["other", AUDIENCE]).await, Ok(())),
        (
            "of the same ServiceAccount's other pod",
            cluster.token(&beside, &[AUDIENCE]).await,
            Err("TOKEN_OF_OTHER_POD"),
        ),
        ("of another node's pod", cluster.token(&elsewhere, &[AUDIENCE]).await, Err("TOKEN_OF_OTHER_NODE")),
        ("of no pod", cluster.unbound_token(&namespace, "default", &[AUDIENCE]).await, Err("TOKEN_NOT_BOUND")),
        ("for the API server", cluster.token(&web, &[]).await, Err("TOKEN_NOT_ACCEPTED")),
        ("for another audience", cluster.token(&web, &["other"]).await, Err("TOKEN_NOT_ACCEPTED")),
        ("with another signature", forged, Err("TOKEN_NOT_ACCEPTED")),
        ("made up", "made.up".to_owned(), Err("TOKEN_NOT_ACCEPTED")),
    ] {
        assert_eq!(reviewed(&attestor, &workload, &token).await, expected, "{what}");
    }
    assert_eq!(verdict(&attestor, &Workload::of_uid(0), &own).await, Err("TOKEN_OUTSIDE_POD"));
    let nothing = attestor.confirm(&workload, &Ok(None)).await;
    assert!(nothing.is_ok(), "no token is needed");
}

#[tokio::test]
async fn a_token_ends_with_its_pod_within_the_time_that_verdicts_hold() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let (namespace, client) = (cluster.namespace(&[]).await, cluster.admin().await);
    let node = cluster.node("n").await.name_any();
    let web = cluster.pod(&namespace, "web", &node, "default", &[]).await;
    let followed = Followed::new(client.clone(), Scope::Node(node.clone()));
    let (workload, attestor) = (followed.workload(&web).await, attestor(client, &node, &followed));
    let token = cluster.token(&web, &[AUDIENCE]).await;
    assert_eq!(reviewed(&attestor, &workload, &token).await, Ok(()));
    cluster.delete_pod(&web).await;
    let ends = async {
        while reviewed(&attestor, &workload, &token).await.is_ok() {
            sleep(Duration::from_millis(500)).await;
        }
    };
    timeout(PATIENCE, ends).await.expect("it ends");
    assert_eq!(reviewed(&attestor, &workload, &token).await, Err("TOKEN_NOT_ACCEPTED"));
}

#[tokio::test]
async fn a_review_that_is_not_made_may_be_made_later() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let (namespace, node) = (cluster.namespace(&[]).await, cluster.node("n").await.name_any());
    let web = cluster.pod(&namespace, "web", &node, "default", &[]).await;
    let proxy = FaultProxy::start(cluster, &cluster.admin_identity()).await;
    let client = proxy.access.client(&cluster.admin_identity()).await;
    let followed = Followed::new(client.clone(), Scope::Node(node.clone()));
    let (workload, attestor) = (followed.workload(&web).await, attestor(client, &node, &followed));
    for fault in [Fault::status(503, "ServiceUnavailable", "away"), Fault::too_many_requests(1), Fault::LoseAnswer] {
        let token = cluster.token(&web, &[AUDIENCE]).await;
        proxy.fail(Method::POST, "tokenreviews", usize::MAX, fault);
        assert_eq!(verdict(&attestor, &workload, &token).await, Err("TOKEN_NOT_REVIEWED"));
        proxy.heal();
        assert_eq!(reviewed(&attestor, &workload, &token).await, Ok(()), "nothing is held against it");
    }
}
