//! What an agent of a cluster's node is made of: the API server says who it is, whom it serves, what they may have, and
//! who signs.

use std::{sync::Arc, time::Duration};

use kube::Client;
use rand::{SeedableRng as _, rngs::StdRng};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    agent::{Background, Cluster},
    attest::{Pods, pods::Scope, token::Tokens},
    cli::UsageError,
    clock::Clock,
    config::{ClusterSigner, Kubernetes},
    kubernetes::{self, Identity, RETRY},
    metrics::Metrics,
    policy::{PolicySet, watch::ClusterPolicies},
    signer::{
        self, Sign,
        kubernetes::{Approval, Cleaner, Parts, probe},
    },
    trust,
};

/// How long the API server may take to say who the agent is.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The parts that differ from a host's.
pub(super) struct InCluster {
    pub(super) cluster: Cluster,
    pub(super) policies: watch::Receiver<Arc<PolicySet>>,
    pub(super) signers: Vec<Arc<dyn Sign>>,
    pub(super) background: Vec<Background>,
}

/// Asks the API server who the agent is and which policies there are, for as long as it takes; `None` at the stop.
pub(super) async fn join(
    config: Kubernetes,
    clock: &Clock,
    metrics: &Metrics,
    stop: &CancellationToken,
) -> anyhow::Result<Option<InCluster>> {
    let client = kubernetes::connect(config.kubeconfig.as_deref()).await.map_err(UsageError::of)?;
    let Some(identity) = stop.run_until_cancelled(identity(&client)).await.transpose()? else { return Ok(None) };
    let node = identity.node(config.node.as_deref()).map_err(UsageError::of)?;
    tracing::info!(user = identity.username, node, "the API server knows the agent");
    let pods = Pods::new(Scope::Node(node.clone()), clock.clone());
    let tokens = Tokens::new(client.clone(), config.audience.clone(), node.clone());
    let policies = ClusterPolicies::new(client.clone(), metrics.clone());
    let in_force = policies.subscribe();
    let policies_synced = policies.synced();
    let common = (clock, metrics, stop);
    let (signers, mut background) = signers(&config, &client, (&identity, &node), common).await?;
    background.push(("pods", Box::pin(pods.clone().run(client, stop.clone()))));
    background.push(("policies", Box::pin(policies.run(stop.clone()))));
    let cluster = Cluster { node, own_pod: identity.pod_uid, policies_synced, pods, tokens };
    Ok(Some(InCluster { cluster, policies: in_force, signers, background }))
}

/// The signers that `config` names, the default one first, with what keeps their roots current and deletes their
/// requests. An agent that is to approve its own is refused unless it is kept from approving others'.
async fn signers(
    config: &Kubernetes,
    client: &Client,
    (identity, node): (&Identity, &str),
    (clock, metrics, stop): (&Clock, &Metrics, &CancellationToken),
) -> anyhow::Result<(Vec<Arc<dyn Sign>>, Vec<Background>)> {
    if config.approval == Approval::Agent {
        let names: Vec<&str> = config.signers.iter().map(|signer| signer.name.as_str()).collect();
        probe(client, identity, &names, metrics.clone()).await?;
    }
    let (cleaner, cleaning) =
        Cleaner::new(client.clone(), identity.clone(), node.to_owned(), clock.clone(), metrics.clone(), stop.clone());
    let (mut signers, mut background): (Vec<Arc<dyn Sign>>, Vec<Background>) = (Vec::new(), Vec::new());
    background.push(("cleaner", Box::pin(cleaning)));
    for ClusterSigner { name, bundle } in &config.signers {
        let (roots, following) = trust::follow(client.clone(), bundle.clone(), stop.clone());
        background.push(("trust bundle", Box::pin(following)));
        signers.push(Arc::new(signer::kubernetes::Kubernetes::new(Parts {
            client: client.clone(),
            signer: name.clone(),
            approval: config.approval,
            node: node.to_owned(),
            roots,
            roots_from: bundle.to_string(),
            cleaner: cleaner.clone(),
            metrics: metrics.clone(),
        })));
    }
    Ok((signers, background))
}

async fn identity(client: &Client) -> anyhow::Result<Identity> {
    let (mut failures, mut random) = (0, StdRng::from_os_rng());
    loop {
        let why = match timeout(ANSWER_TIMEOUT, Identity::ask(client)).await {
            Ok(Ok(identity)) => return Ok(identity),
            Ok(Err(error)) if kubernetes::is_transient(&error) => kubernetes::said(&error),
            Ok(Err(error)) => {
                anyhow::bail!("the API server does not say who the agent is: {}", kubernetes::said(&error))
            }
            Err(_) => format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()),
        };
        failures += 1;
        tracing::warn!(why, "waits for the API server, to be told who the agent is");
        sleep(RETRY.delay(failures, &mut random)).await;
    }
}
