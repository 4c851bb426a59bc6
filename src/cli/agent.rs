//! `csrd agent`: the node daemon.

mod cluster;

use std::{
    io::{self, IsTerminal as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use sd_notify::NotifyState;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    task::spawn_blocking,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use super::{Exit, UsageError};
use crate::{
    account::{Limits, memory_limit},
    agent::{self, Background, Parts},
    clock::Clock,
    config::{Config, Mode, Overrides, otel_variables},
    metrics::Metrics,
    policy::watch::PolicyFiles,
    server::admin::Readiness,
    signer::{
        Sign,
        embedded::{self, Embedded},
    },
    socket::SocketPath,
    telemetry::{Log, LogWriter, Telemetry},
};

/// How often systemd's watchdog is fed in the time after which it bites.
const FED_PER_WATCHDOG: u32 = 2;

/// Serve the socket: attest callers, decide by policy, issue, renew, push.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Configuration file (YAML); flags go before it
    #[arg(long, value_name = "FILE", env = "CSRD_CONFIG")]
    config: Option<PathBuf>,
    /// Socket to listen on [default: unix:///run/csrd/csrd.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<SocketPath>,
    /// Be the agent of a cluster's node: pods, policies and signers are the API server's
    #[arg(long)]
    kubernetes: bool,
    /// Name of this node, where the agent's token does not say it
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    node: Option<String>,
    /// Folder for the embedded CA [default: /var/lib/csrd]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Policy file, or folder of policy files; may be repeated [default: /etc/csrd/policies]
    #[arg(long = "policy", value_name = "PATH")]
    policies: Vec<PathBuf>,
    /// Address for /metrics, /livez and /readyz [default: none]
    #[arg(long, value_name = "ADDRESS:PORT")]
    admin: Option<SocketAddr>,
}

/// Runs the agent until SIGTERM or SIGINT; a second one exits at once.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    super::forbid_tracing();
    let descriptors = super::raise_descriptor_limit();
    super::forbid_huge_pages();
    let overrides = Overrides {
        socket: args.socket,
        state_dir: args.state_dir,
        policies: args.policies,
        admin: args.admin,
        kubernetes: args.kubernetes,
        node: args.node,
    };
    let config = Config::load(args.config.as_deref(), overrides).map_err(UsageError::of)?;
    let telemetry = start_telemetry(config.log.clone())?;
    let stop = CancellationToken::new();
    // Before anything is bound: whoever sees the socket can already stop the agent in good order.
    let signals = Signals::catch().context("catching signals")?;
    let running = async {
        let Some(parts) = parts(config, descriptors, stop.clone()).await? else { return anyhow::Ok(()) };
        let bound = agent::build(parts).await?;
        tracing::info!(socket = %bound.socket.display(), admin = bound.admin.map(tracing::field::display), "ready");
        notify(NotifyState::Ready).await.context("telling systemd that the agent is ready")?;
        Ok(bound.run().await?)
    };
    tokio::select! {
        ended = running => {
            telemetry.shutdown();
            ended?;
            Ok(ExitCode::SUCCESS)
        }
        () = signals.second(stop.clone()) => Ok(Exit::Failure.into()),
    }
}

/// What a configured agent is made of; `None` if it was stopped while it asked.
async fn parts(config: Config, descriptors: usize, stop: CancellationToken) -> anyhow::Result<Option<Parts>> {
    let (clock, metrics) = (Clock::system(), Metrics::new());
    let mut background: Vec<Background> = Vec::new();
    if let Some(bites_after) = sd_notify::watchdog_enabled().filter(|time| !time.is_zero()) {
        background.push(("watchdog", Box::pin(feed_watchdog(bites_after / FED_PER_WATCHDOG, stop.clone()))));
    }
    let mut parts = Parts {
        socket: config.socket.as_path().to_owned(),
        admin: config.admin,
        policies: watch::channel(Arc::default()).1,
        cluster: None,
        signers: Vec::new(),
        signer_rate: config.limits.all.into(),
        principal_rate: config.limits.per_workload.into(),
        limits: limits(descriptors),
        seed: rand::random(),
        metrics: metrics.clone(),
        readiness: Readiness::new(),
        background,
        clock: clock.clone(),
        stop: stop.clone(),
    };
    match config.mode {
        Mode::Host { policies, ca } => {
            let policies = PolicyFiles::load(policies, metrics.clone()).map_err(UsageError::of)?;
            let signer = Arc::new(Embedded::open(ca, &clock, metrics.signer(embedded::NAME))?);
            parts.policies = policies.subscribe();
            parts.signers = vec![signer.clone() as Arc<dyn Sign>];
            parts.background.push(("policies", Box::pin(policies.run(stop.clone()))));
            parts.background.push(("embedded signer", Box::pin(signer.run(stop))));
        }
        Mode::Kubernetes(config) => {
            let Some(joined) = cluster::join(config, &clock, &metrics, &stop).await? else { return Ok(None) };
            parts.policies = joined.policies;
            parts.signers = joined.signers;
            parts.cluster = Some(joined.cluster);
            parts.background.extend(joined.background);
        }
    }
    Ok(Some(parts))
}

/// What callers may hold, by the memory and the descriptors that this process may use.
fn limits(descriptors: usize) -> Limits {
    let (memory, from) = memory_limit();
    let limits = Limits::of(memory, descriptors);
    let Limits { connections, bytes, entries, .. } = limits;
    tracing::info!(memory, from, descriptors, connections, bytes, entries, "what callers may hold together");
    limits
}

/// Tells systemd that the loop which serves goes round (`WatchdogSec=`, systemd.service(5)): this must be a task of it.
async fn feed_watchdog(every: Duration, stop: CancellationToken) {
    let feed = async {
        loop {
            if let Err(error) = notify(NotifyState::Watchdog).await {
                tracing::warn!(%error, "cannot tell systemd that the agent still serves");
            }
            sleep(every).await;
        }
    };
    stop.run_until_cancelled(feed).await;
}

/// Tells systemd something, from a thread that may wait: any user can fill the socket that systemd reads.
async fn notify(state: NotifyState<'static>) -> io::Result<()> {
    spawn_blocking(move || sd_notify::notify(&[state])).await?
}

/// Logs to stderr, and traces if an `OTEL_*` variable names a collector.
pub(super) fn start_telemetry(log: Log) -> anyhow::Result<Telemetry> {
    let log = Log { ansi: io::stderr().is_terminal(), ..log };
    let (writer, flush) = LogWriter::start(io::stderr()).context("cannot start the thread that writes the log")?;
    let (dispatch, telemetry) = Telemetry::new(&log, &otel_variables(), writer).map_err(UsageError::of)?;
    tracing::dispatcher::set_global_default(dispatch)?;
    Ok(telemetry.flushing(flush))
}

/// SIGTERM and SIGINT, caught from its making on.
pub(super) struct Signals {
    term: Signal,
    int: Signal,
}

impl Signals {
    pub(super) fn catch() -> io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    /// Stops at the first signal; ends at the second.
    pub(super) async fn second(mut self, stop: CancellationToken) {
        self.next().await;
        tracing::info!("stopping; a second signal exits at once");
        stop.cancel();
        self.next().await;
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}
