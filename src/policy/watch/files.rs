//! Policy files, read and kept fresh: [`PolicyFiles`] publishes a new [`PolicySet`] whenever the files say something else.
//!
//! Invariant: what is published has been parsed whole. When a change has a problem, the last good set stays in force and
//! every problem is logged and kept in [`PolicyFiles::problems`]. What counts is what the files contain, so it does not
//! matter how they change: written in place, renamed over, or a whole folder swapped behind a symbolic link as the
//! kubelet does. inotify only says when to look; where it says nothing (network file systems), a slow poll does.
//!
//! Policies decide who gets which certificate, so what others than root and the agent's user can change is not believed:
//! see [`files::check_writers`]. Offline, [`read_set`] reads whatever it is given.
//!
//! A folder's files are those named `*.yaml` and `*.yml` in it, in order of name; hidden ones and subfolders are not read.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::{Event, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::{
    sync::{mpsc, watch},
    task::spawn_blocking,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use crate::{
    files::{self, FileError, Untrusted},
    metrics::Metrics,
    policy::{EMBEDDED, MAX_SOURCE_BYTES, PolicySet, Problem, Source},
};

/// Policy files in one set.
pub const MAX_FILES: usize = 256;
/// Bytes in all files of one set: 4 MiB.
pub const MAX_SET_BYTES: usize = 4 * MAX_SOURCE_BYTES;

/// The longest a change can go unseen when inotify says nothing.
const POLL: Duration = Duration::from_secs(30);
/// Two reads this far apart must agree, so that a file being written is not taken for a shorter one.
const SETTLE: Duration = Duration::from_millis(100);
/// After so many reads that differ, the last one counts.
const MAX_SETTLE_READS: usize = 20;

/// Policy files and the set that they last made.
#[derive(Debug)]
pub struct PolicyFiles {
    paths: Vec<PathBuf>,
    last: Content,
    generation: u64,
    policies: watch::Sender<Arc<PolicySet>>,
    problems: watch::Sender<Vec<Problem>>,
    metrics: Metrics,
}

/// What the files hold, or why they cannot be read.
type Content = Result<Vec<Source>, Vec<Problem>>;

/// The files at start have problems; one line for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadError(pub Vec<Problem>);

impl std::error::Error for LoadError {}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        write!(f, "{count} {} in the policy files", if count == 1 { "problem" } else { "problems" })?;
        self.0.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl PolicyFiles {
    /// Reads the files and folders at `paths`. Blocks; meant for the start.
    ///
    /// # Errors
    ///
    /// Every problem: nothing is served by half a policy.
    pub fn load(paths: Vec<PathBuf>, metrics: Metrics) -> Result<Self, LoadError> {
        let paths: Vec<_> = paths.into_iter().map(|path| std::path::absolute(&path).unwrap_or(path)).collect();
        let content = read(&paths, trusted);
        let set = parse(&content, EMBEDDED).map_err(LoadError)?;
        metrics.policy_loaded(1);
        Ok(Self {
            paths,
            last: content,
            generation: 1,
            policies: watch::Sender::new(Arc::new(set)),
            problems: watch::Sender::new(Vec::new()),
            metrics,
        })
    }

    /// The set in force, now and after each change.
    pub fn subscribe(&self) -> watch::Receiver<Arc<PolicySet>> {
        self.policies.subscribe()
    }

    /// Why the set in force is not what the files say; empty when it is.
    pub fn problems(&self) -> watch::Receiver<Vec<Problem>> {
        self.problems.subscribe()
    }

    /// Follows the files until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        // One pending hint is enough: it only says that it is worth looking.
        let (tell, mut told) = mpsc::channel(1);
        let mut watcher = None;
        // What is watched may be gone after a change: a folder replaced, a link that points elsewhere.
        let mut stale = true;
        loop {
            if stale {
                watcher = tokio::select! {
                    () = stop.cancelled() => return,
                    watcher = watch_apart(&self.paths, &tell) => watcher,
                };
            }
            // Look first: the files may have changed between the load and the start of the watch.
            stale = tokio::select! {
                () = stop.cancelled() => return,
                changed = self.look() => changed,
            };
            if stale {
                continue;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                Some(()) = told.recv(), if watcher.is_some() => {}
                () = sleep(POLL) => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(SETTLE) => {}
            }
        }
    }

    /// Publishes what the files say, if it is something new.
    async fn look(&mut self) -> bool {
        let mut content = read_apart(&self.paths).await;
        if content == self.last {
            return false;
        }
        for _ in 1..MAX_SETTLE_READS {
            sleep(SETTLE).await;
            let again = read_apart(&self.paths).await;
            if std::mem::replace(&mut content, again) == content {
                break;
            }
        }
        let parsed;
        (self.last, parsed) = spawn_blocking(|| {
            let parsed = parse(&content, EMBEDDED);
            (content, parsed)
        })
        .await
        .expect("parsing does not panic and is not aborted");
        match parsed {
            Ok(set) => self.accept(set),
            Err(problems) => self.reject(problems),
        }
        true
    }

    fn accept(&mut self, set: PolicySet) {
        self.generation += 1;
        tracing::info!(generation = self.generation, policies = set.len(), "policy files loaded");
        self.metrics.policy_loaded(self.generation);
        self.problems.send_replace(Vec::new());
        self.policies.send_replace(Arc::new(set));
    }

    fn reject(&mut self, problems: Vec<Problem>) {
        for problem in &problems {
            let Problem { file, line, field, message } = problem;
            tracing::warn!(
                file,
                line,
                field,
                generation = self.generation,
                "policy files not loaded, the last good set stays in force: {message}"
            );
        }
        self.metrics.policy_load_failed();
        self.problems.send_replace(problems);
    }
}

/// The set that the files and folders at `paths` make now, with `default_signer` where a policy names none. Blocks.
///
/// # Errors
///
/// Every problem, as for [`PolicyFiles::load`].
pub fn read_set(paths: &[PathBuf], default_signer: &str) -> Result<PolicySet, LoadError> {
    parse(&read(paths, |_| Ok(())), default_signer).map_err(LoadError)
}

fn parse(content: &Content, default_signer: &str) -> Result<PolicySet, Vec<Problem>> {
    content.as_ref().map_err(Clone::clone).and_then(|sources| PolicySet::parse(sources, default_signer))
}

async fn read_apart(paths: &[PathBuf]) -> Content {
    let paths = paths.to_vec();
    spawn_blocking(move || read(&paths, trusted)).await.expect("reading does not panic and is not aborted")
}

/// Reads what passes `check`, too.
fn read(paths: &[PathBuf], check: fn(&Path) -> Result<(), String>) -> Content {
    let (mut files, mut problems) = (Vec::new(), Vec::new());
    for path in paths {
        match path.is_dir().then(|| list(path).and_then(|listed| check(path).map(|()| listed))) {
            None => files.push(path.clone()),
            Some(Ok(listed)) => files.extend(listed),
            Some(Err(message)) => problems.push(problem(path, message)),
        }
    }
    if files.len() > MAX_FILES {
        let message = format!("{} policy files in the set, at most {MAX_FILES} are allowed", files.len());
        return Err(vec![problem(&files[MAX_FILES], message)]);
    }
    let mut sources = Vec::new();
    let mut left = MAX_SET_BYTES;
    for path in &files {
        match read_file(path, left).and_then(|text| check(path).map(|()| text)) {
            Ok(text) => {
                left -= text.len();
                sources.push(Source { origin: path.display().to_string(), text });
            }
            Err(message) => problems.push(problem(path, message)),
        }
    }
    if problems.is_empty() { Ok(sources) } else { Err(problems) }
}

/// The policy files in a folder, in order of name.
fn list(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        let yaml = path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        if yaml && !hidden {
            files.push(path);
        }
        if files.len() > MAX_FILES {
            return Err(format!("it has more than {MAX_FILES} policy files"));
        }
    }
    files.sort();
    Ok(files)
}

fn read_file(path: &Path, left: usize) -> Result<String, String> {
    files::read_text(path, MAX_SOURCE_BYTES.min(left)).map_err(|error| match error {
        FileError::Io(error) => unreadable(error),
        FileError::TooLong { .. } => {
            format!("{error}; a file may have {MAX_SOURCE_BYTES}, all of a set {MAX_SET_BYTES}")
        }
        FileError::NotRegular | FileError::NotUtf8 { .. } => error.to_string(),
    })
}

/// Whether nobody but root and the agent's user can change what is read there.
fn trusted(path: &Path) -> Result<(), String> {
    files::check_writers(path).map_err(|error| match error {
        Untrusted::Io { ref source, .. } => format!("{error}: {source}"),
        error => error.to_string(),
    })
}

fn unreadable(error: io::Error) -> String {
    format!("it cannot be read: {error}")
}

fn problem(path: &Path, message: String) -> Problem {
    Problem { file: path.display().to_string(), line: 0, field: String::new(), message }
}

/// [`watcher`], on a thread that may wait: adding a watch waits for the thread that reads inotify, and a flood of events
/// keeps that one busy.
async fn watch_apart(paths: &[PathBuf], tell: &mpsc::Sender<()>) -> Option<RecommendedWatcher> {
    let (paths, tell) = (paths.to_vec(), tell.clone());
    spawn_blocking(move || watcher(&paths, &tell)).await.expect("setting up a watch does not panic and is not aborted")
}

/// Tells `tell` about changes in the folders that hold the files; `None` where the kernel cannot.
fn watcher(paths: &[PathBuf], tell: &mpsc::Sender<()>) -> Option<RecommendedWatcher> {
    let parent = |path: &Path| path.parent().unwrap_or(path).to_owned();
    // A folder is also watched from above, to see it replaced; its other neighbours are of no interest.
    let roots: Vec<_> = paths.iter().map(|path| if path.is_dir() { path.clone() } else { parent(path) }).collect();
    let watched: Vec<_> = roots.iter().cloned().chain(paths.iter().map(|path| parent(path))).collect();
    let tell = tell.clone();
    let handler = move |event: notify::Result<Event>| {
        let ours = |event: &Event| {
            // Our own reading is access, too.
            !event.kind.is_access() && event.paths.iter().any(|path| roots.iter().any(|root| path.starts_with(root)))
        };
        if event.as_ref().map_or(true, ours) {
            // Full means that a hint is already waiting.
            let _ = tell.try_send(());
        }
    };
    let mut watcher = notify::recommended_watcher(handler)
        .inspect_err(|error| tracing::warn!(%error, "policy files are polled, because they cannot be watched"))
        .ok()?;
    for path in watched {
        if let Err(error) = watcher.watch(&path, RecursiveMode::NonRecursive) {
            tracing::warn!(%error, path = %path.display(), "policy files are polled, because they cannot be watched");
        }
    }
    Some(watcher)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use tempfile::TempDir;

    use super::*;

    /// A change that is not seen within this time will never be; far more than any change takes.
    const NEVER: Duration = Duration::from_secs(120);

    fn policy(name: &str) -> String {
        format!(
            "apiVersion: csrd.dev/v1alpha1\nkind: CertificatePolicy\nmetadata: {{name: {name}}}\n\
             spec: {{match: {{unix: {{uids: [1]}}}}}}\n"
        )
    }

    fn folder(files: &[(&str, &str)]) -> TempDir {
        let folder = TempDir::new().unwrap();
        // Policies that a group may write, as some users' umask has it, are refused.
        rustix::process::umask(Mode::from_raw_mode(0o022));
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    fn load(paths: &[&Path]) -> Result<PolicyFiles, LoadError> {
        PolicyFiles::load(paths.iter().map(|path| path.to_path_buf()).collect(), Metrics::new())
    }

    fn refused(path: &Path, message: &str) {
        let LoadError(problems) = load(&[path]).unwrap_err();
        assert!(problems.iter().any(|problem| problem.message.contains(message)), "{problems:#?}");
    }

    #[test]
    fn a_folder_is_its_visible_yaml_files_in_order_of_name() {
        let folder =
            folder(&[("b.yaml", "b"), ("a.yml", "a"), (".hidden.yaml", "no"), ("c.txt", "no"), ("yaml", "no")]);
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.path().join("sub/d.yaml"), "no").unwrap();
        let sources = read(&[folder.path().to_owned()], trusted).unwrap();
        let texts: Vec<_> = sources.iter().map(|source| source.text.as_str()).collect();
        assert_eq!(texts, ["a", "b"]);
        assert!(sources[0].origin.ends_with("/a.yml"));
    }

    #[test]
    fn files_and_folders_make_one_set() {
        let folder = folder(&[("a.yaml", &(policy("a") + "---\n" + &policy("b")))]);
        let file = folder.path().join("c.policy");
        fs::write(&file, policy("c")).unwrap();
        assert_eq!(load(&[folder.path(), &file]).unwrap().subscribe().borrow().len(), 3);
        let error = load(&[&file, &file]).unwrap_err().to_string();
        let path = file.display();
        assert_eq!(
            error,
            format!(
                "1 problem in the policy files\n  {path}:3: metadata.name: \"c\" is also the name of a policy in {path}"
            )
        );
    }

    #[test]
    fn an_empty_folder_is_a_set_that_denies_everything() {
        assert!(load(&[folder(&[]).path()]).unwrap().subscribe().borrow().is_empty());
    }

    #[test]
    fn what_is_no_readable_text_file_is_a_problem() {
        let folder = folder(&[("latin.yaml", "")]);
        refused(&folder.path().join("absent.yaml"), "it cannot be read: No such file");
        fs::write(folder.path().join("latin.yaml"), b"# \xff").unwrap();
        refused(&folder.path().join("latin.yaml"), "it is not UTF-8 after byte 2");
        mknodat(CWD, folder.path().join("pipe.yaml"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        refused(folder.path(), "it is no regular file");
        fs::create_dir(folder.path().join("folder.yaml")).unwrap();
        refused(folder.path(), "it is no regular file");
        refused(Path::new("/dev/zero"), "it is no regular file");
    }

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_others_may_write_is_a_problem_for_an_agent_and_none_offline() {
        let folder = folder(&[("a.yaml", &policy("a"))]);
        let file = folder.path().join("a.yaml");
        for (path, bits, good) in [(file.as_path(), 0o664, 0o644), (folder.path(), 0o1777, 0o755)] {
            mode(path, bits);
            refused(folder.path(), &format!("(mode {bits:04o}); run: chmod go-w {}", path.display()));
            assert_eq!(read_set(&[folder.path().to_owned()], EMBEDDED).unwrap().len(), 1);
            mode(path, good);
            assert!(load(&[folder.path()]).is_ok());
        }
    }

    #[test]
    fn files_have_bounds_in_bytes_and_number() {
        let folder = folder(&[]);
        let write =
            |name: usize, bytes: usize| fs::write(folder.path().join(format!("{name}.yaml")), "#".repeat(bytes));
        for name in 0..4 {
            write(name, MAX_SOURCE_BYTES).unwrap();
        }
        assert!(load(&[folder.path()]).is_ok());
        write(4, 1).unwrap();
        refused(folder.path(), "it has more than 0 bytes; a file may have 1048576, all of a set 4194304");
        write(0, MAX_SOURCE_BYTES + 1).unwrap();
        refused(folder.path(), "it has more than 1048576 bytes");
        for name in 0..MAX_FILES {
            write(name, 0).unwrap();
        }
        assert!(load(&[folder.path()]).is_ok());
        let one_more = folder.path().join("one-more");
        fs::write(&one_more, "").unwrap();
        let LoadError(problems) = load(&[folder.path(), &one_more]).unwrap_err();
        assert_eq!(problems[0].message, "257 policy files in the set, at most 256 are allowed");
        write(MAX_FILES, 0).unwrap();
        refused(folder.path(), "it has more than 256 policy files");
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_never_settles_is_taken_as_it_is_in_the_end() {
        let folder = folder(&[("a.yaml", "")]);
        let mut files = load(&[folder.path()]).unwrap();
        let write = |number: u32| fs::write(folder.path().join("a.yaml"), policy(&format!("p{number}"))).unwrap();
        write(0);
        let changing = async {
            // Between two reads: beside one, it might be read empty.
            sleep(SETTLE / 2).await;
            for number in 1.. {
                write(number);
                sleep(SETTLE).await;
            }
        };
        let began = tokio::time::Instant::now();
        tokio::select! {
            looked = files.look() => assert!(looked),
            () = changing => {}
        }
        assert_eq!(began.elapsed(), SETTLE * (MAX_SETTLE_READS as u32 - 1));
        assert_eq!(files.subscribe().borrow().len(), 1);
    }

    /// Runs `test` beside the watch of `path`.
    async fn following(
        path: &Path,
        test: impl AsyncFnOnce(watch::Receiver<Arc<PolicySet>>, watch::Receiver<Vec<Problem>>),
    ) {
        let files = load(&[path]).unwrap();
        let (mut policies, problems) = (files.subscribe(), files.problems());
        policies.mark_unchanged();
        let stop = CancellationToken::new();
        let test = async {
            tokio::time::timeout(NEVER, test(policies, problems)).await.expect("the change is seen");
            stop.cancel();
        };
        tokio::join!(files.run(stop.clone()), test);
    }

    async fn until_len(policies: &mut watch::Receiver<Arc<PolicySet>>, len: usize) {
        policies.wait_for(|set| set.len() == len).await.unwrap();
    }

    #[tokio::test]
    async fn a_file_written_in_place_or_renamed_over_is_seen() {
        let folder = folder(&[("a.yaml", &policy("a"))]);
        let path = folder.path().join("a.yaml");
        following(&path, async |mut policies, _| {
            fs::write(&path, policy("a") + "---\n" + &policy("b")).unwrap();
            until_len(&mut policies, 2).await;
            let new = folder.path().join("new");
            fs::write(&new, "# nothing").unwrap();
            fs::rename(&new, &path).unwrap();
            until_len(&mut policies, 0).await;
        })
        .await;
    }

    #[tokio::test]
    async fn files_that_come_and_go_in_a_folder_are_seen() {
        let folder = folder(&[]);
        following(folder.path(), async |mut policies, _| {
            fs::write(folder.path().join("a.yaml"), policy("a")).unwrap();
            until_len(&mut policies, 1).await;
            fs::remove_file(folder.path().join("a.yaml")).unwrap();
            until_len(&mut policies, 0).await;
        })
        .await;
    }

    /// The layout of a ConfigMap volume: `a.yaml -> ..data/a.yaml`, `..data -> ..1`.
    #[tokio::test]
    async fn a_folder_swapped_behind_a_link_is_seen() {
        let folder = folder(&[]);
        let at = |name: &str| folder.path().join(name);
        for (version, text) in [("..1", policy("a")), ("..2", policy("a") + "---\n" + &policy("b"))] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("a.yaml"), text).unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/a.yaml", at("a.yaml")).unwrap();
        for path in [folder.path(), &at("a.yaml")] {
            following(path, async |mut policies, _| {
                for (version, len) in [("..2", 2), ("..1", 1)] {
                    symlink(version, at("..data_tmp")).unwrap();
                    fs::rename(at("..data_tmp"), at("..data")).unwrap();
                    until_len(&mut policies, len).await;
                }
            })
            .await;
        }
    }

    #[tokio::test]
    async fn a_folder_that_is_replaced_is_followed() {
        let folder = folder(&[]);
        let path = folder.path().join("policies");
        fs::create_dir(&path).unwrap();
        following(&path, async |mut policies, _| {
            fs::create_dir(folder.path().join("new")).unwrap();
            fs::write(folder.path().join("new/a.yaml"), policy("a")).unwrap();
            fs::rename(&path, folder.path().join("old")).unwrap();
            fs::rename(folder.path().join("new"), &path).unwrap();
            until_len(&mut policies, 1).await;
            fs::write(path.join("b.yaml"), policy("b")).unwrap();
            until_len(&mut policies, 2).await;
        })
        .await;
    }

    #[tokio::test]
    async fn the_last_good_set_stays_until_every_problem_is_gone() {
        let folder = folder(&[("a.yaml", &policy("a"))]);
        following(folder.path(), async |mut policies, mut problems| {
            fs::write(folder.path().join("b.yaml"), "oops: true").unwrap();
            let seen = problems.wait_for(|problems| !problems.is_empty()).await.unwrap().clone();
            assert!(seen[0].to_string().contains("b.yaml:1: oops: unknown field"), "{seen:?}");
            fs::remove_file(folder.path().join("a.yaml")).unwrap();
            fs::write(folder.path().join("c.yaml"), policy("c")).unwrap();
            problems.changed().await.unwrap();
            assert!(!policies.has_changed().unwrap());
            assert_eq!(policies.borrow().len(), 1);
            fs::write(folder.path().join("b.yaml"), policy("b")).unwrap();
            until_len(&mut policies, 2).await;
            assert!(problems.borrow().is_empty());
        })
        .await;
    }

    #[tokio::test]
    async fn the_last_good_set_stays_while_others_may_write() {
        let folder = folder(&[("a.yaml", &policy("a"))]);
        let file = folder.path().join("a.yaml");
        following(folder.path(), async |mut policies, mut problems| {
            mode(&file, 0o666);
            problems.wait_for(|problems| !problems.is_empty()).await.unwrap();
            fs::write(&file, policy("a") + "---\n" + &policy("b")).unwrap();
            // Seen while it is writable or after, it counts only after.
            assert_eq!(policies.borrow_and_update().len(), 1);
            mode(&file, 0o644);
            until_len(&mut policies, 2).await;
            assert!(problems.borrow().is_empty());
        })
        .await;
    }

    #[tokio::test]
    async fn files_that_say_the_same_publish_nothing() {
        let folder = folder(&[("a.yaml", &policy("a"))]);
        let mut files = load(&[folder.path()]).unwrap();
        let policies = files.subscribe();
        fs::write(folder.path().join("a.yaml"), policy("a")).unwrap();
        assert!(!files.look().await);
        fs::write(folder.path().join("a.yaml"), policy("b")).unwrap();
        assert!(files.look().await);
        assert!(policies.has_changed().unwrap());
        assert!(files.metrics.encode().contains("csrd_policy_generation 2"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_that_inotify_does_not_tell_is_found_by_polling() {
        let folder = folder(&[("real.policy", &policy("a"))]);
        let other = self::folder(&[]);
        // The link's own folder never changes.
        let link = other.path().join("a.yaml");
        symlink(folder.path().join("real.policy"), &link).unwrap();
        following(&link, async |mut policies, _| {
            // Time is paused and moves when everybody waits, so this is after the first look.
            sleep(Duration::from_secs(1)).await;
            fs::write(folder.path().join("real.policy"), policy("a") + "---\n" + &policy("b")).unwrap();
            until_len(&mut policies, 2).await;
        })
        .await;
    }
}
