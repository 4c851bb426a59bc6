//! An agent that does what its script says, for tests of the client and the commands.
//!
//! It runs on a thread and a runtime of its own, so that stopping it breaks every connection at once, as the death of a
//! real one does. It records what it was asked.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    thread,
};

use csrd::proto::v1::{
    self, Certificate, IssueCertificateRequest, IssueCertificateResponse, ListCredentialsRequest,
    ListCredentialsResponse, SubscribeRequest, SubscribeResponse, WatchTrustBundleRequest, WatchTrustBundleResponse,
    WhoAmIRequest, WhoAmIResponse,
    certificate_service_server::{CertificateService, CertificateServiceServer},
    status_service_server::{StatusService, StatusServiceServer},
    subscribe_response::Event,
};
use futures_util::{
    Stream, StreamExt as _,
    stream::{self, BoxStream},
};
use tempfile::TempDir;
use tokio::sync::{broadcast, oneshot};
use tokio_stream::wrappers::{BroadcastStream, UnixListenerStream};
use tonic::{Code, Request, Response, Status, transport::Server};
use tonic_types::{ErrorDetails, StatusExt as _};

/// What one Subscribe call is answered with. After the last item the stream stays open and carries what is pushed.
pub(crate) type Script = Vec<Result<SubscribeResponse, Status>>;

/// Events that may be pushed before a stream has read them.
const PUSHED_AHEAD: usize = 1024;

/// A folder in which commands of ours are run, with an agent's socket in it.
pub(crate) struct Place {
    dir: TempDir,
    pub(crate) agent: FakeAgent,
}

impl Place {
    /// `script` answers the first Subscribe.
    pub(crate) fn new(script: Script) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let agent = FakeAgent::start(&dir.path().join("s"), [script]);
        Self { dir, agent }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_csrd"));
        command.args(arguments).env("CSRD_SOCKET", self.path("s")).current_dir(self.dir.path());
        command
    }
}

#[derive(Default)]
struct Scripts {
    subscribe: VecDeque<Script>,
    issue: VecDeque<Vec<Result<IssueCertificateResponse, Status>>>,
    subscribed: Vec<SubscribeRequest>,
    issued: Vec<IssueCertificateRequest>,
    traceparents: Vec<Option<String>>,
}

#[derive(Clone)]
struct Service {
    scripts: Arc<Mutex<Scripts>>,
    pushed: broadcast::Sender<SubscribeResponse>,
}

pub(crate) struct FakeAgent {
    service: Service,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl FakeAgent {
    /// Listens on `socket`; each Subscribe call takes the next of `scripts`, and an empty one when there is none left.
    pub(crate) fn start(socket: &Path, scripts: impl Into<VecDeque<Script>>) -> Self {
        let scripts = Scripts { subscribe: scripts.into(), ..Scripts::default() };
        let service = Service { scripts: Arc::new(Mutex::new(scripts)), pushed: broadcast::Sender::new(PUSHED_AHEAD) };
        let (stop, stopped) = oneshot::channel();
        let (bound, listening) = std::sync::mpsc::sync_channel(1);
        let (socket, served) = (socket.to_owned(), service.clone());
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(serve(socket, served, bound, stopped));
        });
        listening.recv().expect("it listens");
        Self { service, stop: Some(stop), thread: Some(thread) }
    }

    /// The answer to the next IssueCertificate.
    pub(crate) fn will_issue(&self, script: Vec<Result<IssueCertificateResponse, Status>>) {
        self.service.scripts.lock().unwrap().issue.push_back(script);
    }

    /// Sends `event` on every open stream.
    pub(crate) fn push(&self, event: SubscribeResponse) {
        self.service.pushed.send(event).expect("somebody is subscribed");
    }

    /// Every Subscribe so far.
    pub(crate) fn subscribed(&self) -> Vec<SubscribeRequest> {
        self.service.scripts.lock().unwrap().subscribed.clone()
    }

    /// The `traceparent` of every IssueCertificate so far.
    pub(crate) fn traceparents(&self) -> Vec<Option<String>> {
        self.service.scripts.lock().unwrap().traceparents.clone()
    }

    /// Every IssueCertificate so far.
    pub(crate) fn issued(&self) -> Vec<IssueCertificateRequest> {
        self.service.scripts.lock().unwrap().issued.clone()
    }
}

/// Stops as if it were killed: no stream is ended, connections just close, the socket file stays.
impl Drop for FakeAgent {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.thread.take().map(thread::JoinHandle::join);
    }
}

async fn serve(
    socket: PathBuf,
    service: Service,
    bound: std::sync::mpsc::SyncSender<()>,
    stopped: oneshot::Receiver<()>,
) {
    let _ = std::fs::remove_file(&socket);
    let listener = tokio::net::UnixListener::bind(socket).unwrap();
    bound.send(()).unwrap();
    let server = Server::builder()
        .add_service(CertificateServiceServer::new(service.clone()))
        .add_service(StatusServiceServer::new(service))
        .serve_with_incoming(UnixListenerStream::new(listener));
    tokio::select! {
        served = server => served.unwrap(),
        _ = stopped => {}
    }
}

/// A certificate whose chain, key and roots say `tag`.
pub(crate) fn certificate(id: &str, sequence: u64, tag: &str) -> Certificate {
    let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
    Certificate {
        certificate_id: id.into(),
        sequence,
        certificate_chain: format!("chain {tag}\n").into(),
        private_key: format!("key {tag}\n").into(),
        trust_bundle: format!("roots {tag}\n").into(),
        serial_number: "0a".into(),
        not_before: at(0),
        not_after: at(3600),
        renew_at: at(2000),
        policy: "web".into(),
        signer_name: "embedded".into(),
    }
}

/// The full current state.
pub(crate) fn current(id: &str, sequence: u64, tag: &str) -> SubscribeResponse {
    event(sequence, Event::Current(v1::Current { certificate: Some(certificate(id, sequence, tag)) }))
}

/// A renewal.
pub(crate) fn renewed(id: &str, sequence: u64, tag: &str) -> SubscribeResponse {
    event(sequence, Event::Renewed(v1::Renewed { certificate: Some(certificate(id, sequence, tag)) }))
}

pub(crate) fn event(sequence: u64, event: Event) -> SubscribeResponse {
    SubscribeResponse { sequence, event: Some(event) }
}

/// A status as the agent sends it.
pub(crate) fn status(code: Code, reason: &str, message: &str) -> Status {
    Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, "csrd.dev", []))
}

#[tonic::async_trait]
impl CertificateService for Service {
    type IssueCertificateStream = BoxStream<'static, Result<IssueCertificateResponse, Status>>;
    type SubscribeStream = BoxStream<'static, Result<SubscribeResponse, Status>>;
    type WatchTrustBundleStream = BoxStream<'static, Result<WatchTrustBundleResponse, Status>>;

    async fn who_am_i(&self, _: Request<WhoAmIRequest>) -> Result<Response<WhoAmIResponse>, Status> {
        let facts = [("unix.uid".to_owned(), "1000".to_owned())].into();
        Ok(Response::new(WhoAmIResponse { facts, policies: vec![] }))
    }

    async fn issue_certificate(
        &self,
        request: Request<IssueCertificateRequest>,
    ) -> Result<Response<Self::IssueCertificateStream>, Status> {
        let mut scripts = self.scripts.lock().unwrap();
        let traceparent = request.metadata().get("traceparent").map(|value| value.to_str().unwrap().to_owned());
        scripts.traceparents.push(traceparent);
        scripts.issued.push(request.into_inner());
        Ok(Response::new(stream::iter(scripts.issue.pop_front().unwrap_or_default()).boxed()))
    }

    async fn subscribe(&self, request: Request<SubscribeRequest>) -> Result<Response<Self::SubscribeStream>, Status> {
        let mut scripts = self.scripts.lock().unwrap();
        scripts.subscribed.push(request.into_inner());
        let script = scripts.subscribe.pop_front().unwrap_or_default();
        Ok(Response::new(stream::iter(script).chain(self.pushed()).boxed()))
    }

    async fn watch_trust_bundle(
        &self,
        _: Request<WatchTrustBundleRequest>,
    ) -> Result<Response<Self::WatchTrustBundleStream>, Status> {
        Err(Status::unimplemented("no client uses it"))
    }
}

#[tonic::async_trait]
impl StatusService for Service {
    async fn list_credentials(
        &self,
        _: Request<ListCredentialsRequest>,
    ) -> Result<Response<ListCredentialsResponse>, Status> {
        Err(status(Code::PermissionDenied, "NOT_YOURS", "only root may list"))
    }
}

impl Service {
    fn pushed(&self) -> impl Stream<Item = Result<SubscribeResponse, Status>> + use<> {
        BroadcastStream::new(self.pushed.subscribe()).map(|event| event.map_err(|_| Status::internal("read faster")))
    }
}
