//! `deploy/kubernetes` on a control plane of its own, as an operator applies it.
//!
//! What RBAC and admission refuse there they refuse in any cluster. The pods of DaemonSet and Deployment wait for a scheduler
//! for ever: in their place are pods of the tests, with the agents' ServiceAccount, and one `csrd controller` on this host,
//! with the rights that are shipped and the configuration of the defaults. The API server keeps an audit log.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use csrd::kubernetes::SIGNER;
use k8s_openapi::{ByteString, api::certificates::v1::CertificateSigningRequest};
use kube::{Api, api::PostParams};
use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use super::{ControlPlane, Identity, Options, Part, eventually};

pub(crate) const SYSTEM: &str = "csrd-system";
pub(crate) const CONTROLLER: &str = "csrd-controller";

/// A folder of `deploy/kubernetes`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Overlay {
    ApprovalController,
    /// Without a controller, as its `kustomization.yaml` says: nobody but agents approves.
    ApprovalAgent,
}

impl ControlPlane {
    /// The one that all tests of that overlay share; none if they are to be left out.
    pub(crate) async fn shipped(overlay: Overlay) -> Option<&'static Self> {
        static SHARED: [OnceCell<Option<ControlPlane>>; 2] = [const { OnceCell::const_new() }; 2];
        SHARED[overlay as usize].get_or_init(|| ship(overlay)).await.as_ref()
    }

    /// Where its controller answers `csrd health`.
    pub(crate) fn health_socket(&self) -> PathBuf {
        self.processes.folder().join("controller.sock")
    }

    /// The events of the audit log that have this in them.
    pub(crate) fn audit_log(&self, piece: &str) -> Vec<Value> {
        let log = self.log(Part::ApiServer);
        log.lines().filter(|line| line.contains(piece)).filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The event of the audit log about the request that got this answer.
    pub(crate) async fn audited(&self, message: &str) -> Value {
        eventually("an event of the audit log", async || {
            let mut refusals = self.audit_log(r#""status":"Failure""#).into_iter();
            refusals.find(|event| event["responseStatus"]["message"] == message)
        })
        .await
    }
}

async fn ship(overlay: Overlay) -> Option<ControlPlane> {
    let audit = tempfile::NamedTempFile::new().unwrap();
    let policy = json!({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata"}]});
    fs::write(audit.path(), policy.to_string()).unwrap();
    let apiserver = vec![format!("--audit-policy-file={}", audit.path().display()), "--audit-log-path=-".into()];
    let cluster = ControlPlane::start(Options { apiserver, ..Options::default() }).await?;
    let folder = match overlay {
        Overlay::ApprovalController => "approval-controller",
        Overlay::ApprovalAgent => "approval-agent",
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes").join(folder);
    let established = ["wait", "--for=condition=Established", "--timeout=60s", "crd/certificatepolicies.csrd.dev"];
    for arguments in [&["apply", "-k", folder.to_str().unwrap()][..], &established] {
        let output = cluster.kubectl(arguments).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    admission_in_force(&cluster).await;
    if overlay == Overlay::ApprovalController {
        start_controller(&cluster).await;
    }
    Some(cluster)
}

/// The API server takes a moment to read roles and policies.
async fn admission_in_force(cluster: &ControlPlane) {
    let unbound = Identity::Token(cluster.unbound_token(SYSTEM, "csrd-agent", &[]).await);
    let requests: Api<CertificateSigningRequest> = Api::all(cluster.access.client(&unbound).await);
    let pkcs10 = CertificateParams::default().serialize_request(&KeyPair::generate().unwrap()).unwrap();
    let pkcs10 = ByteString(pkcs10.pem().unwrap().into_bytes());
    let spec = json!({"request": pkcs10, "signerName": SIGNER, "usages": ["client auth"]});
    let request = serde_json::from_value(json!({"metadata": {"name": "tried-out"}, "spec": spec})).unwrap();
    let dry_run = PostParams { dry_run: true, ..PostParams::default() };
    eventually("the admission policy is in force", async || {
        let refused = requests.create(&dry_run, &request).await.err()?.to_string();
        refused.contains("ValidatingAdmissionPolicy").then_some(())
    })
    .await;
}

async fn start_controller(cluster: &ControlPlane) {
    let token = cluster.unbound_token(SYSTEM, CONTROLLER, &[]).await;
    let kubeconfig = cluster.access.kubeconfig(&Identity::Token(token));
    fs::write(cluster.processes.folder().join("controller.yaml"), json!({"kubeconfig": kubeconfig}).to_string())
        .unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_csrd"));
    command.args(["controller", "--config", "controller.yaml", "--socket"]).arg(cluster.health_socket());
    cluster.processes.start(CONTROLLER, command);
}
