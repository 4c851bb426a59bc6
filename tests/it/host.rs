//! An agent's hub and server in this process: time is paused, connections are pipes, and signers do as they are told.

use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use csrd::{
    account::{Account, Limits, Principal},
    attest::{Attestor, Caller, Workload},
    clock::Clock,
    hub::{self, Hub},
    metrics::Metrics,
    policy::{EMBEDDED, PolicySet, Source},
    rate::Rate,
    server::{Engine, Server},
    signer::{Sign, SignError, Signing, SigningRequest, embedded},
    x509::Bundle,
};
use hyper_util::rt::TokioIo;
use tokio::{io::DuplexStream, sync::watch, task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::{Channel, Endpoint},
};

/// The user that calls.
pub(crate) const UID: u32 = 1000;

/// A CA that takes its time, and that can be out of order.
#[derive(Debug)]
pub(crate) struct Signer {
    name: &'static str,
    ca: embedded::Embedded,
    delay: Duration,
    pub(crate) down: AtomicBool,
    pub(crate) roots: watch::Sender<Arc<Bundle>>,
}

impl Signer {
    pub(crate) fn new(name: &'static str, delay: Duration) -> Arc<Self> {
        let ca = embedded::Embedded::ephemeral(
            embedded::DEFAULT_CA_LIFETIME,
            &clock(),
            Metrics::new().signer(embedded::NAME),
        );
        let ca = ca.unwrap();
        let roots = watch::Sender::new(ca.bundle().borrow().clone());
        Arc::new(Self { name, ca, delay, down: AtomicBool::new(false), roots })
    }

    /// Puts another root beside its own.
    pub(crate) fn add_root_of(&self, other: &Self) {
        let both = [&*self.roots.borrow(), &*other.roots.borrow()].map(|it| it.pem()).concat();
        self.roots.send_replace(Arc::new(Bundle::from_pem(&both).unwrap()));
    }
}

impl Sign for Signer {
    fn name(&self) -> &str {
        self.name
    }

    fn sign<'a>(&'a self, request: SigningRequest<'a>) -> Signing<'a> {
        Box::pin(async move {
            sleep(self.delay).await;
            if self.down.load(Ordering::Relaxed) {
                return Err(SignError::CaNotValid);
            }
            self.ca.sign(request).await
        })
    }

    fn bundle(&self) -> watch::Receiver<Arc<Bundle>> {
        self.roots.subscribe()
    }

    fn ready(&self) -> Result<(), SignError> {
        self.ca.ready()
    }
}

pub(crate) struct Host {
    pub(crate) server: Server,
    pub(crate) stop: CancellationToken,
    pub(crate) metrics: Metrics,
    pub(crate) connections: JoinSet<()>,
    _hub: JoinSet<()>,
    policies: watch::Sender<Arc<PolicySet>>,
}

impl Host {
    /// A host on which `signers` sign what `policy` says, any number of times a second.
    pub(crate) fn new(policy: &str, signers: &[Arc<Signer>], limits: Limits) -> Self {
        let unlimited = Rate { per_second: NonZeroU32::MAX, burst: NonZeroU32::MAX };
        Self::with_rate(policy, signers, limits, unlimited)
    }

    /// Likewise, for so many certificates of one user.
    pub(crate) fn with_rate(policy: &str, signers: &[Arc<Signer>], limits: Limits, principal_rate: Rate) -> Self {
        let metrics = Metrics::new();
        let policies = watch::Sender::new(Arc::new(parse(policy)));
        let account = Account::new(limits, 0, &metrics);
        let hub = Hub::new(hub::Parts {
            clock: clock(),
            policies: policies.subscribe(),
            pods: None,
            signers: signers.iter().map(|signer| signer.clone() as Arc<dyn Sign>).collect(),
            signer_rate: Rate { per_second: NonZeroU32::MAX, burst: NonZeroU32::MAX },
            principal_rate,
            account: account.clone(),
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
            account,
            metrics: metrics.clone(),
            stop: stop.clone(),
        };
        let (_, health) = tonic_health::server::health_reporter();
        let server = Server::new(engine, Routes::new(health));
        Self { server, stop, metrics, connections: JoinSet::new(), _hub: running, policies }
    }

    pub(crate) fn set_policy(&self, policy: &str) {
        self.policies.send_replace(Arc::new(parse(policy)));
    }

    /// The client's end of a connection that holds so many bytes.
    pub(crate) fn pipe(&mut self, bytes: usize) -> DuplexStream {
        let (client, io) = tokio::io::duplex(bytes);
        let (server, caller) = (self.server.clone(), Caller::Fixed(Arc::new(Workload::of_uid(UID))));
        let seat = server.seat(Principal::user(UID)).expect("there is room");
        self.connections.spawn(async move { server.connection(io, seat, Ok(caller)).await });
        client
    }

    pub(crate) async fn connect(&mut self) -> Channel {
        let mut client = Some(TokioIo::new(self.pipe(64 * 1024)));
        let connector = tower::service_fn(move |_| {
            std::future::ready(client.take().ok_or_else(|| std::io::Error::other("one connection")))
        });
        Endpoint::from_static("http://csrd").connect_with_connector(connector).await.unwrap()
    }

    /// Whether the metrics have this line.
    pub(crate) fn counts(&self, line: &str) -> bool {
        self.metrics.encode().lines().any(|exposed| exposed == line)
    }
}

fn parse(policy: &str) -> PolicySet {
    PolicySet::parse(&[Source { origin: "test".into(), text: policy.into() }], EMBEDDED).unwrap()
}

fn clock() -> Clock {
    Clock::paused(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000))
}
