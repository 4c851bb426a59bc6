//! The process of a pod: put into the cgroup that a kubelet would give it, and told over its standard input when to ask.

use std::{path::Path, process::Stdio, time::Instant};

use csrd::proto::v1::{
    IssueCertificateRequest, SubscribeRequest, certificate_service_client::CertificateServiceClient,
};
use k8s_openapi::api::core::v1::Pod;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};
use tonic::{Status, transport::Endpoint};

use crate::{it::pods::cgroup::Cgroup, process::ask};

/// Makes this binary the process of a pod.
pub(crate) const ARGUMENT: &str = "--as-a-pod";

/// Ask for a certificate, on a connection of its own, as a process does that has just begun.
pub(crate) const ISSUE: &str = "issue";
/// Subscribe to one, and stay.
pub(crate) const SUBSCRIBE: &str = "subscribe";

/// A process that runs in a pod's cgroup.
pub(crate) struct Process {
    _child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    _cgroup: Cgroup,
}

impl Process {
    /// Starts it for this pod.
    pub(crate) fn start(pod: &Pod, socket: &Path) -> Self {
        let cgroup = Cgroup::of(pod);
        let mut command = Command::from(cgroup.command(&[]));
        command.arg(std::env::current_exe().expect("this binary")).arg(ARGUMENT).arg(socket);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a process, as root");
        let (input, output) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        Self { _child: child, input, output: BufReader::new(output).lines(), _cgroup: cgroup }
    }

    /// How many milliseconds it takes to do this.
    pub(crate) async fn does(&mut self, order: &str) -> f64 {
        self.input.write_all(format!("{order}\n").as_bytes()).await.expect("the process lives");
        let said = self.output.next_line().await.expect("it answers").expect("it answers");
        said.parse().unwrap_or_else(|_| panic!("no certificate: {said}"))
    }
}

/// Does as it is told until nothing more comes.
pub(crate) fn act(socket: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut orders = BufReader::new(tokio::io::stdin()).lines();
        let mut open = Vec::new();
        while let Ok(Some(order)) = orders.next_line().await {
            let began = Instant::now();
            let done = match order.as_str() {
                SUBSCRIBE => subscribe(socket).await.map(|stream| open.push(stream)),
                _ => issue(socket).await,
            };
            match done {
                Ok(()) => println!("{}", began.elapsed().as_secs_f64() * 1e3),
                Err(status) => println!("{status}"),
            }
        }
    });
}

async fn client(socket: &str) -> Result<CertificateServiceClient<tonic::transport::Channel>, Status> {
    let endpoint = Endpoint::from_shared(format!("unix://{socket}")).expect("a unix address");
    let channel = endpoint.connect().await.map_err(|error| Status::unavailable(error.to_string()))?;
    Ok(CertificateServiceClient::new(channel))
}

async fn issue(socket: &str) -> Result<(), Status> {
    let request = IssueCertificateRequest { request: Some(ask("pod")) };
    let mut answers = client(socket).await?.issue_certificate(request).await?.into_inner();
    while answers.message().await?.is_some() {}
    Ok(())
}

async fn subscribe(socket: &str) -> Result<impl Sized, Status> {
    let mut client = client(socket).await?;
    let request = SubscribeRequest { request: Some(ask("pod")), ..Default::default() };
    let mut answers = client.subscribe(request).await?.into_inner();
    answers.message().await?;
    Ok((client, answers))
}
