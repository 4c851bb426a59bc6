//! A connection of which every byte was written by its peer.
//!
//! A socket can be passed on, or inherited by a child: whoever holds it can write to it. The kernel names the writer of
//! each message (`SO_PASSCRED`, unix(7)); a byte of another process fails the read, and with it the connection. Answers
//! are not guarded: a process may share what it was given, by passing a socket or otherwise.

use std::{
    io::{self, IoSlice},
    os::fd::AsFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustix::{io::ioctl_fionread, net::sockopt};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
};

use super::{AttestError, Peer, kernel};

/// A connection accepted from a prepared listener, with its [`Peer`].
#[derive(Debug)]
pub struct PeerStream {
    stream: UnixStream,
    peer: Arc<Peer>,
}

/// Makes the kernel name the writers on every connection accepted from `listener` hereafter, from their first byte on.
///
/// # Errors
/// `listener` is no unix socket.
pub fn prepare_listener(listener: impl AsFd) -> io::Result<()> {
    Ok(sockopt::set_socket_passcred(listener, true)?)
}

impl PeerStream {
    /// The connection that `peer` was taken hold of by.
    pub fn new(stream: UnixStream, peer: &Arc<Peer>) -> Self {
        Self { stream, peer: Arc::clone(peer) }
    }

    fn receive(&self, buffer: &mut ReadBuf<'_>) -> io::Result<()> {
        let before = buffer.filled().len();
        let (received, sender) = kernel::receive(self.stream.as_fd(), buffer)?;
        // The end of the stream has no writer.
        if received == 0 || self.peer.wrote(sender) {
            return Ok(());
        }
        buffer.set_filled(before);
        let writer = sender.map_or(0, |sender| sender.pid);
        let error = AttestError::SocketPassed { peer: self.peer.pid(), writer };
        self.peer.broke_off(error.clone());
        Err(io::Error::new(io::ErrorKind::PermissionDenied, error))
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            let mut emptied = false;
            let outcome = self.stream.try_io(Interest::READABLE, || {
                let room = buffer.remaining();
                self.receive(buffer)?;
                // To find the stream empty by another read would take longer.
                emptied = (1..room).contains(&(room - buffer.remaining())) && ioctl_fionread(&self.stream)? == 0;
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

impl AsyncWrite for PeerStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
