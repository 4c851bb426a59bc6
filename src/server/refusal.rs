//! From every engine's error to what a caller is told: a code, one sentence, and `google.rpc.ErrorInfo` with a stable
//! reason. The only place that knows both worlds, so that one error has one code, whichever call meets it.
//!
//! PERMISSION_DENIED is for real refusals: clients of the SPIFFE kind never come back from it. What may pass by itself
//! is UNAVAILABLE; what the caller has to change is INVALID_ARGUMENT; a bound is RESOURCE_EXHAUSTED; what only an
//! operator or we can mend is INTERNAL, or FAILED_PRECONDITION where a setting is all that is wrong.
//!
//! | reason | code | what to do |
//! |---|---|---|
//! | `REQUEST_INVALID`, `NAME_INVALID` | INVALID_ARGUMENT | correct the field that the message names |
//! | `SECURITY_HEADER_MISSING` | INVALID_ARGUMENT | call the Workload API with a client of it |
//! | `PROFILE_DISABLED` | UNIMPLEMENTED | use X.509-SVIDs |
//! | `CSR_TOO_LONG`, `CSR_MALFORMED`, `CSR_KEY`, `CSR_SIGNATURE`, `CSR_ATTRIBUTE`, `CSR_EXTENSION`, `CSR_CERTIFICATE_AUTHORITY`, `CSR_USAGE`, `CSR_NAME` | INVALID_ARGUMENT | make another PKCS#10 request |
//! | `CERTIFICATE_UNKNOWN` | NOT_FOUND | subscribe with a request; ids do not outlive the agent |
//! | `SIGNER_UNKNOWN` | FAILED_PRECONDITION | name a signer that the agent has; if it was a policy, correct the policy |
//! | `NO_POLICY_MATCHES`, `POLICY_DENIED`, `NAME_NOT_ALLOWED`, `USAGE_NOT_ALLOWED`, `KEY_NOT_ALLOWED`, `LIFETIME_NOT_ALLOWED`, `SIGNER_NOT_ALLOWED`, `RULE_NOT_MET`, `NOTHING_OFFERED` | PERMISSION_DENIED | ask for what `csrd whoami` lists, or change the policy |
//! | `PEER_EXITED`, `PEER_PID_REUSED`, `PEER_IDS_CHANGED`, `PEER_SOCKET_PASSED`, `PEER_SENT_DESCRIPTORS` | PERMISSION_DENIED | connect again, from the process that calls; a socket cannot be passed on, and no descriptors over it |
//! | `PEER_FOREIGN_PID_NAMESPACE`, `PEER_FOREIGN_USER_NAMESPACE`, `PEER_CGROUPS_DISAGREE` | PERMISSION_DENIED | run agent and caller where one kernel view tells of both |
//! | `PEER_TOO_MANY_GROUPS` | PERMISSION_DENIED | run the caller in fewer groups |
//! | `POD_CGROUP_UNCLEAR`, `POD_CONTRADICTED` | PERMISSION_DENIED | call from a container that the kubelet started |
//! | `POD_TOO_LARGE` | PERMISSION_DENIED | give the pod, or its namespace, fewer and shorter labels |
//! | `POD_GONE` | PERMISSION_DENIED | nothing: the pod has ended |
//! | `POD_UNKNOWN` | UNAVAILABLE | call again; the message says what the API server has not told |
//! | `TOKEN_MALFORMED`, `TOKEN_NOT_ACCEPTED`, `TOKEN_NOT_BOUND`, `TOKEN_OF_OTHER_NODE`, `TOKEN_OF_OTHER_POD`, `TOKEN_OUTSIDE_POD` | PERMISSION_DENIED | send the token that the kubelet projects into the calling pod for the agent's audience, or none |
//! | `TOKEN_NOT_REVIEWED` | UNAVAILABLE | call again |
//! | `PEER_CHANGED`, `PEER_KEEPS_CHANGING`, `ATTEST_UNREADABLE` | UNAVAILABLE | call again |
//! | `RATE_LIMITED`, `TOO_MANY_REQUESTS`, `TOO_MANY_REFUSALS` | RESOURCE_EXHAUSTED | call more slowly |
//! | `TOO_MANY_STREAMS`, `TOO_MANY_BYTES`, `TOO_MANY_CREDENTIALS` | RESOURCE_EXHAUSTED | close streams that are not needed |
//! | `REQUEST_LATE` | DEADLINE_EXCEEDED | send the request's message whole, within 10 s |
//! | `CA_NOT_VALID`, `CA_KEY_UNUSABLE` | UNAVAILABLE | call again; the operator replaces the CA or corrects the clock |
//! | `SIGNER_TIMEOUT`, `KEY_NOT_MADE`, `INTERRUPTED`, `AGENT_STOPPING` | UNAVAILABLE | call again |
//! | `RENEWAL_QUEUED` | UNAVAILABLE, or no code: said of a renewal in `renewal_delayed` | nothing; the operator raises `limits`, or finds out who asks for so many |
//! | `CERTIFICATE_EXPIRED` | UNAVAILABLE | call again; the message says why the renewal fails |
//! | `CERTIFICATE_NOT_AS_GRANTED` | INTERNAL, or UNAVAILABLE while it is only a matter of time | the signer is at fault: see the agent's log |
//! | `SIGNER_MALFORMED_CERTIFICATE`, `KEY_ALGORITHM_NOT_GRANTED`, `USAGES_INCOMPLETE` | INTERNAL | signer or policy are at fault: see the message |
//! | `CSR_NAMES_DIFFER` | INVALID_ARGUMENT | make another PKCS#10 request, for the names that the message lists |
//! | `APPROVAL_DENIED` | PERMISSION_DENIED | ask for what the approver allows; the message has its reason |
//! | `NOT_A_POD`, `LIFETIME_TOO_SHORT`, `SIGNING_REFUSED`, `API_INVALID` | FAILED_PRECONDITION | change the policy: this signer does not sign what it grants |
//! | `APPROVAL_PENDING`, `SIGNER_ABSENT`, `TRUST_BUNDLE_MISSING` | UNAVAILABLE | call again; the message says who is missing in the cluster |
//! | `CSR_DELETED`, `CSR_REPLACED` | UNAVAILABLE | call again; the operator finds out who touches requests of agents |
//! | `API_UNREACHABLE`, `API_TIMEOUT`, `API_THROTTLED`, `API_SERVER_ERROR`, `API_CONFLICT` | UNAVAILABLE | call again, later |
//! | `API_UNAUTHORIZED`, `API_FORBIDDEN`, `API_NOT_FOUND`, `API_UNEXPECTED` | UNAVAILABLE | call again; the operator mends the agent's rights in the cluster |
//! | `ISSUANCE_LOST` | INTERNAL | report it: the agent's log has the details |

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::convert::RequestError;
use crate::{
    account::{Full, Kind},
    attest::AttestError,
    hub::HubError,
    issue::IssueError,
    proto::ERROR_DOMAIN,
    signer::{SignError, kubernetes::KubernetesError},
    telemetry::with_causes,
    text::printable,
};

/// Of a signer that is not there, whoever names it. Clients may come back: a policy or the agent's configuration mends it.
pub(super) const SIGNER_UNKNOWN_CODE: Code = Code::FailedPrecondition;

/// What a caller is told in place of an answer.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) code: Code,
    /// From a closed set.
    pub(super) reason: &'static str,
    /// One line that no terminal takes for more than its words.
    pub(super) message: String,
}

impl Refusal {
    pub(super) fn new(code: Code, reason: &'static str, message: impl Into<String>) -> Self {
        // Names, paths and other servers' words are in there, and the caller's tools print them.
        Self { code, reason, message: printable(&message.into()) }
    }

    /// The agent is going away; the caller should come back.
    pub(super) fn stopping() -> Self {
        Self::new(Code::Unavailable, "AGENT_STOPPING", "the agent is stopping; call again")
    }

    /// The process behind an open stream has become something that policy does not grant the same. It may come back, to
    /// be judged as what it is now.
    pub(super) fn changed() -> Self {
        let message = "the process behind this stream is no longer what it was when it opened it; connect again";
        Self::new(Code::Unavailable, "PEER_CHANGED", message)
    }

    /// A principal has as much of something as it may, or all is taken.
    pub(super) fn full(kind: Kind, full: Full) -> Self {
        match kind {
            Kind::Arriving => {
                Self::new(Code::ResourceExhausted, "TOO_MANY_REQUESTS", too_many("requests on their way", full))
            }
            Kind::Calls => Self::new(Code::ResourceExhausted, "TOO_MANY_STREAMS", too_many("open calls", full)),
            // A connection that finds no place is closed, and an entry is the hub's.
            Kind::Bytes | Kind::Connections | Kind::Entries => {
                Self::new(Code::ResourceExhausted, "TOO_MANY_BYTES", too_many("bytes of the agent's memory", full))
            }
        }
    }

    /// The principal asks too often how policies see it.
    pub(super) fn too_many_who_am_i(wait: Duration) -> Self {
        let message = format!("WhoAmI is called too often; try again in {} ms", wait.as_millis());
        Self::new(Code::ResourceExhausted, "RATE_LIMITED", message)
    }

    /// A request's message, or its end, did not come in time.
    pub(super) fn message_late(within: Duration) -> Self {
        let message = format!("the request was not there within {} s; send it whole", within.as_secs());
        Self::new(Code::DeadlineExceeded, "REQUEST_LATE", message)
    }

    /// The principal has been refused so often that it has to wait.
    pub(super) fn too_many_refusals(wait: Duration) -> Self {
        let seconds = wait.as_secs_f32();
        let message = format!("too many calls of this workload's user were refused; try again in {seconds:.1} s");
        Self::new(Code::ResourceExhausted, "TOO_MANY_REFUSALS", message)
    }
}

fn too_many(what: &str, full: Full) -> String {
    match full {
        Full::Own { held, max } => format!(
            "{what}: {held} are held for this workload's user, at most {max} allowed; end some, or ask for less at once"
        ),
        Full::All { held, max } => {
            format!("{what}: {held} are held for all callers together, at most {max} allowed; try again later")
        }
        Full::Of(_) => format!("{what}: all are held for others; try again later"),
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
            HubError::Stopping => return Self::stopping(),
            HubError::Denied(_) | HubError::PodGone(_) => Code::PermissionDenied,
            HubError::UnknownSigner { .. } => SIGNER_UNKNOWN_CODE,
            HubError::RateLimited { .. } | HubError::TooMany(_) | HubError::GivenUp => Code::ResourceExhausted,
            HubError::Issue(error) => of_issue(error),
            HubError::Lost => Code::Internal,
            HubError::TimedOut | HubError::Expired(_) | HubError::Queued => Code::Unavailable,
        };
        Self::new(code, error.reason(), with_causes(error))
    }
}

/// Of an attempt that failed.
fn of_issue(error: &IssueError) -> Code {
    if error.is_transient() {
        return Code::Unavailable;
    }
    match error {
        IssueError::Sign(SignError::Kubernetes(error)) => match error {
            KubernetesError::OtherNames { .. } => Code::InvalidArgument,
            KubernetesError::Denied { .. } => Code::PermissionDenied,
            _ => Code::FailedPrecondition,
        },
        _ => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::Arc};

    use super::*;
    use crate::signer::kubernetes::ApiError;

    /// Texts in quotes, in code or in backticks.
    fn reasons(text: &str, quote: char) -> Vec<String> {
        let shouted = |word: &&str| {
            word.contains(|c: char| c.is_ascii_uppercase())
                && word.split('_').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_uppercase()))
        };
        text.split(quote).skip(1).step_by(2).filter(shouted).map(str::to_owned).collect()
    }

    #[test]
    fn the_table_holds_every_reason_of_every_engine_once_and_no_other() {
        let rows = include_str!("refusal.rs").lines().filter_map(|line| line.strip_prefix("//! | `"));
        let said: Vec<_> =
            rows.flat_map(|row| reasons(&format!("`{}", row.split(" | ").next().unwrap()), '`')).collect();
        let table: BTreeSet<_> = said.iter().cloned().collect();
        assert_eq!(table.len(), said.len(), "a reason stands twice in {said:?}");

        let mut made = BTreeSet::new();
        for engine in [
            include_str!("../attest.rs"),
            include_str!("../attest/token.rs"),
            include_str!("../hub.rs"),
            include_str!("../issue.rs"),
            include_str!("../policy.rs"),
            include_str!("../signer.rs"),
            include_str!("../signer/kubernetes/failure.rs"),
            include_str!("../x509/csr.rs"),
            include_str!("convert.rs"),
        ] {
            let bodies: Vec<_> = engine.split("fn reason(&self) -> &'static str {").skip(1).collect();
            assert!(!bodies.is_empty(), "every engine has one");
            bodies.iter().for_each(|body| made.extend(reasons(body.split("\n    }\n").next().unwrap(), '"')));
        }
        for own in [
            include_str!("refusal.rs"),
            include_str!("issuance.rs"),
            include_str!("issuance/subscribe.rs"),
            include_str!("identities.rs"),
            include_str!("workload_api.rs"),
            include_str!("sds.rs"),
            include_str!("sds/secrets.rs"),
        ] {
            let code = own.split("#[cfg(test)]").next().unwrap().lines().filter(|line| !line.starts_with("//"));
            for line in code.filter(|line| line.contains("Code::") || line.contains("_CODE")) {
                made.extend(reasons(line, '"'));
            }
        }
        assert_eq!(table, made);
    }

    #[test]
    fn a_cluster_that_brings_no_certificate_is_no_refusal_unless_its_approver_refuses() {
        let api = |source| KubernetesError::Api { action: "create", source };
        let signer = || "example.org/own".to_owned();
        for (error, code) in [
            (KubernetesError::Denied { said: String::new() }, Code::PermissionDenied),
            (KubernetesError::OtherNames { granted: String::new() }, Code::InvalidArgument),
            (KubernetesError::NotAPod { signer: signer() }, Code::FailedPrecondition),
            (KubernetesError::Failed { signer: signer(), said: String::new() }, Code::FailedPrecondition),
            (api(ApiError::Invalid(String::new())), Code::FailedPrecondition),
            (api(ApiError::Forbidden(String::new())), Code::Unavailable),
            (api(ApiError::Timeout), Code::Unavailable),
            (KubernetesError::NotApproved { signer: signer() }, Code::Unavailable),
            (KubernetesError::NotSigned { signer: signer() }, Code::Unavailable),
            (KubernetesError::Deleted, Code::Unavailable),
        ] {
            let reason = error.reason();
            let refusal = Refusal::from(&HubError::Issue(Arc::new(IssueError::Sign(error.into()))));
            assert_eq!((refusal.code, refusal.reason), (code, reason));
        }
    }

    #[test]
    fn what_a_caller_is_told_steers_no_terminal() {
        let refusal = Refusal::new(Code::PermissionDenied, "POLICY_DENIED", "uid 7 /tmp/a\n\u{1b}[2J\u{202e}");
        assert_eq!(Status::from(refusal).message(), r"uid 7 /tmp/a\n\u{1b}[2J\u{202e}");
    }

    #[test]
    fn one_error_reads_the_same_whoever_meets_it() {
        let (own, hubs) = (Refusal::stopping(), Refusal::from(&HubError::Stopping));
        assert_eq!((own.code, own.reason, own.message), (hubs.code, hubs.reason, hubs.message));
        let unknown = HubError::UnknownSigner { policy: "p".into(), signer: "s".into(), known: String::new() };
        let refusal = Refusal::from(&unknown);
        assert_eq!((refusal.code, refusal.reason), (SIGNER_UNKNOWN_CODE, "SIGNER_UNKNOWN"));
    }
}
