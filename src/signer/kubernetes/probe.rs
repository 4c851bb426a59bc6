//! Whether an agent may approve its own requests without being a danger to others.
//!
//! Approving means making identities. An agent does it only where three things hold, each of which is asked of the API
//! server and none assumed: its token says which node it is on; RBAC lets it approve for its own signers and no other;
//! and an admission policy refuses what goes beyond its node. The policy is tried with requests that it has to
//! refuse. That it also holds other nodes' agents back cannot be tried from here: it is one rule of the same policy.

use std::time::Duration;

use k8s_openapi::{
    ByteString,
    api::{
        authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
        certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
    },
};
use kube::{Api, Client, api::PostParams, core::ObjectMeta};
use rand::Rng as _;
use tokio::time::{Instant, timeout};

use super::{
    MIN_LIFETIME,
    api::CsrApi,
    failure::{ApiError, BUILT_IN},
};
use crate::{
    kubernetes::{ANSWER_WITHIN, Identity, annotation, extra},
    metrics::Metrics,
    x509::{KeyAlgorithm, KeyError, Names, PrivateKey, Usage, pem, write},
};

/// Name of the ValidatingAdmissionPolicy in deploy/kubernetes/base.
pub(super) const ADMISSION_POLICY: &str = "csrd-agent";
/// The longest lifetime that the policy lets an agent ask for.
pub(super) const ADMISSION_MAX_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
/// A signer that nobody has.
const FOREIGN_SIGNER: &str = "csrd.invalid/probe";
/// Signers of Kubernetes itself, and its wildcard for all of them: to approve for one is to become a node or any user.
const DANGEROUS: [&str; 4] = [
    "kubernetes.io/kube-apiserver-client",
    "kubernetes.io/kube-apiserver-client-kubelet",
    "kubernetes.io/kubelet-serving",
    "kubernetes.io/*",
];

/// Makes sure that `agent` may approve requests for `signers`, and that it may do no more.
///
/// # Errors
/// Whatever is missing or too much; what to do about it. An agent must then not approve.
pub async fn probe(client: &Client, agent: &Identity, signers: &[&str], metrics: Metrics) -> Result<(), ProbeError> {
    let node = agent.node.as_deref().ok_or(ProbeError::Unbound { claim: extra::NODE_NAME })?;
    if agent.pod_uid.is_none() {
        return Err(ProbeError::Unbound { claim: extra::POD_UID });
    }
    if let Some(signer) = signers.iter().find(|signer| signer.starts_with(BUILT_IN)) {
        return Err(ProbeError::BuiltIn { signer: (*signer).to_owned() });
    }
    may_approve_only(client, signers).await?;
    let api = CsrApi::new(client.clone(), metrics);
    for signer in signers {
        admission_is_in_force(&api, node, signer).await?;
    }
    Ok(())
}

/// RBAC: the agent's own signers, and none beside them.
async fn may_approve_only(client: &Client, signers: &[&str]) -> Result<(), ProbeError> {
    let approval = ResourceAttributes {
        verb: Some("patch".to_owned()),
        resource: Some("certificatesigningrequests".to_owned()),
        subresource: Some("approval".to_owned()),
        ..ResourceAttributes::default()
    };
    if !may(client, approval).await? {
        return Err(ProbeError::MayNotPatch);
    }
    for signer in signers {
        if !may(client, approve(signer)).await? {
            return Err(ProbeError::MayNotApprove { signer: (*signer).to_owned() });
        }
    }
    // Whoever may approve for a whole domain may do so for every name in it.
    let domains = signers.iter().filter_map(|signer| Some(format!("{}/*", signer.split_once('/')?.0)));
    let others = DANGEROUS.into_iter().chain([FOREIGN_SIGNER]).map(str::to_owned).chain(domains);
    for signer in others {
        if may(client, approve(&signer)).await? {
            return Err(ProbeError::MayApproveOthers { signer });
        }
    }
    Ok(())
}

fn approve(signer: &str) -> ResourceAttributes {
    ResourceAttributes {
        verb: Some("approve".to_owned()),
        resource: Some("signers".to_owned()),
        name: Some(signer.to_owned()),
        ..ResourceAttributes::default()
    }
}

async fn may(client: &Client, attributes: ResourceAttributes) -> Result<bool, ProbeError> {
    let resource_attributes = Some(ResourceAttributes { group: Some("certificates.k8s.io".to_owned()), ..attributes });
    let spec = SelfSubjectAccessReviewSpec { resource_attributes, ..SelfSubjectAccessReviewSpec::default() };
    let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
    let reviews: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let answer = timeout(ANSWER_WITHIN, reviews.create(&PostParams::default(), &review)).await;
    let answer = answer.map_or(Err(ApiError::Timeout), |answer| answer.map_err(ApiError::of_client));
    let review = answer.map_err(|source| ProbeError::Api { action: "ask what the agent may do", source })?;
    Ok(review.status.is_some_and(|status| status.allowed))
}

/// The admission policy, on creation and on approval.
async fn admission_is_in_force(api: &CsrApi, node: &str, signer: &str) -> Result<(), ProbeError> {
    let long = request(node, signer, 2 * ADMISSION_MAX_LIFETIME)?;
    refused(
        "a request for a signer that is none of the agent's",
        create(api, &request(node, FOREIGN_SIGNER, MIN_LIFETIME)?, true).await,
    )?;
    refused("a request for a certificate of two days", create(api, &long, true).await)?;
    let own = create(api, &request(node, signer, MIN_LIFETIME)?, false).await;
    let own = own.map_err(|source| ProbeError::Api { action: "create a request that is within the policy", source })?;
    let name = own.metadata.name.unwrap_or_default();
    let denial = ("Denied", "Probe", "agents approve, they never deny");
    let outcome = api.decide(&name, denial, true, soon()).await;
    let deleted = api.delete(&name, own.metadata.uid, soon()).await;
    refused("a denial by an agent", outcome)?;
    deleted.map_err(|source| ProbeError::Api { action: "delete the request again", source })
}

async fn create(
    api: &CsrApi,
    request: &CertificateSigningRequest,
    dry_run: bool,
) -> Result<CertificateSigningRequest, ApiError> {
    api.create(request, dry_run, soon()).await
}

/// Whether it was the policy that said no.
fn refused<T>(what: &'static str, outcome: Result<T, ApiError>) -> Result<(), ProbeError> {
    let by_policy = format!("ValidatingAdmissionPolicy '{ADMISSION_POLICY}'");
    match outcome {
        Ok(_) => Err(ProbeError::NotInForce { what }),
        Err(ApiError::Invalid(said) | ApiError::Forbidden(said)) if said.contains(&by_policy) => Ok(()),
        Err(source) => Err(ProbeError::RefusedByOther { what, source }),
    }
}

/// A request that the API server finds valid.
fn request(node: &str, signer: &str, lifetime: Duration) -> Result<CertificateSigningRequest, ProbeError> {
    let names = Names { common_name: Some("csrd-probe".to_owned()), ..Names::default() };
    let pkcs10 = write::request(&names, &PrivateKey::generate(KeyAlgorithm::EcdsaP256)?)?;
    let metadata = ObjectMeta {
        name: Some(format!("csrd-probe-{:032x}", rand::rng().random::<u128>())),
        annotations: Some([(annotation::NODE.to_owned(), node.to_owned())].into()),
        ..ObjectMeta::default()
    };
    let spec = CertificateSigningRequestSpec {
        request: ByteString(pem::encode("CERTIFICATE REQUEST", &pkcs10).into_bytes()),
        signer_name: signer.to_owned(),
        expiration_seconds: Some(i32::try_from(lifetime.as_secs()).expect("a few days at most")),
        usages: Some(vec![Usage::DigitalSignature.name().to_owned()]),
        ..CertificateSigningRequestSpec::default()
    };
    Ok(CertificateSigningRequest { metadata, spec, status: None })
}

fn soon() -> Instant {
    Instant::now() + ANSWER_WITHIN
}

/// Why an agent does not start, or does not approve.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// The API server did not answer as it must.
    #[error("cannot {action}")]
    Api {
        /// What was asked.
        action: &'static str,
        /// Its answer.
        source: ApiError,
    },
    /// A token that is not bound to a pod, or an API server that does not say so.
    #[error(
        "approval: agent needs a token that is bound to a pod on a node; the API server shows no {claim} for this one"
    )]
    Unbound {
        /// What is missing.
        claim: &'static str,
    },
    /// A signer whose certificates Kubernetes itself believes.
    #[error(
        "approval: agent is not for {signer}: whoever may approve for it can become any user or node; use approval: controller"
    )]
    BuiltIn {
        /// The signer.
        signer: String,
    },
    /// RBAC lacks the subresource.
    #[error(
        "approval: agent needs the verb patch on certificatesigningrequests/approval; apply deploy/kubernetes/approval-agent"
    )]
    MayNotPatch,
    /// RBAC lacks the signer.
    #[error("approval: agent needs the verb approve on signer {signer}; apply deploy/kubernetes/approval-agent")]
    MayNotApprove {
        /// The signer.
        signer: String,
    },
    /// RBAC gives too much.
    #[error(
        "RBAC lets the agent approve requests for {signer} too: give it approve with resourceNames, for its own signers only"
    )]
    MayApproveOthers {
        /// The signer, or the wildcard.
        signer: String,
    },
    /// The admission policy let something through.
    #[error(
        "ValidatingAdmissionPolicy {ADMISSION_POLICY} is not in force, {what} was let through: apply deploy/kubernetes/approval-agent"
    )]
    NotInForce {
        /// What it had to refuse.
        what: &'static str,
    },
    /// Somebody else refused, so nothing is known of the policy.
    #[error("whether ValidatingAdmissionPolicy {ADMISSION_POLICY} is in force is not known, {what} failed otherwise")]
    RefusedByOther {
        /// What it had to refuse.
        what: &'static str,
        /// The answer.
        source: ApiError,
    },
    /// A key could not be made.
    #[error("cannot make a key to try the admission policy with")]
    Key(#[from] KeyError),
}
