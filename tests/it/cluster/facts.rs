//! What the product takes for granted about Kubernetes, asked of the real thing, and what tests take for granted about
//! this control plane.

use std::time::Duration;

use futures_util::TryStreamExt as _;
use http::Method;
use k8s_openapi::api::{
    authentication::v1::TokenReview, certificates::v1::CertificateSigningRequest as Request, core::v1::ConfigMap,
    core::v1::Node, core::v1::Pod,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams},
};
use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};

use super::{ControlPlane, Fault, FaultProxy, Identity, Options, PATIENCE, Part, eventually, unique};

const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client";

/// A pod on a node, whose ServiceAccount may make and read CSRs, and the token that is bound to it.
async fn requester(cluster: &ControlPlane) -> (Node, Pod, String) {
    let (namespace, node) = (cluster.namespace(&[]).await, cluster.node("n1").await);
    let pod = cluster.pod(&namespace, "agent", &node.name_any(), "default", &[]).await;
    may_request(cluster, &namespace).await;
    let token = cluster.token(&pod, &[]).await;
    (node, pod, token)
}

async fn may_request(cluster: &ControlPlane, namespace: &str) {
    let account = json!({"kind": "ServiceAccount", "name": "default", "namespace": namespace});
    let rule = json!({"apiGroups": ["certificates.k8s.io"], "resources": ["certificatesigningrequests"],
        "verbs": ["create", "get", "list", "watch", "update"]});
    cluster.allow(account, json!([rule])).await;
}

/// A CSR as JSON, with a key of its own.
fn request(signer: &str, seconds: i32) -> Value {
    let params = CertificateParams::new(["web.example.org".to_owned()]).unwrap();
    let pem = params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
    json!({"metadata": {"name": unique("csr")}, "spec": {
        "request": k8s_openapi::ByteString(pem.into_bytes()), "signerName": signer, "expirationSeconds": seconds,
        "usages": ["digital signature", "client auth"]}})
}

async fn make(client: &Client, request: Value) -> kube::Result<Request> {
    Api::all(client.clone()).create(&PostParams::default(), &serde_json::from_value(request).unwrap()).await
}

/// The status code of a refusal.
fn refused<T>(result: kube::Result<T>) -> (u16, String) {
    match result {
        Err(kube::Error::Api(status)) => (status.code, status.message),
        Err(other) => panic!("no answer: {other}"),
        Ok(_) => panic!("not refused"),
    }
}

#[tokio::test]
async fn a_csr_says_in_its_extra_which_pod_on_which_node_made_it_whatever_it_claims() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let (node, pod, token) = requester(cluster).await;
    let client = cluster.access.client(&Identity::Token(token)).await;
    let mut forged = request("example.org/own", 600);
    forged["spec"]["username"] = "system:admin".into();
    forged["spec"]["groups"] = json!(["system:masters"]);
    forged["spec"]["extra"] = json!({NODE_NAME: ["another"]});
    let spec = make(&client, forged).await.unwrap().spec;
    let namespace = pod.namespace().unwrap();
    assert_eq!(spec.username, Some(format!("system:serviceaccount:{namespace}:default")));
    let groups = spec.groups.unwrap();
    assert!(groups.contains(&format!("system:serviceaccounts:{namespace}")), "{groups:?}");
    assert!(!groups.contains(&"system:masters".to_owned()), "{groups:?}");
    let extra = spec.extra.unwrap();
    assert_eq!(extra[NODE_NAME], [node.name_any()]);
    assert_eq!(extra[POD_UID], [pod.uid().unwrap()]);
}

#[tokio::test]
async fn a_csr_made_with_an_unbound_token_names_no_node() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let namespace = cluster.namespace(&[]).await;
    may_request(cluster, &namespace).await;
    let token = cluster.unbound_token(&namespace, "default", &[]).await;
    let client = cluster.access.client(&Identity::Token(token)).await;
    let extra = make(&client, request("example.org/own", 600)).await.unwrap().spec.extra.unwrap();
    assert!(!extra.contains_key(NODE_NAME) && !extra.contains_key(POD_UID), "{extra:?}");
}

#[tokio::test]
async fn a_lifetime_of_600_seconds_may_be_asked_for_and_none_below() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let admin = cluster.admin().await;
    let (code, message) = refused(make(&admin, request("example.org/own", 599)).await);
    assert_eq!(code, 422);
    assert!(message.contains("spec.expirationSeconds"), "{message}");
    assert_eq!(make(&admin, request("example.org/own", 600)).await.unwrap().spec.expiration_seconds, Some(600));
}

#[tokio::test]
async fn any_certificate_can_be_written_to_the_status_of_a_csr_that_nobody_approved() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let requests: Api<Request> = Api::all(cluster.admin().await);
    let made = make(&cluster.admin().await, request("example.org/own", 600)).await.unwrap();
    let unrelated = k8s_openapi::ByteString(cluster.access.ca_certificate.clone().into_bytes());
    let status = Patch::Merge(json!({"status": {"certificate": unrelated}}));
    let written = requests.patch_status(&made.name_any(), &PatchParams::default(), &status).await.unwrap();
    assert_eq!(written.status.unwrap().certificate, Some(unrelated));
}

#[tokio::test]
async fn csrs_can_be_selected_by_signer_and_not_by_requester() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let requests: Api<Request> = Api::all(cluster.admin().await);
    let signer = format!("example.org/{}", unique("signer"));
    make(&cluster.admin().await, request(&signer, 600)).await.unwrap();
    let selected = requests.list(&ListParams::default().fields(&format!("spec.signerName={signer}"))).await.unwrap();
    assert_eq!(selected.items.len(), 1);
    let (code, message) = refused(requests.list(&ListParams::default().fields("spec.username=admin")).await);
    assert_eq!((code, message.contains("field label not supported")), (400, true), "{message}");
}

#[tokio::test]
async fn a_changed_spec_is_taken_with_a_smile_and_dropped() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let requests: Api<Request> = Api::all(cluster.admin().await);
    let mut made = make(&cluster.admin().await, request("example.org/own", 600)).await.unwrap();
    made.spec.expiration_seconds = Some(86400);
    made.spec.username = Some("another".into());
    let put = requests.replace(&made.name_any(), &PostParams::default(), &made).await.unwrap();
    assert_eq!((put.spec.expiration_seconds, put.spec.username.as_deref()), (Some(600), Some("admin")));
}

#[tokio::test]
async fn the_built_in_signer_signs_what_is_approved() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let requests: Api<Request> = Api::all(cluster.admin().await);
    let made = make(&cluster.admin().await, request(CLIENT_SIGNER, 600)).await.unwrap();
    let approval = json!({"status": {"conditions": [
        {"type": "Approved", "status": "True", "reason": "Test", "message": "by a test"}]}});
    requests
        .patch_subresource("approval", &made.name_any(), &PatchParams::default(), &Patch::Strategic(approval))
        .await
        .unwrap();
    let mut events = Box::pin(
        requests
            .watch(&WatchParams::default().fields(&format!("metadata.name={}", made.name_any())), "0")
            .await
            .unwrap(),
    );
    let certificate = async {
        loop {
            if let Some(WatchEvent::Added(now) | WatchEvent::Modified(now)) = events.try_next().await.unwrap()
                && let Some(certificate) = now.status.and_then(|it| it.certificate)
            {
                return certificate;
            }
        }
    };
    let certificate = tokio::time::timeout(PATIENCE, certificate).await.expect("it is signed");
    assert!(certificate.0.starts_with(b"-----BEGIN CERTIFICATE-----"));
}

#[tokio::test]
async fn a_token_with_an_audience_is_reviewed_for_that_audience_only() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let (node, pod, _) = requester(cluster).await;
    let token = cluster.token(&pod, &["csrd"]).await;
    let reviews: Api<TokenReview> = Api::all(cluster.admin().await);
    let review = |audience: &str| {
        let review = json!({"metadata": {}, "spec": {"token": token, "audiences": [audience]}});
        let (reviews, review) = (reviews.clone(), serde_json::from_value(review).unwrap());
        async move { reviews.create(&PostParams::default(), &review).await.unwrap().status.unwrap() }
    };
    let ours = review("csrd").await;
    assert_eq!((ours.authenticated, ours.audiences), (Some(true), Some(vec!["csrd".to_owned()])));
    assert_eq!(ours.user.unwrap().extra.unwrap()[NODE_NAME], [node.name_any()]);
    assert_eq!(review("another").await.authenticated, None);
    let client = cluster.access.client(&Identity::Token(token.clone())).await;
    assert_eq!(refused(client.apiserver_version().await).0, 401);
}

#[tokio::test]
async fn every_namespace_gets_the_certificate_of_the_cluster_ca() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let namespace = cluster.namespace(&[]).await;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.admin().await, &namespace);
    let map = eventually("the CA's ConfigMap", async || maps.get_opt("kube-root-ca.crt").await.unwrap()).await;
    assert_eq!(map.data.unwrap()["ca.crt"].trim(), cluster.access.ca_certificate.trim());
}

#[tokio::test]
async fn kubectl_works_as_the_admin_and_as_somebody_else() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let said = |output: std::process::Output| {
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(said(cluster.kubectl(&["auth", "can-i", "approve", "signers"]).await).trim(), "yes");
    let developer = cluster.access.kubeconfig(&cluster.user("developer", Some("dev-team")));
    let who = said(cluster.kubectl_as(&developer, &["auth", "whoami", "-o", "json"]).await);
    let who: Value = serde_json::from_str(&who).unwrap();
    assert_eq!(who["status"]["userInfo"]["username"], "developer");
    assert_eq!(who["status"]["userInfo"]["groups"], json!(["dev-team", "system:authenticated"]));
}

#[tokio::test]
async fn the_fault_proxy_fails_as_told_and_passes_the_rest_on() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let (_, pod, token) = requester(cluster).await;
    let proxy = FaultProxy::start(cluster, &cluster.admin_identity()).await;
    let client = |identity: Identity| {
        let access = &proxy.access;
        async move {
            let mut config = access.config(&identity).await;
            config.default_retry = false;
            Client::try_from(config).unwrap()
        }
    };
    let (agent, admin) = (client(Identity::Token(token)).await, client(Identity::Anonymous).await);
    let requests = "/certificatesigningrequests";
    proxy.fail(Method::POST, requests, 1, Fault::too_many_requests(3));
    proxy.fail(Method::POST, requests, 1, Fault::status(503, "ServiceUnavailable", "etcd is away"));
    proxy.fail(Method::POST, requests, 1, Fault::Delay(Duration::from_millis(1)));
    assert_eq!(refused(make(&agent, request("example.org/own", 600)).await).0, 429);
    assert_eq!(refused(make(&agent, request("example.org/own", 600)).await).0, 503);
    let made = make(&agent, request("example.org/own", 600)).await.unwrap();
    let account = format!("system:serviceaccount:{}:default", pod.namespace().unwrap());
    assert_eq!(made.spec.username, Some(account));
    assert_eq!(make(&admin, request("example.org/own", 600)).await.unwrap().spec.username.as_deref(), Some("admin"));
    assert_eq!(proxy.seen().len(), 4);

    let lost = request("example.org/own", 600);
    proxy.fail(Method::POST, requests, 1, Fault::LoseAnswer);
    assert!(!matches!(make(&agent, lost.clone()).await, Ok(_) | Err(kube::Error::Api(_))));
    assert_eq!(refused(make(&agent, lost).await).0, 409, "it was made all the same");

    let api: Api<Request> = Api::all(agent.clone());
    let named = WatchParams::default().fields(&format!("metadata.name={}", made.name_any()));
    let mut watch = Box::pin(api.watch(&named, "0").await.unwrap());
    assert!(matches!(watch.try_next().await, Ok(Some(WatchEvent::Added(_)))));
    proxy.cut();
    let ended = async { while let Ok(Some(WatchEvent::Bookmark(_))) = watch.try_next().await {} };
    tokio::time::timeout(PATIENCE, ended).await.expect("a cut is noticed");

    proxy.fail(Method::GET, "watch=", 1, Fault::too_old());
    let mut watch = Box::pin(api.watch(&named, "0").await.unwrap());
    let expired = watch.try_next().await.unwrap();
    assert!(matches!(&expired, Some(WatchEvent::Error(status)) if status.code == 410), "{expired:?}");
}

#[tokio::test]
async fn a_killed_api_server_comes_back_at_its_address_with_its_objects() {
    let options = Options { slow_etcd: true, ..Options::default() };
    let Some(cluster) = ControlPlane::start(options).await else { return };
    let namespace = cluster.namespace(&[]).await;
    cluster.kill(Part::ApiServer);
    let client = cluster.admin().await;
    assert!(client.apiserver_version().await.is_err());
    cluster.restart(Part::ApiServer).await;
    assert!(client.apiserver_version().await.is_ok());
    let namespaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(client);
    assert!(namespaces.get_opt(&namespace).await.unwrap().is_some());

    cluster.etcd_link().delay(Duration::from_secs(3600));
    let admin = cluster.admin().await;
    let stuck = tokio::time::timeout(Duration::from_millis(500), make(&admin, request("example.org/own", 600)));
    assert!(stuck.await.is_err(), "a write waits for etcd");
}
