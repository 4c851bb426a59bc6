//! What a process runs: a path that is proven, and the SHA-256 of the file.
//!
//! The path that `/proc/PID/exe` gives is seen from the root of the process's own mounts, where any user may put any file
//! at any path (user_namespaces(7)). It is a fact only if the same path, on our own mounts, is the same file. It says which
//! program runs, not who runs it or with which libraries: a policy should name a user or a unit beside it.

use std::{
    collections::HashMap,
    io::{self, Read},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, UNIX_EPOCH},
};

use aws_lc_rs::digest;
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::proc::{FileId, ProcHandle};
use crate::clock::Clock;

/// Largest executable that is hashed, in bytes; a larger one has no SHA-256.
const HASHED_BYTES_MAX: u64 = 512 << 20;
/// Files hashed or looked up at a time, off the event loop.
const EXAMINED_AT_A_TIME_MAX: usize = 2;
/// How long one caller waits for its file to be hashed or looked up.
const EXAMINE_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes read at a time.
const CHUNK_BYTES: usize = 128 << 10;
/// Hashes remembered; when there are more, all are forgotten.
const REMEMBERED_MAX: usize = 1024;
/// A file changed less than this long ago could change again without its times showing it, so its hash is not remembered.
const SETTLED_AFTER: Duration = Duration::from_secs(2);
/// What the kernel appends to the path of a file that has no name any more.
const DELETED: &[u8] = b" (deleted)";

/// Looks at executables, a bounded number at a time and one for each user, and remembers their hashes.
#[derive(Debug)]
pub(super) struct Executables {
    hashes: Arc<Hashes>,
    slots: Arc<Semaphore>,
    /// Whose turn it is among the callers of one user, so that one user's files delay another's by one file at most.
    turns: Mutex<HashMap<u32, Arc<Semaphore>>>,
}

/// SHA-256 by file, in hexadecimal.
#[derive(Debug)]
struct Hashes {
    clock: Clock,
    known: Mutex<HashMap<FileId, String>>,
}

/// The right to occupy a thread, held until the work on it is done.
struct Slot {
    _turn: OwnedSemaphorePermit,
    _slot: OwnedSemaphorePermit,
}

impl Executables {
    pub(super) fn new(clock: Clock) -> Self {
        let slots = Arc::new(Semaphore::new(EXAMINED_AT_A_TIME_MAX));
        Self { hashes: Arc::new(Hashes { clock, known: Mutex::default() }), slots, turns: Mutex::default() }
    }

    /// The path of the executable `file` of a process of user `uid`, if it is proven.
    ///
    /// # Errors
    /// The file system did not answer in time.
    pub(super) async fn path(&self, handle: &ProcHandle, file: FileId, uid: u32) -> io::Result<Option<String>> {
        let path = handle.executable_path()?;
        if path.ends_with(DELETED) {
            return Ok(None);
        }
        let Ok(path) = String::from_utf8(path) else { return Ok(None) };
        // Every folder of a running executable's path is in memory, so this neither waits nor fails on a local disk.
        let proven = match names_file(&path, file, ResolveFlags::CACHED) {
            Err(Errno::AGAIN | Errno::INVAL | Errno::NOSYS) => {
                let path = path.clone();
                let examined = async {
                    let slot = self.slot(uid).await?;
                    examine(slot, move || Ok(names_file(&path, file, ResolveFlags::empty())?)).await
                };
                timeout(EXAMINE_TIMEOUT, examined).await??
            }
            proven => proven?,
        };
        Ok(proven.then_some(path))
    }

    /// The SHA-256 of the executable `file` of a process of user `uid`, in hexadecimal; `None` if it may not be read, is
    /// larger than 512 MiB, or is not what the process runs any more.
    ///
    /// # Errors
    /// It could not be read, or not in time.
    pub(super) async fn sha256(&self, handle: &ProcHandle, file: FileId, uid: u32) -> io::Result<Option<String>> {
        if let Some(known) = self.hashes.of(file) {
            return Ok(Some(known));
        }
        if file.size > HASHED_BYTES_MAX {
            return Ok(None);
        }
        let (handle, hashes) = (handle.try_clone()?, Arc::clone(&self.hashes));
        let examined = async {
            let slot = self.slot(uid).await?;
            examine(slot, move || hashes.find(&handle, file)).await
        };
        timeout(EXAMINE_TIMEOUT, examined).await?
    }

    async fn slot(&self, uid: u32) -> io::Result<Slot> {
        let turn = {
            let mut turns = lock(&self.turns);
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(uid).or_insert_with(|| Arc::new(Semaphore::new(1))))
        };
        let turn = turn.acquire_owned().await.map_err(io::Error::other)?;
        let slot = Arc::clone(&self.slots).acquire_owned().await.map_err(io::Error::other)?;
        Ok(Slot { _turn: turn, _slot: slot })
    }
}

impl Hashes {
    fn of(&self, file: FileId) -> Option<String> {
        lock(&self.known).get(&file).cloned()
    }

    fn find(&self, handle: &ProcHandle, file: FileId) -> io::Result<Option<String>> {
        // Another process of this user may have run the same file.
        if let Some(known) = self.of(file) {
            return Ok(Some(known));
        }
        let found = hash(handle, file)?;
        if let Some(hash) = &found
            && self.is_settled(file)
        {
            let mut known = lock(&self.known);
            if known.len() >= REMEMBERED_MAX {
                known.clear();
            }
            known.insert(file, hash.clone());
        }
        Ok(found)
    }

    fn is_settled(&self, file: FileId) -> bool {
        let changed = UNIX_EPOCH + Duration::from_secs(file.changed.0.try_into().unwrap_or_default());
        self.clock.now().duration_since(changed).is_ok_and(|age| age > SETTLED_AFTER)
    }
}

/// Does `work` where it may block. It cannot be stopped, so the slot goes with it: work that hangs keeps its own slot.
async fn examine<T: Send + 'static>(
    slot: Slot,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let work = move || {
        let _slot = slot;
        work()
    };
    tokio::task::spawn_blocking(work).await?
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether `path` is this file on our own mounts. The kernel's path has no symbolic links, so none is followed.
fn names_file(path: &str, file: FileId, resolve: ResolveFlags) -> Result<bool, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve | ResolveFlags::NO_SYMLINKS) {
        Ok(opened) => Ok(FileId::of(opened).is_ok_and(|found| found == file)),
        Err(error @ (Errno::AGAIN | Errno::INVAL | Errno::NOSYS | Errno::MFILE | Errno::NFILE | Errno::NOMEM)) => {
            Err(error)
        }
        Err(_) => Ok(false),
    }
}

/// SHA-256 of what a process runs, if that is `file` before and after it is read.
fn hash(handle: &ProcHandle, file: FileId) -> io::Result<Option<String>> {
    let mut opened = match handle.open_executable() {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
        Err(error) => return Err(error),
    };
    if FileId::of(&opened)? != file {
        return Ok(None);
    }
    let mut context = digest::Context::new(&digest::SHA256);
    let mut chunk = vec![0; CHUNK_BYTES];
    // Bounded by the size that was checked, even if the file grows.
    let mut left = file.size;
    while left > 0 {
        let length = opened.by_ref().take(left).read(&mut chunk)?;
        if length == 0 {
            return Ok(None);
        }
        context.update(&chunk[..length]);
        left -= length as u64;
    }
    if FileId::of(&opened)? != file {
        return Ok(None);
    }
    Ok(Some(context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()))
}
