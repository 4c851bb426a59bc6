//! The process at the other end of a socket, held so that it cannot be confused with another.
//!
//! A process id is a number that is used again. A [`Peer`] holds a pidfd and a handle to `/proc/PID` instead, taken
//! while that process was known to be alive; both belong to the process and never to a later one. What the process *is*
//! may change under the same handles (it may exec, or change its user): [`Peer::observe`] is the cheap question whether
//! it has.

use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    net::sockopt,
    process::{Pid, PidfdFlags, pidfd_open},
    time::ClockId,
};
use tokio::io::unix::AsyncFd;

use super::{
    Accepted, AttestError, Attested, Attestor,
    kernel::{self, Capabilities, Sender},
    proc::{FileId, ProcHandle},
};

/// The process that connected a socket.
pub struct Peer {
    pid: u32,
    connected: Ids,
    real_uid: u32,
    pidfd: AsyncFd<OwnedFd>,
    handle: ProcHandle,
    capabilities: Capabilities,
    attested: Mutex<Option<Attested>>,
    passed: OnceLock<AttestError>,
}

/// Effective ids of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ids {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// What tells that a process is not what it was: compared as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Observation {
    pub(super) ids: Ids,
    /// `None` when this agent may not see it, or the process's main thread has ended.
    pub(super) executable: Option<FileId>,
    /// `None` where the kernel does not tell (before Linux 6.13).
    cgroup: Option<u64>,
}

impl Peer {
    /// Takes hold of the process that made a connection, and makes the kernel name the writer of all that is read from
    /// it. Call it as soon as the connection is accepted, on a tokio runtime.
    ///
    /// # Errors
    /// The process has exited, or cannot be seen from here: see [`AttestError`].
    pub fn of(accepted: &Accepted, attestor: &Attestor) -> Result<Self, AttestError> {
        let (capabilities, now) = (attestor.capabilities(), boot_ticks());
        let stream = accepted.get_ref();
        // Inherited from a prepared listener; without one, what was written before now has no writer and is refused.
        sockopt::set_socket_passcred(stream, true).map_err(|error| unreadable("SO_PASSCRED")(error.into()))?;
        let connected = stream.peer_cred().map_err(unreadable("SO_PEERCRED"))?;
        // Zero is the kernel's word for a process that has no number here.
        let number = connected.pid().and_then(Pid::from_raw).ok_or(AttestError::ForeignPidNamespace)?;
        let connected = Ids { uid: connected.uid(), gid: connected.gid() };
        if capabilities.peer_pidfd {
            let pidfd = kernel::peer_pidfd(stream.as_fd()).map_err(gone_or("SO_PEERPIDFD"))?;
            Self::hold(number, connected, pidfd, None, capabilities)
        } else {
            let pidfd = pidfd_open(number, PidfdFlags::empty());
            let pidfd = pidfd.map_err(|error| gone_or("pidfd_open")(error.into()))?;
            Self::hold(number, connected, pidfd, Some(now), capabilities)
        }
    }

    /// Opens by `number` what belongs to the process of `pidfd`, which must have started by `latest` (ticks since
    /// boot).
    ///
    /// Where the kernel has no `SO_PEERPIDFD`, a connection tells its peer's number only, and `pidfd` is of whoever had
    /// that number when it was accepted. Such a process started too late to have connected, unless it took the number
    /// over between connecting and accepting; it is then still of the user and group that connected.
    fn hold(
        number: Pid,
        connected: Ids,
        pidfd: OwnedFd,
        latest: Option<u64>,
        capabilities: Capabilities,
    ) -> Result<Self, AttestError> {
        let pid = number.as_raw_pid().unsigned_abs();
        let opened = ProcHandle::open(pid);
        // A process that has not exited still has its number: what was just opened by that number is the same process.
        require_alive(pidfd.as_fd())?;
        // Alive and yet absent: /proc is mounted with hidepid.
        let handle = opened.map_err(unreadable("/proc/PID"))?;
        let started = || handle.start_ticks().map_err(gone_or("/proc/PID/stat"));
        if let Some(latest) = latest
            && started()? > latest
        {
            return Err(AttestError::PidReused { pid });
        }
        let real_uid = if capabilities.pidfd_info {
            kernel::process_ids(pidfd.as_fd()).map_err(gone_or("PIDFD_GET_INFO"))?.real_uid
        } else {
            handle.status().map_err(gone_or("/proc/PID/status"))?.real_uid
        };
        let pidfd = kernel::watch_readable(pidfd).map_err(unreadable("pidfd"))?;
        Ok(Self {
            pid,
            connected,
            real_uid,
            pidfd,
            handle,
            capabilities,
            attested: Mutex::new(None),
            passed: OnceLock::new(),
        })
    }

    /// Process id, for logs and traces: it identifies nothing.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Effective user id when it connected, the key for limits on a caller that is not attested yet.
    pub fn uid(&self) -> u32 {
        self.connected.uid
    }

    /// Resolves when the process has exited; any number of tasks may wait.
    pub async fn exited(&self) {
        if self.pidfd.readable().await.is_err() {
            // The runtime is going away, and this task with it.
            std::future::pending().await
        }
    }

    /// Whether the kernel named this process as the writer of a message.
    pub(super) fn wrote(&self, sender: Option<Sender>) -> bool {
        sender.is_some_and(|sender| u32::try_from(sender.pid) == Ok(self.pid) && sender.uid == self.real_uid)
    }

    /// Keeps why the connection was broken off: its error's own type does not live through an HTTP/2 library.
    pub(super) fn broke_off(&self, error: AttestError) {
        self.passed.get_or_init(|| error);
    }

    /// Why the connection was broken off, if it was.
    pub(super) fn passed(&self) -> Option<&AttestError> {
        self.passed.get()
    }

    pub(super) fn handle(&self) -> &ProcHandle {
        &self.handle
    }

    pub(super) fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// The last attestation.
    pub(super) fn attested(&self) -> Option<Attested> {
        self.attested.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn remember(&self, attested: Attested) {
        *self.attested.lock().unwrap_or_else(PoisonError::into_inner) = Some(attested);
    }

    /// What the process is now: two system calls, or three before Linux 6.13.
    ///
    /// # Errors
    /// It has exited, or its effective ids are no longer those it connected with.
    pub(super) fn observe(&self) -> Result<Observation, AttestError> {
        let executable = match self.handle.executable() {
            Ok(file) => Some(file),
            Err(error) if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound) => None,
            Err(error) => return Err(gone_or("/proc/PID/exe")(error)),
        };
        let pidfd = self.pidfd.get_ref().as_fd();
        let (uid, gid, cgroup) = if self.capabilities.pidfd_info {
            let ids = kernel::process_ids(pidfd).map_err(gone_or("PIDFD_GET_INFO"))?;
            (ids.uid, ids.gid, Some(ids.cgroup))
        } else {
            let (uid, gid) = self.handle.owner().map_err(gone_or("/proc/PID"))?;
            (uid, gid, None)
        };
        // Only a live process has a program, and the ids behind a pidfd are its own to the end. What else is read of one
        // that has exited looks like root's, so this comes last.
        if executable.is_none() || !self.capabilities.pidfd_info {
            require_alive(pidfd)?;
        }
        let ids = Ids { uid, gid };
        if ids != self.connected {
            let Ids { uid, gid } = self.connected;
            return Err(AttestError::IdsChanged { uid, gid, uid_now: ids.uid, gid_now: ids.gid });
        }
        Ok(Observation { ids, executable, cgroup })
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer").field("pid", &self.pid).field("connected", &self.connected).finish_non_exhaustive()
    }
}

/// Clock ticks since boot, as `/proc/PID/stat` counts them.
fn boot_ticks() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Boottime);
    let ticks_per_second = rustix::param::clock_ticks_per_second();
    now.tv_sec as u64 * ticks_per_second + now.tv_nsec as u64 * ticks_per_second / 1_000_000_000
}

/// A pidfd becomes readable when its process has exited (pidfd_open(2)).
fn require_alive(pidfd: BorrowedFd<'_>) -> Result<(), AttestError> {
    let mut polled = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    match rustix::event::poll(&mut polled, Some(&Timespec::default())) {
        Ok(0) => Ok(()),
        Ok(_) => Err(AttestError::Exited),
        Err(error) => Err(unreadable("pidfd")(error.into())),
    }
}

/// An error of reading something of a process: that it has exited, or what could not be read.
pub(super) fn gone_or(what: &'static str) -> impl Fn(io::Error) -> AttestError {
    move |error| match Errno::from_io_error(&error) {
        Some(Errno::SRCH | Errno::NOENT) => AttestError::Exited,
        _ => unreadable(what)(error),
    }
}

fn unreadable(what: &'static str) -> impl Fn(io::Error) -> AttestError {
    move |source| AttestError::Unreadable { what, source: Arc::new(source) }
}

#[cfg(test)]
impl Peer {
    /// Any process, as if it had connected.
    pub(super) fn of_process(process: &std::process::Child, attestor: &Attestor) -> Result<Self, AttestError> {
        let number = Pid::from_child(process);
        let (uid, gid) =
            ProcHandle::open(process.id()).and_then(|handle| handle.owner()).map_err(gone_or("/proc/PID"))?;
        let pidfd = pidfd_open(number, PidfdFlags::empty()).map_err(|error| gone_or("pidfd_open")(error.into()))?;
        Self::hold(number, Ids { uid, gid }, pidfd, None, attestor.capabilities())
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleeper() -> Child {
        Command::new("sleep").arg("60").spawn().unwrap()
    }

    fn hold(process: &Child, latest: Option<u64>) -> Result<Peer, AttestError> {
        let number = Pid::from_child(process);
        let pidfd = pidfd_open(number, PidfdFlags::empty()).unwrap();
        Peer::hold(number, Ids { uid: 0, gid: 0 }, pidfd, latest, Capabilities::probe())
    }

    fn end(mut process: Child) {
        process.kill().unwrap();
        process.wait().unwrap();
    }

    #[tokio::test]
    async fn a_process_that_started_after_the_connection_was_accepted_is_refused() {
        let process = sleeper();
        let started = ProcHandle::open(process.id()).unwrap().start_ticks().unwrap();
        assert!(started <= boot_ticks(), "both count from boot");
        assert!(hold(&process, Some(started)).is_ok());
        assert_eq!(hold(&process, Some(started - 1)).unwrap_err().reason(), "PEER_PID_REUSED");
        end(process);
    }

    #[tokio::test]
    async fn a_number_whose_process_is_gone_is_refused_whoever_has_it_now() {
        let (first, second) = (sleeper(), sleeper());
        let number = Pid::from_child(&second);
        let pidfd = pidfd_open(Pid::from_child(&first), PidfdFlags::empty()).unwrap();
        end(first);
        let held = Peer::hold(number, Ids { uid: 0, gid: 0 }, pidfd, None, Capabilities::probe());
        assert_eq!(held.unwrap_err().reason(), "PEER_EXITED");
        end(second);
    }

    #[tokio::test]
    async fn a_process_that_has_exited_and_is_not_yet_reaped_is_refused() {
        let attestors = [Attestor::new(), Attestor::with_capabilities(Capabilities::of_linux_5_10())];
        for attestor in attestors {
            let mut process = sleeper();
            let peer = Peer::of_process(&process, &attestor).unwrap();
            assert!(peer.observe().is_ok());
            process.kill().unwrap();
            peer.exited().await;
            assert_eq!(peer.observe().unwrap_err().reason(), "PEER_EXITED");
            assert_eq!(Peer::of_process(&process, &attestor).unwrap_err().reason(), "PEER_EXITED");
            process.wait().unwrap();
            assert_eq!(peer.observe().unwrap_err().reason(), "PEER_EXITED");
        }
    }

    #[tokio::test]
    async fn a_process_that_shows_other_ids_than_it_connected_with_is_refused() {
        let process = sleeper();
        for capabilities in [Capabilities::probe(), Capabilities::of_linux_5_10()] {
            let (uid, gid) = ProcHandle::open(process.id()).unwrap().owner().unwrap();
            for ids in [Ids { uid: uid + 1, gid }, Ids { uid, gid: gid + 1 }] {
                let pidfd = pidfd_open(Pid::from_child(&process), PidfdFlags::empty()).unwrap();
                let peer = Peer::hold(Pid::from_child(&process), ids, pidfd, None, capabilities).unwrap();
                assert_eq!(peer.observe().unwrap_err().reason(), "PEER_IDS_CHANGED");
            }
        }
        end(process);
    }

    #[tokio::test]
    async fn only_the_peers_own_bytes_are_its_bytes() {
        let process = sleeper();
        let peer = hold(&process, None).unwrap();
        let (pid, uid) = (process.id() as i32, peer.real_uid);
        assert!(peer.wrote(Some(Sender { pid, uid })));
        for other in
            [None, Some(Sender { pid: pid + 1, uid }), Some(Sender { pid: 0, uid }), Some(Sender { pid, uid: uid + 1 })]
        {
            assert!(!peer.wrote(other), "{other:?}");
        }
        end(process);
    }
}
