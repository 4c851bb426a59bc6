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
use tonic::{Status, body::Body};

use super::{Charge, limits::Place, refusal::Refusal};
use crate::hub;

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
    charge: Charge,
    _place: Place,
}

/// `response`, of which every message, and the end, comes before the stop; it holds `place` until it is gone.
pub(super) fn bounded(
    response: Response<Body>,
    stop: &CancellationToken,
    place: Place,
    charge: Charge,
) -> Response<Body> {
    charge.look(response.headers());
    let ends_itself = response.extensions().get::<EndsItself>().is_some();
    let stop = (!ends_itself).then(|| Box::pin(stop.clone().cancelled_owned()));
    response.map(|body| Body::new(Answer { body, stop, stopped: false, charge, _place: place }))
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
            if let Some(Ok(frame)) = &frame
                && let Some(trailers) = frame.trailers_ref()
            {
                self.charge.look(trailers);
            }
            return Poll::Ready(frame);
        }
        let Some(stop) = &mut self.stop else { return Poll::Pending };
        ready!(stop.as_mut().poll(cx));
        self.stopped = true;
        let mut trailers = HeaderMap::new();
        Status::from(Refusal::stopping()).add_header(&mut trailers)?;
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.stopped || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
