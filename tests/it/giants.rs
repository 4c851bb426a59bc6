//! Objects as large as the API server takes them, before an agent and a controller that have the memory which is shipped.
//! Needs root, for cgroups.

use std::{fs, path::Path, process};

use csrd::{
    attest::pods::MAX_SERVICES,
    kubernetes::{MAX_LABELS, MAX_POD_BYTES, MAX_SELECTOR_LABELS, MAX_SERVICE_BYTES},
};
use futures_util::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::{Map, Value, json};

use crate::{
    attest::is_root,
    cluster::{ControlPlane, Options, eventually},
    controller::{
        agent::Agent,
        deployment::{Answer, Deployment, pkcs10},
    },
};

/// More labels than fit into an object, which etcd lets have 1.5 MiB.
const TOO_MANY: usize = 127_000;
/// Objects that are made at the same time.
const AT_ONCE: usize = 16;
/// Bytes of a small object's names, UIDs and JSON, and of those of a label.
const SMALLEST_BYTES: usize = 300;
const LABEL_BYTES: usize = 13;
/// Bytes in a label's value.
const MAX_VALUE_BYTES: usize = 63;

/// A cgroup with the memory limit of what is shipped; removed when dropped.
struct Limited {
    folder: std::path::PathBuf,
    limit: u64,
}

impl Limited {
    fn new(component: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes/base").join(component);
        let shipped = fs::read_to_string(path).unwrap();
        let (_, limit) = shipped.split_once("limits: {memory: ").unwrap();
        let limit = limit.split_once("Mi}").unwrap().0.parse::<u64>().unwrap() << 20;
        let root = Path::new("/sys/fs/cgroup");
        let of_one = root.join("memory").join("memory.limit_in_bytes").exists();
        let name = format!("csrd-giants-{}-{}", process::id(), component.trim_end_matches(".yaml"));
        let folder = if of_one { root.join("memory").join(name) } else { root.join(name) };
        fs::create_dir(&folder).unwrap();
        let file = if of_one { "memory.limit_in_bytes" } else { "memory.max" };
        fs::write(folder.join(file), limit.to_string()).unwrap();
        Self { folder, limit }
    }

    fn take_in(&self, process: u32) {
        fs::write(self.folder.join("cgroup.procs"), process.to_string()).unwrap();
    }

    /// Bytes that were used at most, the caches of files included.
    fn peak(&self) -> u64 {
        let files = ["memory.max_usage_in_bytes", "memory.peak"];
        let peak = files.iter().find_map(|file| fs::read_to_string(self.folder.join(file)).ok()).unwrap();
        peak.trim().parse().unwrap()
    }

    /// Of them, how many the process itself held at most, its program's file included.
    fn resident(process: u32) -> u64 {
        let status = fs::read_to_string(format!("/proc/{process}/status")).expect("it has not been killed");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.folder);
    }
}

/// Labels that have so many bytes each beyond the shortest: first in their value, and then in their key.
fn labels(many: usize, bytes: usize) -> Value {
    let value = "x".repeat(bytes.min(MAX_VALUE_BYTES));
    let prefix = match bytes.saturating_sub(MAX_VALUE_BYTES) {
        0 => String::new(),
        more => format!("{}/", "p".repeat(more - 1)),
    };
    Value::Object((0..many).map(|n| (format!("{prefix}l{n:06}"), json!(value))).collect::<Map<_, _>>())
}

async fn make<K>(api: &Api<K>, object: &Value) -> kube::Result<K>
where
    K: Clone + serde::de::DeserializeOwned + serde::Serialize + std::fmt::Debug,
{
    api.create(&PostParams::default(), &serde_json::from_value(object.clone()).unwrap()).await
}

fn pod(deployment: &Deployment<'_>, name: &str, labels: Value) -> Value {
    json!({"metadata": {"name": name, "labels": labels}, "spec": {
        "nodeName": deployment.nodes[0], "serviceAccountName": "web",
        "containers": [{"name": "main", "image": "test.invalid/app:1"}]}})
}

fn service(name: &str, selector: Value) -> Value {
    json!({"metadata": {"name": name}, "spec": {"clusterIP": "None", "selector": selector, "ports": [{"port": 443}]}})
}

/// The most labels that the API server takes of this object.
async fn as_many_as_it_takes(client: &Client, namespace: &str, object: impl Fn(Value) -> Value) -> usize {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let mut many = TOO_MANY;
    while let Err(error) = make(&pods, &object(labels(many, 0))).await {
        assert!(many > 1000, "{error}");
        many -= many / 10;
    }
    many
}

/// Agent and controller with the shipped limits, which know of an honest pod beside what a test makes.
struct Rig<'a> {
    deployment: &'a Deployment<'a>,
    honest: Pod,
}

impl<'a> Rig<'a> {
    async fn new(deployment: &'a Deployment<'a>) -> Self {
        deployment
            .allow(
                "csrd-agent",
                json!([
                    {"apiGroups": [""], "resources": ["services"], "verbs": ["list", "watch"]},
                    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
                ]),
            )
            .await;
        deployment
            .policy(json!({"dnsNames": ["{kubernetes.service}.{kubernetes.namespace}.svc"],
            "lifetime": {"min": "10m", "default": "1h", "max": "24h"}}))
            .await;
        let (work, node) = (&deployment.work, &deployment.nodes[0]);
        let honest = deployment.cluster.pod(work, "honest", node, "web", &[("app", "honest")]).await;
        deployment.cluster.service(work, "honest", &[("app", "honest")]).await;
        Self { deployment, honest }
    }

    fn request(&self, pod: &Pod) -> Value {
        let mut request = self.deployment.request(pod);
        request["spec"]["request"] = json!(pkcs10(&format!("honest.{}.svc", self.deployment.work)));
        request
    }

    /// Starts both, lets `meanwhile` happen once they know all, and prints what they took.
    async fn run(&self, what: &str, objects: &str, meanwhile: impl AsyncFnOnce()) {
        let (for_agent, for_controller) = (Limited::new("agent.yaml"), Limited::new("controller.yaml"));
        let controller = self.deployment.controller("").await;
        for_controller.take_in(controller.id());
        let agent = Agent::start(self.deployment, &[]).await;
        for_agent.take_in(agent.id());
        eventually("the agent is ready", async || (agent.readiness().await.0 == 200).then_some(())).await;
        let asking = self.deployment.agent(0).await;
        let answer = self.deployment.ask(&asking, self.request(&self.honest)).await;
        assert!(matches!(answer, Answer::Signed { .. }), "{answer:?}: {}", controller.said());
        meanwhile().await;
        let answer = self.deployment.ask(&asking, self.request(&self.honest)).await;
        assert!(matches!(answer, Answer::Signed { .. }), "{answer:?}");
        assert_eq!(agent.readiness().await.0, 200, "it is the one that was started");
        let said =
            [agent.said(), controller.said()].map(|it| it.matches("beyond a bound, and counts as nothing").count());
        assert!(said.iter().all(|lines| *lines < 20), "{said:?} lines");
        let mib = |bytes: u64| bytes >> 20;
        for (name, limited, process) in
            [("agent", &for_agent, agent.id()), ("controller", &for_controller, controller.id())]
        {
            eprintln!(
                "| {what} | {objects} | {name} | {} | {} | {} |",
                mib(limited.peak()),
                mib(Limited::resident(process)),
                mib(limited.limit)
            );
            assert!(Limited::resident(process) < limited.limit, "{name}");
        }
    }
}

/// As large as etcd takes them. Run by
/// `cargo test --test it giants::objects -- --ignored --nocapture`
#[tokio::test]
#[ignore = "minutes, by hand as root: cargo test --test it giants::objects -- --ignored --nocapture"]
async fn objects_as_large_as_the_api_server_takes_them_fit_into_the_shipped_memory_and_starve_nobody() {
    if !is_root("objects_as_large_as_the_api_server_takes_them_fit_into_the_shipped_memory_and_starve_nobody") {
        return;
    }
    let Some(cluster) = ControlPlane::start(Options::default()).await else { return };
    let deployment = Deployment::on(&cluster).await;
    let rig = Rig::new(&deployment).await;
    let pods: Api<Pod> = Api::namespaced(deployment.admin.clone(), &deployment.work);
    let services: Api<Service> = Api::namespaced(deployment.admin.clone(), &deployment.work);
    let many = as_many_as_it_takes(&deployment.admin, &deployment.work, |it| pod(&deployment, "giant-0", it)).await;
    for n in 1..30 {
        make(&pods, &pod(&deployment, &format!("giant-{n}"), labels(many, 0))).await.unwrap();
    }
    for n in 0..20 {
        make(&services, &service(&format!("giant-{n}"), labels(many, 0))).await.unwrap();
    }
    let objects = format!("30 pods and 20 Services of {many} labels");
    rig.run("as many labels as the API server takes", &objects, async || {
        for n in 0..30 {
            let changed = Patch::Merge(json!({"metadata": {"annotations": {"changed": "yes"}}}));
            pods.patch_metadata(&format!("giant-{n}"), &PatchParams::default(), &changed).await.unwrap();
        }
        let giant = pods.get("giant-0").await.unwrap();
        match deployment.ask(&deployment.agent(0).await, rig.request(&giant)).await {
            Answer::Denied(condition) => {
                let message = condition.message.unwrap();
                assert_eq!(condition.reason.as_deref(), Some("POD_TOO_LARGE"), "{message}");
                assert!(message.contains(&format!("at most {MAX_LABELS} labels")), "{message}");
            }
            other => panic!("{other:?}"),
        }
    })
    .await;
}

/// At every bound at once. Run by
/// `cargo test --test it giants::ten_thousand -- --ignored --nocapture`
#[tokio::test]
#[ignore = "minutes, by hand as root: cargo test --test it giants::ten_thousand -- --ignored --nocapture"]
async fn ten_thousand_services_and_five_hundred_pods_at_their_bounds_fit_into_the_shipped_memory() {
    assert!(is_root("ten_thousand_services_and_five_hundred_pods_at_their_bounds_fit_into_the_shipped_memory"));
    let Some(cluster) = ControlPlane::start(Options::default()).await else { return };
    let deployment = Deployment::on(&cluster).await;
    let rig = Rig::new(&deployment).await;
    let crowd = cluster.namespace(&[]).await;
    cluster.service_account(&crowd, "web").await;
    let pods: Api<Pod> = Api::namespaced(deployment.admin.clone(), &crowd);
    let services: Api<Service> = Api::namespaced(deployment.admin.clone(), &crowd);
    let of_pod = labels(MAX_LABELS, (MAX_POD_BYTES - 2 * SMALLEST_BYTES) / MAX_LABELS - LABEL_BYTES);
    let bytes = (MAX_SERVICE_BYTES - SMALLEST_BYTES) / MAX_SELECTOR_LABELS - LABEL_BYTES;
    let of_service = labels(MAX_SELECTOR_LABELS, bytes);
    let (pods, of_pod) = (&pods, &of_pod);
    let made = stream::iter(0..500).map(|n| {
        let object = pod(&deployment, &format!("p{n}"), of_pod.clone());
        async move { make(pods, &object).await.unwrap() }
    });
    let made: Vec<_> = made.buffer_unordered(AT_ONCE).collect().await;
    assert_eq!(made.len(), 500);
    let (services, of_service) = (&services, &of_service);
    let made = stream::iter(0..MAX_SERVICES - 1).map(|n| async move {
        make(services, &service(&format!("s{n}"), of_service.clone())).await.unwrap();
    });
    assert_eq!(made.buffer_unordered(AT_ONCE).count().await, MAX_SERVICES - 1);
    rig.run("at the bounds", "500 pods and 10,000 Services", async || {
        // No policy is for that namespace: the reason shows that the pod is one, and not beyond a bound.
        match deployment.ask(&deployment.agent(0).await, rig.request(&pods.get("p0").await.unwrap())).await {
            Answer::Denied(condition) => assert_eq!(condition.reason.as_deref(), Some("NO_POLICY_MATCHES")),
            other => panic!("{other:?}"),
        }
    })
    .await;
}
