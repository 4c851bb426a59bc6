//! What a process runs: a path that is proven, and the SHA-256 of the file.
//!
//! The path that `/proc/PID/exe` gives is seen from the root of the process's own mounts, where any user may put any
//! file at any path (user_namespaces(7)). It is a fact only if the same path, on our own mounts, is the same file. It
//! says which program runs, not who runs it or with which libraries: a policy should name a user or a unit beside it.

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
/// A file changed less than this long ago could change again without its times showing it, so its hash is not
/// remembered.
const SETTLED_AFTER: Duration = Duration::from_secs(2);
/// `FUSE_SUPER_MAGIC` of `linux/magic.h`.
const FUSE: i64 = 0x6573_5546;
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

    /// The SHA-256 of the executable `file` of a process of user `uid`, in hexadecimal; `None` if it may not be read,
    /// is larger than 512 MiB, is served by a user's own file system, or is not what the process runs any more.
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
    let (done, _slot) = tokio::task::spawn_blocking(move || (work(), slot)).await?;
    done
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

/// Whether whoever runs the file system may give one reader other contents than the next, at the same times and size.
fn is_served_by_a_user(file_system: i64) -> bool {
    file_system == FUSE
}

/// SHA-256 of what a process runs, if that is `file` before and after it is read.
fn hash(handle: &ProcHandle, file: FileId) -> io::Result<Option<String>> {
    let mut opened = match handle.open_executable() {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
        Err(error) => return Err(error),
    };
    if FileId::of(&opened)? != file || is_served_by_a_user(rustix::fs::fstatfs(&opened)?.f_type as i64) {
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

#[cfg(test)]
impl Executables {
    /// All slots, so that nothing is examined while they are held.
    pub(super) async fn all_slots(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.slots).acquire_many_owned(EXAMINED_AT_A_TIME_MAX as u32).await.unwrap()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    /// This process, and what it runs.
    fn ourselves() -> (ProcHandle, FileId) {
        let handle = ProcHandle::open(std::process::id()).unwrap();
        let file = handle.executable().unwrap();
        (handle, file)
    }

    fn executables(age: Duration, file: FileId) -> Executables {
        let changed = UNIX_EPOCH + Duration::from_secs(file.changed.0 as u64);
        Executables::new(Clock::paused(changed + age))
    }

    #[tokio::test(start_paused = true)]
    async fn a_hash_is_remembered_once_the_file_has_settled() {
        let (handle, file) = ourselves();
        for (age, remembered) in [(SETTLED_AFTER, false), (SETTLED_AFTER + Duration::from_millis(1), true)] {
            let executables = executables(age, file);
            let hash = executables.hashes.find(&handle, file).unwrap();
            assert!(hash.is_some());
            assert_eq!(executables.hashes.of(file), hash.filter(|_| remembered));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn hashes_are_forgotten_when_there_is_no_room_for_one_more() {
        let (handle, file) = ourselves();
        for (others, left) in [(REMEMBERED_MAX - 1, REMEMBERED_MAX), (REMEMBERED_MAX, 1)] {
            let executables = executables(SETTLED_AFTER * 2, file);
            let others = (0..others as u64).map(|size| (FileId { inode: 0, size, ..file }, String::new()));
            lock(&executables.hashes.known).extend(others);
            executables.hashes.find(&handle, file).unwrap();
            assert_eq!(lock(&executables.hashes.known).len(), left);
        }
    }

    #[tokio::test]
    async fn a_file_is_hashed_up_to_512_mebibytes() {
        let (handle, file) = ourselves();
        let executables = Executables::new(Clock::system());
        let _slots = executables.all_slots().await;
        let largest = FileId { size: HASHED_BYTES_MAX, ..file };
        assert!(executables.sha256(&handle, largest, 7).now_or_never().is_none(), "waits for a slot");
        let larger = FileId { size: HASHED_BYTES_MAX + 1, ..file };
        assert_eq!(executables.sha256(&handle, larger, 7).now_or_never().unwrap().unwrap(), None);
    }

    #[tokio::test]
    async fn a_file_that_is_not_what_the_process_runs_has_no_hash() {
        let (handle, file) = ourselves();
        let executables = Executables::new(Clock::system());
        let other = FileId { inode: file.inode + 1, ..file };
        assert_eq!(executables.sha256(&handle, other, 7).await.unwrap(), None);
    }

    #[test]
    fn a_file_system_that_a_user_serves_gives_no_hash() {
        assert!(is_served_by_a_user(FUSE));
        let here = rustix::fs::statfs("/proc").unwrap().f_type as i64;
        assert!(!is_served_by_a_user(here));
    }

    #[tokio::test]
    async fn callers_of_one_user_take_turns_and_delay_no_other_user() {
        let executables = Executables::new(Clock::system());
        let first = executables.slot(7).await.unwrap();
        assert!(executables.slot(7).now_or_never().is_none());
        let second = executables.slot(8).now_or_never().unwrap().unwrap();
        assert!(executables.slot(9).now_or_never().is_none(), "one past the bound for all");
        drop(first);
        assert!(executables.slot(9).now_or_never().is_some());
        drop(second);
        drop(executables.slot(10).await.unwrap());
        assert_eq!(lock(&executables.turns).len(), 1, "turns of users who are gone are forgotten");
    }
}
