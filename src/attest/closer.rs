//! Closes sockets that may hold a client's descriptors, on threads that may block.
//!
//! Closing a socket frees what nobody has read of it, and closes the descriptors in there with it. That takes as long as
//! whoever sent them likes: a TCP socket lingers for as long as it was told to (`SO_LINGER`, socket(7)), and every other
//! kind of file has its own way. So this is never done on the thread that serves, unless the kernel lets nobody send
//! descriptors (Linux 6.16).
//!
//! Threads are few, and there are two queues. Sockets that were seen to hold descriptors wait for one of half of the
//! threads; as many as were sent may hang there, and delay only each other. All others find a free thread. (Before Linux
//! 6.8 closing any unix socket may collect garbage of other processes' sockets, so these are not closed elsewhere either.)
//! The queues need no bound of their own: each socket keeps its place among the connections until it is closed.

use std::{
    any::Any,
    collections::VecDeque,
    fmt,
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

/// Threads that close sockets, at most.
const THREADS_MAX: usize = 8;
/// Those of them that may close sockets with descriptors.
const LOADED_AT_A_TIME_MAX: usize = THREADS_MAX / 2;
/// Bytes of such a thread's stack: it makes one system call.
const STACK_BYTES: usize = 64 << 10;
/// How long a thread waits for more to do.
const IDLE_FOR: Duration = Duration::from_secs(10);

/// Hands sockets to threads that close them; clones share the threads.
#[derive(Clone, Default)]
pub(super) struct Closer(Arc<Shared>);

#[derive(Default)]
struct Shared {
    work: Mutex<Work>,
    more: Condvar,
}

#[derive(Default)]
struct Work {
    empty: VecDeque<Closing>,
    loaded: VecDeque<Closing>,
    threads: usize,
    idle: usize,
    loaded_under_way: usize,
}

/// A socket on its way. The socket is closed first, then what was kept for it is given up.
pub(super) struct Closing {
    pub(super) socket: OwnedFd,
    pub(super) kept: Option<Box<dyn Any + Send>>,
}

impl Closing {
    fn end(self) {
        drop(self.socket);
        drop(self.kept);
    }
}

impl Closer {
    /// Closes a socket soon, elsewhere. `loaded` says that it may hold descriptors.
    pub(super) fn close(&self, closing: Closing, loaded: bool) {
        let mut work = self.0.lock();
        if loaded {
            work.loaded.push_back(closing)
        } else {
            work.empty.push_back(closing)
        }
        if work.idle < work.ready() && work.threads < THREADS_MAX {
            let shared = Arc::clone(&self.0);
            let thread = thread::Builder::new().name("close".to_owned()).stack_size(STACK_BYTES);
            match thread.spawn(move || shared.run()) {
                Ok(_) => work.threads += 1,
                // The next one that is closed tries again.
                Err(error) => tracing::warn!(%error, "cannot start a thread that closes connections"),
            }
        }
        drop(work);
        self.0.more.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut work = self.lock();
        loop {
            if let Some(closing) = work.empty.pop_front() {
                drop(work);
                closing.end();
                work = self.lock();
            } else if work.ready() > 0
                && let Some(closing) = work.loaded.pop_front()
            {
                work.loaded_under_way += 1;
                drop(work);
                closing.end();
                work = self.lock();
                work.loaded_under_way -= 1;
            } else {
                work.idle += 1;
                let (held, waited) = self.more.wait_timeout(work, IDLE_FOR).unwrap_or_else(PoisonError::into_inner);
                work = held;
                work.idle -= 1;
                if waited.timed_out() && work.ready() == 0 {
                    work.threads -= 1;
                    return;
                }
            }
        }
    }
}

impl Work {
    /// How many sockets could be closed now, if there were threads enough.
    fn ready(&self) -> usize {
        self.empty.len() + self.loaded.len().min(LOADED_AT_A_TIME_MAX - self.loaded_under_way)
    }
}

impl fmt::Debug for Closer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let work = self.0.lock();
        let waiting = work.empty.len() + work.loaded.len();
        f.debug_struct("Closer").field("threads", &work.threads).field("waiting", &waiting).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        os::unix::net::UnixStream,
        sync::mpsc::{Receiver, SyncSender, sync_channel},
    };

    use super::*;

    /// Hangs at its end until it is let go.
    struct Hangs(Receiver<()>);

    impl Drop for Hangs {
        fn drop(&mut self) {
            let _ = self.0.recv();
        }
    }

    /// Closes one end of a connection, which hangs until the sender is dropped; returns the other end.
    fn close(closer: &Closer, loaded: bool) -> (UnixStream, SyncSender<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (let_go, hangs) = sync_channel(0);
        closer.close(Closing { socket: theirs.into(), kept: Some(Box::new(Hangs(hangs))) }, loaded);
        (ours, let_go)
    }

    fn until_closed(mut stream: &UnixStream) {
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn sockets_with_descriptors_hang_half_of_the_threads_and_delay_no_other_socket() {
        let closer = Closer::default();
        let hanging: Vec<_> = (0..LOADED_AT_A_TIME_MAX).map(|_| close(&closer, true)).collect();
        hanging.iter().for_each(|(stream, _)| until_closed(stream));
        let one_past = close(&closer, true);
        let others: Vec<_> = (LOADED_AT_A_TIME_MAX..THREADS_MAX).map(|_| close(&closer, false)).collect();
        others.iter().for_each(|(stream, _)| until_closed(stream));
        one_past.0.set_nonblocking(true).unwrap();
        assert!((&one_past.0).read(&mut [0]).is_err(), "one past the bound waits");
        assert_eq!(closer.0.lock().threads, THREADS_MAX);
        one_past.0.set_nonblocking(false).unwrap();
        drop(hanging);
        until_closed(&one_past.0);
    }

    #[test]
    fn what_was_kept_for_a_socket_is_given_up_after_it_was_closed() {
        let closer = Closer::default();
        let (kept, given_up) = sync_channel::<()>(0);
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        closer.close(Closing { socket: theirs.into(), kept: Some(Box::new(kept)) }, false);
        assert!(given_up.recv().is_err());
        ours.set_nonblocking(true).unwrap();
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
    }
}
