//! `IssueCertificate`: each stage as it is passed, then the certificate.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::stream;
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::Stream;
use tonic::{Code, Status};
use tracing::Instrument as _;

use crate::{
    hub::{Held, HubError, Step, Subscription},
    policy::Ask,
    proto::v1::{self, StageKind, issue_certificate_response},
    server::{
        call::{Call, ended},
        convert,
        refusal::Refusal,
        stop,
    },
    signer::Stage,
    telemetry,
};

/// Stages of one issuance; each is sent once, so a stage always finds room.
const MAX_STAGES: usize = 8;

/// The issuance itself.
type Work = Pin<Box<dyn Future<Output = Result<Issued, HubError>> + Send>>;

/// A certificate with the hold on its credential.
struct Issued {
    certificate: v1::Certificate,
    subscription: Subscription,
}

struct State {
    call: Call,
    stages: mpsc::Receiver<v1::Stage>,
    /// `None` once it has ended.
    work: Option<Work>,
    outcome: Option<Result<Issued, Refusal>>,
}

/// The answers to `call`.
pub(super) fn answers(
    call: Call,
    ask: Ask,
    held: Option<Held>,
) -> impl Stream<Item = Result<v1::IssueCertificateResponse, Status>> {
    let began = Instant::now();
    let (tell, stages) = mpsc::channel(MAX_STAGES);
    let _ = tell.try_send(stage(StageKind::Attested, call.workload.to_string(), Duration::ZERO));
    let progress = move |step| {
        let (kind, detail) = match step {
            Step::Granted(policy) => (StageKind::Granted, format!("policy {policy}")),
            Step::Signer(Stage::Requested(detail)) => (StageKind::Requested, detail),
            Step::Signer(Stage::Approved(detail)) => (StageKind::Approved, detail),
            Step::Signer(Stage::Issued) => (StageKind::Issued, "checked against the grant".to_owned()),
        };
        // A caller that has gone away does not stop the issuance.
        let _ = tell.try_send(stage(kind, detail, began.elapsed()));
    };
    let (hub, workload, span) = (call.engine.hub.clone(), call.workload.clone(), call.span.clone());
    let work = async move {
        let mut subscription = hub.issue(workload, ask, held, Arc::new(progress)).await?;
        let certificate = convert::certificate(&subscription.id(), &subscription.first().await?);
        Ok(Issued { certificate, subscription })
    };
    let work = Some(Box::pin(work.instrument(span)) as _);
    let state = State { call, stages, work, outcome: None };
    stream::unfold(state, |mut state| async {
        let answer = next(&mut state).await?;
        Some((answer, state))
    })
}

/// The next answer; `None` after the last.
async fn next(state: &mut State) -> Option<Result<v1::IssueCertificateResponse, Status>> {
    loop {
        if let Some(outcome) = state.outcome.take() {
            if let Ok(stage) = state.stages.try_recv() {
                state.outcome = Some(outcome);
                return Some(Ok(answer(issue_certificate_response::Event::Stage(stage))));
            }
            return Some(deliver(&state.call, outcome).await);
        }
        let work = state.work.as_mut()?;
        tokio::select! {
            biased;
            outcome = work => {
                state.work = None;
                state.outcome = Some(outcome.map_err(|error| Refusal::from(&error)));
            }
            // After the work, so that stages passed at one go are sent at one go.
            Some(stage) = state.stages.recv() => return Some(Ok(answer(issue_certificate_response::Event::Stage(stage)))),
            () = stop::calls_given_up(&state.call.engine.stop) => {
                state.work = None;
                state.outcome = Some(Err(Refusal::stopping()));
            }
        }
    }
}

/// Hands the certificate over, to the process that asked for it and no other.
async fn deliver(call: &Call, outcome: Result<Issued, Refusal>) -> Result<v1::IssueCertificateResponse, Status> {
    let delivery = async {
        let Issued { certificate, subscription } = outcome?;
        call.check_still([&subscription]).await?;
        Ok(answer(issue_certificate_response::Event::Certificate(certificate)))
    };
    let delivered = delivery.instrument(tracing::debug_span!(parent: &call.span, "deliver")).await;
    delivered
        .inspect(|_| telemetry::record_status(&call.span, Code::Ok as i32, ""))
        .map_err(|refusal: Refusal| ended(&call.span, refusal))
}

fn stage(kind: StageKind, detail: String, elapsed: Duration) -> v1::Stage {
    let elapsed = prost_types::Duration::try_from(elapsed).ok();
    v1::Stage { kind: kind.into(), detail, elapsed }
}

fn answer(event: issue_certificate_response::Event) -> v1::IssueCertificateResponse {
    v1::IssueCertificateResponse { event: Some(event) }
}
