//! A real node: kubelet, containerd and runc, on a control plane whose scheduler runs.
//!
//! It is for tests under `tests/it/node.rs`, which are `#[ignore]`d and run by `tests/cluster/run`. That command gives them
//! namespaces of their own, in which this process, the kubelet and the pods are: a test sees the processes and cgroups of
//! pods as the host of an ordinary node does.
//!
//! - Pods reach the API server at its Service address, port 443, as in any cluster. There is no kube-proxy and no DNS, so
//!   other Services have an address and nothing behind it.
//! - [`CSRD_IMAGE`] is what the Dockerfile makes; [`SHELL_IMAGE`] has busybox, and csrd in `/bin`. Nothing is pulled.
//! - The kubelet asked for its serving certificate and got it approved, so `kubectl logs` and `kubectl exec` work.

use std::{env, fs, net::SocketAddrV4, path::PathBuf, process::Command};

use k8s_openapi::api::{
    certificates::v1::CertificateSigningRequest,
    core::v1::{Node, Pod},
};
use kube::{
    Api, ResourceExt as _,
    api::{ListParams, Patch, PatchParams, PostParams},
    runtime::wait::{await_condition, conditions::is_pod_running},
};
use serde_json::{Value, json};
use tokio::{sync::OnceCell, time::timeout};

use super::{ControlPlane, Options, PATIENCE, Part, eventually};

pub(crate) const CSRD_IMAGE: &str = "csrd.test/csrd:test";
pub(crate) const SHELL_IMAGE: &str = "csrd.test/shell:test";

/// The name of the node.
pub(crate) const NODE: &str = "node1";

const CNI_PLUGINS: &str = "/usr/lib/cni";
const PORT: u16 = 443;

/// What `tests/cluster/run` says.
struct Given {
    node_address: String,
    service_address: String,
    containerd: PathBuf,
    images: PathBuf,
    overlay: String,
}

impl Given {
    fn read() -> Self {
        let read = |name| env::var(name).unwrap_or_else(|_| panic!("run this test with tests/cluster/run: no {name}"));
        Self {
            node_address: read("CSRD_TEST_NODE"),
            service_address: read("CSRD_TEST_SERVICE"),
            containerd: read("CSRD_TEST_CONTAINERD").into(),
            images: read("CSRD_TEST_IMAGES").into(),
            overlay: read("CSRD_TEST_OVERLAY"),
        }
    }
}

pub(crate) struct RealNode {
    pub(crate) cluster: ControlPlane,
    /// The folder of `deploy/kubernetes` to deploy.
    pub(crate) overlay: String,
}

impl RealNode {
    /// The one that all tests share.
    pub(crate) async fn shared() -> &'static Self {
        static SHARED: OnceCell<RealNode> = OnceCell::const_new();
        SHARED.get_or_init(Self::start).await
    }

    async fn start() -> Self {
        let given = Given::read();
        let options = Options {
            scheduler: true,
            node_lifecycle: true,
            api: Some(SocketAddrV4::new(given.service_address.parse().unwrap(), PORT)),
            ..Options::default()
        };
        let cluster = ControlPlane::start(options).await.expect("the switch is for those without a node");
        let mut node = Self { cluster, overlay: given.overlay.clone() };
        node.start_containerd(&given).await;
        node.start_kubelet(&given);
        node.approve_serving_certificate().await;
        node.ready().await;
        node.sign_for_minutes().await;
        node
    }

    fn file(&self, name: &str) -> PathBuf {
        self.cluster.processes.folder().join(name)
    }

    async fn start_containerd(&self, given: &Given) {
        let folder = self.cluster.processes.folder().display();
        fs::create_dir(self.file("cni")).unwrap();
        let network = json!({"cniVersion": "1.0.0", "name": "test", "plugins": [
            {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.244.0.0/24"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            }},
            {"type": "loopback"},
        ]});
        fs::write(self.file("cni/test.conflist"), network.to_string()).unwrap();
        // Without the last but one setting a root without CAP_SYS_RESOURCE, as in a container, can start no container.
        let config = format!(
            r#"
version = 3
root = "{folder}/containerd/root"
state = "{folder}/containerd/state"
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{SHELL_IMAGE}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{CNI_PLUGINS}"]
  conf_dir = "{folder}/cni"
"#
        );
        fs::write(self.file("containerd.toml"), config).unwrap();
        let path = format!("{}:{}", given.containerd.display(), env::var("PATH").unwrap());
        let mut command = Command::new(given.containerd.join("containerd"));
        command.arg("--config").arg("containerd.toml").env("PATH", path);
        self.cluster.processes.start("containerd", command);
        eventually("containerd listens", async || self.file("containerd.sock").exists().then_some(())).await;
        for image in ["csrd.tar", "shell.tar"] {
            let mut import = Command::new(given.containerd.join("ctr"));
            import.arg("--address").arg(self.file("containerd.sock"));
            import.args(["--namespace", "k8s.io", "images", "import"]).arg(given.images.join(image));
            let done = import.output().unwrap();
            assert!(done.status.success(), "{done:?}");
        }
    }

    fn start_kubelet(&self, given: &Given) {
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": given.node_address,
            "failCgroupV1": false,
            "failSwapOn": false,
            "cgroupDriver": "cgroupfs",
            "containerRuntimeEndpoint": format!("unix://{}", self.file("containerd.sock").display()),
            "authentication": {
                "anonymous": {"enabled": false},
                "webhook": {"enabled": true},
                "x509": {"clientCAFile": self.file("pki/ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "serverTLSBootstrap": true,
            // What pods have for a resolver; nothing answers there.
            "clusterDNS": [given.node_address],
            "clusterDomain": "cluster.local",
            // A test host may be nearly full.
            "evictionHard": {"imagefs.available": "1%", "nodefs.available": "1%", "memory.available": "100Mi"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
        });
        fs::write(self.file("kubelet.yaml"), config.to_string()).unwrap();
        let identity = self.cluster.user(&format!("system:node:{NODE}"), Some("system:nodes"));
        let mut command = Command::new(&self.cluster.binary);
        command.arg("kubelet").arg("--config=kubelet.yaml");
        command.arg(format!("--kubeconfig={}", self.cluster.access.kubeconfig(&identity).display()));
        command.arg(format!("--root-dir={}", self.file("kubelet").display()));
        command.args([format!("--hostname-override={NODE}"), format!("--node-ip={}", given.node_address)]);
        self.cluster.processes.start("kubelet", command);
    }

    /// What an operator does by hand after looking: no built-in controller approves it.
    async fn approve_serving_certificate(&self) {
        let requests: Api<CertificateSigningRequest> = Api::all(self.cluster.admin().await);
        let serving = ListParams::default().fields("spec.signerName=kubernetes.io/kubelet-serving");
        let asked = async || requests.list(&serving).await.unwrap().items.pop();
        let name = eventually("the kubelet asks for a serving certificate", asked).await.name_any();
        let approved = json!({"status": {"conditions": [
            {"type": "Approved", "status": "True", "reason": "Test", "message": "the only kubelet there is"},
        ]}});
        requests
            .patch_subresource("approval", &name, &PatchParams::default(), &Patch::Strategic(approved))
            .await
            .unwrap();
        let signed = async || requests.get(&name).await.unwrap().status?.certificate.map(drop);
        eventually("the kubelet's serving certificate", signed).await;
    }

    /// From now on Kubernetes' own signers sign for two minutes at most, so that a test sees such a certificate end.
    async fn sign_for_minutes(&mut self) {
        self.cluster.options.controllers = vec!["--cluster-signing-duration=2m".to_owned()];
        self.cluster.kill(Part::Controllers);
        self.cluster.restart(Part::Controllers).await;
    }

    async fn ready(&self) {
        let nodes: Api<Node> = Api::all(self.cluster.admin().await);
        let ready = |node: Option<&Node>| {
            let conditions = node.and_then(|it| it.status.as_ref()?.conditions.as_ref());
            conditions.is_some_and(|it| it.iter().any(|it| it.type_ == "Ready" && it.status == "True"))
        };
        timeout(PATIENCE, await_condition(nodes, NODE, ready))
            .await
            .unwrap_or_else(|_| {
                panic!("the node is not ready; the kubelet says: {}", self.cluster.processes.log("kubelet"))
            })
            .unwrap();
    }

    /// Makes this pod and waits until it runs.
    pub(crate) async fn run(&self, pod: Value) -> Pod {
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let namespace = pod.namespace().expect("a pod has a namespace");
        let pods: Api<Pod> = Api::namespaced(self.cluster.admin().await, &namespace);
        let name = pods.create(&PostParams::default(), &pod).await.unwrap().name_any();
        let running = timeout(PATIENCE, await_condition(pods, &name, is_pod_running())).await;
        match running {
            Ok(pod) => pod.unwrap().expect("it runs"),
            Err(_) => {
                let why = self.cluster.kubectl(&["-n", &namespace, "describe", "pod", &name]).await;
                panic!("the pod does not run: {}", String::from_utf8_lossy(&why.stdout));
            }
        }
    }
}
