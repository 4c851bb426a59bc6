//! Lets through what a client sends, and keeps it from leaving a frame or a header block unfinished.
//!
//! The HTTP/2 stack keeps an unfinished frame, and all frames of an unfinished header block (RFC 9113 §4.3), for as long
//! as the connection lasts. This stands below it, reads nothing but frame heads, and changes no byte. What has been begun
//! is counted among the bytes of the connection's principal while the client is silent, and ends the connection after
//! [`FRAME_TIMEOUT`]. Messages, which are made of whole frames, are bounded in `message`.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

use crate::{
    account::{Held, Seat},
    metrics::{ConnectionRefused, Metrics},
};

/// How long a client may take for a frame, or for a header block, from its first byte to its last.
pub const FRAME_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of an unfinished frame that are counted with its connection.
const FREE_BYTES: usize = 1024;
/// What buffers hold of a byte that is kept, at most: they double as they grow.
const BUFFERED_TIMES: usize = 2;
/// Bytes of what every HTTP/2 client sends first (RFC 9113 §3.4).
const PREFACE_BYTES: usize = 24;
const HEAD_BYTES: usize = 9;
const HEADERS: u8 = 0x1;
const CONTINUATION: u8 = 0x9;
const END_HEADERS: u8 = 0x4;

/// A client's connection, every frame of which is finished in time.
#[derive(Debug)]
pub(super) struct WholeFrames<IO> {
    io: IO,
    seat: Arc<Seat>,
    metrics: Metrics,
    position: Position,
    unfinished: Option<Unfinished>,
}

/// Where in the client's frames a connection is.
#[derive(Debug)]
struct Position {
    head: [u8; HEAD_BYTES],
    filled: usize,
    /// Bytes of the preface or of a payload that are still to come.
    rest: usize,
    /// A header block has begun, and its last frame has not.
    in_block: bool,
    /// Bytes since the last one that ended a frame outside of a header block.
    begun: usize,
}

/// What is held, and until when, while the client is silent within a frame.
#[derive(Debug)]
struct Unfinished {
    since: Instant,
    end: Pin<Box<Sleep>>,
    held: Option<Held>,
}

impl<IO> WholeFrames<IO> {
    /// A connection from which nothing has been read.
    pub(super) fn new(io: IO, seat: Arc<Seat>, metrics: Metrics) -> Self {
        let position = Position { head: [0; HEAD_BYTES], filled: 0, rest: PREFACE_BYTES, in_block: false, begun: 0 };
        Self { io, seat, metrics, position, unfinished: None }
    }

    /// The client is silent: counts what it has begun, and waits for its end.
    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.position.begun == 0 {
            return Poll::Pending;
        }
        let unfinished = self.unfinished.get_or_insert_with(|| {
            let since = Instant::now();
            Unfinished { since, end: Box::pin(sleep_until(since + FRAME_TIMEOUT)), held: None }
        });
        let wanted = self.position.begun.saturating_sub(FREE_BYTES) * BUFFERED_TIMES;
        let more = wanted.saturating_sub(unfinished.held.as_ref().map_or(0, Held::bytes));
        let counted = match &mut unfinished.held {
            _ if more == 0 => Ok(()),
            Some(held) => held.grow(more),
            none => self.seat.hold(more).map(|held| *none = Some(held)),
        };
        let why = match counted {
            Ok(()) if unfinished.end.as_mut().poll(cx).is_pending() => return Poll::Pending,
            Ok(()) => ConnectionRefused::Unfinished,
            Err(_) => ConnectionRefused::TooManyBytes,
        };
        tracing::debug!(since = ?unfinished.since.elapsed(), "a client has left a frame unfinished");
        self.metrics.connection_refused(why);
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl Position {
    /// Takes in what the client has sent; true if a frame outside of a header block has ended in it.
    fn pass(&mut self, mut bytes: &[u8]) -> bool {
        let mut ended = false;
        while !bytes.is_empty() {
            let taken = if self.rest > 0 {
                let taken = self.rest.min(bytes.len());
                self.rest -= taken;
                taken
            } else {
                let taken = (HEAD_BYTES - self.filled).min(bytes.len());
                self.head[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
                self.filled += taken;
                if self.filled == HEAD_BYTES {
                    self.filled = 0;
                    self.begin();
                }
                taken
            };
            self.begun += taken;
            bytes = &bytes[taken..];
            if self.rest == 0 && self.filled == 0 && !self.in_block {
                (self.begun, ended) = (0, true);
            }
        }
        ended
    }

    /// A frame's head is complete (RFC 9113 §4.1).
    fn begin(&mut self) {
        let [l0, l1, l2, kind, flags, ..] = self.head;
        self.rest = u32::from_be_bytes([0, l0, l1, l2]) as usize;
        if matches!(kind, HEADERS | CONTINUATION) {
            self.in_block = flags & END_HEADERS == 0;
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for WholeFrames<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        match Pin::new(&mut this.io).poll_read(cx, buf) {
            Poll::Pending => this.wait(cx),
            Poll::Ready(Ok(())) => {
                if this.position.pass(&buf.filled()[before..]) {
                    this.unfinished = None;
                }
                Poll::Ready(Ok(()))
            }
            failed => failed,
        }
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for WholeFrames<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let length = (payload as u32).to_be_bytes();
        let head = [length[1], length[2], length[3], kind, flags, 0, 0, 0, 1];
        [&head[..], &vec![0; payload]].concat()
    }

    /// How many bytes are begun after each byte of `frames`, which follow the preface.
    fn begun(frames: &[u8]) -> Vec<usize> {
        let mut position =
            Position { head: [0; HEAD_BYTES], filled: 0, rest: PREFACE_BYTES, in_block: false, begun: 0 };
        assert!(!position.pass(&[0; PREFACE_BYTES - 1]) && position.pass(&[0]), "the preface ends");
        frames
            .iter()
            .map(|byte| {
                let ended = position.pass(&[*byte]);
                assert_eq!(ended, position.begun == 0);
                position.begun
            })
            .collect()
    }

    #[test]
    fn what_is_begun_ends_with_its_frame_and_a_header_block_with_its_last_frame() {
        let whole = [frame(0x4, 0, 0), frame(0x0, 1, 3), frame(HEADERS, END_HEADERS, 2)];
        let expected: Vec<usize> = whole.iter().flat_map(|it| (1..it.len()).chain([0])).collect();
        assert_eq!(begun(&whole.concat()), expected);
        let block = [frame(HEADERS, 0, 2), frame(CONTINUATION, 0, 0), frame(CONTINUATION, END_HEADERS, 1)].concat();
        let expected: Vec<usize> = (1..block.len()).chain([0]).collect();
        assert_eq!(begun(&block), expected);
    }

    #[test]
    fn it_does_not_matter_how_the_bytes_are_cut() {
        let bytes = [frame(0x4, 0, 6), frame(HEADERS, 0, 40), frame(CONTINUATION, END_HEADERS, 40), frame(0, 0, 9)];
        let bytes = [&[0; PREFACE_BYTES][..], &bytes.concat()].concat();
        for cut in 0..bytes.len() {
            let mut position =
                Position { head: [0; HEAD_BYTES], filled: 0, rest: PREFACE_BYTES, in_block: false, begun: 0 };
            position.pass(&bytes[..cut]);
            position.pass(&bytes[cut..]);
            assert_eq!((position.begun, position.filled, position.rest), (0, 0, 0), "{cut}");
        }
    }
}
