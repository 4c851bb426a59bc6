//! A connection of which every byte was written by its peer, and that nobody's descriptors come over.
//!
//! A socket can be passed on, or inherited by a child: whoever holds it can write to it. The kernel names the writer of
//! each message (`SO_PASSCRED`, unix(7)); a byte of another process fails the read, and with it the connection. Answers
//! are not guarded: a process may share what it was given, by passing a socket or otherwise.
//!
//! A message can carry descriptors (`SCM_RIGHTS`), whose closing may take as long as its sender likes. Where the kernel
//! cannot refuse them, such a message fails the read before it is received, and a connection, however it ends, is closed
//! on a thread that may block, with all that is still in it.

use std::{
    any::Any,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustix::{
    io::ioctl_fionread,
    net::{Shutdown, shutdown, sockopt},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
};

use super::{
    AttestError, Peer,
    closer::{Closer, Closing},
    kernel::{self, Capabilities, Received},
};

/// Bytes that are read at a time of a connection that has ended.
const LEFT_BYTES: usize = 4096;
/// How often they are read: together more than a socket holds by default (`net.core.wmem_default`, 208 KiB).
const LEFT_READS_MAX: usize = 64;

/// An accepted connection, whoever made it. Reads let through bytes only; however it is dropped, no descriptor that a
/// client sent is closed on the thread that drops it.
#[derive(Debug)]
pub struct Accepted {
    /// Taken when it is dropped.
    stream: Option<UnixStream>,
    refuses_descriptors: bool,
    closer: Closer,
    kept: Option<Box<dyn Any + Send>>,
}

/// An accepted connection with its [`Peer`], which lets through only bytes that this process wrote.
#[derive(Debug)]
pub struct PeerStream {
    accepted: Accepted,
    peer: Arc<Peer>,
}

/// Makes the kernel name the writers on every connection made to `listener` hereafter, from their first byte on, and
/// refuse descriptors on them if it can. Call it before `listen(2)`, so that there is no connection before.
///
/// # Errors
/// `listener` is no unix socket.
pub fn prepare_listener(listener: impl AsFd, capabilities: Capabilities) -> io::Result<()> {
    sockopt::set_socket_passcred(&listener, true)?;
    if capabilities.refuses_descriptors {
        kernel::refuse_descriptors(listener.as_fd())?;
    }
    Ok(())
}

/// Closes a listener with the connections that nobody has accepted.
pub(super) fn close_listener(listener: OwnedFd, closer: &Closer) {
    if !kernel::refuses_descriptors(listener.as_fd()) {
        closer.close(Closing { socket: listener, kept: None }, true);
    }
}

impl Accepted {
    pub(super) fn new(stream: UnixStream, closer: &Closer) -> Self {
        let refuses_descriptors = kernel::refuses_descriptors(stream.as_fd());
        if !refuses_descriptors {
            // Urgent bytes (MSG_OOB) are read like others: otherwise a read throws away the byte, with its descriptors. It
            // cannot fail: it is a flag of every kind of socket.
            let _ = sockopt::set_socket_oobinline(&stream, true);
        }
        Self { stream: Some(stream), refuses_descriptors, closer: closer.clone(), kept: None }
    }

    /// Keeps `held`, for example the place that this connection takes among all, until the connection is closed, which
    /// may be later than when it is dropped.
    pub fn keep(&mut self, held: impl Send + 'static) {
        self.kept = Some(Box::new(held));
    }

    /// The connection's socket.
    pub fn get_ref(&self) -> &UnixStream {
        self.stream.as_ref().expect("only drop takes it")
    }

    fn stream(&mut self) -> Pin<&mut UnixStream> {
        Pin::new(self.stream.as_mut().expect("only drop takes it"))
    }

    /// Receives bytes of `peer`, or of anybody if there is none.
    fn receive(&self, buffer: &mut ReadBuf<'_>, peer: Option<&Peer>) -> io::Result<()> {
        let before = buffer.filled().len();
        let received = kernel::receive(self.get_ref().as_fd(), buffer, self.refuses_descriptors)?;
        let Some(error) = broken_off(received, peer) else { return Ok(()) };
        buffer.set_filled(before);
        if let Some(peer) = peer {
            peer.broke_off(error.clone());
        }
        Err(io::Error::new(io::ErrorKind::PermissionDenied, error))
    }

    fn poll_receive(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
        peer: Option<&Peer>,
    ) -> Poll<io::Result<()>> {
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let stream = self.get_ref();
        loop {
            ready!(stream.poll_read_ready(cx))?;
            let mut emptied = false;
            let outcome = stream.try_io(Interest::READABLE, || {
                let room = buffer.remaining();
                self.receive(buffer, peer)?;
                // To find the stream empty by another read would take longer.
                emptied = (1..room).contains(&(room - buffer.remaining())) && ioctl_fionread(stream)? == 0;
                if emptied { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
            });
            match outcome {
                Err(_) if emptied => return Poll::Ready(Ok(())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return Poll::Ready(done),
            }
        }
    }
}

/// Why what was received must not be let through.
fn broken_off(received: Received, peer: Option<&Peer>) -> Option<AttestError> {
    if received.descriptors {
        return Some(AttestError::SentDescriptors);
    }
    // The end of the stream has no writer.
    let peer = peer.filter(|peer| received.bytes > 0 && !peer.wrote(received.sender))?;
    Some(AttestError::SocketPassed { peer: peer.pid(), writer: received.sender.map_or(0, |sender| sender.pid) })
}

/// Whether a connection that was shut down may hold descriptors. Reads what is left, up to the first message with some.
fn is_loaded(socket: BorrowedFd<'_>) -> bool {
    let mut left = [MaybeUninit::uninit(); LEFT_BYTES];
    for _ in 0..LEFT_READS_MAX {
        match kernel::receive(socket, &mut ReadBuf::uninit(&mut left), false) {
            Ok(Received { descriptors: false, bytes: 0, .. }) => return false,
            Ok(Received { descriptors: false, .. }) => {}
            Ok(Received { descriptors: true, .. }) => return true,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return true,
        }
    }
    true
}

impl Drop for Accepted {
    fn drop(&mut self) {
        let Some(stream) = self.stream.take().filter(|_| !self.refuses_descriptors) else { return };
        // The client sees the end now, and can send nothing more.
        let shut = shutdown(&stream, Shutdown::Both).is_ok();
        // One that cannot be taken from the runtime has been dropped: the runtime, and the process, is at its end.
        let Ok(stream) = stream.into_std() else { return };
        let loaded = !shut || is_loaded(stream.as_fd());
        self.closer.close(Closing { socket: OwnedFd::from(stream), kept: self.kept.take() }, loaded);
    }
}

impl AsyncRead for Accepted {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_receive(cx, buffer, None)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream().poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream().poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.get_ref().is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(cx)
    }
}

impl PeerStream {
    /// The connection that `peer` was taken hold of by.
    pub fn new(accepted: Accepted, peer: &Arc<Peer>) -> Self {
        Self { accepted, peer: Arc::clone(peer) }
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.accepted.poll_receive(cx, buffer, Some(&self.peer))
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.accepted.stream().poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.accepted.stream().poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.accepted.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.accepted.stream().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.accepted.stream().poll_shutdown(cx)
    }
}
