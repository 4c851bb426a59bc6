//! The way to a folder, step by step, so that root writes where its operator said and nowhere else.
//!
//! A name means something only while nobody else can change it. Root therefore opens each folder on the way by the one
//! before it, and looks at who may write there: a link that another user can place is never followed, and a folder that
//! another user can change is refused unless its operator accepts it. Below such a folder root enters no folder of its own:
//! the other user may have moved it there. A user who is not root has the rights that its own files give it anyway, and
//! goes by the name.

use std::{
    ffi::OsString,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStringExt as _},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{self, FileType, Mode, OFlags, Stat},
    io::Errno,
    process::geteuid,
};

use super::{Folder, SinkError};

/// Links followed on one way, as many as the kernel follows (path_resolution(7)).
const MAX_LINKS: usize = 40;
/// What others may do to a folder that is made, less what the umask takes.
const FOLDER_MODE: Mode = Mode::from_bits_retain(0o777);
/// Permission to write for the group or for others. With an ACL, the group's bits are its mask (acl(5)).
const OTHERS_WRITE: u32 = 0o022;
const STICKY: u32 = 0o1000;
const ROOT: u32 = 0;

/// Who but this process's user and root may change which names a folder holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nobody.
    Closed,
    /// Others may add names, and change none of ours.
    Sticky,
    /// Others may replace any name in it.
    Shared,
}

impl Standing {
    pub(super) fn of(stat: &Stat) -> Self {
        let foreign = ![ROOT, geteuid().as_raw()].contains(&stat.st_uid);
        match stat.st_mode & OTHERS_WRITE == 0 {
            _ if foreign => Self::Shared,
            true => Self::Closed,
            false if stat.st_mode & STICKY != 0 => Self::Sticky,
            false => Self::Shared,
        }
    }
}

/// Goes to the folder at `path` as root must; with `make`, folders that are missing are made.
///
/// # Errors
/// Others than root may change where the way leads and `accepted` is false, or they have laid it.
pub(super) fn walk(path: &Path, make: bool, accepted: bool) -> Result<OwnedFd, SinkError> {
    let action = if make { "make the folder" } else { "open the folder" };
    let failed = |error: io::Error| Folder::error(action, path, error);
    let whole = std::path::absolute(path).map_err(failed)?;
    let mut step = Step::root(accepted).map_err(|errno| failed(errno.into()))?;
    // The next name is the last.
    let mut names = names(&whole);
    let mut links = 0;
    while let Some(name) = names.pop() {
        let (fd, stat) = step.look(&name, make)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => {
                if !step.trusts(&stat) {
                    return Err(SinkError::Planted(step.path.join(name)));
                }
                links += 1;
                let target = fs::readlinkat(&fd, "", Vec::new()).map_err(|errno| failed(errno.into()))?;
                let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                if links > MAX_LINKS {
                    return Err(failed(Errno::LOOP.into()));
                }
                if target.is_absolute() {
                    step.restart().map_err(|errno| failed(errno.into()))?;
                }
                names.extend(self::names(&target));
            }
            FileType::Directory => step.enter(name, fd, &stat)?,
            _ => return Err(failed(Errno::NOTDIR.into())),
        }
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    fs::openat(&step.fd, ".", flags, Mode::empty()).map_err(|errno| failed(errno.into()))
}

/// Where the walk is.
struct Step {
    fd: OwnedFd,
    path: PathBuf,
    standing: Standing,
    /// A folder above, or this one, can be changed by others.
    shared: bool,
    /// Whether that is accepted.
    accepted: bool,
}

impl Step {
    fn root(accepted: bool) -> Result<Self, Errno> {
        let fd = fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let standing = Standing::of(&fs::fstat(&fd)?);
        Ok(Self { fd, path: "/".into(), standing, shared: false, accepted })
    }

    fn restart(&mut self) -> Result<(), Errno> {
        let shared = self.shared;
        *self = Self { shared, ..Self::root(self.accepted)? };
        Ok(())
    }

    /// What `name` is here, as it is now.
    fn look(&self, name: &OsString, make: bool) -> Result<(OwnedFd, Stat), SinkError> {
        let failed = |action, errno: Errno| Folder::error(action, &self.path.join(name), errno.into());
        let open = || fs::openat(&self.fd, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        let fd = match open() {
            // In a shared folder it would be one of root's that others can move.
            Err(Errno::NOENT) if make && !self.shared => {
                match fs::mkdirat(&self.fd, name, FOLDER_MODE) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(failed("make the folder", errno)),
                }
                open()
            }
            opened => opened,
        };
        let fd = fd.map_err(|errno| failed("open the folder", errno))?;
        let stat = fs::fstat(&fd).map_err(|errno| failed("look at", errno))?;
        Ok((fd, stat))
    }

    /// Whether what is here can only have been put here by root.
    fn trusts(&self, stat: &Stat) -> bool {
        !self.shared && (self.standing == Standing::Closed || stat.st_uid == ROOT)
    }

    fn enter(&mut self, name: OsString, fd: OwnedFd, stat: &Stat) -> Result<(), SinkError> {
        let path = self.path.join(name);
        if self.shared && stat.st_uid == ROOT {
            return Err(SinkError::Planted(path));
        }
        let standing = Standing::of(stat);
        if standing == Standing::Shared && !self.accepted {
            return Err(SinkError::Shared { folder: path, owner: stat.st_uid, mode: stat.st_mode & 0o7777 });
        }
        let shared = self.shared || standing == Standing::Shared;
        *self = Self { fd, path, standing, shared, accepted: self.accepted };
        Ok(())
    }
}

/// The names of a path, the first one last.
fn names(path: &Path) -> Vec<OsString> {
    let named = |component| matches!(component, Component::Normal(_) | Component::ParentDir);
    path.components().rev().filter(|it| named(*it)).map(|it| it.as_os_str().to_owned()).collect()
}
