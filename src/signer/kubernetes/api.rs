//! The CertificateSigningRequests of an API server: each request bounded, counted, traced and, when the server says that it
//! is too busy, sent again in its time.
//!
//! Invariant: only what the server has refused with 429 is sent twice, so a create never happens twice. The types
//! speak JSON, as all of kube does. Not here: what to do about an answer.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use http::{HeaderMap, header::RETRY_AFTER};
use http_body_util::{BodyExt as _, Limited};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::{
    Client, Resource as _,
    api::{
        DeleteParams, GetParams, ListParams, Patch, PatchParams, PostParams, Preconditions, WatchEvent, WatchParams,
    },
    client::Body,
    core::{ObjectList, Request, Status},
};
use rand::Rng as _;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{Instrument as _, Span, field::Empty};

use super::failure::{ApiError, said};
use crate::{kubernetes::ANSWER_WITHIN, metrics::Metrics};

/// Bytes of an answer; etcd holds no larger object.
pub(super) const MAX_ANSWER_BYTES: usize = 2 * 1024 * 1024;
/// Requests of ours in one list: admission lets an agent make one of up to 64 KB, its certificate included, and all must fit
/// into [`MAX_ANSWER_BYTES`].
pub(super) const PAGE: u32 = 25;
/// How much longer than the API server asked for is waited at most, so that those it sent away do not come back together.
const RETRY_SPREAD: f64 = 0.5;

/// Signing requests of one API server; clones share a connection.
#[derive(Clone)]
pub(super) struct CsrApi {
    client: Client,
    metrics: Metrics,
    requests: Request,
}

impl CsrApi {
    pub(super) fn new(client: Client, metrics: Metrics) -> Self {
        Self { client, metrics, requests: Request::new(CertificateSigningRequest::url_path(&(), None)) }
    }

    pub(super) async fn create(
        &self,
        csr: &CertificateSigningRequest,
        dry_run: bool,
        until: Instant,
    ) -> Result<CertificateSigningRequest, ApiError> {
        let body = serde_json::to_vec(csr).expect("a request is JSON");
        let params = PostParams { dry_run, ..PostParams::default() };
        self.send("create", built(self.requests.create(&params, body)), until).await
    }

    pub(super) async fn get(&self, name: &str, until: Instant) -> Result<CertificateSigningRequest, ApiError> {
        self.send("get", built(self.requests.get(name, &GetParams::default())), until).await
    }

    /// Adds a condition of approval or denial, in one request, whatever the conditions are that it has.
    pub(super) async fn decide(
        &self,
        name: &str,
        (kind, reason, message): (&str, &str, &str),
        dry_run: bool,
        until: Instant,
    ) -> Result<CertificateSigningRequest, ApiError> {
        let condition = serde_json::json!({ "type": kind, "status": "True", "reason": reason, "message": message });
        let patch = Patch::Strategic(serde_json::json!({ "status": { "conditions": [condition] } }));
        let params = PatchParams { dry_run, ..PatchParams::default() };
        self.send("approve", built(self.requests.patch_subresource("approval", name, &params, &patch)), until).await
    }

    /// Deletes the request of that name, but only the one with `uid` if that is known; one that is gone is deleted.
    pub(super) async fn delete(&self, name: &str, uid: Option<String>, until: Instant) -> Result<(), ApiError> {
        let preconditions = uid.map(|uid| Preconditions { uid: Some(uid), resource_version: None });
        let params = DeleteParams { preconditions, ..DeleteParams::default() };
        let request = built(self.requests.delete(name, &params));
        match self.send::<serde::de::IgnoredAny>("delete", request, until).await {
            Ok(_) | Err(ApiError::NotFound(_) | ApiError::Conflict(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The next [`PAGE`] requests with these labels, after those of the list that ended with this token.
    pub(super) async fn list(
        &self,
        labels: &str,
        after: Option<String>,
        until: Instant,
    ) -> Result<ObjectList<CertificateSigningRequest>, ApiError> {
        let params = ListParams { continue_token: after, ..ListParams::default().labels(labels).limit(PAGE) };
        self.send("list", built(self.requests.list(&params)), until).await
    }

    /// Changes of the request of that name after `version`; version "0" begins with the request itself, if it is there.
    pub(super) async fn watch(&self, name: &str, version: &str, until: Instant) -> Result<Events, ApiError> {
        let params = WatchParams::default().fields(&format!("metadata.name={name}")).disable_bookmarks();
        let request = built(self.requests.watch(&params, version));
        let span = span("watch");
        let began = Instant::now();
        let opened = timeout_at(limit(began, until), self.client.request_events(request).instrument(span)).await;
        let opened = opened.map_or(Err(ApiError::Timeout), |opened| opened.map_err(ApiError::of_client));
        self.count("watch", began, &opened);
        Ok(Box::pin(opened?.map(|event| event.map_err(ApiError::of_client))))
    }

    /// Sends `request`, again after a 429 as long as it comes before `until`.
    async fn send<T: DeserializeOwned>(
        &self,
        verb: &'static str,
        request: http::Request<Vec<u8>>,
        until: Instant,
    ) -> Result<T, ApiError> {
        loop {
            let began = Instant::now();
            let span = span(verb);
            let answer =
                timeout_at(limit(began, until), exchange(&self.client, request.clone()).instrument(span)).await;
            let answer = answer.unwrap_or(Err(ApiError::Timeout));
            self.count(verb, began, &answer);
            match answer {
                Err(ApiError::Throttled { retry_after }) if Instant::now() + retry_after < until => {
                    let spread = rand::rng().random_range(1.0..1.0 + RETRY_SPREAD);
                    sleep(retry_after.mul_f64(spread)).await;
                }
                answer => {
                    let broken = |error: serde_json::Error| ApiError::Unexpected { code: 200, said: error.to_string() };
                    return serde_json::from_slice(&answer?).map_err(broken);
                }
            }
        }
    }

    fn count<T>(&self, verb: &'static str, began: Instant, answer: &Result<T, ApiError>) {
        self.metrics.api_request(verb, answer.as_ref().map(drop).map_err(ApiError::reason), began.elapsed());
    }
}

/// What a watch tells.
pub(super) type Events =
    std::pin::Pin<Box<dyn Stream<Item = Result<WatchEvent<CertificateSigningRequest>, ApiError>> + Send>>;

fn built<E: std::fmt::Debug>(request: Result<http::Request<Vec<u8>>, E>) -> http::Request<Vec<u8>> {
    request.expect("names of ours and selectors make a request")
}

fn limit(began: Instant, until: Instant) -> Instant {
    until.min(began + ANSWER_WITHIN)
}

/// The span of one request, by the semantic conventions for HTTP, with the id by which the server's audit log has it.
fn span(verb: &'static str) -> Span {
    tracing::debug_span!(
        "api",
        otel.name = format!("{verb} certificatesigningrequests"),
        otel.kind = "client",
        otel.status_code = Empty,
        http.response.status_code = Empty,
        csrd.audit_id = Empty,
    )
}

/// One request and its whole answer, within the current span.
async fn exchange(client: &Client, request: http::Request<Vec<u8>>) -> Result<Bytes, ApiError> {
    let span = Span::current();
    let response = client.send(request.map(Body::from)).await.map_err(ApiError::of_client)?;
    let (head, body) = response.into_parts();
    let code = head.status.as_u16();
    span.record("http.response.status_code", code);
    let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
    let body = body.map_err(|error| ApiError::Unreachable(said(&error.to_string())))?.to_bytes();
    if head.status.is_success() {
        return Ok(body);
    }
    span.record("otel.status_code", "ERROR");
    // A proxy or the server's own filters answer in plain text.
    let message = match serde_json::from_slice::<Status>(&body) {
        Ok(status) => status.message,
        Err(_) => String::from_utf8_lossy(&body).into_owned(),
    };
    Err(ApiError::new(code, retry_after(&head.headers), &message))
}

/// `Retry-After` in seconds, the only form that the API server uses.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    /// Whoever asks for more is not listened to.
    const MAX_RETRY_AFTER_SECONDS: u64 = 60;
    let seconds: u64 = headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds.min(MAX_RETRY_AFTER_SECONDS)))
}
