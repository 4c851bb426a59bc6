//! Who is calling: from a connected socket to a [`Workload`].
//!
//! [`PeerStream`] holds a connection to one process and lets through only bytes that this process wrote; [`Peer`] is that
//! process. [`Attestor::attest`] reads what the kernel says about it. It is called for every request: a process that has
//! exited or changed its user is refused, and one that has become another program is what it is now, never what it was.
//!
//! Facts are proven or absent; one that cannot be proven (an executable at a path of a private mount, a cgroup seen from a
//! container) is absent, and matches no rule. Deliberately not a fact: anything the process can write about itself, such as
//! its name, its command line or its environment.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use self::{
    executable::Executables,
    names::Names,
    peer::{Observation, gone_or},
};
pub use self::{
    kernel::Capabilities,
    peer::Peer,
    stream::{PeerStream, prepare_listener},
    workload::{UnixFacts, Workload},
};
use crate::clock::Clock;

mod cgroup;
mod executable;
mod kernel;
mod names;
mod peer;
mod proc;
mod stream;
mod workload;

/// How long facts are used without being read again. What a request's own check sees (exit, exec, user and group, from
/// Linux 6.13 the cgroup) is never older than the request; this bounds the age of the rest: supplementary groups, names.
const FACTS_FRESH_FOR: Duration = Duration::from_secs(1);
/// Readings of a process that changes under them before it is refused.
const READ_ATTEMPTS: usize = 5;
/// What stands for every id that has no number in a user namespace (`/proc/sys/kernel/overflowuid`, by default).
const OVERFLOW_ID: u32 = 65534;

/// Attests processes of this host.
#[derive(Debug)]
pub struct Attestor {
    capabilities: Capabilities,
    executables: Executables,
    hash_executables: AtomicBool,
    users: Names,
    groups: Names,
}

/// One attestation of a peer.
#[derive(Clone, Debug)]
struct Attested {
    observation: Observation,
    hashed: bool,
    at: Instant,
    workload: Arc<Workload>,
}

impl Attestor {
    /// An attestor that uses all that this kernel offers, and takes names from `/etc/passwd` and `/etc/group`.
    pub fn new() -> Self {
        Self::with_capabilities(Capabilities::probe())
    }

    /// An attestor that uses no more than these capabilities, as on an older kernel.
    pub fn with_capabilities(capabilities: Capabilities) -> Self {
        Self {
            capabilities,
            executables: Executables::new(Clock::system()),
            hash_executables: AtomicBool::new(false),
            users: Names::in_file("/etc/passwd"),
            groups: Names::in_file("/etc/group"),
        }
    }

    /// What it uses of this kernel, for the log at start.
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Whether the SHA-256 of executables is a fact from now on. It is when a policy asks for it.
    pub fn set_hash_executables(&self, hash: bool) {
        self.hash_executables.store(hash, Ordering::Relaxed);
    }

    /// What is proven about the peer now.
    ///
    /// Equal facts of one peer are the same `Arc`. Waits only to hash an executable, or to look one up on a file system
    /// that has to be asked; facts read less than a second ago are confirmed in three system calls.
    ///
    /// # Errors
    /// See [`AttestError`]; [`AttestError::is_transient`] tells whether to ask again.
    pub async fn attest(&self, peer: &Peer) -> Result<Arc<Workload>, AttestError> {
        let hashed = self.hash_executables.load(Ordering::Relaxed);
        let last = peer.attested();
        if let Some(last) = &last
            && last.hashed == hashed
            && last.at.elapsed() < FACTS_FRESH_FOR
            && peer.observe()? == last.observation
        {
            return Ok(Arc::clone(&last.workload));
        }
        let (observation, facts) = self.read(peer, hashed).await?;
        let workload = match last {
            Some(last) if *last.workload.unix() == facts => last.workload,
            _ => Arc::new(Workload { unix: facts }),
        };
        peer.remember(Attested { observation, hashed, at: Instant::now(), workload: Arc::clone(&workload) });
        Ok(workload)
    }

    /// Reads all facts between two equal observations, so that all of them were true at one time.
    async fn read(&self, peer: &Peer, hashed: bool) -> Result<(Observation, UnixFacts), AttestError> {
        for _ in 0..READ_ATTEMPTS {
            let before = peer.observe()?;
            let facts = self.read_once(peer, &before, hashed).await?;
            if peer.observe()? == before && (facts.uid, facts.gid) == (before.ids.uid, before.ids.gid) {
                return Ok((before, facts));
            }
        }
        Err(AttestError::KeepsChanging { pid: peer.pid() })
    }

    async fn read_once(&self, peer: &Peer, seen: &Observation, hashed: bool) -> Result<UnixFacts, AttestError> {
        let handle = peer.handle();
        let status = handle.status().map_err(gone_or("/proc/PID/status"))?;
        if !peer.capabilities().all_users && (status.uid == OVERFLOW_ID || status.gid == OVERFLOW_ID) {
            return Err(AttestError::ForeignUserNamespace);
        }
        let text = handle.cgroup().map_err(gone_or("/proc/PID/cgroup"))?;
        let cgroup = cgroup::path(&text)
            .map_err(|conflict| AttestError::CgroupsDisagree { one: conflict.one, other: conflict.other })?;
        let cgroup = cgroup.filter(|_| peer.capabilities().host_cgroups);
        let (mut path, mut sha256) = (None, None);
        if let Some(file) = seen.executable {
            path = self.executables.path(handle, file, status.uid).await.map_err(gone_or("the executable's path"))?;
            if hashed {
                sha256 = self.executables.sha256(handle, file, status.uid).await.map_err(gone_or("the executable"))?;
            }
        }
        Ok(UnixFacts {
            user: self.users.of(status.uid),
            group: self.groups.of(status.gid),
            uid: status.uid,
            gid: status.gid,
            supplementary_gids: status.groups,
            executable: path,
            executable_sha256: sha256,
            systemd_unit: cgroup.and_then(cgroup::unit).map(str::to_owned),
            cgroup: cgroup.map(str::to_owned),
        })
    }
}

impl Default for Attestor {
    fn default() -> Self {
        Self::new()
    }
}

/// Whoever is at the other end of a connection.
#[derive(Clone, Debug)]
pub enum Caller {
    /// A process on this host.
    Peer(Arc<Peer>),
    /// A workload attested by nobody, for tests of what stands on attestation.
    #[cfg(any(test, feature = "testing"))]
    Fixed(Arc<Workload>),
}

impl Caller {
    /// [`Attestor::attest`].
    ///
    /// # Errors
    /// As there.
    pub async fn attest(&self, attestor: &Attestor) -> Result<Arc<Workload>, AttestError> {
        match self {
            Self::Peer(peer) => attestor.attest(peer).await,
            #[cfg(any(test, feature = "testing"))]
            Self::Fixed(workload) => Ok(Arc::clone(workload)),
        }
    }

    /// Resolves when the caller has exited.
    pub async fn exited(&self) {
        match self {
            Self::Peer(peer) => peer.exited().await,
            #[cfg(any(test, feature = "testing"))]
            Self::Fixed(_) => std::future::pending().await,
        }
    }
}

/// Why a caller was not attested.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttestError {
    /// There is nobody left to attest.
    #[error("the calling process has exited")]
    Exited,
    /// Another process holds the number of the one that connected.
    #[error("process {pid} started after the connection that names it; connect again")]
    PidReused {
        /// Process id.
        pid: u32,
    },
    /// The process is no longer who it was when it connected.
    #[error(
        "the calling process connected as uid {uid} gid {gid} and is now uid {uid_now} gid {gid_now}; connect again"
    )]
    IdsChanged {
        /// Effective user id when it connected.
        uid: u32,
        /// Effective group id when it connected.
        gid: u32,
        /// Effective user id now.
        uid_now: u32,
        /// Effective group id now.
        gid_now: u32,
    },
    /// The process exec'd, or moved to another cgroup, each time it was read.
    #[error("process {pid} changed each of {READ_ATTEMPTS} times it was examined; call again when it has settled")]
    KeepsChanging {
        /// Process id.
        pid: u32,
    },
    /// The process has no number in our pid namespace.
    #[error("the caller is in a pid namespace that this agent cannot see; run the agent in the host's (hostPID: true)")]
    ForeignPidNamespace,
    /// The process's user or group has no number in our user namespace.
    #[error("the caller's user or group has no id in this agent's user namespace; run the agent in the host's")]
    ForeignUserNamespace,
    /// Bytes on the connection were written by a process other than its peer.
    #[error("process {writer} wrote to a connection of process {peer}; each process must connect for itself")]
    SocketPassed {
        /// Process id of the one that connected.
        peer: u32,
        /// Process id of the writer; 0 when it has none here.
        writer: i32,
    },
    /// The kernel places the process in two units.
    #[error(
        "the caller is in cgroup {one:?} of one hierarchy and {other:?} of another; which of them counts is not known"
    )]
    CgroupsDisagree {
        /// Path in one hierarchy.
        one: String,
        /// Path in another.
        other: String,
    },
    /// Something could not be read.
    #[error("cannot read {what} of the calling process")]
    Unreadable {
        /// What was read.
        what: &'static str,
        /// Why not.
        source: Arc<io::Error>,
    },
}

impl AttestError {
    /// A stable name for metrics and for `google.rpc.ErrorInfo`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Exited => "PEER_EXITED",
            Self::PidReused { .. } => "PEER_PID_REUSED",
            Self::IdsChanged { .. } => "PEER_IDS_CHANGED",
            Self::KeepsChanging { .. } => "PEER_KEEPS_CHANGING",
            Self::ForeignPidNamespace => "PEER_FOREIGN_PID_NAMESPACE",
            Self::ForeignUserNamespace => "PEER_FOREIGN_USER_NAMESPACE",
            Self::SocketPassed { .. } => "PEER_SOCKET_PASSED",
            Self::CgroupsDisagree { .. } => "PEER_CGROUPS_DISAGREE",
            Self::Unreadable { .. } => "ATTEST_UNREADABLE",
        }
    }

    /// Whether the same call on the same connection may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::KeepsChanging { .. } | Self::Unreadable { .. })
    }
}
