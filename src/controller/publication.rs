//! The roots, where everybody who verifies finds them: as a ConfigMap in each namespace that is to have it, and as a
//! ClusterTrustBundle where the API server serves them.
//!
//! What others change or delete is put right. [`Publication::published`] tells the bundle that the agents can read; the
//! controller signs nothing that does not verify by it. A namespace that is asked for no more keeps what it has: pods may
//! have it mounted.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_util::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams},
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    kubernetes::{
        ANSWER_WITHIN, MAX_NAMESPACE_BYTES, MAX_TRUST_BUNDLE_BYTES, TRUST_BUNDLE, TRUST_BUNDLE_KEY, WatchBackoff,
        label, page,
    },
    x509::Bundle,
};

/// Namespaces with this label get the ConfigMap: `csrd.dev/trust-bundle: enabled`.
pub const WANTED: &str = "csrd.dev/trust-bundle=enabled";
/// Pause before what could not be written is tried again.
const RETRY: Duration = Duration::from_secs(10);
/// Who owns what is applied.
const FIELD_MANAGER: &str = "csrd-controller";

/// What is published where.
pub(super) struct Publication {
    pub(super) client: Client,
    /// The signer's name.
    pub(super) signer: String,
    /// Of the agents; always has it.
    pub(super) home: String,
    /// Others that are to have it, beside those with the label.
    pub(super) namespaces: Vec<String>,
    pub(super) bundle: watch::Receiver<Arc<Bundle>>,
    pub(super) published: watch::Sender<Option<Arc<Bundle>>>,
}

/// Where a bundle is published.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Namespace(String),
    Cluster,
}

/// What is known of the cluster.
#[derive(Default)]
struct Known {
    /// Namespaces with the label.
    labelled: BTreeSet<String>,
    /// Who has which bundle; who is not in here has none that is right.
    holds: BTreeMap<Place, Arc<Bundle>>,
    /// How ClusterTrustBundles are served; `None` when they are not.
    trust_bundles: Option<ApiResource>,
}

impl Publication {
    /// Publishes for ever.
    pub(super) async fn run(mut self) {
        let client = self.client.clone();
        let by_name = watcher::Config::default().fields(&format!("metadata.name={TRUST_BUNDLE}"));
        let by_name = by_name.page_size(page(MAX_TRUST_BUNDLE_BYTES));
        let mut maps = pin!(watcher(Api::<ConfigMap>::all(client.clone()), by_name).backoff(WatchBackoff::default()));
        let by_label = watcher::Config::default().labels(WANTED).page_size(page(MAX_NAMESPACE_BYTES));
        let mut namespaces =
            pin!(watcher(Api::<PartialObjectMeta<Namespace>>::all(client), by_label).backoff(WatchBackoff::default()));
        let mut known = Known { trust_bundles: self.served().await, ..Known::default() };
        let mut trust_bundles = pin!(self.watch_trust_bundle(known.trust_bundles.as_ref()));
        loop {
            let again = self.publish(&mut known).await;
            tokio::select! {
                // A rotation, or the end of the signer, whose task ends everything.
                changed = self.bundle.changed() => if changed.is_err() { return std::future::pending().await },
                Some(event) = maps.next() => known.hear(event, &self.bundle.borrow(), |map: &ConfigMap| {
                    (Place::Namespace(map.metadata.namespace.clone().unwrap_or_default()), map_roots(map))
                }),
                Some(event) = trust_bundles.next() => known.hear(event, &self.bundle.borrow(), |bundle| {
                    (Place::Cluster, bundle.data.pointer("/spec/trustBundle").and_then(Value::as_str))
                }),
                Some(event) = namespaces.next() => known.hear_namespace(event),
                () = sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => {}
            }
        }
    }

    /// Writes where it is due; returns when to try again what could not be written.
    async fn publish(&mut self, known: &mut Known) -> Option<Instant> {
        let bundle = self.bundle.borrow_and_update().clone();
        let namespaces = self.namespaces.iter().chain(&known.labelled).cloned().map(Place::Namespace);
        // The agents' first: signing waits for it.
        let home = [Place::Namespace(self.home.clone())];
        let places: Vec<_> =
            home.into_iter().chain(known.trust_bundles.is_some().then_some(Place::Cluster)).chain(namespaces).collect();
        let mut again = None;
        for place in places {
            if known.holds.get(&place).is_some_and(|held| Arc::ptr_eq(held, &bundle)) {
                continue;
            }
            match timeout(ANSWER_WITHIN, self.apply(&place, &bundle, known.trust_bundles.as_ref())).await {
                Ok(Ok(())) => {
                    tracing::info!(?place, roots = bundle.roots().len(), "trust bundle published");
                    if place == Place::Namespace(self.home.clone()) {
                        self.published.send_replace(Some(bundle.clone()));
                    }
                    known.holds.insert(place, bundle.clone());
                }
                failed => {
                    let error = match failed {
                        Ok(Err(error)) => error.to_string(),
                        _ => format!("no answer within {} s", ANSWER_WITHIN.as_secs()),
                    };
                    tracing::warn!(?place, error, "trust bundle not published");
                    again = Some(Instant::now() + RETRY);
                }
            }
        }
        again
    }

    async fn apply(&self, place: &Place, bundle: &Bundle, resource: Option<&ApiResource>) -> Result<(), kube::Error> {
        let roots = roots(bundle);
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let labels = json!({label::MANAGED_BY: label::MANAGER});
        match (place, resource) {
            (Place::Namespace(namespace), _) => {
                let api = Api::<ConfigMap>::namespaced(self.client.clone(), namespace);
                let map = json!({
                    "apiVersion": "v1",
                    "kind": "ConfigMap",
                    "metadata": {"name": TRUST_BUNDLE, "labels": labels},
                    "data": {TRUST_BUNDLE_KEY: roots},
                });
                api.patch(TRUST_BUNDLE, &parameters, &Patch::Apply(&map)).await.map(drop)
            }
            (Place::Cluster, Some(resource)) => {
                let api = Api::<DynamicObject>::all_with(self.client.clone(), resource);
                let name = self.trust_bundle();
                let bundle = json!({
                    "apiVersion": resource.api_version,
                    "kind": resource.kind,
                    "metadata": {"name": name, "labels": labels},
                    "spec": {"signerName": self.signer, "trustBundle": roots},
                });
                api.patch(&name, &parameters, &Patch::Apply(&bundle)).await.map(drop)
            }
            (Place::Cluster, None) => Ok(()),
        }
    }

    /// How ClusterTrustBundles are served, if they are.
    async fn served(&self) -> Option<ApiResource> {
        for version in ["v1", "v1beta1"] {
            let kind = GroupVersionKind::gvk("certificates.k8s.io", version, "ClusterTrustBundle");
            let resource = ApiResource::from_gvk(&kind);
            let listed = self.client.list_api_group_resources(&resource.api_version).await;
            if listed.is_ok_and(|listed| listed.resources.iter().any(|it| it.name == resource.plural)) {
                return Some(resource);
            }
        }
        tracing::info!("the API server serves no ClusterTrustBundles; roots are published as ConfigMaps only");
        None
    }

    fn watch_trust_bundle(
        &self,
        resource: Option<&ApiResource>,
    ) -> BoxStream<'static, Result<Event<DynamicObject>, watcher::Error>> {
        let Some(resource) = resource else { return stream::pending().boxed() };
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.trust_bundle()));
        watcher(Api::all_with(self.client.clone(), resource), config).backoff(WatchBackoff::default()).boxed()
    }

    /// `csrd.dev:workload:csrd`: such a name belongs to the signer, and only who may attest for it may write it.
    fn trust_bundle(&self) -> String {
        format!("{}:csrd", self.signer.replace('/', ":"))
    }
}

impl Known {
    /// Takes in what is there now. What an interrupted watch did not tell is in the list that follows.
    fn hear<K>(
        &mut self,
        event: Result<Event<K>, watcher::Error>,
        bundle: &Arc<Bundle>,
        read: impl Fn(&K) -> (Place, Option<&str>),
    ) {
        match event {
            Ok(Event::Apply(object) | Event::InitApply(object)) => {
                let (place, held) = read(&object);
                match held == Some(&roots(bundle)) {
                    true => self.holds.insert(place, bundle.clone()),
                    false => self.holds.remove(&place),
                };
            }
            Ok(Event::Delete(object)) => {
                self.holds.remove(&read(&object).0);
            }
            Ok(Event::Init | Event::InitDone) => {}
            Err(error) => warn(&error),
        }
    }

    fn hear_namespace(&mut self, event: Result<Event<PartialObjectMeta<Namespace>>, watcher::Error>) {
        let name = |namespace: PartialObjectMeta<Namespace>| namespace.metadata.name.unwrap_or_default();
        match event {
            Ok(Event::Apply(namespace) | Event::InitApply(namespace)) => {
                self.labelled.insert(name(namespace));
            }
            Ok(Event::Delete(namespace)) => {
                self.labelled.remove(&name(namespace));
            }
            Ok(Event::Init) => self.labelled.clear(),
            Ok(Event::InitDone) => {}
            Err(error) => warn(&error),
        }
    }
}

fn warn(error: &watcher::Error) {
    tracing::warn!(error = error as &dyn std::error::Error, "a watch for the trust bundle is taken up again");
}

fn roots(bundle: &Bundle) -> String {
    String::from_utf8(bundle.pem().to_vec()).expect("PEM is ASCII")
}

fn map_roots(map: &ConfigMap) -> Option<&str> {
    map.data.as_ref()?.get(TRUST_BUNDLE_KEY).map(String::as_str)
}
