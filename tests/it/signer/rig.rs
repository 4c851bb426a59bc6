//! An agent's signer on a control plane, a pod to sign for, and people who approve.

use std::{sync::Arc, time::Duration};

use csrd::{
    attest::{PodFacts, Workload},
    clock::Clock,
    issue::{Credential, IssueError, issue},
    kubernetes::{self, connect},
    metrics::Metrics,
    policy::Grant,
    signer::{
        Stage,
        kubernetes::{Approval, Cleaner, Kubernetes, Parts},
    },
    x509::{Bundle, Csr, DnsName, KeyAlgorithm, Names, Usage, Usages},
};
use k8s_openapi::api::{certificates::v1::CertificateSigningRequest, core::v1::Pod};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::cluster::{Access, ControlPlane, Identity, eventually};

/// What Kubernetes itself signs.
pub(super) const BUILT_IN: &str = "kubernetes.io/kube-apiserver-client";
/// Never reached.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// An agent, without a signer yet.
pub(super) struct Rig {
    pub(super) cluster: &'static ControlPlane,
    pub(super) identity: Identity,
    /// The agent's own way to the API server.
    pub(super) client: Client,
    pub(super) admin: Api<CertificateSigningRequest>,
    pub(super) agent: kubernetes::Identity,
    pub(super) node: String,
    pub(super) workload: Workload,
    pub(super) pod: Pod,
    pub(super) metrics: Metrics,
    pub(super) stop: CancellationToken,
    cleaner: Cleaner,
    cleaning: JoinHandle<()>,
}

impl Rig {
    /// On the shared control plane; none if such tests are left out.
    pub(super) async fn new() -> Option<Self> {
        let cluster = ControlPlane::shared().await?;
        let (pod, identity) = agent(cluster).await;
        Some(Self::of(cluster, &cluster.access, identity, &pod, Clock::system()).await)
    }

    /// An agent that reaches the API server by `access`.
    pub(super) async fn of(
        cluster: &'static ControlPlane,
        access: &Access,
        identity: Identity,
        pod: &Pod,
        clock: Clock,
    ) -> Self {
        let client = connect(Some(&access.kubeconfig(&identity))).await.unwrap();
        let straight = connect(Some(&cluster.access.kubeconfig(&identity))).await.unwrap();
        let agent = kubernetes::Identity::ask(&straight).await.unwrap();
        let node = agent.node(None).unwrap();
        let (metrics, stop) = (Metrics::new(), CancellationToken::new());
        let (cleaner, cleaning) =
            Cleaner::new(client.clone(), agent.clone(), node.clone(), clock, metrics.clone(), stop.clone());
        let facts = PodFacts {
            namespace: pod.namespace().unwrap(),
            name: pod.name_any(),
            uid: pod.uid().unwrap(),
            service_account: "default".to_owned(),
            node: node.clone(),
            labels: Default::default(),
            namespace_labels: Default::default(),
            ips: Vec::new(),
            services: Default::default(),
        };
        Self {
            cluster,
            identity,
            client,
            admin: Api::all(cluster.admin().await),
            agent,
            node,
            workload: Workload::of_pod(facts),
            pod: pod.clone(),
            metrics,
            stop,
            cleaner,
            cleaning: tokio::spawn(cleaning),
        }
    }

    /// The signer of that name, whose certificates `roots` verify.
    pub(super) fn signer(&self, name: &str, roots: &str) -> Kubernetes {
        self.signer_with(name, roots, Approval::Controller)
    }

    pub(super) fn signer_with(&self, name: &str, roots: &str, approval: Approval) -> Kubernetes {
        let roots = watch::channel(Arc::new(Bundle::from_pem(roots.as_bytes()).unwrap())).1;
        Kubernetes::new(Parts { approval, ..self.parts(name, roots, "a test".to_owned()) })
    }

    /// A signer of which the roots come from somewhere.
    pub(super) fn signer_following(&self, name: &str, roots: watch::Receiver<Arc<Bundle>>, from: String) -> Kubernetes {
        Kubernetes::new(self.parts(name, roots, from))
    }

    fn parts(&self, name: &str, roots: watch::Receiver<Arc<Bundle>>, roots_from: String) -> Parts {
        Parts {
            client: self.client.clone(),
            signer: name.to_owned(),
            approval: Approval::Controller,
            node: self.node.clone(),
            roots,
            roots_from,
            cleaner: self.cleaner.clone(),
            metrics: self.metrics.clone(),
        }
    }

    /// What Kubernetes itself signs.
    pub(super) fn built_in(&self) -> Kubernetes {
        self.signer(BUILT_IN, &self.cluster.access.ca_certificate)
    }

    /// One attempt for `grant`; `told` gets each stage.
    pub(super) async fn issue(
        &self,
        signer: &Kubernetes,
        grant: Grant,
        held: Option<Arc<Csr>>,
        told: &mpsc::Sender<Stage>,
    ) -> Result<Credential, IssueError> {
        let progress = |stage| told.try_send(stage).unwrap();
        issue(signer, &Clock::system(), &self.workload, grant, held, &progress).await
    }

    /// One attempt for a client certificate, with `act` done to the request once it is there, given its name.
    pub(super) async fn attempt<F: Future<Output = ()>>(
        &self,
        signer: &Kubernetes,
        act: impl FnOnce(String) -> F,
    ) -> Result<Credential, IssueError> {
        let (told, mut stages) = mpsc::channel(8);
        let grant = grant(client_auth(), 600);
        let acting = async {
            if let Some(Stage::Requested(name)) = stages.recv().await {
                act(name).await;
            }
        };
        let issuing = async {
            let issued = self.issue(signer, grant, None, &told).await;
            drop(told);
            issued
        };
        tokio::time::timeout(PATIENCE, async { tokio::join!(issuing, acting).0 }).await.expect("an attempt ends")
    }

    /// Adds a condition as a person does, or a signer.
    pub(super) async fn condition(&self, name: &str, kind: &str) {
        let condition =
            json!({"type": kind, "status": "True", "reason": "ByTest", "message": format!("{kind} by test")});
        let patch = Patch::Strategic(json!({"status": {"conditions": [condition]}}));
        let params = PatchParams::default();
        match kind {
            "Failed" => drop(self.admin.patch_status(name, &params, &patch).await.unwrap()),
            _ => drop(self.admin.patch_subresource("approval", name, &params, &patch).await.unwrap()),
        }
    }

    pub(super) async fn approve(&self, name: String) {
        self.condition(&name, "Approved").await;
    }

    pub(super) async fn delete(&self, name: &str) {
        self.admin.delete(name, &DeleteParams::default()).await.unwrap();
    }

    /// Returns once the agent has deleted the request.
    pub(super) async fn gone(&self, name: &str) {
        let gone = async {
            while self.admin.get_opt(name).await.unwrap().is_some() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, gone).await.expect("the request is deleted");
    }

    /// Lets go of all that could ask for a deletion.
    pub(super) fn end(self) -> (Api<CertificateSigningRequest>, JoinHandle<()>) {
        (self.admin, self.cleaning)
    }

    /// The requests of this rig's pod that are there.
    pub(super) async fn mine(&self) -> Vec<CertificateSigningRequest> {
        let uid = &self.workload.pod().unwrap().uid;
        let all = self.admin.list(&Default::default()).await.unwrap();
        all.items.into_iter().filter(|csr| csr.annotations().get("csrd.dev/pod-uid") == Some(uid)).collect()
    }
}

/// Returns once a cleaner has looked for orphans.
pub(super) async fn listed(metrics: &Metrics) {
    let listed = r#"verb="list",result="ok",reason=""} "#;
    eventually("a list", async || metrics.encode().contains(listed).then_some(())).await;
}

/// What the built-in signer signs.
pub(super) fn client_auth() -> Usages {
    Usages::empty().with(Usage::DigitalSignature).with(Usage::ClientAuth)
}

/// A grant for `app` in an organization, with a name of every kind.
pub(super) fn grant(usages: Usages, seconds: u64) -> Grant {
    let names = Names {
        common_name: Some("app".to_owned()),
        organizations: vec!["one".to_owned()],
        dns: vec![DnsName::parse("app.example.org").unwrap()],
        ips: vec!["10.0.0.1".parse().unwrap()],
        uris: vec!["spiffe://example.org/app".to_owned()],
    };
    Grant::for_test(names, usages, KeyAlgorithm::EcdsaP256, Duration::from_secs(seconds))
}

/// A ServiceAccount that may do what an agent may, a pod of it on a node, and its token.
pub(super) async fn agent(cluster: &'static ControlPlane) -> (Pod, Identity) {
    let (namespace, node) = (cluster.namespace(&[]).await, cluster.node("node").await.name_any());
    may(cluster, &namespace, "default", &["create", "get", "list", "watch", "delete"]).await;
    let pod = cluster.pod(&namespace, "app", &node, "default", &[]).await;
    let token = cluster.token(&pod, &[]).await;
    (pod, Identity::Token(token))
}

/// Lets a ServiceAccount do `verbs` to requests.
pub(super) async fn may(cluster: &ControlPlane, namespace: &str, account: &str, verbs: &[&str]) {
    let rule =
        json!({"apiGroups": ["certificates.k8s.io"], "resources": ["certificatesigningrequests"], "verbs": verbs});
    may_all(cluster, namespace, account, json!([rule])).await;
}

/// Gives a ServiceAccount these rules; returns the role's name.
pub(super) async fn may_all(cluster: &ControlPlane, namespace: &str, account: &str, rules: Value) -> String {
    cluster.allow(json!({"kind": "ServiceAccount", "name": account, "namespace": namespace}), rules).await
}
