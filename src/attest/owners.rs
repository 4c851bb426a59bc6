//! To whom a user id is subordinate: the ranges of `/etc/subuid` (subuid(5)), whose owners may become any id in them.
//!
//! A user with 65536 subordinate ids is one principal, as its owner, wherever this file says so. Ranges that another name
//! service hands out are not seen, and each of their ids counts as a user of its own.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _},
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::proc::FileId;

/// Largest file that is read, in bytes; a larger one counts as empty.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// How long the file is taken to be what it was.
const FRESH_FOR: Duration = Duration::from_secs(1);

/// The ranges of one file, whose owners are named as in another.
#[derive(Debug)]
pub(super) struct Owners {
    subuid: PathBuf,
    passwd: PathBuf,
    read: Mutex<Option<Table>>,
}

#[derive(Debug)]
struct Table {
    at: Instant,
    files: [Option<FileId>; 2],
    ranges: Vec<Range>,
}

/// So many ids from the first one on, and whose they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    first: u32,
    count: u32,
    owner: u32,
}

impl Owners {
    pub(super) fn in_files(subuid: impl Into<PathBuf>, passwd: impl Into<PathBuf>) -> Self {
        Self { subuid: subuid.into(), passwd: passwd.into(), read: Mutex::new(None) }
    }

    /// The user to whom `uid` is subordinate, or else `uid`.
    pub(super) fn of(&self, uid: u32) -> u32 {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if read.as_ref().is_none_or(|table| table.at.elapsed() >= FRESH_FOR) {
            *read = Some(self.refreshed(read.take()));
        }
        let ranges = read.as_ref().map_or(&[][..], |table| &table.ranges);
        ranges
            .iter()
            .find(|range| uid.checked_sub(range.first).is_some_and(|it| it < range.count))
            .map_or(uid, |it| it.owner)
    }

    fn refreshed(&self, before: Option<Table>) -> Table {
        let opened = [&self.subuid, &self.passwd].map(|path| File::open(path).ok());
        let files = opened.each_ref().map(|file| file.as_ref().and_then(|file| FileId::of(file).ok()));
        let ranges = match before {
            Some(table) if table.files == files => table.ranges,
            _ => {
                let [subuid, passwd] = opened.map(|file| file.and_then(|file| text(file).ok()).unwrap_or_default());
                ranges(&subuid, &ids(&passwd))
            }
        };
        Table { at: Instant::now(), files, ranges }
    }
}

fn text(file: File) -> io::Result<String> {
    let mut text = Vec::new();
    if file.take(FILE_BYTES_MAX + 1).read_to_end(&mut text)? as u64 > FILE_BYTES_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Ids by name, of `name:password:id:…`; the first entry of a name counts.
fn ids(passwd: &str) -> HashMap<&str, u32> {
    let mut ids = HashMap::new();
    for line in passwd.lines() {
        let mut fields = line.split(':');
        if let (Some(name), Some(_), Some(Ok(id))) = (fields.next(), fields.next(), fields.next().map(str::parse)) {
            ids.entry(name).or_insert(id);
        }
    }
    ids
}

/// `owner:first:count`, the owner by name or by id; other lines are passed over, and ranges of root's: it needs none.
fn ranges(subuid: &str, ids: &HashMap<&str, u32>) -> Vec<Range> {
    let range = |line: &str| {
        let mut fields = line.split(':');
        let (owner, first, count) = (fields.next()?, fields.next()?.parse().ok()?, fields.next()?.trim().parse().ok()?);
        let owner = ids.get(owner).copied().or_else(|| owner.parse().ok())?;
        (owner != 0 && first > 0 && fields.next().is_none()).then_some(Range { first, count, owner })
    };
    subuid.lines().filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_in_a_range_is_its_owners_and_any_other_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let (subuid, passwd) = (folder.path().join("subuid"), folder.path().join("passwd"));
        std::fs::write(&passwd, "root:x:0:0::/:\nweb:x:1000:1000::/:\n").unwrap();
        std::fs::write(
            &subuid,
            "web:100000:65536\n1001:200000:10\nnobody-here:300000:10\nroot:400000:10\nweb:0:10\nweb:1:x\nweb:5:1:1\n",
        )
        .unwrap();
        let owners = Owners::in_files(&subuid, &passwd);
        for (uid, owner) in [
            (0, 0),
            (5, 5),
            (1000, 1000),
            (99_999, 99_999),
            (100_000, 1000),
            (165_535, 1000),
            (165_536, 165_536),
            (200_009, 1001),
            (200_010, 200_010),
            (300_000, 300_000),
            (400_000, 400_000),
        ] {
            assert_eq!(owners.of(uid), owner, "{uid}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_file_counts_within_a_second_and_a_missing_one_names_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let subuid = folder.path().join("subuid");
        let owners = Owners::in_files(&subuid, folder.path().join("passwd"));
        assert_eq!(owners.of(100_000), 100_000);
        std::fs::write(&subuid, "7:100000:1\n").unwrap();
        tokio::time::sleep(FRESH_FOR).await;
        assert_eq!(owners.of(100_000), 7);
        std::fs::remove_file(&subuid).unwrap();
        tokio::time::sleep(FRESH_FOR).await;
        assert_eq!(owners.of(100_000), 100_000);
    }

    #[test]
    fn a_file_is_at_most_a_mebibyte() {
        let folder = tempfile::tempdir().unwrap();
        let subuid = folder.path().join("subuid");
        let mut lines = "7:100000:1\n".to_owned();
        lines.push_str(&"#".repeat(FILE_BYTES_MAX as usize - lines.len()));
        std::fs::write(&subuid, &lines).unwrap();
        assert_eq!(Owners::in_files(&subuid, "/none").of(100_000), 7);
        std::fs::write(&subuid, lines + "#").unwrap();
        assert_eq!(Owners::in_files(&subuid, "/none").of(100_000), 100_000);
    }
}
