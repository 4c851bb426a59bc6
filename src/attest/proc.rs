//! Reading `/proc/PID` through one handle, so that every read is of the same process.
//!
//! The handle belongs to the process, not to its number: once the process is gone, reads through it fail, whoever has
//! the number by then. Every read is bounded.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};

/// Longest text read from `/proc`, in bytes. `status` with the 65536 groups that Linux allows has about 720,000.
const TEXT_BYTES_MAX: u64 = 1 << 20;

/// A handle to one process's folder in `/proc`.
#[derive(Debug)]
pub(super) struct ProcHandle(OwnedFd);

/// A file, told from all others, as it was at one time: `changed` also tells when it gained or lost a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileId {
    pub(super) device: (u32, u32),
    pub(super) inode: u64,
    pub(super) size: u64,
    pub(super) modified: (i64, u32),
    pub(super) changed: (i64, u32),
    /// When its inode was made, where the file system tells: a later file may have the same inode number.
    pub(super) born: Option<(i64, u32)>,
}

/// What is used of `/proc/PID/status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) real_uid: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Sorted, without duplicates.
    pub(super) groups: Vec<u32>,
}

impl ProcHandle {
    /// The folder of whichever process has this number now.
    pub(super) fn open(pid: u32) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::openat(CWD, format!("/proc/{pid}"), flags, Mode::empty())?))
    }

    /// Another handle to the same process.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Effective user and group id, which the kernel shows as the folder's owner (`task_dump_owner` in
    /// `fs/proc/base.c`).
    ///
    /// A process that has exited shows as root: check afterwards that it lives.
    pub(super) fn owner(&self) -> io::Result<(u32, u32)> {
        let stat = rustix::fs::fstat(&self.0)?;
        Ok((stat.st_uid, stat.st_gid))
    }

    /// The executable's identity. Answered from what is cached, so that no network or user's file system can delay it.
    pub(super) fn executable(&self) -> io::Result<FileId> {
        FileId::at(&self.0, c"exe", AtFlags::empty())
    }

    /// The executable's path, as it was when the process began to run it, seen from the root of its mounts.
    pub(super) fn executable_path(&self) -> io::Result<Vec<u8>> {
        Ok(rustix::fs::readlinkat(&self.0, c"exe", Vec::new())?.into_bytes())
    }

    /// The executable's contents.
    pub(super) fn open_executable(&self) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
        Ok(rustix::fs::openat(&self.0, c"exe", flags, Mode::empty())?.into())
    }

    /// Ids and groups.
    pub(super) fn status(&self) -> io::Result<Status> {
        Status::parse(&self.text("status")?).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The text of `cgroup`.
    pub(super) fn cgroup(&self) -> io::Result<String> {
        self.text("cgroup")
    }

    /// When the process started, in clock ticks since boot: field 22 of `stat` (proc_pid_stat(5)).
    pub(super) fn start_ticks(&self) -> io::Result<u64> {
        start_ticks(&self.text("stat")?).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn text(&self, name: &str) -> io::Result<String> {
        let file = File::from(rustix::fs::openat(&self.0, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?);
        let mut bytes = Vec::with_capacity(2048);
        if file.take(TEXT_BYTES_MAX).read_to_end(&mut bytes)? as u64 == TEXT_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        // A process may give itself a name that is not UTF-8; that name is not used.
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

impl FileId {
    /// Identity of an open file.
    pub(super) fn of(file: impl AsFd) -> io::Result<Self> {
        Self::at(file, c"", AtFlags::EMPTY_PATH)
    }

    /// Whether this is the file that `earlier` was, whatever has become of its name. Its contents are the same if a process
    /// has run it from then to now, because such a file cannot be written to.
    pub(super) fn is_still(&self, earlier: &Self) -> bool {
        let born_together = self.born.is_none() || earlier.born.is_none() || self.born == earlier.born;
        let others = |file: &Self| (file.device, file.inode, file.size, file.modified);
        born_together && others(self) == others(earlier)
    }

    fn at(folder: impl AsFd, name: &std::ffi::CStr, flags: AtFlags) -> io::Result<Self> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let stat = rustix::fs::statx(folder, name, flags | AtFlags::STATX_DONT_SYNC, wanted)?;
        let tells_birth = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
        Ok(Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            size: stat.stx_size,
            modified: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            changed: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
            born: tells_birth.then_some((stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec)),
        })
    }
}

impl Status {
    /// Each field's first line counts; the kernel escapes line breaks in the only field a process may write, its name.
    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
        let mut uids = field("Uid:")?.split_ascii_whitespace().map(str::parse);
        let mut gids = field("Gid:")?.split_ascii_whitespace().map(str::parse);
        let groups = field("Groups:")?.split_ascii_whitespace().map(str::parse).collect::<Result<Vec<u32>, _>>();
        let mut groups = groups.ok()?;
        groups.sort_unstable();
        groups.dedup();
        Some(Self { real_uid: uids.next()?.ok()?, uid: uids.next()?.ok()?, gid: gids.nth(1)?.ok()?, groups })
    }
}

/// Fields follow the name in parentheses, which may itself hold spaces and parentheses.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STATUS: &str = "Name:\tweb\\nUid:\t0\t0\t0\t0\nUmask:\t0022\nUid:\t1000\t1001\t1002\t1003\nGid:\t20\t21\t22\t23\nGroups:\t7 5 7 \n";

    #[test]
    fn status_gives_effective_ids_and_sorted_groups() {
        let status = Status::parse(STATUS).unwrap();
        assert_eq!(status, Status { real_uid: 1000, uid: 1001, gid: 21, groups: vec![5, 7] });
    }

    #[test]
    fn status_without_groups_has_none() {
        assert_eq!(
            Status::parse("Uid:\t1\t1\t1\t1\nGid:\t1\t1\t1\t1\nGroups:\t \n").unwrap().groups,
            Vec::<u32>::new()
        );
    }

    #[test]
    fn an_incomplete_status_is_refused() {
        for text in ["", "Uid:\t1\nGid:\t1\t1\nGroups:\n", "Uid:\t1\t1\nGid:\t1\nGroups:\n", "Uid:\t1\t1\nGid:\t1\t1\n"]
        {
            assert_eq!(Status::parse(text), None, "{text:?}");
        }
        assert_eq!(Status::parse("Uid:\t1\t1\nGid:\t1\t1\nGroups:\tx\n"), None);
    }

    #[test]
    fn start_time_is_found_behind_any_name() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(start_ticks(&format!("7 (web) {fields}")), Some(4242));
        assert_eq!(start_ticks(&format!("7 (a) R 1 (b c) {fields}")), Some(4242));
        assert_eq!(start_ticks("7 (web) S 1"), None);
    }

    #[test]
    fn this_process_reads_itself() {
        let handle = ProcHandle::open(std::process::id()).unwrap();
        let status = handle.status().unwrap();
        assert_eq!(handle.owner().unwrap(), (status.uid, status.gid));
        assert_eq!(handle.executable().unwrap(), FileId::of(handle.open_executable().unwrap()).unwrap());
        assert!(handle.start_ticks().unwrap() > 0);
    }

    #[test]
    fn a_file_is_the_same_whatever_becomes_of_its_name_and_no_later_one_with_its_number_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "text").unwrap();
        let file = File::open(&path).unwrap();
        let before = FileId::of(&file).unwrap();
        std::fs::remove_file(&path).unwrap();
        let after = FileId::of(&file).unwrap();
        assert!(after.is_still(&before));
        let later = |born| FileId { born, ..before };
        assert!(!later(Some((1, 0))).is_still(&later(Some((2, 0)))));
        assert!(later(None).is_still(&later(Some((2, 0)))), "where the file system does not tell");
        for other in [
            FileId { device: (u32::MAX, 0), ..before },
            FileId { inode: before.inode + 1, ..before },
            FileId { size: before.size + 1, ..before },
            FileId { modified: (0, 0), ..before },
        ] {
            assert!(!other.is_still(&before), "{other:?}");
        }
    }

    #[test]
    fn a_text_at_the_bound_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let handle = ProcHandle(File::open(&folder).unwrap().into());
        for (bytes, expected) in [(TEXT_BYTES_MAX - 1, Ok(())), (TEXT_BYTES_MAX, Err(io::ErrorKind::FileTooLarge))] {
            File::create(folder.path().join("cgroup")).unwrap().set_len(bytes).unwrap();
            assert_eq!(handle.cgroup().map(drop).map_err(|error| error.kind()), expected);
        }
    }

    #[test]
    fn a_handle_of_an_exited_process_reads_nothing() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let handle = ProcHandle::open(child.id()).unwrap();
        assert!(handle.status().is_ok());
        child.kill().unwrap();
        child.wait().unwrap();
        for gone in [handle.status().is_err(), handle.executable().is_err(), handle.start_ticks().is_err()] {
            assert!(gone);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in "(Uid|Gid|Groups)?[:\t 0-9a\n)]{0,80}") {
            let _ = (Status::parse(&text), start_ticks(&text));
        }
    }
}
