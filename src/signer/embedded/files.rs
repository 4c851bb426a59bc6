//! The operator's CA files, read again when one of them changes.

use std::{fs, os::unix::fs::MetadataExt as _, path::PathBuf, time::SystemTime};

use super::{
    EmbeddedError,
    authority::{Authority, AuthorityError},
    store,
};

/// The files and how they looked when they were last read.
#[derive(Debug)]
pub(super) struct Files {
    certificate: PathBuf,
    key: PathBuf,
    chain: Option<PathBuf>,
    seen: Vec<Stamp>,
}

/// Changes whenever a file's content does: by writing, by renaming over it, or by a symlink that points elsewhere.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Files {
    pub(super) fn new(certificate: PathBuf, key: PathBuf, chain: Option<PathBuf>) -> Self {
        Self { certificate, key, chain, seen: Vec::new() }
    }

    /// The CA in the files, proven, if a file has changed since the last call. Files that make no CA are an error once.
    pub(super) fn changed(&mut self, now: SystemTime) -> Result<Option<Authority>, EmbeddedError> {
        let stamps = [&self.certificate, &self.key].into_iter().chain(&self.chain).map(stamp);
        let stamps = stamps.collect::<Result<Vec<_>, _>>()?;
        if stamps == self.seen {
            return Ok(None);
        }
        let certificate = store::read(&self.certificate)?;
        let key = store::read_secret(&self.key)?;
        let chain = self.chain.as_deref().map(store::read).transpose()?.unwrap_or_default();
        // Taken before reading: a change in between is seen next time.
        self.seen = stamps;
        let authority = Authority::from_pem(&key, &certificate, &chain);
        let proven = authority.and_then(|authority| authority.prove(now).map(|()| authority));
        proven.map(Some).map_err(|source| {
            let path = if matches!(source, AuthorityError::Key(_)) { &self.key } else { &self.certificate };
            EmbeddedError::Authority { path: path.clone(), source }
        })
    }
}

fn stamp(path: &PathBuf) -> Result<Stamp, EmbeddedError> {
    let unreadable = |source| EmbeddedError::Io { action: "read", path: path.clone(), source };
    let metadata = fs::metadata(path).map_err(unreadable)?;
    Ok(Stamp {
        device: metadata.dev(),
        inode: metadata.ino(),
        size: metadata.size(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    })
}
