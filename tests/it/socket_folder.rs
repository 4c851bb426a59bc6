//! The folder of the agent's socket in pods: admission, as it is shipped, refuses whoever could write to it.

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::cluster::{ControlPlane, Overlay, SYSTEM, eventually};

const REFUSED: &str = "hostPath /run/csrd and what is in it must be mounted with readOnly true";

/// With a volume of the host, mounted once as it has to be and, in a list of containers, once as `mount` says.
fn pod(path: &str, containers: &str, mount: Value) -> Value {
    let container = |name: &str, read_only: Value| {
        let mount = json!({"name": "host", "mountPath": "/host", "readOnly": read_only});
        json!({"name": name, "image": "test.invalid/app:1", "volumeMounts": [mount]})
    };
    let mut spec = json!({
        "containers": [container("main", true.into())],
        "volumes": [{"name": "host", "hostPath": {"path": path}}],
    });
    let mut list = spec[containers].as_array().cloned().unwrap_or_default();
    list.push(container(&containers.to_lowercase(), mount));
    spec[containers] = list.into();
    json!({"metadata": {"name": "mounts"}, "spec": spec})
}

#[tokio::test]
async fn a_pod_mounts_it_read_only_or_not_at_all() {
    let Some(cluster) = ControlPlane::shipped(Overlay::ApprovalController).await else { return };
    let (admin, namespace) = (cluster.admin().await, cluster.namespace(&[]).await);
    let pods = |namespace: &str| Api::<Pod>::namespaced(admin.clone(), namespace);
    let create = async |namespace: &str, dry_run: bool, pod: Value| {
        let parameters = PostParams { dry_run, ..PostParams::default() };
        let created = pods(namespace).create(&parameters, &serde_json::from_value(pod).unwrap()).await;
        created.map(drop).map_err(|error| error.to_string())
    };
    let tried = |path: &str, mount: Value| create(&namespace, true, pod(path, "containers", mount));
    eventually("the policy is in force", async || tried("/run/csrd", false.into()).await.err()).await;
    for path in
        ["/run/csrd", "/run/csrd/", "/run//./csrd", "/run/csrd/csrd.sock", "/var/run/csrd", "/proc/1/root/run/csrd"]
    {
        for mount in [false.into(), Value::Null] {
            let said = tried(path, mount).await.expect_err(path);
            assert!(said.contains(REFUSED), "{path}: {said}");
        }
        tried(path, true.into()).await.expect(path);
    }
    for path in ["/run/csrd-other", "/run/other/csrd", "/var/lib/csrd", "/run", "/"] {
        tried(path, false.into()).await.expect(path);
    }
    let below = |path: &str, key: &str, sub_path: &str| {
        let mut pod = pod(path, "containers", false.into());
        pod["spec"]["containers"][1]["volumeMounts"][0][key] = sub_path.into();
        create(&namespace, true, pod)
    };
    for (path, sub_path) in
        [("/run", "csrd"), ("/", "run/./csrd"), ("/proc/1/root/run", "csrd/x"), ("/var", "run/csrd")]
    {
        let said = below(path, "subPath", sub_path).await.expect_err(path);
        assert!(said.contains(REFUSED), "{path}: {said}");
        below(path, "subPath", "other").await.expect(path);
        let said = below(path, "subPathExpr", "$(NAME)").await.expect_err(path);
        assert!(said.contains("a subPathExpr that may become /run/csrd"), "{path}: {said}");
    }
    below("/srv", "subPathExpr", "$(NAME)").await.unwrap();
    let said = create(&namespace, true, pod("/run/csrd", "initContainers", Value::Null)).await.unwrap_err();
    assert!(said.contains(REFUSED), "{said}");
    create(SYSTEM, true, pod("/run/csrd", "containers", false.into())).await.expect("the agent's");

    create(&namespace, false, pod("/run/csrd", "containers", true.into())).await.unwrap();
    let added = pod("/run/csrd", "ephemeralContainers", Value::Null);
    let added = Patch::Strategic(json!({"spec": {"ephemeralContainers": added["spec"]["ephemeralContainers"]}}));
    let added = pods(&namespace).patch_ephemeral_containers("mounts", &PatchParams::default(), &added).await;
    let said = added.unwrap_err().to_string();
    assert!(said.contains(REFUSED), "{said}");
}
