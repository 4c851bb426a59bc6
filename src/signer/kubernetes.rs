//! Signing through the API server: one CertificateSigningRequest for each certificate, of any signerName.
//!
//! The agent names the request itself, so that its watch is open before the request is there and no change is missed. A
//! request holds exactly the names, usages and lifetime of its grant; its labels and annotations say for which pod it
//! is, and whoever approves it checks that. It is deleted however the attempt ends, [`Cleaner`] sees to it: four writes
//! for a certificate, approval and signature included.
//!
//! What comes back is believed by nobody yet. A certificate can be written to a request by whoever may update its status,
//! so `issue` verifies it like that of any signer. Not here: retries, which the hub schedules, and rates, which its token
//! bucket keeps: a certificate costs the agent three requests, four where it approves them itself.

mod api;
mod cleaner;
mod failure;
mod probe;
mod wait;

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
};
use kube::{Client, core::ObjectMeta};
use rand::Rng as _;
use serde::Deserialize;
use tokio::{sync::watch, time::Instant};
use tracing::Instrument as _;

use crate::{
    attest::PodFacts,
    kubernetes::{annotation, label, node_label},
    metrics::Metrics,
    policy::Grant,
    signer::{Key, Sign, SignError, Signing, SigningRequest, Stage},
    telemetry,
    x509::{Bundle, Chain, Csr, pem, write},
};

pub use cleaner::{Cleaner, ORPHAN_AGE, SWEEP_INTERVAL};
pub use failure::{ApiError, KubernetesError};
pub use probe::{ProbeError, probe};

use api::CsrApi;
use wait::Wait;

/// The shortest lifetime that the API server accepts, `spec.expirationSeconds` 600.
pub const MIN_LIFETIME: Duration = Duration::from_secs(600);
/// How long creating a request may take, a busy API server's `Retry-After` included.
pub const CREATE_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a request may wait for its approval.
pub const APPROVAL_TIMEOUT: Duration = Duration::from_secs(25);
/// How long an approved request may wait for its certificate.
pub const SIGNING_TIMEOUT: Duration = Duration::from_secs(15);

/// Certificates a second that an agent asks its API server for at most, all signers together, unless configured: each is
/// three or four requests, so no more than 100 requests a second.
pub const DEFAULT_PER_SECOND: u32 = 25;
/// Certificates at once: those of a node's pods when all of them start together.
pub const DEFAULT_BURST: u32 = 110;

/// Who approves the requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Approval {
    /// The controller, or a person: the agent may not.
    #[default]
    Controller,
    /// The agent itself, within the admission policy that [`probe`] has seen in force.
    Agent,
}

/// What a signer in the cluster is made of.
pub struct Parts {
    /// The API server.
    pub client: Client,
    /// The signerName.
    pub signer: String,
    /// Who approves.
    pub approval: Approval,
    /// The node that the agent is on.
    pub node: String,
    /// The roots of this signer, from `trust`; without any at first.
    pub roots: watch::Receiver<Arc<Bundle>>,
    /// Where they come from, for people.
    pub roots_from: String,
    /// Deletes the requests.
    pub cleaner: Cleaner,
    /// Counters.
    pub metrics: Metrics,
}

/// One signerName of the cluster.
pub struct Kubernetes {
    api: CsrApi,
    signer: String,
    approval: Approval,
    node: String,
    roots: watch::Receiver<Arc<Bundle>>,
    roots_from: String,
    cleaner: Cleaner,
}

impl Kubernetes {
    /// A signer; nothing is sent before a certificate is asked for.
    pub fn new(parts: Parts) -> Self {
        let Parts { client, signer, approval, node, roots, roots_from, cleaner, metrics } = parts;
        Self { api: CsrApi::new(client, metrics), signer, approval, node, roots, roots_from, cleaner }
    }

    async fn request(&self, request: SigningRequest<'_>) -> Result<Chain, SignError> {
        let SigningRequest { workload, grant, key, progress } = request;
        let pod = workload.pod().ok_or_else(|| KubernetesError::NotAPod { signer: self.signer.clone() })?;
        let roots = self.roots()?;
        let csr = self.describe(pod, grant, key)?;
        let name = csr.metadata.name.clone().expect("it has just been given one");
        let span = tracing::debug_span!("csr", k8s.csr.name = name);
        let certificate = self.certificate(&name, &csr, grant, progress).instrument(span).await?;
        chain(&certificate, &roots)
    }

    /// The certificate for `csr`, as somebody wrote it into its status.
    async fn certificate(
        &self,
        name: &str,
        csr: &CertificateSigningRequest,
        grant: &Grant,
        progress: &(dyn Fn(Stage) + Send + Sync),
    ) -> Result<Vec<u8>, KubernetesError> {
        let until = Instant::now() + CREATE_TIMEOUT;
        let mut removal = self.cleaner.removal_of(name);
        // Version "0" is the server's cache as it is: it cannot hold a request of this name already, so no change of it is
        // missed, and the server need not ask etcd first.
        let (created, events) = tokio::join!(self.api.create(csr, false, until), self.api.watch(name, "0", until));
        let created = created.map_err(|source| {
            removal.unless_created(&source);
            KubernetesError::Api { action: "create a CertificateSigningRequest", source }
        })?;
        let uid = created.metadata.uid.unwrap_or_default();
        removal.only(&uid);
        progress(Stage::Requested(name.to_owned()));
        let mut wait = Wait::new(&self.api, &self.signer, name, uid, progress);
        if self.approval == Approval::Agent {
            wait.approve(&format!("policy {} allows it", grant.policy())).await?;
        }
        wait.certificate(events).await
    }

    /// The request to create for `grant`.
    fn describe(&self, pod: &PodFacts, grant: &Grant, key: &Key) -> Result<CertificateSigningRequest, SignError> {
        let granted = grant.lifetime();
        if granted < MIN_LIFETIME {
            return Err(KubernetesError::Lifetime { granted }.into());
        }
        let pkcs10 = match key {
            Key::Made(key) => pem::encode("CERTIFICATE REQUEST", &write::request(grant.names(), key)?),
            Key::Held(csr) => held(csr, grant)?,
        };
        let annotations = [
            (annotation::POD_NAMESPACE, Some(pod.namespace.clone())),
            (annotation::POD_NAME, Some(pod.name.clone())),
            (annotation::POD_UID, Some(pod.uid.clone())),
            (annotation::SERVICE_ACCOUNT, Some(pod.service_account.clone())),
            (annotation::NODE, Some(self.node.clone())),
            (annotation::TRACEPARENT, telemetry::traceparent()),
        ];
        let labels = [(label::MANAGED_BY, label::MANAGER), (label::NODE, node_label(&self.node))];
        let metadata = ObjectMeta {
            name: Some(format!("csrd-{:032x}", rand::rng().random::<u128>())),
            labels: Some(BTreeMap::from(labels.map(|(key, value)| (key.to_owned(), value.to_owned())))),
            annotations: Some(
                annotations.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect(),
            ),
            ..ObjectMeta::default()
        };
        let spec = CertificateSigningRequestSpec {
            request: ByteString(pkcs10.into_bytes()),
            signer_name: self.signer.clone(),
            // Less than was granted, in the year 2094.
            expiration_seconds: Some(i32::try_from(granted.as_secs()).unwrap_or(i32::MAX)),
            usages: Some(grant.usages().iter().map(|usage| usage.name().to_owned()).collect()),
            ..CertificateSigningRequestSpec::default()
        };
        Ok(CertificateSigningRequest { metadata, spec, status: None })
    }

    /// The roots, once there are any.
    fn roots(&self) -> Result<Arc<Bundle>, KubernetesError> {
        let roots = self.roots.borrow().clone();
        if roots.is_empty() {
            return Err(KubernetesError::NoBundle { signer: self.signer.clone(), from: self.roots_from.clone() });
        }
        Ok(roots)
    }
}

impl Sign for Kubernetes {
    fn name(&self) -> &str {
        &self.signer
    }

    fn sign<'a>(&'a self, request: SigningRequest<'a>) -> Signing<'a> {
        Box::pin(self.request(request))
    }

    /// Whether there are roots. A signer elsewhere that does not sign is found out by asking only.
    fn ready(&self) -> Result<(), SignError> {
        Ok(self.roots().map(drop)?)
    }

    fn bundle(&self) -> watch::Receiver<Arc<Bundle>> {
        self.roots.clone()
    }
}

impl fmt::Debug for Kubernetes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kubernetes").field("signer", &self.signer).finish_non_exhaustive()
    }
}

/// The workload's own request, which whoever signs copies the names of.
fn held(csr: &Csr, grant: &Grant) -> Result<String, KubernetesError> {
    if !csr.names().same_as(grant.names()) {
        return Err(KubernetesError::OtherNames { granted: grant.names().to_strings().join(", ") });
    }
    Ok(pem::encode("CERTIFICATE REQUEST", csr.der()))
}

/// The chain in a request's status, less the roots that some signers put at its end.
fn chain(pem: &[u8], roots: &Bundle) -> Result<Chain, SignError> {
    let chain = Chain::from_pem(pem).map_err(|_| SignError::Malformed)?;
    chain.without(roots).map_err(|_| SignError::Malformed)
}
