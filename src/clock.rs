//! Wall-clock time, the only place that reads it.
//!
//! Validity periods are wall-clock facts, so they are compared against [`Clock::now`]; timers run on tokio's monotonic
//! clock, which stands still while the machine sleeps. [`Jumps`] tells when the two have parted. [`Clock::paused`] follows
//! tokio's paused time, so that a test of a day's renewals takes no time.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use rustix::{
    io::Errno,
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
    time::Instant,
};

/// A source of wall-clock time; clones tell the same time.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    System,
    Paused { start: Arc<Mutex<SystemTime>>, at: Instant, steps: watch::Sender<()> },
}

/// Tells of jumps of the wall clock: it was set, or the machine slept.
#[derive(Debug)]
pub struct Jumps(Watched);

#[derive(Debug)]
enum Watched {
    System(AsyncFd<OwnedFd>),
    /// The kernel gave no timer: whoever waits must look again by itself.
    Nothing,
    Paused(watch::Receiver<()>),
}

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that reads `start` now and then advances with tokio's (paused) time.
    pub fn paused(start: SystemTime) -> Self {
        let steps = watch::Sender::new(());
        Self(Source::Paused { start: Arc::new(Mutex::new(start)), at: Instant::now(), steps })
    }

    /// The time of day.
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
    pub fn now(&self) -> SystemTime {
        match &self.0 {
            Source::System => SystemTime::now(),
            Source::Paused { start, at, .. } => *start.lock().expect("no code panics while it holds it") + at.elapsed(),
        }
    }

    /// How long until `when`; zero when it has passed.
    pub fn until(&self, when: SystemTime) -> Duration {
        when.duration_since(self.now()).unwrap_or_default()
    }

    /// Watches for jumps from now on; call from within the runtime.
    pub fn jumps(&self) -> Jumps {
        Jumps(match &self.0 {
            Source::System => match timer() {
                Ok(timer) => Watched::System(timer),
                Err(error) => {
                    tracing::warn!(%error, "jumps of the clock will be noticed late");
                    Watched::Nothing
                }
            },
            Source::Paused { steps, .. } => Watched::Paused(steps.subscribe()),
        })
    }

    /// Sets a paused clock forward, as a machine that slept finds it.
    #[cfg(any(test, feature = "testing"))]
    pub fn step(&self, by: Duration) {
        let Source::Paused { start, steps, .. } = &self.0 else { panic!("only a paused clock can be set") };
        *start.lock().expect("no code panics while it holds it") += by;
        steps.send_replace(());
    }
}

impl Jumps {
    /// Waits for the next jump. Cancel safe.
    pub async fn next(&mut self) {
        match &mut self.0 {
            Watched::System(timer) => loop {
                let Ok(mut ready) = timer.readable().await else { return std::future::pending().await };
                let read = ready.try_io(|timer| Ok(rustix::io::read(timer, &mut [0; 8])?));
                match read {
                    Ok(Err(error)) if error.raw_os_error() == Some(Errno::CANCELED.raw_os_error()) => return,
                    Ok(_) => ready.clear_ready(),
                    Err(_would_block) => {}
                }
            },
            Watched::Nothing => std::future::pending().await,
            Watched::Paused(steps) => {
                if steps.changed().await.is_err() {
                    std::future::pending().await
                }
            }
        }
    }
}

/// A timer that never comes, and whose wait the kernel cancels when the clock jumps (timerfd_create(2),
/// TFD_TIMER_CANCEL_ON_SET).
#[allow(unsafe_code)]
fn timer() -> std::io::Result<AsyncFd<OwnedFd>> {
    /// 2100-01-01, far enough; the kernel accepts no "never".
    const NEVER: Timespec = Timespec { tv_sec: 4_102_444_800, tv_nsec: 0 };
    let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
    let never = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: NEVER };
    timerfd_settime(&timer, TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET, &never)?;
    // SAFETY: an `OwnedFd` is one open descriptor, and stays so until the `AsyncFd` that owns it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_paused_clock_advances_with_paused_time_and_tells_of_its_steps() {
        let clock = Clock::paused(SystemTime::UNIX_EPOCH);
        let mut jumps = clock.jumps();
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(tokio::time::timeout(Duration::from_secs(1), jumps.next()).await.is_err(), "passing is no jump");
        clock.step(Duration::from_secs(100));
        jumps.next().await;
        assert_eq!(clock.now(), SystemTime::UNIX_EPOCH + Duration::from_secs(106));
    }

    #[tokio::test]
    async fn the_kernel_gives_a_timer_that_a_jump_would_cancel_and_passing_time_does_not() {
        let mut jumps = Clock::system().jumps();
        assert!(matches!(jumps.0, Watched::System(_)));
        assert!(tokio::time::timeout(Duration::from_millis(20), jumps.next()).await.is_err());
    }
}
