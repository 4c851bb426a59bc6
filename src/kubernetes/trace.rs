//! Requests to the API server within a trace: each names the current span, which the API server links its own to, and the
//! `Audit-Id` of the answer is recorded in that span, if it has the field `csrd.audit_id`. So whoever reads a trace finds
//! the audit log's entry, and the API server's own trace where it sends one.

use http::{Request, Response};
use kube::client::Body;
use tracing::Span;

use crate::telemetry;

/// What the API server calls the audit log's id of a request.
const AUDIT_ID: &str = "audit-id";
/// The field of spans that it is recorded in.
const FIELD: &str = "csrd.audit_id";
/// The longest id that is recorded; the API server's own have 36.
const MAX_AUDIT_ID_BYTES: usize = 64;

/// Names the current span in the request's headers.
pub(super) fn name_span(mut request: Request<Body>) -> Request<Body> {
    telemetry::inject(request.headers_mut());
    request
}

/// Records the answer's id in the span that the request was made in.
pub(super) fn record_audit_id<B, E>(
    answer: impl Future<Output = Result<Response<B>, E>>,
) -> impl Future<Output = Result<Response<B>, E>> {
    let span = Span::current();
    async move {
        let answer = answer.await;
        let headers = answer.as_ref().ok().map(Response::headers);
        let id = headers.and_then(|headers| headers.get(AUDIT_ID)?.to_str().ok());
        if let Some(id) = id.filter(|id| id.len() <= MAX_AUDIT_ID_BYTES) {
            span.record(FIELD, id);
        }
        answer
    }
}
