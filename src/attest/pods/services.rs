//! Which Services select a pod.
//!
//! A Service with a selector has the pods of its namespace that the selector matches; one without has those that an
//! EndpointSlice of it names by UID. A name of a Service resolves to its pods, so it is theirs to prove.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};

use super::follow::{Change, Told};
use crate::attest::PodFacts;

/// Slices that the control plane did not make from a selector.
pub(super) const NOT_BY_SELECTOR: &str =
    "endpointslice.kubernetes.io/managed-by!=endpointslice-controller.k8s.io,kubernetes.io/service-name";
/// Of a slice: the Service it belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

#[derive(Debug, Default)]
pub(super) struct Services {
    services: Index<Selects>,
    slices: Index<Members>,
}

/// The pods that a change may matter to.
#[derive(Debug)]
pub(super) enum Touched {
    /// None.
    Nothing,
    /// Those of one namespace.
    Namespace(String),
    /// Every one.
    All,
}

/// Objects of one kind, by namespace and name.
#[derive(Debug)]
struct Index<T> {
    by_namespace: HashMap<String, BTreeMap<String, T>>,
    told: Told,
}

/// How a Service comes by its pods.
#[derive(Debug)]
pub(super) enum Selects {
    /// By these labels.
    Labels(BTreeMap<String, String>),
    /// By EndpointSlices that somebody else writes.
    Slices,
    /// It is another name for something outside.
    Nothing,
}

/// The pods that a slice names, by UID.
#[derive(Debug)]
pub(super) struct Members {
    service: String,
    pods: HashSet<String>,
}

/// One object with its namespace and name.
#[derive(Debug)]
pub(super) struct Named<T> {
    namespace: String,
    name: String,
    what: T,
}

/// What is kept of a Service.
pub(super) fn read_service(service: Service) -> Named<Selects> {
    let (metadata, spec) = (service.metadata, service.spec.unwrap_or_default());
    let what = match spec.selector.filter(|selector| !selector.is_empty()) {
        _ if spec.type_.as_deref() == Some("ExternalName") => Selects::Nothing,
        Some(labels) => Selects::Labels(labels),
        None => Selects::Slices,
    };
    Named { namespace: metadata.namespace.unwrap_or_default(), name: metadata.name.unwrap_or_default(), what }
}

/// What is kept of an EndpointSlice.
pub(super) fn read_slice(slice: EndpointSlice) -> Named<Members> {
    let metadata = slice.metadata;
    let service = metadata.labels.and_then(|mut labels| labels.remove(SERVICE_NAME)).unwrap_or_default();
    let targets = slice.endpoints.into_iter().flatten().filter_map(|endpoint| endpoint.target_ref);
    let pods = targets.filter(|target| target.kind.as_deref() == Some("Pod")).filter_map(|target| target.uid).collect();
    let what = Members { service, pods };
    Named { namespace: metadata.namespace.unwrap_or_default(), name: metadata.name.unwrap_or_default(), what }
}

impl Services {
    /// Names of the Services of the pod's namespace that select it; none until all have been listed.
    pub(super) fn of(&self, pod: &PodFacts) -> BTreeSet<String> {
        if self.ready().is_err() {
            return BTreeSet::new();
        }
        let is_named = |service: &String| {
            self.slices.of(&pod.namespace).any(|(_, slice)| slice.service == *service && slice.pods.contains(&pod.uid))
        };
        let selects = |(name, selects): &(&String, &Selects)| match selects {
            Selects::Labels(labels) => labels.iter().all(|(key, value)| pod.labels.get(key) == Some(value)),
            Selects::Slices => is_named(name),
            Selects::Nothing => false,
        };
        self.services.of(&pod.namespace).filter(selects).map(|(name, _)| name.clone()).collect()
    }

    pub(super) fn ready(&self) -> Result<(), String> {
        self.services.told.ready("services")?;
        self.slices.told.ready("endpointslices")
    }

    pub(super) fn services(&mut self, change: Change<Named<Selects>>) -> Touched {
        self.services.apply(change)
    }

    pub(super) fn slices(&mut self, change: Change<Named<Members>>) -> Touched {
        self.slices.apply(change)
    }
}

impl<T> Index<T> {
    fn of(&self, namespace: &str) -> impl Iterator<Item = (&String, &T)> {
        self.by_namespace.get(namespace).into_iter().flatten()
    }

    fn apply(&mut self, change: Change<Named<T>>) -> Touched {
        self.told.heard(&change);
        match change {
            Change::Put(it) => {
                self.by_namespace.entry(it.namespace.clone()).or_default().insert(it.name, it.what);
                Touched::Namespace(it.namespace)
            }
            Change::Gone(it) => {
                if let Some(rest) = self.by_namespace.get_mut(&it.namespace) {
                    rest.remove(&it.name);
                    if rest.is_empty() {
                        self.by_namespace.remove(&it.namespace);
                    }
                }
                Touched::Namespace(it.namespace)
            }
            Change::All(all) => {
                self.by_namespace.clear();
                for it in all {
                    self.by_namespace.entry(it.namespace).or_default().insert(it.name, it.what);
                }
                Touched::All
            }
            Change::Silent(_) => Touched::Nothing,
        }
    }
}

impl<T> Default for Index<T> {
    fn default() -> Self {
        Self { by_namespace: HashMap::new(), told: Told::default() }
    }
}
