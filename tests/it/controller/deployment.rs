//! A deployment of a test's own, on the shared control plane or another: a namespace with the ServiceAccounts of agents and
//! controller, a signer that no other test has, and controllers as processes.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use csrd::policy::watch::resource;
use k8s_openapi::{
    ByteString,
    api::{
        certificates::v1::{CertificateSigningRequest as Request, CertificateSigningRequestCondition as Condition},
        core::v1::{ConfigMap, Pod},
    },
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DynamicObject, Patch, PatchParams, PostParams},
};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use crate::{
    cluster::{ControlPlane, Identity, Overlay, SYSTEM, unique},
    policies,
};

/// Whatever takes this long never comes.
pub(crate) const NEVER: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);

pub(crate) struct Deployment<'a> {
    pub(crate) cluster: &'a ControlPlane,
    pub(crate) admin: Client,
    /// Where agents and controller are.
    pub(crate) home: String,
    /// Where workloads are.
    pub(crate) work: String,
    pub(crate) signer: String,
    /// The controller's `signer`, but for its name.
    pub(crate) ca: Value,
    pub(crate) nodes: [String; 2],
    /// The agent of each node.
    pub(crate) agents: [Pod; 2],
    folder: tempfile::TempDir,
}

/// A controller that runs; killed when dropped.
pub(crate) struct Controller {
    process: Child,
    log: PathBuf,
}

/// What a CSR ended with.
#[derive(Debug)]
pub(crate) enum Answer {
    Signed { chain: String, approval: Condition },
    Denied(Condition),
    Failed(Condition),
}

impl Deployment<'static> {
    /// With roles of the test's own, on the control plane that all tests share.
    pub(crate) async fn new() -> Option<Self> {
        Some(Self::on(ControlPlane::shared().await?).await)
    }

    /// With roles and admission as they are shipped.
    pub(crate) async fn shipped(overlay: Overlay) -> Option<Self> {
        let cluster = ControlPlane::shipped(overlay).await?;
        Some(Self::of(cluster, SYSTEM.to_owned(), csrd::kubernetes::SIGNER.to_owned()).await)
    }
}

impl<'a> Deployment<'a> {
    /// With roles of the test's own.
    pub(crate) async fn on(cluster: &'a ControlPlane) -> Self {
        let home = cluster.namespace(&[]).await;
        for name in ["csrd-agent", "csrd-controller"] {
            cluster.service_account(&home, name).await;
        }
        policies::define(cluster).await;
        let deployment = Self::of(cluster, home, format!("{}.example.org/workload", unique("signer"))).await;
        deployment.allow("csrd-agent", agent_rules()).await;
        deployment.allow("csrd-controller", controller_rules(&deployment.signer)).await;
        deployment
    }

    async fn of(cluster: &'a ControlPlane, home: String, signer: String) -> Self {
        let (admin, work) = (cluster.admin().await, cluster.namespace(&[]).await);
        cluster.service_account(&work, "web").await;
        let mut nodes = Vec::new();
        let mut agents = Vec::new();
        for number in ["n1", "n2"] {
            let node = cluster.node(number).await.name_any();
            agents.push(cluster.pod(&home, &format!("agent-{node}"), &node, "csrd-agent", &[]).await);
            nodes.push(node);
        }
        let folder = tempfile::tempdir().unwrap();
        let (nodes, agents) = (nodes.try_into().unwrap(), agents.try_into().unwrap());
        let deployment = Self { cluster, admin, home, work, signer, ca: json!({}), nodes, agents, folder };
        deployment
            .policy(json!({
                "uris": ["spiffe://example.org/ns/{kubernetes.namespace}/sa/{kubernetes.serviceAccount}"],
                "dnsNames": ["{kubernetes.serviceAccount}.example.org"],
                "lifetime": {"min": "10m", "default": "1h", "max": "24h"},
            }))
            .await;
        deployment
    }

    /// Lets a ServiceAccount of the deployment's own do more.
    pub(crate) async fn allow(&self, account: &str, rules: Value) {
        let account = json!({"kind": "ServiceAccount", "name": account, "namespace": self.home});
        self.cluster.allow(account, rules).await;
    }

    /// Lets somebody else do to requests what agents may.
    pub(crate) async fn allow_requests(&self, user: &str) {
        let user = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user});
        self.cluster.allow(user, agent_rules()).await;
    }

    pub(crate) fn policies(&self) -> Api<DynamicObject> {
        Api::all_with(self.admin.clone(), &resource())
    }

    /// Writes the policy of this deployment's workloads; its name is the deployment's work namespace.
    pub(crate) async fn policy(&self, allow: Value) {
        let whom = json!({"kubernetes": {"namespaces": [self.work]}});
        self.write_policy(&self.work, json!({"match": whom, "signer": self.signer, "allow": allow})).await;
    }

    pub(crate) async fn write_policy(&self, name: &str, spec: Value) {
        let policy = json!({
            "apiVersion": "csrd.dev/v1alpha1",
            "kind": "CertificatePolicy",
            "metadata": {"name": name},
            "spec": spec,
        });
        self.policies().patch(name, &PatchParams::apply("test").force(), &Patch::Apply(&policy)).await.unwrap();
    }

    /// The condition `Accepted` of a policy, once it is `status`.
    pub(crate) async fn condition(&self, policy: &str, status: &str) -> Value {
        let policies = self.policies();
        let said = async {
            loop {
                let policy = policies.get(policy).await.unwrap();
                let condition = policy.data.pointer("/status/conditions/0").cloned().unwrap_or_default();
                if condition["type"] == "Accepted" && condition["status"] == status {
                    return condition;
                }
                sleep(POLL).await;
            }
        };
        timeout(NEVER, said).await.expect("the policy's status")
    }

    /// Lets the controller approve for a signer of others, and follow nodes and the ranges of Services.
    pub(crate) async fn let_approve(&self, signer: &str) {
        let rules = json!([{"apiGroups": ["certificates.k8s.io"], "resources": ["signers"], "resourceNames": [signer], "verbs": ["approve"]},
            {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
            {"apiGroups": ["networking.k8s.io"], "resources": ["servicecidrs"], "verbs": ["list", "watch"]}]);
        self.allow("csrd-controller", rules).await;
    }

    /// Starts a controller, with `more` in its configuration.
    pub(crate) async fn controller(&self, more: &str) -> Controller {
        self.controller_with(more, &[]).await
    }

    /// With these variables in its environment.
    pub(crate) async fn controller_with(&self, more: &str, variables: &[(&str, &str)]) -> Controller {
        let token = self.cluster.unbound_token(&self.home, "csrd-controller", &[]).await;
        let kubeconfig = self.cluster.access.kubeconfig(&Identity::Token(token));
        let (config, log) = (self.folder.path().join(unique("config")), self.folder.path().join(unique("log")));
        let mut signer = self.ca.clone();
        signer["name"] = self.signer.clone().into();
        let text =
            format!("kubeconfig: {}\nnamespace: {}\nsigner: {signer}\n{more}\n", kubeconfig.display(), self.home);
        fs::write(&config, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_csrd"));
        command.arg("controller").arg("--config").arg(config).envs(variables.iter().copied()).stdout(Stdio::null());
        let process = command.stderr(fs::File::create(&log).unwrap()).spawn().unwrap();
        Controller { process, log }
    }

    /// A workload on the node of that index.
    pub(crate) async fn workload(&self, node: usize) -> Pod {
        self.cluster.pod(&self.work, &unique("web"), &self.nodes[node], "web", &[]).await
    }

    /// A client of the node's agent.
    pub(crate) async fn agent(&self, node: usize) -> Client {
        let token = self.cluster.token(&self.agents[node], &[]).await;
        self.cluster.access.client(&Identity::Token(token)).await
    }

    /// A request as the agent of `pod`'s node makes it.
    pub(crate) fn request(&self, pod: &Pod) -> Value {
        let spec = pod.spec.as_ref().unwrap();
        let account = spec.service_account_name.clone().unwrap();
        json!({
            "metadata": {
                "name": unique("csrd"),
                "labels": {"app.kubernetes.io/managed-by": "csrd"},
                "annotations": {
                    "csrd.dev/pod-namespace": pod.namespace(),
                    "csrd.dev/pod-name": pod.name_any(),
                    "csrd.dev/pod-uid": pod.uid(),
                    "csrd.dev/service-account": account,
                    "csrd.dev/node": spec.node_name,
                },
            },
            "spec": {
                "request": pkcs10(&format!("spiffe://example.org/ns/{}/sa/{account}", self.work)),
                "signerName": self.signer,
                "expirationSeconds": 3600,
                "usages": ["digital signature", "client auth", "server auth"],
            },
        })
    }

    /// Makes a request as `client` and waits for its answer.
    pub(crate) async fn ask(&self, client: &Client, request: Value) -> Answer {
        let made = make(client, request).await.unwrap();
        self.answer(&made.name_any()).await
    }

    pub(crate) async fn answer(&self, name: &str) -> Answer {
        let requests: Api<Request> = Api::all(self.admin.clone());
        let answered = async {
            loop {
                if let Some(answer) = answer(requests.get(name).await.unwrap()) {
                    return answer;
                }
                sleep(POLL).await;
            }
        };
        timeout(NEVER, answered).await.unwrap_or_else(|_| panic!("{name} is not answered"))
    }

    /// The published roots in a namespace, once `wanted` of them.
    pub(crate) async fn roots(&self, namespace: &str, wanted: impl Fn(&str) -> bool) -> String {
        let maps: Api<ConfigMap> = Api::namespaced(self.admin.clone(), namespace);
        let published = async {
            loop {
                let map = maps.get_opt("csrd-trust-bundle").await.unwrap();
                if let Some(roots) = map.and_then(|map| map.data?.remove("ca.crt")).filter(|roots| wanted(roots)) {
                    return roots;
                }
                sleep(POLL).await;
            }
        };
        timeout(NEVER, published).await.expect("the roots are published")
    }
}

impl Controller {
    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn leads(&self) -> bool {
        let said = self.said();
        said.matches("leads from now on").count() > said.matches("leads no more").count()
    }

    /// As a crash ends it.
    pub(crate) fn kill(mut self) {
        self.process.kill().unwrap();
    }

    /// As Kubernetes ends it; returns its exit code.
    pub(crate) async fn stop(mut self) -> Option<i32> {
        let id = rustix::process::Pid::from_raw(self.process.id().try_into().unwrap()).unwrap();
        rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
        let ended = async {
            loop {
                if let Some(status) = self.process.try_wait().unwrap() {
                    return status.code();
                }
                sleep(POLL).await;
            }
        };
        timeout(NEVER, ended).await.expect("it stops")
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) async fn make(client: &Client, request: Value) -> kube::Result<Request> {
    Api::all(client.clone()).create(&PostParams::default(), &serde_json::from_value(request).unwrap()).await
}

/// A PKCS#10 request with one URI, IP address or DNS name, and a key of its own.
pub(crate) fn pkcs10(name: &str) -> ByteString {
    request_for(DistinguishedName::new(), name)
}

/// One with this user and group as its subject.
pub(crate) fn pkcs10_of(user: &str, group: &str, name: &str) -> ByteString {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, group);
    subject.push(DnType::CommonName, user);
    request_for(subject, name)
}

fn request_for(subject: DistinguishedName, name: &str) -> ByteString {
    let mut params = CertificateParams::default();
    params.distinguished_name = subject;
    params.subject_alt_names = vec![match (name.contains("://"), name.parse()) {
        (true, _) => SanType::URI(name.try_into().unwrap()),
        (false, Ok(address)) => SanType::IpAddress(address),
        (false, Err(_)) => SanType::DnsName(name.try_into().unwrap()),
    }];
    let key = KeyPair::generate().unwrap();
    ByteString(params.serialize_request(&key).unwrap().pem().unwrap().into_bytes())
}

fn answer(request: Request) -> Option<Answer> {
    let status = request.status?;
    let condition = |type_: &str| status.conditions.iter().flatten().find(|it| it.type_ == type_).cloned();
    match (condition("Denied"), condition("Failed"), status.certificate.clone()) {
        (Some(denied), ..) => Some(Answer::Denied(denied)),
        (_, Some(failed), _) => Some(Answer::Failed(failed)),
        (.., Some(ByteString(chain))) => {
            Some(Answer::Signed { chain: String::from_utf8(chain).unwrap(), approval: condition("Approved")? })
        }
        _ => None,
    }
}

/// All that an agent may do.
fn agent_rules() -> Value {
    json!([{
        "apiGroups": ["certificates.k8s.io"],
        "resources": ["certificatesigningrequests"],
        "verbs": ["create", "get", "watch", "delete"],
    }])
}

/// All that a controller needs.
fn controller_rules(signer: &str) -> Value {
    let certificates = "certificates.k8s.io";
    json!([
        {"apiGroups": [certificates], "resources": ["certificatesigningrequests"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": [certificates], "resources": ["certificatesigningrequests/approval"], "verbs": ["patch"]},
        {"apiGroups": [certificates], "resources": ["certificatesigningrequests/status"], "verbs": ["patch"]},
        {"apiGroups": [certificates], "resources": ["signers"], "resourceNames": [signer], "verbs": ["approve", "sign", "attest"]},
        {"apiGroups": [certificates], "resources": ["clustertrustbundles"], "verbs": ["list", "watch", "create", "patch"]},
        {"apiGroups": ["csrd.dev"], "resources": ["certificatepolicies"], "verbs": ["list", "watch"]},
        {"apiGroups": ["csrd.dev"], "resources": ["certificatepolicies/status"], "verbs": ["patch"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": [""], "resources": ["namespaces", "services"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
        {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["csrd-trust-bundle"], "verbs": ["list", "watch", "patch"]},
        {"apiGroups": [""], "resources": ["configmaps", "secrets"], "verbs": ["create"]},
        {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["csrd-ca"], "verbs": ["get", "patch"]},
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]},
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "resourceNames": ["csrd-controller"], "verbs": ["get", "update"]},
        {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch"]},
    ])
}
