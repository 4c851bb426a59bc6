//! What workloads notice while the control plane fails: nothing but `renewal_delayed`. A pod's callers hold streams while
//! the API server is killed for a minute and comes back, while the controller that leads is killed, and while etcd is slow.
//!
//! All is real but time: an intermediate CA that ends soon makes certificates end with it, and so be renewed soon, whatever
//! lifetime the API server insists on. Not shown: a kubelet, and an outage beyond a certificate's end.

#![allow(clippy::disallowed_methods, reason = "certificates end by the real clock, and the test's tasks end with it")]

use std::{
    fs,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Child,
    time::{Instant, sleep},
};

use crate::{
    attest::is_root,
    cluster::{ControlPlane, Options, Part, eventually},
    controller::{
        agent::Agent,
        deployment::{Controller, Deployment},
    },
    pods::cgroup::Cgroup,
};

/// Certificates of the first CA live so long: their renewals, at 55 to 75 %, fall into the outage.
const FIRST_LIFE: Duration = Duration::from_secs(420);
/// After the streams have begun.
const OUTAGE_BEGINS: Duration = Duration::from_secs(225);
const OUTAGE: Duration = Duration::from_secs(60);
/// On every piece, in each direction: some requests take a second or more.
const SLOW: Duration = Duration::from_millis(400);
const PODS: usize = 8;

/// A root, and the files of an intermediate below it, whose ends can be chosen.
struct Ca {
    root: Issuer<'static, KeyPair>,
    key: KeyPair,
    folder: tempfile::TempDir,
}

impl Ca {
    fn new(ends: SystemTime) -> Self {
        let (root, key, folder) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap(), tempfile::tempdir());
        let (params, folder) = (ca("root", ends + Duration::from_secs(3600)), folder.unwrap());
        let path = |name| folder.path().join(name);
        fs::write(path("root.pem"), params.self_signed(&root).unwrap().pem()).unwrap();
        fs::write(path("key.pem"), key.serialize_pem()).unwrap();
        fs::set_permissions(path("key.pem"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let ca = Self { root: Issuer::new(params, root), key, folder };
        ca.ends(ends);
        ca
    }

    /// Replaces the intermediate by one that ends then.
    fn ends(&self, at: SystemTime) {
        let certificate = ca("intermediate", at).signed_by(&self.key, &self.root).unwrap();
        fs::write(self.path("next.pem"), certificate.pem()).unwrap();
        fs::rename(self.path("next.pem"), self.path("ca.pem")).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn config(&self) -> Value {
        json!({"caCertificate": self.path("ca.pem"), "caKey": self.path("key.pem"), "chain": self.path("root.pem")})
    }
}

fn ca(name: &str, ends: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    (params.not_before, params.not_after) = ((SystemTime::now() - Duration::from_secs(60)).into(), ends.into());
    params
}

/// Prints what happens, with the seconds since the beginning.
#[derive(Clone, Copy)]
struct Timeline(Instant);

impl Timeline {
    fn say(self, what: impl std::fmt::Display) {
        eprintln!("{:6.1} s  {what}", self.0.elapsed().as_secs_f32());
    }
}

/// A `csrd watch` in a pod, and each event it has told of.
struct Stream {
    pod: Pod,
    process: Child,
    events: Arc<Mutex<Vec<(Timestamp, Value)>>>,
    _cgroup: Cgroup,
}

impl Stream {
    /// Without names: what policy offers first.
    fn open(agent: &Agent, pod: Pod, timeline: Timeline) -> Self {
        let (cgroup, name) = (Cgroup::of(&pod), pod.name_any());
        let mut command = agent.command(&cgroup, &["watch", "--dir", &name, "-o", "json"]);
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let events = Arc::new(Mutex::new(Vec::new()));
        let seen = events.clone();
        tokio::spawn(async move {
            while let Some(line) = lines.next_line().await.unwrap() {
                let event: Value = serde_json::from_str(&line).unwrap();
                let what = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
                match event["event"].as_str().unwrap() {
                    "written" => continue,
                    "current" | "renewed" => timeline.say(format_args!(
                        "{name:12}  {:15}  {}, ends {}",
                        what("event"),
                        &what("serial_number")[..8],
                        what("not_after")
                    )),
                    _ => timeline.say(format_args!("{name:12}  {:15}  {}", what("event"), what("reason"))),
                }
                seen.lock().unwrap().push((Timestamp::now(), event));
            }
        });
        Self { pod, process, events, _cgroup: cgroup }
    }

    /// The certificates so far and when they came, the newest last.
    fn certificates(&self) -> Vec<(Timestamp, Value)> {
        let events = self.events.lock().unwrap();
        events.iter().filter(|(_, event)| event["serial_number"].is_string()).cloned().collect()
    }

    fn serial(&self) -> String {
        let (_, newest) = self.certificates().pop().expect("it has one");
        newest["serial_number"].as_str().unwrap().to_owned()
    }

    fn was_delayed(&self) -> bool {
        self.events.lock().unwrap().iter().any(|(_, event)| event["event"] == "renewal_delayed")
    }

    /// Checks that it was told of nothing but certificates and delays, and had a valid certificate all the time.
    fn check(&mut self) {
        assert!(self.process.try_wait().unwrap().is_none(), "it watches on");
        for (_, event) in &*self.events.lock().unwrap() {
            let reason = event["reason"].as_str().unwrap_or_default();
            match event["event"].as_str().unwrap() {
                "current" | "renewed" => {}
                // Controllers come back some time after the API server.
                "renewal_delayed" if reason.starts_with("API_") || reason == "APPROVAL_PENDING" => {}
                // Agent and controller learn of a change of policy by watches of their own.
                "renewal_delayed" if reason == "APPROVAL_DENIED" => {}
                _ => panic!("{event}"),
            }
        }
        for next in self.certificates().windows(2) {
            let [(_, before), (came, after)] = next else { unreachable!("windows of two") };
            assert_ne!(before["serial_number"], after["serial_number"]);
            let ended: Timestamp = before["not_after"].as_str().unwrap().parse().unwrap();
            assert!(*came < ended, "renewed at {came}, after {before}");
        }
    }
}

/// What is under test, and those that look at it.
struct Scene<'a> {
    deployment: &'a Deployment<'a>,
    agent: Agent,
    streams: Vec<Stream>,
    timeline: Timeline,
}

impl Scene<'_> {
    /// Every stream has one certificate more than `before`.
    async fn all_renew(&self, before: &[usize]) {
        eventually("every certificate is renewed", async || {
            let renewed = |(stream, before): (&Stream, &usize)| stream.certificates().len() > *before;
            self.streams.iter().zip(before).all(renewed).then_some(())
        })
        .await;
        self.timeline.say("each has a new certificate");
    }

    fn counts(&self) -> Vec<usize> {
        self.streams.iter().map(|stream| stream.certificates().len()).collect()
    }

    /// Whoever asks is told who it is, and a second follower of a certificate gets the same one at once.
    async fn all_are_served(&self) {
        for stream in &self.streams {
            let who = self.agent.run(&stream.pod, &["whoami", "-o", "json"]).await;
            let who: Value = serde_json::from_slice(&who.stdout).unwrap();
            assert_eq!(who["facts"]["kubernetes.podUid"], stream.pod.uid().unwrap());
            let before = stream.serial();
            let warm = self.agent.run(&stream.pod, &["watch", "--once", "--dir", "warm", "-o", "json"]).await;
            let said = String::from_utf8(warm.stdout).unwrap();
            assert!(warm.status.success() && (said.contains(&before) || said.contains(&stream.serial())), "{said}");
        }
        self.timeline.say(format_args!("whoami and a second stream answer in each of the {PODS} pods"));
    }

    /// A certificate that nobody has yet: why there is none, or nothing.
    async fn issue(&self) -> Option<String> {
        let output = self.agent.run(&self.streams[0].pod, &["issue", "-o", "pem"]).await;
        let said = String::from_utf8(output.stderr).unwrap().trim().to_owned();
        let refused = (!output.status.success()).then_some(said);
        self.timeline.say(format_args!("a new certificate: {}", refused.as_deref().unwrap_or("issued")));
        refused
    }

    /// What `/readyz` says, once it has these words.
    async fn readiness(&self, words: &str) -> u16 {
        let (status, said) = eventually(words, async || {
            let answer = self.agent.readiness().await;
            answer.1.contains(words).then_some(answer)
        })
        .await;
        self.timeline.say(format_args!("/readyz: {status}, {}", said.trim().replace('\n', ", ")));
        status
    }

    /// Changes what is offered, so that every certificate in use is replaced.
    async fn offer(&self, name: &str) {
        let Deployment { work, signer, .. } = self.deployment;
        let spec = json!({
            "match": {"kubernetes": {"namespaces": [work]}},
            "signer": signer,
            "allow": {"lifetime": {"default": "1h"}},
            "offer": [{"dnsNames": [name]}],
        });
        self.deployment.write_policy(work, spec).await;
        self.timeline.say(format_args!("policy offers {name}"));
    }
}

#[tokio::test]
async fn valid_certificates_stay_served_and_are_renewed_after_each_outage() {
    if !is_root("valid_certificates_stay_served_and_are_renewed_after_each_outage") {
        return;
    }
    let options = Options { slow_etcd: true, ..Options::default() };
    let Some(cluster) = ControlPlane::start(options).await else { return };
    let mut deployment = Deployment::on(&cluster).await;
    let mut pods = Vec::new();
    for _ in 0..PODS {
        pods.push(deployment.workload(0).await);
    }
    let agent = Agent::start(&deployment, &[]).await;
    let timeline = Timeline(Instant::now());
    let ca = Ca::new(SystemTime::now() + FIRST_LIFE);
    deployment.ca = ca.config();
    let mut scene = Scene { deployment: &deployment, agent, streams: Vec::new(), timeline };
    scene.offer("one.example.org").await;
    assert_eq!(scene.readiness("there are no roots yet").await, 503);
    let controllers = [deployment.controller("").await, deployment.controller("").await];
    assert_eq!(scene.readiness("[+] signers").await, 200);

    scene.streams = pods.into_iter().map(|pod| Stream::open(&scene.agent, pod, timeline)).collect();
    scene.all_renew(&[0; PODS]).await;
    sleep(OUTAGE_BEGINS).await;
    api_server_is_away(&scene, &cluster, &ca).await;
    let heir = leader_is_killed(&scene, controllers).await;
    etcd_is_slow(&scene, &cluster).await;

    scene.streams.iter_mut().for_each(Stream::check);
    eventually("the heir still leads", async || heir.leads().then_some(())).await;
}

async fn api_server_is_away(scene: &Scene<'_>, cluster: &ControlPlane, ca: &Ca) {
    let (timeline, before) = (scene.timeline, scene.counts());
    cluster.kill(Part::ApiServer);
    timeline.say("the API server is killed");
    let until = Instant::now() + OUTAGE;
    ca.ends(SystemTime::now() + Duration::from_secs(3600));
    let refused = scene.issue().await.expect("nobody can sign now");
    assert!(refused.contains("(API_UNREACHABLE)"), "{refused}");
    while Instant::now() < until {
        scene.all_are_served().await;
        assert_eq!(scene.agent.readiness().await.0, 200, "what is valid is served");
        sleep(Duration::from_secs(10).min(until - Instant::now())).await;
    }
    timeline.say("the API server is started again");
    cluster.restart(Part::ApiServer).await;
    timeline.say("the API server is ready");
    scene.all_renew(&before).await;
    scene.all_are_served().await;
    assert_eq!(scene.issue().await, None);
    assert!(scene.streams.iter().any(Stream::was_delayed), "renewals were due in the outage");
}

/// Returns who leads afterwards.
async fn leader_is_killed(scene: &Scene<'_>, [first, second]: [Controller; 2]) -> Controller {
    let before = scene.counts();
    eventually("one of the controllers leads", async || (first.leads() != second.leads()).then_some(())).await;
    let (leader, heir) = if first.leads() { (first, second) } else { (second, first) };
    leader.kill();
    scene.timeline.say("the leading controller is killed");
    scene.offer("two.example.org").await;
    scene.all_renew(&before).await;
    scene.all_are_served().await;
    heir
}

async fn etcd_is_slow(scene: &Scene<'_>, cluster: &ControlPlane) {
    let before = scene.counts();
    cluster.etcd_link().delay(SLOW);
    scene.timeline.say(format_args!("etcd is slow: {SLOW:?} each way"));
    scene.offer("three.example.org").await;
    // Agent and controller may know different policies for a moment.
    let denied = |said: &String| said.contains("(APPROVAL_DENIED)");
    let issued =
        eventually("an answer", async || Some(scene.issue().await).filter(|it| !it.as_ref().is_some_and(denied)));
    assert_eq!(issued.await, None);
    scene.all_renew(&before).await;
    scene.all_are_served().await;
    cluster.etcd_link().delay(Duration::ZERO);
}
