//! Certificates on disk.
//!
//! A [`Target::Folder`] is laid out as the kubelet lays out a secret volume: `DIR/tls.key` is a link to `..data/tls.key`, and
//! `..data` is a link to a folder that holds one whole set and never changes. A new set is written and synced beside it,
//! then one rename(2) moves `..data`: whoever reads through `..data` sees one set, at any moment, also after a crash.
//! Unlike the kubelet we keep the set before the current one until the next write, for readers that have followed the
//! link already (a removed set would fail their next open(2)); its certificate is mostly still valid anyway.
//! The other targets replace each file by a rename. In all of them a failure leaves the old files as they were.
//!
//! Everything is done relative to an open directory and never through a link, and nothing gets another owner or mode but
//! what was made here and held open since. A folder has no such beginning: between mkdir(2) and open(2) whoever may write
//! to DIR can put another in its place. Where others may, new things are therefore made in a folder within DIR in which
//! only this user can write, and moved out of it when they are done; what stood there before is entered only with the mark
//! that such things get. Root does not write where others may at all, unless told to: see `trail`. One process writes to one target; two would only undo each other's work. Deliberately not here:
//! erasing old keys from the medium, which no file system promises.

mod trail;

use std::{
    fmt,
    fs::File,
    io::{self, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    str::FromStr,
};

use rustix::{
    fs::{self, AtFlags, Dir, FileType, Gid, Mode, OFlags, Uid},
    process::geteuid,
};

use self::trail::Standing;
use crate::client::Certificate;

/// Mode of a file with a private key, unless told otherwise.
pub const DEFAULT_KEY_MODE: KeyMode = KeyMode(0o600);

const CERTIFICATE_FILE: &str = "tls.crt";
const KEY_FILE: &str = "tls.key";
const BUNDLE_FILE: &str = "ca.crt";
/// Every file of a set.
const FILES: [&str; 3] = [CERTIFICATE_FILE, KEY_FILE, BUNDLE_FILE];
/// Mode of a file without a private key.
const PUBLIC_MODE: u32 = 0o644;
/// Mode of the folder that holds a set: its files protect themselves.
const SET_MODE: u32 = 0o755;
/// The link that makes a set the current one.
const DATA_LINK: &str = "..data";
/// A link before its rename.
const NEW_LINK: &str = "..data_tmp";
/// What our own folders and unfinished files are called, so that leftovers are known as ours.
const OURS: &str = ".csrd_";
/// What is made in a folder of its own is called this until it is done.
const STAGED: &str = "staged";
/// In folders that are made where others may write: nobody else can have put it into a folder of this user.
const MADE_MARK: &str = ".csrd";

/// Where certificates are written and to whom the files belong.
#[derive(Clone, Debug)]
pub struct Sink {
    /// Which files.
    pub target: Target,
    /// Mode of the file with the private key.
    pub key_mode: KeyMode,
    /// Owner of every file; `None` leaves them to this process's user.
    pub owner: Option<Owner>,
    /// Whether root accepts a folder that others may change.
    pub shared_folder: bool,
}

/// Which files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A folder in which `tls.crt`, `tls.key` and `ca.crt` change together.
    Folder(PathBuf),
    /// The same three as plain files, each replaced by itself; for a folder that is written once.
    Files(PathBuf),
    /// One file with the key and then the chain, as haproxy and the kubelet read it.
    Combined(PathBuf),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Folder(path) | Self::Files(path) | Self::Combined(path)) = self;
        path.display().fmt(f)
    }
}

/// Why nothing was written. The old files are as they were.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The kernel refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which path.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },
    /// A name that is ours in the target is taken by a folder.
    #[error("{} is a folder, but a file must go there: move it away", .0.display())]
    Occupied(PathBuf),
    /// Plain files asked for where links are kept.
    #[error("{} is kept fresh by `csrd watch`: choose another folder", .0.display())]
    Watched(PathBuf),
    /// Root was told of a folder that it does not rule alone.
    #[error(
        "{} is not root's alone (owner {owner}, mode {mode:04o}), and whoever may write there could lead what root writes elsewhere: \
         run csrd as user {owner}, or name a folder that only root may write to, from which any user may read, \
         or accept it with --shared-folder",
        folder.display()
    )]
    Shared {
        /// The first folder on the way that others may change.
        folder: PathBuf,
        /// Its user.
        owner: u32,
        /// Its permissions.
        mode: u32,
    },
    /// A link, or a folder of this user, that others may have put where it is.
    #[error("{} is a link or a folder of this user that others may have put there: remove it, and name a folder instead", .0.display())]
    Planted(PathBuf),
    /// A combined file of a certificate whose key the caller holds.
    #[error("a combined file needs the private key, which the agent does not have")]
    NoKey,
}

impl SinkError {
    /// Whether another command line mends it.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Shared { .. } | Self::Planted(_))
    }
}

/// Permissions of a file with a private key: for owner and group only, and never executable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyMode(u32);

impl FromStr for KeyMode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match u32::from_str_radix(text, 8) {
            Ok(mode) if mode & 0o400 != 0 && mode & !0o660 == 0 => Ok(Self(mode)),
            _ => Err("must be octal, readable by the owner, and give nothing to others: 0600, 0640, 0440"),
        }
    }
}

impl fmt::Display for KeyMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

/// A user and a group by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    uid: u32,
    gid: u32,
}

impl FromStr for Owner {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // chown(2) takes the highest number as "leave it".
        let id = |text: &str| text.parse().ok().filter(|id| *id != u32::MAX);
        let ids = text.split_once(':').and_then(|(uid, gid)| Some(Self { uid: id(uid)?, gid: id(gid)? }));
        ids.ok_or("must be two numbers, UID:GID")
    }
}

/// A file to be written.
struct Content<'a> {
    name: &'a str,
    parts: [&'a [u8]; 2],
    mode: u32,
}

impl Sink {
    /// Whether the target is one that this sink writes to at all, before a certificate is asked for.
    ///
    /// # Errors
    /// The folder is kept by somebody else, or root would not be alone in it.
    pub fn check(&self) -> Result<(), SinkError> {
        let (folder, files) = match &self.target {
            Target::Folder(path) => (path.as_path(), false),
            Target::Files(path) => (path.as_path(), true),
            Target::Combined(path) => (parent(path), false),
        };
        match self.open(folder, false) {
            Ok(open) if files && open.link(DATA_LINK).is_some() => Err(SinkError::Watched(folder.to_owned())),
            Err(error) if error.is_usage() => Err(error),
            // A folder that is not there yet is made when there is something to put there.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Opens the folder at `path`; with `make`, makes what is missing.
    fn open(&self, path: &Path, make: bool) -> Result<Folder, SinkError> {
        match geteuid().is_root() {
            true => Folder::of(trail::walk(path, make, self.shared_folder)?, path),
            false if make => Folder::create(path),
            false => Folder::open(path),
        }
    }

    /// Writes `certificate`, durably, with the modes and owner of this sink.
    ///
    /// # Errors
    /// When a step fails; the files that were there before are still there, whole.
    pub fn write(&self, certificate: &Certificate) -> Result<(), SinkError> {
        match &self.target {
            Target::Folder(path) => {
                let folder = self.open(path, true)?;
                self.write_set(&folder, &self.set(certificate))
            }
            Target::Files(path) => {
                self.check()?;
                let folder = self.open(path, true)?;
                self.set(certificate).iter().try_for_each(|content| self.replace(&folder, content))
            }
            Target::Combined(path) => {
                let name = path
                    .file_name()
                    .and_then(|name| name.to_str())
                    .ok_or_else(|| Folder::error("write", path, io::Error::from(io::ErrorKind::InvalidFilename)))?;
                let key = certificate.private_key.as_ref().ok_or(SinkError::NoKey)?;
                let parts = [key.as_bytes(), certificate.certificate_chain.as_bytes()];
                let content = Content { name, parts, mode: self.key_mode.0 };
                self.replace(&self.open(parent(path), false)?, &content)
            }
        }
    }

    fn set<'a>(&self, certificate: &'a Certificate) -> Vec<Content<'a>> {
        let content = |name, text: &'a str, mode| Content { name, parts: [text.as_bytes(), b""], mode };
        let key = certificate.private_key.as_ref().map(|key| content(KEY_FILE, key.as_str(), self.key_mode.0));
        let chain = content(CERTIFICATE_FILE, &certificate.certificate_chain, PUBLIC_MODE);
        let bundle = content(BUNDLE_FILE, &certificate.trust_bundle, PUBLIC_MODE);
        key.into_iter().chain([chain, bundle]).collect()
    }

    fn write_set(&self, folder: &Folder, set: &[Content<'_>]) -> Result<(), SinkError> {
        FILES.into_iter().try_for_each(|name| folder.must_not_be_folder(name))?;
        // Whatever is not the current set makes room first: a disk that holds two sets is large enough.
        let current = folder.link(DATA_LINK);
        folder.for_each_leftover(&format!(".{OURS}"), |name| {
            if Some(name) != current.as_deref() {
                folder.remove_set(name);
            }
        });
        let version = format!(".{OURS}{:016x}", rand::random::<u64>());
        let staged = self.stage(folder, &version, set).and_then(|()| folder.relink(&version, DATA_LINK));
        if let Err(error) = staged {
            folder.remove_set(&version);
            return Err(error);
        }
        for name in FILES {
            let target = format!("{DATA_LINK}/{name}");
            let linked = folder.link(name).is_some_and(|link| link == target);
            match (set.iter().any(|content| content.name == name), linked) {
                (true, false) => folder.relink(&target, name)?,
                // The caller holds the key now; a key file that is not our link is the caller's.
                (false, true) => folder.remove(name)?,
                _ => {}
            }
        }
        folder.sync()
    }

    fn stage(&self, folder: &Folder, version: &str, set: &[Content<'_>]) -> Result<(), SinkError> {
        let workshop = folder.workshop(&format!(".{OURS}"))?;
        let (place, name) = workshop.as_ref().map_or((folder, version), |workshop| (&workshop.folder, STAGED));
        let made = fs::mkdirat(&place.fd, name, Mode::RWXU);
        made.map_err(|errno| place.refused("make", name, errno))?;
        // Nobody else may write in `place`: this is the folder that was just made.
        let inner = place.enter(name)?;
        if folder.shared {
            inner.mark()?;
        }
        set.iter().try_for_each(|content| self.create(&inner, content.name, content))?;
        self.hand_over(&inner.fd, SET_MODE).map_err(|errno| place.refused("set the owner and mode of", name, errno))?;
        inner.sync()?;
        match workshop.is_some() {
            true => folder.take_from(place, name, version),
            false => Ok(()),
        }
    }

    /// Puts a whole new file in the place of an old one.
    fn replace(&self, folder: &Folder, content: &Content<'_>) -> Result<(), SinkError> {
        folder.must_not_be_folder(content.name)?;
        let leftover = format!(".{}{OURS}", content.name);
        folder.for_each_leftover(&leftover, |name| {
            if folder.remove(name).is_err() {
                folder.remove_set(name);
            }
        });
        let workshop = folder.workshop(&leftover)?;
        let unfinished = format!("{leftover}{:016x}", rand::random::<u64>());
        let place = workshop.as_ref().map_or(folder, |workshop| &workshop.folder);
        let unfinished = if workshop.is_some() { STAGED } else { &unfinished };
        let replaced = self.create(place, unfinished, content);
        if let Err(error) = replaced.and_then(|()| folder.take_from(place, unfinished, content.name)) {
            // The first error says more than a second one would.
            let _ = place.remove(unfinished);
            return Err(error);
        }
        folder.sync()
    }

    fn create(&self, folder: &Folder, name: &str, content: &Content<'_>) -> Result<(), SinkError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = fs::openat(&folder.fd, name, flags, Mode::RUSR | Mode::WUSR)
            .map(File::from)
            .map_err(|errno| folder.refused("create", name, errno))?;
        self.hand_over(&file, content.mode)
            .map_err(|errno| folder.refused("set the owner and mode of", name, errno))?;
        let written = content.parts.iter().try_for_each(|part| file.write_all(part)).and_then(|()| file.sync_all());
        written.map_err(|error| Folder::error("write", &folder.path.join(name), error))
    }

    /// Owner first: chown(2) may clear mode bits. The mode is set by itself because the umask cuts what open(2) gives.
    fn hand_over(&self, file: &impl std::os::fd::AsFd, mode: u32) -> rustix::io::Result<()> {
        if let Some(Owner { uid, gid }) = self.owner {
            fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
        fs::fchmod(file, Mode::from_raw_mode(mode))
    }
}

/// The folder of a file.
fn parent(file: &Path) -> &Path {
    file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// An open directory; every name below is one component within it.
struct Folder {
    fd: OwnedFd,
    path: PathBuf,
    /// Whether others may replace what it holds.
    shared: bool,
}

/// A folder within a shared one in which only this user can write; removed in the end.
struct Workshop<'a> {
    shared: &'a Folder,
    name: String,
    folder: Folder,
}

impl Drop for Workshop<'_> {
    fn drop(&mut self) {
        self.folder.empty();
        let _ = fs::unlinkat(&self.shared.fd, &self.name, AtFlags::REMOVEDIR);
    }
}

impl Folder {
    fn create(path: &Path) -> Result<Self, SinkError> {
        std::fs::create_dir_all(path).map_err(|error| Self::error("make the folder", path, error))?;
        Self::open(path)
    }

    fn open(path: &Path) -> Result<Self, SinkError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd =
            fs::open(path, flags, Mode::empty()).map_err(|errno| Self::error("open the folder", path, errno.into()))?;
        Self::of(fd, path)
    }

    fn of(fd: OwnedFd, path: &Path) -> Result<Self, SinkError> {
        let stat = fs::fstat(&fd).map_err(|errno| Self::error("look at", path, errno.into()))?;
        Ok(Self { fd, path: path.to_owned(), shared: Standing::of(&stat) == Standing::Shared })
    }

    /// A folder within this one in which only this user can write; `None` where that is so here.
    fn workshop(&self, prefix: &str) -> Result<Option<Workshop<'_>>, SinkError> {
        if !self.shared {
            return Ok(None);
        }
        let name = format!("{prefix}{:016x}", rand::random::<u64>());
        fs::mkdirat(&self.fd, &name, Mode::RWXU).map_err(|errno| self.refused("make", &name, errno))?;
        let folder = self.enter(&name)?;
        // Whether it is the one that was made matters less than that nobody else can write in it, and that it was empty.
        let stat = fs::fstat(&folder.fd).map_err(|errno| self.refused("look at", &name, errno))?;
        let ours = stat.st_uid == geteuid().as_raw() && stat.st_mode & 0o077 == 0;
        if !ours || !folder.is_empty() {
            return Err(SinkError::Planted(folder.path));
        }
        folder.mark()?;
        Ok(Some(Workshop { shared: self, name, folder }))
    }

    fn mark(&self) -> Result<(), SinkError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = fs::openat(&self.fd, MADE_MARK, flags, Mode::RUSR);
        made.map(drop).map_err(|errno| self.refused("create", MADE_MARK, errno))
    }

    fn is_empty(&self) -> bool {
        let names = Dir::read_from(&self.fd).into_iter().flatten();
        names.flatten().all(|entry| matches!(entry.file_name().to_bytes(), b"." | b".."))
    }

    /// Moves `name` of `place` here, under the name `to`.
    fn take_from(&self, place: &Self, name: &str, to: &str) -> Result<(), SinkError> {
        fs::renameat(&place.fd, name, &self.fd, to).map_err(|errno| self.refused("replace", to, errno))
    }

    fn enter(&self, name: &str) -> Result<Self, SinkError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = fs::openat(&self.fd, name, flags, Mode::empty()).map_err(|errno| self.refused("open", name, errno))?;
        Self::of(fd, &self.path.join(name))
    }

    /// Where the link `name` leads; `None` when it is no link.
    fn link(&self, name: &str) -> Option<String> {
        fs::readlinkat(&self.fd, name, Vec::new()).ok()?.into_string().ok()
    }

    /// Makes `name` a link to `target` in one step, whatever file or link it was.
    fn relink(&self, target: &str, name: &str) -> Result<(), SinkError> {
        self.remove(NEW_LINK)?;
        fs::symlinkat(target, &self.fd, NEW_LINK).map_err(|errno| self.refused("make the link", NEW_LINK, errno))?;
        fs::renameat(&self.fd, NEW_LINK, &self.fd, name).map_err(|errno| self.refused("replace the link", name, errno))
    }

    /// Removes a file or link, if there is one.
    fn remove(&self, name: &str) -> Result<(), SinkError> {
        match fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(errno) => Err(self.refused("remove", name, errno)),
        }
    }

    /// Removes a folder that holds a set, or one that a set was made in. What cannot be removed now is tried again at the
    /// next write. Where others may have moved it here, it must have been made here.
    fn remove_set(&self, name: &str) {
        let Ok(set) = self.enter(name) else { return };
        if self.shared && !set.is_marked() {
            return;
        }
        set.empty();
        let _ = fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR);
    }

    fn is_marked(&self) -> bool {
        let stat = fs::statat(&self.fd, MADE_MARK, AtFlags::SYMLINK_NOFOLLOW);
        stat.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
    }

    /// Removes what a set consists of, the mark last.
    fn empty(&self) {
        if let Ok(staged) = self.enter(STAGED) {
            FILES.into_iter().chain([MADE_MARK]).for_each(|file| drop(staged.remove(file)));
            let _ = fs::unlinkat(&self.fd, STAGED, AtFlags::REMOVEDIR);
        }
        FILES.into_iter().chain([STAGED, MADE_MARK]).for_each(|file| drop(self.remove(file)));
    }

    fn for_each_leftover(&self, prefix: &str, mut each: impl FnMut(&str)) {
        let Ok(entries) = Dir::read_from(&self.fd) else { return };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().to_str().ok().map(str::to_owned));
        names.filter(|name| name.starts_with(prefix)).for_each(|name| each(&name));
    }

    fn must_not_be_folder(&self, name: &str) -> Result<(), SinkError> {
        match fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                Err(SinkError::Occupied(self.path.join(name)))
            }
            _ => Ok(()),
        }
    }

    fn sync(&self) -> Result<(), SinkError> {
        fs::fsync(&self.fd).map_err(|errno| Self::error("sync", &self.path, errno.into()))
    }

    fn refused(&self, action: &'static str, name: &str, errno: rustix::io::Errno) -> SinkError {
        Self::error(action, &self.path.join(name), errno.into())
    }

    fn error(action: &'static str, path: &Path, source: io::Error) -> SinkError {
        SinkError::Io { action, path: path.to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    use tempfile::TempDir;

    use super::*;
    use crate::client::certificate::tagged;

    fn sink(target: Target) -> Sink {
        Sink { target, key_mode: DEFAULT_KEY_MODE, owner: None, shared_folder: false }
    }

    /// A folder in memory where there is one: thousands of synced writes.
    fn fast_folder() -> TempDir {
        tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder")
    }

    fn read(path: impl AsRef<Path>) -> String {
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.as_ref().display()))
    }

    fn mode(path: impl AsRef<Path>) -> u32 {
        fs::metadata(path).expect("present").permissions().mode() & 0o7777
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).expect("readable");
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn holds_set(folder: &Path, tag: &str) {
        for (file, kind) in [("tls.crt", "chain"), ("tls.key", "key"), ("ca.crt", "roots")] {
            assert_eq!(read(folder.join(file)), format!("{kind} {tag}\n"));
            assert_eq!(read(folder.join("..data").join(file)), format!("{kind} {tag}\n"));
        }
    }

    #[test]
    fn a_folder_holds_one_set_behind_links_and_keeps_only_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a/b");
        let sink = sink(Target::Folder(folder.clone()));
        for tag in ["1", "2", "3"] {
            sink.write(&tagged(tag)).unwrap();
            holds_set(&folder, tag);
        }
        let all = names(&folder);
        let (sets, rest): (Vec<_>, Vec<_>) = all.iter().partition(|name| name.starts_with("..csrd_"));
        assert_eq!(rest, ["..data", "ca.crt", "tls.crt", "tls.key"]);
        let mut keys: Vec<_> = sets.iter().map(|set| read(folder.join(set).join("tls.key"))).collect();
        keys.sort();
        assert_eq!(keys, ["key 2\n", "key 3\n"]);
        assert_eq!(mode(folder.join("..data/tls.key")), 0o600);
        assert_eq!(mode(folder.join("..data/tls.crt")), 0o644);
        assert_eq!(mode(folder.join("..data/ca.crt")), 0o644);
        assert_eq!(mode(folder.join("..data")), 0o755);
    }

    #[test]
    fn a_reader_never_sees_a_key_of_one_set_and_a_certificate_of_another() {
        const SWAPS: u32 = 3000;
        let dir = fast_folder();
        let sink = sink(Target::Folder(dir.path().to_owned()));
        sink.write(&tagged("0")).unwrap();
        let done = AtomicBool::new(false);
        let (sets, swaps_seen) = thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let (mut sets, mut swaps_seen, mut last) = (0, 0, String::new());
                while !done.load(Ordering::Relaxed) {
                    // Replaced twice while it was opened or read: begin again. Never a mixture.
                    let Ok(set) = Folder::open(&dir.path().join("..data")) else { continue };
                    let part = |name: &str| {
                        let file = rustix::fs::openat(&set.fd, name, OFlags::RDONLY, Mode::empty());
                        file.ok().map(|fd| io::read_to_string(File::from(fd)).unwrap())
                    };
                    let (Some(chain), Some(key), Some(roots)) = (part("tls.crt"), part("tls.key"), part("ca.crt"))
                    else {
                        continue;
                    };
                    let tag = chain.strip_prefix("chain ").expect("whole");
                    assert_eq!(key.strip_prefix("key "), Some(tag));
                    assert_eq!(roots.strip_prefix("roots "), Some(tag));
                    sets += 1;
                    swaps_seen += u32::from(last != tag);
                    tag.clone_into(&mut last);
                }
                (sets, swaps_seen)
            });
            for swap in 1..=SWAPS {
                sink.write(&tagged(&swap.to_string())).unwrap();
            }
            done.store(true, Ordering::Relaxed);
            reader.join().unwrap()
        });
        assert!(sets > 0 && swaps_seen > 1, "{sets} sets read, {swaps_seen} swaps seen: the reader saw nothing");
    }

    #[test]
    fn a_reader_of_the_combined_file_never_sees_a_part_of_it() {
        let dir = fast_folder();
        let file = dir.path().join("both.pem");
        let sink = sink(Target::Combined(file.clone()));
        sink.write(&tagged("0")).unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let content = read(&file);
                    let (key, chain) = content.split_once('\n').expect("two lines");
                    assert_eq!(key.strip_prefix("key "), chain.trim_end().strip_prefix("chain "), "{content:?}");
                }
            });
            for swap in 1..=3000 {
                sink.write(&tagged(&swap.to_string())).unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
        assert_eq!(names(dir.path()), ["both.pem"]);
        assert_eq!(mode(&file), 0o600);
    }

    #[test]
    fn leftovers_of_a_crash_do_not_hinder_and_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path();
        let sink = sink(Target::Folder(folder.to_owned()));
        sink.write(&tagged("old")).unwrap();
        // Killed while the files were written, before the link's rename, and before the old set was removed.
        for leftover in ["..csrd_1", "..csrd_2"] {
            fs::create_dir(folder.join(leftover)).unwrap();
            fs::write(folder.join(leftover).join("tls.key"), "half").unwrap();
        }
        symlink("..csrd_2", folder.join("..data_tmp")).unwrap();
        holds_set(folder, "old");
        // What is not ours stays.
        fs::create_dir(folder.join("..2024_01_01")).unwrap();
        fs::write(folder.join("notes"), "mine").unwrap();

        sink.write(&tagged("new")).unwrap();

        holds_set(folder, "new");
        let rest: Vec<_> = names(folder).into_iter().filter(|name| !name.starts_with("..csrd_")).collect();
        assert_eq!(rest, ["..2024_01_01", "..data", "ca.crt", "notes", "tls.crt", "tls.key"]);
        assert!(!folder.join("..csrd_1").exists() && !folder.join("..csrd_2").exists());

        let file = folder.join("both.pem");
        fs::write(folder.join(".both.pem.csrd_1"), "half").unwrap();
        fs::write(folder.join(".other.pem.csrd_1"), "of another sink").unwrap();
        super::Sink { target: Target::Combined(file.clone()), ..sink }.write(&tagged("new")).unwrap();
        assert_eq!(read(file), "key new\nchain new\n");
        assert!(!folder.join(".both.pem.csrd_1").exists() && folder.join(".other.pem.csrd_1").exists());
    }

    #[test]
    fn a_failure_keeps_the_old_set_and_names_the_step() {
        fn check(spoil: impl FnOnce(&Path), expected: &str) {
            let dir = tempfile::tempdir().unwrap();
            let sink = sink(Target::Folder(dir.path().to_owned()));
            sink.write(&tagged("old")).unwrap();
            spoil(dir.path());
            let before = names(dir.path());
            let error = sink.write(&tagged("new")).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
            assert_eq!(read(dir.path().join("..data/tls.crt")), "chain old\n");
            assert_eq!(read(dir.path().join("..data/tls.key")), "key old\n");
            assert_eq!(names(dir.path()), before, "the unfinished set is removed");
        }
        check(|folder| fs::create_dir(folder.join("..data_tmp")).unwrap(), "cannot remove");
        check(
            |folder| {
                fs::remove_file(folder.join("tls.key")).unwrap();
                fs::create_dir(folder.join("tls.key")).unwrap();
            },
            "tls.key is a folder, but a file must go there",
        );
    }

    #[test]
    fn a_target_that_cannot_be_is_refused_by_name() {
        fn check(target: impl FnOnce(&Path) -> Target, expected: &str) {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("file"), "").unwrap();
            let error = anyhow::Error::new(sink(target(dir.path())).write(&tagged("1")).expect_err(expected));
            assert!(format!("{error:#}").contains(expected), "{error:#}");
            assert_eq!(names(dir.path()), ["file"]);
        }
        check(|dir| Target::Folder(dir.join("file")), "file");
        check(|dir| Target::Folder(dir.join("file/below")), "Not a directory");
        check(|dir| Target::Combined(dir.join("absent/both.pem")), "absent: No such file or directory");
        check(|_| Target::Combined("/".into()), "cannot write /");
        let mut held = tagged("1");
        held.private_key = None;
        let dir = tempfile::tempdir().unwrap();
        let error = sink(Target::Combined(dir.path().join("x"))).write(&held).expect_err("no key");
        assert!(matches!(error, SinkError::NoKey));
    }

    #[test]
    fn plain_files_and_wrong_modes_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_owned();
        for name in FILES {
            fs::write(folder.join(name), "old").unwrap();
            fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o666)).unwrap();
        }
        sink(Target::Files(folder.clone())).write(&tagged("1")).unwrap();
        assert_eq!(read(folder.join("tls.key")), "key 1\n");
        assert_eq!([mode(folder.join("tls.crt")), mode(folder.join("tls.key"))], [0o644, 0o600]);
        assert_eq!(names(&folder), ["ca.crt", "tls.crt", "tls.key"]);

        let watched = Sink { key_mode: "0640".parse().unwrap(), ..sink(Target::Folder(folder.clone())) };
        watched.write(&tagged("2")).unwrap();
        holds_set(&folder, "2");
        assert_eq!(mode(folder.join("tls.key")), 0o640);
        fs::set_permissions(folder.join("..data/tls.key"), fs::Permissions::from_mode(0o666)).unwrap();
        watched.write(&tagged("3")).unwrap();
        assert_eq!(mode(folder.join("tls.key")), 0o640);

        let plain = sink(Target::Files(folder.clone()));
        for refused in [plain.check(), plain.write(&tagged("4"))] {
            assert!(matches!(refused.expect_err("links are kept there"), SinkError::Watched(_)));
        }
        holds_set(&folder, "3");
    }

    #[test]
    fn a_key_that_the_caller_holds_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let sink = sink(Target::Folder(dir.path().to_owned()));
        let mut held = tagged("2");
        held.private_key = None;

        sink.write(&tagged("1")).unwrap();
        sink.write(&held).unwrap();
        assert!(!dir.path().join("tls.key").exists(), "the link to the old set's key is gone");
        assert_eq!(read(dir.path().join("tls.crt")), "chain 2\n");

        fs::write(dir.path().join("tls.key"), "mine").unwrap();
        sink.write(&held).unwrap();
        assert_eq!(read(dir.path().join("tls.key")), "mine");
    }

    #[test]
    fn a_link_at_a_name_of_ours_is_replaced_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, elsewhere) = (dir.path().join("f"), dir.path().join("elsewhere"));
        fs::create_dir(&folder).unwrap();
        fs::write(&elsewhere, "precious").unwrap();
        for name in ["tls.key", "both.pem", "..data_tmp"] {
            symlink(&elsewhere, folder.join(name)).unwrap();
        }
        sink(Target::Combined(folder.join("both.pem"))).write(&tagged("1")).unwrap();
        sink(Target::Folder(folder.clone())).write(&tagged("1")).unwrap();
        holds_set(&folder, "1");
        assert_eq!(read(folder.join("both.pem")), "key 1\nchain 1\n");
        assert_eq!(read(elsewhere), "precious");
    }

    const ATTACKER: u32 = 3003;

    /// A folder of the attacker's, with folders of root's in it that the attacker may move, each with what it holds.
    fn treacherous() -> (TempDir, PathBuf) {
        let dir = fast_folder();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let folder = dir.path().join("tls");
        fs::create_dir(&folder).unwrap();
        chown(&folder, Some(ATTACKER), Some(ATTACKER)).unwrap();
        for (name, file) in [("empty", None), ("full", Some("other")), ("set", Some("tls.key"))] {
            fs::create_dir(folder.join(name)).unwrap();
            fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o700)).unwrap();
            file.map_or(Ok(()), |file| fs::write(folder.join(name).join(file), "precious")).unwrap();
        }
        (dir, folder)
    }

    /// Puts one of root's folders in the place of every folder that comes up, with the rights of the attacker alone;
    /// says how often that went well.
    fn swap_until(done: &AtomicBool, folder: &Path) -> u64 {
        use rustix::{fs::RenameFlags, thread::set_thread_res_uid};
        // Of this thread only (setresuid(2)).
        let user = Uid::from_raw(ATTACKER);
        set_thread_res_uid(user, user, user).unwrap();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let open = rustix::fs::open(folder, flags, Mode::empty()).unwrap();
        let mut victims = ["empty", "full", "set"].map(str::to_owned);
        let mut swaps = 0;
        while !done.load(Ordering::Relaxed) {
            let entries = Dir::read_from(&open).unwrap().flatten();
            for entry in entries {
                let name = entry.file_name().to_str().unwrap().to_owned();
                let victim = &mut victims[usize::try_from(swaps % 3).unwrap()];
                if name.contains(OURS) && !name.contains(victim.as_str()) {
                    let swapped =
                        rustix::fs::renameat_with(&open, victim.as_str(), &open, &name, RenameFlags::EXCHANGE);
                    if swapped.is_ok() {
                        *victim = name;
                        swaps += 1;
                    }
                }
            }
        }
        swaps
    }

    #[test]
    fn a_planted_link_leads_no_key_elsewhere() {
        const WRITES: u32 = 1000;
        if !geteuid().is_root() {
            return;
        }
        for target in
            [Target::Folder as fn(PathBuf) -> Target, Target::Files, |folder| Target::Combined(folder.join("both"))]
        {
            let (_dir, folder) = treacherous();
            let victims = ["empty", "full", "set"].map(|name| (fs::metadata(folder.join(name)).unwrap().ino(), name));
            let owner = Some("3003:3003".parse().unwrap());
            let sink = Sink { owner, shared_folder: true, ..sink(target(folder.clone())) };
            let done = AtomicBool::new(false);
            let (swaps, written) = thread::scope(|scope| {
                let attacker = scope.spawn(|| swap_until(&done, &folder));
                // It may fail, and the next one may not.
                let written = (0..WRITES).filter(|tag| sink.write(&tagged(&tag.to_string())).is_ok()).count();
                done.store(true, Ordering::Relaxed);
                (attacker.join().unwrap(), written)
            });
            let mut seen = 0;
            for entry in fs::read_dir(&folder).unwrap() {
                let (path, file) = entry.map(|it| (it.path(), it.metadata().unwrap())).unwrap();
                let Some((_, victim)) = victims.iter().find(|(ino, _)| *ino == file.ino()) else { continue };
                assert_eq!((file.uid(), file.mode() & 0o7777), (0, 0o700), "{victim}");
                let held: Vec<_> = match *victim {
                    "empty" => vec![],
                    "full" => vec!["other"],
                    _ => vec!["tls.key"],
                };
                assert_eq!(names(&path), held, "{victim}");
                held.iter().for_each(|file| assert_eq!(read(path.join(file)), "precious"));
                seen += 1;
            }
            // An empty folder may be removed by whoever may write where it lies.
            assert!(seen >= 2 && swaps > 0, "{seen} seen, {swaps} swaps, {written} written");
        }
    }

    #[test]
    fn root_writes_only_where_root_alone_may_unless_told() {
        if !geteuid().is_root() {
            return;
        }
        fn check(prepare: impl FnOnce(&Path), refused: Option<&str>, when_told: Option<&str>) {
            let dir = tempfile::tempdir().unwrap();
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
            fs::create_dir_all(dir.path().join("a/tls")).unwrap();
            prepare(dir.path());
            for (shared_folder, refused) in [(false, refused), (true, when_told)] {
                let sink = Sink { shared_folder, ..sink(Target::Folder(dir.path().join("a/tls"))) };
                let said = sink.check().and_then(|()| sink.write(&tagged("1"))).map_err(|error| {
                    assert!(error.is_usage());
                    error.to_string()
                });
                match (said, refused) {
                    (Ok(()), None) => {}
                    (Err(said), Some(words)) if said.contains(words) => {}
                    (said, wanted) => panic!("{shared_folder}: {said:?}, not {wanted:?}"),
                }
            }
        }
        let mode = |path: PathBuf, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let give = |path: PathBuf| chown(path, Some(ATTACKER), None).unwrap();
        check(|_| (), None, None);
        check(|dir| give(dir.join("a/tls")), Some("a/tls is not root's alone (owner 3003, mode 0755)"), None);
        check(|dir| mode(dir.join("a/tls"), 0o775), Some("a/tls is not root's alone (owner 0, mode 0775)"), None);
        check(|dir| mode(dir.join("a/tls"), 0o777), Some("mode 0777"), None);
        // As /tmp: others may add names there, but change none of root's.
        check(|dir| mode(dir.join("a"), 0o1777), None, None);
        // Whoever may write above may put any folder of root's there.
        check(
            |dir| give(dir.join("a")),
            Some("a is not root's alone"),
            Some("a/tls is a link or a folder of this user"),
        );
        check(
            |dir| {
                give(dir.join("a"));
                give(dir.join("a/tls"));
            },
            Some("a is not root's alone"),
            None,
        );
        let link = |dir: &Path, to: &str| {
            fs::rename(dir.join("a/tls"), dir.join("real")).unwrap();
            symlink(to, dir.join("a/tls")).unwrap();
        };
        // A link of root's is followed, one that somebody else can have placed is not.
        check(|dir| link(dir, "../real"), None, None);
        check(|dir| link(dir, dir.join("a/../real").to_str().unwrap()), None, None);
        check(
            |dir| {
                link(dir, "../real");
                give(dir.join("a"));
            },
            Some("a is not root's alone"),
            Some("a/tls is a link or a folder of this user"),
        );
        check(
            |dir| {
                link(dir, "../real");
                mode(dir.join("a"), 0o1777);
                std::os::unix::fs::lchown(dir.join("a/tls"), Some(ATTACKER), None).unwrap();
            },
            Some("a/tls is a link or a folder of this user"),
            Some("a/tls is a link or a folder of this user"),
        );
        check(
            |dir| {
                link(dir, "../real");
                give(dir.join("real"));
            },
            Some("real is not root's alone"),
            None,
        );
    }

    #[test]
    fn what_an_earlier_run_left_in_a_shared_folder_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let sink = Sink { shared_folder: true, ..sink(Target::Folder(dir.path().to_owned())) };
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        for tag in ["1", "2", "3"] {
            sink.write(&tagged(tag)).unwrap();
            holds_set(dir.path(), tag);
        }
        // Killed before it was moved out of where it was made.
        let leftover = dir.path().join("..csrd_1/staged");
        fs::create_dir_all(&leftover).unwrap();
        fs::write(leftover.join("../.csrd"), "").unwrap();
        fs::write(leftover.join("tls.key"), "half").unwrap();
        sink.write(&tagged("4")).unwrap();
        holds_set(dir.path(), "4");
        let sets = names(dir.path()).into_iter().filter(|name| name.starts_with("..csrd_")).count();
        assert_eq!(sets, 2, "this one and the one before");
        assert_eq!([mode(dir.path().join("..data")), mode(dir.path().join("tls.key"))], [0o755, 0o600]);
        let file = dir.path().join("both.pem");
        Sink { target: Target::Combined(file.clone()), ..sink }.write(&tagged("5")).unwrap();
        assert_eq!(read(file), "key 5\nchain 5\n");
        assert_eq!(names(dir.path()).len(), 2 + 5, "nothing unfinished stays");
    }

    #[test]
    fn root_hands_the_files_to_the_owner() {
        let dir = tempfile::tempdir().unwrap();
        let owner = Some("1234:2345".parse().unwrap());
        let written = Sink { owner, ..sink(Target::Folder(dir.path().to_owned())) }.write(&tagged("1"));
        if !rustix::process::geteuid().is_root() {
            let error = anyhow::Error::new(written.expect_err("only root gives files away"));
            assert!(format!("{error:#}").contains("set the owner and mode of"), "{error:#}");
            return;
        }
        written.unwrap();
        for name in ["tls.crt", "tls.key", "ca.crt", "..data"] {
            let file = fs::metadata(dir.path().join(name)).unwrap();
            assert_eq!((file.uid(), file.gid()), (1234, 2345), "{name}");
        }
        assert_eq!(mode(dir.path().join("tls.key")), 0o600);
    }

    #[test]
    fn a_mode_gives_nothing_to_others() {
        fn check(text: &str, expected: Option<&str>) {
            assert_eq!(text.parse::<KeyMode>().ok().map(|mode| mode.to_string()).as_deref(), expected, "{text}");
        }
        check("600", Some("0600"));
        check("0640", Some("0640"));
        check("0440", Some("0440"));
        check("0660", Some("0660"));
        check("0644", None);
        check("0700", None);
        check("4600", None);
        check("0200", None);
        check("", None);
        check("rw", None);
    }

    #[test]
    fn an_owner_is_two_numbers() {
        fn check(text: &str, expected: Option<(u32, u32)>) {
            assert_eq!(text.parse::<Owner>().ok(), expected.map(|(uid, gid)| Owner { uid, gid }), "{text}");
        }
        check("0:0", Some((0, 0)));
        check("4294967294:1", Some((u32::MAX - 1, 1)));
        check("4294967295:1", None);
        check("1000", None);
        check("www:www", None);
        check(":", None);
    }
}
