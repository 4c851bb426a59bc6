//! Names of user and group ids, from `/etc/passwd` and `/etc/group`.
//!
//! The files are read again when they change. Name services beyond these files are deliberately not asked: the binary
//! is static, and a directory that does not answer must not delay a certificate. An id that the files do not name has
//! none.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use super::proc::FileId;

/// Largest user or group file that is read, in bytes; in a larger one, no id has a name.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// One file of names.
#[derive(Debug)]
pub(super) struct Names {
    file: PathBuf,
    read: Mutex<Option<Table>>,
}

/// The file's contents, and which file that was.
#[derive(Debug)]
struct Table {
    file: FileId,
    names: HashMap<u32, Box<str>>,
}

impl Names {
    pub(super) fn in_file(file: impl Into<PathBuf>) -> Self {
        Self { file: file.into(), read: Mutex::new(None) }
    }

    /// The name of `id`: the first entry counts, as for getpwuid(3).
    pub(super) fn of(&self, id: u32) -> Option<String> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = self.refresh(&mut read) {
            tracing::debug!(file = %self.file.display(), %error, "no names");
            *read = None;
        }
        Some(read.as_ref()?.names.get(&id)?.to_string())
    }

    fn refresh(&self, read: &mut Option<Table>) -> io::Result<()> {
        let file = File::open(&self.file)?;
        let found = FileId::of(&file)?;
        if read.as_ref().is_some_and(|table| table.file == found) {
            return Ok(());
        }
        let mut text = Vec::new();
        if file.take(FILE_BYTES_MAX + 1).read_to_end(&mut text)? as u64 > FILE_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        *read = Some(Table { file: found, names: parse(&String::from_utf8_lossy(&text)) });
        Ok(())
    }
}

/// `name:password:id:…` (passwd(5), group(5)); lines that are not so, among them NIS's `+name`, are passed over.
fn parse(text: &str) -> HashMap<u32, Box<str>> {
    let mut names = HashMap::new();
    for line in text.lines() {
        let mut fields = line.split(':');
        let (Some(name), Some(_), Some(Ok(id))) = (fields.next(), fields.next(), fields.next().map(str::parse)) else {
            continue;
        };
        if is_name(name) {
            names.entry(id).or_insert_with(|| name.into());
        }
    }
    names
}

/// The characters that useradd(8) and systemd agree on, so that a name cannot be mistaken for anything else.
fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-$".contains(&byte);
    !name.is_empty() && !name.starts_with('-') && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(text: &str, id: u32, wanted: Option<&str>) {
        assert_eq!(parse(text).get(&id).map(AsRef::as_ref), wanted, "{text:?}");
    }

    #[test]
    fn the_first_entry_of_an_id_names_it() {
        check("root:x:0:0:root:/root:/bin/sh\ntoor:x:0:0::/:/bin/sh\n", 0, Some("root"));
        check("web:x:1000:\n", 1000, Some("web"));
        check("web:x:1000:a,b", 1000, Some("web"));
    }

    #[test]
    fn lines_that_are_no_entries_are_passed_over() {
        let lines = [
            "# web:x:7:",
            "+web:x:7:",
            "-web:x:7:",
            ":x:7:",
            "web:7",
            "web:x:-7:",
            "web:x:07x:",
            "a b:x:7:",
            "wéb:x:7:",
            "",
        ];
        for line in lines {
            check(line, 7, None);
        }
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_missing_one_names_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("passwd");
        let names = Names::in_file(&file);
        assert_eq!(names.of(7), None);
        std::fs::write(&file, "web:x:7:\n").unwrap();
        assert_eq!(names.of(7).as_deref(), Some("web"));
        std::fs::write(&file, "other:x:7:\n").unwrap();
        assert_eq!(names.of(7).as_deref(), Some("other"));
        std::fs::remove_file(&file).unwrap();
        assert_eq!(names.of(7), None);
    }

    #[test]
    fn a_file_is_at_most_four_mebibytes() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("passwd");
        let mut text = "web:x:7:\n".to_owned();
        text.push_str(&"#".repeat(FILE_BYTES_MAX as usize - text.len()));
        std::fs::write(&file, &text).unwrap();
        assert_eq!(Names::in_file(&file).of(7).as_deref(), Some("web"));
        std::fs::write(&file, text + "#").unwrap();
        assert_eq!(Names::in_file(&file).of(7), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in "[a-z:0-9+#\n]{0,100}") {
            for name in parse(&text).values() {
                prop_assert!(is_name(name));
            }
        }
    }
}
