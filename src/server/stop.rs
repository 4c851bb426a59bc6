//! The stop: how long each part has, and the end of answers that nobody else ends.
//!
//! Times count from the moment the stop is asked for. Each part has less than what waits for it, so that an issuance
//! under way is delivered if it lands in time, its caller is told to come back if it does not, and neither is cut off by
//! a connection, a server or a process that ends first.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use hyper::{HeaderMap, Response};
use tokio::time::sleep;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Code, Status, body::Body};

use super::refusal::Refusal;
use crate::{
    account::{CALL_BYTES, Held, Kind, OpenCall, Pace},
    hub,
};

/// How long a call under way may go on; the hub lets issuances land for longer, [`hub::STOP_GRACE`].
pub const CALL: Duration = Duration::from_secs(4);
/// How long a connection may take to deliver what its calls ended with.
pub const CONNECTION: Duration = Duration::from_secs(6);
/// How long the server waits for its connections.
pub const SERVER: Duration = Duration::from_secs(7);
/// How long the agent waits for its parts.
pub const AGENT: Duration = Duration::from_secs(8);

const _: () = {
    assert!(CALL.as_millis() < hub::STOP_GRACE.as_millis() && hub::STOP_GRACE.as_millis() < AGENT.as_millis());
    assert!(CALL.as_millis() < CONNECTION.as_millis() && CONNECTION.as_millis() < SERVER.as_millis());
    assert!(SERVER.as_millis() < AGENT.as_millis());
};

/// Ends when the stop has been asked for and calls under way have had their time.
pub(super) async fn calls_given_up(stop: &CancellationToken) {
    stop.cancelled().await;
    sleep(CALL).await;
}

/// Marks, among a response's extensions, an answer that goes on after the stop and ends itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndsItself;

/// An answer's body, which holds its call's place and ends at the stop if the service has not ended it.
struct Answer {
    body: Body,
    /// `None` for an answer that ends itself.
    stop: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    stopped: bool,
    call: OpenCall,
    /// What the last message takes while it is sent.
    sending: Option<Held>,
}

/// `response`, of which every message, and the end, comes before the stop; it holds the place of `call` until it is gone,
/// and bytes for each message while it is sent.
pub(super) fn bounded(response: Response<Body>, stop: &CancellationToken, call: OpenCall) -> Response<Body> {
    charge(&call, response.headers());
    let ends_itself = response.extensions().get::<EndsItself>().is_some();
    let stop = (!ends_itself).then(|| Box::pin(stop.clone().cancelled_owned()));
    response.map(|body| Body::new(Answer { body, stop, stopped: false, call, sending: None }))
}

/// Counts the refusals among one principal's answers: looks at the end of an answer, in its headers or its trailers.
fn charge(call: &OpenCall, headers: &HeaderMap) {
    use Code::{InvalidArgument, NotFound, OutOfRange, PermissionDenied, ResourceExhausted};
    let refused = Status::from_header_map(headers).is_some_and(|status| {
        matches!(status.code(), InvalidArgument | NotFound | OutOfRange | PermissionDenied | ResourceExhausted)
    });
    if refused {
        call.seat().account().spend(Pace::Refusals, call.seat().principal());
    }
}

impl Answer {
    /// Counts the bytes of a frame until the next one is asked for; what is not counted with the call already. An answer
    /// for which there is no room ends.
    fn send(&mut self, frame: Frame<Bytes>) -> Result<Frame<Bytes>, Status> {
        self.sending = None;
        let bytes = frame.data_ref().map_or(0, Bytes::len);
        if bytes > CALL_BYTES / 2 {
            match self.call.hold(bytes) {
                Ok(held) => self.sending = Some(held),
                Err(full) => return self.end(Refusal::full(Kind::Bytes, full)),
            }
        }
        Ok(frame)
    }

    /// The last frame, which says why there is no more.
    fn end(&mut self, refusal: Refusal) -> Result<Frame<Bytes>, Status> {
        self.stopped = true;
        let mut trailers = HeaderMap::new();
        Status::from(refusal).add_header(&mut trailers)?;
        Ok(Frame::trailers(trailers))
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.stopped {
            return Poll::Ready(None);
        }
        // First, so that what is there, and the service's own end, goes out.
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            let Some(Ok(frame)) = frame else { return Poll::Ready(frame) };
            if let Some(trailers) = frame.trailers_ref() {
                charge(&self.call, trailers);
            }
            return Poll::Ready(Some(self.send(frame)));
        }
        let Some(stop) = &mut self.stop else { return Poll::Pending };
        ready!(stop.as_mut().poll(cx));
        Poll::Ready(Some(self.end(Refusal::stopping())))
    }

    fn is_end_stream(&self) -> bool {
        self.stopped || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
