//! The memory limit of the shipped manifests, where this machine has a memory controller.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// The agent's limit in `deploy/kubernetes`.
pub(crate) const LIMIT_MIB: u64 = 128;

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
