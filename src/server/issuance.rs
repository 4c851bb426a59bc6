//! `csrd.v1.CertificateService`: what a caller asks for, and the streams that answer.
//!
//! Each certificate is sent under [`Call::check_still`]. `WatchTrustBundle` looks at its caller once, at its start: roots
//! are public.

mod issue;
mod subscribe;

use std::{pin::Pin, sync::Arc};

use tokio_stream::{Stream, StreamExt as _, wrappers::WatchStream};
use tonic::{Code, Request, Response, Status};
use tracing::Instrument as _;

use super::{
    Arrival, Engine,
    call::{Call, ended},
    convert,
    refusal::{Refusal, SIGNER_UNKNOWN_CODE},
    stop,
};
use crate::{
    account::Pace,
    attest::Workload,
    metrics::counted,
    policy::{self, PolicySet},
    proto::v1,
    telemetry,
};

/// Policies that are few enough for the thread that serves to look at all of them.
const POLICIES_VIEWED_AT_ONCE: usize = 8;

/// The service.
pub(super) struct Issuance {
    engine: Arc<Engine>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Issuance {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }

    /// Proves the caller of `request`.
    async fn call<T>(&self, request: &Request<T>) -> Result<Call, Status> {
        let arrival = Arrival::of(request);
        Call::prove(&self.engine, &arrival).await.map_err(|refusal| ended(&arrival.span, refusal))
    }

    /// What the caller is, and what each policy means for it. All policies are looked at, which takes milliseconds where
    /// there are hundreds: then not on the thread that serves, and never often for one principal.
    async fn view(&self, call: &Call) -> Result<v1::WhoAmIResponse, Refusal> {
        let (policies, workload) = (self.engine.hub.policies(), call.workload.clone());
        let cost = policies.len().max(POLICIES_VIEWED_AT_ONCE);
        let wait = self.engine.account.check(Pace::Views, workload.principal(), cost);
        wait.map_err(Refusal::too_many_who_am_i)?;
        if policies.len() <= POLICIES_VIEWED_AT_ONCE {
            return Ok(view(&policies, &workload));
        }
        tokio::task::spawn_blocking(move || view(&policies, &workload)).await.map_err(|_| Refusal::stopping())
    }
}

fn view(policies: &PolicySet, workload: &Workload) -> v1::WhoAmIResponse {
    let facts = workload.facts().named().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let policies = policy::views(policies, workload).into_iter().map(convert::policy_view).collect();
    v1::WhoAmIResponse { facts, policies }
}

#[tonic::async_trait]
impl v1::certificate_service_server::CertificateService for Issuance {
    async fn who_am_i(&self, request: Request<v1::WhoAmIRequest>) -> Result<Response<v1::WhoAmIResponse>, Status> {
        let call = self.call(&request).await?;
        let answer = self.view(&call).await.map_err(|refusal| ended(&call.span, refusal))?;
        telemetry::record_status(&call.span, Code::Ok as i32, "");
        Ok(Response::new(answer))
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
