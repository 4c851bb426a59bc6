//! Policies from the cluster: [`ClusterPolicies`] follows the CertificatePolicies of the API server.
//!
//! Invariant: a mistake in one policy changes nothing, there or elsewhere. Each is examined on its own; a version with a
//! problem leaves the last good one of the same object in force, and an object that never had a good one grants nothing.
//! A deletion always applies, also one that was missed, and so does a deletion followed by another object of that name.
//! While the API server cannot be reached, what was seen last stays. Agents and controllers run this same code, so they
//! hold the same set once they have seen the same objects.
//!
//! A policy in a cluster is about pods: a controller could not derive again who a process of some host is.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    sync::Arc,
};

use futures_util::StreamExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{
    Api, Client, ResourceExt as _,
    api::{ApiResource, DynamicObject},
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use serde_json::json;
use tokio::{sync::watch, task::spawn_blocking};
use tokio_util::sync::CancellationToken;

use crate::{
    kubernetes::{self, Lag},
    metrics::Metrics,
    policy::{API_VERSION, KIND, MAX_POLICIES, PLURAL, PolicySet, Problem, Source, schema::PODS_ONLY, whom::Whom},
};

/// The CertificatePolicies of a cluster and the set that they make.
pub struct ClusterPolicies {
    client: Client,
    lag: Lag,
    seen: Seen,
}

/// What has been seen, and who is told of it.
#[derive(Debug)]
struct Seen {
    objects: BTreeMap<String, Object>,
    /// The names that a list under way has shown so far.
    listed: BTreeSet<String>,
    generation: u64,
    policies: watch::Sender<Arc<PolicySet>>,
    problems: watch::Sender<BTreeMap<String, Examined>>,
    synced: watch::Sender<bool>,
    metrics: Metrics,
}

/// What has been found of one policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Examined {
    /// `metadata.uid` of the object.
    pub uid: String,
    /// `metadata.generation` that was examined.
    pub generation: i64,
    /// The generation in force: this one, or an earlier one while this one has problems, or none.
    pub in_force: Option<i64>,
    /// What is wrong with it; empty when it is accepted.
    pub problems: Vec<Problem>,
}

/// One object, as it was seen last.
#[derive(Debug)]
struct Object {
    uid: String,
    created: Option<Time>,
    generation: i64,
    document: String,
    problems: Vec<Problem>,
    /// The last good version and its generation.
    good: Option<(i64, PolicySet)>,
}

/// CertificatePolicies as a resource of the API.
pub fn resource() -> ApiResource {
    let (group, version) = API_VERSION.split_once('/').expect("API_VERSION is group/version");
    ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version: API_VERSION.to_owned(),
        kind: KIND.to_owned(),
        plural: PLURAL.to_owned(),
    }
}

impl ClusterPolicies {
    /// Nothing is followed before [`run`](Self::run). Until the first list has arrived there is no policy, so everything
    /// is denied; see [`synced`](Self::synced).
    pub fn new(client: Client, metrics: Metrics) -> Self {
        Self { client, lag: Lag::default(), seen: Seen::nothing(metrics) }
    }

    /// The set in force, now and after each change.
    pub fn subscribe(&self) -> watch::Receiver<Arc<PolicySet>> {
        self.seen.policies.subscribe()
    }

    /// Every policy by name with what is wrong with it, now and after each change.
    pub fn problems(&self) -> watch::Receiver<BTreeMap<String, Examined>> {
        self.seen.problems.subscribe()
    }

    /// Whether all policies have been seen once. A denial before that says nothing about the caller.
    pub fn synced(&self) -> watch::Receiver<bool> {
        self.seen.synced.subscribe()
    }

    /// Whether what has been seen may be old.
    pub fn lag(&self) -> Lag {
        self.lag.clone()
    }

    /// Follows the API server until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let policies: Api<DynamicObject> = Api::all_with(self.client, &resource());
        // Lists again where a watch cannot go on, and waits longer each time that the API server does not answer.
        let mut events = watcher(policies, watcher::Config::default()).backoff(self.lag.backoff()).boxed();
        while let Some(Some(event)) = stop.run_until_cancelled(events.next()).await {
            match event {
                Ok(event) => self.seen.take_in(event).await,
                Err(error) => {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(error, "policies cannot be followed, the last ones seen stay in force");
                }
            }
        }
    }
}

impl Seen {
    fn nothing(metrics: Metrics) -> Self {
        Self {
            objects: BTreeMap::new(),
            listed: BTreeSet::new(),
            generation: 0,
            policies: watch::Sender::default(),
            problems: watch::Sender::default(),
            synced: watch::Sender::default(),
            metrics,
        }
    }

    /// One event of the watch. Nothing of a list is published before all of it is there.
    async fn take_in(&mut self, event: Event<DynamicObject>) {
        match event {
            Event::Init => self.listed.clear(),
            Event::InitApply(object) => {
                self.listed.insert(object.name_any());
                self.examine(object).await;
            }
            Event::InitDone => {
                let listed = mem::take(&mut self.listed);
                self.objects.retain(|name, _| listed.contains(name));
                self.publish();
                self.synced.send_if_modified(|synced| !mem::replace(synced, true));
            }
            Event::Apply(object) => {
                self.examine(object).await;
                self.publish();
            }
            Event::Delete(object) => {
                self.objects.remove(&object.name_any());
                self.publish();
            }
        }
    }

    async fn examine(&mut self, object: DynamicObject) {
        let (name, uid) = (object.name_any(), object.uid().unwrap_or_default());
        let generation = object.metadata.generation.unwrap_or_default();
        let document = document(&name, &object);
        let before = self.objects.remove(&name).filter(|before| before.uid == uid);
        let (good, problems) = match before {
            // Its status has changed, or its labels, or it is as it was before versions that were not seen.
            Some(same) if same.document == document => {
                let good = same.good.map(|(of, set)| (if same.problems.is_empty() { generation } else { of }, set));
                (good, same.problems)
            }
            before => match compile(&name, document.clone()).await {
                Ok(set) => (Some((generation, set)), Vec::new()),
                Err(problems) => {
                    let good = before.and_then(|before| before.good);
                    self.reject(&name, generation, &problems, good.as_ref().map(|(of, _)| *of));
                    (good, problems)
                }
            },
        };
        let created = object.metadata.creation_timestamp;
        self.objects.insert(name, Object { uid, created, generation, document, problems, good });
    }

    fn reject(&self, policy: &str, generation: i64, problems: &[Problem], in_force: Option<i64>) {
        for Problem { field, message, .. } in problems {
            tracing::warn!(
                policy,
                generation,
                in_force,
                field,
                "policy not loaded, what is in force of it stays: {message}"
            );
        }
        self.metrics.policy_load_failed();
    }

    /// Tells what the objects make now, where it is something new.
    fn publish(&mut self) {
        let mut by_age: Vec<_> = self.objects.iter().collect();
        by_age.sort_by_key(|(name, object)| (object.created.clone(), *name));
        let mut sets = Vec::new();
        let mut examined = BTreeMap::new();
        for (name, Object { uid, generation, problems, good, .. }) in by_age {
            let mut of =
                Examined { uid: uid.clone(), generation: *generation, in_force: None, problems: problems.clone() };
            match good {
                Some((in_force, set)) if sets.len() < MAX_POLICIES => {
                    of.in_force = Some(*in_force);
                    sets.push(set);
                }
                Some(_) => {
                    let message =
                        format!("more than {MAX_POLICIES} policies in the cluster, and this is one of the newest");
                    of.problems.push(problem(name, "", message));
                }
                None => {}
            }
            examined.insert(name.clone(), of);
        }
        let set = PolicySet::join(sets);
        if !*self.synced.borrow() || !self.policies.borrow().is_same_as(&set) {
            self.generation += 1;
            tracing::info!(generation = self.generation, policies = set.len(), "policies of the cluster loaded");
            self.metrics.policy_loaded(self.generation);
            self.policies.send_replace(Arc::new(set));
        }
        self.problems.send_if_modified(|before| mem::replace(before, examined.clone()) != examined);
    }
}

/// What the author of an object wrote, as a policy file has it: the rest of the metadata and the status are the API
/// server's and ours. JSON is YAML, so there is one reader for both.
fn document(name: &str, object: &DynamicObject) -> String {
    let mut document = json!({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}});
    if let Some(spec) = object.data.get("spec") {
        document["spec"] = spec.clone();
    }
    document.to_string()
}

async fn compile(name: &str, document: String) -> Result<PolicySet, Vec<Problem>> {
    let source = Source { origin: name.to_owned(), text: document };
    let parsed = spawn_blocking(move || PolicySet::parse(&[source], kubernetes::SIGNER)).await;
    let set = parsed.expect("parsing does not panic and is not aborted").map_err(|mut problems| {
        // Lines are of a text that nobody wrote.
        problems.iter_mut().for_each(|problem| problem.line = 0);
        problems
    })?;
    if set.policies.iter().any(|policy| matches!(policy.whom, Whom::Processes(_))) {
        return Err(vec![problem(name, "spec.match.unix", PODS_ONLY.to_owned())]);
    }
    Ok(set)
}

fn problem(name: &str, field: &str, message: String) -> Problem {
    Problem { file: name.to_owned(), line: 0, field: field.to_owned(), message }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn object(name: &str, generation: i64, spec: Value) -> DynamicObject {
        let metadata = json!({"name": name, "uid": format!("uid of {name}"), "generation": generation});
        serde_json::from_value(json!({"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}))
            .unwrap()
    }

    fn pods(namespace: &str) -> Value {
        json!({"match": {"kubernetes": {"namespaces": [namespace]}}})
    }

    /// Seen: these objects, as one list.
    async fn listed(objects: impl IntoIterator<Item = DynamicObject>) -> Seen {
        let mut seen = Seen::nothing(Metrics::new());
        list(&mut seen, objects).await;
        seen
    }

    async fn list(seen: &mut Seen, objects: impl IntoIterator<Item = DynamicObject>) {
        seen.take_in(Event::Init).await;
        for object in objects {
            seen.take_in(Event::InitApply(object)).await;
        }
        seen.take_in(Event::InitDone).await;
    }

    impl Seen {
        /// The policies in force by name, with the generation of each.
        fn in_force(&self) -> Vec<(String, i64)> {
            let problems = self.problems.borrow();
            let in_force: Vec<_> =
                problems.iter().filter_map(|(name, of)| Some((name.clone(), of.in_force?))).collect();
            let set = self.policies.borrow();
            assert_eq!(
                set.policies.iter().map(|policy| &policy.name).collect::<Vec<_>>(),
                in_force.iter().map(|(name, _)| name).collect::<Vec<_>>()
            );
            in_force
        }

        fn problem(&self, name: &str) -> String {
            let problems = self.problems.borrow()[name].problems.clone();
            problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
        }
    }

    fn versions(expected: &[(&str, i64)]) -> Vec<(String, i64)> {
        expected.iter().map(|(name, generation)| (name.to_string(), *generation)).collect()
    }

    #[tokio::test]
    async fn nothing_is_published_before_the_first_list_is_whole() {
        let mut seen = Seen::nothing(Metrics::new());
        let policies = seen.policies.subscribe();
        seen.take_in(Event::Init).await;
        seen.take_in(Event::InitApply(object("a", 1, pods("a")))).await;
        assert!(!policies.has_changed().unwrap() && !*seen.synced.borrow());
        // The server went away in the middle, and the list begins again without the policy.
        list(&mut seen, [object("b", 1, pods("b"))]).await;
        assert!(*seen.synced.borrow());
        assert_eq!(seen.in_force(), versions(&[("b", 1)]));
        assert!(seen.metrics.encode().contains("csrd_policy_generation 1"));
        assert!(*listed([]).await.synced.borrow(), "a cluster without policies");
    }

    #[tokio::test]
    async fn a_bad_version_leaves_the_last_good_one_of_that_policy_in_force() {
        let mut seen = listed([object("a", 1, pods("a")), object("b", 1, pods("b"))]).await;
        let first = seen.policies.borrow().clone();
        seen.take_in(Event::Apply(object("a", 2, json!({"match": {}})))).await;
        assert_eq!(seen.in_force(), versions(&[("a", 1), ("b", 1)]));
        assert!(Arc::ptr_eq(&first, &seen.policies.borrow()), "nothing has changed");
        let expected = "a: spec.match: it is empty and would match nobody; name a unix or a kubernetes section";
        assert_eq!((seen.problem("a").as_str(), seen.problems.borrow()["a"].generation), (expected, 2));
        assert!(seen.metrics.encode().contains("csrd_policy_loads_total{result=\"error\"} 1"));
        // The others are not held up by it.
        seen.take_in(Event::Apply(object("b", 2, pods("c")))).await;
        assert_eq!(seen.in_force(), versions(&[("a", 1), ("b", 2)]));
        seen.take_in(Event::Apply(object("a", 3, pods("d")))).await;
        assert_eq!(seen.in_force(), versions(&[("a", 3), ("b", 2)]));
        assert_eq!(seen.problem("a"), "");
    }

    #[tokio::test]
    async fn a_policy_that_never_was_good_grants_nothing() {
        let mut seen = listed([object("a", 1, json!({"match": {}}))]).await;
        assert_eq!((seen.in_force(), seen.problems.borrow()["a"].in_force), (vec![], None));
        seen.take_in(Event::Apply(object("a", 2, pods("a")))).await;
        assert_eq!(seen.in_force(), versions(&[("a", 2)]));
    }

    #[tokio::test]
    async fn a_deletion_always_applies() {
        let mut seen = listed(["a", "b", "c"].map(|name| object(name, 1, pods("a")))).await;
        seen.take_in(Event::Delete(object("a", 1, pods("a")))).await;
        assert_eq!(seen.in_force(), versions(&[("b", 1), ("c", 1)]));
        // One that happened while nobody watched.
        list(&mut seen, [object("c", 1, pods("a"))]).await;
        assert_eq!(seen.in_force(), versions(&[("c", 1)]));
        // And one that was followed by another object of that name, which is bad.
        let mut other = object("c", 1, json!({"match": {}}));
        other.metadata.uid = Some("another".to_owned());
        seen.take_in(Event::Apply(other)).await;
        assert_eq!(seen.in_force(), versions(&[]));
    }

    #[tokio::test]
    async fn what_says_the_same_publishes_nothing() {
        let mut seen = listed([object("a", 1, pods("a"))]).await;
        let (policies, problems) = (seen.policies.subscribe(), seen.problems.subscribe());
        let mut labelled = object("a", 1, pods("a"));
        labelled.metadata.labels = Some([("a".to_owned(), "b".to_owned())].into());
        labelled.data["status"] = json!({"conditions": []});
        seen.take_in(Event::Apply(labelled.clone())).await;
        list(&mut seen, [labelled]).await;
        assert!(!policies.has_changed().unwrap() && !problems.has_changed().unwrap());
        assert!(seen.metrics.encode().contains("csrd_policy_generation 1"));
        // A later generation of the same words is told to who writes the status, and to nobody else.
        seen.take_in(Event::Apply(object("a", 3, pods("a")))).await;
        assert!(!policies.has_changed().unwrap() && problems.has_changed().unwrap());
        assert_eq!(seen.in_force(), versions(&[("a", 3)]));
    }

    #[tokio::test]
    async fn an_object_of_any_shape_is_a_problem_and_no_more() {
        for (spec, expected) in [
            (Value::Null, "a: "),
            (json!([1]), "a: "),
            (json!({"match": {"kubernetes": {"namespaces": ["a"]}}, "more": 1}), "a: unknown field `more`"),
            (json!({"match": {"kubernetes": {"namespaces": [{"a": 1}]}}}), "a: "),
            (
                json!({"match": {"kubernetes": {"namespaces": ["\u{0}\n"]}}}),
                "a: spec.match.kubernetes.namespaces[0]: it must",
            ),
            (json!({"match": {"unix": {"uids": [0]}}}), "a: spec.match.unix: a policy in a cluster is about pods;"),
            (json!({"match": {"kubernetes": {"namespaces": ["x".repeat(1 << 20)]}}}), "a: it has 1048"),
        ] {
            let seen = listed([object("a", 1, spec.clone()), object("b", 1, pods("b"))]).await;
            assert_eq!(seen.in_force(), versions(&[("b", 1)]), "{spec}");
            assert!(seen.problem("a").starts_with(expected), "{}", seen.problem("a"));
        }
        let mut bare = object("a", 1, Value::Null);
        bare.data = Value::Null;
        assert_eq!(listed([bare]).await.problem("a"), "a: missing field `spec`");
    }

    #[tokio::test]
    async fn the_oldest_policies_have_the_places() {
        let dated = |i: usize, at: i64| {
            let mut object = object(&format!("p{i:03}"), 1, pods("a"));
            object.metadata.creation_timestamp =
                Some(serde_json::from_value(json!(format!("2026-01-01T00:{:02}:{:02}Z", at / 60, at % 60))).unwrap());
            object
        };
        let mut seen = listed((0..MAX_POLICIES).map(|i| dated(i, 1000))).await;
        assert_eq!(seen.in_force().len(), MAX_POLICIES);
        seen.take_in(Event::Apply(dated(999, 1001))).await;
        let expected = "p999: more than 256 policies in the cluster, and this is one of the newest";
        assert_eq!((seen.in_force().len(), seen.problem("p999").as_str()), (MAX_POLICIES, expected));
        // An older one can only be seen later when it was seen as bad before.
        seen.take_in(Event::Apply(dated(998, 1))).await;
        assert_eq!((seen.in_force().len(), seen.problem("p998").as_str()), (MAX_POLICIES, ""));
        assert_eq!(seen.problem("p255"), expected.replace("p999", "p255"));
        seen.take_in(Event::Delete(dated(0, 1000))).await;
        assert_eq!((seen.in_force().len(), seen.problem("p255").as_str()), (MAX_POLICIES, ""));
    }
}
