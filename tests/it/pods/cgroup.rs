//! Cgroups as the kubelet makes them, and processes in them: to an agent, such a process is its pod. Needs root.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use rustix::process::{Pid, Signal, kill_process};

/// A killed process is in its cgroup for a moment yet.
const POLL: Duration = Duration::from_millis(10);
const TRIES: usize = 500;

/// A cgroup. Whoever made it ends it when dropped, and who is in it with it.
pub(crate) struct Cgroup {
    folder: PathBuf,
    made: bool,
}

impl Cgroup {
    pub(crate) fn make(path: &str) -> Self {
        // Any hierarchy of version 1 will do, and else there is only the one of version 2.
        let root = Path::new("/sys/fs/cgroup");
        let root = [root.join("pids"), root.to_owned()].into_iter().find(|it| it.join("cgroup.procs").exists());
        let folder = root.expect("cgroups are mounted where they always are").join(path);
        let made = !folder.exists();
        // Another test's end may take a parent away between two steps.
        while let Err(error) = fs::create_dir_all(&folder) {
            assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}");
        }
        Self { folder, made }
    }

    /// That of the pod's only container.
    pub(crate) fn of(pod: &Pod) -> Self {
        Self::make(&path(&pod.uid().unwrap(), &container_of(pod)))
    }

    /// A command that goes into the cgroup and then becomes `through`, which takes another command as its arguments, or
    /// else that command itself.
    pub(crate) fn command(&self, through: &[&str]) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $$ > \"$1/cgroup.procs\" && shift && exec \"$@\"", "sh"])
            .arg(&self.folder)
            .args(through);
        command
    }
}

impl Drop for Cgroup {
    #[allow(clippy::disallowed_methods, reason = "a drop cannot await")]
    fn drop(&mut self) {
        if !self.made {
            return;
        }
        for _ in 0..TRIES {
            let inside = fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default();
            for process in inside.lines().filter_map(|id| Pid::from_raw(id.parse().ok()?)) {
                let _ = kill_process(process, Signal::KILL);
            }
            if fs::remove_dir(&self.folder).is_ok() {
                break;
            }
            std::thread::sleep(POLL);
        }
        // And what is above it, up to the first that is still in use.
        let mut folder = self.folder.clone();
        while folder.pop() && fs::remove_dir(&folder).is_ok() {}
    }
}

/// The path that the kubelet gives a container of a pod of the lowest quality.
pub(crate) fn path(uid: &str, container: &str) -> String {
    format!("kubepods/besteffort/pod{uid}/{container}")
}

pub(super) fn container_of(pod: &Pod) -> String {
    let id = pod.status.as_ref().unwrap().container_statuses.as_ref().unwrap()[0].container_id.clone().unwrap();
    id.strip_prefix("containerd://").unwrap().to_owned()
}
