//! `csrd controller` as a process, on a real control plane, with no more rights than it needs.

mod deployment;

use std::{sync::Arc, time::Duration};

use csrd::{
    clock::Clock,
    metrics::Metrics,
    signer::{
        Sign as _,
        embedded::{DEFAULT_CA_LIFETIME, Embedded},
    },
    x509::{Bundle, Chain},
};
use k8s_openapi::api::{
    certificates::v1::{CertificateSigningRequest as Request, ClusterTrustBundle},
    core::v1::{ConfigMap, Namespace, Secret},
    events::v1::Event,
};
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use self::deployment::{Answer, Deployment, NEVER, account, make, pkcs10};
use crate::cluster::Identity;

#[track_caller]
fn signed(answer: Answer) -> Chain {
    match answer {
        Answer::Signed { chain, .. } => Chain::from_pem(chain.as_bytes()).unwrap(),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn denied(answer: Answer, reason: &str, words: &str) {
    match answer {
        Answer::Denied(condition) => {
            let message = condition.message.unwrap();
            assert_eq!(condition.reason.as_deref(), Some(reason), "{message}");
            assert!(message.contains(words), "{message:?} does not say {words:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_an_agent_asks_within_policy_is_approved_and_signed_by_the_published_root() {
    let Some(deployment) = Deployment::new().await else { return };
    let _controller = deployment.controller("").await;
    let (agent, pod) = (deployment.agent(0).await, deployment.workload(0).await);
    let Answer::Signed { chain, approval } = deployment.ask(&agent, deployment.request(&pod)).await else {
        panic!("it is not signed")
    };
    assert_eq!(approval.reason.as_deref(), Some("ALLOWED_BY_POLICY"));
    let message = approval.message.unwrap();
    assert!(message.starts_with(&format!("policy \"{}\" allows it for pod", deployment.work)), "{message}");
    let chain = Chain::from_pem(chain.as_bytes()).unwrap();
    assert_eq!(chain.certificates().len(), 1, "the root itself is in no chain");
    let roots = deployment.roots(&deployment.home, |_| true).await;
    assert_eq!(Bundle::from_pem(roots.as_bytes()).unwrap().roots().len(), 1);
    let bundles: Api<ClusterTrustBundle> = Api::all(deployment.admin.clone());
    let bundle = bundles.get(&format!("{}:csrd", deployment.signer.replace('/', ":"))).await.unwrap();
    assert_eq!(bundle.spec.trust_bundle, roots);
}
