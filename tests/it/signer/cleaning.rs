//! Requests that are deleted: those of attempts however they end, and what an agent that died left behind.

use std::time::{Duration, SystemTime};

use csrd::{
    clock::Clock,
    metrics::Metrics,
    signer::{
        Stage,
        kubernetes::{Cleaner, ORPHAN_AGE},
    },
};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::ResourceExt as _;
use tokio::sync::mpsc;

use super::rig::{PATIENCE, Rig, agent, client_auth, grant, listed, may};
use crate::cluster::{ControlPlane, Identity};

/// Begins an attempt and returns the name of its request, with what drives it.
async fn begun(rig: &Rig) -> (String, tokio::task::JoinHandle<()>) {
    let (told, mut stages) = mpsc::channel(8);
    let (signer, workload) = (rig.built_in(), rig.workload.clone());
    let driving = tokio::spawn(async move {
        let progress = |stage| told.try_send(stage).unwrap();
        let granted = grant(client_auth(), 600);
        let _ = csrd::issue::issue(&signer, &Clock::system(), &workload, granted, None, &progress).await;
    });
    let Some(Stage::Requested(name)) = stages.recv().await else { panic!("nothing was requested") };
    (name, driving)
}

#[tokio::test]
async fn a_caller_who_hangs_up_leaves_no_request_behind() {
    let Some(rig) = Rig::new().await else { return };
    let (name, driving) = begun(&rig).await;
    driving.abort();
    rig.gone(&name).await;
}

#[tokio::test]
async fn an_attempt_that_the_stop_gives_up_leaves_no_request_behind() {
    let Some(rig) = Rig::new().await else { return };
    let (name, driving) = begun(&rig).await;
    rig.stop.cancel();
    // The hub lets attempts land for a while, and drops them then.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(rig.admin.get_opt(&name).await.unwrap().is_some());
    driving.abort();
    let (admin, cleaning) = rig.end();
    tokio::time::timeout(PATIENCE, cleaning).await.expect("it ends with the last who could ask").unwrap();
    assert!(admin.get_opt(&name).await.unwrap().is_none());
}

/// Requests of two agents on two nodes, of the same ServiceAccount, all with the labels of the first: what the first one's
/// successor deletes.
#[tokio::test]
async fn orphans_of_this_nodes_agent_are_deleted_and_nobody_elses() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let (pod, identity) = agent(cluster).await;
    let rig = Rig::of(cluster, &cluster.access, identity, &pod, Clock::system()).await;
    let (orphan, driving) = begun(&rig).await;

    let namespace = pod.namespace().unwrap();
    let elsewhere = cluster.node("other").await.name_any();
    let other_pod = cluster.pod(&namespace, "other", &elsewhere, "default", &[]).await;
    let other = Identity::Token(cluster.token(&other_pod, &[]).await);
    may(cluster, &namespace, "other-account", &["create"]).await;
    let mut forged = rig.admin.get(&orphan).await.unwrap();
    forged.metadata.uid = None;
    forged.metadata.resource_version = None;
    let mut kept = Vec::new();
    for (name, identity) in [("by-another-node", other), ("by-the-admin", cluster.admin_identity())] {
        forged.metadata.name = Some(crate::cluster::unique(name));
        let requests = kube::Api::all(cluster.access.client(&identity).await);
        let made: CertificateSigningRequest = requests.create(&Default::default(), &forged).await.unwrap();
        kept.push(made.name_any());
    }

    let successor = async |clock: Clock| {
        let (metrics, stop) = (Metrics::new(), tokio_util::sync::CancellationToken::new());
        let (cleaner, run) =
            Cleaner::new(rig.client.clone(), rig.agent.clone(), rig.node.clone(), clock, metrics.clone(), stop.clone());
        let running = tokio::spawn(run);
        listed(&metrics).await;
        (cleaner, stop, running)
    };
    // Young ones may belong to somebody.
    let (cleaner, stop, running) = successor(Clock::system()).await;
    stop.cancel();
    drop(cleaner);
    running.await.unwrap();
    assert!(rig.admin.get_opt(&orphan).await.unwrap().is_some());

    // More than one list holds.
    let own = kube::Api::<CertificateSigningRequest>::all(rig.client.clone());
    for _ in 0..100 {
        forged.metadata.name = Some(crate::cluster::unique("orphan"));
        own.create(&Default::default(), &forged).await.unwrap();
    }
    let later = SystemTime::now() + ORPHAN_AGE;
    let (_cleaner, stop, running) = successor(Clock::paused(later)).await;
    rig.gone(&orphan).await;
    crate::cluster::eventually("what others made is left, and no more", async || {
        (rig.mine().await.len() == kept.len()).then_some(())
    })
    .await;
    stop.cancel();
    drop(_cleaner);
    running.await.unwrap();
    for name in kept {
        assert!(rig.admin.get_opt(&name).await.unwrap().is_some(), "{name}");
        rig.delete(&name).await;
    }
    driving.abort();
}
