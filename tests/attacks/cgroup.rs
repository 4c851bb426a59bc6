//! The memory limit of the shipped manifests, where this machine has a memory controller.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// The agent's limit in `deploy/kubernetes`.
pub(crate) const LIMIT_MIB: u64 = 128;

/// Cgroups by whom they hold.
pub(crate) const ATTACKERS: &str = "attackers";
pub(crate) const NEIGHBOUR: &str = "neighbour";
pub(crate) const AGENT: &str = "agent";

/// A cgroup with that limit, removed when dropped.
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// `None` where no controller can be had.
    pub(crate) fn make() -> Option<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let name = format!("csrd-attacks-{}", std::process::id());
        let (folder, limit) = match root.join("memory/cgroup.procs").exists() {
            true => (root.join("memory").join(name), "memory.limit_in_bytes"),
            false => {
                // Fails where it is there already.
                let _ = fs::write(root.join("cgroup.subtree_control"), "+memory");
                (root.join(name), "memory.max")
            }
        };
        fs::create_dir_all(&folder).ok()?;
        let cgroup = Self(folder);
        fs::write(cgroup.0.join(limit), (LIMIT_MIB << 20).to_string()).ok()?;
        Some(cgroup)
    }

    /// Where a process writes its id to be in it.
    pub(crate) fn procs(&self) -> PathBuf {
        self.0.join("cgroup.procs")
    }
}

/// Puts a process into a cgroup of that name, which has as much of the processor as each other one: as users, services and
/// pods have theirs. Nothing happens where there is no controller.
pub(crate) fn share(name: &str, process: Option<u32>) {
    let root = Path::new("/sys/fs/cgroup");
    let folder = if root.join("cpu/cgroup.procs").exists() {
        root.join("cpu")
    } else {
        let _ = fs::write(root.join("cgroup.subtree_control"), "+cpu");
        root.to_owned()
    };
    let folder = folder.join(format!("csrd-attacks-{}-{name}", std::process::id()));
    if let (Some(process), Ok(())) = (process, fs::create_dir_all(&folder)) {
        let _ = fs::write(folder.join("cgroup.procs"), process.to_string());
    }
}

/// Removes the cgroups of [`share`], which nobody is in any more.
pub(crate) fn remove_shares() {
    for root in ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup"] {
        for name in [ATTACKERS, NEIGHBOUR, AGENT] {
            let _ = fs::remove_dir(format!("{root}/csrd-attacks-{}-{name}", std::process::id()));
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that was killed is in it for a moment yet.
        for _ in 0..200 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
