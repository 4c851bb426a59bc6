//! `approval: agent`: what an agent needs to approve its own requests. What keeps it from approving others': `stolen_token`.

use std::{path::Path, time::Duration};

use csrd::{
    clock::Clock,
    kubernetes::{self, connect},
    metrics::Metrics,
    signer::kubernetes::{Approval, ProbeError, probe},
};
use k8s_openapi::api::{
    admissionregistration::v1::ValidatingAdmissionPolicyBinding,
    core::v1::{Namespace, Pod},
    rbac::v1::{ClusterRole, ClusterRoleBinding},
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::json;

use super::{
    authority::{Authority, write},
    rig::{PATIENCE, Rig, may, may_all},
};
use crate::cluster::{ControlPlane, Identity, Options, eventually};

const NAMESPACE: &str = "csrd-system";
const ACCOUNT: &str = "csrd-agent";
const SIGNER: &str = csrd::kubernetes::SIGNER;

/// A control plane of the test's own: the policy is named for one ServiceAccount, and RBAC comes and goes.
async fn cluster() -> Option<&'static ControlPlane> {
    let cluster: &'static ControlPlane = Box::leak(Box::new(ControlPlane::start(Options::default()).await?));
    let _: Namespace = cluster.create(json!({"metadata": {"name": NAMESPACE}})).await;
    cluster.service_account(NAMESPACE, ACCOUNT).await;
    may(cluster, NAMESPACE, ACCOUNT, &["create", "get", "list", "watch", "delete"]).await;
    Some(cluster)
}

/// An agent's pod on a node of its own.
async fn on_a_node(cluster: &ControlPlane, name: &str) -> (Pod, Identity) {
    let node = cluster.node(name).await.name_any();
    let pod = cluster.pod(NAMESPACE, name, &node, ACCOUNT, &[]).await;
    let token = cluster.token(&pod, &[]).await;
    (pod, Identity::Token(token))
}

async fn client(cluster: &ControlPlane, identity: &Identity) -> Client {
    connect(Some(&cluster.access.kubeconfig(identity))).await.unwrap()
}

async fn apply(cluster: &ControlPlane, file: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes").join(file);
    let output = cluster.kubectl(&["apply", "-f", path.to_str().unwrap()]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What the probe says, once it no longer says what is `passing`: roles and policies take a moment to be in force.
async fn probed(client: &Client, passing: fn(&ProbeError) -> bool) -> Result<(), ProbeError> {
    let agent = kubernetes::Identity::ask(client).await.unwrap();
    let settled = async {
        loop {
            match probe(client, &agent, &[SIGNER], Metrics::new()).await {
                Err(error) if passing(&error) => tokio::time::sleep(Duration::from_millis(100)).await,
                outcome => break outcome,
            }
        }
    };
    tokio::time::timeout(PATIENCE, settled).await.expect("roles and policies come into force")
}

#[tokio::test]
async fn an_agent_approves_only_where_token_rbac_and_admission_hold_it_to_its_node() {
    let Some(cluster) = cluster().await else { return };
    let (pod, identity) = on_a_node(cluster, "first").await;
    let agent = client(cluster, &identity).await;

    // A token that no pod is bound to.
    let unbound = Identity::Token(cluster.unbound_token(NAMESPACE, ACCOUNT, &[]).await);
    let unbound = client(cluster, &unbound).await;
    let error = probed(&unbound, |_| false).await.unwrap_err();
    assert_eq!(error, ProbeError::Unbound { claim: kubernetes::extra::NODE_NAME });

    // RBAC: nothing, too much in two ways, and enough.
    assert_eq!(probed(&agent, |_| false).await, Err(ProbeError::MayNotPatch));
    let patch = json!({"apiGroups": ["certificates.k8s.io"], "resources": ["certificatesigningrequests/approval"], "verbs": ["patch"]});
    let approve = |names: &[&str]| json!({"apiGroups": ["certificates.k8s.io"], "resources": ["signers"], "verbs": ["approve"], "resourceNames": names});
    let patching = may_all(cluster, NAMESPACE, ACCOUNT, json!([patch])).await;
    let error = probed(&agent, |error| *error == ProbeError::MayNotPatch).await.unwrap_err();
    assert_eq!(error, ProbeError::MayNotApprove { signer: SIGNER.to_owned() });
    for (names, too_much) in [
        (vec![], "kubernetes.io/kube-apiserver-client"),
        (vec![SIGNER, "csrd.dev/*"], "csrd.dev/*"),
        (vec![SIGNER, "kubernetes.io/kubelet-serving"], "kubernetes.io/kubelet-serving"),
    ] {
        let role = may_all(cluster, NAMESPACE, ACCOUNT, json!([approve(&names)])).await;
        let error = probed(&agent, |error| matches!(error, ProbeError::MayNotApprove { .. })).await.unwrap_err();
        assert_eq!(error, ProbeError::MayApproveOthers { signer: too_much.to_owned() });
        remove_role(cluster, &role).await;
        let error = probed(&agent, |error| matches!(error, ProbeError::MayApproveOthers { .. })).await.unwrap_err();
        assert!(matches!(error, ProbeError::MayNotApprove { .. }), "{error:?}");
    }
    remove_role(cluster, &patching).await;
    apply(cluster, "approval-agent/rbac.yaml").await;

    // Admission: none, one that only warns, and the shipped one.
    let not_allowed = |error: &ProbeError| matches!(error, ProbeError::MayNotPatch | ProbeError::MayNotApprove { .. });
    let error = probed(&agent, not_allowed).await.unwrap_err();
    assert!(matches!(error, ProbeError::NotInForce { .. }), "{error:?}");
    let said = error.to_string();
    assert!(
        said.contains("csrd-agent is not in force") && said.contains("apply deploy/kubernetes/approval-agent"),
        "{said}"
    );
    apply(cluster, "base/agent-admission.yaml").await;
    probed(&agent, |error| matches!(error, ProbeError::NotInForce { .. })).await.unwrap();
    let bindings: Api<ValidatingAdmissionPolicyBinding> = Api::all(cluster.admin().await);
    let only_warn = Patch::Merge(json!({"spec": {"validationActions": ["Warn"]}}));
    bindings.patch("csrd-agent", &PatchParams::default(), &only_warn).await.unwrap();
    let error = eventually("it only warns", async || probed(&agent, |_| false).await.err()).await;
    assert!(matches!(error, ProbeError::NotInForce { .. }), "{error:?}");
    apply(cluster, "base/agent-admission.yaml").await;
    probed(&agent, |error| matches!(error, ProbeError::NotInForce { .. })).await.unwrap();
    let reviewed = kubernetes::Identity::ask(&agent).await.unwrap();
    let error = probe(&agent, &reviewed, &["kubernetes.io/kube-apiserver-client"], Metrics::new()).await.unwrap_err();
    assert!(matches!(error, ProbeError::BuiltIn { .. }), "{error:?}");

    the_agent_of_a_node_serves_it(cluster, &pod, identity).await;
}

async fn the_agent_of_a_node_serves_it(cluster: &'static ControlPlane, pod: &Pod, identity: Identity) {
    let authority = Authority::new();
    let rig = Rig::of(cluster, &cluster.access, identity, pod, Clock::system()).await;
    let signer = rig.signer_with(SIGNER, &authority.root, Approval::Agent);
    let credential = rig.attempt(&signer, async |name| {
        let approved = async {
            loop {
                let csr = rig.admin.get(&name).await.unwrap();
                let conditions = csr.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
                match conditions.into_iter().next() {
                    Some(condition) => break (csr, condition),
                    None => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        };
        let (csr, condition) = tokio::time::timeout(PATIENCE, approved).await.expect("the agent approves");
        assert_eq!((condition.type_.as_str(), condition.reason.as_deref()), ("Approved", Some("AllowedByPolicy")));
        assert_eq!(condition.message.as_deref(), Some("policy test allows it"));
        write(&rig.admin, &name, authority.sign(&csr, Duration::from_secs(600)) + &authority.intermediate).await;
    });
    credential.await.unwrap();
}

async fn remove_role(cluster: &ControlPlane, name: &str) {
    let admin = cluster.admin().await;
    Api::<ClusterRoleBinding>::all(admin.clone()).delete(name, &DeleteParams::default()).await.unwrap();
    Api::<ClusterRole>::all(admin).delete(name, &DeleteParams::default()).await.unwrap();
}
