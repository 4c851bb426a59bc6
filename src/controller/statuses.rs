//! What became of each policy, said where its author looks: the condition `Accepted` in its status, and an Event.
//!
//! Written by the leader only, and only when it says something new; what an earlier leader wrote is read first.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
use kube::{
    Api, Client, Resource as _,
    api::{DynamicObject, ListParams, Patch, PatchParams},
    runtime::events::{Event, EventType, Recorder},
};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{answer::said, denials};
use crate::{
    clock::Clock,
    kubernetes::{self, ANSWER_WITHIN},
    policy::watch::{Examined, resource},
};

/// The condition.
const ACCEPTED: &str = "Accepted";
/// Pause before what could not be written is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// The writer of statuses.
pub(super) struct Statuses {
    api: Api<DynamicObject>,
    recorder: Recorder,
    clock: Clock,
    examined: watch::Receiver<BTreeMap<String, Examined>>,
    /// By name: the UID, and what its status says.
    said: BTreeMap<String, (String, Condition)>,
}

impl Statuses {
    pub(super) fn new(
        client: Client,
        identity: &str,
        clock: Clock,
        examined: watch::Receiver<BTreeMap<String, Examined>>,
    ) -> Self {
        let recorder = denials::recorder(client.clone(), identity);
        let api = Api::all_with(client, &resource());
        Self { api, recorder, clock, examined, said: BTreeMap::new() }
    }

    /// Writes for ever.
    pub(super) async fn run(mut self) {
        while let Err(error) = self.read().await {
            tracing::warn!(error = kubernetes::said(&error), "statuses of policies are not read");
            sleep(RETRY).await;
        }
        loop {
            let examined = self.examined.borrow_and_update().clone();
            self.said.retain(|name, (uid, _)| examined.get(name).is_some_and(|found| found.uid == *uid));
            let mut failed = false;
            for (name, found) in &examined {
                failed |= !self.say(name, found).await;
            }
            tokio::select! {
                changed = self.examined.changed() => if changed.is_err() { return std::future::pending().await },
                () = sleep(RETRY), if failed => {}
            }
        }
    }

    async fn read(&mut self) -> Result<(), kube::Error> {
        for object in self.api.list(&ListParams::default()).await? {
            let conditions = object.data.pointer("/status/conditions").cloned().unwrap_or_default();
            let conditions: Vec<Condition> = serde_json::from_value(conditions).unwrap_or_default();
            let accepted = conditions.into_iter().find(|condition| condition.type_ == ACCEPTED);
            if let (Some(name), Some(uid), Some(accepted)) = (object.metadata.name, object.metadata.uid, accepted) {
                self.said.insert(name, (uid, accepted));
            }
        }
        Ok(())
    }

    /// False when it is to be tried again.
    async fn say(&mut self, name: &str, found: &Examined) -> bool {
        let before = self.said.get(name).map(|(_, condition)| condition);
        let condition = self.condition(found, before);
        if before == Some(&condition) {
            return true;
        }
        let patch = json!({"metadata": {"uid": found.uid}, "status": {"conditions": [condition]}});
        let (parameters, patch) = (PatchParams::default(), Patch::Merge(&patch));
        let written = self.api.patch_status(name, &parameters, &patch);
        let object = match timeout(ANSWER_WITHIN, written).await {
            Ok(Ok(object)) => object,
            // Deleted, or another of that name: the watch tells.
            Ok(Err(kube::Error::Api(status)))
                if status.is_not_found() || status.is_conflict() || status.is_invalid() =>
            {
                return true;
            }
            Ok(Err(error)) => {
                tracing::warn!(
                    policy = name,
                    error = kubernetes::said(&error),
                    "the status of a policy is not written"
                );
                return false;
            }
            Err(_) => return false,
        };
        // A policy that was good from the start is no news.
        if before.is_some() || !found.problems.is_empty() {
            self.tell(&object, &condition).await;
        }
        self.said.insert(name.to_owned(), (found.uid.clone(), condition));
        true
    }

    fn condition(&self, found: &Examined, before: Option<&Condition>) -> Condition {
        let (status, reason, message) = match (found.problems.is_empty(), found.in_force) {
            (true, _) => ("True", "Valid", "the policy is in force".to_owned()),
            (false, in_force) => {
                let problems = found.problems.iter().map(|problem| match problem.field.as_str() {
                    "" => problem.message.clone(),
                    field => format!("{field}: {}", problem.message),
                });
                let problems: Vec<_> = problems.collect();
                let rest = match in_force {
                    Some(generation) => format!("generation {generation} stays in force"),
                    None => "it grants nothing".to_owned(),
                };
                ("False", "Invalid", said(&format!("{rest}; {}", problems.join("; "))))
            }
        };
        let since = before.filter(|before| before.status == status).map(|before| before.last_transition_time.clone());
        let now = || Time(Timestamp::try_from(self.clock.now()).unwrap_or_default());
        Condition {
            type_: ACCEPTED.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message,
            observed_generation: Some(found.generation),
            last_transition_time: since.unwrap_or_else(now),
        }
    }

    async fn tell(&self, object: &DynamicObject, condition: &Condition) {
        let good = condition.status == "True";
        let event = Event {
            type_: if good { EventType::Normal } else { EventType::Warning },
            reason: if good { "PolicyAccepted" } else { "PolicyRejected" }.to_owned(),
            note: Some(condition.message.clone()),
            action: "Load".to_owned(),
            secondary: None,
        };
        let regarding = object.object_ref(&resource());
        if let Ok(Err(error)) = timeout(ANSWER_WITHIN, self.recorder.publish(&event, &regarding)).await {
            tracing::warn!(error = kubernetes::said(&error), "no Event tells of a policy");
        }
    }
}
