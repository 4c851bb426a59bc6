//! Processes in cgroups as the kubelet makes them, at an agent's real socket. Needs root.

use std::{
    num::NonZeroU32,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use csrd::{
    account::Limits,
    agent::{self, Cluster},
    attest::{PodFacts, Pods, Tokens},
    clock::Clock,
    metrics::Metrics,
    policy::{EMBEDDED, PolicySet, Source},
    proto::v1::{
        SubscribeRequest, WhoAmIRequest, certificate_service_client::CertificateServiceClient,
        subscribe_response::Event,
    },
    rate::Rate,
    server::admin::Readiness,
    signer::embedded::{DEFAULT_CA_LIFETIME, Embedded},
};
use http::Method;
use k8s_openapi::api::core::v1::Pod;
use kube::{Client, Config, ResourceExt as _};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status, transport::Endpoint};
use tonic_types::StatusExt as _;

use super::{
    AUDIENCE, Followed, PATIENCE, Scope,
    cgroup::{Cgroup, container_of, path as cgroup_of},
    relabel,
};
use crate::{
    agent::ask,
    attest::is_root,
    cluster::{ControlPlane, Fault, FaultProxy, eventually, unique},
};

const POLICY: &str = "apiVersion: csrd.dev/v1alpha1
kind: CertificatePolicy
metadata: {name: web}
spec:
  match: {kubernetes: {namespaces: [NAMESPACE], podSelector: {matchLabels: {app: web}}}}
  allow: {dnsNames: ['*.example.org']}
";

/// Connections of one pod.
const CONNECTIONS: usize = 8;
/// UIDs of the agent's own pod and of one beside it, for an agent that no API server tells anything.
const OWN: &str = "00000000-0000-0000-0000-00000000000a";
const BESIDE: &str = "00000000-0000-0000-0000-00000000000b";

/// An agent on a node of the cluster, in this process.
struct Node {
    cluster: &'static ControlPlane,
    name: String,
    namespace: String,
    followed: Followed,
    folder: tempfile::TempDir,
    stop: CancellationToken,
    running: JoinSet<()>,
}

impl Node {
    /// None without root, or without a cluster.
    async fn start(test: &str) -> Option<Self> {
        let cluster = ControlPlane::shared().await?;
        if !is_root(test) {
            return None;
        }
        let (namespace, name) = (cluster.namespace(&[]).await, cluster.node("n").await.name_any());
        let (client, stop) = (cluster.admin().await, CancellationToken::new());
        let followed = Followed::new(client.clone(), Scope::Node(name.clone()));
        let folder = tempfile::tempdir().unwrap();
        let tokens = Tokens::new(client, AUDIENCE.to_owned(), name.clone());
        let on = Cluster {
            node: name.clone(),
            own_pod: None,
            policies_synced: watch::channel(true).1,
            pods: followed.pods.clone(),
            tokens,
        };
        let socket = folder.path().join("s");
        let mut running = JoinSet::new();
        running.spawn(serve(socket.clone(), on, POLICY.replace("NAMESPACE", &namespace), stop.clone()));
        until_served(&socket).await;
        Some(Self { cluster, name, namespace, followed, folder, stop, running })
    }

    async fn pod(&self, name: &str) -> Pod {
        self.cluster.pod(&self.namespace, name, &self.name, "default", &[("app", "web")]).await
    }

    fn caller(&self, cgroup: &str) -> Caller {
        Caller::start(&self.folder.path().join("s"), cgroup)
    }

    /// A caller in the pod's only container.
    fn caller_in(&self, pod: &Pod) -> Caller {
        self.caller(&cgroup_of(&pod.uid().unwrap(), &container_of(pod)))
    }

    async fn end(mut self) {
        self.stop.cancel();
        timeout(PATIENCE, self.running.join_next()).await.unwrap().unwrap().unwrap();
    }
}

/// Serves as an agent on the node of `cluster`, with a CA of its own.
async fn serve(socket: PathBuf, cluster: Cluster, policy: String, stop: CancellationToken) {
    let (clock, metrics) = (Clock::system(), Metrics::new());
    let source = Source { origin: "test".into(), text: policy };
    let policies = watch::channel(Arc::new(PolicySet::parse(&[source], EMBEDDED).unwrap())).1;
    let signer = Embedded::ephemeral(DEFAULT_CA_LIFETIME, &clock, metrics.signer(EMBEDDED)).unwrap();
    let rate = Rate { per_second: NonZeroU32::MAX, burst: NonZeroU32::MAX };
    let bound = agent::build(agent::Parts {
        socket,
        admin: None,
        clock,
        policies,
        cluster: Some(cluster),
        signers: vec![Arc::new(signer)],
        signer_rate: rate,
        principal_rate: rate,
        limits: Limits { connections_per_principal: CONNECTIONS, ..Limits::default() },
        seed: 1,
        metrics,
        readiness: Readiness::new(),
        background: Vec::new(),
        stop,
    });
    bound.await.unwrap().run().await.unwrap();
}

async fn until_served(socket: &Path) {
    let served = async {
        while tokio::net::UnixStream::connect(socket).await.is_err() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, served).await.expect("the agent serves");
}

/// The cgroup of a service that is no pod, of one test alone.
fn of_the_host() -> String {
    format!("csrd-test.slice/{}.service", unique("web"))
}

fn new_container() -> String {
    (0..32).map(|_| format!("{:02x}", rand::random::<u8>())).collect()
}

/// A process in a cgroup, which calls as it is told; see [`act`].
struct Caller {
    process: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    _cgroup: Cgroup,
}

impl Caller {
    fn start(socket: &Path, cgroup: &str) -> Self {
        Self::run(socket, cgroup, &[], "pods::caller::act")
    }

    /// Runs a test of this file as a process in `cgroup`, by `through`, which takes another command as its arguments.
    fn run(socket: &Path, cgroup: &str, through: &[&str], test: &str) -> Self {
        let cgroup = Cgroup::make(cgroup);
        let mut command = Command::from(cgroup.command(through));
        command.arg(std::env::current_exe().unwrap()).args(["--exact", test, "--ignored", "--nocapture"]);
        command.env("CSRD_TEST_SOCKET", socket).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut process = command.spawn().unwrap();
        let (input, output) = (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()));
        Self { process, input, output: output.lines(), _cgroup: cgroup }
    }

    /// What comes of calling `WhoAmI`: the pod's UID or the user's number, or the reason of a refusal.
    async fn who(&mut self, token: &str) -> String {
        eventually("an answer", async || {
            self.say(&format!("who {token}")).await;
            // An API server under load may take too long for a review; a client comes back.
            Some(self.next().await).filter(|said| said != "TOKEN_NOT_REVIEWED")
        })
        .await
    }

    async fn say(&mut self, order: &str) {
        self.input.write_all(format!("{order}\n").as_bytes()).await.unwrap();
    }

    /// The next thing that the process has to say.
    async fn next(&mut self) -> String {
        let said = async {
            loop {
                let Some(line) = self.output.next_line().await.unwrap() else { return "nothing more".to_owned() };
                if let Some((_, said)) = line.split_once("said:") {
                    return said.trim().to_owned();
                }
            }
        };
        timeout(PATIENCE, said).await.expect("the caller says something")
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let _ = self.process.start_kill();
        // Its cgroup can be removed once it has gone.
        while matches!(self.process.try_wait(), Ok(None)) {
            std::thread::yield_now();
        }
    }
}

/// The caller's own process: calls by each line of its input.
#[tokio::test]
#[ignore = "run by other tests, as a process of its own"]
async fn act() {
    let socket = socket();
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
    let Ok(channel) = endpoint.connect().await else { return };
    let mut client = CertificateServiceClient::new(channel);
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (order, rest) = line.split_once(' ').unwrap();
        match order {
            "who" => {
                let mut request = Request::new(WhoAmIRequest {});
                if !rest.is_empty() {
                    request.metadata_mut().insert("authorization", format!("Bearer {rest}").parse().unwrap());
                }
                let answer = client.who_am_i(request).await;
                let answer = answer.map(|answer| {
                    let facts = answer.into_inner().facts;
                    facts.get("kubernetes.podUid").or(facts.get("unix.uid")).cloned().unwrap_or_default()
                });
                println!("said: {}", answer.unwrap_or_else(|status| reason(&status)));
            }
            "follow" => {
                let request = SubscribeRequest { request: Some(ask(rest)), ..SubscribeRequest::default() };
                let mut events = match client.subscribe(request).await {
                    Ok(events) => events.into_inner(),
                    Err(status) => {
                        println!("said: {}", reason(&status));
                        continue;
                    }
                };
                loop {
                    let said = match events.message().await {
                        Ok(Some(answer)) => match answer.event.unwrap() {
                            Event::Current(_) => "certificate".to_owned(),
                            Event::Denied(denied) => format!("denied {}", denied.reason),
                            other => format!("{other:?}"),
                        },
                        Ok(None) => break,
                        Err(status) => {
                            println!("said: ended {}", reason(&status));
                            break;
                        }
                    };
                    println!("said: {said}");
                }
            }
            _ => panic!("{line}"),
        }
    }
}

/// The agent's own process, for [`an_agent_in_a_container_tells_the_pods_beside_it`].
#[tokio::test]
#[ignore = "run by another test, as a process of its own"]
async fn serve_in_namespace() {
    let pods = Pods::new(Scope::Cluster, Clock::system());
    let pod = |uid: &str| PodFacts {
        namespace: "shop".to_owned(),
        name: "web".to_owned(),
        uid: uid.to_owned(),
        service_account: "default".to_owned(),
        node: "n".to_owned(),
        labels: Default::default(),
        namespace_labels: Default::default(),
        ips: Vec::new(),
        services: Default::default(),
    };
    pods.list_for_test(vec![pod(BESIDE), pod(OWN)]);
    let nowhere = Client::try_from(Config::new("http://127.0.0.1:1".parse().unwrap())).unwrap();
    let tokens = Tokens::new(nowhere, AUDIENCE.to_owned(), "n".to_owned());
    let cluster = Cluster {
        node: "n".to_owned(),
        own_pod: Some(OWN.to_owned()),
        policies_synced: watch::channel(true).1,
        pods,
        tokens,
    };
    serve(socket(), cluster, POLICY.replace("NAMESPACE", "shop"), CancellationToken::new()).await;
}

#[allow(clippy::disallowed_methods, reason = "a test's own variable")]
fn socket() -> PathBuf {
    std::env::var_os("CSRD_TEST_SOCKET").unwrap().into()
}

fn reason(status: &Status) -> String {
    status.get_details_error_info().map_or_else(|| format!("{status:?}"), |info| info.reason)
}

#[tokio::test]
async fn a_process_in_a_pods_cgroup_is_that_pod_and_nothing_else() {
    let test = "a_process_in_a_pods_cgroup_is_that_pod_and_nothing_else";
    let Some(node) = Node::start(test).await else { return };
    let (web, other) = (node.pod("web").await, node.pod("other").await);
    for pod in [&web, &other] {
        node.followed.until_pod(pod, "its container is known", |pod| !pod.ips.is_empty()).await;
    }
    let uid = web.uid().unwrap();
    assert_eq!(node.caller_in(&web).who("").await, uid);
    let below = format!("{}/sub/{}", cgroup_of(&uid, &container_of(&web)), cgroup_of(&other.uid().unwrap(), "x"));
    assert_eq!(node.caller(&below).who("").await, uid, "whatever it makes below its own");
    assert_eq!(node.caller(&cgroup_of(&uid, &new_container())).who("").await, uid, "its status comes late");
    assert_eq!(node.caller(&cgroup_of(&uid, &container_of(&other))).who("").await, "POD_CONTRADICTED");
    assert_eq!(node.caller(&format!("kubepods/pod{uid}")).who("").await, "POD_CGROUP_UNCLEAR");
    let elsewhere = format!("csrd-test.slice/user.service/{}", cgroup_of(&uid, &container_of(&web)));
    assert_eq!(node.caller(&elsewhere).who("").await, "POD_CGROUP_UNCLEAR");
    assert_eq!(node.caller(&of_the_host()).who("").await, "0", "a process of the host");
    node.end().await;
}

#[tokio::test]
async fn bounds_are_counted_for_each_pod_and_not_for_the_user_that_all_run_as() {
    let test = "bounds_are_counted_for_each_pod_and_not_for_the_user_that_all_run_as";
    let Some(node) = Node::start(test).await else { return };
    let (web, other) = (node.pod("web").await, node.pod("other").await);
    node.followed.workload(&web).await;
    node.followed.workload(&other).await;
    let mut callers = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut caller = node.caller_in(&web);
        assert_eq!(caller.who("").await, web.uid().unwrap());
        callers.push(caller);
    }
    assert_ne!(node.caller_in(&web).who("").await, web.uid().unwrap(), "one past the bound");
    assert_eq!(node.caller_in(&other).who("").await, other.uid().unwrap());
    assert_eq!(node.caller(&of_the_host()).who("").await, "0");
    node.end().await;
}

#[tokio::test]
async fn kernel_and_token_must_name_the_same_pod() {
    let Some(node) = Node::start("kernel_and_token_must_name_the_same_pod").await else { return };
    let (web, other) = (node.pod("web").await, node.pod("other").await);
    node.followed.workload(&web).await;
    node.followed.workload(&other).await;
    let (own, foreign) = (node.cluster.token(&web, &[AUDIENCE]).await, node.cluster.token(&other, &[AUDIENCE]).await);
    let mut caller = node.caller_in(&web);
    assert_eq!(caller.who(&own).await, web.uid().unwrap());
    assert_eq!(caller.who(&foreign).await, "TOKEN_OF_OTHER_POD");
    assert_eq!(caller.who("a b").await, "TOKEN_MALFORMED");
    assert_eq!(caller.who("").await, web.uid().unwrap(), "one call's token is that call's");
    assert_eq!(node.caller(&of_the_host()).who(&own).await, "TOKEN_OUTSIDE_POD");
    node.end().await;
}

#[tokio::test]
async fn a_pod_that_is_not_known_yet_is_waited_for() {
    let Some(node) = Node::start("a_pod_that_is_not_known_yet_is_waited_for").await else { return };
    let unknown = "11111111-2222-3333-4444-555555555555";
    assert_eq!(node.caller(&cgroup_of(unknown, &new_container())).who("").await, "POD_UNKNOWN");
    let web = node.pod("web").await;
    let mut caller = node.caller_in(&web);
    assert_eq!(caller.who("").await, web.uid().unwrap(), "it may be the first to tell");
    node.cluster.delete_pod(&web).await;
    node.followed.until_gone(&web).await;
    assert_eq!(caller.who("").await, "POD_UNKNOWN", "what was proven a moment ago does not hold for a deleted pod");
    assert_eq!(node.caller_in(&web).who("").await, "POD_UNKNOWN");
    node.end().await;
}

#[tokio::test]
async fn a_stream_ends_when_its_pod_loses_its_label_or_is_deleted() {
    let Some(node) = Node::start("a_stream_ends_when_its_pod_loses_its_label_or_is_deleted").await else { return };
    let (relabelled, deleted) = (node.pod("relabelled").await, node.pod("deleted").await);
    node.followed.workload(&relabelled).await;
    node.followed.workload(&deleted).await;
    let mut callers = [&relabelled, &deleted].map(|pod| node.caller_in(pod));
    for caller in &mut callers {
        caller.say("follow a.example.org").await;
        assert_eq!(caller.next().await, "certificate");
    }
    relabel(node.cluster, &relabelled, serde_json::json!({"track": "canary"})).await;
    node.followed.until_pod(&relabelled, "it has another label", |pod| pod.labels.contains_key("track")).await;
    relabel(node.cluster, &relabelled, serde_json::json!({"app": null})).await;
    assert_eq!(callers[0].next().await, "denied NO_POLICY_MATCHES", "and nothing for the label that did not matter");
    assert_eq!(callers[0].next().await, "ended NO_POLICY_MATCHES");
    node.cluster.delete_pod(&deleted).await;
    assert_eq!(callers[1].next().await, "denied POD_GONE");
    assert_eq!(callers[1].next().await, "ended POD_GONE");
    node.end().await;
}

#[tokio::test]
async fn an_agent_in_a_container_tells_the_pods_beside_it() {
    if !is_root("an_agent_in_a_container_tells_the_pods_beside_it") {
        return;
    }
    let (folder, own) = (tempfile::tempdir().unwrap(), cgroup_of(OWN, &new_container()));
    let socket = folder.path().join("s");
    // Its cgroup namespace begins where it is: it sees no path from the host's root.
    let _agent = Caller::run(&socket, &own, &["unshare", "--cgroup"], "pods::caller::serve_in_namespace");
    until_served(&socket).await;
    let container = new_container();
    for (cgroup, expected) in [
        (cgroup_of(BESIDE, &container), BESIDE),
        (format!("kubepods/pod{BESIDE}/{container}"), BESIDE),
        (format!("kubepods/burstable/pod{BESIDE}/{container}/{}", cgroup_of(OWN, &container)), BESIDE),
        (own.clone(), OWN),
        (format!("{own}/{}", cgroup_of(BESIDE, &container)), OWN),
        (cgroup_of(OWN, &container), OWN),
        (format!("csrd-test.slice/user.service/pod{BESIDE}/{container}"), "POD_CGROUP_UNCLEAR"),
        (format!("csrd-test.slice/user.service/burstable/pod{BESIDE}/{container}"), "POD_CGROUP_UNCLEAR"),
        (of_the_host(), "0"),
    ] {
        assert_eq!(Caller::start(&socket, &cgroup).who("").await, expected, "{cgroup}");
    }
}

#[tokio::test]
async fn nobody_is_denied_for_services_that_have_only_not_been_listed_yet() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    if !is_root("nobody_is_denied_for_services_that_have_only_not_been_listed_yet") {
        return;
    }
    let (namespace, node) = (cluster.namespace(&[]).await, cluster.node("n").await.name_any());
    let web = cluster.pod(&namespace, "web", &node, "default", &[("app", "web")]).await;
    cluster.service(&namespace, "proven", &[("app", "web")]).await;
    let proxy = FaultProxy::start(cluster, &cluster.admin_identity()).await;
    proxy.fail(Method::GET, "/api/v1/services", 1, Fault::Delay(Duration::from_secs(2)));
    let client = proxy.access.client(&cluster.admin_identity()).await;
    let pods = Pods::new(Scope::Node(node.clone()), Clock::system());
    let mut running = JoinSet::new();
    running.spawn(pods.clone().run(client.clone(), CancellationToken::new()));
    let folder = tempfile::tempdir().unwrap();
    let (socket, tokens) = (folder.path().join("s"), Tokens::new(client, AUDIENCE.to_owned(), node.clone()));
    let policies_synced = watch::channel(true).1;
    let on = Cluster { node, own_pod: None, policies_synced, pods, tokens };
    let policy = POLICY.replace("NAMESPACE", &namespace).replace("*.example.org", "{kubernetes.service}.example.org");
    running.spawn(serve(socket.clone(), on, policy, CancellationToken::new()));
    until_served(&socket).await;
    let mut caller = Caller::start(&socket, &cgroup_of(&web.uid().unwrap(), &new_container()));
    let answer = loop {
        caller.say("follow proven.example.org").await;
        match caller.next().await {
            // On a slow machine the wait may end before the list is there; a client comes back.
            said if said == "POD_UNKNOWN" => continue,
            said => break said,
        }
    };
    assert_eq!(answer, "certificate");
}
