//! The controller of a cluster: approves what agents ask for within policy, signs what is addressed to its own signer,
//! and publishes the roots.
//!
//! Agents only create requests, so a stolen agent token is worth what this lets through: certificates for pods on its own
//! node, within policy. Nothing that an agent says is believed; `verdict` compares it with what the API server wrote and
//! with the live pod, and decides by the same policies as the agent. One replica leads and does all the writing; the
//! others have the same pods and policies at hand, and take over within seconds. Whatever is written names the version it
//! was decided on, so that a leader which does not know yet that it is none can do no harm.
//!
//! `verdict` judges, and `kubelet` what kubelets ask for themselves, by whose addresses are whose; `queue` gives nodes their turns, `requests` watches, `answer` writes, `publication` shows the roots, `leader` elects.
//! Not here: following pods and policies (`attest`, `policy::watch`), and the CA itself (`signer::embedded`).

mod answer;
mod denials;
mod kubelet;
mod leader;
mod publication;
mod queue;
mod requests;
mod statuses;
mod verdict;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use kube::Client;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::{
    answer::Answers, denials::Denials, kubelet::Addresses, leader::Election, publication::Publication,
    statuses::Statuses, verdict::Rules,
};
pub use self::{
    answer::{MAX_MESSAGE_BYTES, SECOND_LOOK},
    denials::EVENT_RATE,
    kubelet::{KubeletServing, MAX_NAMED_SERVICES},
    leader::{LEASE_DURATION, RENEW_WITHIN, RETRY},
    publication::WANTED,
    queue::{MAX_UNDER_WAY_PER_NODE, MAX_WAITING, MAX_WAITING_PER_NODE, MIN_WAITING_PER_NODE, REMEMBERED},
    requests::{MAX_UNDER_WAY, PAGE, SWEEP_PAUSE},
    verdict::{MAX_ANNOTATION_BYTES, MIN_EXPIRATION_SECONDS},
};
use crate::{
    attest::pods::Pods,
    clock::Clock,
    kubernetes::Lag,
    metrics::{self, Metrics},
    policy::{PolicySet, watch::Examined},
    rate::Rate,
    signer::{
        Sign as _,
        embedded::{Embedded, EmbeddedConfig, EmbeddedError},
    },
};

/// Name of the Lease.
pub const LEASE: &str = "csrd-controller";
/// The longest that a stop takes.
pub const STOP_WITHIN: Duration = Duration::from_secs(5);

/// What a controller is made of.
pub struct Parts {
    /// The way to the API server.
    pub client: Client,
    /// Where the Lease, the Secret and the agents' trust bundle are.
    pub namespace: String,
    /// Who this replica is; no other's name, not even a former one's.
    pub identity: String,
    /// The signer's own name.
    pub signer: String,
    /// Where its CA comes from.
    pub ca: Ca,
    /// Others' signers, whose requests are approved here and signed elsewhere.
    pub approves: BTreeSet<String>,
    /// Namespace and ServiceAccount of the agents.
    pub agent: (String, String),
    /// For which names kubelets' serving certificates are approved, if they are.
    pub kubelet_serving: Option<KubeletServing>,
    /// Where the API server is: IP addresses and names that no kubelet gets a certificate for.
    pub api_hosts: Vec<String>,
    /// Namespaces that get the trust bundle, beside the controller's own and those with the label [`WANTED`].
    pub bundle_namespaces: Vec<String>,
    /// Verdicts for each node.
    pub per_node: Rate,
    /// All pods of the cluster.
    pub pods: Pods,
    /// Policies in force.
    pub policies: watch::Receiver<Arc<PolicySet>>,
    /// Whether those may be old.
    pub policies_lag: Lag,
    /// What became of each policy, for its status.
    pub examined: watch::Receiver<BTreeMap<String, Examined>>,
    /// Wall clock.
    pub clock: Clock,
    /// Counters and gauges.
    pub metrics: Metrics,
}

/// Where the signer's CA comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ca {
    /// A Secret in the controller's namespace: made and rotated by the leader.
    Secret {
        /// Its name.
        name: String,
        /// Lifetime of each CA.
        lifetime: Duration,
    },
    /// The operator's files.
    Files(EmbeddedConfig),
}

impl Parts {
    /// Stands for election and leads, until `stop`. Pods and policies must be known by now: a verdict on less would deny
    /// what is allowed.
    pub async fn run(self, stop: CancellationToken) {
        let (client, clock) = (self.client.clone(), self.clock.clone());
        let election = Election::new(client, &self.namespace, LEASE, self.identity.clone(), clock);
        let parts = Arc::new(self);
        election.run(stop, || parts.clone().lead()).await;
    }

    /// One term; ends only when there is no CA to sign with.
    async fn lead(self: Arc<Self>) {
        let _leading = metrics::counted(&self.metrics.leading);
        let signer = match self.open().await {
            Ok(signer) => Arc::new(signer),
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "cannot lead without a CA");
                return;
            }
        };
        let (publisher, mut published) = watch::channel(None);
        let publication = Publication {
            client: self.client.clone(),
            signer: self.signer.clone(),
            home: self.namespace.clone(),
            namespaces: self.bundle_namespaces.clone(),
            bundle: signer.bundle(),
            published: publisher,
        };
        let (addresses, followed) = match &self.kubelet_serving {
            Some(serving) => {
                let (addresses, followed) = kubelet::follow_all(self.client.clone(), serving.clone(), &self.api_hosts);
                (addresses, Some(followed))
            }
            None => (Addresses::default(), None),
        };
        let answers = Arc::new(Answers {
            client: self.client.clone(),
            rules: Rules {
                signer: self.signer.clone(),
                approves: self.approves.clone(),
                agent: self.agent.clone(),
                kubelet_serving: self.kubelet_serving.is_some(),
            },
            pods: self.pods.clone(),
            policies: self.policies.clone(),
            policies_lag: self.policies_lag.clone(),
            addresses,
            signer: signer.clone(),
            published: published.clone(),
            denials: Denials::new(self.client.clone(), &self.identity),
            clock: self.clock.clone(),
            metrics: self.metrics.clone(),
            signed: self.metrics.signer(&self.signer),
        });
        let requests = async {
            // Whoever gets a certificate can verify it: agents read the roots first.
            if published.wait_for(Option::is_some).await.is_ok() {
                requests::run(answers, self.per_node).await;
            }
        };
        let addresses = async {
            if let Some(followed) = followed {
                followed.await;
            }
        };
        let statuses =
            Statuses::new(self.client.clone(), &self.identity, self.clock.clone(), self.examined.clone()).run();
        // The term ends by being dropped.
        tokio::join!(signer.run(CancellationToken::new()), publication.run(), requests, addresses, statuses);
    }

    async fn open(&self) -> Result<Embedded, EmbeddedError> {
        let metrics = self.metrics.signer(&self.signer);
        match &self.ca {
            Ca::Secret { name, lifetime } => {
                let (client, namespace) = (self.client.clone(), &self.namespace);
                Embedded::open_secret(client, namespace, name, *lifetime, &self.clock, metrics).await
            }
            Ca::Files(config) => Embedded::open(config.clone(), &self.clock, metrics),
        }
    }
}
