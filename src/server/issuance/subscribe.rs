//! `Subscribe`: the state in force, then every change to it, until the right or the agent goes.

use futures_util::stream;
use tokio_stream::Stream;
use tonic::{Code, Status};
use tracing::Instrument as _;

use crate::{
    hub::{Event, Subscription},
    metrics::{Counted, counted},
    proto::v1::{self, subscribe_response},
    server::{call::Call, convert, refusal::Refusal},
};

struct State {
    call: Call,
    _counted: Counted,
    subscription: Subscription,
    /// Set when the first certificate of the stream has gone out: the ones after it are renewals.
    begun: bool,
    /// Set by the event after which there is nothing more but this status.
    last: Option<Refusal>,
    over: bool,
}

/// The credential that `request` names by id, or by what is asked for.
pub(super) async fn find(call: &Call, request: v1::SubscribeRequest) -> Result<Subscription, Refusal> {
    let hub = &call.engine.hub;
    let by_id = !request.certificate_id.is_empty();
    if by_id {
        let resumed = hub.resume(&call.workload, &request.certificate_id, request.after_sequence).await;
        if let Some(subscription) = resumed.map_err(|error| Refusal::from(&error))? {
            return Ok(subscription);
        }
    }
    if request.request.is_none() && by_id {
        let message =
            "certificate_id: this agent has no such certificate of yours; it may have restarted: send a request";
        return Err(Refusal::new(Code::NotFound, "CERTIFICATE_UNKNOWN", message));
    }
    let (ask, held) = convert::ask(request.request)?;
    hub.subscribe(call.workload.clone(), ask, held).await.map_err(|error| Refusal::from(&error))
}

/// The answers to `call`. A subscription that was resumed has seen a certificate already.
pub(super) fn answers(
    call: Call,
    subscription: Subscription,
) -> impl Stream<Item = Result<v1::SubscribeResponse, Status>> {
    let begun = subscription.has_seen();
    let counted = counted(&call.engine.metrics.subscribers);
    let state = State { call, _counted: counted, subscription, begun, last: None, over: false };
    stream::unfold(state, |mut state| async {
        let answer = next(&mut state).await?;
        state.over = answer.is_err();
        Some((answer, state))
    })
}

/// The next answer; `None` after the last.
async fn next(state: &mut State) -> Option<Result<v1::SubscribeResponse, Status>> {
    if state.over {
        return None;
    }
    if let Some(refusal) = state.last.take() {
        return Some(state.call.answered(Err(refusal)));
    }
    let event = tokio::select! {
        biased;
        event = state.subscription.next() => event,
        () = state.call.engine.stop.cancelled() => return Some(state.call.answered(Err(Refusal::stopping()))),
    };
    let issuance = match &event {
        Event::Certificate(_, live) => live.trace.clone(),
        _ => None,
    };
    let delivery = state.call.delivery(issuance.as_ref());
    let answer = deliver(state, event).instrument(delivery).await;
    Some(state.call.answered(answer))
}

/// Turns an event into an answer for the process that opened the stream, and no other.
async fn deliver(state: &mut State, event: Event) -> Result<v1::SubscribeResponse, Refusal> {
    if matches!(event, Event::Certificate(..)) {
        state.call.check_still([&state.subscription]).await?;
    }
    let sequence = event.sequence().unwrap_or_default();
    let event = match event {
        Event::Certificate(_, live) => {
            let certificate = Some(convert::certificate(&state.subscription.id(), &live));
            if std::mem::replace(&mut state.begun, true) {
                subscribe_response::Event::Renewed(v1::Renewed { certificate })
            } else {
                subscribe_response::Event::Current(v1::Current { certificate })
            }
        }
        Event::Bundle(_, bundle) => {
            subscribe_response::Event::TrustBundleUpdated(v1::TrustBundleUpdated { trust_bundle: bundle.pem() })
        }
        Event::Delayed(_, delay, live) => subscribe_response::Event::RenewalDelayed(v1::RenewalDelayed {
            reason: delay.reason.to_owned(),
            message: delay.message.clone(),
            retry_at: Some(convert::timestamp(delay.retry_at)),
            expires_at: Some(convert::timestamp(live.credential.not_after())),
        }),
        Event::RotationDue(_, live) => subscribe_response::Event::RenewalDue(v1::RenewalDue {
            expires_at: Some(convert::timestamp(live.credential.not_after())),
        }),
        Event::Denied(_, lost) => {
            let (reason, message) = (lost.reason().to_owned(), lost.to_string());
            state.last = Some(Refusal::from(&lost));
            subscribe_response::Event::Denied(v1::Denied { reason, message })
        }
        Event::Ended(error) => return Err(Refusal::from(&error)),
    };
    Ok(v1::SubscribeResponse { sequence, event: Some(event) })
}
