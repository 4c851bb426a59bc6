//! One request, answered: judged, approved or denied, and signed if the signer is ours.
//!
//! On the good path that is two writes and not one read: the approval, and at once the certificate. Each names the
//! resourceVersion that was judged, so a request that was deleted and made anew under its name, or answered by somebody
//! else, or by another replica that believes to lead, is a conflict and nothing more. What was approved by somebody else
//! is signed only if it would have been approved here, and gets the condition `Failed` otherwise, so that whoever waits is
//! told. A certificate is written only after it verifies by the roots that are published.

use std::{sync::Arc, time::Duration};

use k8s_openapi::{
    ByteString,
    api::{
        certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition},
        core::v1::{Node, Pod},
    },
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    core::Status,
};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tracing::{Instrument as _, debug_span, field::Empty};

use super::{
    denials::Denials,
    kubelet::{self, Addresses, Kubelet},
    queue::{Outcome, Turn},
    verdict::{Approval, Asked, Claim, PodName, Refusal, Request, Rules},
};
use crate::{
    attest::{Workload, pods::Pods},
    backoff::Backoff,
    clock::Clock,
    kubernetes::{ANSWER_WITHIN, Lag},
    metrics::{Metrics, SignerMetrics},
    policy::PolicySet,
    signer::{Key, Sign, SignError, SigningRequest},
    telemetry,
    text::printable_within,
    x509::{Bundle, Expected, VerifyError},
};

/// A refusal that rests on what is watched is looked at again after this long before it is written: the watch may lag.
pub const SECOND_LOOK: Duration = Duration::from_secs(1);
/// Bytes of a condition's message.
pub const MAX_MESSAGE_BYTES: usize = 1024;
/// Between tries of a request that could not be answered.
const RETRY: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));

/// Why a pod's request is approved.
const ALLOWED: &str = "ALLOWED_BY_POLICY";
/// Why a kubelet's is.
const NODES_OWN: &str = "NODES_OWN_ADDRESSES";

/// Everything that an answer needs.
pub(super) struct Answers {
    pub(super) client: Client,
    pub(super) rules: Rules,
    pub(super) pods: Pods,
    pub(super) policies: watch::Receiver<Arc<PolicySet>>,
    pub(super) policies_lag: Lag,
    /// Whose addresses are whose, where kubelets' requests are answered.
    pub(super) addresses: Addresses,
    pub(super) signer: Arc<dyn Sign>,
    /// The roots that everybody who verifies can read by now.
    pub(super) published: watch::Receiver<Option<Arc<Bundle>>>,
    pub(super) denials: Denials,
    pub(super) clock: Clock,
    pub(super) metrics: Metrics,
    pub(super) signed: SignerMetrics,
}

/// Why a request could not be answered now.
#[derive(Debug, thiserror::Error)]
enum AnswerError {
    #[error("the API server did not do it")]
    Api(#[source] Box<kube::Error>),
    #[error("the API server did not answer within {} s", ANSWER_WITHIN.as_secs())]
    Timeout,
    #[error("pod {0} is there, but the watch has not told of it yet")]
    Late(PodName),
    #[error("it would be refused by what is known, which may be old: {0}")]
    Behind(String),
    #[error("whose an address is, is not all known: {0}")]
    Addresses(String),
    #[error("the signer did not sign")]
    Sign(#[from] SignError),
    #[error("no root is published yet")]
    NotPublished,
    #[error("the certificate does not verify by the roots that are published")]
    Unpublished(#[from] VerifyError),
}

/// A refusal, and the pod that it concerns if that is a real one.
struct Refused {
    refusal: Refusal,
    about: Option<Arc<Workload>>,
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, about: None }
    }
}

impl Answers {
    /// Answers as far as can be done now.
    pub(super) async fn answer(&self, turn: Turn) -> Outcome {
        let Turn { mut request, failures } = turn;
        let span = telemetry::verdict_span(request.traceparent.as_deref());
        match self.try_answer(&mut request).instrument(span).await {
            Ok(true) => Outcome::Answered,
            Ok(false) => Outcome::Again(Instant::now() + SECOND_LOOK, request),
            Err(AnswerError::Api(error)) if is(&error, Status::is_not_found) => Outcome::Answered,
            Err(AnswerError::Api(error)) if is(&error, Status::is_conflict) => Outcome::Changed,
            Err(error) => {
                let delay = RETRY.delay(failures + 1, &mut rand::rng()).max(asked_to_wait(&error));
                tracing::warn!(
                    request = request.name,
                    error = &error as &dyn std::error::Error,
                    "the request waits and is tried again"
                );
                Outcome::Again(Instant::now() + delay, request)
            }
        }
    }

    /// False for a refusal that is to be looked at again.
    async fn try_answer(&self, request: &mut Request) -> Result<bool, AnswerError> {
        let verdict = match &request.asked {
            Ok(Asked::Pod(claim)) => self.judge(claim).await?,
            Ok(Asked::Kubelet(kubelet)) => match self.judge_kubelet(kubelet).await? {
                Ok(()) => {
                    let message = format!("every name is an address of Node {}", kubelet.node);
                    return self.approve(request, NODES_OWN, &message).await.map(|()| true);
                }
                Err(refusal) => Err(Refusal::Kubelet(refusal).into()),
            },
            Err(refusal) => Err(refusal.clone().into()),
        };
        match verdict {
            Ok((approval, workload)) => self.allow(request, approval, &workload).await?,
            Err(refused) => {
                if refused.refusal.may_be_early() {
                    if !std::mem::replace(&mut request.looked_twice, true) {
                        return Ok(false);
                    }
                    self.knows_all().map_err(AnswerError::Behind)?;
                }
                self.refuse(request, refused).await?;
            }
        }
        Ok(true)
    }

    /// Whether what is watched is all known, as it is now; an agent may know more, and its caller is told a denial for good.
    fn knows_all(&self) -> Result<(), String> {
        self.pods.ready()?;
        match self.pods.lag().is_over() && self.policies_lag.is_over() {
            true => Ok(()),
            false => Err("a watch has failed, and has not had the time to catch up".to_owned()),
        }
    }

    async fn judge(&self, claim: &Claim) -> Result<Result<(Approval, Arc<Workload>), Refused>, AnswerError> {
        let agent = self.find(&claim.agent, &claim.node, Refusal::AgentGone { agent: claim.agent.clone() });
        let agent = match agent.await? {
            Ok(agent) => agent,
            Err(refusal) => return Ok(Err(refusal.into())),
        };
        let workload = self.find(&claim.pod, &claim.node, Refusal::PodGone { pod: claim.pod.clone() });
        let workload = match workload.await? {
            Ok(workload) => workload,
            Err(refusal) => return Ok(Err(refusal.into())),
        };
        let policies = self.policies.borrow().clone();
        Ok(match claim.decide(&agent, &workload, &self.rules, &policies) {
            Ok(approval) => Ok((approval, workload)),
            Err(refusal) => Err(Refused { refusal, about: Some(workload) }),
        })
    }

    async fn judge_kubelet(&self, kubelet: &Kubelet) -> Result<Result<(), kubelet::Refusal>, AnswerError> {
        let node = within(Api::<Node>::all(self.client.clone()).get_opt(&kubelet.node)).await?;
        match node {
            Some(node) => self.addresses.judge(kubelet, &node).map_err(AnswerError::Addresses),
            None => Ok(Err(kubelet::Refusal::NodeGone { node: kubelet.node.clone() })),
        }
    }

    /// The live pod of that UID; `gone` once the API server itself says that there is none, and a refusal at once if it is
    /// on no such node, for which nobody else is to wait.
    async fn find(
        &self,
        pod: &PodName,
        node: &str,
        gone: Refusal,
    ) -> Result<Result<Arc<Workload>, Refusal>, AnswerError> {
        if let Some(workload) = self.pods.by_uid(&pod.uid) {
            return Ok(Ok(workload));
        }
        if self.pods.is_beyond(&pod.uid) {
            return Ok(Err(Refusal::PodTooLarge { pod: pod.clone() }));
        }
        let api = Api::<Pod>::namespaced(self.client.clone(), &pod.namespace);
        let there = within(api.get_opt(&pod.name)).await?;
        let lives = |there: &Pod| {
            let phase = there.status.as_ref().and_then(|status| status.phase.as_deref());
            there.metadata.uid.as_ref() == Some(&pod.uid) && !matches!(phase, Some("Succeeded" | "Failed"))
        };
        let Some(there) = there.filter(lives) else { return Ok(Err(gone)) };
        let on = there.spec.and_then(|spec| spec.node_name).unwrap_or_default();
        if on != node {
            return Ok(Err(Refusal::PodElsewhere { pod: pod.clone(), on, node: node.to_owned() }));
        }
        self.pods.wait_for(&pod.uid).await.map(Ok).ok_or_else(|| AnswerError::Late(pod.clone()))
    }

    async fn allow(&self, request: &mut Request, approval: Approval, workload: &Workload) -> Result<(), AnswerError> {
        if !request.approved {
            let message = format!("policy {:?} allows it for {workload}", approval.grant.policy());
            self.approve(request, ALLOWED, &message).await?;
        }
        if approval.grant.signer() != self.rules.signer {
            return Ok(());
        }
        let started = Instant::now();
        let written = self.sign(request, approval, workload).instrument(write_span("sign")).await;
        match &written {
            Ok(()) => self.signed.issued(started.elapsed()),
            Err(error) => self.signed.failed(error.reason(), started.elapsed()),
        }
        written
    }

    async fn approve(&self, request: &mut Request, reason: &str, message: &str) -> Result<(), AnswerError> {
        let approved = self.answer_with(request, "Approved", reason, message).instrument(write_span("approve"));
        request.version = approved.await?.metadata.resource_version.unwrap_or_default();
        request.approved = true;
        self.metrics.csr_verdicts.good();
        tracing::info!(request = request.name, reason, "approved: {message}");
        Ok(())
    }

    async fn sign(&self, request: &Request, approval: Approval, workload: &Workload) -> Result<(), AnswerError> {
        let Approval { grant, csr } = approval;
        let key = Key::Held(Arc::new(csr));
        let asked = SigningRequest { workload, grant: &grant, key: &key, progress: &|_| () };
        let chain = match self.signer.sign(asked).await {
            Err(error) if !error.is_transient() => return self.fail(request, error.reason(), &error.to_string()).await,
            signed => signed?,
        };
        let published = self.published.borrow().clone().ok_or(AnswerError::NotPublished)?;
        let (names, usages, lifetime) = (grant.names(), grant.usages(), grant.lifetime());
        let expected = Expected { names, usages, public_key: key.public_key(), lifetime, now: self.clock.now() };
        chain.verify(&published, &expected)?;
        let patch = json!({
            "metadata": {"resourceVersion": request.version},
            "status": {"certificate": ByteString(chain.to_pem().into_bytes())},
        });
        let (parameters, patch) = (PatchParams::default(), Patch::Merge(&patch));
        within(self.requests().patch_status(&request.name, &parameters, &patch)).await?;
        tracing::info!(request = request.name, serial = chain.serial_hex(), "signed");
        Ok(())
    }

    async fn refuse(&self, request: &Request, refused: Refused) -> Result<(), AnswerError> {
        let Refused { refusal, about } = refused;
        let (reason, message) = (refusal.reason(), said(&refusal.to_string()));
        match request.approved {
            true => self.fail(request, reason, &message).await?,
            false => {
                let denied = self.answer_with(request, "Denied", reason, &message).instrument(write_span("deny"));
                denied.await?;
            }
        }
        self.metrics.csr_verdicts.bad(reason);
        tracing::Span::current().record("csrd.reason", reason);
        tracing::info!(request = request.name, node = request.node, reason, "refused: {message}");
        if let Some(pod) = about.as_deref().and_then(Workload::pod) {
            self.denials.tell(pod, reason, &message).await;
        }
        Ok(())
    }

    /// Writes the one condition that a request without conditions gets.
    async fn answer_with(
        &self,
        request: &Request,
        condition: &str,
        reason: &str,
        message: &str,
    ) -> Result<CertificateSigningRequest, AnswerError> {
        let condition = json!({"type": condition, "status": "True", "reason": reason, "message": said(message)});
        let patch = json!({
            "metadata": {"resourceVersion": request.version},
            "status": {"conditions": [condition]},
        });
        let (parameters, patch) = (PatchParams::default(), Patch::Merge(&patch));
        within(self.requests().patch_subresource("approval", &request.name, &parameters, &patch)).await
    }

    /// Says on a request that was approved why it is not signed.
    async fn fail(&self, request: &Request, reason: &str, message: &str) -> Result<(), AnswerError> {
        let requests = self.requests();
        let object = within(requests.get(&request.name)).await?;
        if object.metadata.uid.as_ref() != Some(&request.uid) {
            return Ok(());
        }
        let mut conditions = object.status.and_then(|status| status.conditions).unwrap_or_default();
        conditions.push(CertificateSigningRequestCondition {
            type_: "Failed".to_owned(),
            status: "True".to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(said(message)),
            ..CertificateSigningRequestCondition::default()
        });
        // Of the rest not all has been read, so that it could not be written back.
        let patch = json!({
            "metadata": {"resourceVersion": object.metadata.resource_version},
            "status": {"conditions": conditions},
        });
        let (parameters, patch) = (PatchParams::default(), Patch::Merge(&patch));
        let written = requests.patch_status(&request.name, &parameters, &patch);
        within(written).instrument(write_span("fail")).await.map(drop)
    }

    fn requests(&self) -> Api<CertificateSigningRequest> {
        Api::all(self.client.clone())
    }
}

/// The span of one write; its `Audit-Id` is recorded where the answer is read.
fn write_span(name: &'static str) -> tracing::Span {
    debug_span!("write", otel.name = name, otel.kind = "client", csrd.audit_id = Empty)
}

async fn within<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, AnswerError> {
    match timeout(ANSWER_WITHIN, request).await {
        Ok(answer) => answer.map_err(|error| AnswerError::Api(Box::new(error))),
        Err(_) => Err(AnswerError::Timeout),
    }
}

fn is(error: &kube::Error, what: impl FnOnce(&Status) -> bool) -> bool {
    matches!(error, kube::Error::Api(status) if what(status))
}

/// What the API server said about when to come back.
fn asked_to_wait(error: &AnswerError) -> Duration {
    let seconds = match error {
        AnswerError::Api(error) => match &**error {
            kube::Error::Api(status) => status.details.as_ref().map_or(0, |details| details.retry_after_seconds),
            _ => 0,
        },
        _ => 0,
    };
    Duration::from_secs(seconds.into())
}

/// What a condition or an Event says: names of others in it steer no terminal of whoever reads it.
pub(super) fn said(message: &str) -> String {
    printable_within(message, MAX_MESSAGE_BYTES)
}

impl AnswerError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Api(_) => "API_REFUSED",
            Self::Timeout => "API_TIMEOUT",
            Self::Late(_) => "POD_LATE",
            Self::Behind(_) => "WATCH_BEHIND",
            Self::Addresses(_) => "NODES_LATE",
            Self::Sign(error) => error.reason(),
            Self::NotPublished | Self::Unpublished(_) => "ROOT_NOT_PUBLISHED",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, convert::Infallible, sync::Mutex, time::SystemTime};

    use http::{Method, Response, StatusCode};
    use http_body_util::Full;
    use kube::client::Body;
    use serde_json::Value;

    use super::*;
    use crate::{attest::pods::Scope, signer::embedded::Embedded};

    type Sent = Arc<Mutex<Vec<(Method, String, Value)>>>;

    /// Answers before an API server that answers everything alike, and what that was sent.
    fn answers(code: StatusCode, answer: Value) -> (Answers, Sent) {
        let sent = Sent::default();
        let record = sent.clone();
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let (record, answer) = (record.clone(), answer.to_string());
            async move {
                let (head, body) = request.into_parts();
                let body = serde_json::from_slice(&body.collect_bytes().await.unwrap()).unwrap_or_default();
                record.lock().unwrap().push((head.method, head.uri.path().to_owned(), body));
                Ok::<_, Infallible>(Response::builder().status(code).body(Full::from(answer)).unwrap())
            }
        });
        let client = Client::new(service, "default");
        let clock = Clock::paused(SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000));
        let (metrics, hour) = (Metrics::new(), Duration::from_secs(3600));
        let signer = Embedded::ephemeral(hour, &clock, metrics.signer("test")).unwrap();
        let answers = Answers {
            denials: Denials::new(client.clone(), "test"),
            client,
            rules: Rules {
                signer: "csrd.dev/workload".into(),
                approves: BTreeSet::new(),
                agent: ("csrd-system".into(), "csrd-agent".into()),
                kubelet_serving: false,
            },
            pods: Pods::new(Scope::Cluster, clock.clone()),
            policies: watch::channel(Arc::default()).1,
            policies_lag: Lag::default(),
            addresses: Addresses::default(),
            signer: Arc::new(signer),
            published: watch::channel(None).1,
            clock,
            signed: metrics.signer("test"),
            metrics,
        };
        (answers, sent)
    }

    /// A request that is refused without a look at any pod.
    fn refused(approved: bool) -> Turn {
        refused_for(Refusal::Expiration, approved)
    }

    /// As if judged by what is watched.
    fn refused_by_the_watched() -> Turn {
        let pod = PodName { namespace: "a".into(), name: "b".into(), uid: "c".into() };
        refused_for(Refusal::PodDiffers { pod, field: "node" }, false)
    }

    fn refused_for(refusal: Refusal, approved: bool) -> Turn {
        let request = Request {
            name: "csrd-0".into(),
            uid: "uid".into(),
            version: "7".into(),
            node: "n1".into(),
            approved,
            looked_twice: false,
            traceparent: None,
            asked: Err(refusal),
        };
        Turn { request: Box::new(request), failures: 0 }
    }

    fn answered() -> Value {
        json!({"metadata": {}, "spec": {"request": "", "signerName": ""}})
    }

    fn status(code: u16, reason: &str, retry_after: u32) -> Value {
        json!({"status": "Failure", "code": code, "reason": reason, "message": "no",
            "details": {"retryAfterSeconds": retry_after}})
    }

    #[tokio::test(start_paused = true)]
    async fn a_denial_is_one_write_that_names_the_version_it_was_decided_on() {
        let (answers, sent) = answers(StatusCode::OK, answered());
        assert!(matches!(answers.answer(refused(false)).await, Outcome::Answered));
        let sent = sent.lock().unwrap();
        let [(method, path, patch)] = sent.as_slice() else { panic!("{sent:?}") };
        let expected = "/apis/certificates.k8s.io/v1/certificatesigningrequests/csrd-0/approval";
        assert_eq!((method, path.as_str()), (&Method::PATCH, expected));
        assert_eq!(patch["metadata"], json!({"resourceVersion": "7"}));
        let condition = &patch["status"]["conditions"][0];
        assert_eq!(
            (condition["type"].as_str(), condition["reason"].as_str()),
            (Some("Denied"), Some("EXPIRATION_MISSING"))
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_api_server_says_decides_what_becomes_of_a_request() {
        let outcome = async |code: StatusCode, reason: &str, retry_after| {
            answers(code, status(code.as_u16(), reason, retry_after)).0.answer(refused(false)).await
        };
        assert!(matches!(outcome(StatusCode::NOT_FOUND, "NotFound", 0).await, Outcome::Answered));
        assert!(matches!(outcome(StatusCode::CONFLICT, "Conflict", 0).await, Outcome::Changed));
        for (code, seconds) in [(403, 0), (422, 0), (429, 7), (500, 0), (503, 60)] {
            let before = Instant::now();
            let code = StatusCode::from_u16(code).unwrap();
            let Outcome::Again(at, request) = outcome(code, "", seconds).await else { panic!("{code}") };
            assert!(at - before >= Duration::from_secs(seconds.into()).max(Duration::from_millis(200)), "{code}");
            assert_eq!((request.version.as_str(), request.approved), ("7", false));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_be_early_is_looked_at_twice_whatever_failed_before() {
        for failures in [0, 1, 5] {
            let (answers, sent) = answers(StatusCode::OK, answered());
            answers.pods.list_for_test(Vec::new());
            let turn = Turn { failures, ..refused_by_the_watched() };
            let Outcome::Again(at, request) = answers.answer(turn).await else { panic!("after {failures}") };
            assert_eq!((at - Instant::now(), sent.lock().unwrap().len()), (SECOND_LOOK, 0), "after {failures}");
            let outcome = answers.answer(Turn { request, failures: failures + 1 }).await;
            assert!(matches!(outcome, Outcome::Answered), "after {failures}: {outcome:?}");
            assert_eq!(sent.lock().unwrap().len(), 1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_denied_by_what_is_watched_while_that_is_not_all_known() {
        let (answers, sent) = answers(StatusCode::OK, answered());
        answers.pods.list_for_test(Vec::new());
        answers.pods.want_services(true);
        let mut turn = refused_by_the_watched();
        for failures in 0..9 {
            let Outcome::Again(_, request) = answers.answer(turn).await else { panic!("after {failures}") };
            turn = Turn { request, failures };
        }
        assert_eq!(sent.lock().unwrap().len(), 0);
        assert!(matches!(answers.answer(refused(false)).await, Outcome::Answered), "what rests on nothing watched");
        answers.pods.want_services(false);
        assert!(matches!(answers.answer(turn).await, Outcome::Answered));
        assert_eq!(sent.lock().unwrap().len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_fails_puts_denials_by_it_off_until_it_has_had_time_to_catch_up() {
        for of_policies in [false, true] {
            let (answers, sent) = answers(StatusCode::OK, answered());
            answers.pods.list_for_test(Vec::new());
            let lag = if of_policies { &answers.policies_lag } else { answers.pods.lag() };
            let mut turn = refused_by_the_watched();
            turn.request.looked_twice = true;
            let wait = lag.backoff().next().unwrap();
            let Outcome::Again(_, request) = answers.answer(turn).await else { panic!("it is put off") };
            assert!(sent.lock().unwrap().is_empty());
            tokio::time::advance(wait + ANSWER_WITHIN).await;
            assert!(matches!(answers.answer(Turn { request, failures: 1 }).await, Outcome::Answered));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn another_request_of_the_same_name_is_not_failed_in_its_place() {
        let other = json!({"metadata": {"uid": "another"}, "spec": {"request": "", "signerName": ""}});
        let (answers, sent) = answers(StatusCode::OK, other);
        assert!(matches!(answers.answer(refused(true)).await, Outcome::Answered));
        assert!(sent.lock().unwrap().iter().all(|(method, ..)| method == Method::GET));
    }

    #[test]
    fn a_message_is_one_line_cut_between_characters() {
        let fits = "x".repeat(MAX_MESSAGE_BYTES);
        assert_eq!(said(&fits), fits);
        assert_eq!(said(&format!("{fits}x")), format!("{}…", &fits[3..]));
        assert_eq!(said(&format!("{}\u{fc}", &fits[1..])), format!("{}…", &fits[3..]));
        assert_eq!(said("a\n\u{1b}[31m\u{202e}b"), r"a\n\u{1b}[31m\u{202e}b");
    }
}
