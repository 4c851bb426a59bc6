//! Whether a CertificateSigningRequest is approved: a pure function of what the API server wrote, of two live pods and of
//! the policies.
//!
//! [`screen`] takes from a request what can be judged without looking anything up, bounded in size; [`Claim::decide`]
//! judges it by the pod of the agent and the pod it is for. Only what the API server itself wrote is believed: who made the
//! request (`spec.username`, `groups` and `extra`) and what the pods are. Labels and annotations are a claim, compared
//! field by field. What a request asks for is read from the PKCS#10 and `spec`, and decided as on the node, by
//! [`policy::decide`], the only source of a [`Grant`].
//!
//! What others' approvers got wrong (GHSA-x7j5-fww5-mqmv, talos-cloud-controller-manager#360, deckhouse#22901) is a row
//! each in the tests.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};

use super::kubelet::{self, Kubelet};
use crate::{
    attest::{PodFacts, Workload},
    kubernetes::{MAX_LABELS, MAX_POD_BYTES, annotation, extra, is_beyond, label},
    policy::{self, Ask, Denial, Grant, PolicySet},
    telemetry::with_causes,
    x509::{Csr, CsrError, Usage, Usages, csr::MAX_PKCS10_BYTES},
};

/// Bytes in the value of one of our annotations: the longest name of a Kubernetes object.
pub const MAX_ANNOTATION_BYTES: usize = 253;
/// The shortest lifetime that a request may ask for, as the API server has it.
pub const MIN_EXPIRATION_SECONDS: i32 = 600;

/// What verdicts go by, beside policies.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    /// The signer's own name.
    pub(super) signer: String,
    /// Others' signers, whose requests are approved and signed elsewhere.
    pub(super) approves: BTreeSet<String>,
    /// Namespace and ServiceAccount of the agents.
    pub(super) agent: (String, String),
    /// Whether kubelets' serving certificates are approved.
    pub(super) kubelet_serving: bool,
}

/// A request that is addressed to us and has no answer yet.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) name: String,
    pub(super) uid: String,
    /// The resourceVersion that is judged; whatever changes later is not what was judged.
    pub(super) version: String,
    /// For whom turns and quotas are counted: the node of the agent or kubelet that made it; empty for all others.
    pub(super) node: String,
    /// Approved, by us or by somebody else, and not signed yet.
    pub(super) approved: bool,
    /// Whether a refusal that [may be early](Refusal::may_be_early) is final now.
    pub(super) looked_twice: bool,
    /// W3C `traceparent` of the issuance.
    pub(super) traceparent: Option<String>,
    pub(super) asked: Result<Asked, Refusal>,
}

/// What is asked for.
#[derive(Debug)]
pub(super) enum Asked {
    /// A certificate for a pod.
    Pod(Box<Claim>),
    /// A kubelet's own.
    Kubelet(Kubelet),
}

/// What an agent asks for, and for whom.
#[derive(Debug)]
pub(super) struct Claim {
    /// The agent's pod and its node, from its token.
    pub(super) agent: PodName,
    pub(super) node: String,
    /// The pod that it claims to ask for.
    pub(super) pod: PodName,
    service_account: String,
    signer: String,
    foreign: bool,
    usages: Usages,
    lifetime: std::time::Duration,
    pkcs10: Vec<u8>,
}

/// One pod, of all that ever were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PodName {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
}

/// A decision to approve, with the proof of possession it rests on.
#[derive(Debug)]
pub(super) struct Approval {
    pub(super) grant: Grant,
    pub(super) csr: Csr,
}

/// What is to be judged of `object`; `None` when it is none of ours, has its answer, or more than is read of one.
pub(super) fn screen(object: CertificateSigningRequest, rules: &Rules) -> Option<Request> {
    let CertificateSigningRequest { metadata, spec, status } = object;
    // Of whom and for whom it is nobody has read; no agent makes such a one.
    if is_beyond(&metadata) {
        return None;
    }
    let own = spec.signer_name == rules.signer;
    let foreign = rules.approves.contains(&spec.signer_name);
    let status = status.unwrap_or_default();
    let conditions: Vec<_> = status.conditions.iter().flatten().map(|it| it.type_.as_str()).collect();
    let approved = conditions.contains(&"Approved");
    let answered = conditions.contains(&"Denied") || conditions.contains(&"Failed") || status.certificate.is_some();
    let labelled =
        metadata.labels.iter().flatten().any(|(key, value)| key == label::MANAGED_BY && value == label::MANAGER);
    let agents = is_agent(&spec, rules);
    let kubelet = match rules.kubelet_serving && spec.signer_name == kubelet::SIGNER && !approved {
        true => Kubelet::read(&spec),
        false => None,
    };
    let ours = match (own, foreign) {
        // Signing is up to us, so whoever had such a request approved is told if it is not signed.
        (true, _) => labelled || approved,
        (false, true) => labelled && agents && !approved,
        (false, false) => kubelet.is_some(),
    };
    if !ours || answered {
        return None;
    }
    let annotations = metadata.annotations.unwrap_or_default();
    let token = token(&spec);
    let node = match (&kubelet, &token) {
        (Some(kubelet), _) => kubelet.node.clone(),
        (None, Ok((node, _))) if agents => node.clone(),
        _ => String::new(),
    };
    Some(Request {
        name: metadata.name?,
        uid: metadata.uid?,
        version: metadata.resource_version?,
        node,
        approved,
        looked_twice: false,
        traceparent: annotations.get(annotation::TRACEPARENT).filter(|it| it.len() <= MAX_ANNOTATION_BYTES).cloned(),
        asked: match kubelet {
            Some(kubelet) => Ok(Asked::Kubelet(kubelet)),
            None if agents && labelled => {
                let claim = token.and_then(|(node, pod)| Claim::read(node, pod, spec, &annotations, rules));
                claim.map(|claim| Asked::Pod(Box::new(claim)))
            }
            None => Err(Refusal::NotAnAgent { account: format!("{}/{}", rules.agent.0, rules.agent.1) }),
        },
    })
}

/// Whether the API server says that the ServiceAccount of the agents made it. A user's certificate may bear the name of a
/// ServiceAccount; its groups come from the authenticator.
fn is_agent(spec: &CertificateSigningRequestSpec, rules: &Rules) -> bool {
    let (namespace, account) = &rules.agent;
    let in_group = |name: &str| spec.groups.iter().flatten().any(|group| group == name);
    spec.username.as_deref() == Some(&*format!("system:serviceaccount:{namespace}:{account}"))
        && in_group("system:serviceaccounts")
        && in_group(&format!("system:serviceaccounts:{namespace}"))
}

/// Node and pod (name, UID) that the requester's token is bound to.
fn token(spec: &CertificateSigningRequestSpec) -> Result<(String, (String, String)), Refusal> {
    let one = |key: &'static str| {
        let value = extra::one(spec.extra.as_ref(), key);
        let value = value.filter(|value| !value.is_empty() && value.len() <= MAX_ANNOTATION_BYTES);
        value.cloned().ok_or(Refusal::TokenNotBound { key })
    };
    Ok((one(extra::NODE_NAME)?, (one(extra::POD_NAME)?, one(extra::POD_UID)?)))
}

/// `spec.request`, unless it is too long to wait for its turn: PEM is at most twice as long as DER, and what is longer need
/// not be kept to be refused.
pub(super) fn pkcs10(request: Vec<u8>) -> Result<Vec<u8>, CsrError> {
    match request.len() {
        bytes if bytes > 2 * MAX_PKCS10_BYTES => Err(CsrError::TooLong { bytes }),
        _ => Ok(request),
    }
}

impl Claim {
    fn read(
        node: String,
        (name, uid): (String, String),
        spec: CertificateSigningRequestSpec,
        annotations: &BTreeMap<String, String>,
        rules: &Rules,
    ) -> Result<Self, Refusal> {
        // Names of objects and nothing else: they become parts of a path to the API server.
        let said = |key: &'static str| {
            let value = annotations.get(key).filter(|value| policy::is_object_name(value));
            value.cloned().ok_or(Refusal::Annotation { key })
        };
        // Never of none: whoever is root on a node may claim a static pod of any name and labels, but none with a
        // ServiceAccount.
        if annotations.get(annotation::SERVICE_ACCOUNT).is_some_and(String::is_empty) {
            return Err(Refusal::NoServiceAccount);
        }
        let claimed = said(annotation::NODE)?;
        if claimed != node {
            return Err(Refusal::OtherNodeClaimed { claimed, node });
        }
        let seconds = spec.expiration_seconds.filter(|seconds| *seconds >= MIN_EXPIRATION_SECONDS);
        let seconds = seconds.and_then(|seconds| u64::try_from(seconds).ok()).ok_or(Refusal::Expiration)?;
        let pkcs10 = pkcs10(spec.request.0).map_err(Refusal::Pkcs10)?;
        Ok(Self {
            agent: PodName { namespace: rules.agent.0.clone(), name, uid },
            node,
            pod: PodName {
                namespace: said(annotation::POD_NAMESPACE)?,
                name: said(annotation::POD_NAME)?,
                uid: said(annotation::POD_UID)?,
            },
            service_account: said(annotation::SERVICE_ACCOUNT)?,
            foreign: spec.signer_name != rules.signer,
            signer: spec.signer_name,
            usages: usages(spec.usages.iter().flatten())?,
            lifetime: std::time::Duration::from_secs(seconds),
            pkcs10,
        })
    }

    /// Decides, by the live pods with the UIDs of [`Claim::agent`] and [`Claim::pod`].
    pub(super) fn decide(
        &self,
        agent: &Workload,
        workload: &Workload,
        rules: &Rules,
        policies: &PolicySet,
    ) -> Result<Approval, Refusal> {
        let (Some(agent), Some(pod)) = (agent.pod(), workload.pod()) else {
            return Err(Refusal::PodDiffers { pod: self.pod.clone(), field: "kind" });
        };
        self.check_agent(agent, &rules.agent.1)?;
        self.check_pod(pod)?;
        let csr = Csr::parse(&self.pkcs10).map_err(Refusal::Pkcs10)?;
        let beyond = csr.usages().minus(self.usages);
        if !beyond.is_empty() {
            return Err(Refusal::UsagesDiffer { beyond });
        }
        let ask = Ask {
            names: csr.names().clone(),
            usages: self.usages,
            key: csr.public_key().algorithm(),
            lifetime: Some(self.lifetime),
            signer: Some(self.signer.clone()),
            policy: None,
        };
        let grant = policy::decide(policies, workload, &ask).map_err(Refusal::Policy)?;
        self.check_foreign(&grant, &csr)?;
        Ok(Approval { grant, csr })
    }

    fn check_agent(&self, agent: &PodFacts, account: &str) -> Result<(), Refusal> {
        let fields = [
            ("namespace", &agent.namespace, self.agent.namespace.as_str()),
            ("name", &agent.name, &self.agent.name),
            ("UID", &agent.uid, &self.agent.uid),
            ("ServiceAccount", &agent.service_account, account),
            ("node", &agent.node, &self.node),
        ];
        match fields.into_iter().find(|(_, is, said)| is != said) {
            Some((field, ..)) => Err(Refusal::AgentDiffers { agent: self.agent.clone(), field }),
            None => Ok(()),
        }
    }

    fn check_pod(&self, pod: &PodFacts) -> Result<(), Refusal> {
        if pod.node != self.node {
            let (pod, on) = (self.pod.clone(), pod.node.clone());
            return Err(Refusal::PodElsewhere { pod, on, node: self.node.clone() });
        }
        let fields = [
            ("namespace", &pod.namespace, &self.pod.namespace),
            ("name", &pod.name, &self.pod.name),
            ("UID", &pod.uid, &self.pod.uid),
            ("ServiceAccount", &pod.service_account, &self.service_account),
        ];
        match fields.into_iter().find(|(_, is, said)| is != said) {
            Some((field, ..)) => Err(Refusal::PodDiffers { pod: self.pod.clone(), field }),
            None => Ok(()),
        }
    }

    /// Somebody else's signer reads the PKCS#10 request and not our grant.
    fn check_foreign(&self, grant: &Grant, csr: &Csr) -> Result<(), Refusal> {
        match self.foreign && !grant.names().same_as(csr.names()) {
            true => Err(Refusal::NamesDiffer),
            false => Ok(()),
        }
    }
}

fn usages<'a>(names: impl Iterator<Item = &'a String>) -> Result<Usages, Refusal> {
    let known = |name: &String| {
        let clipped = || name.chars().take(MAX_ANNOTATION_BYTES).collect();
        Usage::from_name(name).ok_or_else(|| Refusal::Usage { name: clipped() })
    };
    names.map(known).collect()
}

impl std::fmt::Display for PodName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{} (UID {})", self.namespace, self.name, self.uid)
    }
}

/// Why a request is denied: a sentence that names the rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error(
        "csrd signs only what an agent, ServiceAccount {account}, asks for a pod, under the label {}={}",
        label::MANAGED_BY,
        label::MANAGER
    )]
    NotAnAgent { account: String },
    #[error(
        "the requester's token is bound to no pod on a node: it carries not exactly one {key}; agents need a projected token"
    )]
    TokenNotBound { key: &'static str },
    #[error(
        "annotation {key} must be there and be the name of an object, of 1 to {MAX_ANNOTATION_BYTES} bytes of a-z, 0-9, '-' and '.'"
    )]
    Annotation { key: &'static str },
    #[error("a pod without a ServiceAccount, as static pods are, gets no certificate: any node may claim to have one")]
    NoServiceAccount,
    #[error(
        "annotation {} says node {claimed:?}, and the requester's token is bound to node {node:?}",
        annotation::NODE
    )]
    OtherNodeClaimed { claimed: String, node: String },
    #[error("spec.expirationSeconds must be given, and be {MIN_EXPIRATION_SECONDS} or more")]
    Expiration,
    #[error("spec.usages: {name:?} is none that a workload may have")]
    Usage { name: String },
    #[error("the PKCS#10 request asks for {beyond}, which spec.usages does not")]
    UsagesDiffer { beyond: Usages },
    #[error("spec.request: {}", with_causes(.0))]
    Pkcs10(CsrError),
    #[error("the agent's pod {agent} is gone")]
    AgentGone { agent: PodName },
    #[error("the agent's pod {agent} is another in its {field} than its token says, or is no agent")]
    AgentDiffers { agent: PodName, field: &'static str },
    #[error(
        "of pod {pod}, or of its namespace, there is more than is read: at most {MAX_LABELS} labels, and {MAX_POD_BYTES} bytes of labels, addresses and containers; it counts as none"
    )]
    PodTooLarge { pod: PodName },
    #[error("pod {pod} is gone: it was deleted, has ended, or never was")]
    PodGone { pod: PodName },
    #[error("pod {pod} is on node {on:?}, and an agent asks only for pods of its own node, here {node:?}")]
    PodElsewhere { pod: PodName, on: String, node: String },
    #[error("pod {pod} is another in its {field} than the annotations say")]
    PodDiffers { pod: PodName, field: &'static str },
    #[error("{0}")]
    Policy(Denial),
    #[error("{}", with_causes(.0))]
    Kubelet(kubelet::Refusal),
    #[error(
        "the names in the PKCS#10 request are not those granted, and this signer signs what the PKCS#10 request says"
    )]
    NamesDiffer,
}

impl Refusal {
    /// Stable reason: in the condition, the Event and the metric.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::NotAnAgent { .. } => "NOT_AN_AGENT",
            Self::TokenNotBound { .. } => "TOKEN_NOT_BOUND",
            Self::Annotation { .. } => "ANNOTATION_MISSING",
            Self::NoServiceAccount => "NO_SERVICE_ACCOUNT",
            Self::OtherNodeClaimed { .. } => "OTHER_NODE_CLAIMED",
            Self::Expiration => "EXPIRATION_MISSING",
            Self::Usage { .. } => "USAGE_NOT_ALLOWED",
            Self::UsagesDiffer { .. } => "CSR_USAGE",
            Self::Pkcs10(error) => error.reason(),
            Self::AgentGone { .. } => "AGENT_GONE",
            Self::AgentDiffers { .. } => "AGENT_DIFFERS",
            Self::PodTooLarge { .. } => "POD_TOO_LARGE",
            Self::PodGone { .. } => "POD_GONE",
            Self::PodElsewhere { .. } => "POD_ON_OTHER_NODE",
            Self::PodDiffers { .. } => "POD_DIFFERS",
            Self::Policy(denial) => denial.reason(),
            Self::Kubelet(refusal) => refusal.reason(),
            Self::NamesDiffer => "NAMES_DIFFER",
        }
    }

    /// Whether it rests on what is watched, which may lag behind what the agent saw.
    pub(super) fn may_be_early(&self) -> bool {
        matches!(
            self,
            Self::Policy(_)
                | Self::PodDiffers { .. }
                | Self::PodElsewhere { .. }
                | Self::AgentDiffers { .. }
                | Self::PodTooLarge { .. }
        )
    }
}

#[cfg(test)]
mod tests;
