//! Trust bundles where people publish them: files, ConfigMaps and ClusterTrustBundles of a real API server.

#![allow(clippy::disallowed_methods, reason = "a follower is owned by its test's runtime")]

use std::{fs, sync::Arc, time::Duration};

use csrd::{
    kubernetes::connect,
    trust::{FILE_INTERVAL, Source, follow},
    x509::Bundle,
};
use k8s_openapi::api::{certificates::v1::ClusterTrustBundle, core::v1::ConfigMap};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::cluster::{ControlPlane, Options, unique};

const PATIENCE: Duration = Duration::from_secs(60);

fn root() -> String {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.self_signed(&KeyPair::generate().unwrap()).unwrap().pem()
}

/// A bundle that is followed until this is dropped.
struct Followed {
    bundle: watch::Receiver<Arc<Bundle>>,
    _stop: DropGuard,
}

impl Followed {
    fn new(client: Client, source: Source) -> Self {
        let stop = CancellationToken::new();
        let (bundle, run) = follow(client, source, stop.clone());
        tokio::spawn(run);
        Self { bundle, _stop: stop.drop_guard() }
    }

    /// Waits until the bundle is what `pem` holds.
    async fn becomes(&mut self, pem: &str) {
        let expected = Bundle::from_pem(pem.as_bytes()).unwrap();
        let becomes = self.bundle.wait_for(|bundle| **bundle == expected);
        timeout(PATIENCE, becomes).await.expect("the bundle is read").unwrap();
    }

    /// The bundle is still what `pem` holds.
    fn is(&self, pem: &str) {
        assert_eq!(**self.bundle.borrow(), Bundle::from_pem(pem.as_bytes()).unwrap());
    }
}

#[tokio::test]
async fn a_bundle_in_a_configmap_is_followed_and_the_last_good_one_stays() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let namespace = cluster.namespace(&[]).await;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.admin().await, &namespace);
    let client = connect(Some(&cluster.kubeconfig())).await.unwrap();
    let source = |key: &str| Source::ConfigMap { namespace: namespace.clone(), name: "roots".into(), key: key.into() };
    let (mut bundle, mut other) =
        (Followed::new(client.clone(), source("ca.crt")), Followed::new(client, source("marker")));
    let put = async |data: Value| {
        let map =
            Patch::Apply(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "roots"}, "data": data}));
        maps.patch("roots", &PatchParams::apply("test").force(), &map).await.unwrap();
    };
    assert!(bundle.bundle.borrow().is_empty());
    let (first, second) = (root(), root());
    put(json!({"ca.crt": first, "marker": first})).await;
    bundle.becomes(&first).await;
    let both = format!("{first}{second}");
    put(json!({"ca.crt": both, "marker": first})).await;
    bundle.becomes(&both).await;
    // Neither a broken nor an absent one: each is seen by the other follower, too, which then has something to tell.
    for (broken, marker) in [(json!("broken"), &second), (json!(""), &first), (Value::Null, &second)] {
        put(json!({"ca.crt": broken, "marker": marker})).await;
        other.becomes(marker).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        bundle.is(&both);
    }
    maps.delete("roots", &DeleteParams::default()).await.unwrap();
    put(json!({"ca.crt": second})).await;
    bundle.becomes(&second).await;
}

#[tokio::test]
async fn a_clustertrustbundle_is_followed_in_its_newest_version() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    if !cluster.serves("certificates.k8s.io/v1", "clustertrustbundles").await {
        return;
    }
    let name = unique("roots");
    let client = connect(Some(&cluster.kubeconfig())).await.unwrap();
    let mut bundle = Followed::new(client, Source::ClusterTrustBundle(name.clone()));
    let (first, second) = (root(), root());
    let _: ClusterTrustBundle =
        cluster.create(json!({"metadata": {"name": name}, "spec": {"trustBundle": first}})).await;
    bundle.becomes(&first).await;
    let bundles: Api<ClusterTrustBundle> = Api::all(cluster.admin().await);
    let changed = Patch::Merge(json!({"spec": {"trustBundle": second}}));
    bundles.patch(&name, &PatchParams::default(), &changed).await.unwrap();
    bundle.becomes(&second).await;
}

#[tokio::test]
async fn a_clustertrustbundle_of_an_older_cluster_is_followed_too() {
    let groups =
        "certificates.k8s.io/v1/clustertrustbundles=false,certificates.k8s.io/v1beta1/clustertrustbundles=true";
    let apiserver = vec![format!("--runtime-config={groups}"), "--feature-gates=ClusterTrustBundle=true".to_owned()];
    let Some(cluster) = ControlPlane::start(Options { apiserver, ..Options::default() }).await else { return };
    let client = connect(Some(&cluster.kubeconfig())).await.unwrap();
    let mut bundle = Followed::new(client, Source::ClusterTrustBundle("roots".into()));
    let first = root();
    let _: k8s_openapi::api::certificates::v1beta1::ClusterTrustBundle =
        cluster.create(json!({"metadata": {"name": "roots"}, "spec": {"trustBundle": first}})).await;
    bundle.becomes(&first).await;
}

#[tokio::test]
async fn a_file_is_read_again_when_it_changes() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("roots.pem");
    let client = connect(Some(&cluster.kubeconfig())).await.unwrap();
    let mut bundle = Followed::new(client, Source::File(path.clone()));
    let (first, second) = (root(), root());
    fs::write(&path, &first).unwrap();
    bundle.becomes(&first).await;
    fs::write(&path, "broken").unwrap();
    tokio::time::sleep(FILE_INTERVAL + Duration::from_secs(1)).await;
    bundle.is(&first);
    fs::write(&path, &second).unwrap();
    bundle.becomes(&second).await;
}
