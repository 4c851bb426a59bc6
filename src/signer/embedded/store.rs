//! The state folder: one file per CA, key and certificate together, so that nothing on disk can be half of a pair.
//!
//! `next-N.pem` is a CA that is announced, `ca-N.pem` one that may sign; a CA goes from one to the other by rename. Files
//! appear whole or not at all (written aside, synced, renamed, folder synced), so a crash at any point leaves a state
//! that was meant. The folder is locked: two agents never make two CAs.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use zeroize::Zeroizing;

use super::EmbeddedError;

/// Bytes of a file with keys or certificates.
pub const MAX_FILE_BYTES: u64 = 1024 * 1024;

const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
/// Bits that let another user read or change a key.
const OTHERS: u32 = 0o077;
/// Bits that let another user put a file into a folder.
const OTHERS_WRITE: u32 = 0o022;
const ASIDE: &str = ".csrd-";

/// An open, locked state folder.
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
    /// Holds the lock and syncs renames.
    handle: File,
}

/// Files found, in order of number.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) activated: Vec<(u64, PathBuf)>,
    pub(super) next: Option<(u64, PathBuf)>,
}

impl Store {
    /// Opens the folder at `dir`, making it if it is not there, and removes what a crash left aside.
    pub(super) fn open(dir: &Path) -> Result<Self, EmbeddedError> {
        let failed = |action| move |source| EmbeddedError::Io { action, path: dir.to_owned(), source };
        DirBuilder::new().recursive(true).mode(DIR_MODE).create(dir).map_err(failed("create"))?;
        let handle = File::open(dir).map_err(failed("open"))?;
        let mode = handle.metadata().map_err(failed("read"))?.mode();
        if mode & OTHERS_WRITE != 0 {
            return Err(EmbeddedError::FolderMode { path: dir.to_owned(), mode: mode & 0o7777 });
        }
        match flock(&handle, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(EmbeddedError::InUse { path: dir.to_owned() }),
            Err(error) => return Err(failed("lock")(error.into())),
        }
        Ok(Self { dir: dir.to_owned(), handle })
    }

    /// The CAs in the folder; other files are left alone.
    pub(super) fn find(&self) -> Result<Found, EmbeddedError> {
        let failed = |source| EmbeddedError::Io { action: "read", path: self.dir.clone(), source };
        let mut found = Found::default();
        let mut announced = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.starts_with(ASIDE) {
                fs::remove_file(entry.path()).map_err(failed)?;
            } else if let Some(number) = number(name, "ca-") {
                found.activated.push((number, entry.path()));
            } else if let Some(number) = number(name, "next-") {
                announced.push((number, entry.path()));
            }
        }
        found.activated.sort();
        found.next = announced.into_iter().max();
        Ok(found)
    }

    /// Saves a CA that is announced.
    pub(super) fn announce(&self, number: u64, pem: &str) -> Result<(), EmbeddedError> {
        let path = self.path("next-", number);
        let failed = |source| EmbeddedError::Io { action: "write", path: path.clone(), source };
        let aside = self.dir.join(format!("{ASIDE}{number}"));
        let write = || {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(&aside)?;
            file.write_all(pem.as_bytes())?;
            file.sync_all()?;
            fs::rename(&aside, &path)?;
            self.handle.sync_all()
        };
        write().map_err(|error| {
            // Else the next attempt would find its name taken.
            let _ = fs::remove_file(&aside);
            failed(error)
        })
    }

    /// Lets an announced CA sign.
    pub(super) fn activate(&self, number: u64) -> Result<(), EmbeddedError> {
        let (from, to) = (self.path("next-", number), self.path("ca-", number));
        let renamed = fs::rename(&from, &to).and_then(|()| self.handle.sync_all());
        renamed.map_err(|source| EmbeddedError::Io { action: "rename", path: from, source })
    }

    /// Removes a CA that has ended.
    pub(super) fn retire(&self, number: u64) -> Result<(), EmbeddedError> {
        let path = self.path("ca-", number);
        let removed = fs::remove_file(&path).and_then(|()| self.handle.sync_all());
        removed.map_err(|source| EmbeddedError::Io { action: "remove", path, source })
    }

    fn path(&self, prefix: &str, number: u64) -> PathBuf {
        self.dir.join(format!("{prefix}{number}.pem"))
    }
}

/// Reads a file with a private key, which nobody but its owner may read.
pub(super) fn read_secret(path: &Path) -> Result<Zeroizing<Vec<u8>>, EmbeddedError> {
    let file = open(path)?;
    let mode = file.metadata().map_err(|source| unreadable(path, source))?.mode();
    if mode & OTHERS != 0 {
        return Err(EmbeddedError::KeyMode { path: path.to_owned(), mode: mode & 0o7777 });
    }
    read_open(path, file).map(Zeroizing::new)
}

/// Reads a file without secrets.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, EmbeddedError> {
    read_open(path, open(path)?)
}

/// Never waits for a writer: a FIFO opens at once, and is refused as no regular file.
fn open(path: &Path) -> Result<File, EmbeddedError> {
    const NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(NONBLOCK).open(path);
    let file = file.map_err(|source| unreadable(path, source))?;
    let metadata = file.metadata().map_err(|source| unreadable(path, source))?;
    if !metadata.is_file() {
        return Err(EmbeddedError::NoFile { path: path.to_owned() });
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(EmbeddedError::TooLong { path: path.to_owned(), bytes: metadata.len() });
    }
    Ok(file)
}

/// The buffer has its final size from the start, so that growing it leaves no part of a key in freed memory.
fn read_open(path: &Path, file: File) -> Result<Vec<u8>, EmbeddedError> {
    let length = file.metadata().map_err(|source| unreadable(path, source))?.len();
    let mut bytes = Vec::with_capacity(usize::try_from(length).expect("it is within the bound") + 1);
    file.take(length).read_to_end(&mut bytes).map_err(|source| unreadable(path, source))?;
    Ok(bytes)
}

fn unreadable(path: &Path, source: io::Error) -> EmbeddedError {
    EmbeddedError::Io { action: "read", path: path.to_owned(), source }
}

/// N of `prefix` N `.pem`, as [`Store`] writes it.
fn number(name: &str, prefix: &str) -> Option<u64> {
    let digits = name.strip_prefix(prefix)?.strip_suffix(".pem")?;
    let number = digits.parse().ok()?;
    (format!("{number}") == digits).then_some(number)
}
