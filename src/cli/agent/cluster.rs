//! What an agent of a cluster's node is made of: the API server says who it is, whom it serves, what they may have, and
//! who signs.

use std::{sync::Arc, time::Duration};

use kube::Client;
use rand::{SeedableRng as _, rngs::StdRng};
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    agent::{Background, Cluster},
    attest::{Pods, pods::Scope, token::Tokens},
    backoff::Backoff,
    clock::Clock,
    config::Kubernetes,
    kubernetes::{self, Identity},
    policy::PolicySet,
    signer::Sign,
};

/// Between tries to ask the API server who the agent is.
const RETRY: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));

/// The parts that differ from a host's.
pub(super) struct InCluster {
    pub(super) cluster: Cluster,
    pub(super) policies: watch::Receiver<Arc<PolicySet>>,
    pub(super) signers: Vec<Arc<dyn Sign>>,
    pub(super) background: Vec<Background>,
}

/// Asks the API server who the agent is, for as long as it takes; `None` at the stop.
pub(super) async fn join(
    config: Kubernetes,
    clock: &Clock,
    stop: &CancellationToken,
) -> anyhow::Result<Option<InCluster>> {
    let client = kubernetes::connect(config.kubeconfig.as_deref()).await?;
    let Some(identity) = stop.run_until_cancelled(identity(&client)).await.transpose()? else { return Ok(None) };
    let node = identity.node(config.node.as_deref())?;
    tracing::info!(user = identity.username, node, "the API server knows the agent");
    let pods = Pods::new(Scope::Node(node.clone()), clock.clone());
    let tokens = Tokens::new(client.clone(), config.audience.clone(), node.clone());
    let (signers, mut background) = signers(&config);
    background.push(("pods", Box::pin(pods.clone().run(client, stop.clone()))));
    let cluster = Cluster { node, own_pod: identity.pod_uid, pods, tokens };
    let (_, policies) = watch::channel(Arc::default());
    Ok(Some(InCluster { cluster, policies, signers, background }))
}

/// The signers that `config` names, the default one first, and what keeps their roots current.
fn signers(_config: &Kubernetes) -> (Vec<Arc<dyn Sign>>, Vec<Background>) {
    (Vec::new(), Vec::new())
}

async fn identity(client: &Client) -> anyhow::Result<Identity> {
    let (mut failures, mut random) = (0, StdRng::from_os_rng());
    loop {
        match Identity::ask(client).await {
            Err(error) if kubernetes::is_transient(&error) => {
                failures += 1;
                tracing::warn!(
                    error = kubernetes::said(&error),
                    "waits for the API server, to be told who the agent is"
                );
                sleep(RETRY.delay(failures, &mut random)).await;
            }
            Err(error) => anyhow::bail!("the API server does not say who the agent is: {}", kubernetes::said(&error)),
            Ok(identity) => return Ok(identity),
        }
    }
}
