//! The calls that have no safe wrapper, and what this kernel can do.
//!
//! All `unsafe` of attestation is here, one call a function. rustix reads the credentials of a message into a type
//! whose process id cannot be zero, but a sender in another pid namespace is numbered zero, so they are read here
//! instead.

use std::{
    fmt, io,
    mem::{self, MaybeUninit},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, CWD, StatxFlags},
    net::{AddressFamily, SocketFlags, SocketType},
    process::PidfdFlags,
};
use tokio::io::{Interest, ReadBuf, unix::AsyncFd};

/// Inode of the first cgroup namespace: `PROC_CGROUP_INIT_INO` of `linux/proc_ns.h`, fixed on every kernel.
const INITIAL_CGROUP_NAMESPACE: u64 = 0xEFFF_FFFB;
/// `SO_PASSRIGHTS` of `asm-generic/socket.h` (Linux 6.16), which the libc crate does not name. SPARC and PA-RISC number it
/// otherwise; csrd is built for neither.
const SO_PASSRIGHTS: libc::c_int = 83;
/// Room for one `struct ucred`, and for nothing after it; see [`message`].
// SAFETY: CMSG_SPACE is arithmetic on its argument.
#[allow(unsafe_code)]
const CREDENTIALS_SPACE: usize = unsafe { libc::CMSG_SPACE(mem::size_of::<libc::ucred>() as u32) } as usize;

/// What attestation can use on this kernel. Linux 5.10 has none of it; every use has a slower equivalent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// `SO_PEERPIDFD` (Linux 6.5): a handle to the peer that cannot be confused with a later process.
    pub peer_pidfd: bool,
    /// `PIDFD_GET_INFO` (Linux 6.13): ids and cgroup of a process in one call.
    pub pidfd_info: bool,
    /// `SO_PASSRIGHTS` (Linux 6.16): the kernel lets nobody send descriptors over a connection.
    pub refuses_descriptors: bool,
    /// Whether cgroup paths are read from the root of the host, without which a path does not say which unit it is.
    pub host_cgroups: bool,
    /// Whether every user id of the host has its own number here, false in a user namespace with a partial map.
    pub all_users: bool,
}

impl Capabilities {
    /// What this kernel offers this process.
    pub fn probe() -> Self {
        Self {
            peer_pidfd: has_peer_pidfd(),
            pidfd_info: has_pidfd_info(),
            refuses_descriptors: can_refuse_descriptors(),
            host_cgroups: in_host_cgroup_namespace(),
            all_users: maps_all_users(),
        }
    }
}

#[cfg(any(test, feature = "testing"))]
impl Capabilities {
    /// What the oldest supported kernel offers, in the namespaces this process is in.
    pub fn of_linux_5_10() -> Self {
        Self { peer_pidfd: false, pidfd_info: false, refuses_descriptors: false, ..Self::probe() }
    }
}

/// One line for the log at start: `SO_PEERPIDFD yes, PIDFD_GET_INFO no, SO_PASSRIGHTS no, host cgroups yes, all users yes`.
impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |yes| if yes { "yes" } else { "no" };
        write!(f, "SO_PEERPIDFD {}, PIDFD_GET_INFO {}, ", word(self.peer_pidfd), word(self.pidfd_info))?;
        write!(f, "SO_PASSRIGHTS {}, ", word(self.refuses_descriptors))?;
        write!(f, "host cgroups {}, all users {}", word(self.host_cgroups), word(self.all_users))
    }
}

fn has_peer_pidfd() -> bool {
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .is_ok_and(|(one, _other)| peer_pidfd(one.as_fd()).is_ok())
}

fn has_pidfd_info() -> bool {
    rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())
        .is_ok_and(|pidfd| process_ids(pidfd.as_fd()).is_ok())
}

fn can_refuse_descriptors() -> bool {
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .is_ok_and(|(one, _other)| refuse_descriptors(one.as_fd()).is_ok() && refuses_descriptors(one.as_fd()))
}

fn in_host_cgroup_namespace() -> bool {
    rustix::fs::statx(CWD, c"/proc/self/ns/cgroup", AtFlags::empty(), StatxFlags::INO)
        .is_ok_and(|namespace| namespace.stx_ino == INITIAL_CGROUP_NAMESPACE)
}

fn maps_all_users() -> bool {
    std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| map.split_whitespace().eq(["0", "0", "4294967295"]))
}

/// A pidfd of the process that connected the socket (`SO_PEERPIDFD`).
#[allow(unsafe_code)]
pub(super) fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut pidfd: libc::c_int = -1;
    let mut length = mem::size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, the size of `pidfd`, and both live through the call.
    let returned = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut pidfd).cast(),
            &raw mut length,
        )
    };
    if returned != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: on success the kernel has just installed this descriptor for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// Makes the kernel refuse descriptors that are sent to the socket, and to sockets accepted from it (`SO_PASSRIGHTS`): the
/// sender is told `EPERM`.
#[allow(unsafe_code)]
pub(super) fn refuse_descriptors(socket: BorrowedFd<'_>) -> io::Result<()> {
    let pass: libc::c_int = 0;
    // SAFETY: the kernel reads as many bytes as `pass` has, which lives through the call.
    let returned = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const pass).cast(),
            mem::size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if returned == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether the kernel refuses descriptors that are sent to the socket.
#[allow(unsafe_code)]
pub(super) fn refuses_descriptors(socket: BorrowedFd<'_>) -> bool {
    let mut pass: libc::c_int = 1;
    let mut length = mem::size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, the size of `pass`, and both live through the call.
    let returned = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PASSRIGHTS, (&raw mut pass).cast(), &raw mut length)
    };
    returned == 0 && pass == 0
}

/// The process and the effective user that connected the socket (`SO_PEERCRED`, unix(7)); the process is zero when it has
/// no number here.
#[allow(unsafe_code)]
pub(super) fn peer_credentials(socket: BorrowedFd<'_>) -> io::Result<Sender> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = mem::size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, the size of `credentials`, and both live through the call.
    let returned = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        )
    };
    if returned != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Sender { pid: credentials.pid, uid: credentials.uid })
}

/// Registers a descriptor with the runtime, to be told when it is readable: a pidfd is when its process has exited, a
/// listener when somebody waits.
///
/// # Errors
/// It cannot be polled.
#[allow(unsafe_code)]
pub fn watch_readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is one open descriptor, and stays so until the `AsyncFd` that owns it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
}

/// Ids of a process, as numbered in this process's namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ProcessIds {
    pub(super) real_uid: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) cgroup: u64,
}

/// Ids of the process behind a pidfd (`PIDFD_GET_INFO`); `ESRCH` once it has been reaped.
#[allow(unsafe_code)]
pub(super) fn process_ids(pidfd: BorrowedFd<'_>) -> io::Result<ProcessIds> {
    // SAFETY: `pidfd_info` is integers only, for which zero is a value.
    let mut info: libc::pidfd_info = unsafe { mem::zeroed() };
    let wanted = u64::from(libc::PIDFD_INFO_PID | libc::PIDFD_INFO_CREDS | libc::PIDFD_INFO_CGROUPID);
    info.mask = wanted;
    // SAFETY: the request number carries the size of `pidfd_info`, beyond which the kernel writes nothing.
    let returned = unsafe { libc::ioctl(pidfd.as_raw_fd(), libc::PIDFD_GET_INFO, &raw mut info) };
    if returned != 0 {
        return Err(io::Error::last_os_error());
    }
    if info.mask & wanted != wanted {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(ProcessIds { real_uid: info.ruid, uid: info.euid, gid: info.egid, cgroup: info.cgroupid })
}

/// The process that wrote a message: its id, zero when it has none in our pid namespace, and its real user id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sender {
    pub(super) pid: i32,
    pub(super) uid: u32,
}

/// One call's worth of what a socket holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Received {
    /// Zero at the end of the stream.
    pub(super) bytes: usize,
    /// Whom the kernel names as the writer of these bytes.
    pub(super) sender: Option<Sender>,
    /// Whether descriptors came, or would come, along.
    pub(super) descriptors: bool,
}

/// Receives into `buffer`, if no descriptors come along.
///
/// A descriptor may be the last one of something whose closing takes as long as its sender likes (a TCP socket that
/// lingers), and the kernel closes on the thread that receives a message without taking its descriptors. So, unless it
/// `refuses_descriptors`, each message is peeked at first, which gives up nothing; one with descriptors stays where it is,
/// for the closing of the socket.
///
/// The socket needs `SO_PASSCRED`; the kernel then never joins bytes of two writers in one call.
#[allow(unsafe_code)]
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut ReadBuf<'_>,
    refuses_descriptors: bool,
) -> io::Result<Received> {
    // SAFETY: the kernel initializes what it says it has received, and nothing is ever de-initialized here.
    let unfilled = unsafe { buffer.unfilled_mut() };
    let mut most = unfilled.len();
    if !refuses_descriptors {
        let seen = message(socket, unfilled, libc::MSG_PEEK)?;
        if seen.descriptors || seen.bytes == 0 {
            return Ok(seen);
        }
        // Nobody else reads from this socket, so these bytes are still the first ones.
        most = seen.bytes;
    }
    let received = message(socket, &mut unfilled[..most], 0)?;
    // SAFETY: the kernel has written the first `received.bytes` bytes of the unfilled part.
    unsafe { buffer.assume_init(received.bytes) };
    buffer.advance(received.bytes);
    Ok(received)
}

/// `recvmsg(2)` with room for the credentials only, which the kernel puts first: descriptors never become ours, and the
/// kernel says that it had some (`MSG_CTRUNC`; `scm_detach_fds`).
#[allow(unsafe_code)]
fn message(socket: BorrowedFd<'_>, bytes: &mut [MaybeUninit<u8>], flags: libc::c_int) -> io::Result<Received> {
    #[repr(C, align(8))]
    struct Control(MaybeUninit<[u8; CREDENTIALS_SPACE]>);
    let mut control = Control(MaybeUninit::uninit());
    let mut bytes = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: `msghdr` is integers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut bytes;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = CREDENTIALS_SPACE as _;
    // SAFETY: both buffers are described with their own lengths and live through the call.
    let returned = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags | libc::MSG_CMSG_CLOEXEC) };
    let received = usize::try_from(returned).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: `message` is as the kernel left it: CMSG_FIRSTHDR is null or points into `control`, the header says how
    // many bytes of it are set, and they are copied out unaligned only when a whole `ucred` is there.
    let sender = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let whole = libc::CMSG_LEN(mem::size_of::<libc::ucred>() as u32) as usize;
        (!header.is_null()
            && (*header).cmsg_level == libc::SOL_SOCKET
            && (*header).cmsg_type == libc::SCM_CREDENTIALS
            && (*header).cmsg_len as usize >= whole)
            .then(|| libc::CMSG_DATA(header).cast::<libc::ucred>().read_unaligned())
    };
    Ok(Received {
        bytes: received,
        sender: sender.map(|sender| Sender { pid: sender.pid, uid: sender.uid }),
        descriptors: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_said_in_one_line() {
        let capabilities = Capabilities {
            peer_pidfd: true,
            pidfd_info: false,
            refuses_descriptors: true,
            host_cgroups: true,
            all_users: false,
        };
        insta::assert_snapshot!(capabilities, @"SO_PEERPIDFD yes, PIDFD_GET_INFO no, SO_PASSRIGHTS yes, host cgroups yes, all users no");
    }

    #[test]
    fn the_kernel_tells_our_own_ids_if_it_tells_any() {
        let pidfd = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).unwrap();
        if Capabilities::probe().pidfd_info {
            let ids = process_ids(pidfd.as_fd()).unwrap();
            assert_eq!(
                (ids.real_uid, ids.uid),
                (rustix::process::getuid().as_raw(), rustix::process::geteuid().as_raw())
            );
            assert_eq!(ids.gid, rustix::process::getegid().as_raw());
        } else {
            assert!(process_ids(pidfd.as_fd()).is_err());
        }
    }
}
