//! Policy files, read and kept fresh: [`PolicyFiles`] publishes a new [`PolicySet`] whenever the files say something else.
//!
//! Invariant: what is published has been parsed whole. When a change has a problem, the last good set stays in force and
//! every problem is logged and kept in [`PolicyFiles::problems`]. What counts is what the files contain, so it does not
//! matter how they change: written in place, renamed over, or a whole folder swapped behind a symbolic link as the
//! kubelet does. inotify only says when to look; where it says nothing (network file systems), a slow poll does.
//!
//! A folder's files are those named `*.yaml` and `*.yml` in it, in order of name; hidden ones and subfolders are not read.

use std::{
    fmt,
    fs::{self, OpenOptions},
    io::Read as _,
    os::unix::fs::OpenOptionsExt as _,
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
    metrics::Metrics,
    policy::{MAX_SOURCE_BYTES, PolicySet, Problem, Source},
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
        let content = read(&paths);
        let set = parse(&content).map_err(LoadError)?;
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
        let mut watcher = watcher(&self.paths, &tell);
        loop {
            // Look first: the files may have changed between the load and the start of the watch.
            let changed = tokio::select! {
                () = stop.cancelled() => return,
                changed = self.look() => changed,
            };
            if changed {
                // What was watched may be gone: a folder replaced, a link that points elsewhere.
                watcher = self::watcher(&self.paths, &tell);
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
            let parsed = parse(&content);
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

fn parse(content: &Content) -> Result<PolicySet, Vec<Problem>> {
    content.as_ref().map_err(Clone::clone).and_then(|sources| PolicySet::parse(sources))
}

async fn read_apart(paths: &[PathBuf]) -> Content {
    let paths = paths.to_vec();
    spawn_blocking(move || read(&paths)).await.expect("reading does not panic and is not aborted")
}

fn read(paths: &[PathBuf]) -> Content {
    let (mut files, mut problems) = (Vec::new(), Vec::new());
    for path in paths {
        match path.is_dir().then(|| list(path)) {
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
        match read_file(path, left) {
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
    let unreadable = |error| format!("it cannot be read: {error}");
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

/// Reads a regular file of at most `left` bytes; a pipe or device is neither waited for nor read.
fn read_file(path: &Path, left: usize) -> Result<String, String> {
    let unreadable = |error| format!("it cannot be read: {error}");
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(unreadable)?;
    if !file.metadata().map_err(unreadable)?.is_file() {
        return Err("it is no regular file".to_owned());
    }
    let max = MAX_SOURCE_BYTES.min(left);
    let mut bytes = Vec::new();
    file.take(max as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > max {
        return Err(format!(
            "it has more than {max} bytes; a file may have {MAX_SOURCE_BYTES}, all of a set {MAX_SET_BYTES}"
        ));
    }
    String::from_utf8(bytes).map_err(|error| format!("it is not UTF-8 after byte {}", error.utf8_error().valid_up_to()))
}

fn problem(path: &Path, message: String) -> Problem {
    Problem { file: path.display().to_string(), line: 0, field: String::new(), message }
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
