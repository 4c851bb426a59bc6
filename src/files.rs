//! Text files that an operator names, read whole or refused: regular files only, and never more than a bound.
//!
//! A pipe or device is neither waited for nor read, whatever size it claims to have. Not for secrets: the buffer grows as
//! it is filled, and leaves parts of its content in freed memory. [`check_writers`] says who else may change what is read.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, CWD, StatVfsMountFlags, StatxAttributes, StatxFlags, statvfs, statx};

/// Symbolic links on the way to a file, as many as the kernel follows (path_resolution(7)).
pub const MAX_LINKS: usize = 40;

/// Bits that let another user than the owner write.
const OTHERS_WRITE: u32 = 0o022;
/// Where it is set on a folder, only its owner may rename or remove an entry (inode(7)).
const STICKY: u32 = 0o1000;

/// Why a file is not read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The kernel says no.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// A folder, pipe, device or socket.
    #[error("it is no regular file")]
    NotRegular,
    /// Over its bound.
    #[error("it has more than {max_bytes} bytes")]
    TooLong {
        /// The bound.
        max_bytes: usize,
    },
    /// No text.
    #[error("it is not UTF-8 after byte {valid_bytes}")]
    NotUtf8 {
        /// Bytes before the first that is wrong.
        valid_bytes: usize,
    },
}

/// Reads the file at `path`, of at most `max_bytes`.
pub fn read_text(path: &Path, max_bytes: usize) -> Result<String, FileError> {
    // A FIFO opens at once, instead of when somebody writes to it (open(2)).
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(FileError::NotRegular);
    }
    let mut bytes = Vec::new();
    file.take(max_bytes as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > max_bytes {
        return Err(FileError::TooLong { max_bytes });
    }
    String::from_utf8(bytes).map_err(|error| FileError::NotUtf8 { valid_bytes: error.utf8_error().valid_up_to() })
}

/// Who else may change what is read at a path.
#[derive(Debug, thiserror::Error)]
pub enum Untrusted {
    /// By its mode.
    #[error("group or others may write to {} (mode {mode:04o}); run: chmod go-w {}", path.display(), path.display())]
    Writable {
        /// What they may write to.
        path: PathBuf,
        /// Its mode, without its type.
        mode: u32,
    },
    /// By its owner.
    #[error("{} belongs to user {owner}, who may change it; run: chown root {}", path.display(), path.display())]
    Owner {
        /// Whose it is.
        path: PathBuf,
        /// Neither root nor this process's user.
        owner: u32,
    },
    /// Links that lead to links, over [`MAX_LINKS`].
    #[error("more than {MAX_LINKS} symbolic links lead to it")]
    Links,
    /// The kernel does not say.
    #[error("who may write to {} cannot be told", path.display())]
    Io {
        /// What was looked at.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Checks that nobody but root and this process's user can change what is read at the absolute `path`: what is there, and
/// each folder and link that leads to it.
///
/// A sticky folder on the way, such as `/tmp`, may be writable by others: they can neither rename nor remove an entry that
/// is not theirs, and every entry on the way is checked. A folder at `path` itself may not, sticky or not, because others
/// could add to it. A folder on which a read-only file system is mounted may have any mode: a ConfigMap volume has 0777.
pub fn check_writers(path: &Path) -> Result<(), Untrusted> {
    let (mut at, mut left, mut links) = (PathBuf::new(), parts(path), 0);
    while let Some(part) = left.pop() {
        if part == ".." {
            at.pop();
            continue;
        }
        at.push(part);
        let failed = |source| Untrusted::Io { path: at.clone(), source };
        let metadata = fs::symlink_metadata(&at).map_err(failed)?;
        let (owner, ours) = (metadata.uid(), rustix::process::geteuid().as_raw());
        if owner != 0 && owner != ours {
            return Err(Untrusted::Owner { path: at, owner });
        }
        if metadata.is_symlink() {
            links += 1;
            if links > MAX_LINKS {
                return Err(Untrusted::Links);
            }
            left.extend(parts(&fs::read_link(&at).map_err(failed)?));
            at.pop();
            continue;
        }
        let (mode, on_the_way) = (metadata.mode() & 0o7777, !left.is_empty());
        let harmless = metadata.is_dir() && (on_the_way && mode & STICKY != 0 || is_read_only_mount(&at));
        if mode & OTHERS_WRITE != 0 && !harmless {
            return Err(Untrusted::Writable { path: at, mode });
        }
    }
    Ok(())
}

/// The next part last.
fn parts(path: &Path) -> Vec<OsString> {
    let parts = path.components().filter(|part| !matches!(part, std::path::Component::CurDir));
    parts.map(|part| part.as_os_str().to_owned()).rev().collect()
}

/// Whether a read-only file system is mounted there. That it is read-only alone says little: systemd's ProtectSystem=
/// makes it so for a service and for nobody else.
fn is_read_only_mount(folder: &Path) -> bool {
    let root = statx(CWD, folder, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty())
        .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT));
    root && statvfs(folder).is_ok_and(|found| found.f_flag.contains(StatVfsMountFlags::RDONLY))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown, lchown, symlink};

    use rustix::fs::{FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_bound() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "abc").unwrap();
        assert_eq!(read_text(file.path(), 3).unwrap(), "abc");
        assert!(matches!(read_text(file.path(), 2), Err(FileError::TooLong { max_bytes: 2 })));
        fs::write(file.path(), b"ab\xff").unwrap();
        assert!(matches!(read_text(file.path(), 3), Err(FileError::NotUtf8 { valid_bytes: 2 })));
    }

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// A folder `way` with a folder `set` with a file `a`, and a link `way/link` to `set`.
    fn tree() -> (tempfile::TempDir, [PathBuf; 4]) {
        let folder = tempfile::tempdir().unwrap();
        let way = folder.path().join("way");
        let (set, link) = (way.join("set"), way.join("link"));
        fs::create_dir_all(&set).unwrap();
        symlink("./../way/set/.", &link).unwrap();
        let file = set.join("a");
        fs::write(&file, "").unwrap();
        for path in [&way, &set, &file] {
            mode(path, 0o700);
        }
        (folder, [way, set, file, link])
    }

    #[test]
    fn whoever_else_may_write_on_the_way_is_found() {
        let (_folder, [way, set, file, link]) = tree();
        let through = link.join("a");
        for path in [&way, &set, &file, &link, &through] {
            check_writers(path).unwrap();
        }
        let refused = |path: &Path, culprit: &Path, bits: u32| {
            let error = check_writers(path).unwrap_err();
            let it = culprit.display();
            assert_eq!(
                error.to_string(),
                format!("group or others may write to {it} (mode {bits:04o}); run: chmod go-w {it}")
            );
        };
        for bits in [0o720, 0o702, 0o777] {
            for culprit in [&way, &set, &file] {
                mode(culprit, bits);
                for path in [&file, &through] {
                    refused(path, culprit, bits);
                }
                mode(culprit, 0o755);
            }
        }
        mode(&set, 0o1777);
        check_writers(&through).expect("in a sticky folder nobody else can replace the file");
        refused(&set, &set, 0o1777);
        refused(&link, &set, 0o1777);
        mode(&set, 0o755);
        mode(&file, 0o1702);
        refused(&file, &file, 0o1702);
    }

    #[test]
    fn another_owner_of_a_file_a_folder_or_a_link_is_found() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let (_folder, [way, set, file, link]) = tree();
        mode(&way, 0o1777);
        for culprit in [&way, &set, &file] {
            chown(culprit, Some(1234), None).unwrap();
            let said = check_writers(&link.join("a")).unwrap_err().to_string();
            let it = culprit.display();
            assert_eq!(said, format!("{it} belongs to user 1234, who may change it; run: chown root {it}"));
            chown(culprit, Some(0), None).unwrap();
        }
        lchown(&link, Some(1234), None).unwrap();
        assert!(matches!(check_writers(&link.join("a")), Err(Untrusted::Owner { path, .. }) if path == link));
        check_writers(&file).expect("the link does not lead there");
    }

    #[test]
    fn links_are_followed_as_far_as_the_kernel_does() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("0"), "").unwrap();
        mode(&folder.path().join("0"), 0o600);
        for number in 1..=MAX_LINKS + 1 {
            symlink((number - 1).to_string(), folder.path().join(number.to_string())).unwrap();
        }
        check_writers(&folder.path().join(MAX_LINKS.to_string())).unwrap();
        assert!(matches!(check_writers(&folder.path().join((MAX_LINKS + 1).to_string())), Err(Untrusted::Links)));
    }

    #[test]
    fn what_is_no_regular_file_is_neither_waited_for_nor_read() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
        for path in [folder.path(), &pipe, Path::new("/dev/zero")] {
            assert!(matches!(read_text(path, 3), Err(FileError::NotRegular)), "{}", path.display());
        }
        assert!(matches!(read_text(&folder.path().join("absent"), 3), Err(FileError::Io(_))));
    }
}
