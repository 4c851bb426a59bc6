//! `csrd controller`: the verdicts, the signer and the trust bundle of a cluster.

use std::{fs, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{net::TcpListener, sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    Exit, UsageError,
    agent::{Signals, start_telemetry},
};
use crate::{
    agent::{listen, put_in_force},
    attest::pods::{Pods, Scope},
    clock::Clock,
    config,
    controller::{Parts, STOP_WITHIN},
    kubernetes,
    metrics::Metrics,
    policy::watch::ClusterPolicies,
    server::{
        admin::{Admin, Readiness},
        health,
    },
    socket::SocketPath,
    tasks::Tasks,
};

/// How often it is looked whether all is known.
const READINESS_INTERVAL: Duration = Duration::from_millis(100);

/// Decide for a cluster: approve agents' requests within policy, sign them, publish the roots.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Configuration file (YAML)
    #[arg(long, value_name = "FILE", env = "CSRD_CONFIG")]
    config: Option<PathBuf>,
    /// Socket for `csrd health`, to which only this user and root can connect [default: none]
    #[arg(long, value_name = "PATH")]
    socket: Option<SocketPath>,
}

/// Runs the controller until SIGTERM or SIGINT; a second one exits at once.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    super::forbid_tracing();
    let config = config::controller::Controller::load(args.config.as_deref()).map_err(UsageError::of)?;
    let telemetry = start_telemetry(config.log.clone())?;
    let stop = CancellationToken::new();
    let signals = Signals::catch().context("catching signals")?;
    let tasks = start(config, args.socket, stop.clone()).await?;
    tokio::select! {
        ended = tasks.run(STOP_WITHIN) => {
            telemetry.shutdown();
            ended?;
            Ok(ExitCode::SUCCESS)
        }
        () = signals.second(stop) => Ok(Exit::Failure.into()),
    }
}

/// Starts every part.
async fn start(
    config: config::controller::Controller,
    socket: Option<SocketPath>,
    stop: CancellationToken,
) -> anyhow::Result<Tasks> {
    let client = kubernetes::connect(config.kubeconfig.as_deref()).await.map_err(UsageError::of)?;
    let api_hosts = kubernetes::api_hosts(config.kubeconfig.as_deref()).await.map_err(UsageError::of)?;
    let (clock, metrics, readiness) = (Clock::system(), Metrics::new(), Readiness::new());
    let pods = Pods::new(Scope::Cluster, clock.clone());
    let policies = ClusterPolicies::new(client.clone(), metrics.clone());
    let (read, examined, mut listed) = (policies.subscribe(), policies.problems(), policies.synced());
    let policies_lag = policies.lag();
    let (put, in_force) = watch::channel(Arc::default());
    let mut tasks = Tasks::new(stop.clone());
    if let Some(address) = config.admin {
        let listener = TcpListener::bind(address).await;
        let listener = listener.with_context(|| format!("cannot listen on {address} for metrics and readiness"))?;
        let admin = Admin { metrics: metrics.clone(), readiness: readiness.clone() };
        tasks.spawn("admin", admin.serve(listener, stop.clone()));
    }
    if let Some(socket) = socket {
        let (listener, _) = listen(socket.as_path(), health::SOCKET_MODE).await?;
        tasks.spawn("health", health::serve(listener, readiness.clone(), stop.clone()));
    }
    tasks.spawn("pods", pods.clone().run(client.clone(), stop.clone()));
    tasks.spawn("policies", policies.run(stop.clone()));
    tasks.spawn("policies in force", put_in_force(read, listed.clone(), put, pods.clone(), stop.clone()));
    let parts = Parts {
        identity: identity(),
        signer: config.signer,
        ca: config.ca,
        approves: config.approve,
        kubelet_serving: config.kubelet_serving,
        api_hosts: api_hosts.into_iter().chain(config::service_host()).collect(),
        agent: (config.namespace.clone(), config.agent),
        namespace: config.namespace,
        bundle_namespaces: config.bundle_namespaces,
        per_node: config.per_node.into(),
        pods: pods.clone(),
        policies: in_force,
        policies_lag,
        examined,
        client,
        clock,
        metrics,
    };
    tasks.spawn("controller", async move {
        let condition = readiness.condition("cluster");
        // Before everything is known, a verdict would deny what is allowed.
        let known = async {
            condition.fails("policies have not been listed yet");
            let _ = listed.wait_for(|listed| *listed).await;
            while let Err(why) = pods.ready() {
                condition.fails(why);
                sleep(READINESS_INTERVAL).await;
            }
        };
        if stop.run_until_cancelled(known).await.is_some() {
            condition.holds();
            parts.run(stop).await;
        }
    });
    Ok(tasks)
}

/// The host's name, which in a pod is the pod's, and something that no other replica had.
fn identity() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}_{:016x}", host.trim(), rand::random::<u64>())
}
