//! The controller with the rights and the admission that `deploy/kubernetes` ships.

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, api::PostParams};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::cluster::{CONTROLLER, ControlPlane, Identity, Overlay, SYSTEM, eventually};

/// Where the CA is in files, no Secret csrd-ca stands in the way of one that its token makes; as here, where no controller runs.
#[tokio::test]
async fn the_controllers_token_makes_no_secret_that_would_become_somebody_elses_token() {
    let Some(cluster) = ControlPlane::shipped(Overlay::ApprovalAgent).await else { return };
    let token = Identity::Token(cluster.unbound_token(SYSTEM, CONTROLLER, &[]).await);
    let secrets: Api<Secret> = Api::namespaced(cluster.access.client(&token).await, SYSTEM);
    let dry_run = PostParams { dry_run: true, ..PostParams::default() };
    let make = async |metadata: Value, more: Value| {
        let mut secret = json!({"metadata": metadata});
        secret.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        secrets.create(&dry_run, &serde_json::from_value(secret).unwrap()).await
    };
    let of_agents = json!({"kubernetes.io/service-account.name": "csrd-agent"});
    let token_of_agents = json!({"name": "csrd-ca", "annotations": of_agents});
    let refused = [
        (token_of_agents, json!({"type": "kubernetes.io/service-account-token"})),
        (json!({"name": "csrd-ca"}), json!({"type": "bootstrap.kubernetes.io/token"})),
        (json!({"name": "csrd-ca-2"}), json!({})),
        (json!({"generateName": "csrd-ca"}), json!({})),
    ];
    for (metadata, more) in refused {
        // The API server takes a moment to read policies.
        let said = eventually("admission refuses", async || {
            make(metadata.clone(), more.clone()).await.err().map(|error| error.to_string())
        });
        let said = said.await;
        assert!(said.contains("the controller makes no Secret but csrd-ca, of type Opaque"), "{said}");
    }
    for more in [json!({}), json!({"type": "Opaque", "data": {"ca-1.pem": "AA=="}})] {
        make(json!({"name": "csrd-ca"}), more).await.expect("the Secret that a controller makes");
    }
}

#[tokio::test]
async fn a_controller_says_by_its_own_socket_that_it_is_ready() {
    let Some(cluster) = ControlPlane::shipped(Overlay::ApprovalController).await else { return };
    eventually("the controller is ready", async || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_csrd"));
        let output = command.arg("health").arg("--socket").arg(cluster.health_socket()).output().await.unwrap();
        output.status.success().then_some(())
    })
    .await;
}
