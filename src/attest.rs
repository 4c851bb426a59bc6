//! Who is calling: from a connected socket to a [`Workload`].
//!
//! [`Accepted`] holds a connection, however it ends; [`PeerStream`] lets through only bytes that one process wrote; [`Peer`]
//! is that process. [`Attestor::attest`] reads what the kernel says about it. It is called for every request: a process
//! that has exited or changed its user is refused, and one that has become another program is what it is now, never
//! what it was.
//!
//! Facts are proven or absent; one that cannot be proven (an executable at a path of a private mount, a cgroup seen
//! from a container) is absent, and matches no rule. Deliberately not a fact: anything the process can write about
//! itself, such as its name, its command line or its environment.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{net::UnixStream, time::Instant};

use self::{
    cgroup::View,
    closer::Closer,
    cluster::Cluster,
    executable::Executables,
    names::Names,
    owners::Owners,
    peer::{Observation, gone_or},
    proc::{FileId, ProcHandle},
};
pub use self::{
    kernel::{Capabilities, watch_readable},
    peer::Peer,
    pods::Pods,
    stream::{Accepted, PeerStream, prepare_listener},
    token::{Token, TokenError, Tokens},
    workload::{Facts, PodFacts, UnixFacts, Workload},
};
use crate::{
    account::Principal,
    clock::Clock,
    kubernetes::{MAX_LABELS, MAX_POD_BYTES},
};

mod cgroup;
mod closer;
mod cluster;
mod executable;
mod kernel;
mod names;
mod owners;
mod peer;
pub mod pods;
mod proc;
mod shares;
mod stream;
pub mod token;
mod workload;

/// How long facts are used without being read again. What a request's own check sees (exit, exec, user and group, and
/// from Linux 6.13 the cgroup) is never older than the request; this bounds the age of the rest, such as names and
/// supplementary groups.
const FACTS_FRESH_FOR: Duration = Duration::from_secs(1);
/// Readings of a process that changes under them before it is refused.
const READ_ATTEMPTS: usize = 5;
/// Supplementary groups that a caller may be in; Linux allows 65536, which would take milliseconds to read each time.
pub const MAX_GROUPS: usize = 1024;
/// What stands for every id that has no number in a user namespace (`/proc/sys/kernel/overflowuid`, by default).
const OVERFLOW_ID: u32 = 65534;

/// Attests processes of this host and, in a cluster, pods.
#[derive(Debug)]
pub struct Attestor {
    capabilities: Capabilities,
    cluster: Option<Cluster>,
    executables: Executables,
    hash_executables: AtomicBool,
    users: Names,
    groups: Names,
    owners: Owners,
    closer: Closer,
}

/// One attestation of a peer.
#[derive(Clone, Debug)]
struct Attested {
    observation: Observation,
    hashed: bool,
    at: Instant,
    workload: Arc<Workload>,
}

impl Attested {
    /// The path that was proven then, if `file` is what the process ran then: an upgrade takes the name of a file that goes
    /// on running, and a file that never had this name is another one.
    fn path_of(&self, file: &FileId) -> Option<String> {
        self.observation.executable.filter(|then| file.is_still(then))?;
        self.workload.unix()?.executable.clone()
    }
}

/// What one reading of a peer says it is.
enum Seen {
    Process(UnixFacts),
    Pod(Arc<Workload>),
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
            cluster: None,
            executables: Executables::new(Clock::system()),
            hash_executables: AtomicBool::new(false),
            users: Names::in_file("/etc/passwd"),
            groups: Names::in_file("/etc/group"),
            owners: Owners::in_files("/etc/subuid", "/etc/passwd"),
            closer: Closer::default(),
        }
    }

    /// Takes a connection that was accepted from a prepared listener. Wrap it before anything else, so that no way on
    /// which it is dropped closes it in the wrong place.
    pub fn accepted(&self, stream: UnixStream) -> Accepted {
        Accepted::new(stream, &self.closer)
    }

    /// Closes a connection that was accepted and is not wanted: at once, where it can hold no descriptor.
    pub fn turn_away(&self, socket: OwnedFd) {
        if !kernel::refuses_descriptors(socket.as_fd())
            && let Ok(stream) = UnixStream::from_std(socket.into())
        {
            drop(self.accepted(stream));
        }
    }

    /// Closes a listener, with the connections that nobody has accepted, without waiting for what they may hold.
    pub fn close_listener(&self, listener: OwnedFd) {
        stream::close_listener(listener, &self.closer);
    }

    /// From now on takes a process in a pod for that pod, or for nobody; without this it is a process of this host like
    /// any other. `own_pod` is the UID of the pod that this agent runs in, if it runs in one.
    ///
    /// # Errors
    /// The agent's own cgroup cannot be read.
    pub fn in_cluster(self, pods: Pods, tokens: Tokens, own_pod: Option<String>) -> io::Result<Self> {
        let own = ProcHandle::open(std::process::id())?.cgroup()?;
        let view = View::new(own, self.capabilities.host_cgroups);
        Ok(Self { cluster: Some(Cluster { pods, tokens, own_pod, view }), ..self })
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
    /// that has to be asked; facts read less than a second ago are confirmed in two or three system calls.
    ///
    /// # Errors
    /// See [`AttestError`]; [`AttestError::is_transient`] tells whether to ask again.
    pub async fn attest(&self, peer: &Peer) -> Result<Arc<Workload>, AttestError> {
        let hashed = self.hash_executables.load(Ordering::Relaxed);
        let last = peer.attested();
        if let Some(last) = &last
            && last.hashed == hashed
            && last.at.elapsed() < FACTS_FRESH_FOR
            && self.cluster.as_ref().is_none_or(|cluster| cluster.holds(&last.workload))
            && peer.observe()? == last.observation
        {
            return Ok(Arc::clone(&last.workload));
        }
        // Rare, and large: a future that attests is moved and kept without it.
        let (observation, seen) = Box::pin(self.read(peer, hashed)).await?;
        let workload = match (seen, last) {
            (Seen::Pod(pod), _) => pod,
            (Seen::Process(facts), Some(last)) if last.workload.unix() == Some(&facts) => last.workload,
            (Seen::Process(facts), _) => Arc::new(Workload { facts: Facts::Process(facts) }),
        };
        peer.remember(Attested { observation, hashed, at: Instant::now(), workload: Arc::clone(&workload) });
        Ok(workload)
    }

    /// Checks that a token which came with a call is of the pod that calls. Without a cluster nobody asks for one, and
    /// none is looked at.
    ///
    /// # Errors
    /// See [`TokenError`]: what is said of one of the two is not what is said of the other, or nothing is.
    pub async fn confirm(
        &self,
        workload: &Workload,
        token: &Result<Option<Token>, TokenError>,
    ) -> Result<(), AttestError> {
        match (&self.cluster, token) {
            (None, _) | (_, Ok(None)) => Ok(()),
            (Some(cluster), Ok(Some(token))) => Ok(Box::pin(cluster.confirm(workload, token)).await?),
            (Some(_), Err(malformed)) => Err(malformed.clone().into()),
        }
    }

    /// Whom bounds are counted for, before anything else is known of who connected: its pod, or else its user, or the user
    /// to whom that is subordinate; [`Principal::UNKNOWN`] when that is unclear. On a host it takes one system call.
    ///
    /// The process id may be another's by now. Then what is counted is counted for that one: bounds rest on this, rights
    /// do not.
    pub fn principal(&self, socket: BorrowedFd<'_>) -> Principal {
        let Ok(connected) = kernel::peer_credentials(socket) else { return Principal::UNKNOWN };
        let user = Principal::user(self.owners.of(connected.uid));
        let Some(cluster) = &self.cluster else { return user };
        let pid = u32::try_from(connected.pid).ok().filter(|pid| *pid > 0);
        let cgroup = pid.and_then(|pid| ProcHandle::open(pid).and_then(|process| process.cgroup()).ok());
        match cgroup.map(|cgroup| cluster.principal(&cgroup)) {
            Some(Ok(pod)) => pod.unwrap_or(user),
            Some(Err(_)) | None => Principal::UNKNOWN,
        }
    }

    /// Whether processes of other pods than the agent's own have a number here: the first process is then the host's.
    pub fn sees_other_pods(&self) -> bool {
        let Some(cluster) = &self.cluster else { return true };
        let first = ProcHandle::open(1).and_then(|first| first.cgroup());
        cluster.own_pod.is_none() || first.is_ok_and(|text| !cluster.is_own(&text))
    }

    /// Whether this is the pod that the agent runs in.
    pub fn is_own_pod(&self, workload: &Workload) -> bool {
        let own = self.cluster.as_ref().and_then(|cluster| cluster.own_pod.as_ref());
        workload.pod().is_some_and(|pod| own == Some(&pod.uid))
    }

    /// Reads all facts between two equal observations, so that all of them were true at one time.
    async fn read(&self, peer: &Peer, hashed: bool) -> Result<(Observation, Seen), AttestError> {
        for _ in 0..READ_ATTEMPTS {
            let before = peer.observe()?;
            let seen = self.read_once(peer, &before, hashed).await?;
            let same_ids = match &seen {
                Seen::Process(facts) => (facts.uid, facts.gid) == (before.ids.uid, before.ids.gid),
                Seen::Pod(_) => true,
            };
            if peer.observe()? == before && same_ids {
                return Ok((before, seen));
            }
        }
        Err(AttestError::KeepsChanging { pid: peer.pid() })
    }

    async fn read_once(&self, peer: &Peer, seen: &Observation, hashed: bool) -> Result<Seen, AttestError> {
        let text = peer.handle().cgroup().map_err(gone_or("/proc/PID/cgroup"))?;
        if let Some(cluster) = &self.cluster
            && let Some(pod) = cluster.pod_of(&text).await?
        {
            return Ok(Seen::Pod(pod));
        }
        let handle = peer.handle();
        let status = handle.status().map_err(gone_or("/proc/PID/status"))?;
        if !peer.capabilities().all_users && (status.uid == OVERFLOW_ID || status.gid == OVERFLOW_ID) {
            return Err(AttestError::ForeignUserNamespace);
        }
        if status.groups.len() > MAX_GROUPS {
            return Err(AttestError::TooManyGroups { count: status.groups.len() });
        }
        let cgroup = cgroup::path(&text)?;
        let cgroup = cgroup.filter(|_| peer.capabilities().host_cgroups);
        let (mut path, mut sha256) = (None, None);
        if let Some(file) = seen.executable {
            path = self.executables.path(handle, file, status.uid).await.map_err(gone_or("the executable's path"))?;
            path = path.or_else(|| peer.attested()?.path_of(&file));
            // Only of a file that lies on our own mounts: what a user mounts may hold one content for us and another for him.
            if hashed && path.is_some() {
                sha256 = self.executables.sha256(handle, file, status.uid).await.map_err(gone_or("the executable"))?;
            }
        }
        Ok(Seen::Process(UnixFacts {
            user: self.users.of(status.uid),
            group: self.groups.of(status.gid),
            uid: status.uid,
            owner: self.owners.of(status.uid),
            gid: status.gid,
            supplementary_gids: status.groups,
            executable: path,
            executable_sha256: sha256,
            systemd_unit: cgroup.and_then(cgroup::unit).map(str::to_owned),
            cgroup: cgroup.map(str::to_owned),
        }))
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

    /// [`AttestError::SocketPassed`] or [`AttestError::SentDescriptors`], if that is why the connection failed.
    pub fn passed(&self) -> Option<&AttestError> {
        match self {
            Self::Peer(peer) => peer.passed(),
            #[cfg(any(test, feature = "testing"))]
            Self::Fixed(_) => None,
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
    /// A message on the connection carried file descriptors.
    #[error(
        "the caller sent file descriptors (SCM_RIGHTS), and the agent takes none; connect again and send bytes only"
    )]
    SentDescriptors,
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
    /// The process is in a cgroup that looks like a pod's and proves none.
    #[error(
        "the caller's cgroup {path:?} has the name of a pod's and not its place, or names no container; \
         it is taken neither for that pod nor for a process of this host"
    )]
    PodCgroup {
        /// Path of the cgroup.
        path: String,
    },
    /// No live pod is known by that UID.
    #[error("the caller is in a pod with UID {uid:?}, which is not known: {why}")]
    PodUnknown {
        /// The pod's UID.
        uid: String,
        /// Why not.
        why: String,
    },
    /// There is more of the pod, or of its namespace, than is read.
    #[error(
        "the caller is in the pod with UID {uid:?}, which counts as none: of a pod and of its namespace at most {MAX_LABELS} \
         labels and {MAX_POD_BYTES} bytes of labels, addresses and containers are read, and one of the two has more"
    )]
    PodTooLarge {
        /// The pod's UID.
        uid: String,
    },
    /// The caller's container is another pod's than its cgroup says.
    #[error("the caller's cgroup is of the pod with UID {uid:?}, and its container belongs to another pod")]
    PodContradicted {
        /// UID of the pod that its cgroup names.
        uid: String,
    },
    /// The token that came with the call does not count.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// More groups than [`MAX_GROUPS`].
    #[error("the caller is in {count} groups, at most {MAX_GROUPS} are examined")]
    TooManyGroups {
        /// How many.
        count: usize,
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
            Self::SentDescriptors => "PEER_SENT_DESCRIPTORS",
            Self::CgroupsDisagree { .. } => "PEER_CGROUPS_DISAGREE",
            Self::PodCgroup { .. } => "POD_CGROUP_UNCLEAR",
            Self::PodUnknown { .. } => "POD_UNKNOWN",
            Self::PodTooLarge { .. } => "POD_TOO_LARGE",
            Self::PodContradicted { .. } => "POD_CONTRADICTED",
            Self::Token(error) => error.reason(),
            Self::TooManyGroups { .. } => "PEER_TOO_MANY_GROUPS",
            Self::Unreadable { .. } => "ATTEST_UNREADABLE",
        }
    }

    /// Whether the same call on the same connection may succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::KeepsChanging { .. } | Self::PodUnknown { .. } | Self::Unreadable { .. } => true,
            Self::Token(error) => error.is_transient(),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{BufRead, BufReader, Write},
        path::PathBuf,
        process::{Child, ChildStdout, Command, Stdio},
    };

    use super::*;

    /// A shell that becomes, at a word, the next of several copies of itself.
    struct Changeling {
        folder: tempfile::TempDir,
        process: Child,
        output: BufReader<ChildStdout>,
    }

    /// Says that it is there, and becomes the copy that is named to it.
    const SCRIPT: &str = "echo here; read name; exec \"$1/$name\" \"$1/script\" \"$1\"";

    impl Changeling {
        /// As the copy `a`.
        fn start() -> Self {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("script"), SCRIPT).unwrap();
            let program = copy_of_sh(&folder, "a");
            let mut command = Command::new(program);
            command.arg(folder.path().join("script")).arg(folder.path());
            let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let output = BufReader::new(process.stdout.take().unwrap());
            let mut changeling = Self { folder, process, output };
            changeling.wait();
            changeling
        }

        /// As the copy `name`, by exec.
        fn become_copy(&mut self, name: &str) {
            if !self.path(name).exists() {
                copy_of_sh(&self.folder, name);
            }
            writeln!(self.process.stdin.as_ref().unwrap(), "{name}").unwrap();
            self.wait();
        }

        fn wait(&mut self) {
            let mut line = String::new();
            self.output.read_line(&mut line).unwrap();
            assert_eq!(line, "here\n");
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().canonicalize().unwrap().join(name)
        }
    }

    impl Drop for Changeling {
        fn drop(&mut self) {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }

    /// Each copy differs, in its size.
    fn copy_of_sh(folder: &tempfile::TempDir, name: &str) -> PathBuf {
        let path = folder.path().join(name);
        // Written by a process of its own: a child that another test starts at this moment would inherit a descriptor
        // that is open for writing, and exec would fail with ETXTBSY.
        let script = "cat /bin/sh > \"$1\" && printf %s \"$2\" >> \"$1\" && chmod 755 \"$1\"";
        let written = Command::new("sh").args(["-c", script, "sh"]).arg(&path).arg(name).status().unwrap();
        assert!(written.success());
        path
    }

    fn attestors() -> [Attestor; 2] {
        [Attestor::new(), Attestor::with_capabilities(Capabilities::of_linux_5_10())]
    }

    fn sha256(path: PathBuf) -> String {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &fs::read(path).unwrap());
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[tokio::test]
    async fn a_process_that_execs_is_what_it_is_now() {
        for attestor in attestors() {
            attestor.set_hash_executables(true);
            let mut process = Changeling::start();
            let peer = Peer::of_process(&process.process, &attestor).unwrap();
            for name in ["a", "b", "c"] {
                if name != "a" {
                    process.become_copy(name);
                }
                let workload = attestor.attest(&peer).await.unwrap();
                assert_eq!(workload.unix().unwrap().executable.as_deref(), process.path(name).to_str());
                assert_eq!(workload.unix().unwrap().executable_sha256, Some(sha256(process.path(name))));
            }
        }
    }

    #[tokio::test]
    async fn facts_that_are_still_true_are_the_same_workload() {
        for attestor in attestors() {
            let process = Changeling::start();
            let peer = Peer::of_process(&process.process, &attestor).unwrap();
            let first = attestor.attest(&peer).await.unwrap();
            assert!(Arc::ptr_eq(&first, &attestor.attest(&peer).await.unwrap()));
            // Read again, and found equal.
            peer.remember(Attested { at: Instant::now() - FACTS_FRESH_FOR, ..peer.attested().unwrap() });
            assert!(Arc::ptr_eq(&first, &attestor.attest(&peer).await.unwrap()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn facts_that_a_check_does_not_see_are_read_again_in_time() {
        let attestor = Attestor::new();
        let process = Changeling::start();
        let peer = Peer::of_process(&process.process, &attestor).unwrap();
        let first = attestor.attest(&peer).await.unwrap();
        let stale =
            Arc::new(Workload::for_test(UnixFacts { supplementary_gids: vec![4242], ..first.unix().unwrap().clone() }));
        let stale = Attested { workload: stale, ..peer.attested().unwrap() };
        peer.remember(stale.clone());
        assert_ne!(first, attestor.attest(&peer).await.unwrap());
        peer.remember(Attested { at: Instant::now() - FACTS_FRESH_FOR, ..stale });
        assert_eq!(first, attestor.attest(&peer).await.unwrap());
    }

    #[tokio::test]
    async fn an_executable_that_was_deleted_or_replaced_has_the_path_that_was_proven_on_the_connection_or_none() {
        async fn path(attestor: &Attestor, peer: &Peer) -> Option<PathBuf> {
            attestor.attest(peer).await.unwrap().unix().unwrap().executable.clone().map(PathBuf::from)
        }
        for attestor in attestors() {
            let mut process = Changeling::start();
            let peer = Peer::of_process(&process.process, &attestor).unwrap();
            assert_eq!(path(&attestor, &peer).await, Some(process.path("a")));
            fs::rename(process.path("a"), process.path("moved")).unwrap();
            assert_eq!(path(&attestor, &peer).await, Some(process.path("moved")));
            fs::write(process.path("a"), "another").unwrap();
            fs::rename(process.path("a"), process.path("moved")).unwrap();
            for _ in 0..2 {
                assert_eq!(path(&attestor, &peer).await, Some(process.path("moved")), "it runs what it ran");
            }
            let later = Peer::of_process(&process.process, &attestor).unwrap();
            assert_eq!(path(&attestor, &later).await, None, "nothing was proven on this connection");
            process.become_copy("b");
            fs::remove_file(process.path("b")).unwrap();
            assert_eq!(path(&attestor, &peer).await, None, "it runs a file that was never seen at a path");
        }
    }

    #[tokio::test]
    async fn a_file_that_is_named_as_if_deleted_has_no_path() {
        let attestor = Attestor::new();
        let mut process = Changeling::start();
        process.become_copy("b (deleted)");
        let peer = Peer::of_process(&process.process, &attestor).unwrap();
        assert_eq!(attestor.attest(&peer).await.unwrap().unix().unwrap().executable, None);
    }

    #[tokio::test]
    async fn executables_are_hashed_only_while_asked() {
        let attestor = Attestor::new();
        let process = Changeling::start();
        let peer = Peer::of_process(&process.process, &attestor).unwrap();
        for asked in [false, true, false] {
            attestor.set_hash_executables(asked);
            assert_eq!(attestor.attest(&peer).await.unwrap().unix().unwrap().executable_sha256.is_some(), asked);
        }
    }

    #[tokio::test]
    async fn a_process_that_changes_at_each_reading_is_refused() {
        let attestor = Attestor::new();
        attestor.set_hash_executables(true);
        let mut process = Changeling::start();
        // Beforehand, because a reading waits only so long.
        for attempt in 1..=READ_ATTEMPTS {
            copy_of_sh(&process.folder, &format!("copy{attempt}"));
        }
        let peer = Peer::of_process(&process.process, &attestor).unwrap();
        // The hash is what a reading waits for: while it waits, the process changes.
        let mut slots = attestor.executables.all_slots().await;
        let mut reading = std::pin::pin!(attestor.attest(&peer));
        for attempt in 1..=READ_ATTEMPTS {
            assert!(futures_util::poll!(&mut reading).is_pending(), "attempt {attempt}");
            process.become_copy(&format!("copy{attempt}"));
            let mut next = std::pin::pin!(attestor.executables.all_slots());
            assert!(futures_util::poll!(&mut next).is_pending(), "queued behind the reading");
            drop(slots);
            tokio::select! {
                all = next => slots = all,
                refused = &mut reading => {
                    assert_eq!(attempt, READ_ATTEMPTS);
                    assert_eq!(refused.unwrap_err().reason(), "PEER_KEEPS_CHANGING");
                    return;
                }
            };
        }
        panic!("{READ_ATTEMPTS} readings and no refusal");
    }

    #[tokio::test(start_paused = true)]
    async fn an_executable_that_cannot_be_examined_in_time_is_an_error_that_may_pass() {
        let attestor = Attestor::new();
        attestor.set_hash_executables(true);
        let process = Changeling::start();
        let peer = Peer::of_process(&process.process, &attestor).unwrap();
        let _slots = attestor.executables.all_slots().await;
        let error = attestor.attest(&peer).await.unwrap_err();
        assert_eq!((error.reason(), error.is_transient()), ("ATTEST_UNREADABLE", true));
    }

    #[tokio::test]
    async fn a_cgroup_seen_from_a_container_is_no_fact() {
        let process = Changeling::start();
        for host_cgroups in [true, false] {
            let attestor = Attestor::with_capabilities(Capabilities { host_cgroups, ..Capabilities::probe() });
            let peer = Peer::of_process(&process.process, &attestor).unwrap();
            assert_eq!(attestor.attest(&peer).await.unwrap().unix().unwrap().cgroup.is_some(), host_cgroups);
        }
    }

    #[test]
    fn errors_say_what_to_do_and_have_a_stable_reason() {
        let source = Arc::new(io::Error::from(io::ErrorKind::TimedOut));
        let errors = [
            AttestError::Exited,
            AttestError::PidReused { pid: 7 },
            AttestError::IdsChanged { uid: 0, gid: 0, uid_now: 1000, gid_now: 1001 },
            AttestError::KeepsChanging { pid: 7 },
            AttestError::ForeignPidNamespace,
            AttestError::ForeignUserNamespace,
            AttestError::SocketPassed { peer: 7, writer: 8 },
            AttestError::SentDescriptors,
            AttestError::CgroupsDisagree { one: "/a".to_owned(), other: "/b".to_owned() },
            AttestError::TooManyGroups { count: 1025 },
            AttestError::Unreadable { what: "/proc/PID/status", source },
        ];
        let lines = errors.map(|error| format!("{} {}: {error}", error.reason(), error.is_transient()));
        insta::assert_snapshot!(lines.join("\n"), @r#"
        PEER_EXITED false: the calling process has exited
        PEER_PID_REUSED false: process 7 started after the connection that names it; connect again
        PEER_IDS_CHANGED false: the calling process connected as uid 0 gid 0 and is now uid 1000 gid 1001; connect again
        PEER_KEEPS_CHANGING true: process 7 changed each of 5 times it was examined; call again when it has settled
        PEER_FOREIGN_PID_NAMESPACE false: the caller is in a pid namespace that this agent cannot see; run the agent in the host's (hostPID: true)
        PEER_FOREIGN_USER_NAMESPACE false: the caller's user or group has no id in this agent's user namespace; run the agent in the host's
        PEER_SOCKET_PASSED false: process 8 wrote to a connection of process 7; each process must connect for itself
        PEER_SENT_DESCRIPTORS false: the caller sent file descriptors (SCM_RIGHTS), and the agent takes none; connect again and send bytes only
        PEER_CGROUPS_DISAGREE false: the caller is in cgroup "/a" of one hierarchy and "/b" of another; which of them counts is not known
        PEER_TOO_MANY_GROUPS false: the caller is in 1025 groups, at most 1024 are examined
        ATTEST_UNREADABLE true: cannot read /proc/PID/status of the calling process
        "#);
    }
}
