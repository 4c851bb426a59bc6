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

use super::pieces::{Head, Pieces};
use crate::{
    account::{Held, Seat},
    metrics::{ConnectionRefused, Metrics},
};

/// How long a client may take for a frame, or for a header block, from its first byte to its last.
pub const FRAME_TIMEOUT: Duration = Duration::from_secs(10);
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
    frames: Pieces<HEAD_BYTES>,
    unfinished: Option<Unfinished>,
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
        Self { io, seat, metrics, frames: Pieces::after(PREFACE_BYTES), unfinished: None }
    }

    /// The client is silent: counts what it has begun, and waits for its end.
    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.frames.begun() == 0 {
            return Poll::Pending;
        }
        let unfinished = self.unfinished.get_or_insert_with(|| {
            let since = Instant::now();
            Unfinished { since, end: Box::pin(sleep_until(since + FRAME_TIMEOUT)), held: None }
        });
        let counted = self.seat.cover(&mut unfinished.held, self.frames.begun());
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

/// What a frame's head says (RFC 9113 §4.1): a header block goes on to the frame with END_HEADERS, whatever lies between.
fn head(&[l0, l1, l2, kind, flags, ..]: &[u8; HEAD_BYTES], in_block: bool) -> Head {
    let rest = u32::from_be_bytes([0, l0, l1, l2]) as usize;
    let continues = if matches!(kind, HEADERS | CONTINUATION) { flags & END_HEADERS == 0 } else { in_block };
    Head { rest, continues }
}

impl<IO: AsyncRead + Unpin> AsyncRead for WholeFrames<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        match Pin::new(&mut this.io).poll_read(cx, buf) {
            Poll::Pending => this.wait(cx),
            Poll::Ready(Ok(())) => {
                if this.frames.pass(&buf.filled()[before..], head) {
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

    /// How many bytes are begun after each byte of `bytes`, which follow the preface.
    fn begun(bytes: &[u8]) -> Vec<usize> {
        let mut frames = Pieces::after(PREFACE_BYTES);
        assert!(!frames.pass(&[0; PREFACE_BYTES - 1], head) && frames.pass(&[0], head), "the preface ends");
        bytes
            .iter()
            .map(|byte| {
                let ended = frames.pass(&[*byte], head);
                assert_eq!(ended, frames.begun() == 0);
                frames.begun()
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
}
