//! From every engine's error to what a caller is told: a code, one sentence, and `google.rpc.ErrorInfo` with a stable
//! reason. The only place that knows both worlds, so that one error has one code, whichever call meets it.
//!
//! PERMISSION_DENIED is for real refusals: clients of the SPIFFE kind never come back from it. What may pass by itself
//! is UNAVAILABLE; what the caller has to change is INVALID_ARGUMENT; a bound is RESOURCE_EXHAUSTED.

use std::{collections::HashMap, error::Error};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::convert::RequestError;
use crate::{attest::AttestError, hub::HubError, proto::ERROR_DOMAIN};

/// What a caller is told in place of an answer.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) code: Code,
    /// From a closed set.
    pub(super) reason: &'static str,
    pub(super) message: String,
}

impl Refusal {
    pub(super) fn new(code: Code, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into() }
    }

    /// The agent is going away; the caller should come back.
    pub(super) fn stopping() -> Self {
        Self::new(Code::Unavailable, "AGENT_STOPPING", "the agent is stopping; call again")
    }

    /// The process behind an open stream is no longer the workload that opened it.
    pub(super) fn changed() -> Self {
        let message = "the process behind this stream is no longer the workload that opened it; connect again";
        Self::new(Code::PermissionDenied, "PEER_CHANGED", message)
    }

    /// The principal has as many requests on their way as it may.
    pub(super) fn too_many_arriving(max: usize) -> Self {
        let message =
            format!("requests: {max} of this workload's user are arriving, at most {max} allowed; send fewer at once");
        Self::new(Code::ResourceExhausted, "TOO_MANY_REQUESTS", message)
    }

    /// The principal has as many streams open as it may.
    pub(super) fn too_many_streams(max: usize) -> Self {
        let message =
            format!("streams: {max} are open for this workload's user, at most {max} allowed; close some first");
        Self::new(Code::ResourceExhausted, "TOO_MANY_STREAMS", message)
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let details = ErrorDetails::with_error_info(refusal.reason, ERROR_DOMAIN, HashMap::<String, String>::new());
        Self::with_error_details(refusal.code, refusal.message, details)
    }
}

impl From<RequestError> for Refusal {
    fn from(error: RequestError) -> Self {
        Self::new(Code::InvalidArgument, error.reason(), error.to_string())
    }
}

impl From<&AttestError> for Refusal {
    fn from(error: &AttestError) -> Self {
        let code = if error.is_transient() { Code::Unavailable } else { Code::PermissionDenied };
        Self::new(code, error.reason(), format!("the agent cannot tell who is calling: {}", with_causes(error)))
    }
}

impl From<&HubError> for Refusal {
    fn from(error: &HubError) -> Self {
        let code = match error {
            HubError::Denied(_) => Code::PermissionDenied,
            HubError::UnknownSigner { .. } => Code::FailedPrecondition,
            HubError::RateLimited { .. } | HubError::TooMany { .. } => Code::ResourceExhausted,
            HubError::Issue(error) if !error.is_transient() => Code::Internal,
            HubError::Lost => Code::Internal,
            HubError::Issue(_) | HubError::TimedOut | HubError::Expired(_) | HubError::Stopping => Code::Unavailable,
        };
        Self::new(code, error.reason(), with_causes(error))
    }
}

/// The error and what is behind it, in one line: a refusal without its reason helps nobody.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
