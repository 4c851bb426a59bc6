//! Roots of a signer that is elsewhere, followed where somebody publishes them: a file, a ConfigMap, a ClusterTrustBundle.
//!
//! Invariant: what is published has been read whole, and a good bundle is never given up for a bad one or for none. What is
//! wrong is said once, when it becomes so. Not here: which roots to believe; whoever may write the source decides that.

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt as _};
use k8s_openapi::api::{
    certificates::{v1, v1beta1},
    core::v1::ConfigMap,
};
use kube::{
    Api, Client,
    runtime::{WatchStreamExt as _, watcher},
};
use serde::Deserialize;
use tokio::{sync::watch, task::spawn_blocking, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    files,
    kubernetes::WatchBackoff,
    x509::{Bundle, chain::MAX_CERTIFICATES_PEM_BYTES},
};

/// How soon a change of a file is seen.
pub const FILE_INTERVAL: Duration = Duration::from_secs(5);
/// How soon it is seen that the API server has begun to serve ClusterTrustBundles.
pub const SERVED_INTERVAL: Duration = Duration::from_secs(30);
/// Where ClusterTrustBundles are, the newest version first.
const GROUP: &str = "certificates.k8s.io";

/// Where a bundle is published, as PEM.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub enum Source {
    /// A file on this host.
    File(PathBuf),
    /// A key of a ConfigMap.
    ConfigMap {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// The key.
        key: String,
    },
    /// The ClusterTrustBundle of that name.
    ClusterTrustBundle(String),
}

/// For people, as the subject of a sentence.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::ConfigMap { namespace, name, key } => write!(f, "key {key} of ConfigMap {namespace}/{name}"),
            Self::ClusterTrustBundle(name) => write!(f, "ClusterTrustBundle {name}"),
        }
    }
}

/// The bundle at `source`, empty until it has been read, and what keeps it current until `stop`.
pub fn follow(
    client: Client,
    source: Source,
    stop: CancellationToken,
) -> (watch::Receiver<Arc<Bundle>>, impl Future<Output = ()> + Send + 'static) {
    let (published, bundle) = watch::channel(Arc::new(Bundle::none()));
    let publisher = Publisher { published, source: source.to_string(), problem: None };
    let run = async move {
        stop.run_until_cancelled(publisher.run(client, source)).await;
    };
    (bundle, run)
}

struct Publisher {
    published: watch::Sender<Arc<Bundle>>,
    source: String,
    /// What was last said to be wrong.
    problem: Option<String>,
}

impl Publisher {
    /// Never ends.
    async fn run(mut self, client: Client, source: Source) {
        match source {
            Source::File(path) => loop {
                let path = path.clone();
                let read = spawn_blocking(move || files::read_text(&path, MAX_CERTIFICATES_PEM_BYTES)).await;
                match read {
                    Ok(Ok(text)) => self.take(Some(&text)),
                    Ok(Err(error)) => self.report(error.to_string()),
                    Err(error) => self.report(error.to_string()),
                }
                sleep(FILE_INTERVAL).await;
            },
            Source::ConfigMap { namespace, name, key } => {
                let objects = watcher::watch_object(Api::<ConfigMap>::namespaced(client, &namespace), &name);
                self.watch(objects, |map| map.data.as_ref()?.get(&key).cloned()).await;
            }
            Source::ClusterTrustBundle(name) => {
                while !self.is_served(&client, "v1").await {
                    if self.is_served(&client, "v1beta1").await {
                        let objects = watcher::watch_object(Api::<v1beta1::ClusterTrustBundle>::all(client), &name);
                        return self.watch(objects, |bundle| Some(bundle.spec.trust_bundle)).await;
                    }
                    self.report("the API server serves no ClusterTrustBundles".to_owned());
                    sleep(SERVED_INTERVAL).await;
                }
                let objects = watcher::watch_object(Api::<v1::ClusterTrustBundle>::all(client), &name);
                self.watch(objects, |bundle| Some(bundle.spec.trust_bundle)).await;
            }
        }
    }

    async fn is_served(&mut self, client: &Client, version: &str) -> bool {
        match client.list_api_group_resources(&format!("{GROUP}/{version}")).await {
            Ok(list) => list.resources.iter().any(|resource| resource.name == "clustertrustbundles"),
            Err(kube::Error::Api(status)) if status.code == 404 => false,
            Err(error) => {
                self.report(error.to_string());
                false
            }
        }
    }

    /// Takes in what `objects` brings, `text` being the PEM of one.
    async fn watch<K>(
        &mut self,
        objects: impl Stream<Item = watcher::Result<Option<K>>> + Send,
        text: impl Fn(K) -> Option<String>,
    ) {
        let mut objects = std::pin::pin!(objects.backoff(WatchBackoff::default()));
        while let Some(object) = objects.next().await {
            match object {
                Ok(object) => self.take(object.and_then(&text).as_deref()),
                Err(error) => self.report(error.to_string()),
            }
        }
    }

    /// Publishes what `pem` holds, if it can be used.
    fn take(&mut self, pem: Option<&str>) {
        let Some(pem) = pem else { return self.report("it is not there".to_owned()) };
        match Bundle::from_pem(pem.as_bytes()) {
            Ok(bundle) => {
                self.problem = None;
                let changed = self.published.send_if_modified(|published| {
                    let changed = **published != bundle;
                    if changed {
                        *published = Arc::new(bundle);
                    }
                    changed
                });
                if changed {
                    tracing::info!(source = self.source, "trust bundle read");
                }
            }
            Err(error) => self.report(error.to_string()),
        }
    }

    fn report(&mut self, problem: String) {
        if self.problem.as_ref() != Some(&problem) {
            let kept = !self.published.borrow().is_empty();
            tracing::warn!(
                source = self.source,
                kept,
                problem,
                "the trust bundle cannot be used; the last good one stays"
            );
            self.problem = Some(problem);
        }
    }
}
