//! One call of a proven caller, whichever service it is for.
//!
//! Before a certificate is sent, the process behind the stream is looked at again: one that has become something to which
//! policy grants another certificate, or none, gets nothing more.

use std::{mem, sync::Arc, time::Duration};

use opentelemetry::trace::SpanContext;
use tokio::time::Instant;
use tonic::{Code, Request, Status};
use tracing::{Instrument as _, Span};

use super::{Arrival, Connection, Engine, refusal::Refusal};
use crate::{attest::Workload, hub::Subscription, telemetry};

/// How long a caller's proof serves without another look: an answer that is at hand is not worth a second one.
const PROOF_HOLDS_FOR: Duration = Duration::from_millis(1);

/// A caller of one call, proven at its start.
pub(super) struct Call {
    pub(super) engine: Arc<Engine>,
    pub(super) workload: Arc<Workload>,
    /// None once its first answer has gone out: what comes later belongs to the traces of the renewals.
    pub(super) span: Span,
    connection: Arc<Connection>,
    proven: Instant,
}

impl Arrival {
    /// What the server knows of a request.
    pub(super) fn of<T>(request: &Request<T>) -> Self {
        request.extensions().get::<Self>().expect("the server sets it").clone()
    }
}

impl Call {
    /// Proves the caller of a request.
    pub(super) async fn prove(engine: &Arc<Engine>, arrival: &Arrival) -> Result<Self, Refusal> {
        let (span, connection) = (arrival.span.clone(), arrival.connection.clone());
        let attested = arrival.workload(engine);
        let workload = attested.instrument(tracing::debug_span!(parent: &span, "attest")).await?;
        Ok(Self { engine: engine.clone(), workload, span, connection, proven: Instant::now() })
    }

    /// Whether the process behind the call may be given these credentials now.
    pub(super) async fn check_still(
        &self,
        credentials: impl IntoIterator<Item = &Subscription>,
    ) -> Result<(), Refusal> {
        if self.proven.elapsed() < PROOF_HOLDS_FOR {
            return Ok(());
        }
        let now = self.connection.workload(&self.engine).await?;
        let mut credentials = credentials.into_iter();
        if now == self.workload || credentials.all(|it| it.is_for(&now)) { Ok(()) } else { Err(Refusal::changed()) }
    }

    /// The span of an answer's way to the caller: the first one's is part of the call, and that of a later certificate
    /// belongs to its issuance.
    pub(super) fn delivery(&self, issuance: Option<&SpanContext>) -> Span {
        match self.span.is_none() {
            true => telemetry::deliver_span(issuance),
            false => tracing::debug_span!(parent: &self.span, "deliver"),
        }
    }

    /// The next answer of a stream as it is sent; the first one ends the call's span.
    pub(super) fn answered<T>(&mut self, answer: Result<T, Refusal>) -> Result<T, Status> {
        let span = mem::replace(&mut self.span, Span::none());
        answer
            .inspect(|_| telemetry::record_status(&span, Code::Ok as i32, ""))
            .map_err(|refusal| ended(&span, refusal))
    }
}

/// Writes into the call's span how it ended.
pub(super) fn ended(span: &Span, refusal: Refusal) -> Status {
    telemetry::record_status(span, refusal.code as i32, refusal.reason);
    refusal.into()
}
