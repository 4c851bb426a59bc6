//! The client of the agent's socket, as `csrd issue`, `watch`, `whoami`, `status` and `demo` use it.
//!
//! Every answer is checked before it becomes a value of ours, every failure becomes a [`ClientError`] with the agent's
//! own reason, and text from the agent is made safe for a terminal here, because some of it (another workload's paths)
//! is foreign to both ends. A channel connects when it is first used and again when it was lost; only [`Subscription`]
//! retries a call. Deliberately not here: the environment and flags, which are the command line's.

mod certificate;
pub mod output;
pub mod sink;
mod subscription;

use std::{error::Error as _, io, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::sleep};
use tonic::{
    Request, Status, Streaming,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt as _;
use tracing::Instrument as _;

pub use self::{
    certificate::Certificate,
    subscription::{Event, Subscription},
};
use crate::{
    proto::{
        ERROR_DOMAIN, WHY_NOT,
        v1::{self, certificate_service_client::CertificateServiceClient, status_service_client::StatusServiceClient},
    },
    socket::SocketPath,
    telemetry,
    text::printable,
};

pub use tonic::Code;

/// How often a connection is tried while the agent has more to accept than the kernel lines up.
const CONNECT_TRIES: u32 = 100;
/// The time between two of them.
const CONNECT_PAUSE: Duration = Duration::from_millis(20);

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message} ({reason})")]
pub struct ClientError {
    /// The gRPC code; [`Code::Unavailable`] also when nobody answered.
    pub code: Code,
    /// The agent's `ErrorInfo.reason`, or one of [`ClientError::UNREACHABLE`], [`ClientError::BAD_ANSWER`] and
    /// [`ClientError::UNSPECIFIED`].
    pub reason: String,
    /// One sentence for people.
    pub message: String,
}

impl ClientError {
    /// No agent answers on the socket, or the connection broke.
    pub const UNREACHABLE: &str = "AGENT_UNREACHABLE";
    /// The agent's answer breaks its contract.
    pub const BAD_ANSWER: &str = "BAD_ANSWER";
    /// The answer carries no reason: whatever listens on the socket is no agent.
    pub const UNSPECIFIED: &str = "UNSPECIFIED";

    /// Whether the same call may succeed later: everything but a refusal of what was asked or of who asks.
    pub fn is_transient(&self) -> bool {
        !matches!(
            self.code,
            Code::PermissionDenied
                | Code::InvalidArgument
                | Code::Unauthenticated
                | Code::Unimplemented
                | Code::NotFound
                | Code::OutOfRange
        )
    }

    fn bad_answer(message: &str) -> Self {
        Self { code: Code::Internal, reason: Self::BAD_ANSWER.into(), message: format!("the agent's answer {message}") }
    }
}

/// What an agent or a controller says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It can issue.
    Serving,
    /// It cannot, for this reason; safe for a terminal.
    NotServing(String),
}

/// Connects to the agent. While more wait for it than the kernel lines up, a socket that does not block is told EAGAIN
/// (unix(7)), and the connection is tried again.
async fn connect(socket: SocketPath) -> io::Result<TokioIo<UnixStream>> {
    let mut tries = 0;
    loop {
        tries += 1;
        match UnixStream::connect(socket.as_path()).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && tries < CONNECT_TRIES => {
                sleep(CONNECT_PAUSE).await;
            }
            done => return done.map(TokioIo::new),
        }
    }
}

/// A connection to the agent, made when it is first used.
#[derive(Clone, Debug)]
pub struct Client {
    socket: SocketPath,
    channel: Channel,
}

impl Client {
    /// A client of the agent at `socket`. Must be called within a tokio runtime.
    pub fn new(socket: SocketPath) -> Self {
        let path = socket.clone();
        let connector = tower::service_fn(move |_| connect(path.clone()));
        // The authority that tonic gives a unix socket itself.
        let endpoint = Endpoint::from_static("http://tonic");
        Self { channel: endpoint.connect_with_connector_lazy(connector), socket }
    }

    /// How the agent sees this process.
    pub async fn who_am_i(&self) -> Result<v1::WhoAmIResponse, ClientError> {
        traced("/csrd.v1.CertificateService/WhoAmI", async {
            let answer = self.certificates().who_am_i(request(v1::WhoAmIRequest {})).await;
            Ok(answer.map_err(|status| self.failed(status))?.into_inner())
        })
        .await
    }

    /// Whether the process at the other end can do its work, as it says itself by grpc.health.v1. That it does not answer
    /// within `deadline` is [`ClientError::UNREACHABLE`].
    pub async fn health(&self, deadline: Duration) -> Result<Health, ClientError> {
        let asked = async {
            let answer = HealthClient::new(self.channel.clone()).check(HealthCheckRequest::default()).await;
            answer.map_err(|status| self.failed(status))
        };
        let answer = tokio::time::timeout(deadline, asked).await.map_err(|_| ClientError {
            code: Code::Unavailable,
            reason: ClientError::UNREACHABLE.into(),
            message: format!("{} does not answer within {} s", self.socket, deadline.as_secs()),
        })??;
        if answer.get_ref().status() == ServingStatus::Serving {
            return Ok(Health::Serving);
        }
        let why = answer.metadata().get_bin(WHY_NOT).and_then(|why| why.to_bytes().ok());
        Ok(Health::NotServing(why.map_or_else(|| "unknown".into(), |why| printable(&String::from_utf8_lossy(&why)))))
    }

    /// The live credentials that this process may see, soonest expiry first.
    pub async fn credentials(&self) -> Result<Vec<v1::CredentialStatus>, ClientError> {
        traced("/csrd.v1.StatusService/ListCredentials", async {
            let mut service = StatusServiceClient::new(self.channel.clone());
            let answer = service.list_credentials(request(v1::ListCredentialsRequest {})).await;
            Ok(answer.map_err(|status| self.failed(status))?.into_inner().credentials)
        })
        .await
    }

    /// Asks for one certificate; `progress` sees each stage as it is passed.
    pub async fn issue(
        &self,
        wanted: v1::CertificateRequest,
        mut progress: impl FnMut(v1::Stage),
    ) -> Result<Certificate, ClientError> {
        use v1::issue_certificate_response::Event;
        traced("/csrd.v1.CertificateService/IssueCertificate", async {
            let message = v1::IssueCertificateRequest { request: Some(wanted) };
            let answer = self.certificates().issue_certificate(request(message)).await;
            let mut events = answer.map_err(|status| self.failed(status))?.into_inner();
            while let Some(response) = events.message().await.map_err(|status| self.failed(status))? {
                match response.event {
                    Some(Event::Stage(stage)) => progress(stage),
                    Some(Event::Certificate(certificate)) => return certificate.try_into(),
                    None => return Err(ClientError::bad_answer("has an event of an unknown kind")),
                }
            }
            Err(ClientError::bad_answer("ended without a certificate"))
        })
        .await
    }

    /// Follows one certificate from its full current state on.
    pub fn subscribe(&self, wanted: v1::CertificateRequest) -> Subscription {
        Subscription::new(self.clone(), wanted)
    }

    async fn open(&self, message: v1::SubscribeRequest) -> Result<Streaming<v1::SubscribeResponse>, ClientError> {
        traced("/csrd.v1.CertificateService/Subscribe", async {
            let answer = self.certificates().subscribe(request(message)).await;
            Ok(answer.map_err(|status| self.failed(status))?.into_inner())
        })
        .await
    }

    fn certificates(&self) -> CertificateServiceClient<Channel> {
        CertificateServiceClient::new(self.channel.clone())
    }

    /// A status of the agent, or of the transport when it never came to one.
    fn failed(&self, status: Status) -> ClientError {
        let info = status.get_details_error_info().filter(|info| info.domain == ERROR_DOMAIN);
        if let (None, Some(source)) = (&info, status.source()) {
            let mut cause = source;
            while let Some(deeper) = cause.source() {
                cause = deeper;
            }
            return ClientError {
                code: Code::Unavailable,
                reason: ClientError::UNREACHABLE.into(),
                message: format!("no agent answers at {}: {}", self.socket, printable(&cause.to_string())),
            };
        }
        ClientError {
            code: status.code(),
            reason: info.map_or_else(|| ClientError::UNSPECIFIED.into(), |info| printable(&info.reason)),
            message: printable(status.message()),
        }
    }
}

/// The one place where a call gets its metadata: the span it belongs to, for the agent to go on with.
fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    telemetry::inject(request.metadata_mut().as_mut());
    request
}

/// Makes the call of `path` within a span of its own.
async fn traced<T>(path: &'static str, call: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
    let span = telemetry::call_span(path);
    let answer = call.instrument(span.clone()).await;
    let code = answer.as_ref().map_or_else(|error| error.code, |_| Code::Ok);
    telemetry::record_status(&span, code.into(), "");
    answer
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_tried_again_while_the_agent_has_more_to_accept_than_the_kernel_lines_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let mut waiting = Vec::new();
        let full = loop {
            match UnixStream::connect(&path).await {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        let socket: SocketPath = path.to_str().unwrap().parse().unwrap();
        let given_up = connect(socket.clone()).await.map(drop).expect_err("nobody accepts");
        assert_eq!(given_up.kind(), io::ErrorKind::WouldBlock);
        let late = async {
            sleep(CONNECT_PAUSE * (CONNECT_TRIES / 2)).await;
            listener.accept().await.unwrap()
        };
        let (connected, _) = tokio::join!(connect(socket), late);
        connected.expect("somebody does");
    }

    #[tokio::test]
    async fn a_status_keeps_its_reason_only_from_our_domain() {
        fn check(domain: &str, expected: &str) {
            let client = Client::new("/x".parse().expect("absolute"));
            let details = ErrorDetails::with_error_info("POLICY_DENIED", domain, []);
            let status = Status::with_error_details(Code::PermissionDenied, "no\x1b[2J policy", details);
            let error = client.failed(status);
            assert_eq!((error.code, error.reason.as_str()), (Code::PermissionDenied, expected));
            assert_eq!(error.message, "no\\u{1b}[2J policy");
        }
        check(ERROR_DOMAIN, "POLICY_DENIED");
        check("example.org", ClientError::UNSPECIFIED);
    }

    #[tokio::test]
    async fn a_missing_agent_is_unreachable_and_named() {
        let error = Client::new("/nonexistent/s".parse().expect("absolute")).who_am_i().await.expect_err("nobody");
        assert_eq!((error.code, error.reason.as_str()), (Code::Unavailable, ClientError::UNREACHABLE));
        assert!(error.is_transient());
        assert_eq!(error.message, "no agent answers at /nonexistent/s: No such file or directory (os error 2)");
    }
}
