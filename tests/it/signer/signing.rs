//! Certificates that come back: what was asked for, and what is believed.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use csrd::{
    clock::Clock,
    issue::IssueError,
    kubernetes::Identity,
    signer::{Sign as _, Stage},
    x509::{Csr, KeyAlgorithm, Names, PrivateKey, Usages, VerifyError},
};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::ResourceExt as _;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Barrier, mpsc},
};

use super::{
    authority::{Authority, write},
    rig::{BUILT_IN, Rig, agent, client_auth, grant, listed},
};
use crate::cluster::{Access, ControlPlane, unique};

#[tokio::test]
async fn a_request_says_for_whom_it_is_and_asks_for_the_grant_and_no_more() {
    let Some(rig) = Rig::new().await else { return };
    let (seen, mut request) = mpsc::channel::<CertificateSigningRequest>(1);
    let signer = rig.built_in();
    let credential = rig.attempt(&signer, async |name| {
        seen.send(rig.admin.get(&name).await.unwrap()).await.unwrap();
        rig.approve(name).await;
    });
    let credential = credential.await.unwrap();
    let csr = request.recv().await.unwrap();
    let pod = rig.workload.pod().unwrap();
    let annotations = csr.annotations();
    for (key, value) in [
        ("csrd.dev/pod-namespace", &pod.namespace),
        ("csrd.dev/pod-name", &pod.name),
        ("csrd.dev/pod-uid", &pod.uid),
        ("csrd.dev/service-account", &pod.service_account),
        ("csrd.dev/node", &pod.node),
    ] {
        assert_eq!(annotations.get(key), Some(value), "{key}");
    }
    assert_eq!(csr.labels()["app.kubernetes.io/managed-by"], "csrd");
    assert_eq!(csr.labels()["csrd.dev/node"], pod.node);
    assert_eq!((csr.spec.signer_name.as_str(), csr.spec.expiration_seconds), (BUILT_IN, Some(600)));
    assert_eq!(csr.spec.usages.unwrap(), ["digital signature", "client auth"]);
    let asked = Csr::parse(&csr.spec.request.0).unwrap();
    assert_eq!(asked.names(), credential.grant().names());
    assert_eq!(asked.public_key(), credential.private_key().unwrap().public_key());
    rig.gone(&csr.metadata.name.unwrap()).await;
}

#[tokio::test]
async fn the_built_in_signer_gives_ten_minutes_that_begin_five_minutes_ago() {
    let Some(rig) = Rig::new().await else { return };
    let (told, mut stages) = mpsc::channel(8);
    let signer = rig.built_in();
    let names =
        Names { organizations: vec!["one".to_owned(), "two".to_owned()], ..grant(client_auth(), 600).names().clone() };
    let two = csrd::policy::Grant::for_test(names, client_auth(), KeyAlgorithm::Ed25519, Duration::from_secs(600));
    let issuing = rig.issue(&signer, two, None, &told);
    let approving = async {
        let Some(Stage::Requested(name)) = stages.recv().await else { panic!("nothing was requested") };
        rig.approve(name).await;
        (stages.recv().await, stages.recv().await)
    };
    let (credential, said) = tokio::join!(issuing, approving);
    let credential = credential.unwrap();
    assert_eq!(said, (Some(Stage::Approved("ByTest: Approved by test".to_owned())), Some(Stage::Issued)));
    let span = credential.not_after().duration_since(credential.not_before()).unwrap();
    assert_eq!(span, Duration::from_secs(15 * 60));
    assert!(credential.not_after() <= SystemTime::now() + Duration::from_secs(600));
}

#[tokio::test]
async fn a_key_that_the_workload_holds_is_certified_by_its_own_request() {
    let Some(rig) = Rig::new().await else { return };
    let granted = grant(client_auth(), 600);
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let sans = [
        rcgen::SanType::DnsName("app.example.org".try_into().unwrap()),
        rcgen::SanType::IpAddress("10.0.0.1".parse().unwrap()),
        rcgen::SanType::URI("spiffe://example.org/app".try_into().unwrap()),
    ];
    let request = |names: &[rcgen::SanType]| {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "one");
        params.distinguished_name.push(rcgen::DnType::CommonName, "app");
        params.subject_alt_names = names.to_vec();
        Arc::new(Csr::parse(params.serialize_request(&key).unwrap().der()).unwrap())
    };
    let (told, mut stages) = mpsc::channel(8);
    let signer = rig.built_in();
    let issuing = rig.issue(&signer, granted.clone(), Some(request(&sans)), &told);
    let approving = async {
        let Some(Stage::Requested(name)) = stages.recv().await else { panic!("nothing was requested") };
        rig.approve(name).await;
    };
    let (credential, ()) = tokio::join!(issuing, approving);
    assert!(credential.unwrap().private_key().is_none());

    let error = rig.issue(&signer, granted, Some(request(&sans[..2])), &told).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("CSR_NAMES_DIFFER", false));
    let said = csrd::telemetry::with_causes(&error);
    assert!(said.contains("make one for exactly app, app.example.org, 10.0.0.1, spiffe://example.org/app"), "{said}");
}

/// A relay to the API server that counts connections.
async fn counting(cluster: &ControlPlane) -> (Access, Arc<AtomicUsize>) {
    let server = cluster.access.url.trim_start_matches("https://").parse::<SocketAddr>().unwrap();
    let relay = TcpListener::bind((server.ip(), 0)).await.unwrap();
    let mut access = cluster.access.clone();
    access.url = format!("https://{}", relay.local_addr().unwrap());
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    tokio::spawn(async move {
        loop {
            let (mut inside, _) = relay.accept().await.unwrap();
            counted.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                let mut outside = TcpStream::connect(server).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut inside, &mut outside).await;
            });
        }
    });
    (access, count)
}

#[tokio::test]
async fn attempts_side_by_side_share_one_connection() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let (access, connections) = counting(cluster).await;
    let (pod, identity) = agent(cluster).await;
    let rig = Rig::of(cluster, &access, identity, &pod, Clock::system()).await;
    // As an agent does first. Requests that find no connection each open one, and all but one are closed again; the first
    // look for orphans may be such a one.
    Identity::ask(&rig.client).await.unwrap();
    listed(&rig.metrics).await;
    let before = connections.load(Ordering::Relaxed);
    assert!(before <= 2, "{before}");
    let signer = rig.built_in();
    let together = Barrier::new(16);
    let attempts = (0..16).map(|_| {
        rig.attempt(&signer, async |name| {
            together.wait().await;
            rig.approve(name).await;
        })
    });
    for issued in futures_util::future::join_all(attempts).await {
        issued.unwrap();
    }
    assert_eq!(connections.load(Ordering::Relaxed), before);
}

/// What a signer of the test's own wrote into the status of a request that was granted, and what became of it.
async fn check(
    rig: &Rig,
    authority: &Authority,
    lifetime: u64,
    written: impl FnOnce(String) -> String,
) -> Result<csrd::issue::Credential, IssueError> {
    let signer = rig.signer(&format!("{}.example.org/own", unique("test")), &authority.root);
    let (told, mut stages) = mpsc::channel(8);
    let issuing = async {
        let issued = rig.issue(&signer, grant(Usages::DEFAULT, 3600), None, &told).await;
        drop(told);
        issued
    };
    let signing = async {
        let Some(Stage::Requested(name)) = stages.recv().await else { panic!("nothing was requested") };
        let csr = rig.admin.get(&name).await.unwrap();
        rig.approve(name.clone()).await;
        write(&rig.admin, &name, written(authority.sign(&csr, Duration::from_secs(lifetime)))).await;
    };
    tokio::join!(issuing, signing).0
}

#[tokio::test]
async fn a_chain_of_any_signer_is_taken_and_the_root_in_it_is_left_out() {
    let Some(rig) = Rig::new().await else { return };
    let authority = Authority::new();
    for with_root in [false, true] {
        let root = if with_root { authority.root.as_str() } else { "" };
        let written = |leaf: String| format!("# by test\n{leaf}{}{root}", authority.intermediate);
        let credential = check(&rig, &authority, 3600, written).await.unwrap();
        assert_eq!(credential.chain().certificates().len(), 2, "root {with_root}");
    }
}

#[tokio::test]
async fn what_a_signer_writes_is_not_believed() {
    let Some(rig) = Rig::new().await else { return };
    let (authority, stranger) = (Authority::new(), Authority::new());
    let chain = |leaf: String| format!("{leaf}{}", authority.intermediate);
    type Edit<'a> = Box<dyn Fn(String) -> String + 'a>;
    let cases: Vec<(&str, u64, Edit<'_>)> = vec![
        ("for longer than granted", 2 * 3600, Box::new(chain)),
        (
            "no part of the path",
            3600,
            Box::new(|leaf| format!("{leaf}{}{}", authority.intermediate, stranger.intermediate)),
        ),
        ("does not lead to a root", 3600, Box::new(|leaf| leaf)),
        ("another public key", 3600, Box::new(|_| format!("{}{}", authority.intermediate, authority.root))),
    ];
    for (expected, lifetime, written) in cases {
        let error = check(&rig, &authority, lifetime, written).await.unwrap_err();
        assert!(matches!(error, IssueError::Verify(_)), "{expected}: {error:?}");
        let said = csrd::telemetry::with_causes(&error);
        assert!(said.contains(expected) || expected == "for longer than granted" && said.contains("longer"), "{said}");
    }
    // The API server takes any signer's certificate; another root than the bundle's is the classic "not trusted".
    let mut other = Authority::new();
    other.root = stranger.root.clone();
    let error = check(&rig, &other, 3600, |leaf| leaf).await.unwrap_err();
    assert!(matches!(error, IssueError::Verify(VerifyError::Path(_))), "{error:?}");
    let said = csrd::telemetry::with_causes(&error);
    assert!(said.contains("give the agent the bundle of the CA that signs"), "{said}");
}

#[tokio::test]
async fn a_signer_without_roots_is_not_ready_and_asks_for_nothing() {
    let Some(rig) = Rig::new().await else { return };
    let source = csrd::trust::Source::ConfigMap {
        namespace: "csrd-system".to_owned(),
        name: unique("absent"),
        key: "ca.crt".to_owned(),
    };
    let (roots, _run) = csrd::trust::follow(rig.client.clone(), source.clone(), rig.stop.clone());
    let signer = rig.signer_following("example.org/own", roots, source.to_string());
    let error = signer.ready().unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("TRUST_BUNDLE_MISSING", true));
    assert!(error.to_string().contains(&format!("{source} is not there")), "{error}");
    let (told, _) = mpsc::channel(8);
    let refused = rig.issue(&signer, grant(client_auth(), 600), None, &told).await.unwrap_err();
    assert_eq!(refused, IssueError::Sign(error));
    assert!(rig.mine().await.is_empty());
}

#[tokio::test]
async fn what_is_no_pod_or_lives_too_short_is_refused_before_anything_is_sent() {
    let Some(mut rig) = Rig::new().await else { return };
    let (told, _) = mpsc::channel(8);
    let signer = rig.built_in();
    let error = rig.issue(&signer, grant(client_auth(), 599), None, &told).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("LIFETIME_TOO_SHORT", false));
    assert!(rig.mine().await.is_empty());
    rig.workload = csrd::attest::Workload::of_uid(1000);
    let error = rig.issue(&signer, grant(client_auth(), 600), None, &told).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("NOT_A_POD", false));
}
