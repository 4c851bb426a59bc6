//! From every engine's error to what a caller is told: a code, one sentence, and `google.rpc.ErrorInfo` with a stable
//! reason. The only place that knows both worlds, so that one error has one code, whichever call meets it.
//!
//! PERMISSION_DENIED is for real refusals: clients of the SPIFFE kind never come back from it. What may pass by itself
//! is UNAVAILABLE; what the caller has to change is INVALID_ARGUMENT; a bound is RESOURCE_EXHAUSTED.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::convert::RequestError;
use crate::{attest::AttestError, hub::HubError};

/// The domain of every reason (google.rpc.ErrorInfo.domain).
pub const DOMAIN: &str = "csrd.dev";

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        refuse(Code::InvalidArgument, error.reason(), error.to_string())
    }
}

pub(super) fn attestation(error: &AttestError) -> Status {
    let code = if error.is_transient() { Code::Unavailable } else { Code::PermissionDenied };
    refuse(code, error.reason(), format!("the agent cannot tell who is calling: {error}"))
}

pub(super) fn hub(error: &HubError) -> Status {
    let code = match error {
        HubError::Denied(_) => Code::PermissionDenied,
        HubError::UnknownSigner { .. } => Code::FailedPrecondition,
        HubError::RateLimited { .. } | HubError::TooMany { .. } => Code::ResourceExhausted,
        HubError::Issue(error) if !error.is_transient() => Code::Internal,
        HubError::Issue(_) | HubError::TimedOut | HubError::Expired(_) | HubError::Stopping => Code::Unavailable,
    };
    refuse(code, error.reason(), error.to_string())
}

/// The agent is going away; the caller should come back.
pub(super) fn stopping() -> Status {
    refuse(Code::Unavailable, "AGENT_STOPPING", "the agent is stopping; call again".to_owned())
}

/// The process behind an open stream is no longer the workload that opened it.
pub(super) fn changed() -> Status {
    let message = "the process behind this stream is no longer the workload that opened it; connect again";
    refuse(Code::PermissionDenied, "PEER_CHANGED", message.to_owned())
}

/// The principal has as many streams open as it may.
pub(super) fn too_many_streams(max: usize) -> Status {
    let message = format!("streams: {max} are open for this workload's user, at most {max} allowed; close some first");
    refuse(Code::ResourceExhausted, "TOO_MANY_STREAMS", message)
}

pub(super) fn refuse(code: Code, reason: &'static str, message: String) -> Status {
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::<String, String>::new());
    Status::with_error_details(code, message, details)
}
