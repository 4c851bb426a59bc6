//! Text files that an operator names, read whole or refused: regular files only, and never more than a bound.
//!
//! A pipe or device is neither waited for nor read, whatever size it claims to have. Not for secrets: the buffer grows as
//! it is filled, and leaves parts of its content in freed memory.

use std::{
    fs::OpenOptions,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

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

#[cfg(test)]
mod tests {
    use std::fs;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

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
