//! `deploy/kubernetes` on a real node, as an operator applies it: nothing is changed but the image. `tests/cluster/run` says
//! which overlay: one where the controller approves, for our signer and for `kubernetes.io/kube-apiserver-client`, or the
//! one where agents approve.

use std::{fs, path::Path, process::Output, time::Duration};

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams},
};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use crate::cluster::{RealNode, SHELL_IMAGE, eventually};

const SYSTEM: &str = "csrd-system";
/// Exit code of `csrd issue` when it may be asked again.
const UNAVAILABLE: i32 = 69;
/// More than the renewal of a certificate of ten minutes takes.
const NEVER: Duration = Duration::from_secs(600);
/// The overlay where agents approve.
const BY_AGENTS: &str = "approval-agent";
/// The overlay whose agents have the API server's own signer too.
const FOR_KUBECTL: &str = "kubectl-access";

/// Who signs, and where its roots are: namespace, name and key of a ConfigMap.
type Signer = (&'static str, [&'static str; 3]);

const SIGNERS: [Signer; 2] = [
    ("csrd.dev/workload", [SYSTEM, "csrd-trust-bundle", "ca\\.crt"]),
    ("kubernetes.io/kube-apiserver-client", ["kube-system", "extension-apiserver-authentication", "client-ca-file"]),
];

fn signers(node: &RealNode) -> &'static [Signer] {
    if node.overlay == FOR_KUBECTL { &SIGNERS } else { &SIGNERS[..1] }
}

/// The node with agent and controller.
pub(super) async fn deployed() -> &'static RealNode {
    static DEPLOYED: OnceCell<()> = OnceCell::const_new();
    let node = RealNode::shared().await;
    DEPLOYED.get_or_init(|| apply(node)).await;
    node
}

/// `kubectl apply -k` of the overlay, with the image of this build, until it runs.
async fn apply(node: &RealNode) {
    let folder = tempfile::tempdir().unwrap();
    // kustomize takes paths from the folder that it is in, and none that are absolute.
    let there = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes").join(&node.overlay);
    let up = "../".repeat(folder.path().components().count() - 1);
    let mut kustomization = json!({
        "resources": [format!("{up}{}", there.strip_prefix("/").unwrap().display())],
        "images": [{"name": "ghcr.io/csrd/csrd", "newName": "csrd.test/csrd", "newTag": "test"}],
    });
    if node.overlay == BY_AGENTS {
        // Certificates end with their CA at the latest, so that ten minutes need not be waited for once more.
        let config = "controller.yaml={admin: '0.0.0.0:9402', signer: {caLifetime: 2m}}";
        kustomization["configMapGenerator"] = json!([{"name": "csrd-controller-config", "namespace": SYSTEM,
            "behavior": "replace", "literals": [config]}]);
    }
    fs::write(folder.path().join("kustomization.yaml"), kustomization.to_string()).unwrap();
    kubectl(node, &["apply", "-k", folder.path().to_str().unwrap()]).await;
    for part in ["deployment/csrd-controller", "daemonset/csrd-agent"] {
        let rolled = node.cluster.kubectl(&["-n", SYSTEM, "rollout", "status", part, "--timeout=300s"]).await;
        if !rolled.status.success() {
            let logs = ["-n", SYSTEM, "logs", "-l", "app.kubernetes.io/name=csrd", "--tail=20", "--prefix"];
            let logs = node.cluster.kubectl(&logs).await;
            let pods = node.cluster.kubectl(&["-n", SYSTEM, "describe", "pods"]).await;
            panic!("{part} does not come up: {}\n{}", text(&logs), text(&pods));
        }
    }
}

pub(super) fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

/// What kubectl prints, which must succeed.
async fn kubectl(node: &RealNode, arguments: &[&str]) -> String {
    let output = node.cluster.kubectl(arguments).await;
    assert!(output.status.success(), "kubectl {arguments:?}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Applies one object.
async fn create(node: &RealNode, object: Value) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), object.to_string()).unwrap();
    kubectl(node, &["apply", "-f", file.path().to_str().unwrap()]).await;
}

/// A policy for the pods of `namespace` that are labelled `app: web`.
fn policy(namespace: &str, signer: &str) -> Value {
    json!({
        "apiVersion": "csrd.dev/v1alpha1",
        "kind": "CertificatePolicy",
        "metadata": {"name": namespace},
        "spec": {
            "signer": signer,
            "match": {"kubernetes": {"namespaces": [namespace], "podSelector": {"matchLabels": {"app": "web"}}}},
            "allow": {
                "dnsNames": [
                    "{kubernetes.service}.{kubernetes.namespace}.svc",
                    "{kubernetes.service}.{kubernetes.namespace}.svc.cluster.local",
                ],
                "ipAddresses": ["{kubernetes.podIP}"],
            },
            "offer": [{"spiffeId":
                "spiffe://cluster.local/ns/{kubernetes.namespace}/sa/{kubernetes.serviceAccount}"}],
        },
    })
}

/// A pod with a shell, csrd in its path and the socket's folder mounted, labelled `app: web`.
fn workload(namespace: &str, name: &str, command: &[&str]) -> Value {
    json!({
        "metadata": {"namespace": namespace, "name": name, "labels": {"app": "web"}},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "containers": [{
                "name": "main",
                "image": SHELL_IMAGE,
                "command": command,
                "volumeMounts": [{"name": "csrd", "mountPath": "/run/csrd", "readOnly": true}],
            }],
            "volumes": [{"name": "csrd", "hostPath": {"path": "/run/csrd", "type": "Directory"}}],
        },
    })
}

/// A namespace with a policy that is in force, and a Service `web-api` for its pods.
async fn served(node: &RealNode, signer: &str) -> String {
    let namespace = node.cluster.namespace(&[]).await;
    node.cluster.service(&namespace, "web-api", &[("app", "web")]).await;
    create(node, policy(&namespace, signer)).await;
    kubectl(node, &["wait", "--for=condition=Accepted", "--timeout=300s", "certificatepolicy", &namespace]).await;
    namespace
}

/// Runs this in a pod; again, while another test has sent the agent or the controller away.
async fn exec(node: &RealNode, namespace: &str, pod: &str, command: &[&str]) -> Output {
    let command = [&["-n", namespace, "exec", pod, "--"], command].concat();
    let answered =
        async || Some(node.cluster.kubectl(&command).await).filter(|it| it.status.code() != Some(UNAVAILABLE));
    eventually("an answer", answered).await
}

/// What a pod has said, once it contains `wanted`, at least `times`.
async fn says(node: &RealNode, namespace: &str, pod: &str, wanted: &str, times: usize) -> String {
    let mut log = String::new();
    let look = async {
        loop {
            log = text(&node.cluster.kubectl(&["-n", namespace, "logs", pod]).await);
            if log.matches(wanted).count() >= times {
                return;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    if tokio::time::timeout(NEVER, look).await.is_err() {
        let agents =
            text(&node.cluster.kubectl(&["-n", SYSTEM, "logs", "-l", "app.kubernetes.io/component=agent"]).await);
        panic!("{pod} never says {wanted:?} {times} times, but: {log}\nthe agent says: {agents}");
    }
    log
}

/// The agent's own word comes within a moment of the policy's, and a first try may come before it.
async fn issue(node: &RealNode, namespace: &str, pod: &str, command: &[&str]) -> Value {
    let output = eventually("a certificate", async || {
        let output = exec(node, namespace, pod, command).await;
        match output.status.success() {
            true => Some(output),
            false if text(&output).contains("NO_POLICY_MATCHES") => None,
            false => panic!("{command:?}: {}", text(&output)),
        }
    })
    .await;
    serde_json::from_slice(&output.stdout).unwrap()
}

const NAME: &str = "web-api.TEST.svc";
/// Those that every signer signs.
const USAGES: [&str; 4] = ["--usage", "client-auth", "--usage", "digital-signature"];
/// The agent may hear of a policy later than the test, and whoever watches too early is refused and ends. After this a watch is
/// one process, whose end is the pod's.
fn watch(more: &str) -> String {
    let usages = USAGES.join(" ");
    format!(
        "until csrd issue {usages} -o json >/dev/null; do sleep 1; done; exec csrd watch {usages} --dir /tmp/certs -o json {more}"
    )
}

#[tokio::test]
#[ignore = "needs root and a node: tests/cluster/run"]
async fn a_pod_gets_its_services_certificate_through_a_request_that_is_gone_afterwards() {
    let node = deployed().await;
    for (signer, [home, map, key]) in signers(node) {
        let namespace = served(node, signer).await;
        node.run(workload(&namespace, "web", &["sleep", "infinity"])).await;
        let name = NAME.replace("TEST", &namespace);
        let long = format!("{name}.cluster.local");
        let asked = [&["csrd", "issue", "-o", "json", "--dns", &name, "--dns", &long], &USAGES[..]].concat();
        let path = format!("jsonpath={{.data.{key}}}");
        // Roots may be replaced just now.
        let trusted = eventually("a certificate with the roots that are published", async || {
            let issued = issue(node, &namespace, "web", &asked).await;
            let roots = kubectl(node, &["-n", home, "get", "configmap", map, "-o", &path]).await;
            (issued["trust_bundle"].as_str().unwrap().trim() == roots.trim()).then_some(issued)
        });
        let issued = trusted.await;
        assert_eq!((&issued["policy"], &issued["signer_name"]), (&namespace.clone().into(), &(*signer).into()));
        let left = eventually("no request is left", async || {
            let left = kubectl(node, &["get", "csr", "-l", "app.kubernetes.io/managed-by=csrd", "-o", "name"]).await;
            left.is_empty().then_some(())
        });
        left.await;
        let asked = [&["csrd", "issue", "--dns", "db.production.svc"], &USAGES[..]].concat();
        let refused = exec(node, &namespace, "web", &asked).await;
        assert_eq!(refused.status.code(), Some(77), "{}", text(&refused));
        assert!(text(&refused).contains("NAME_NOT_ALLOWED"), "{}", text(&refused));
    }
}

#[tokio::test]
#[ignore = "needs root and a node: tests/cluster/run"]
async fn a_subscriber_outlives_its_agent_and_ends_with_its_right() {
    let node = deployed().await;
    let mut namespaces = Vec::new();
    let watch = watch("");
    for (signer, _) in signers(node) {
        let namespace = served(node, signer).await;
        node.run(workload(&namespace, "label", &["sh", "-c", &watch])).await;
        node.run(workload(&namespace, "policy", &["sh", "-c", &watch])).await;
        namespaces.push(namespace);
    }
    let pods = || namespaces.iter().flat_map(|namespace| [(namespace, "label"), (namespace, "policy")]);
    for (namespace, pod) in pods() {
        says(node, namespace, pod, "\"event\":\"written\"", 1).await;
    }
    let agents: Api<Pod> = Api::namespaced(node.cluster.admin().await, SYSTEM);
    let of_agents = ListParams::default().labels("app.kubernetes.io/component=agent");
    for agent in agents.list(&of_agents).await.unwrap() {
        agents.delete(&agent.name_any(), &DeleteParams::default()).await.unwrap();
    }
    for (namespace, pod) in pods() {
        says(node, namespace, pod, "\"event\":\"disconnected\"", 1).await;
        says(node, namespace, pod, "\"event\":\"written\"", 2).await;
    }
    for namespace in &namespaces {
        kubectl(node, &["-n", namespace, "label", "pod", "label", "app-"]).await;
        says(node, namespace, "label", "NO_POLICY_MATCHES", 1).await;
        let other = text(&node.cluster.kubectl(&["-n", namespace, "logs", "policy"]).await);
        assert!(!other.contains("refused"), "the other pod's label is as it was: {other}");
        kubectl(node, &["delete", "certificatepolicy", namespace]).await;
        says(node, namespace, "policy", "NO_POLICY_MATCHES", 1).await;
    }
}

/// The API server takes no shorter lifetime than ten minutes, so with our own CA this waits for the better part of them.
#[tokio::test]
#[ignore = "needs root and a node: tests/cluster/run"]
async fn a_subscriber_sees_its_renewal() {
    let node = deployed().await;
    let watch = watch("--lifetime 10m");
    let mut namespaces = Vec::new();
    for (signer, _) in signers(node) {
        let namespace = served(node, signer).await;
        node.run(workload(&namespace, "web", &["sh", "-c", &watch])).await;
        says(node, &namespace, "web", "\"event\":\"written\"", 1).await;
        namespaces.push(namespace);
    }
    for namespace in &namespaces {
        says(node, namespace, "web", "\"event\":\"renewed\"", 1).await;
    }
}
