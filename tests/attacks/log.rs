//! How fast a log grows: its lines, and those of its busiest second.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
    time::{Duration, Instant},
};

/// Reads what has been appended since the last look.
pub(crate) struct Log {
    file: File,
    second: (Instant, u64),
    pub(crate) lines: u64,
    /// Lines of the busiest second.
    pub(crate) busiest: u64,
}

impl Log {
    pub(crate) fn follow(path: &Path) -> io::Result<Self> {
        Ok(Self { file: File::open(path)?, second: (Instant::now(), 0), lines: 0, busiest: 0 })
    }

    /// Counts new lines; meant to be called a few times a second.
    pub(crate) fn look(&mut self) {
        let mut buffer = vec![0; 1 << 20];
        let mut new = 0;
        while let Ok(read @ 1..) = self.file.read(&mut buffer) {
            new += buffer[..read].iter().filter(|byte| **byte == b'\n').count() as u64;
        }
        self.lines += new;
        self.second.1 += new;
        let elapsed = self.second.0.elapsed();
        if elapsed >= Duration::from_secs(1) {
            // A look that came late saw more than a second's lines.
            self.busiest = self.busiest.max((self.second.1 as f64 / elapsed.as_secs_f64()).ceil() as u64);
            self.second = (Instant::now(), 0);
        }
    }

    /// Forgets what has been counted so far.
    pub(crate) fn begin(&mut self) {
        self.look();
        (self.lines, self.busiest, self.second) = (0, 0, (Instant::now(), 0));
    }
}
