//! The facts that may fill a slot, and whose they are.
//!
//! Invariant: only what the attestation proved, by the names that `csrd whoami` shows. A fact that the caller does not
//! have has no value. Facts that a controller could not derive again from the API server are not among a pod's.

use std::borrow::Cow;

use crate::{
    attest::{Facts, PodFacts, UnixFacts},
    x509::name::MAX_NAMES,
};

/// Services of one pod that may fill slots; no certificate has room for more names.
pub const MAX_SERVICES: usize = MAX_NAMES;

/// Whom a policy is about. Facts of the others are never there, so a policy that names one is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Callers {
    Processes,
    Pods,
}

impl Callers {
    /// The section of their facts in templates and rules.
    pub(super) fn section(self) -> &'static str {
        match self {
            Self::Processes => "unix",
            Self::Pods => "kubernetes",
        }
    }
}

/// A fact whose value may fill a slot. Paths are not among them: they never fit one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fact {
    Uid,
    Gid,
    User,
    Group,
    SystemdUnit,
    ExecutableSha256,
    Namespace,
    Pod,
    PodUid,
    ServiceAccount,
    Node,
    /// Each Service that selects the pod: the one fact with several values.
    Service,
}

impl Fact {
    pub(super) const ALL: [Self; 12] = [
        Self::Uid,
        Self::Gid,
        Self::User,
        Self::Group,
        Self::SystemdUnit,
        Self::ExecutableSha256,
        Self::Namespace,
        Self::Pod,
        Self::PodUid,
        Self::ServiceAccount,
        Self::Node,
        Self::Service,
    ];

    /// The name between the braces.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Uid => "unix.uid",
            Self::Gid => "unix.gid",
            Self::User => "unix.user",
            Self::Group => "unix.group",
            Self::SystemdUnit => "unix.systemdUnit",
            Self::ExecutableSha256 => "unix.executableSha256",
            Self::Namespace => "kubernetes.namespace",
            Self::Pod => "kubernetes.pod",
            Self::PodUid => "kubernetes.podUid",
            Self::ServiceAccount => "kubernetes.serviceAccount",
            Self::Node => "kubernetes.node",
            Self::Service => "kubernetes.service",
        }
    }

    /// Who has it.
    pub(super) fn callers(self) -> Callers {
        match self {
            Self::Uid | Self::Gid | Self::User | Self::Group | Self::SystemdUnit | Self::ExecutableSha256 => {
                Callers::Processes
            }
            Self::Namespace | Self::Pod | Self::PodUid | Self::ServiceAccount | Self::Node | Self::Service => {
                Callers::Pods
            }
        }
    }

    /// Its values; none when the caller has no such fact.
    pub(super) fn of(self, facts: &Facts) -> Vec<Cow<'_, str>> {
        match facts {
            Facts::Process(unix) => self.of_process(unix).into_iter().collect(),
            Facts::Pod(pod) if self == Self::Service => pod.services.iter().map(Cow::from).collect(),
            Facts::Pod(pod) => self.of_pod(pod).map(Cow::from).into_iter().collect(),
        }
    }

    fn of_process(self, unix: &UnixFacts) -> Option<Cow<'_, str>> {
        match self {
            Self::Uid => Some(unix.uid.to_string().into()),
            Self::Gid => Some(unix.gid.to_string().into()),
            Self::User => unix.user.as_deref().map(Cow::from),
            Self::Group => unix.group.as_deref().map(Cow::from),
            Self::SystemdUnit => unix.systemd_unit.as_deref().map(Cow::from),
            Self::ExecutableSha256 => unix.executable_sha256.as_deref().map(Cow::from),
            Self::Namespace | Self::Pod | Self::PodUid | Self::ServiceAccount | Self::Node | Self::Service => None,
        }
    }

    fn of_pod(self, pod: &PodFacts) -> Option<&str> {
        match self {
            Self::Namespace => Some(&pod.namespace),
            Self::Pod => Some(&pod.name),
            Self::PodUid => Some(&pod.uid),
            Self::ServiceAccount => Some(pod.service_account.as_str()).filter(|name| !name.is_empty()),
            Self::Node => Some(&pod.node),
            _ => None,
        }
    }
}
