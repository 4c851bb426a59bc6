//! Why there is no certificate: what the API server answered, and what became of the request there.
//!
//! Every sentence says who refused and what to do next. Texts of others are cut to [`MAX_SAID_BYTES`] and made
//! printable, since they end in logs and in callers' hands.

use std::time::Duration;

use super::{APPROVAL_TIMEOUT, MIN_LIFETIME, SIGNING_TIMEOUT};
use crate::{
    kubernetes::{self, ANSWER_WITHIN, SIGNER},
    text::printable_within,
};

/// Bytes of another's text in an error of ours.
pub(super) const MAX_SAID_BYTES: usize = 512;
/// Signers of Kubernetes itself: nobody but an approver that is told to approves their requests.
pub(super) const BUILT_IN: &str = "kubernetes.io/";

/// Why a CertificateSigningRequest brought no certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KubernetesError {
    /// A process of the host, whose facts nobody in the cluster can check.
    #[error(
        "signer {signer} signs for pods only, and this is a process of the host: its policy has to name another signer"
    )]
    NotAPod {
        /// The signer.
        signer: String,
    },
    /// There is nothing to verify certificates by.
    #[error(
        "there are no roots yet to verify certificates of {signer} by: {from} is not there, or holds no CA certificate"
    )]
    NoBundle {
        /// The signer.
        signer: String,
        /// Where its roots are to come from.
        from: String,
    },
    /// Signers copy the names of the PKCS#10 request, so a request with others would be signed for them.
    #[error("the PKCS#10 request names other subjects than granted: make one for exactly {granted}")]
    OtherNames {
        /// What was granted.
        granted: String,
    },
    /// Less than the API server accepts; a longer certificate would be more than granted.
    #[error("{} s of lifetime were granted, and Kubernetes issues no certificate for less than {} s: ask for more, or let policy allow more", granted.as_secs(), MIN_LIFETIME.as_secs())]
    Lifetime {
        /// What was granted.
        granted: Duration,
    },
    /// The API server did not do what it was asked to.
    #[error("cannot {action}")]
    Api {
        /// What was asked.
        action: &'static str,
        /// Its answer.
        source: ApiError,
    },
    /// The approver said no.
    #[error("the request was denied: {said}; change what the approver allows, or ask for that")]
    Denied {
        /// Reason and message.
        said: String,
    },
    /// The signer said no.
    #[error("signer {signer} refused the approved request: {said}; change the policy to what this signer signs")]
    Failed {
        /// The signer.
        signer: String,
        /// Reason and message.
        said: String,
    },
    /// Somebody deleted the request before it was signed.
    #[error("the request was deleted before it was signed: see the API server's audit log for who did it")]
    Deleted,
    /// Somebody deleted the request and made another one of its name.
    #[error("the request was deleted, and another one has its name: see the API server's audit log for who did it")]
    Replaced,
    /// Nobody approved it.
    #[error("the request is still Pending after {} s: {}", APPROVAL_TIMEOUT.as_secs(), approver(signer))]
    NotApproved {
        /// The signer.
        signer: String,
    },
    /// Nobody signed it.
    #[error("the request is approved and not signed after {} s: {}", SIGNING_TIMEOUT.as_secs(), who_signs(signer))]
    NotSigned {
        /// The signer.
        signer: String,
    },
}

/// Who should have approved, and where to look.
fn approver(signer: &str) -> &'static str {
    match signer {
        SIGNER => "nobody has approved it; see whether csrd-controller runs, and what it logs about this agent",
        name if name.starts_with(BUILT_IN) => {
            "nothing in Kubernetes approves requests of this signer by itself; let csrd-controller do it, or `kubectl certificate approve` it in time"
        }
        _ => {
            "nobody has approved it; see whether this signer's approver runs, or `kubectl certificate approve` it in time"
        }
    }
}

/// Who should have signed, and where to look.
fn who_signs(signer: &str) -> &'static str {
    match signer {
        SIGNER => "csrd-controller signs for csrd.dev/workload; see whether it runs and has a CA",
        name if name.starts_with(BUILT_IN) => {
            "kube-controller-manager signs for this signer, where the cluster's provider lets it; see whether it has --cluster-signing-cert-file"
        }
        _ => "nobody signs for this signerName; see whether the policy spells it right, and whether its signer runs",
    }
}

impl KubernetesError {
    /// Stable reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotAPod { .. } => "NOT_A_POD",
            Self::NoBundle { .. } => "TRUST_BUNDLE_MISSING",
            Self::OtherNames { .. } => "CSR_NAMES_DIFFER",
            Self::Lifetime { .. } => "LIFETIME_TOO_SHORT",
            Self::Api { source, .. } => source.reason(),
            Self::Denied { .. } => "APPROVAL_DENIED",
            Self::Failed { .. } => "SIGNING_REFUSED",
            Self::Deleted => "CSR_DELETED",
            Self::Replaced => "CSR_REPLACED",
            Self::NotApproved { .. } => "APPROVAL_PENDING",
            Self::NotSigned { .. } => "SIGNER_ABSENT",
        }
    }

    /// Whether the same request may succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::NotAPod { .. } | Self::OtherNames { .. } | Self::Lifetime { .. } => false,
            Self::Denied { .. } | Self::Failed { .. } => false,
            Self::Api { source, .. } => source.is_transient(),
            Self::NoBundle { .. } | Self::Deleted | Self::Replaced => true,
            Self::NotApproved { .. } | Self::NotSigned { .. } => true,
        }
    }

    /// How long the API server wants to be left alone.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Api { source: ApiError::Throttled { retry_after, .. }, .. } => Some(*retry_after),
            _ => None,
        }
    }
}

/// Why the API server did not do what it was asked to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// No connection, or one that broke.
    #[error("the API server cannot be reached: {0}")]
    Unreachable(String),
    /// Longer than `ANSWER_WITHIN`.
    #[error("the API server did not answer within {} s", ANSWER_WITHIN.as_secs())]
    Timeout,
    /// 401.
    #[error("the API server does not accept the agent's credentials: {0}")]
    Unauthorized(String),
    /// 403.
    #[error("RBAC or admission forbids it: {0}; compare the agent's roles with those in deploy/kubernetes")]
    Forbidden(String),
    /// 404.
    #[error("the API server does not have it: {0}")]
    NotFound(String),
    /// 409.
    #[error("it conflicts with what is there: {0}")]
    Conflict(String),
    /// 400 and 422.
    #[error("the API server, or an admission policy of it, finds the request invalid: {0}")]
    Invalid(String),
    /// 429.
    #[error("the API server is busy and wants to be asked again in {} s", retry_after.as_secs())]
    Throttled {
        /// From its `Retry-After`.
        retry_after: Duration,
    },
    /// 5xx.
    #[error("the API server failed with {code}: {said}")]
    Server {
        /// HTTP status.
        code: u16,
        /// Its message.
        said: String,
    },
    /// Any other status, or an answer that is not what the API promises.
    #[error("the API server's answer {code} is not understood: {said}")]
    Unexpected {
        /// HTTP status.
        code: u16,
        /// Its message, or what is wrong with the answer.
        said: String,
    },
}

impl ApiError {
    /// By the status of an answer, its `Retry-After`, and its message.
    pub(super) fn new(code: u16, retry_after: Option<Duration>, message: &str) -> Self {
        /// What client-go assumes of a 429 that says nothing.
        const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(1);
        let said = said(message);
        match code {
            400 | 422 => Self::Invalid(said),
            401 => Self::Unauthorized(said),
            403 => Self::Forbidden(said),
            404 => Self::NotFound(said),
            409 => Self::Conflict(said),
            429 => Self::Throttled { retry_after: retry_after.unwrap_or(DEFAULT_RETRY_AFTER) },
            500..600 => Self::Server { code, said },
            _ => Self::Unexpected { code, said },
        }
    }

    /// By what the client says of a request that got no answer, or of a watch.
    pub(super) fn of_client(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::new(status.code, None, &status.message),
            other => Self::Unreachable(said(&kubernetes::said(&other))),
        }
    }

    /// Stable reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "API_UNREACHABLE",
            Self::Timeout => "API_TIMEOUT",
            Self::Unauthorized(_) => "API_UNAUTHORIZED",
            Self::Forbidden(_) => "API_FORBIDDEN",
            Self::NotFound(_) => "API_NOT_FOUND",
            Self::Conflict(_) => "API_CONFLICT",
            Self::Invalid(_) => "API_INVALID",
            Self::Throttled { .. } => "API_THROTTLED",
            Self::Server { .. } => "API_SERVER_ERROR",
            Self::Unexpected { .. } => "API_UNEXPECTED",
        }
    }

    /// Whether the same request may succeed later, if only because an operator has changed a role meanwhile.
    pub fn is_transient(&self) -> bool {
        !matches!(self, Self::Invalid(_))
    }

    /// Whether asking again soon may help: nobody has to do anything first.
    pub(super) fn passes(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Timeout | Self::Throttled { .. } | Self::Server { .. })
    }

    /// Whether the request may have been carried out all the same.
    pub(super) fn is_in_doubt(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Timeout | Self::Server { .. } | Self::Unexpected { .. })
    }
}

/// Another's text, as much of it as may go into an error.
pub(super) fn said(text: &str) -> String {
    printable_within(text.trim(), MAX_SAID_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_its_reason_and_says_whether_to_come_back() {
        for (code, reason, transient) in [
            (400, "API_INVALID", false),
            (401, "API_UNAUTHORIZED", true),
            (403, "API_FORBIDDEN", true),
            (404, "API_NOT_FOUND", true),
            (409, "API_CONFLICT", true),
            (422, "API_INVALID", false),
            (429, "API_THROTTLED", true),
            (500, "API_SERVER_ERROR", true),
            (599, "API_SERVER_ERROR", true),
            (418, "API_UNEXPECTED", true),
        ] {
            let error = ApiError::new(code, None, "said");
            assert_eq!((error.reason(), error.is_transient()), (reason, transient), "{code}");
        }
    }

    #[test]
    fn foreign_texts_are_cut_and_printable() {
        assert_eq!(said(&"a".repeat(MAX_SAID_BYTES)), "a".repeat(MAX_SAID_BYTES));
        assert_eq!(said(&"a".repeat(MAX_SAID_BYTES + 1)).len(), MAX_SAID_BYTES);
        assert_eq!(said(" a\n\u{1b}[31m\n"), r"a\n\u{1b}[31m");
    }

    #[test]
    fn whoever_waits_in_vain_is_told_where_to_look() {
        let texts = ["csrd.dev/workload", "kubernetes.io/kube-apiserver-client", "example.com/web"].map(|signer| {
            let signer = signer.to_owned();
            let pending = KubernetesError::NotApproved { signer: signer.clone() };
            format!("{pending}\n{}", KubernetesError::NotSigned { signer })
        });
        insta::assert_snapshot!(texts.join("\n"), @"
        the request is still Pending after 25 s: nobody has approved it; see whether csrd-controller runs, and what it logs about this agent
        the request is approved and not signed after 15 s: csrd-controller signs for csrd.dev/workload; see whether it runs and has a CA
        the request is still Pending after 25 s: nothing in Kubernetes approves requests of this signer by itself; let csrd-controller do it, or `kubectl certificate approve` it in time
        the request is approved and not signed after 15 s: kube-controller-manager signs for this signer, where the cluster's provider lets it; see whether it has --cluster-signing-cert-file
        the request is still Pending after 25 s: nobody has approved it; see whether this signer's approver runs, or `kubectl certificate approve` it in time
        the request is approved and not signed after 15 s: nobody signs for this signerName; see whether the policy spells it right, and whether its signer runs
        ");
    }
}
