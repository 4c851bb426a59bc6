//! The SPIFFE Workload API: identities and roots, pushed to whoever a policy offers them to.
//!
//! Keeps what the standard asks for and clients rely on: each message is the whole state and goes out only if it differs
//! from the last; a stream never ends with OK; PERMISSION_DENIED is for a workload that nothing is offered to, with the
//! words that clients look for, and whatever may pass is UNAVAILABLE, since clients come back from few other codes. The
//! first identity is the default one: nothing is sent without it, lest another take its place.
//!
//! The JWT and WIT profiles are switched off: there is nothing here that signs tokens.

use std::{collections::HashMap, pin::Pin, sync::Arc};

use bytes::Bytes;
use futures_util::stream;
use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};
use tracing::Instrument as _;

use super::{
    Arrival, Engine,
    call::{Call, ended},
    identities::{self, Certificate, Identities, Identity},
    refusal::{Refusal, SIGNER_UNKNOWN_CODE},
};
use crate::{
    metrics::{Counted, counted},
    proto::spiffe::{
        JwtBundlesRequest, JwtBundlesResponse, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest,
        ValidateJwtsvidResponse, WitBundlesRequest, WitBundlesResponse, WitsvidRequest, WitsvidResponse,
        X509BundlesRequest, X509BundlesResponse, X509svid, X509svidRequest, X509svidResponse,
        spiffe_workload_api_server::SpiffeWorkloadApi,
    },
    x509::Bundle,
};

/// The metadata that shows that a caller means this API (SPIFFE Workload Endpoint section 6).
const SECURITY_HEADER: &str = "workload.spiffe.io";

/// The service.
pub(super) struct WorkloadApi {
    engine: Arc<Engine>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl WorkloadApi {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }

    /// Streams to the caller what `message` makes of its identities.
    async fn stream<T: Clone + PartialEq + Send + 'static>(
        &self,
        request: &Request<impl Sync>,
        certificates: bool,
        message: fn(&Identities) -> Result<Option<T>, Refusal>,
    ) -> Result<Response<Answers<T>>, Status> {
        let arrival = Arrival::of(request);
        let follow = async {
            check_header(request.metadata())?;
            let call = Call::prove(&self.engine, &arrival).await?;
            let identities =
                call.span.in_scope(|| Identities::of(&call, identities::is_spiffe, move |_, _| certificates))?;
            Ok((call, identities))
        };
        let (call, identities) = follow.await.map_err(|refusal| ended(&arrival.span, in_standard(refusal)))?;
        let counted = counted(&self.engine.metrics.subscribers);
        let follower = Follower { call, _counted: counted, identities, message, last: None, over: false };
        Ok(Response::new(Box::pin(stream::unfold(follower, |mut follower| async {
            let answer = follower.next().await?;
            Some((answer, follower))
        }))))
    }

    /// The answer to every call of a profile that is switched off.
    fn switched_off<T>(&self, request: &Request<impl Sync>, profile: &str) -> Result<T, Status> {
        let off =
            || Refusal::new(Code::Unimplemented, "PROFILE_DISABLED", format!("the {profile} profile is switched off"));
        let refusal = check_header(request.metadata()).map_or_else(|refusal| refusal, |()| off());
        Err(ended(&Arrival::of(request).span, refusal))
    }
}

/// One open stream.
struct Follower<T> {
    call: Call,
    _counted: Counted,
    identities: Identities,
    /// What there is to tell; nothing as long as it is not known.
    message: fn(&Identities) -> Result<Option<T>, Refusal>,
    /// The last message that was sent.
    last: Option<T>,
    over: bool,
}

impl<T: Clone + PartialEq> Follower<T> {
    /// The next message; `None` after the end.
    async fn next(&mut self) -> Option<Result<T, Status>> {
        if self.over {
            return None;
        }
        let answer = self.news().await.map_err(in_standard);
        self.over = answer.is_err();
        Some(self.call.answered(answer))
    }

    /// The state, once it differs from what was sent last, for the process that opened the stream and no other.
    async fn news(&mut self) -> Result<T, Refusal> {
        let mut issuance = None;
        loop {
            let settled = self.last.is_some() || self.identities.settled();
            if settled
                && let Some(message) = (self.message)(&self.identities)?
                && self.last.as_ref() != Some(&message)
            {
                let credentials: Vec<_> = self.identities.subscriptions().collect();
                self.call.check_still(credentials).instrument(self.call.delivery(issuance.as_ref())).await?;
                self.last = Some(message.clone());
                return Ok(message);
            }
            tokio::select! {
                biased;
                changed = self.identities.changed() => issuance = changed?,
                () = self.call.engine.stop.cancelled() => return Err(Refusal::stopping()),
            }
        }
    }
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for WorkloadApi {
    type FetchX509SVIDStream = Answers<X509svidResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        self.stream(&request, true, svids).await
    }

    type FetchX509BundlesStream = Answers<X509BundlesResponse>;

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        self.stream(&request, false, bundles).await
    }

    async fn fetch_jwtsvid(&self, request: Request<JwtsvidRequest>) -> Result<Response<JwtsvidResponse>, Status> {
        self.switched_off(&request, "JWT")
    }

    type FetchJWTBundlesStream = Answers<JwtBundlesResponse>;

    async fn fetch_jwt_bundles(
        &self,
        request: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        self.switched_off(&request, "JWT")
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        self.switched_off(&request, "JWT")
    }

    type FetchWITSVIDStream = Answers<WitsvidResponse>;

    async fn fetch_witsvid(
        &self,
        request: Request<WitsvidRequest>,
    ) -> Result<Response<Self::FetchWITSVIDStream>, Status> {
        self.switched_off(&request, "WIT")
    }

    type FetchWITBundlesStream = Answers<WitBundlesResponse>;

    async fn fetch_wit_bundles(
        &self,
        request: Request<WitBundlesRequest>,
    ) -> Result<Response<Self::FetchWITBundlesStream>, Status> {
        self.switched_off(&request, "WIT")
    }
}

/// Whether the security header is there, once, with its only value.
fn check_header(metadata: &MetadataMap) -> Result<(), Refusal> {
    let mut values = metadata.get_all(SECURITY_HEADER).iter();
    if (values.next().map(|value| value.as_bytes()), values.next()) == (Some(b"true".as_slice()), None) {
        return Ok(());
    }
    let message = format!("security header missing from request: the metadata needs {SECURITY_HEADER}: true, once");
    Err(Refusal::new(Code::InvalidArgument, "SECURITY_HEADER_MISSING", message))
}

/// A refusal as clients of this API expect it: they know three codes, and tell a workload without an identity by its words.
fn in_standard(refusal: Refusal) -> Refusal {
    match refusal.code {
        Code::InvalidArgument | Code::Unimplemented => refusal,
        Code::PermissionDenied => Refusal { message: format!("no identity issued: {}", refusal.message), ..refusal },
        _ => Refusal { code: Code::Unavailable, ..refusal },
    }
}

/// All SVIDs at hand. The default one must be among them.
fn svids(identities: &Identities) -> Result<Option<X509svidResponse>, Refusal> {
    let Some(default) = identities.list().first() else { return Ok(None) };
    match &default.certificate {
        Certificate::Live(..) if identities.live(default).is_some() => {}
        Certificate::Live(..) => {
            let message = format!("the certificate of {} has expired, and its renewal fails", default.name);
            return Err(Refusal::new(Code::Unavailable, "CERTIFICATE_EXPIRED", message));
        }
        Certificate::Failed(refusal, _) => return Err(refusal.clone()),
        Certificate::Pending(_) | Certificate::Unwanted => return Ok(None),
    }
    let bundles = der_bundles(identities);
    let svid = |identity: &Identity| {
        let credential = &identities.live(identity)?.credential;
        Some(X509svid {
            spiffe_id: identity.name.clone(),
            x509_svid: credential.chain().concatenated_der().into(),
            x509_svid_key: credential.key_der()?,
            bundle: bundles.get(identity.trust_domain.as_ref()?)?.clone(),
            hint: identity.hint.clone(),
        })
    };
    let svids = identities.list().iter().filter_map(svid).collect();
    Ok(Some(X509svidResponse { svids, crl: Vec::new(), federated_bundles: HashMap::new() }))
}

/// The roots of every trust domain whose signer is there.
fn bundles(identities: &Identities) -> Result<Option<X509BundlesResponse>, Refusal> {
    let bundles = der_bundles(identities);
    if bundles.is_empty() {
        let message = "policies name signers that this agent does not have";
        return Err(Refusal::new(SIGNER_UNKNOWN_CODE, "SIGNER_UNKNOWN", message));
    }
    Ok(Some(X509BundlesResponse { crl: Vec::new(), bundles }))
}

/// The roots of each trust domain in concatenated DER.
fn der_bundles(identities: &Identities) -> HashMap<String, Bytes> {
    let der = |bundles: Vec<Arc<Bundle>>| Bytes::from_iter(bundles.iter().flat_map(|it| it.concatenated_der()));
    identities.bundles().into_iter().map(|(trust_domain, bundles)| (trust_domain.to_owned(), der(bundles))).collect()
}
