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

use super::{
    pieces::{Head, Pieces},
    refusal::Refusal,
};
use crate::account::{Held, Kind, Seat};

/// How long a request's message may take.
pub const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
const PREFIX_BYTES: usize = 5;

/// A request's body.
#[derive(Debug)]
pub(super) struct Messages<B> {
    body: B,
    seat: Arc<Seat>,
    /// Whether messages may come for as long as the caller likes.
    goes_on: bool,
    messages: Pieces<PREFIX_BYTES>,
    held: Option<Held>,
    end: Option<Pin<Box<Sleep>>>,
}

impl<B> Messages<B> {
    pub(super) fn new(body: B, seat: Arc<Seat>, goes_on: bool) -> Self {
        let end = (!goes_on).then(|| Box::pin(sleep(MESSAGE_TIMEOUT)));
        Self { body, seat, goes_on, messages: Pieces::after(0), held: None, end }
    }

    /// Takes in what has come.
    fn take(&mut self, bytes: &[u8]) -> Result<(), Status> {
        if self.messages.pass(bytes, head) {
            self.held = None;
            if self.goes_on {
                self.end = None;
            }
        }
        if self.messages.begun() > 0 && self.end.is_none() {
            self.end = Some(Box::pin(sleep(MESSAGE_TIMEOUT)));
        }
        let counted = self.seat.cover(&mut self.held, self.messages.begun());
        counted.map_err(|full| Refusal::full(Kind::Bytes, full).into())
    }
}

/// What a message's prefix says (gRPC over HTTP/2): a flag, and its length.
fn head(&[_, ref length @ ..]: &[u8; PREFIX_BYTES], _: bool) -> Head {
    Head { rest: u32::from_be_bytes(*length) as usize, continues: false }
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
    fn a_message_is_as_long_as_its_prefix_says() {
        let mut messages = Pieces::after(0);
        assert!(messages.pass(&[0, 0, 0, 0, 0], head), "an empty one");
        assert!(!messages.pass(&[0, 0, 0, 1, 2], head) && messages.begun() == 5);
        assert!(!messages.pass(&[7; 257], head) && messages.pass(&[7], head));
    }
}
