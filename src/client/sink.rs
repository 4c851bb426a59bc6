//! Certificates on disk.
//!
//! A [`Target::Folder`] is laid out as the kubelet lays out a secret volume: `DIR/tls.key` is a link to `..data/tls.key`, and
//! `..data` is a link to a folder that holds one whole set and never changes. A new set is written and synced beside it,
//! then one rename(2) moves `..data`: whoever reads through `..data` sees one set, at any moment, also after a crash.
//! Unlike the kubelet we keep the set before the current one until the next write, for readers that have followed the
//! link already (a removed set would fail their next open(2)); its certificate is mostly still valid anyway.
//! The other targets replace each file by a rename. In all of them a failure leaves the old files as they were.
//!
//! Everything is done relative to an open directory and never through a link, so that nobody who may write to DIR can
//! lead a key elsewhere. One process writes to one target; two would only undo each other's work. Deliberately not here:
//! erasing old keys from the medium, which no file system promises.

use std::{
    fmt,
    fs::File,
    io::{self, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    str::FromStr,
};

use rustix::fs::{self, AtFlags, Dir, FileType, Gid, Mode, OFlags, Uid};

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

/// Where certificates are written and to whom the files belong.
#[derive(Clone, Debug)]
pub struct Sink {
    /// Which files.
    pub target: Target,
    /// Mode of the file with the private key.
    pub key_mode: KeyMode,
    /// Owner of every file; `None` leaves them to this process's user.
    pub owner: Option<Owner>,
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
    /// A combined file of a certificate whose key the caller holds.
    #[error("a combined file needs the private key, which the agent does not have")]
    NoKey,
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
    /// The folder is kept by somebody else.
    pub fn check(&self) -> Result<(), SinkError> {
        let Target::Files(path) = &self.target else { return Ok(()) };
        match Folder::open(path) {
            Ok(folder) if folder.link(DATA_LINK).is_some() => Err(SinkError::Watched(path.clone())),
            // A folder that is not there yet is made when there is something to put there.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Writes `certificate`, durably, with the modes and owner of this sink.
    ///
    /// # Errors
    /// When a step fails; the files that were there before are still there, whole.
    pub fn write(&self, certificate: &Certificate) -> Result<(), SinkError> {
        match &self.target {
            Target::Folder(path) => {
                let folder = Folder::create(path)?;
                self.write_set(&folder, &self.set(certificate))
            }
            Target::Files(path) => {
                self.check()?;
                let folder = Folder::create(path)?;
                self.set(certificate).iter().try_for_each(|content| self.replace(&folder, content))
            }
            Target::Combined(path) => {
                let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                let name = path
                    .file_name()
                    .and_then(|name| name.to_str())
                    .ok_or_else(|| Folder::error("write", path, io::Error::from(io::ErrorKind::InvalidFilename)))?;
                let key = certificate.private_key.as_ref().ok_or(SinkError::NoKey)?;
                let parts = [key.as_bytes(), certificate.certificate_chain.as_bytes()];
                let content = Content { name, parts, mode: self.key_mode.0 };
                self.replace(&Folder::open(parent.unwrap_or(Path::new(".")))?, &content)
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
        let made = fs::mkdirat(&folder.fd, version, Mode::RWXU);
        made.map_err(|errno| folder.refused("make", version, errno))?;
        let inner = folder.enter(version)?;
        set.iter().try_for_each(|content| self.create(&inner, content.name, content))?;
        self.hand_over(&inner.fd, SET_MODE)
            .map_err(|errno| folder.refused("set the owner and mode of", version, errno))?;
        inner.sync()
    }

    /// Puts a whole new file in the place of an old one.
    fn replace(&self, folder: &Folder, content: &Content<'_>) -> Result<(), SinkError> {
        folder.must_not_be_folder(content.name)?;
        let leftover = format!(".{}{OURS}", content.name);
        folder.for_each_leftover(&leftover, |name| drop(folder.remove(name)));
        let unfinished = format!("{leftover}{:016x}", rand::random::<u64>());
        let replaced = self.create(folder, &unfinished, content).and_then(|()| {
            let renamed = fs::renameat(&folder.fd, &unfinished, &folder.fd, content.name);
            renamed.map_err(|errno| folder.refused("replace", content.name, errno))
        });
        if let Err(error) = replaced {
            // The first error says more than a second one would.
            let _ = folder.remove(&unfinished);
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

/// An open directory; every name below is one component within it.
struct Folder {
    fd: OwnedFd,
    path: PathBuf,
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
        Ok(Self { fd, path: path.to_owned() })
    }

    fn enter(&self, name: &str) -> Result<Self, SinkError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = fs::openat(&self.fd, name, flags, Mode::empty()).map_err(|errno| self.refused("open", name, errno))?;
        Ok(Self { fd, path: self.path.join(name) })
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

    /// Removes a folder that holds a set. What cannot be removed now is tried again at the next write.
    fn remove_set(&self, name: &str) {
        let Ok(set) = self.enter(name) else { return };
        FILES.into_iter().for_each(|file| drop(set.remove(file)));
        let _ = fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR);
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
        os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    use tempfile::TempDir;

    use super::*;
    use crate::client::certificate::tagged;

    fn sink(target: Target) -> Sink {
        Sink { target, key_mode: DEFAULT_KEY_MODE, owner: None }
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
    fn a_planted_link_leads_no_key_elsewhere() {
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
