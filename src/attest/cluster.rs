//! What a cluster adds to what the kernel says: which pod a process is in, and whose a token is.

use std::sync::Arc;

use super::{
    AttestError, Pods, Workload,
    cgroup::{Place, View},
    token::{Token, TokenError, Tokens},
};
use crate::account::Principal;

/// The cluster that this agent's node is part of.
#[derive(Debug)]
pub(super) struct Cluster {
    /// The pods of this node.
    pub(super) pods: Pods,
    /// Reviews tokens.
    pub(super) tokens: Tokens,
    /// UID of the pod that this agent runs in, when it runs in one.
    pub(super) own_pod: Option<String>,
    /// From where cgroups are seen.
    pub(super) view: View,
}

impl Cluster {
    /// The pod of a process by the text of its `/proc/PID/cgroup`; `None` when it is in none.
    pub(super) async fn pod_of(&self, cgroup: &str) -> Result<Option<Arc<Workload>>, AttestError> {
        match self.view.place(cgroup)? {
            Place::Host => Ok(None),
            Place::Pod(process) => self.pods.of_process(&process).await.map(Some),
            Place::Own => {
                let Some(uid) = &self.own_pod else {
                    let why = "it is the agent's own, and the agent's token names no pod".to_owned();
                    return Err(AttestError::PodUnknown { uid: String::new(), why });
                };
                self.pods.wait_for(uid).await.map(Some).ok_or_else(|| self.pods.unknown(uid))
            }
        }
    }

    /// Whether a pod still is what it was when it was attested.
    pub(super) fn holds(&self, workload: &Arc<Workload>) -> bool {
        workload.pod().is_none_or(|pod| self.pods.by_uid(&pod.uid).is_some_and(|now| Arc::ptr_eq(&now, workload)))
    }

    /// Whom bounds are counted for, before anybody is attested; `None` for the user.
    pub(super) fn principal(&self, cgroup: &str) -> Result<Option<Principal>, AttestError> {
        Ok(match self.view.place(cgroup)? {
            Place::Host => None,
            Place::Pod(process) => Some(Principal::pod(&process.uid)),
            Place::Own => Some(Principal::pod(self.own_pod.as_deref().unwrap_or_default())),
        })
    }

    /// Whether a cgroup is of the agent's own pod.
    pub(super) fn is_own(&self, cgroup: &str) -> bool {
        match self.view.place(cgroup) {
            Ok(Place::Own) => true,
            Ok(Place::Pod(process)) => self.own_pod.as_ref() == Some(&process.uid),
            Ok(Place::Host) | Err(_) => false,
        }
    }

    /// Checks that a token which came with a call of `workload` is that pod's own.
    pub(super) async fn confirm(&self, workload: &Workload, token: &Token) -> Result<(), TokenError> {
        let pod = workload.pod().ok_or(TokenError::NotInPod)?;
        let bearer = self.tokens.review(&pod.uid, token).await?;
        if bearer.pod_uid == pod.uid { Ok(()) } else { Err(TokenError::OtherPod) }
    }
}
