//! What a process runs: a path that is proven, and the SHA-256 of the file.
//!
//! The path that `/proc/PID/exe` gives is seen from the root of the process's own mounts, where any user may put any file
//! at any path (user_namespaces(7)). It is a fact only if the same path, on our own mounts, is the same file. It says which
//! program runs, not who runs it or with which libraries: a policy should name a user or a unit beside it.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, UNIX_EPOCH},
};

use aws_lc_rs::digest;
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use tokio::sync::Semaphore;

use super::proc::{FileId, ProcHandle};
use crate::clock::Clock;

/// Largest executable that is hashed, in bytes; a larger one has no SHA-256.
const HASHED_BYTES_MAX: u64 = 512 << 20;
/// Files hashed or looked up at a time, off the event loop.
const EXAMINED_AT_A_TIME_MAX: usize = 2;
/// How long one caller waits for its file to be hashed or looked up.
const EXAMINE_TIMEOUT: Duration = Duration::from_secs(5);
/// Hashes remembered; when there are more, all are forgotten.
const REMEMBERED_MAX: usize = 1024;
/// A file changed less than this long ago could change again without its times showing it, so its hash is not remembered.
const SETTLED_AFTER: Duration = Duration::from_secs(2);
/// What the kernel appends to the path of a file that has no name any more.
const DELETED: &[u8] = b" (deleted)";

/// Looks at executables, a bounded number at a time, and remembers their hashes.
#[derive(Debug)]
pub(super) struct Executables {
    clock: Clock,
    slots: Arc<Semaphore>,
    hashes: Mutex<HashMap<FileId, String>>,
}

impl Executables {
    pub(super) fn new(clock: Clock) -> Self {
        let slots = Arc::new(Semaphore::new(EXAMINED_AT_A_TIME_MAX));
        Self { clock, slots, hashes: Mutex::default() }
    }

    /// The path of the executable `file` of a process, if it is proven.
    ///
    /// # Errors
    /// The file system did not answer in time.
    pub(super) async fn path(&self, handle: &ProcHandle, file: FileId) -> io::Result<Option<String>> {
        let path = handle.executable_path()?;
        if path.ends_with(DELETED) {
            return Ok(None);
        }
        let Ok(path) = String::from_utf8(path) else { return Ok(None) };
        // Every folder of a running executable's path is in memory, so this neither waits nor fails on a local disk.
        let known = match names_file(&path, file, ResolveFlags::CACHED) {
            Err(Errno::AGAIN | Errno::INVAL | Errno::NOSYS) => {
                let path = path.clone();
                self.examine(move || Ok(names_file(&path, file, ResolveFlags::empty())?)).await?
            }
            known => known?,
        };
        Ok(known.then_some(path))
    }

    /// The SHA-256 of the executable `file` of a process, in hexadecimal; `None` if it cannot be read, is too large, or
    /// is not this file any more.
    ///
    /// # Errors
    /// It could not be hashed in time.
    pub(super) async fn sha256(&self, handle: &ProcHandle, file: FileId) -> io::Result<Option<String>> {
        if let Some(known) = self.hashes().get(&file) {
            return Ok(Some(known.clone()));
        }
        if file.size > HASHED_BYTES_MAX {
            return Ok(None);
        }
        let opened = match handle.open_executable() {
            Ok(opened) => opened,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
            Err(error) => return Err(error),
        };
        let found = self.examine(move || hash_if(opened, file)).await?;
        if let Some(hash) = &found
            && self.is_settled(file)
        {
            let mut hashes = self.hashes();
            if hashes.len() >= REMEMBERED_MAX {
                hashes.clear();
            }
            hashes.insert(file, hash.clone());
        }
        Ok(found)
    }

    async fn examine<T: Send + 'static>(&self, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
        let examined = async {
            let slot = Arc::clone(&self.slots).acquire_owned().await.map_err(io::Error::other)?;
            // The slot goes with the work, which cannot be stopped: work that hangs keeps its slot, not ours.
            tokio::task::spawn_blocking(move || {
                let _slot = slot;
                work()
            })
            .await?
        };
        tokio::time::timeout(EXAMINE_TIMEOUT, examined).await?
    }

    fn is_settled(&self, file: FileId) -> bool {
        let changed = UNIX_EPOCH + Duration::from_secs(file.changed.0.try_into().unwrap_or_default());
        self.clock.now().duration_since(changed).is_ok_and(|age| age > SETTLED_AFTER)
    }

    fn hashes(&self) -> std::sync::MutexGuard<'_, HashMap<FileId, String>> {
        self.hashes.lock().unwrap_or_else(PoisonError::into_inner)
    }
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

/// SHA-256 of `opened` if it is `file` before and after it is read.
fn hash_if(mut opened: File, file: FileId) -> io::Result<Option<String>> {
    if FileId::of(&opened)? != file {
        return Ok(None);
    }
    let mut context = digest::Context::new(&digest::SHA256);
    let mut chunk = vec![0; 128 << 10];
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
