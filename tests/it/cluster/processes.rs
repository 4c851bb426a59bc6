//! Processes that end with the test binary, however it ends.
//!
//! Every control plane has a keeper, a shell that reads a pipe which nobody writes to. The kernel closes that pipe when
//! this process ends, be it by a return, a panic, Ctrl-C or SIGKILL; then the keeper kills the process group that it leads
//! and the others are in, and removes their folder. A terminal's Ctrl-C does not reach that group.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Mutex,
};

use tempfile::TempDir;

/// The keeper kills its own group, so what cleans up after that is in another one.
const KEEPER: &str = r#"cat >/dev/null; exec setsid sh -c '
kill -KILL -"$1"
for try in 1 2 3 4 5; do rm -rf "$2" 2>/dev/null && exit; sleep 0.2; done' - $$ "$1""#;

/// The processes of one control plane and the folder they keep their files in.
pub(crate) struct Processes {
    folder: PathBuf,
    keeper: Child,
    running: Mutex<Vec<(&'static str, Child)>>,
}

impl Processes {
    pub(super) fn new() -> Self {
        let folder = TempDir::with_prefix("csrd-cluster-").unwrap().keep();
        for name in ["log", "pki"] {
            fs::create_dir(folder.join(name)).unwrap();
        }
        let keeper = Command::new("sh")
            .args(["-c", KEEPER, "csrd-test-keeper"])
            .arg(&folder)
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        Self { folder, keeper, running: Mutex::default() }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Starts `command` as `name`, with its output in the log of that name.
    pub(super) fn start(&self, name: &'static str, mut command: Command) {
        let log = File::options().create(true).append(true).open(self.log_path(name)).unwrap();
        let group = self.keeper.id().try_into().expect("a process id is an i32");
        command.current_dir(&self.folder).process_group(group).stdin(Stdio::null());
        let child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        self.running.lock().unwrap().push((name, child));
    }

    /// Ends it as a crash would.
    pub(super) fn kill(&self, name: &str) {
        let mut running = self.running.lock().unwrap();
        let at = running.iter().position(|(it, _)| *it == name).unwrap_or_else(|| panic!("{name} does not run"));
        let (_, mut child) = running.swap_remove(at);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// The name of a process that has ended on its own.
    pub(super) fn ended(&self) -> Option<&'static str> {
        let mut running = self.running.lock().unwrap();
        running.iter_mut().find_map(|(name, child)| child.try_wait().unwrap().map(|_| *name))
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.folder.join("log").join(name)
    }

    /// All that `name` has written.
    pub(super) fn log(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path(name)).unwrap_or_default()).into_owned()
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        for (_, child) in self.running.get_mut().unwrap() {
            child.wait().unwrap();
        }
        self.keeper.wait().unwrap();
    }
}
