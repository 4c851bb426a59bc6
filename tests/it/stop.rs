//! What becomes of the calls under way when the agent is told to stop. Time is paused, and connections are pipes.

use std::{
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, SystemTime},
};

use csrd::{
    attest::{Attestor, Caller, Workload},
    clock::Clock,
    hub::{self, Hub},
    metrics::Metrics,
    policy::{EMBEDDED, PolicySet, Source},
    proto::v1::{self, certificate_service_client::CertificateServiceClient, issue_certificate_response::Event},
    rate::Rate,
    server::{Engine, Limits, Server, stop},
    signer::{Sign, SignError, Signing, SigningRequest, embedded},
    x509::Bundle,
};
use hyper_util::rt::TokioIo;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Status, Streaming,
    service::Routes,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_client::HealthClient};
use tonic_reflection::pb::v1::{ServerReflectionRequest, server_reflection_client::ServerReflectionClient};

use crate::agent::{policy_for, reason};

const UID: u32 = 1000;
const MOMENT: Duration = Duration::from_millis(100);

/// An embedded CA that takes its time.
#[derive(Debug)]
struct Slow {
    ca: embedded::Embedded,
    delay: Duration,
}

impl Sign for Slow {
    fn name(&self) -> &str {
        embedded::NAME
    }

    fn sign<'a>(&'a self, request: SigningRequest<'a>) -> Signing<'a> {
        Box::pin(async move {
            sleep(self.delay).await;
            self.ca.sign(request).await
        })
    }

    fn bundle(&self) -> watch::Receiver<Arc<Bundle>> {
        self.ca.bundle()
    }

    fn ready(&self) -> Result<(), SignError> {
        self.ca.ready()
    }
}

struct Host {
    server: Server,
    stop: CancellationToken,
    connections: JoinSet<()>,
    _hub: JoinSet<()>,
    _policies: watch::Sender<Arc<PolicySet>>,
}

impl Host {
    fn new(delay: Duration, limits: Limits) -> Self {
        let (clock, metrics) =
            (Clock::paused(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)), Metrics::new());
        let ca = embedded::Embedded::ephemeral(embedded::DEFAULT_CA_LIFETIME, &clock, metrics.signer("embedded"));
        let policy = Source { origin: "test".into(), text: policy_for(&[UID]) };
        let policies = watch::Sender::new(Arc::new(PolicySet::parse(&[policy], EMBEDDED).unwrap()));
        let rate = Rate { per_second: NonZeroU32::MAX, burst: NonZeroU32::MAX };
        let hub = Hub::new(hub::Parts {
            clock,
            policies: policies.subscribe(),
            pods: None,
            signers: vec![Arc::new(Slow { ca: ca.unwrap(), delay })],
            signer_rate: rate,
            principal_rate: rate,
            seed: 1,
            metrics: metrics.clone(),
        });
        let stop = CancellationToken::new();
        let mut running = JoinSet::new();
        running.spawn(hub.clone().run(stop.clone()));
        let engine = Engine {
            hub,
            attestor: Arc::new(Attestor::new()),
            default_signer: embedded::NAME.into(),
            operator_uid: 0,
            limits,
            metrics,
            stop: stop.clone(),
        };
        let (_, health) = tonic_health::server::health_reporter();
        let server = Server::new(engine, Routes::new(health));
        Self { server, stop, connections: JoinSet::new(), _hub: running, _policies: policies }
    }

    async fn connect(&mut self) -> Channel {
        let (client, io) = tokio::io::duplex(64 * 1024);
        let (server, caller) = (self.server.clone(), Caller::Fixed(Arc::new(Workload::of_uid(UID))));
        self.connections.spawn(async move { server.connection(io, UID.into(), Ok(caller)).await });
        let mut client = Some(TokioIo::new(client));
        let connector = tower::service_fn(move |_| {
            std::future::ready(client.take().ok_or_else(|| std::io::Error::other("one connection")))
        });
        Endpoint::from_static("http://csrd").connect_with_connector(connector).await.unwrap()
    }
}

async fn watch_health(channel: &Channel) -> Result<Streaming<HealthCheckResponse>, Status> {
    let request = HealthCheckRequest { service: String::new() };
    Ok(HealthClient::new(channel.clone()).watch(request).await?.into_inner())
}

fn ask() -> Option<v1::CertificateRequest> {
    Some(v1::CertificateRequest { dns_names: vec!["a.example.org".into()], ..Default::default() })
}

#[tokio::test(start_paused = true)]
async fn an_issuance_is_delivered_if_it_lands_in_time_and_told_to_come_back_if_not() {
    for (delay, delivered) in [(stop::CALL - MOMENT, true), (stop::CALL + MOMENT, false)] {
        let mut host = Host::new(delay, Limits::default());
        let channel = host.connect().await;
        let request = v1::IssueCertificateRequest { request: ask() };
        let mut events = CertificateServiceClient::new(channel).issue_certificate(request).await.unwrap().into_inner();
        let mut message = events.message().await;
        host.stop.cancel();
        let mut certificate = None;
        while let Ok(Some(v1::IssueCertificateResponse { event: Some(event) })) = message {
            if let Event::Certificate(it) = event {
                certificate = Some(it);
            }
            message = events.message().await;
        }
        assert_eq!(certificate.is_some(), delivered, "{delay:?}: {message:?}");
        match message {
            Ok(None) => assert!(delivered),
            Ok(Some(odd)) => panic!("{odd:?}"),
            Err(status) => {
                assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "AGENT_STOPPING"));
                assert!(!delivered);
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_open_stream_ends_at_the_stop_and_so_does_its_connection() {
    async fn told<T: std::fmt::Debug>(name: &str, mut stream: Streaming<T>) {
        let status = loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("{name}: ended without a status"),
                Err(status) => break status,
            }
        };
        assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "AGENT_STOPPING"), "{name}");
    }
    let mut host = Host::new(Duration::ZERO, Limits::default());
    let channel = host.connect().await;
    let mut client = CertificateServiceClient::new(channel.clone());
    let request = v1::SubscribeRequest { request: ask(), ..Default::default() };
    let subscription = client.subscribe(request).await.unwrap().into_inner();
    let roots = client.watch_trust_bundle(v1::WatchTrustBundleRequest::default()).await.unwrap().into_inner();
    let health = watch_health(&channel).await.unwrap();
    // On a connection of its own: a client that goes on sending keeps its connection for as long as it may.
    let mut reflection = ServerReflectionClient::new(host.connect().await);
    let requests = tokio_stream::pending::<ServerReflectionRequest>();
    let reflection = reflection.server_reflection_info(requests).await.unwrap().into_inner();
    let stopped = Instant::now();
    host.stop.cancel();
    told("Subscribe", subscription).await;
    told("WatchTrustBundle", roots).await;
    told("health.Watch", health).await;
    told("ServerReflectionInfo", reflection).await;
    host.connections.join_next().await.unwrap().unwrap();
    assert!(stopped.elapsed() < MOMENT, "{:?}", stopped.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_not_answered_yet_is_told_of_the_stop() {
    let mut host = Host::new(stop::AGENT, Limits::default());
    let channel = host.connect().await;
    let mut client = CertificateServiceClient::new(channel);
    let request = v1::SubscribeRequest { request: ask(), ..Default::default() };
    let stop = host.stop.clone();
    let (answer, ()) = tokio::join!(client.subscribe(request), async move {
        sleep(MOMENT).await;
        stop.cancel();
    });
    let status = answer.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "AGENT_STOPPING"));
}

#[tokio::test(start_paused = true)]
async fn streams_of_every_service_are_bounded_and_their_places_come_back() {
    let limits = Limits { streams_per_principal: 2, ..Limits::default() };
    let mut host = Host::new(Duration::ZERO, limits);
    let channel = host.connect().await;
    let first = watch_health(&channel).await.unwrap();
    let _second = watch_health(&channel).await.unwrap();
    let refused = watch_health(&channel).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::ResourceExhausted, "TOO_MANY_STREAMS"));
    drop(first);
    sleep(MOMENT).await;
    assert!(watch_health(&channel).await.is_ok());
}
