//! Denials as Events of the pods they concern, for whoever runs them: `kubectl describe pod` shows why.
//!
//! At most [`EVENT_RATE`], whatever is denied: Events are for people, and a stolen token must not fill etcd with them. What is
//! not told here is in the request's condition and counted. Told only of pods that are there: whoever runs one also learns
//! that somebody else's agent asked in its name.

use std::num::NonZeroU32;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::time::timeout;

use super::answer::said;
use crate::{
    attest::PodFacts,
    kubernetes::{self, ANSWER_WITHIN},
    rate::{Bucket, Rate},
};

/// Events written.
pub const EVENT_RATE: Rate =
    Rate { per_second: NonZeroU32::new(2).expect("not zero"), burst: NonZeroU32::new(50).expect("not zero") };
/// A writer of Events, which counts those that are alike as one.
pub(super) fn recorder(client: Client, identity: &str) -> Recorder {
    Recorder::new(client, Reporter { controller: "csrd-controller".to_owned(), instance: Some(identity.to_owned()) })
}

/// Tells of denials.
pub(super) struct Denials {
    recorder: Recorder,
    rate: Bucket,
}

impl Denials {
    pub(super) fn new(client: Client, identity: &str) -> Self {
        Self { recorder: recorder(client, identity), rate: Bucket::new(EVENT_RATE) }
    }

    /// Tells of a denial, unless too much has been told of late.
    pub(super) async fn tell(&self, pod: &PodFacts, reason: &str, message: &str) {
        if self.rate.check().is_err() {
            return;
        }
        let regarding = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(pod.namespace.clone()),
            name: Some(pod.name.clone()),
            uid: Some(pod.uid.clone()),
            ..ObjectReference::default()
        };
        let event = Event {
            type_: EventType::Warning,
            reason: "CertificateDenied".to_owned(),
            note: Some(said(message)),
            // Events that differ in it are not counted as one.
            action: reason.to_owned(),
            secondary: None,
        };
        if let Ok(Err(error)) = timeout(ANSWER_WITHIN, self.recorder.publish(&event, &regarding)).await {
            tracing::warn!(error = kubernetes::said(&error), "a denial is not told as an Event");
        }
    }
}
