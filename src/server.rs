//! The socket's front: accepts connections, binds each to the process that made it, and hands its calls to the services.
//!
//! A connection is served only while its process lives and only to bytes which that process wrote. Nothing a client
//! sends, or fails to send, can hold more than the bounds named here, keep another client waiting, or keep the agent
//! from stopping. Who may have what is not decided here.

pub mod admin;
pub mod authority;
mod call;
mod convert;
mod credentials;
pub mod health;
mod identities;
mod issuance;
mod message;
mod methods;
mod pieces;
mod refusal;
mod sds;
pub mod stop;
mod whole;
mod workload_api;

use std::{
    convert::Infallible,
    io,
    os::fd::{AsFd as _, OwnedFd},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use hyper::{Request, Response, body::Incoming, header::AUTHORIZATION, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustix::net::{SocketFlags, accept_with};
use tokio::{
    io::{AsyncRead, AsyncWrite, unix::AsyncFdReadyGuard},
    net::{UnixListener, UnixStream},
    sync::Notify,
    task::{JoinSet, yield_now},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body, service::Routes};
use tower::Service as _;

use crate::{
    account::{Account, Kind, Line, OpenCall, Pace, Place, Principal, Seat},
    attest::{AttestError, Attestor, Caller, Peer, PeerStream, Token, TokenError, Workload, watch_readable},
    hub::Hub,
    metrics::{ConnectionRefused, Metrics, counted},
    policy::Ask,
    proto::{
        self, envoy::service::secret::v3::secret_discovery_service_server::SecretDiscoveryServiceServer,
        spiffe::spiffe_workload_api_server::SpiffeWorkloadApiServer, v1,
    },
    telemetry,
};

use authority::AuthorityStream;
pub use identities::MAX_IDENTITIES;
pub use message::MESSAGE_TIMEOUT;
use message::Messages;
use methods::Methods;
use refusal::Refusal;
pub use sds::{MAX_DISCOVERY_REQUEST_BYTES, MAX_SECRET_NAME_BYTES, MAX_SECRETS};
pub use whole::FRAME_TIMEOUT;
use whole::WholeFrames;

/// Calls under way at once on one connection; hyper refuses one more with REFUSED_STREAM.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 128;
/// Bytes of one request's headers.
pub const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// Bytes of one request message: room for 64 URIs of 2048 bytes and a PKCS#10 request of 16 KiB, and for a request with
/// thousands of names to be told which bound it breaks.
pub const MAX_REQUEST_BYTES: usize = 256 * 1024;
/// Bytes a client may send on one stream, or on all of a connection, before the agent has read them.
pub const WINDOW_BYTES: u32 = 64 * 1024;
/// Bytes hyper may hold for one stream that its client does not read, beside the last message.
pub const MAX_UNSENT_BYTES: usize = 8 * 1024;
/// How long a new connection may take to its first whole request header.
pub const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a silent connection is asked whether its client still answers.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(300);
/// How long it may take to answer.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Connections that are accepted before the rest of the agent goes on: their refusals take some 0.3 ms.
const ACCEPTED_AT_ONCE_MAX: usize = 64;
/// How long nothing is accepted after an accept has failed, which it does while file descriptors are short: those in use
/// must end before more can begin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the services stand on.
#[derive(Clone, Debug)]
pub struct Engine {
    /// Credentials over time.
    pub hub: Hub,
    /// Proves callers.
    pub attestor: Arc<Attestor>,
    /// Signer whose roots are meant when a caller names none.
    pub default_signer: String,
    /// User that may see all credentials, beside root: the agent's own.
    pub operator_uid: u32,
    /// What each principal holds, and may hold.
    pub account: Account,
    /// Counters and gauges.
    pub metrics: Metrics,
    /// Ends every stream when it is cancelled.
    pub stop: CancellationToken,
}

/// Serves the socket API.
#[derive(Clone, Debug)]
pub struct Server {
    routes: Routes,
    attestor: Arc<Attestor>,
    methods: Arc<Methods>,
    account: Account,
    metrics: Metrics,
    stop: CancellationToken,
}

/// What a call knows of the connection it came on.
struct Connection {
    /// Its place, and who bears the bounds on what it holds.
    seat: Arc<Seat>,
    /// Why no call of this connection is served, if so.
    caller: Result<Caller, AttestError>,
    /// Notified at the first whole request.
    spoke: Notify,
}

/// What a call brings along from its headers on.
#[derive(Clone)]
struct Arrival {
    connection: Arc<Connection>,
    span: tracing::Span,
    token: Result<Option<Token>, TokenError>,
    /// Given up when the message is there.
    _place: Arc<Place>,
}

impl Server {
    /// A server over `engine`; `health` is the grpc.health.v1 service that the agent keeps up to date.
    pub fn new(engine: Engine, health: Routes) -> Self {
        let (attestor, metrics, stop) = (engine.attestor.clone(), engine.metrics.clone(), engine.stop.clone());
        let account = engine.account.clone();
        let engine = Arc::new(engine);
        let issuance = issuance::Issuance::new(engine.clone());
        let issuance = v1::certificate_service_server::CertificateServiceServer::new(issuance)
            .max_decoding_message_size(MAX_REQUEST_BYTES);
        let workload_api = workload_api::WorkloadApi::new(engine.clone());
        let workload_api = SpiffeWorkloadApiServer::new(workload_api).max_decoding_message_size(MAX_REQUEST_BYTES);
        let sds = sds::Sds::new(engine.clone());
        let sds = SecretDiscoveryServiceServer::new(sds).max_decoding_message_size(MAX_DISCOVERY_REQUEST_BYTES);
        let credentials = v1::status_service_server::StatusServiceServer::new(credentials::Credentials::new(engine))
            .max_decoding_message_size(MAX_REQUEST_BYTES);
        let methods = Methods::of(&[
            proto::DESCRIPTORS,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ]);
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let routes = health
            .add_service(issuance)
            .add_service(credentials)
            .add_service(workload_api)
            .add_service(sds)
            .add_service(reflection().build_v1().expect("our own descriptors are valid"))
            .add_service(reflection().build_v1alpha().expect("our own descriptors are valid"))
            .prepare();
        Self { routes, attestor, methods: Arc::new(methods), account, metrics, stop }
    }

    /// Accepts connections until the stop, then gives them [`stop::SERVER`].
    pub async fn serve(self, listener: UnixListener) {
        // Taken from the runtime, which would look after each connection before it is known whether it stays.
        let listener = listener.into_std().and_then(|it| watch_readable(it.into()));
        let listener = match listener {
            Ok(listener) => listener,
            Err(error) => return tracing::error!(%error, "cannot wait for connections"),
        };
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = self.stop.cancelled() => break,
                Some(_) = connections.join_next() => {}
                ready = listener.readable() => match ready {
                    Ok(ready) => {
                        self.accept(ready, &mut connections).await;
                        // As many may have ended as began; what ended is kept until it is looked at.
                        while connections.try_join_next().is_some() {}
                    }
                    Err(error) => return tracing::error!(%error, "cannot wait for connections"),
                },
            }
        }
        self.attestor.close_listener(listener.into_inner());
        let all = async { while connections.join_next().await.is_some() {} };
        if timeout(stop::SERVER, all).await.is_err() {
            tracing::debug!("connections that did not close in time were dropped");
        }
    }

    /// Accepts those that wait, so many at once, and lets the rest of the agent go on before the next.
    async fn accept(&self, mut ready: AsyncFdReadyGuard<'_, OwnedFd>, connections: &mut JoinSet<()>) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        for _ in 0..ACCEPTED_AT_ONCE_MAX {
            match ready.try_io(|listener| Ok(accept_with(listener, flags)?)) {
                Ok(Ok(socket)) => {
                    if let Some(served) = self.accepted(socket) {
                        connections.spawn(served);
                    }
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    return sleep(ACCEPT_PAUSE).await;
                }
                Err(_none_waits) => return,
            }
        }
        yield_now().await;
    }

    /// What serves a connection that was accepted; `None` if its principal connects too often. That is asked first: it
    /// takes one system call on a host, and all that comes after it takes a dozen.
    fn accepted(&self, socket: OwnedFd) -> Option<impl Future<Output = ()> + use<>> {
        let principal = self.attestor.principal(socket.as_fd());
        if !self.account.may_connect(principal) {
            self.metrics.connection_refused(ConnectionRefused::TooFast);
            self.attestor.turn_away(socket);
            return None;
        }
        let mut stream = self.attestor.accepted(UnixStream::from_std(socket.into()).ok()?);
        let seat = self.seat(principal)?;
        // Until the socket is closed, which may be later than its connection ends.
        stream.keep(seat.clone());
        let peer = Peer::of(&stream, &self.attestor).map(Arc::new);
        let server = self.clone();
        Some(async move {
            match peer {
                Ok(peer) => {
                    let caller = Caller::Peer(peer.clone());
                    server.connection(PeerStream::new(stream, &peer), seat, Ok(caller)).await;
                }
                Err(error) => server.connection(stream, seat, Err(error)).await,
            }
        })
    }

    /// A place for a connection of `principal`; `None` when there is none, which is counted.
    pub fn seat(&self, principal: Principal) -> Option<Arc<Seat>> {
        let seat = self.account.seat(principal);
        seat.map_err(|_| self.metrics.connection_refused(ConnectionRefused::TooMany)).ok()
    }

    /// Serves one connection until it closes, its process exits, its place is given to another principal, or the stop.
    ///
    /// A caller that cannot be attested is still served, so that each of its calls is told why.
    pub async fn connection<IO>(&self, io: IO, seat: Arc<Seat>, caller: Result<Caller, AttestError>)
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let _counted = counted(&self.metrics.connections);
        let io = WholeFrames::new(io, seat.clone(), self.metrics.clone());
        let connection = Arc::new(Connection { seat: seat.clone(), caller, spoke: Notify::new() });
        let service = service_fn(|request| self.call(request, &connection));
        let served = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
            .max_header_list_size(MAX_HEADER_BYTES)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .max_send_buf_size(MAX_UNSENT_BYTES)
            .keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .serve_connection(TokioIo::new(AuthorityStream::new(io)), service);
        let mut served = pin!(served);
        let gone = async {
            match &connection.caller {
                Ok(caller) => caller.exited().await,
                Err(_) => std::future::pending().await,
            }
        };
        let silent = async {
            if timeout(FIRST_REQUEST_TIMEOUT, connection.spoke.notified()).await.is_ok() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            ended = served.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "connection ended");
                }
                if let Ok(caller) = &connection.caller
                    && let Some(error) = caller.passed()
                {
                    refused(&self.metrics, &seat, error);
                }
                return;
            }
            () = seat.given_up() => return self.metrics.connection_refused(ConnectionRefused::TooMany),
            () = gone => return,
            () = silent => return self.metrics.connection_refused(ConnectionRefused::Silent),
            () = self.stop.cancelled() => {}
        }
        served.as_mut().graceful_shutdown();
        let _ = timeout(stop::CONNECTION, served).await;
    }

    /// Hands a request to its service, with its connection and its span, if its principal may make one more; ends it
    /// after the stop if the service does not.
    fn call(
        &self,
        request: Request<Incoming>,
        connection: &Arc<Connection>,
    ) -> impl Future<Output = Result<Response<Body>, Infallible>> + Send + use<> {
        connection.spoke.notify_one();
        let answer = self.admit(&connection.seat).map(|(arriving, open)| {
            let mut request = request;
            let token =
                Token::in_headers(request.headers().get_all(AUTHORIZATION).iter().map(|value| value.as_bytes()));
            request.headers_mut().remove(AUTHORIZATION);
            let span = telemetry::rpc_span(request.headers(), self.methods.known(request.uri().path()));
            let goes_on = sds::goes_on(request.uri().path());
            let mut request = request.map(|body| Messages::new(body, connection.seat.clone(), goes_on));
            let arrival = Arrival { connection: connection.clone(), span, token, _place: Arc::new(arriving) };
            request.extensions_mut().insert(arrival);
            // Routes are always ready.
            (self.routes.clone().call(request), open)
        });
        let stop = self.stop.clone();
        async move {
            let refusal = match answer {
                Ok((answer, open)) => tokio::select! {
                    biased;
                    answer = answer => return answer.map(|response| stop::bounded(response, &stop, open)),
                    () = stop::calls_given_up(&stop) => Refusal::stopping(),
                },
                Err(refusal) => refusal,
            };
            Ok(Status::from(refusal).into_http())
        }
    }

    /// Places for a call: one while its request arrives, and one until it has been answered.
    fn admit(&self, seat: &Arc<Seat>) -> Result<(Place, OpenCall), Refusal> {
        let principal = seat.principal();
        let wait = self.account.wait(Pace::Refusals, principal);
        if !wait.is_zero() {
            return Err(Refusal::too_many_refusals(wait));
        }
        let arriving = self.account.take(Kind::Arriving, principal);
        let arriving = arriving.map_err(|full| Refusal::full(Kind::Arriving, full))?;
        let open = seat.call().map_err(|(kind, full)| Refusal::full(kind, full))?;
        Ok((arriving, open))
    }
}

impl Arrival {
    /// Who calls, proven now, by the token as well if there is one.
    async fn workload(&self, engine: &Engine) -> Result<Arc<Workload>, Refusal> {
        let workload = self.connection.workload(engine).await?;
        let confirmed = engine.attestor.confirm(&workload, &self.token).await;
        confirmed.map_err(|error| refused(&engine.metrics, &self.connection.seat, &error))?;
        Ok(workload)
    }
}

impl Connection {
    /// Who calls, proven now: the process lives, wrote these bytes, and is still what it was or is looked at afresh.
    async fn workload(&self, engine: &Engine) -> Result<Arc<Workload>, Refusal> {
        let attested = match &self.caller {
            Ok(caller) => caller.attest(&engine.attestor).await,
            Err(error) => return Err(refused(&engine.metrics, &self.seat, error)),
        };
        attested.inspect(|_| engine.metrics.attest.good()).map_err(|error| refused(&engine.metrics, &self.seat, &error))
    }
}

/// Counts and logs a caller that cannot be attested; returns what it is told.
fn refused(metrics: &Metrics, seat: &Seat, error: &AttestError) -> Refusal {
    metrics.attest.bad(error.reason());
    if let Some(Line { left_out }) = seat.account().line(seat.principal()) {
        tracing::warn!(reason = error.reason(), %error, left_out, "caller refused");
    }
    Refusal::from(error)
}

/// What `request` asks for, read as the service reads it, for offline checks.
///
/// # Errors
///
/// The sentence that the service would answer with.
pub fn ask(request: v1::CertificateRequest) -> Result<Ask, String> {
    convert::ask(Some(request)).map(|(ask, _)| ask).map_err(|error| error.to_string())
}
