//! Follows what a workload is: a pod's facts change, and a pod ends.

use std::sync::Arc;

use tokio::sync::watch;

use super::{Hub, HubError};
use crate::attest::{Pods, Workload};

/// One workload over time.
#[derive(Debug)]
pub struct Following {
    hub: Hub,
    workload: Arc<Workload>,
    /// Tells of every pod's changes; none where a workload never changes.
    pods: Option<watch::Receiver<u64>>,
}

impl Following {
    pub(super) fn new(hub: Hub, workload: Arc<Workload>) -> Self {
        let pods = hub.0.pods.as_ref().filter(|_| workload.pod().is_some()).map(Pods::changed);
        Self { hub, workload, pods }
    }

    /// What it is, by the last look.
    pub fn workload(&self) -> &Arc<Workload> {
        &self.workload
    }

    /// Resolves when it is something else. Cancel safe.
    ///
    /// # Errors
    /// [`HubError::PodGone`].
    pub async fn changed(&mut self) -> Result<(), HubError> {
        loop {
            let now = self.hub.workload_now(&self.workload)?;
            if now != self.workload {
                self.workload = now;
                return Ok(());
            }
            let Some(pods) = &mut self.pods else { return std::future::pending().await };
            // The hub holds the pods, so they do not go away before this.
            let _ = pods.changed().await;
        }
    }
}
