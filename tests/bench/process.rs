//! Servers as processes of their own: started, measured from outside, killed when dropped.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use csrd::proto::v1::{self, certificate_service_client::CertificateServiceClient};
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

use crate::{floor, table::Table};

/// What every workload of the benchmark may have.
const POLICY: &str = "
apiVersion: csrd.dev/v1alpha1
kind: CertificatePolicy
metadata: {name: bench}
spec:
  match: {unix: {uids: [UID]}}
  allow:
    dnsNames: ['*.bench.internal']
    lifetime: {min: 2s, default: 1h, max: 24h}
";

/// A server under measurement.
pub(crate) struct Server {
    child: Child,
    folder: TempDir,
}

impl Server {
    /// The agent, with rates that do not stand in the way.
    pub(crate) async fn agent() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let uid = rustix::process::geteuid().as_raw().to_string();
        fs::write(folder.path().join("policy.yaml"), POLICY.replace("UID", &uid)).expect("the policy");
        let rate = "{perSecond: 1000000, burst: 1000000}";
        let config = format!("limits: {{all: {rate}, perWorkload: {rate}}}\nlog: {{level: warn}}\n");
        fs::write(folder.path().join("config.yaml"), config).expect("the configuration");
        let server = Self::agent_in(folder);
        server.answers().await;
        server
    }

    fn agent_in(folder: TempDir) -> Self {
        let path = |name: &str| folder.path().join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_csrd"));
        command.arg("agent").arg("--config").arg(path("config.yaml"));
        command.arg("--socket").arg(path("s")).arg("--state-dir").arg(path("state"));
        command.arg("--policy").arg(path("policy.yaml"));
        let child = command.stdout(Stdio::null()).spawn().expect("the agent starts");
        Self { child, folder }
    }

    /// The floor.
    pub(crate) async fn floor() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let this = std::env::current_exe().expect("this binary");
        let child = Command::new(this).arg(floor::ARGUMENT).arg(folder.path().join("s")).spawn().expect("the floor");
        let server = Self { child, folder };
        server.answers().await;
        server
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    /// A client on a connection of its own.
    pub(crate) async fn client(&self) -> CertificateServiceClient<Channel> {
        self.try_client().await.expect("the server is up")
    }

    async fn try_client(&self) -> Result<CertificateServiceClient<Channel>, tonic::transport::Error> {
        let address = format!("unix://{}", self.socket().display());
        let channel = Endpoint::from_shared(address).expect("a unix address").connect().await?;
        Ok(CertificateServiceClient::new(channel))
    }

    /// Waits for the first certificate on the socket.
    async fn answers(&self) {
        loop {
            if let Ok(mut client) = self.try_client().await
                && subscribe(&mut client, ask("first")).await.is_ok()
            {
                return;
            }
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
    }

    /// CPU time of all its threads so far.
    pub(crate) fn cpu(&self) -> Duration {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("the server lives");
        let nanoseconds = tasks.filter_map(|task| {
            let schedstat = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
            schedstat.split(' ').next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(nanoseconds.sum())
    }

    /// Resident memory in KiB.
    pub(crate) fn resident_kib(&self) -> f64 {
        resident_kib(self.child.id())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Resident memory of a process in KiB.
pub(crate) fn resident_kib(process: u32) -> f64 {
    memory_kib(process, "VmRSS:")
}

fn memory_kib(process: u32, field: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("the process lives");
    let line = status.lines().find(|line| line.starts_with(field)).expect("a size");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}

/// A request for `name`.bench.internal.
pub(crate) fn ask(name: &str) -> v1::CertificateRequest {
    v1::CertificateRequest { dns_names: vec![format!("{name}.bench.internal")], ..Default::default() }
}

/// The first answer of a subscription, which is then given up.
pub(crate) async fn subscribe(
    client: &mut CertificateServiceClient<Channel>,
    request: v1::CertificateRequest,
) -> Result<v1::SubscribeResponse, tonic::Status> {
    let request = v1::SubscribeRequest { request: Some(request), ..Default::default() };
    let mut answers = client.subscribe(request).await?.into_inner();
    answers.message().await?.ok_or_else(|| tonic::Status::unavailable("no answer"))
}

/// From the start of the process to the first certificate, with the CA on disk.
pub(crate) async fn start(table: &mut Table) {
    const STARTS: usize = 11;
    let mut server = Server::agent().await;
    let mut times = Vec::new();
    for _ in 0..STARTS {
        let _ = server.child.kill();
        let _ = server.child.wait();
        let folder = std::mem::replace(&mut server.folder, tempfile::tempdir().expect("a folder"));
        let began = Instant::now();
        server = Server::agent_in(folder);
        server.answers().await;
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    table.alone("process start to first certificate, CA on disk", "ms", times[STARTS / 2], "< 100 ms");
    // Idle memory, once what the start allocated has been given back.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let floor = Server::floor().await;
    for (what, field, budget) in
        [("resident memory, idle", "VmRSS:", "<= 15 MB"), ("of that not the program's file", "RssAnon:", "")]
    {
        let of = |server: &Server| memory_kib(server.child.id(), field) / 1024.0;
        table.beside(what, "MiB", of(&floor), of(&server), budget);
    }
}

/// Size of the stripped binary.
pub(crate) fn binary(table: &mut Table) {
    let bytes = fs::metadata(env!("CARGO_BIN_EXE_csrd")).expect("the binary").len();
    table.alone("binary, stripped", "MB", bytes as f64 / 1e6, "< 25 MB");
}
