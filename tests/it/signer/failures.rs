//! Requests that bring no certificate: each ends with its own reason, and says what to do.

use std::time::{Duration, Instant};

use csrd::{
    clock::Clock,
    hub::FLIGHT_TIMEOUT,
    issue::{Credential, IssueError},
    signer::kubernetes::{APPROVAL_TIMEOUT, Approval, CREATE_TIMEOUT, SIGNING_TIMEOUT},
    telemetry::with_causes,
    x509::{Usage, Usages},
};
use http::Method;
use kube::ResourceExt as _;
use serde_json::json;
use tokio::sync::mpsc;

use super::rig::{PATIENCE, Rig, agent, grant, may};
use crate::cluster::{ControlPlane, Fault, FaultProxy, Identity, unique};

const REQUESTS: &str = "/certificatesigningrequests";
/// Of the API server that are read: 2 MiB.
const MAX_ANSWER_BYTES: usize = 2 * 1024 * 1024;

#[track_caller]
fn check(outcome: Result<Credential, IssueError>, reason: &str, transient: bool, said: &str) {
    let error = outcome.expect_err(reason);
    let text = with_causes(&error);
    assert_eq!((error.reason(), error.is_transient()), (reason, transient), "{text}");
    assert!(text.contains(said), "{text:?} does not say {said:?}");
}

async fn nothing(_: String) {}

/// A rig behind a proxy that does as it is told.
async fn behind_proxy() -> Option<(Rig, FaultProxy)> {
    let cluster = ControlPlane::shared().await?;
    let (pod, identity) = agent(cluster).await;
    let proxy = FaultProxy::start(cluster, &Identity::Anonymous).await;
    let rig = Rig::of(cluster, &proxy.access, identity, &pod, Clock::system()).await;
    Some((rig, proxy))
}

#[test]
fn an_attempt_ends_by_itself_before_the_hub_ends_it() {
    assert!(CREATE_TIMEOUT + APPROVAL_TIMEOUT + SIGNING_TIMEOUT < FLIGHT_TIMEOUT);
}

#[tokio::test]
async fn a_denied_request_brings_the_approvers_reason() {
    let Some(rig) = Rig::new().await else { return };
    let denied = rig.attempt(&rig.built_in(), async |name| rig.condition(&name, "Denied").await).await;
    check(denied, "APPROVAL_DENIED", false, "the request was denied: ByTest: Denied by test; change");
}

#[tokio::test]
async fn a_request_that_its_signer_does_not_sign_brings_the_signers_reason() {
    let Some(rig) = Rig::new().await else { return };
    let signer = rig.built_in();
    let (told, mut stages) = mpsc::channel(8);
    let usages = Usages::empty().with(Usage::DigitalSignature).with(Usage::ServerAuth);
    let issuing = rig.issue(&signer, grant(usages, 600), None, &told);
    let approving = async {
        let Some(csrd::signer::Stage::Requested(name)) = stages.recv().await else { panic!("nothing was requested") };
        rig.approve(name).await;
    };
    let (failed, ()) = tokio::join!(issuing, approving);
    check(failed, "SIGNING_REFUSED", false, "invalid usage for client certificate: server auth; change the policy");
}

#[tokio::test]
async fn a_request_that_is_deleted_or_replaced_is_given_up() {
    let Some((rig, proxy)) = behind_proxy().await else { return };
    let signer = rig.built_in();
    let deleted = rig.attempt(&signer, async |name| rig.delete(&name).await).await;
    check(deleted, "CSR_DELETED", true, "see the API server's audit log");
    let replaced = rig.attempt(&signer, async |name| {
        let mut other = rig.admin.get(&name).await.unwrap();
        // Unseen, so that what is found there later is another one.
        proxy.fail(Method::GET, "watch=true", usize::MAX, Fault::status(503, "ServiceUnavailable", "away"));
        proxy.fail(Method::GET, REQUESTS, usize::MAX, Fault::status(503, "ServiceUnavailable", "away"));
        proxy.cut();
        rig.delete(&name).await;
        other.metadata.uid = None;
        other.metadata.resource_version = None;
        rig.admin.create(&Default::default(), &other).await.unwrap();
        proxy.heal();
    });
    check(replaced.await, "CSR_REPLACED", true, "another one has its name");
    let [left] = rig.mine().await.try_into().expect("the other one stays: it is not the agent's");
    rig.delete(&left.name_any()).await;
}

/// Takes as long as the two waits do.
#[tokio::test]
async fn who_is_waited_for_in_vain_is_named() {
    let Some(rig) = Rig::new().await else { return };
    let (built_in, unknown) = (
        rig.built_in(),
        rig.signer(&format!("{}.example.org/typo", unique("test")), &rig.cluster.access.ca_certificate),
    );
    let (pending, unsigned) =
        tokio::join!(rig.attempt(&built_in, nothing), rig.attempt(&unknown, async |name| rig.approve(name).await));
    let said = "still Pending after 25 s: nothing in Kubernetes approves requests of this signer by itself";
    check(pending, "APPROVAL_PENDING", true, said);
    check(unsigned, "SIGNER_ABSENT", true, "approved and not signed after 15 s: nobody signs for this signerName");
}

#[tokio::test]
async fn what_rbac_forbids_is_said_with_the_verb() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let (namespace, node) = (cluster.namespace(&[]).await, cluster.node("node").await.name_any());
    let pod = cluster.pod(&namespace, "app", &node, "default", &[]).await;
    let identity = Identity::Token(cluster.token(&pod, &[]).await);
    let rig = Rig::of(cluster, &cluster.access, identity, &pod, Clock::system()).await;
    let signer = rig.built_in();
    check(rig.attempt(&signer, nothing).await, "API_FORBIDDEN", true, "cannot create resource");
    may(cluster, &namespace, "default", &["create", "delete"]).await;
    check(rig.attempt(&signer, nothing).await, "API_FORBIDDEN", true, "cannot watch resource");
    let approving = rig.signer_with("example.org/own", &cluster.access.ca_certificate, Approval::Agent);
    check(rig.attempt(&approving, nothing).await, "API_FORBIDDEN", true, "cannot patch resource");
}

#[tokio::test]
async fn what_the_api_server_finds_invalid_is_said_in_its_words() {
    let Some(rig) = Rig::new().await else { return };
    for name in ["no-domain", "kubernetes.io/legacy-unknown"] {
        let signer = rig.signer(name, &rig.cluster.access.ca_certificate);
        check(rig.attempt(&signer, nothing).await, "API_INVALID", false, "spec.signerName: Invalid value");
    }
}

#[tokio::test]
async fn an_answer_of_the_api_server_has_its_reason() {
    let Some((rig, proxy)) = behind_proxy().await else { return };
    let signer = rig.built_in();
    // A text of so many bytes, with its quotes and a newline.
    let long = |bytes: usize| Fault::Answer { status: 500, headers: vec![], body: "x".repeat(bytes - 3).into() };
    for (fault, reason, transient) in [
        (Fault::status(401, "Unauthorized", "who"), "API_UNAUTHORIZED", true),
        (Fault::status(404, "NotFound", "the server could not find the requested resource"), "API_NOT_FOUND", true),
        (Fault::status(409, "AlreadyExists", "there"), "API_CONFLICT", true),
        (Fault::status(500, "InternalError", "etcd"), "API_SERVER_ERROR", true),
        (Fault::status(503, "ServiceUnavailable", "away"), "API_SERVER_ERROR", true),
        (Fault::status(418, "Teapot", "tea"), "API_UNEXPECTED", true),
        (Fault::Answer { status: 201, headers: vec![], body: json!("no request") }, "API_UNEXPECTED", true),
        (long(MAX_ANSWER_BYTES), "API_SERVER_ERROR", true),
        (long(MAX_ANSWER_BYTES + 1), "API_UNREACHABLE", true),
    ] {
        proxy.fail(Method::POST, REQUESTS, 1, fault);
        check(rig.attempt(&signer, nothing).await, reason, transient, "cannot create a CertificateSigningRequest: ");
    }
}

#[tokio::test]
async fn a_busy_api_server_is_asked_again_when_it_said() {
    let Some((rig, proxy)) = behind_proxy().await else { return };
    let signer = rig.built_in();
    proxy.fail(Method::POST, REQUESTS, 1, Fault::too_many_requests(1));
    proxy.fail(Method::GET, "watch=true", 1, Fault::too_many_requests(1));
    let began = Instant::now();
    rig.attempt(&signer, |name| rig.approve(name)).await.unwrap();
    assert!(began.elapsed() >= Duration::from_secs(1));
    let text = rig.metrics.encode();
    for line in [
        r#"csrd_api_requests_total{verb="create",result="error",reason="API_THROTTLED"} 1"#,
        r#"csrd_api_requests_total{verb="create",result="ok",reason=""} 1"#,
        r#"csrd_api_requests_total{verb="watch",result="error",reason="API_THROTTLED"} 1"#,
        r#"csrd_api_requests_total{verb="get",result="ok",reason=""} 1"#,
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    // Longer than an attempt may wait: the hub comes back then.
    for asked in [60, 61] {
        proxy.fail(Method::POST, REQUESTS, 1, Fault::too_many_requests(asked));
        let error = rig.attempt(&signer, nothing).await.unwrap_err();
        assert_eq!((error.reason(), error.retry_after()), ("API_THROTTLED", Some(Duration::from_secs(60))), "{asked}");
    }
}

#[tokio::test]
async fn an_api_server_that_does_not_answer_is_not_waited_for_long() {
    let Some((rig, proxy)) = behind_proxy().await else { return };
    let signer = rig.built_in();
    proxy.fail(Method::POST, REQUESTS, 1, Fault::Hang);
    check(rig.attempt(&signer, nothing).await, "API_TIMEOUT", true, "did not answer within 10 s");
}

#[tokio::test]
async fn a_creation_without_an_answer_leaves_nothing_behind() {
    let Some((rig, proxy)) = behind_proxy().await else { return };
    let signer = rig.built_in();
    proxy.fail(Method::POST, REQUESTS, 1, Fault::LoseAnswer);
    check(rig.attempt(&signer, nothing).await, "API_UNREACHABLE", true, "cannot be reached");
    let gone = async {
        while !rig.mine().await.is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("the request is deleted");
    let deletions = proxy.seen().into_iter().filter(|(method, _)| method == Method::DELETE).count();
    assert_eq!(deletions, 1, "the request was there, and one deletion was for it");
}

#[tokio::test]
async fn an_api_server_that_is_not_there_is_said_to_be_unreachable() {
    let Some(rig) = Rig::new().await else { return };
    let mut nobody = rig.cluster.access.clone();
    nobody.url = "https://127.0.0.1:1".to_owned();
    let pod = rig.pod.clone();
    let away = Rig::of(rig.cluster, &nobody, rig.identity.clone(), &pod, Clock::system()).await;
    check(away.attempt(&away.built_in(), nothing).await, "API_UNREACHABLE", true, "Connection refused");
}

#[tokio::test]
async fn a_watch_that_ends_is_taken_up_where_the_request_is() {
    let Some((rig, proxy)) = behind_proxy().await else { return };
    let signer = rig.built_in();
    // Cut before and after the approval; the certificate is found by reading.
    let issued = rig.attempt(&signer, async |name| {
        proxy.cut();
        rig.approve(name).await;
        proxy.cut();
    });
    issued.await.unwrap();
    // Too old, away, and slow to be opened.
    proxy.fail(Method::GET, "watch=true", 1, Fault::too_old());
    proxy.fail(Method::GET, "watch=true", 1, Fault::status(410, "Expired", "too old resource version"));
    proxy.fail(Method::GET, "watch=true", 1, Fault::status(503, "ServiceUnavailable", "away"));
    proxy.fail(Method::GET, "watch=true", 1, Fault::Delay(Duration::from_millis(200)));
    rig.attempt(&signer, |name| rig.approve(name)).await.unwrap();
}

#[tokio::test]
async fn a_certificate_costs_four_writes() {
    let Some((rig, proxy)) = behind_proxy().await else { return };
    let (told, name) = tokio::sync::oneshot::channel();
    rig.attempt(&rig.built_in(), async |name| {
        rig.approve(name.clone()).await;
        told.send(name).unwrap();
    })
    .await
    .unwrap();
    rig.gone(&name.await.unwrap()).await;
    let writes: Vec<_> = proxy.seen().into_iter().map(|(method, _)| method).filter(|it| it != Method::GET).collect();
    // The approval and the certificate are written by others.
    assert_eq!(writes, [Method::POST, Method::DELETE]);
}
