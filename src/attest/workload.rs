//! A workload: what has been proven about a caller, and nothing else.
//!
//! There is no constructor outside `attest`, so whoever holds a [`Workload`] holds the result of an attestation. Facts
//! are what the kernel said, never what the caller said. Two processes with equal facts are the same workload: they may
//! share a credential. The process id is therefore not a fact; the attested connection keeps it.

use std::{collections::BTreeMap, fmt};

/// An attested workload.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Workload {
    pub(super) unix: UnixFacts,
}

/// Facts about a process on this host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UnixFacts {
    /// Effective user id at the time of the call.
    pub uid: u32,
    /// Effective group id at the time of the call.
    pub gid: u32,
    /// Supplementary group ids, sorted, without duplicates.
    pub supplementary_gids: Vec<u32>,
    /// User name of `uid` in the host's user database, when there is one.
    pub user: Option<String>,
    /// Group name of `gid` in the host's group database, when there is one.
    pub group: Option<String>,
    /// Path of the executable as the kernel prints it; `None` when it has been deleted or is not UTF-8.
    pub executable: Option<String>,
    /// SHA-256 of the executable, lower-case hexadecimal; only when a loaded policy asks for it.
    pub executable_sha256: Option<String>,
    /// systemd unit of the process's cgroup, for example `web.service`.
    pub systemd_unit: Option<String>,
    /// Path of the process's cgroup, for example `/system.slice/web.service`.
    pub cgroup: Option<String>,
}

impl Workload {
    /// Facts about the process on this host.
    pub fn unix(&self) -> &UnixFacts {
        &self.unix
    }

    /// Whom bounds are counted for: the user, of whom one may run any number of processes.
    pub fn principal(&self) -> u64 {
        self.unix.uid.into()
    }

    /// Whether this is `before` with some facts gone and none replaced: the same process, whose program's file has been
    /// upgraded under it, or whose user has lost its name.
    pub fn has_only_lost_facts_of(&self, before: &Self) -> bool {
        fn kept_or_lost<T: PartialEq>(now: &Option<T>, before: &Option<T>) -> bool {
            now.is_none() || now == before
        }
        let (now, before) = (&self.unix, &before.unix);
        now.uid == before.uid
            && now.gid == before.gid
            && now.supplementary_gids == before.supplementary_gids
            && kept_or_lost(&now.user, &before.user)
            && kept_or_lost(&now.group, &before.group)
            && kept_or_lost(&now.executable, &before.executable)
            && kept_or_lost(&now.executable_sha256, &before.executable_sha256)
            && kept_or_lost(&now.systemd_unit, &before.systemd_unit)
            && kept_or_lost(&now.cgroup, &before.cgroup)
    }

    /// Facts by the names that templates and `csrd whoami` use, with their text values.
    pub fn facts(&self) -> BTreeMap<&'static str, String> {
        let unix = &self.unix;
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

/// One line for people: `uid 1000 (web) /usr/bin/web`.
impl fmt::Display for UnixFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "uid {}", self.uid)?;
        if let Some(user) = &self.user {
            write!(f, " ({user})")?;
        }
        match &self.executable {
            Some(path) => write!(f, " {path}"),
            None => Ok(()),
        }
    }
}

/// As its facts.
impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.unix.fmt(f)
    }
}

/// A workload made of the given facts, for tests of what stands on attestation.
#[cfg(any(test, feature = "testing"))]
impl Workload {
    /// A workload with these facts, attested by nobody.
    pub fn for_test(unix: UnixFacts) -> Self {
        Self { unix }
    }

    /// A workload of `uid` with group `uid`, running `/usr/bin/test`.
    pub fn of_uid(uid: u32) -> Self {
        Self::for_test(UnixFacts {
            uid,
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
