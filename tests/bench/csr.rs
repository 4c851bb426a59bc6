//! Certificates over the CSR API for the pods of one node, beside a bare Go client on the same control plane.
//!
//! Control plane, `csrd controller` and `csrd agent` are real, and RBAC, admission and limits are those of
//! `deploy/kubernetes`. There is no kubelet: a pod is an object, and its process runs in the cgroup that a kubelet would
//! give it, which takes root. What was asked of the API server is read in its audit log.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command},
    time::Duration,
};

use futures_util::{StreamExt as _, future::join_all, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use tokio::time::sleep;

use crate::{
    it::cluster::{ControlPlane, Identity, Overlay, SYSTEM, eventually},
    pod::{ISSUE, Process, SUBSCRIBE},
    process::resident_kib,
    table::{Table, percentile},
};

/// Pods of a node, as many as a kubelet runs by default.
const PODS: usize = 110;
/// Pods that start at once.
const AT_ONCE: usize = 100;
/// Certificates a second, one after another.
const PER_SECOND: u64 = 20;
/// Certificates in a row, before it is the other's turn.
const ROUND: usize = 100;
const ROUNDS: usize = 4;
/// How long nothing happens: a watch is begun anew before it is over.
const IDLE: Duration = Duration::from_secs(300);

const AGENT: &str = "system:serviceaccount:csrd-system:csrd-agent";

const POLICY: &str = "
apiVersion: csrd.dev/v1alpha1
kind: CertificatePolicy
metadata: {name: bench}
spec:
  match: {kubernetes: {namespaceSelector: {}, podSelector: {matchLabels: {app: bench}}}}
  allow: {dnsNames: ['*.bench.internal']}
";

/// An agent where `deploy/kubernetes` is applied.
struct Site {
    cluster: &'static ControlPlane,
    folder: tempfile::TempDir,
    node: String,
    namespace: String,
    agent: Child,
}

impl Site {
    async fn start() -> Option<Self> {
        let cluster = ControlPlane::shipped(Overlay::ApprovalController).await?;
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        fs::write(path("policy.yaml"), POLICY).expect("the policy");
        let applied = ["apply", "-f", &path("policy.yaml").display().to_string()].map(str::to_owned);
        let accepted = ["wait", "--for=condition=Accepted", "certificatepolicy/bench"].map(str::to_owned);
        for arguments in [applied, accepted] {
            let output = cluster.kubectl(&arguments.each_ref().map(String::as_str)).await;
            assert!(output.status.success(), "kubectl: {}", String::from_utf8_lossy(&output.stderr));
        }
        let node = cluster.node("bench").await.name_any();
        let pod = cluster.pod(SYSTEM, "bench-agent", &node, "csrd-agent", &[]).await;
        let kubeconfig = cluster.access.kubeconfig(&Identity::Token(cluster.token(&pod, &[]).await));
        let config = format!("kubernetes: {{kubeconfig: {}}}\nlog: {{level: warn}}\n", kubeconfig.display());
        fs::write(path("config.yaml"), config).expect("the configuration");
        let mut agent = Command::new(env!("CARGO_BIN_EXE_csrd"));
        agent.arg("agent").arg("--config").arg(path("config.yaml")).arg("--socket").arg(path("s"));
        let agent = agent.env_remove("NODE_NAME").spawn().expect("the agent starts");
        let namespace = cluster.namespace(&[]).await;
        eventually("the agent's socket", async || path("s").exists().then_some(())).await;
        Some(Self { cluster, folder, node, namespace, agent })
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    /// So many pods that run.
    async fn pods(&self) -> Vec<Process> {
        let made = stream::iter(0..PODS).map(async |number| {
            let labels = [("app", "bench")];
            self.cluster.pod(&self.namespace, &format!("pod-{number}"), &self.node, "default", &labels).await
        });
        let made: Vec<Pod> = made.buffer_unordered(8).collect().await;
        made.iter().map(|pod| Process::start(pod, &self.socket())).collect()
    }

    /// The median, in milliseconds, of one round of the bare Go client.
    async fn floor(&self) -> f64 {
        let mut floor = self.cluster.tool("csr-floor", &self.cluster.kubeconfig());
        let output = floor.args(["--count", &ROUND.to_string()]).output().await.expect("the Go client");
        let said = String::from_utf8_lossy(&output.stdout);
        let median = said.split(' ').next().and_then(|micros| micros.parse::<f64>().ok());
        median.unwrap_or_else(|| panic!("the Go client: {}", String::from_utf8_lossy(&output.stderr))) / 1e3
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

/// One certificate after another for one pod, and the Go client's, by turns.
async fn one_at_a_time(site: &Site, pod: &mut Process, table: &mut Table) {
    let (mut floor, mut ours) = (0.0, 0.0);
    pod.does(ISSUE).await;
    let mut writes = 0;
    for _ in 0..ROUNDS {
        floor += site.floor().await / ROUNDS as f64;
        let before = writes_so_far(site);
        let mut times = Vec::new();
        for _ in 0..ROUND {
            times.push(pod.does(ISSUE).await);
            sleep(Duration::from_millis(1000 / PER_SECOND)).await;
        }
        times.sort_by(f64::total_cmp);
        ours += percentile(&times, 50) / ROUNDS as f64;
        writes += writes_so_far(site) - before;
    }
    table.beside("certificate over the CSR API, one at a time: p50", "ms", floor, ours, "<= 1.15 x floor");
    table.alone("API writes a certificate", "", writes as f64 / (ROUNDS * ROUND) as f64, "<= 4");
}

fn writes_so_far(site: &Site) -> usize {
    let about = site.cluster.audit_log(r#""resource":"certificatesigningrequests""#);
    about.iter().filter(|event| ["create", "update", "patch", "delete"].iter().any(|it| event["verb"] == *it)).count()
}

/// Every pod asks once, so many a second, whether or not the one before has its answer.
async fn in_turn(pods: &mut [Process], table: &mut Table) {
    let asking = pods.iter_mut().zip(0..).map(async |(pod, turn)| {
        sleep(Duration::from_millis(1000 / PER_SECOND) * turn).await;
        pod.does(ISSUE).await
    });
    let mut times = join_all(asking).await;
    times.sort_by(f64::total_cmp);
    for percent in [50, 99] {
        let what = format!("a pod's first certificate at {PER_SECOND} a second: p{percent}");
        table.alone(&what, "ms", percentile(&times, percent), "< 50 ms");
    }
}

/// So many pods ask at the same moment.
async fn at_once(pods: &mut [Process], table: &mut Table) {
    let mut times = join_all(pods.iter_mut().map(|pod| pod.does(ISSUE))).await;
    times.sort_by(f64::total_cmp);
    table.alone(
        &format!("{} pods ask at once: half of them served after", pods.len()),
        "ms",
        percentile(&times, 50),
        "",
    );
    table.alone(
        &format!("{} pods ask at once: all of them served after", pods.len()),
        "ms",
        percentile(&times, 100),
        "",
    );
}

/// What a node costs whose pods all have certificates and nothing to ask.
async fn idle(site: &Site, pods: &mut [Process], table: &mut Table) {
    join_all(pods.iter_mut().map(|pod| pod.does(SUBSCRIBE))).await;
    sleep(Duration::from_secs(2)).await;
    let what = format!("agent's resident memory with {} pods that subscribe", pods.len());
    table.alone(&what, "MiB", resident_kib(site.agent.id()) / 1024.0, "");
    let before = site.cluster.audit_log(AGENT).len();
    sleep(IDLE).await;
    let requests = site.cluster.audit_log(AGENT).split_off(before);
    let (watches, others): (Vec<_>, Vec<_>) = requests.iter().partition(|it| it["verb"] == "watch");
    let an_hour = |count: usize| count as f64 * 3600.0 / IDLE.as_secs_f64();
    let what = format!("API requests an hour with {} idle pods", pods.len());
    table.alone(&format!("{what}: watches"), "", an_hour(watches.len()), "");
    table.alone(&format!("{what}: others"), "", an_hour(others.len()), "0");
}

/// All rows.
pub(crate) async fn figures(table: &mut Table) {
    let Some(site) = Site::start().await else { return };
    let mut pods = site.pods().await;
    one_at_a_time(&site, &mut pods[0], table).await;
    in_turn(&mut pods, table).await;
    at_once(&mut pods[..AT_ONCE], table).await;
    idle(&site, &mut pods, table).await;
}
