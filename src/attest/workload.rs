//! A workload: what has been proven about a caller, and nothing else.
//!
//! There is no constructor outside `attest`, so whoever holds a [`Workload`] holds the result of an attestation. Facts
//! are what the kernel said, never what the caller said. Two processes with equal facts are the same workload: they may
//! share a credential. The process id is therefore not a fact; the attested connection keeps it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use crate::{account::Principal, text::Printable};

/// An attested workload.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Workload {
    pub(super) facts: Facts,
}

/// What a workload is, with everything proven about it. A process in a pod is the pod: what it may have does not depend
/// on ids that its image chose.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Facts {
    /// A process on this host, outside of any pod.
    Process(UnixFacts),
    /// A pod of the cluster.
    Pod(PodFacts),
}

/// Facts about a process on this host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UnixFacts {
    /// Effective user id at the time of the call.
    pub uid: u32,
    /// The user to whom `uid` is subordinate (subuid(5)), or else `uid`: who bears the bounds.
    pub owner: u32,
    /// Effective group id at the time of the call.
    pub gid: u32,
    /// Supplementary group ids, sorted, without duplicates.
    pub supplementary_gids: Vec<u32>,
    /// User name of `uid` in the host's user database, when there is one.
    pub user: Option<String>,
    /// Group name of `gid` in the host's group database, when there is one.
    pub group: Option<String>,
    /// Path of the executable as the kernel prints it; `None` when it is not UTF-8, or had been deleted before the process
    /// connected.
    pub executable: Option<String>,
    /// SHA-256 of the executable, lower-case hexadecimal; only when a loaded policy asks for it.
    pub executable_sha256: Option<String>,
    /// systemd unit of the process's cgroup, for example `web.service`.
    pub systemd_unit: Option<String>,
    /// Path of the process's cgroup, for example `/system.slice/web.service`.
    pub cgroup: Option<String>,
}

/// Facts about a pod, as the API server tells them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodFacts {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID: no two pods ever have the same, whatever their names.
    pub uid: String,
    /// Name of its ServiceAccount; empty for a static pod, which has none.
    pub service_account: String,
    /// Name of the node it runs on.
    pub node: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Labels of its namespace.
    pub namespace_labels: BTreeMap<String, String>,
    /// Its own addresses: none before the kubelet has reported them, and none in the host's network, where they are the
    /// node's.
    pub ips: Vec<IpAddr>,
    /// Names of the Services in its namespace that select it; only while a loaded policy asks for them.
    pub services: BTreeSet<String>,
}

impl Workload {
    /// Everything proven about it.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Facts about the process, when it is one of this host's.
    pub fn unix(&self) -> Option<&UnixFacts> {
        match &self.facts {
            Facts::Process(unix) => Some(unix),
            Facts::Pod(_) => None,
        }
    }

    /// Facts about the pod, when it is one.
    pub fn pod(&self) -> Option<&PodFacts> {
        match &self.facts {
            Facts::Process(_) => None,
            Facts::Pod(pod) => Some(pod),
        }
    }

    /// Whom bounds are counted for: the user, of whom one may run any number of processes, or the pod.
    pub fn principal(&self) -> Principal {
        match &self.facts {
            Facts::Process(unix) => Principal::user(unix.owner),
            Facts::Pod(pod) => Principal::pod(&pod.uid),
        }
    }

    /// Whether this is `before`, changed in ways that leave it the same: a process that has only lost facts, for example
    /// because its user has lost its name; or the same pod with other labels.
    ///
    /// A process whose program has been upgraded under it keeps the path that was proven; one without that path runs
    /// another file.
    pub fn is_still(&self, before: &Self) -> bool {
        match (&self.facts, &before.facts) {
            (Facts::Process(now), Facts::Process(before)) => now.has_only_lost_facts_of(before),
            (Facts::Pod(now), Facts::Pod(before)) => now.uid == before.uid,
            _ => false,
        }
    }
}

impl UnixFacts {
    fn has_only_lost_facts_of(&self, before: &Self) -> bool {
        fn kept_or_lost<T: PartialEq>(now: &Option<T>, before: &Option<T>) -> bool {
            now.is_none() || now == before
        }
        let now = self;
        now.uid == before.uid
            && now.gid == before.gid
            && now.supplementary_gids == before.supplementary_gids
            && kept_or_lost(&now.user, &before.user)
            && kept_or_lost(&now.group, &before.group)
            && now.executable == before.executable
            && kept_or_lost(&now.executable_sha256, &before.executable_sha256)
            && kept_or_lost(&now.systemd_unit, &before.systemd_unit)
            && kept_or_lost(&now.cgroup, &before.cgroup)
    }
}

impl Facts {
    /// Facts by the names that templates and `csrd whoami` use, with their text values.
    pub fn named(&self) -> BTreeMap<&'static str, String> {
        match self {
            Self::Process(unix) => unix.named(),
            Self::Pod(pod) => pod.named(),
        }
    }
}

impl UnixFacts {
    fn named(&self) -> BTreeMap<&'static str, String> {
        let unix = self;
        let mut facts = BTreeMap::from([("unix.uid", unix.uid.to_string()), ("unix.gid", unix.gid.to_string())]);
        let optional = [
            ("unix.user", &unix.user),
            ("unix.group", &unix.group),
            ("unix.executable", &unix.executable),
            ("unix.executableSha256", &unix.executable_sha256),
            ("unix.systemdUnit", &unix.systemd_unit),
            ("unix.cgroup", &unix.cgroup),
        ];
        facts.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value.clone()?))));
        facts
    }
}

impl PodFacts {
    fn named(&self) -> BTreeMap<&'static str, String> {
        fn list<T: ToString>(values: impl IntoIterator<Item = T>) -> String {
            values.into_iter().map(|value| value.to_string()).collect::<Vec<_>>().join(", ")
        }
        let labels =
            |labels: &BTreeMap<String, String>| list(labels.iter().map(|(key, value)| format!("{key}={value}")));
        BTreeMap::from([
            ("kubernetes.namespace", self.namespace.clone()),
            ("kubernetes.pod", self.name.clone()),
            ("kubernetes.podUid", self.uid.clone()),
            ("kubernetes.serviceAccount", self.service_account.clone()),
            ("kubernetes.node", self.node.clone()),
            ("kubernetes.labels", labels(&self.labels)),
            ("kubernetes.namespaceLabels", labels(&self.namespace_labels)),
            ("kubernetes.podIPs", list(&self.ips)),
            ("kubernetes.services", list(&self.services)),
        ])
    }
}

/// One line for people: `uid 1000 (web) /usr/bin/web`.
impl fmt::Display for UnixFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "uid {}", self.uid)?;
        if let Some(user) = &self.user {
            write!(f, " ({})", Printable(user))?;
        }
        match &self.executable {
            Some(path) => write!(f, " {}", Printable(path)),
            None => Ok(()),
        }
    }
}

/// One line for people: `pod production/web-0 (ServiceAccount web)`.
impl fmt::Display for PodFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [namespace, name, account] = [&self.namespace, &self.name, &self.service_account].map(|it| Printable(it));
        write!(f, "pod {namespace}/{name} (ServiceAccount {account})")
    }
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(unix) => unix.fmt(f),
            Self::Pod(pod) => pod.fmt(f),
        }
    }
}

/// As its facts.
impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.facts.fmt(f)
    }
}

/// A workload made of the given facts, for tests of what stands on attestation.
#[cfg(any(test, feature = "testing"))]
impl Workload {
    /// A process with these facts, attested by nobody.
    pub fn for_test(unix: UnixFacts) -> Self {
        Self { facts: Facts::Process(unix) }
    }

    /// A pod with these facts, attested by nobody.
    pub fn of_pod(pod: PodFacts) -> Self {
        Self { facts: Facts::Pod(pod) }
    }

    /// A workload of `uid` with group `uid`, running `/usr/bin/test`.
    pub fn of_uid(uid: u32) -> Self {
        Self::for_test(UnixFacts {
            uid,
            owner: uid,
            gid: uid,
            supplementary_gids: vec![uid],
            user: None,
            group: None,
            executable: Some("/usr/bin/test".to_owned()),
            executable_sha256: None,
            systemd_unit: None,
            cgroup: None,
        })
    }
}
