//! The pod and container of a process by its cgroup.

/// A process's pod and container, as its cgroup names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::attest) struct InPod {
    /// UID of the pod, as the kubelet knows it.
    pub(in crate::attest) uid: String,
    /// Id of the container.
    pub(in crate::attest) container: String,
}
