//! Log lines on their way to a reader that may stop reading.
//!
//! A write to a full pipe waits for its reader, and lines are written by the thread that serves. So they are only put into
//! memory there, and written by a thread of their own. Memory has a bound; lines beyond it are dropped, counted, and the
//! count is logged once there is room again.

use std::{
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use tracing_subscriber::fmt::MakeWriter;

/// Bytes of lines that wait to be written.
pub const LOG_BACKLOG_BYTES_MAX: usize = 256 << 10;
/// The longest that the end of the process waits for its last lines to be written.
pub const LOG_FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

/// Memory that is kept for lines when there are none.
const KEPT_BYTES: usize = 16 << 10;
/// Name of the writing thread.
const THREAD: &str = "log";

/// Where log lines go, one a write; clones go to the same place.
#[derive(Clone, Debug)]
pub struct LogWriter(Arc<Shared>);

/// Waits, when dropped, until all lines are written, for at most [`LOG_FLUSH_TIMEOUT`].
#[derive(Debug)]
pub struct LogFlush(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    backlog: Mutex<Backlog>,
    /// Notified of a new line.
    filled: Condvar,
    /// Notified when all is written.
    written: Condvar,
}

#[derive(Debug, Default)]
struct Backlog {
    bytes: Vec<u8>,
    /// Lines dropped since the last report.
    dropped: u64,
    writing: bool,
}

impl LogWriter {
    /// Writes to `output` from now on, on a thread that ends with the process. How many lines were dropped is logged as
    /// well; an output that fails drops lines without a count.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(output: impl Write + Send + 'static) -> io::Result<(Self, LogFlush)> {
        let shared = Arc::new(Shared::default());
        let writing = Arc::clone(&shared);
        thread::Builder::new().name(THREAD.to_owned()).spawn(move || writing.run(output))?;
        Ok((Self(Arc::clone(&shared)), LogFlush(shared)))
    }
}

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut backlog = self.0.lock();
        // The report of dropped lines is never dropped; there is one at a time.
        if backlog.bytes.len() + line.len() <= LOG_BACKLOG_BYTES_MAX || thread::current().name() == Some(THREAD) {
            backlog.bytes.extend_from_slice(line);
        } else {
            backlog.dropped += 1;
        }
        drop(backlog);
        self.0.filled.notify_one();
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Backlog> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, mut output: impl Write) {
        let mut lines = Vec::with_capacity(KEPT_BYTES);
        let mut backlog = self.lock();
        loop {
            backlog.writing = false;
            if backlog.bytes.is_empty() {
                self.written.notify_all();
                backlog = self.filled.wait(backlog).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            backlog.writing = true;
            std::mem::swap(&mut backlog.bytes, &mut lines);
            let dropped = std::mem::take(&mut backlog.dropped);
            drop(backlog);
            if dropped > 0 {
                tracing::warn!(lines = dropped, "log lines were dropped: stderr was not read in time");
            }
            let _ = output.write_all(&lines).and_then(|()| output.flush());
            lines.clear();
            lines.shrink_to(KEPT_BYTES);
            backlog = self.lock();
        }
    }
}

impl Drop for LogFlush {
    fn drop(&mut self) {
        let backlog = self.0.lock();
        let unwritten = |backlog: &mut Backlog| backlog.writing || !backlog.bytes.is_empty();
        let _ = self.0.written.wait_timeout_while(backlog, LOG_FLUSH_TIMEOUT, unwritten);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        os::unix::net::UnixStream,
        sync::mpsc::{Receiver, sync_channel},
    };

    use super::*;

    /// An output that takes each write once it is let.
    struct Slow(Receiver<()>, UnixStream);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            self.1.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_fits_is_kept_and_what_is_beyond_it_is_dropped_and_counted() {
        let (let_it, waits) = sync_channel(0);
        let (mut read, output) = UnixStream::pair().unwrap();
        let (mut log, flush) = LogWriter::start(Slow(waits, output)).unwrap();
        log.write_all(b"first\n").unwrap();
        // Taken by the thread, which waits in the output.
        while !flush.0.lock().writing {
            thread::yield_now();
        }
        let whole = vec![b'x'; LOG_BACKLOG_BYTES_MAX];
        log.write_all(&whole).unwrap();
        assert_eq!(flush.0.lock().dropped, 0, "at the bound");
        log.write_all(b"y").unwrap();
        assert_eq!(flush.0.lock().dropped, 1, "one past it");
        drop(let_it);
        let mut seen = vec![0; b"first\n".len() + whole.len()];
        read.read_exact(&mut seen).unwrap();
        assert_eq!(seen, [&b"first\n"[..], &whole].concat());
        drop(flush);
        log.write_all(b"later\n").unwrap();
        let mut later = [0; 6];
        read.read_exact(&mut later).unwrap();
        assert_eq!(&later, b"later\n", "and nothing of what was dropped");
    }

    #[test]
    fn the_end_waits_for_the_last_line_and_not_for_a_reader_that_does_not_read() {
        let (mut read, output) = UnixStream::pair().unwrap();
        let (mut log, flush) = LogWriter::start(output).unwrap();
        log.write_all(b"last\n").unwrap();
        drop(flush);
        read.set_nonblocking(true).unwrap();
        let mut last = [0; 5];
        read.read_exact(&mut last).unwrap();
        assert_eq!(&last, b"last\n");

        let (_never, waits) = sync_channel(0);
        let (mut log, flush) = LogWriter::start(Slow(waits, read)).unwrap();
        log.write_all(b"never\n").unwrap();
        drop(flush);
    }
}
