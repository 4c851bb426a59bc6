//! Attacks below HTTP/2: descriptors sent along, sockets passed on, connections that only begin.

use std::{
    collections::VecDeque,
    io::{IoSlice, IoSliceMut, Write as _},
    mem::MaybeUninit,
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Command, Stdio},
    time::Duration,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg, sockopt::set_socket_linger,
};

use super::{ARGUMENT, Did, Orders};
use crate::it::raw_h2::hello;

/// How long the kernel waits in close(2) for data that nobody reads.
const LINGER: Duration = Duration::from_secs(8);
/// One such message a second.
const PAUSE: Duration = Duration::from_secs(1);
/// The part of a process that writes on connections of another.
pub(super) const SCRIBBLER: &str = "scribble";

/// Connections that such a process holds: more than wait to be accepted (`net.core.somaxconn`).
const SCRIBBLED_ON: usize = 6000;

/// Sends a TCP socket whose close takes long, as its last holder; `unread` leaves it in the agent's queue, behind bytes for
/// which the agent ends the connection.
pub(super) fn freeze(orders: &Orders, unread: bool) -> Did {
    let mut did = Did::default();
    let mut held = Vec::new();
    while !orders.over() {
        match frozen(orders, unread) {
            Ok(kept) => {
                did.done += 1;
                held.push(kept);
            }
            Err(_) => did.refused += 1,
        }
        std::thread::sleep(PAUSE.min(orders.left()));
    }
    Did { open: held.len() as u64, ..did }
}

fn frozen(orders: &Orders, unread: bool) -> std::io::Result<(TcpListener, UnixStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut slow = TcpStream::connect(listener.local_addr()?)?;
    slow.set_nonblocking(true)?;
    set_socket_linger(&slow, Some(LINGER))?;
    // Until neither its buffer nor the window of the other end takes more.
    while slow.write(&[0; 65_536]).is_ok() {}
    let mut agent = UnixStream::connect(&orders.socket)?;
    agent.set_write_timeout(Some(Duration::from_secs(1)))?;
    if unread {
        // No preface: the agent ends the connection as soon as it has read this.
        agent.write_all(&[b'x'; 64])?;
    }
    send_with(&agent, &hello(), &slow.into())?;
    Ok((listener, agent))
}

fn send_with(socket: &UnixStream, bytes: &[u8], descriptor: &OwnedFd) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Connects, and lets a process with another id write on the connection, over and over.
pub(super) fn passed(orders: &Orders) -> Did {
    let mut did = Did::default();
    let Ok((ours, theirs)) = UnixStream::pair() else { return did };
    let this = std::env::current_exe().expect("this program");
    let mut scribbler = Command::new(this);
    scribbler.args([ARGUMENT, SCRIBBLER]).stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
    let Ok(mut scribbler) = scribbler.spawn() else { return did };
    while !orders.over() {
        let passed = UnixStream::connect(&orders.socket).and_then(|agent| send_with(&ours, b"x", &agent.into()));
        match passed {
            Ok(()) => did.done += 1,
            Err(_) => did.refused += 1,
        }
    }
    drop(ours);
    let _ = scribbler.wait();
    did
}

/// Writes on every connection that comes through standard input, and closes it some connections later: the agent reads
/// nothing from one that is closed before it has written its own first bytes.
pub(super) fn scribble() {
    let input = std::io::stdin();
    let mut open = VecDeque::new();
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let read = recvmsg(&input, &mut [IoSliceMut::new(&mut [0])], &mut control, RecvFlags::CMSG_CLOEXEC);
        if !read.is_ok_and(|message| message.bytes > 0) {
            return;
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                for descriptor in descriptors {
                    let mut agent = UnixStream::from(descriptor);
                    let _ = agent.write_all(&hello());
                    open.push_back(agent);
                }
            }
        }
        if open.len() > SCRIBBLED_ON {
            open.pop_front();
        }
    }
}

/// Connects and closes at once, in `many` threads.
pub(super) fn connect(orders: &Orders) -> Did {
    let mut did = Did::default();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..orders.many)
            .map(|_| {
                scope.spawn(|| {
                    let mut did = Did::default();
                    while !orders.over() {
                        match UnixStream::connect(&orders.socket) {
                            Ok(_) => did.done += 1,
                            Err(_) => did.refused += 1,
                        }
                    }
                    did
                })
            })
            .collect();
        for thread in threads {
            did += thread.join().unwrap_or_default();
        }
    });
    did
}
