//! Envoy's secret discovery service, v3: certificates, keys and roots for a proxy, pushed as they change.
//!
//! Stays with a proxy that asks for too much: a name that finds nothing is left out, or named as absent where the protocol
//! has words for it, and may find something later. A stream ends when its workload has no right to anything any more, and
//! never with OK. What a response may hold is up to `secrets`; when it is due is up to `world` and `delta`.

mod delta;
mod secrets;
mod world;

use std::{pin::Pin, sync::Arc};

use futures_util::{TryStreamExt as _, stream};
use tokio::time::timeout;
use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status, Streaming};
use tracing::Instrument as _;

use super::{
    Arrival, Engine, MESSAGE_TIMEOUT,
    call::{Call, ended},
    refusal::Refusal,
};
use crate::{
    metrics::{Counted, counted},
    proto::envoy::service::{
        discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse},
        secret::v3::secret_discovery_service_server::SecretDiscoveryService,
    },
    telemetry,
};

use delta::Delta;
pub use secrets::{MAX_SECRET_NAME_BYTES, MAX_SECRETS};
use secrets::{Secrets, invalid};
use world::World;

/// Bytes of one request message.
pub const MAX_DISCOVERY_REQUEST_BYTES: usize = 32 * 1024;
/// Methods whose requests may be far apart.
const STREAMS: [&str; 2] = [
    "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets",
    "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets",
];

/// The service.
pub(super) struct Sds {
    engine: Arc<Engine>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Whether the caller of `path` goes on with requests for as long as it likes.
pub(super) fn goes_on(path: &str) -> bool {
    STREAMS.contains(&path)
}

impl Sds {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }

    /// Answers one request after another, and changes as they happen, as `protocol` says.
    fn stream<P: Default + Send + 'static, Q: Send + 'static, R: Send + 'static>(
        &self,
        request: Request<Streaming<Q>>,
        protocol: Protocol<P, Q, R>,
    ) -> Response<Answers<R>> {
        let (engine, arrival) = (self.engine.clone(), Arrival::of(&request));
        let begin = async move {
            let follower = begin(engine, &arrival, request.into_inner(), protocol).await;
            let follower = follower.map_err(|refusal| ended(&arrival.span, refusal))?;
            Ok::<_, Status>(stream::unfold(follower, |mut follower| async {
                let answer = follower.next().await?;
                Some((answer, follower))
            }))
        };
        Response::new(Box::pin(stream::once(begin).try_flatten()))
    }
}

/// Waits for the first request; until it is there, the call holds its place among those that arrive.
async fn begin<P: Default, Q, R>(
    engine: Arc<Engine>,
    arrival: &Arrival,
    mut requests: Streaming<Q>,
    protocol: Protocol<P, Q, R>,
) -> Result<Follower<P, Q, R>, Refusal> {
    let first = match timeout(MESSAGE_TIMEOUT, requests.message()).await {
        Ok(first) => first.map_err(unreadable)?,
        Err(_) => None,
    };
    let late = || invalid(format!("no request came within {} s", MESSAGE_TIMEOUT.as_secs()));
    let first = first.ok_or_else(late)?;
    let call = Call::prove(&engine, arrival).await?;
    let (mut secrets, mut state) = (Secrets::of(&call)?, P::default());
    call.span.in_scope(|| (protocol.take)(&mut state, &mut secrets, first))?;
    let counted = counted(&engine.metrics.subscribers);
    Ok(Follower { call, _counted: counted, secrets, requests: Some(requests), protocol, state, over: false })
}

/// A request that cannot be read: too long, or none at all.
fn unreadable(status: Status) -> Refusal {
    Refusal::new(status.code(), "REQUEST_INVALID", status.message())
}

/// How requests and responses of one kind follow each other.
struct Protocol<P, Q, R> {
    take: fn(&mut P, &mut Secrets, Q) -> Result<(), Refusal>,
    answer: fn(&mut P, &Secrets) -> Option<R>,
}

/// One open stream.
struct Follower<P, Q, R> {
    call: Call,
    _counted: Counted,
    secrets: Secrets,
    /// `None` once the caller has ended its side, which is no reason to end ours.
    requests: Option<Streaming<Q>>,
    protocol: Protocol<P, Q, R>,
    state: P,
    over: bool,
}

impl<P, Q, R> Follower<P, Q, R> {
    /// The next response; `None` after the end.
    async fn next(&mut self) -> Option<Result<R, Status>> {
        if self.over {
            return None;
        }
        let answer = self.response().await;
        self.over = answer.is_err();
        Some(self.call.answered(answer))
    }

    /// The next response that is due, for the process that opened the stream and no other.
    async fn response(&mut self) -> Result<R, Refusal> {
        let mut issuance = None;
        loop {
            if let Some(response) = (self.protocol.answer)(&mut self.state, &self.secrets) {
                let credentials: Vec<_> = self.secrets.identities.subscriptions().collect();
                self.call.check_still(credentials).instrument(self.call.delivery(issuance.as_ref())).await?;
                return Ok(response);
            }
            let request = async {
                match &mut self.requests {
                    Some(requests) => requests.message().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                changed = self.secrets.identities.changed() => issuance = changed?,
                request = request => match request {
                    Ok(Some(request)) => {
                        let span = self.call.span.clone();
                        span.in_scope(|| (self.protocol.take)(&mut self.state, &mut self.secrets, request))?;
                    }
                    Ok(None) => self.requests = None,
                    Err(status) => return Err(unreadable(status)),
                },
                () = self.call.engine.stop.cancelled() => return Err(Refusal::stopping()),
            }
        }
    }
}

#[tonic::async_trait]
impl SecretDiscoveryService for Sds {
    type DeltaSecretsStream = Answers<DeltaDiscoveryResponse>;

    async fn delta_secrets(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        Ok(self.stream(request, Protocol { take: Delta::take, answer: Delta::answer }))
    }

    type StreamSecretsStream = Answers<DiscoveryResponse>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        Ok(self.stream(request, Protocol { take: World::take, answer: World::answer }))
    }

    async fn fetch_secrets(&self, request: Request<DiscoveryRequest>) -> Result<Response<DiscoveryResponse>, Status> {
        let arrival = Arrival::of(&request);
        let fetch = async {
            let call = Call::prove(&self.engine, &arrival).await?;
            let mut secrets = Secrets::of(&call)?;
            World::default().take(&mut secrets, request.into_inner())?;
            while !secrets.identities.settled() {
                secrets.identities.changed().await?;
            }
            let credentials: Vec<_> = secrets.identities.subscriptions().collect();
            call.check_still(credentials).instrument(call.delivery(None)).await?;
            Ok(world::at_hand(&secrets).1)
        };
        let fetched = fetch.instrument(arrival.span.clone()).await.map_err(|refusal| ended(&arrival.span, refusal))?;
        telemetry::record_status(&arrival.span, Code::Ok as i32, "");
        Ok(Response::new(fetched))
    }
}
