//! A real Kubernetes control plane for tests: etcd, API server and controller manager as processes of their own, from one
//! Go binary that is built on first use. Needs Go and no root. `CSRD_TEST_CLUSTER=off` leaves these tests out, and each
//! says so; `CSRD_TEST_KUBERNETES=1.35` runs them against an older release than the newest.
//!
//! A test begins with
//!
//! ```ignore
//! let Some(cluster) = ControlPlane::shared().await else { return };
//! ```
//!
//! and gets the one that the whole test binary shares, or with [`ControlPlane::start`] one of its own (3 to 5 seconds),
//! to kill it, to slow it down or to give it flags.
//!
//! What a test has to know:
//!
//! - Tests run side by side on the shared control plane. Whatever has a name gets one from [`unique`], and nothing is
//!   counted or watched cluster-wide without a selector. What is cluster-scoped stays until the end of the run; a
//!   policy or a webhook that would meet other tests' requests needs a control plane of its own.
//! - A [`kube::Client`] belongs to the runtime it is made on, and every test has its own runtime: make one per test.
//! - No kubelet runs. A Node is an object, a Pod bound to one is Running because [`ControlPlane::run`] wrote that into its
//!   status, a deleted pod would stay forever (hence [`ControlPlane::delete_pod`], which grants no grace), and nobody
//!   renews a Lease (hence no node lifecycle controller, which would declare every node lost after a minute).
//! - The built-in signers run without their usual limit of 20 requests a second. They sign nothing for less than 10
//!   minutes but with `--cluster-signing-duration`, which caps lifetimes below the API's own minimum.
//! - A token that [`ControlPlane::token`] binds to a pod carries the names and UIDs of pod and node, as one that the
//!   kubelet projects. It is good as long as the pod is there.
//! - [`FaultProxy`] stands before the API server and fails as it is told; [`ControlPlane::kill`] and
//!   [`ControlPlane::restart`] are for the real thing. [`Options::slow_etcd`] puts a link before etcd that can be slow.
//! - Tests that need a kubelet and containers use [`RealNode`]: see `cluster/node.rs`. Those of what is shipped, by RBAC and
//!   admission as they are in `deploy/kubernetes`, use [`ControlPlane::shipped`].
//! - Everything ends with the test binary, however that ends: see `cluster/processes.rs`. [`ControlPlane::log`] has what a
//!   component wrote.

#![allow(clippy::disallowed_methods, reason = "servers of tests are owned by runtimes of their own")]
#![allow(dead_code, reason = "what tests of the cluster can use, whether or not one does yet")]

mod access;
mod binary;
#[cfg(test)]
mod facts;
mod fault_proxy;
mod node;
mod objects;
mod pki;
mod processes;
mod server;
mod shipped;
mod slow_link;

use std::{
    io::Write as _,
    net::{Ipv4Addr, SocketAddrV4},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use kube::Client;
use tokio::{
    sync::OnceCell,
    time::{sleep, timeout},
};

pub(crate) use self::{
    access::{Access, Identity},
    fault_proxy::{Fault, FaultProxy},
    node::{CSRD_IMAGE, RealNode, SHELL_IMAGE},
    shipped::{CONTROLLER, Overlay, SYSTEM},
};
use self::{
    pki::{Leaf, Pki},
    processes::Processes,
    slow_link::SlowLink,
};

/// Set to `off`, it leaves the tests out that need a control plane.
const SWITCH: &str = "CSRD_TEST_CLUSTER";

/// An older Kubernetes to test with, as `1.35`; `tests/cluster/build` knows which there are.
const MINOR: &str = "CSRD_TEST_KUBERNETES";

/// Far above what a start takes, for a machine under load.
const PATIENCE: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(25);

const ETCD_PORT: u16 = 2379;
const ETCD_PEER_PORT: u16 = 2380;
const SLOW_ETCD_PORT: u16 = 12379;
const API_PORT: u16 = 6443;
const CONTROLLERS_PORT: u16 = 10257;
const SCHEDULER_PORT: u16 = 10259;

/// What a control plane of a test's own is to be like.
#[derive(Default)]
pub(crate) struct Options {
    /// Flags that come after ours, and so win.
    pub(crate) apiserver: Vec<String>,
    pub(crate) controllers: Vec<String>,
    /// Whether a scheduler runs.
    pub(crate) scheduler: bool,
    /// Whether [`ControlPlane::etcd_link`] is there.
    pub(crate) slow_etcd: bool,
    /// Whether nodes are watched, and lost when they fall silent.
    pub(crate) node_lifecycle: bool,
    /// Where the API server listens, if not on the control plane's own loopback address.
    pub(crate) api: Option<SocketAddrV4>,
}

/// A process of the control plane.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Etcd,
    ApiServer,
    Controllers,
    Scheduler,
}

impl Part {
    /// The role of the binary.
    fn role(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::ApiServer => "kube-apiserver",
            Self::Controllers => "kube-controller-manager",
            Self::Scheduler => "kube-scheduler",
        }
    }
}

/// A running control plane, stopped when dropped.
pub(crate) struct ControlPlane {
    pub(crate) binary: PathBuf,
    options: Options,
    /// On the loopback interface, of this control plane alone.
    address: Ipv4Addr,
    api: SocketAddrV4,
    processes: Processes,
    pki: Pki,
    /// The straight way to the API server.
    pub(crate) access: Access,
    etcd_link: Option<SlowLink>,
}

impl ControlPlane {
    /// The one that all tests share; none if they are to be left out.
    pub(crate) async fn shared() -> Option<&'static Self> {
        static SHARED: OnceCell<Result<ControlPlane, String>> = OnceCell::const_new();
        if left_out() {
            return None;
        }
        let shared = SHARED.get_or_init(|| Self::try_start(Options::default())).await;
        Some(shared.as_ref().unwrap_or_else(|error| panic!("{error}")))
    }

    /// One of the test's own; none if such tests are to be left out.
    pub(crate) async fn start(options: Options) -> Option<Self> {
        if left_out() {
            return None;
        }
        Some(Self::try_start(options).await.unwrap_or_else(|error| panic!("{error}")))
    }

    async fn try_start(options: Options) -> Result<Self, String> {
        let binary = tokio::task::spawn_blocking(binary::kube).await.expect("a build returns")?;
        // Every control plane has an address of its own on the loopback interface, so that its ports are free and stay
        // so while a part is down.
        let [a, b, c] = [rand::random_range(1..=254), rand::random(), rand::random_range(1..=254)];
        let address = Ipv4Addr::new(127, a, b, c);
        let processes = Processes::new();
        let api = options.api.unwrap_or(SocketAddrV4::new(address, API_PORT));
        let pki = Pki::write(&processes.folder().join("pki"), *api.ip());
        let access = Access {
            url: format!("https://{api}"),
            ca_certificate: pki.ca_certificate(),
            folder: processes.folder().to_owned(),
        };
        let etcd_link = match options.slow_etcd {
            true => Some(SlowLink::start(address, SLOW_ETCD_PORT, ETCD_PORT).await),
            false => None,
        };
        let plane = Self { binary, options, address, api, processes, pki, access, etcd_link };
        plane.write_kubeconfig("admin", &plane.admin_identity());
        for part in [Part::Controllers, Part::Scheduler] {
            plane.write_kubeconfig(part.role(), &plane.user(&format!("system:{}", part.role()), None));
        }
        plane.spawn(Part::Etcd);
        plane.spawn(Part::ApiServer);
        plane.ready().await?;
        plane.spawn(Part::Controllers);
        if plane.options.scheduler {
            plane.spawn(Part::Scheduler);
        }
        plane.default_account("default").await;
        Ok(plane)
    }

    /// Returns when the API server says that it is ready, the built-in roles included.
    async fn ready(&self) -> Result<(), String> {
        let client = self.admin().await;
        let ready = async {
            loop {
                let request = http::Request::get("/readyz").body(vec![]).expect("a request");
                if client.request_text(request).await.is_ok() {
                    return Ok(());
                }
                if let Some(name) = self.processes.ended() {
                    let log = self.processes.log(name);
                    let end: Vec<&str> = log.lines().rev().take(5).collect();
                    return Err(format!("{name} ended at its start, saying: {}", end.join("\n")));
                }
                sleep(POLL).await;
            }
        };
        timeout(PATIENCE, ready).await.unwrap_or_else(|_| Err("the API server is not ready".into()))
    }

    /// Ends a part as a crash would.
    pub(crate) fn kill(&self, part: Part) {
        self.processes.kill(part.role());
    }

    /// Starts a part that was killed, and waits until the API server is ready.
    pub(crate) async fn restart(&self, part: Part) {
        self.spawn(part);
        self.ready().await.unwrap();
    }

    fn spawn(&self, part: Part) {
        let mut command = Command::new(&self.binary);
        command.arg(part.role()).args(match part {
            Part::Etcd => self.etcd(),
            Part::ApiServer => self.apiserver(),
            Part::Controllers => self.controllers(),
            Part::Scheduler => self.kubeconfig_flags(Part::Scheduler, SCHEDULER_PORT),
        });
        self.processes.start(part.role(), command);
    }

    fn etcd(&self) -> Vec<String> {
        let url = |port| format!("http://{}:{port}", self.address);
        vec!["etcd".into(), url(ETCD_PORT), url(ETCD_PEER_PORT)]
    }

    fn apiserver(&self) -> Vec<String> {
        let (address, etcd) = (self.address, if self.etcd_link.is_some() { SLOW_ETCD_PORT } else { ETCD_PORT });
        let mut flags = vec![
            format!("--etcd-servers=http://{address}:{etcd}"),
            format!("--bind-address={}", self.api.ip()),
            format!("--advertise-address={}", self.api.ip()),
            format!("--secure-port={}", self.api.port()),
        ];
        flags.extend(
            [
                "--tls-cert-file=pki/apiserver.crt",
                "--tls-private-key-file=pki/apiserver.key",
                "--client-ca-file=pki/ca.crt",
                "--kubelet-client-certificate=pki/kubelet-client.crt",
                "--kubelet-client-key=pki/kubelet-client.key",
                "--kubelet-certificate-authority=pki/ca.crt",
                "--kubelet-preferred-address-types=InternalIP",
                "--service-account-key-file=pki/tokens.pub",
                "--service-account-signing-key-file=pki/tokens.key",
                "--service-account-issuer=https://kubernetes.default.svc",
                "--service-cluster-ip-range=10.96.0.0/16",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--endpoint-reconciler-type=none",
                "--allow-privileged=true",
            ]
            .map(String::from),
        );
        flags.extend(self.options.apiserver.iter().cloned());
        flags
    }

    fn controllers(&self) -> Vec<String> {
        let mut flags = self.kubeconfig_flags(Part::Controllers, CONTROLLERS_PORT);
        flags.extend(
            [
                "--use-service-account-credentials=true",
                "--cluster-signing-cert-file=pki/ca.crt",
                "--cluster-signing-key-file=pki/ca.key",
                "--root-ca-file=pki/ca.crt",
                "--service-account-private-key-file=pki/tokens.key",
                "--kube-api-qps=2000",
                "--kube-api-burst=4000",
            ]
            .map(String::from),
        );
        if !self.options.node_lifecycle {
            flags.push("--controllers=*,-node-lifecycle-controller".into());
        }
        flags.extend(self.options.controllers.iter().cloned());
        flags
    }

    fn kubeconfig_flags(&self, part: Part, port: u16) -> Vec<String> {
        let file = self.kubeconfig_path(part.role()).display().to_string();
        vec![
            format!("--kubeconfig={file}"),
            format!("--authentication-kubeconfig={file}"),
            format!("--authorization-kubeconfig={file}"),
            format!("--bind-address={}", self.address),
            format!("--secure-port={port}"),
            "--leader-elect=false".into(),
        ]
    }

    fn kubeconfig_path(&self, name: &str) -> PathBuf {
        self.processes.folder().join(name).with_extension("kubeconfig")
    }

    fn write_kubeconfig(&self, name: &str, identity: &Identity) {
        self.access.write_kubeconfig(identity, &self.kubeconfig_path(name));
    }

    /// Who may do everything.
    pub(crate) fn admin_identity(&self) -> Identity {
        self.user("admin", Some("system:masters"))
    }

    pub(crate) async fn admin(&self) -> Client {
        self.access.client(&self.admin_identity()).await
    }

    /// A user by client certificate: a person, or a node as `system:node:NAME` in `system:nodes`.
    pub(crate) fn user(&self, name: &str, group: Option<&str>) -> Identity {
        Identity::Certificate(self.pki.client(name, group))
    }

    /// For servers that clients are to take for the API server.
    fn server_certificate(&self) -> Leaf {
        self.pki.server(self.address)
    }

    /// The admin's kubeconfig.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.kubeconfig_path("admin")
    }

    /// Runs kubectl as the admin.
    pub(crate) async fn kubectl(&self, arguments: &[&str]) -> Output {
        self.kubectl_as(&self.kubeconfig(), arguments).await
    }

    pub(crate) async fn kubectl_as(&self, kubeconfig: &Path, arguments: &[&str]) -> Output {
        let mut command = self.tool("kubectl", kubeconfig);
        command.arg("--cache-dir").arg(self.processes.folder().join("kubectl")).args(arguments);
        command.output().await.unwrap()
    }

    /// A client that the Go binary also is.
    pub(crate) fn tool(&self, role: &str, kubeconfig: &Path) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(&self.binary);
        command.arg(role).arg("--kubeconfig").arg(kubeconfig);
        command
    }

    /// Whether the API server serves this resource, as one of an older minor may not; if it does not, says so, since part
    /// of the test is left out then.
    pub(crate) async fn serves(&self, api_version: &str, resource: &str) -> bool {
        let group = self.admin().await.list_api_group_resources(api_version).await.unwrap();
        let served = group.resources.iter().any(|it| it.name == resource);
        if !served {
            say(&format!("no {resource} of {api_version} to test with: {}", test()));
        }
        served
    }

    /// The link before etcd, with [`Options::slow_etcd`].
    pub(crate) fn etcd_link(&self) -> &SlowLink {
        self.etcd_link.as_ref().expect("Options::slow_etcd")
    }

    /// All that a part has written.
    pub(crate) fn log(&self, part: Part) -> String {
        self.processes.log(part.role())
    }
}

/// A name that no other test has: `name`, a number, and letters of this run.
pub(crate) fn unique(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{name}-{}-{:04x}", NEXT.fetch_add(1, Ordering::Relaxed), std::process::id() & 0xffff)
}

/// What `look` finds, looked for until it is there.
///
/// # Panics
///
/// If it is not there after [`PATIENCE`]: `what` should have happened.
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            sleep(POLL).await;
        }
    };
    timeout(PATIENCE, found).await.unwrap_or_else(|_| panic!("never seen: {what}"))
}

/// Whether the tests with a control plane are left out; says so, with the name of the test.
fn left_out() -> bool {
    let left_out = variable(SWITCH).is_some_and(|value| value == "off");
    if left_out {
        say(&format!("left out by {SWITCH}=off: {}", test()));
    }
    left_out
}

fn test() -> String {
    std::thread::current().name().unwrap_or("a test").to_owned()
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// On the real stderr: the test harness keeps what a passing test prints to itself.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
