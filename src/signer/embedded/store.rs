//! Where CAs are kept: one text per CA, key and certificate together, so that nothing that is kept can be half of a pair.
//!
//! `next-N.pem` is a CA that is announced, `ca-N.pem` one that may sign; a CA goes from one to the other by rename. In a
//! folder, files appear whole or not at all (written aside, synced, renamed, folder synced), so a crash at any point
//! leaves a state that was meant, and the folder is locked: two agents never make two CAs. For the other place, a Secret,
//! see `secret`.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use zeroize::Zeroizing;

use super::{EmbeddedError, secret::Secret};

/// Bytes of a file with keys or certificates.
pub const MAX_FILE_BYTES: u64 = 1024 * 1024;

const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
/// Bits that let another user read or change a key.
const OTHERS: u32 = 0o077;
/// Bits that let another user put a file into a folder.
const OTHERS_WRITE: u32 = 0o022;
const ASIDE: &str = ".csrd-";
const NEXT: &str = "next-";
const ACTIVATED: &str = "ca-";

/// A place for CAs.
#[derive(Debug)]
pub(super) enum Store {
    Folder(Folder),
    Secret(Box<Secret>),
}

/// An open, locked state folder.
#[derive(Debug)]
pub(super) struct Folder {
    dir: PathBuf,
    /// Holds the lock and syncs renames.
    handle: File,
}

/// A CA that is kept.
pub(super) struct Kept {
    pub(super) number: u64,
    /// Where, for errors.
    pub(super) path: PathBuf,
    pub(super) pem: Zeroizing<Vec<u8>>,
}

/// CAs that are kept, in order of number.
#[derive(Default)]
pub(super) struct Found {
    pub(super) activated: Vec<Kept>,
    pub(super) next: Option<Kept>,
}

impl Store {
    /// The CAs, if somebody else may have changed them since they were last read or written.
    pub(super) fn changed(&mut self) -> Result<Option<Found>, EmbeddedError> {
        match self {
            Self::Folder(_) => Ok(None),
            Self::Secret(secret) => secret.changed(),
        }
    }

    /// Saves a CA that is announced.
    pub(super) fn announce(&mut self, number: u64, pem: &str) -> Result<(), EmbeddedError> {
        match self {
            Self::Folder(folder) => folder.announce(number, pem),
            Self::Secret(secret) => secret.write([(next(number), Some(pem))]),
        }
    }

    /// Lets an announced CA sign.
    pub(super) fn activate(&mut self, number: u64, pem: &str) -> Result<(), EmbeddedError> {
        match self {
            Self::Folder(folder) => folder.activate(number),
            Self::Secret(secret) => secret.write([(next(number), None), (activated(number), Some(pem))]),
        }
    }

    /// Removes a CA that has ended.
    pub(super) fn retire(&mut self, number: u64) -> Result<(), EmbeddedError> {
        match self {
            Self::Folder(folder) => folder.retire(number),
            Self::Secret(secret) => secret.write([(activated(number), None)]),
        }
    }
}

impl Found {
    /// Sorts out what is kept under names; other names are passed over.
    pub(super) fn new(kept: impl IntoIterator<Item = (String, PathBuf, Zeroizing<Vec<u8>>)>) -> Self {
        let (mut found, mut announced) = (Self::default(), Vec::new());
        for (name, path, pem) in kept {
            if let Some(number) = number(&name, ACTIVATED) {
                found.activated.push(Kept { number, path, pem });
            } else if let Some(number) = number(&name, NEXT) {
                announced.push(Kept { number, path, pem });
            }
        }
        found.activated.sort_by_key(|kept| kept.number);
        let newest = found.activated.last().map_or(0, |kept| kept.number);
        found.next = announced.into_iter().max_by_key(|kept| kept.number).filter(|kept| kept.number > newest);
        found
    }
}

impl Folder {
    /// Opens the folder at `dir`, making it if it is not there, and removes what a crash left aside.
    pub(super) fn open(dir: &Path) -> Result<Self, EmbeddedError> {
        let failed = |action| move |source| EmbeddedError::Io { action, path: dir.to_owned(), source };
        DirBuilder::new().recursive(true).mode(DIR_MODE).create(dir).map_err(failed("create"))?;
        let handle = File::open(dir).map_err(failed("open"))?;
        let metadata = handle.metadata().map_err(failed("read"))?;
        let mode = metadata.mode();
        if mode & OTHERS_WRITE != 0 {
            return Err(EmbeddedError::FolderMode { path: dir.to_owned(), mode: mode & 0o7777 });
        }
        check_owner(dir, &metadata)?;
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
        let mut kept = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if name.starts_with(ASIDE) {
                fs::remove_file(entry.path()).map_err(failed)?;
            } else if number(&name, ACTIVATED).or(number(&name, NEXT)).is_some() {
                let path = entry.path();
                let pem = read_secret(&path)?;
                kept.push((name, path, pem));
            }
        }
        Ok(Found::new(kept))
    }

    /// Saves a CA that is announced.
    pub(super) fn announce(&self, number: u64, pem: &str) -> Result<(), EmbeddedError> {
        let path = self.dir.join(next(number));
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

    /// Lets an announced CA sign. When only the sync failed last time, there is nothing left to rename.
    pub(super) fn activate(&self, number: u64) -> Result<(), EmbeddedError> {
        let (from, to) = (self.dir.join(next(number)), self.dir.join(activated(number)));
        let renamed = match fs::rename(&from, &to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && to.exists() => Ok(()),
            renamed => renamed,
        };
        renamed.and_then(|()| self.handle.sync_all()).map_err(|source| EmbeddedError::Io {
            action: "rename",
            path: from,
            source,
        })
    }

    /// Removes a CA that has ended.
    pub(super) fn retire(&self, number: u64) -> Result<(), EmbeddedError> {
        let path = self.dir.join(activated(number));
        let removed = match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        };
        removed.and_then(|()| self.handle.sync_all()).map_err(|source| EmbeddedError::Io {
            action: "remove",
            path,
            source,
        })
    }
}

fn next(number: u64) -> String {
    format!("{NEXT}{number}.pem")
}

fn activated(number: u64) -> String {
    format!("{ACTIVATED}{number}.pem")
}

/// Reads a file with a private key, which nobody but its owner may read.
pub(super) fn read_secret(path: &Path) -> Result<Zeroizing<Vec<u8>>, EmbeddedError> {
    let file = open(path)?;
    let metadata = file.metadata().map_err(|source| unreadable(path, source))?;
    let mode = metadata.mode();
    if mode & OTHERS != 0 {
        return Err(EmbeddedError::KeyMode { path: path.to_owned(), mode: mode & 0o7777 });
    }
    check_owner(path, &metadata)?;
    read_open(path, file).map(Zeroizing::new)
}

/// What holds or leads to a key is ours or root's: its owner can read it and change it, whatever its mode says.
fn check_owner(path: &Path, metadata: &std::fs::Metadata) -> Result<(), EmbeddedError> {
    let (owner, ours) = (metadata.uid(), rustix::process::geteuid().as_raw());
    if owner == ours || owner == 0 {
        return Ok(());
    }
    Err(EmbeddedError::Owner { path: path.to_owned(), owner, ours })
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

/// N of `prefix` N `.pem`, as it is written here.
fn number(name: &str, prefix: &str) -> Option<u64> {
    let digits = name.strip_prefix(prefix)?.strip_suffix(".pem")?;
    let number = digits.parse().ok()?;
    (format!("{number}") == digits).then_some(number)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn nobody_else_can_read_what_is_stored() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("a/b");
        let store = Folder::open(&dir).unwrap();
        store.announce(1, "secret").unwrap();
        assert_eq!((mode(&dir), mode(&dir.join("next-1.pem"))), (DIR_MODE, FILE_MODE));
        store.activate(1).unwrap();
        store.activate(1).unwrap();
        assert_eq!((names(&dir), mode(&dir.join("ca-1.pem"))), (vec!["ca-1.pem".to_owned()], FILE_MODE));
        store.retire(1).unwrap();
        store.retire(1).unwrap();
        assert!(names(&dir).is_empty());
        assert!(matches!(store.activate(1), Err(EmbeddedError::Io { action: "rename", .. })));
    }

    #[test]
    fn what_a_crash_left_aside_is_removed_and_foreign_files_are_not() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            ".csrd-3",
            "next-10.pem",
            "ca-2.pem",
            "ca-10.pem",
            "next-11.pem",
            "ca-01.pem",
            "ca-x.pem",
            "ca-1.pem.bak",
            "notes",
        ] {
            OpenOptions::new().write(true).create(true).mode(FILE_MODE).open(dir.path().join(name)).unwrap();
        }
        let store = Folder::open(dir.path()).unwrap();
        let found = store.find().unwrap();
        assert_eq!(found.activated.iter().map(|kept| kept.number).collect::<Vec<_>>(), [2, 10]);
        let next = found.next.unwrap();
        assert_eq!((next.number, next.path), (11, dir.path().join("next-11.pem")));
        // What has been activated is not announced any more.
        fs::remove_file(dir.path().join("next-11.pem")).unwrap();
        assert!(store.find().unwrap().next.is_none());
        assert_eq!(names(dir.path()).len(), 7);
    }

    #[test]
    fn a_failed_write_leaves_nothing_and_can_be_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = Folder::open(dir.path()).unwrap();
        let blocker = dir.path().join("next-1.pem");
        fs::create_dir(&blocker).unwrap();
        let error = store.announce(1, "secret").unwrap_err();
        assert!(error.to_string().starts_with(&format!("cannot write {}", blocker.display())), "{error}");
        fs::remove_dir(&blocker).unwrap();
        assert!(names(dir.path()).is_empty());
        store.announce(1, "secret").unwrap();
    }

    #[test]
    fn a_folder_is_opened_by_one_process_and_written_by_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let first = Folder::open(dir.path()).unwrap();
        assert!(matches!(Folder::open(dir.path()), Err(EmbeddedError::InUse { .. })));
        drop(first);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o770)).unwrap();
        assert!(matches!(Folder::open(dir.path()), Err(EmbeddedError::FolderMode { mode: 0o770, .. })));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Folder::open(dir.path()).unwrap();
    }

    #[test]
    fn a_path_that_cannot_be_a_folder_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [file.path().to_owned(), file.path().join("below")] {
            let error = Folder::open(&path).unwrap_err();
            assert!(matches!(&error, EmbeddedError::Io { action: "create", .. }), "{error}");
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        }
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (mode, good) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o620, false)] {
            fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
            match read_secret(file.path()) {
                Ok(_) => assert!(good, "{mode:o}"),
                Err(EmbeddedError::KeyMode { mode: found, .. }) => assert_eq!((found, good), (mode, false)),
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn only_regular_files_within_the_bound_are_read() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(read(dir.path()), Err(EmbeddedError::NoFile { .. })));
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(matches!(read(&pipe), Err(EmbeddedError::NoFile { .. })));
        let path = dir.path().join("file");
        let file = File::create(&path).unwrap();
        file.set_len(MAX_FILE_BYTES).unwrap();
        assert_eq!(read(&path).unwrap().len() as u64, MAX_FILE_BYTES);
        file.set_len(MAX_FILE_BYTES + 1).unwrap();
        assert!(matches!(read(&path), Err(EmbeddedError::TooLong { bytes, .. }) if bytes == MAX_FILE_BYTES + 1));
        assert!(matches!(read(&dir.path().join("none")), Err(EmbeddedError::Io { action: "read", .. })));
    }
}
