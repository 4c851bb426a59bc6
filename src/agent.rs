//! The node daemon, put together: every part is bound before anything is served, and stops in one place.
//!
//! [`Parts`] is what differs between the agent, the demo and a test. [`build`] opens sockets and reports what it bound;
//! nothing answers until [`Bound::run`]. The first long-lived task to end, for whatever reason, stops the process.

use std::{
    fs::{self, File, Metadata},
    io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use rustix::fs::{Mode, OFlags};
use tokio::{
    net::{TcpListener, UnixListener, UnixSocket, UnixStream},
    sync::watch,
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::{
    account::{Account, Limits},
    attest::{self, Attestor, Capabilities, Pods, token::Tokens},
    clock::Clock,
    config::RateFile,
    hub::{self, Hub},
    metrics::Metrics,
    policy::PolicySet,
    rate::Rate,
    server::{
        Engine, Server,
        admin::{Admin, Readiness},
        health, stop,
    },
    signer::Sign,
    tasks::{TaskError, Tasks},
};

/// Anyone may connect: who they are comes from the kernel, what they get from policy.
const SOCKET_MODE: u32 = 0o666;
/// Connections that wait to be accepted: as many as the kernel allows (`net.core.somaxconn`).
const BACKLOG: u32 = u32::MAX;
/// How often signers are asked whether they could sign.
const READINESS_INTERVAL: Duration = Duration::from_secs(5);

/// A long-lived part that runs beside the hub and the server until the stop.
pub type Background = (&'static str, Pin<Box<dyn Future<Output = ()> + Send>>);

/// What an agent is made of.
pub struct Parts {
    /// Path of the socket; its folder must exist.
    pub socket: PathBuf,
    /// Listener for metrics and readiness.
    pub admin: Option<SocketAddr>,
    /// Wall clock.
    pub clock: Clock,
    /// Policies in force.
    pub policies: watch::Receiver<Arc<PolicySet>>,
    /// The cluster, for an agent in one.
    pub cluster: Option<Cluster>,
    /// Signers, the default one first.
    pub signers: Vec<Arc<dyn Sign>>,
    /// Issuances of all signers together.
    pub signer_rate: Rate,
    /// Issuances of one workload's user.
    pub principal_rate: Rate,
    /// Bounds on what callers hold.
    pub limits: Limits,
    /// Seed of the renewal jitter.
    pub seed: u64,
    /// Counters and gauges.
    pub metrics: Metrics,
    /// What operators ask before they send work here.
    pub readiness: Readiness,
    /// Parts that keep policies and signers current.
    pub background: Vec<Background>,
    /// Stops everything.
    pub stop: CancellationToken,
}

/// What an agent knows of its cluster.
pub struct Cluster {
    /// The node it is on.
    pub node: String,
    /// UID of the pod it runs in, when it runs in one.
    pub own_pod: Option<String>,
    /// Whether the policies have been read; a denial before that says nothing about its caller.
    pub policies_synced: watch::Receiver<bool>,
    /// The pods of the node; to be run in the background.
    pub pods: Pods,
    /// Reviews tokens.
    pub tokens: Tokens,
}

/// An agent whose sockets are open.
pub struct Bound {
    /// Path of the socket.
    pub socket: PathBuf,
    /// The socket's file; held, so that its inode number is no other file's.
    file: File,
    /// Address of the operators' listener.
    pub admin: Option<SocketAddr>,
    tasks: Tasks,
}

/// Why an agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The socket's path is something else than a socket.
    #[error("{} is there and is no socket; remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// Somebody answers on the socket.
    #[error("{} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The socket cannot be made.
    #[error("cannot listen on {}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The operators' listener cannot be made.
    #[error("cannot listen on {address} for metrics and readiness")]
    Admin {
        /// Its address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The kernel does not say where this process is.
    #[error("cannot read the agent's own cgroup, by which pods are told from processes of the host")]
    OwnCgroup(#[source] io::Error),
}

impl From<RateFile> for Rate {
    fn from(rate: RateFile) -> Self {
        Self { per_second: rate.per_second, burst: rate.burst }
    }
}

/// Opens every socket and starts every part; call from within the runtime.
pub async fn build(parts: Parts) -> Result<Bound, BuildError> {
    let (listener, file) = listen(&parts.socket, SOCKET_MODE).await?;
    let admin = match parts.admin {
        Some(address) => {
            let listening = TcpListener::bind(address).await;
            Some(listening.map_err(|source| BuildError::Admin { address, source })?)
        }
        None => None,
    };
    let admin_address = admin.as_ref().and_then(|listener| listener.local_addr().ok());

    let stop = parts.stop;
    let mut tasks = Tasks::new(stop.clone());
    let (pods, policies) = match &parts.cluster {
        None => (None, parts.policies),
        Some(cluster) => {
            let (in_force, policies) = watch::channel(Arc::default());
            let (synced, pods) = (cluster.policies_synced.clone(), cluster.pods.clone());
            tasks.spawn("policies in force", put_in_force(parts.policies, synced, in_force, pods, stop.clone()));
            (Some(cluster.pods.clone()), policies)
        }
    };
    let attestor = Arc::new(attestor(parts.cluster).map_err(BuildError::OwnCgroup)?);
    let signers = parts.signers.clone();
    let default_signer = signers.first().map(|signer| signer.name().to_owned()).unwrap_or_default();
    let operator_uid = rustix::process::geteuid().as_raw();
    let account = Account::new(parts.limits, operator_uid, &parts.metrics);
    let hub = Hub::new(hub::Parts {
        clock: parts.clock,
        policies: policies.clone(),
        pods: pods.clone(),
        signers: parts.signers,
        signer_rate: parts.signer_rate,
        principal_rate: parts.principal_rate,
        account: account.clone(),
        seed: parts.seed,
        metrics: parts.metrics.clone(),
    });
    let (reporter, health_service) = health::service(parts.readiness.clone());
    let engine = Engine {
        hub: hub.clone(),
        attestor: attestor.clone(),
        default_signer,
        operator_uid,
        account,
        metrics: parts.metrics.clone(),
        stop: stop.clone(),
    };
    let server = Server::new(engine, Routes::new(health_service));

    tasks.spawn("hub", hub.run(stop.clone()));
    tasks.spawn("server", server.serve(listener));
    tasks.spawn("attestor", follow_policies(attestor, policies, signers.clone(), stop.clone()));
    tasks.spawn("readiness", watch_readiness(signers, pods, parts.readiness.clone(), stop.clone()));
    tasks.spawn("health", health::report(reporter, parts.readiness.clone(), stop.clone()));
    if let Some(listener) = admin {
        tasks
            .spawn("admin", Admin { metrics: parts.metrics, readiness: parts.readiness }.serve(listener, stop.clone()));
    }
    for (name, part) in parts.background {
        tasks.spawn(name, part);
    }
    Ok(Bound { socket: parts.socket, file, admin: admin_address, tasks })
}

impl Bound {
    /// Runs until the stop or the first part that ends, then removes the socket.
    pub async fn run(self) -> Result<(), TaskError> {
        let ended = self.tasks.run(stop::AGENT).await;
        remove(&self.socket, &self.file);
        ended
    }
}

/// What attests callers, and in the log what it can tell on this host.
fn attestor(cluster: Option<Cluster>) -> io::Result<Attestor> {
    let attestor = Attestor::new();
    let kernel = attestor.capabilities();
    let Some(Cluster { node, own_pod, pods, tokens, .. }) = cluster else {
        tracing::info!(%kernel, "attests processes of this host; one in a pod is a process like any other");
        return Ok(attestor);
    };
    let attestor = attestor.in_cluster(pods, tokens, own_pod)?;
    tracing::info!(%kernel, node, "attests the pods of this node, and processes outside of pods by their user");
    if !attestor.sees_other_pods() {
        tracing::warn!("only the agent's own pod can be told: its pod spec needs hostPID: true");
    }
    Ok(attestor)
}

/// Puts each set of policies in force, in an agent or a controller, before anybody can be judged without a fact that it asks
/// for and that has only not been read yet. No pod is told before all facts of the first set are there, so that one is in
/// force at once; a later one waits for its facts under the set before it.
pub(crate) async fn put_in_force(
    mut read: watch::Receiver<Arc<PolicySet>>,
    mut synced: watch::Receiver<bool>,
    in_force: watch::Sender<Arc<PolicySet>>,
    pods: Pods,
    stop: CancellationToken,
) {
    let all = async {
        if synced.wait_for(|synced| *synced).await.is_err() {
            return std::future::pending().await;
        }
        let mut told = false;
        loop {
            let policies = read.borrow_and_update().clone();
            let services = policies.needs_services();
            if !told {
                in_force.send_replace(policies.clone());
            }
            // What the old policies ask for stays until they are out of force.
            pods.want_services(services || in_force.borrow().needs_services());
            tokio::select! {
                biased;
                () = pods.until_synced() => {
                    if std::mem::replace(&mut told, true) {
                        in_force.send_replace(policies);
                    }
                    pods.want_services(services);
                }
                Ok(()) = read.changed() => continue,
            }
            if read.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    };
    stop.run_until_cancelled(all).await;
}

/// Hashes executables only while a policy asks for it, and says which policies name a signer that nobody has.
async fn follow_policies(
    attestor: Arc<Attestor>,
    mut policies: watch::Receiver<Arc<PolicySet>>,
    signers: Vec<Arc<dyn Sign>>,
    stop: CancellationToken,
) {
    loop {
        let in_force = policies.borrow_and_update().clone();
        attestor.set_hash_executables(in_force.needs_executable_sha256());
        for unknown in in_force.signers().into_iter().filter(|name| signers.iter().all(|signer| signer.name() != *name))
        {
            tracing::warn!(signer = unknown, "a policy names a signer that this agent does not have");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = policies.changed() => if changed.is_err() {
                return stop.cancelled().await;
            },
        }
    }
}

/// Ready while every signer could sign and, in a cluster, pods can be told.
async fn watch_readiness(
    signers: Vec<Arc<dyn Sign>>,
    pods: Option<Pods>,
    readiness: Readiness,
    stop: CancellationToken,
) {
    let condition = readiness.condition("signers");
    let pods = pods.map(|pods| (pods, readiness.condition("pods")));
    loop {
        if let Some((pods, condition)) = &pods {
            match pods.ready() {
                Ok(()) => condition.holds(),
                Err(why) => condition.fails(why),
            }
        }
        match signers.iter().find_map(|signer| Some((signer.name(), signer.ready().err()?))) {
            Some((name, error)) => condition.fails(format!("{name}: {error}")),
            None => condition.holds(),
        }
        if stop.run_until_cancelled(sleep(READINESS_INTERVAL)).await.is_none() {
            return;
        }
    }
}

/// A listener at `path`, in place of a socket that nobody answers on any more, and the socket's file, of this `mode`.
pub(crate) async fn listen(path: &Path, mode: u32) -> Result<(UnixListener, File), BuildError> {
    let failed = |source| BuildError::Socket { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(BuildError::NotASocket(path.to_owned())),
        Ok(_) if UnixStream::connect(path).await.is_ok() => return Err(BuildError::InUse(path.to_owned())),
        Ok(_) => fs::remove_file(path).map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let socket = UnixSocket::new_stream().map_err(failed)?;
    // Before anybody can connect: a connection has these options from the listener, as it was when the client connected.
    attest::prepare_listener(&socket, Capabilities::probe()).map_err(failed)?;
    socket.bind(path).map_err(failed)?;
    let listener = socket.listen(BACKLOG).map_err(failed)?;
    // A socket cannot be opened, only held on to: O_PATH, open(2). Not by OpenOptions, which drops that flag on musl.
    let file = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| failed(error.into()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)?;
    Ok((listener, file.into()))
}

/// Removes the socket at `path` if it is still ours. A successor may have taken the path over while this agent stopped;
/// one that does so between the look and the removal loses its name, as the file system has no single step for both.
fn remove(path: &Path, ours: &File) {
    let same = |there: Metadata, ours: Metadata| (there.dev(), there.ino()) == (ours.dev(), ours.ino());
    if fs::symlink_metadata(path).and_then(|there| Ok(same(there, ours.metadata()?))).unwrap_or(false) {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_has_the_mode_that_was_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        for mode in [SOCKET_MODE, health::SOCKET_MODE] {
            let path = folder.path().join(format!("{mode:o}"));
            let _listening = listen(&path, mode).await.unwrap();
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, mode);
        }
    }

    #[tokio::test]
    async fn only_the_own_socket_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (first, old) = listen(&path, SOCKET_MODE).await.unwrap();
        drop(first);
        let (_second, new) = listen(&path, SOCKET_MODE).await.unwrap();
        remove(&path, &old);
        assert!(UnixStream::connect(&path).await.is_ok(), "the successor's");
        remove(&path, &new);
        assert!(!path.exists());
        remove(&path, &new);
    }
}
