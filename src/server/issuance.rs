//! `csrd.v1.CertificateService`: who calls, what it asks for, and the streams that answer.
//!
//! Before a certificate is sent, the process behind the stream is looked at again: one that has become something to which
//! policy grants another certificate, or none, gets nothing more. `WatchTrustBundle` looks once, at its start: roots are public.

mod issue;
mod subscribe;

use std::{pin::Pin, sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_stream::{Stream, StreamExt as _, wrappers::WatchStream};
use tonic::{Code, Request, Response, Status};
use tracing::Instrument as _;

use super::{
    Arrival, Connection, Engine, convert,
    refusal::{Refusal, SIGNER_UNKNOWN_CODE},
    stop,
};
use crate::{attest::Workload, hub::Subscription, metrics::counted, policy, proto::v1, telemetry};

/// How long a caller's proof serves without another look: an answer that is at hand is not worth a second one.
const PROOF_HOLDS_FOR: Duration = Duration::from_millis(1);

/// The service.
pub(super) struct Issuance {
    engine: Arc<Engine>,
}

/// A caller of one call, proven at its start.
struct Call {
    engine: Arc<Engine>,
    connection: Arc<Connection>,
    workload: Arc<Workload>,
    proven: Instant,
    span: tracing::Span,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Issuance {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }

    /// Proves the caller of `request`.
    async fn call<T>(&self, request: &Request<T>) -> Result<Call, Status> {
        let arrival = request.extensions().get::<Arrival>().expect("the server sets it");
        let (span, connection) = (arrival.span.clone(), arrival.connection.clone());
        let attested = connection.workload(&self.engine);
        let attested = attested.instrument(tracing::debug_span!(parent: &span, "attest")).await;
        let workload = attested.map_err(|status| ended(&span, status))?;
        Ok(Call { engine: self.engine.clone(), connection, workload, proven: Instant::now(), span })
    }
}

impl Call {
    /// Whether the process behind the call may be given this credential now.
    async fn check_still(&self, subscription: &Subscription) -> Result<(), Refusal> {
        if self.proven.elapsed() < PROOF_HOLDS_FOR {
            return Ok(());
        }
        let now = self.connection.workload(&self.engine).await?;
        if now == self.workload || subscription.is_for(&now) { Ok(()) } else { Err(Refusal::changed()) }
    }
}

#[tonic::async_trait]
impl v1::certificate_service_server::CertificateService for Issuance {
    async fn who_am_i(&self, request: Request<v1::WhoAmIRequest>) -> Result<Response<v1::WhoAmIResponse>, Status> {
        let call = self.call(&request).await?;
        let facts = call.workload.facts().named().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let views = policy::views(&self.engine.hub.policies(), &call.workload);
        let policies = views.into_iter().map(convert::policy_view).collect();
        telemetry::record_status(&call.span, Code::Ok as i32, "");
        Ok(Response::new(v1::WhoAmIResponse { facts, policies }))
    }

    type IssueCertificateStream = Answers<v1::IssueCertificateResponse>;

    async fn issue_certificate(
        &self,
        request: Request<v1::IssueCertificateRequest>,
    ) -> Result<Response<Self::IssueCertificateStream>, Status> {
        let call = self.call(&request).await?;
        let (ask, held) =
            convert::ask(request.into_inner().request).map_err(|error| ended(&call.span, error.into()))?;
        let mut response = Response::new(Box::pin(issue::answers(call, ask, held)) as Self::IssueCertificateStream);
        response.extensions_mut().insert(stop::EndsItself);
        Ok(response)
    }

    type SubscribeStream = Answers<v1::SubscribeResponse>;

    async fn subscribe(
        &self,
        request: Request<v1::SubscribeRequest>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let call = self.call(&request).await?;
        let span = call.span.clone();
        let subscription = subscribe::find(&call, request.into_inner()).instrument(span.clone()).await;
        let subscription = subscription.map_err(|error| ended(&span, error))?;
        Ok(Response::new(Box::pin(subscribe::answers(call, subscription))))
    }

    type WatchTrustBundleStream = Answers<v1::WatchTrustBundleResponse>;

    async fn watch_trust_bundle(
        &self,
        request: Request<v1::WatchTrustBundleRequest>,
    ) -> Result<Response<Self::WatchTrustBundleStream>, Status> {
        let call = self.call(&request).await?;
        let name = convert::signer_name(request.into_inner().signer_name);
        let name = name.map_err(|error| ended(&call.span, error.into()))?;
        let name = name.as_ref().unwrap_or(&self.engine.default_signer);
        let bundle = self.engine.hub.bundle(name).ok_or_else(|| {
            let message = format!("signer_name: this agent has no signer {name:?}");
            ended(&call.span, Refusal::new(SIGNER_UNKNOWN_CODE, "SIGNER_UNKNOWN", message))
        })?;
        telemetry::record_status(&call.span, Code::Ok as i32, "");
        let counted = counted(&self.engine.metrics.subscribers);
        let known = WatchStream::new(bundle).filter(|bundle| !bundle.is_empty());
        let bundles = known.map(move |bundle| {
            let _ = &counted;
            Ok(v1::WatchTrustBundleResponse { trust_bundle: bundle.pem(), sha256_fingerprints: bundle.fingerprints() })
        });
        Ok(Response::new(Box::pin(bundles)))
    }
}

/// Writes into the call's span how it ended.
fn ended(span: &tracing::Span, refusal: Refusal) -> Status {
    telemetry::record_status(span, refusal.code as i32, refusal.reason);
    refusal.into()
}
