//! A request's body, every message of which is there in time and counted until it is.
//!
//! A gRPC message is five bytes, one flag and a length, and as many bytes as they say. What has come of one is kept until
//! the last byte is there: it is counted among the bytes of its caller's principal, and has [`MESSAGE_TIMEOUT`] from its
//! first byte. A call with one message has that time for the end of its body too; the caller of a stream may be silent
//! between messages for as long as it likes.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Sleep, sleep};
use tonic::Status;

use super::refusal::Refusal;
use crate::account::{Held, Kind, Seat};

/// How long a request's message may take.
pub const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of an unfinished message that are counted with its call.
const FREE_BYTES: usize = 1024;
/// What buffers hold of a byte that is kept, at most: they double as they grow.
const BUFFERED_TIMES: usize = 2;
const PREFIX_BYTES: usize = 5;

/// A request's body.
#[derive(Debug)]
pub(super) struct Messages<B> {
    body: B,
    seat: Arc<Seat>,
    /// Whether messages may come for as long as the caller likes.
    goes_on: bool,
    framing: Framing,
    held: Option<Held>,
    end: Option<Pin<Box<Sleep>>>,
}

/// Where in its messages a body is.
#[derive(Debug, Default)]
struct Framing {
    prefix: [u8; PREFIX_BYTES],
    filled: usize,
    rest: usize,
    /// Bytes since the end of the last message.
    begun: usize,
}

impl<B> Messages<B> {
    pub(super) fn new(body: B, seat: Arc<Seat>, goes_on: bool) -> Self {
        let end = (!goes_on).then(|| Box::pin(sleep(MESSAGE_TIMEOUT)));
        Self { body, seat, goes_on, framing: Framing::default(), held: None, end }
    }

    /// Takes in what has come.
    fn take(&mut self, bytes: &[u8]) -> Result<(), Status> {
        if self.framing.pass(bytes) {
            self.held = None;
            if self.goes_on {
                self.end = None;
            }
        }
        if self.framing.begun > 0 && self.end.is_none() {
            self.end = Some(Box::pin(sleep(MESSAGE_TIMEOUT)));
        }
        let wanted = self.framing.begun.saturating_sub(FREE_BYTES) * BUFFERED_TIMES;
        let more = wanted.saturating_sub(self.held.as_ref().map_or(0, Held::bytes));
        let counted = match &mut self.held {
            _ if more == 0 => Ok(()),
            Some(held) => held.grow(more),
            none => self.seat.hold(more).map(|held| *none = Some(held)),
        };
        counted.map_err(|full| Refusal::full(Kind::Bytes, full).into())
    }
}

impl Framing {
    /// Takes in what has come; true if a message has ended in it.
    fn pass(&mut self, mut bytes: &[u8]) -> bool {
        let mut ended = false;
        while !bytes.is_empty() {
            let taken = if self.rest > 0 {
                let taken = self.rest.min(bytes.len());
                self.rest -= taken;
                taken
            } else {
                let taken = (PREFIX_BYTES - self.filled).min(bytes.len());
                self.prefix[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
                self.filled += taken;
                if self.filled == PREFIX_BYTES {
                    let [_, length @ ..] = self.prefix;
                    (self.filled, self.rest) = (0, u32::from_be_bytes(length) as usize);
                }
                taken
            };
            self.begun += taken;
            bytes = &bytes[taken..];
            if self.rest == 0 && self.filled == 0 {
                (self.begun, ended) = (0, true);
            }
        }
        ended
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Messages<B>
where
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Pending => {
                let Some(end) = &mut this.end else { return Poll::Pending };
                ready!(end.as_mut().poll(cx));
                Poll::Ready(Some(Err(Refusal::message_late(MESSAGE_TIMEOUT).into())))
            }
            Poll::Ready(Some(Ok(frame))) => {
                let taken = frame.data_ref().map_or(Ok(()), |bytes| this.take(bytes));
                Poll::Ready(Some(taken.map(|()| frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(Status::from_error(error.into())))),
            Poll::Ready(None) => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_ends_with_its_last_byte_however_it_is_cut() {
        let message = |length: u8| [&[0, 0, 0, 0, length][..], &vec![7; length.into()]].concat();
        let bytes = [message(0), message(3), message(1)].concat();
        let mut framing = Framing::default();
        let begun: Vec<_> = bytes
            .iter()
            .map(|byte| {
                assert_eq!(framing.pass(&[*byte]), framing.begun == 0);
                framing.begun
            })
            .collect();
        assert_eq!(begun, [1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 0]);
        for cut in 0..=bytes.len() {
            let mut framing = Framing::default();
            framing.pass(&bytes[..cut]);
            framing.pass(&bytes[cut..]);
            assert_eq!(framing.begun, 0, "{cut}");
        }
    }
}
