//! The owner of every long-lived task.
//!
//! A long-lived task runs until it is asked to stop. When one ends earlier, for whatever reason, something the process
//! promised is no longer done, so the process stops too and says which task it was: half a daemon is worse than a
//! restarted one. Stopping is bounded: tasks get a grace period, then they are aborted. Deliberately not here: tasks of
//! one connection or one call (their server owns those) and signal handling (main's).

use std::{collections::HashMap, convert::Infallible, error::Error, future::Future, time::Duration};

use tokio::{
    task::{Id, JoinError, JoinSet},
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;

type Cause = Box<dyn Error + Send + Sync>;

/// Long-lived tasks; dropping this aborts them.
#[derive(Debug)]
pub struct Tasks {
    stop: CancellationToken,
    running: JoinSet<Result<(), Cause>>,
    names: HashMap<Id, &'static str>,
}

/// Why the tasks did not end as asked.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// A task returned without having been asked to.
    #[error("task {0} ended without being asked to stop")]
    Ended(&'static str),
    /// A task gave up, before or while stopping.
    #[error("task {name} failed")]
    Failed {
        /// The task.
        name: &'static str,
        /// Its error.
        source: Cause,
    },
    /// A task panicked, before or while stopping; the panic hook has printed the message.
    #[error("task {0} panicked")]
    Panicked(&'static str),
    /// Tasks were still running at the end of the grace period and were aborted.
    #[error("aborted after {} s of grace: {}", grace.as_secs_f32(), names.join(", "))]
    Overran {
        /// How long they had.
        grace: Duration,
        /// The tasks, sorted.
        names: Vec<&'static str>,
    },
}

impl Tasks {
    /// No tasks yet. Each is expected to end soon after `stop` is cancelled, and not before.
    pub fn new(stop: CancellationToken) -> Self {
        Self { stop, running: JoinSet::new(), names: HashMap::new() }
    }

    /// Starts a task that cannot fail.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.try_spawn(name, async {
            task.await;
            Ok::<_, Infallible>(())
        });
    }

    /// Starts a task that may give up with an error.
    pub fn try_spawn<E: Into<Cause>>(
        &mut self,
        name: &'static str,
        task: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let handle = self.running.spawn(async { task.await.map_err(Into::into) });
        self.names.insert(handle.id(), name);
    }

    /// Runs until `stop` is cancelled or a task ends, then stops the others, waiting at most `grace` for them.
    ///
    /// # Errors
    /// The first thing that went wrong; `Ok` only when the stop was asked for and every task ended well in time.
    pub async fn run(mut self, grace: Duration) -> Result<(), TaskError> {
        let stop = self.stop.clone();
        let first = tokio::select! {
            // A task that ends in the moment of the stop has been asked to stop.
            biased;
            () = stop.cancelled() => Ok(()),
            Some((name, outcome)) = self.next() => outcome.and(Err(TaskError::Ended(name))),
        };
        stop.cancel();
        let drained = self.drain(grace).await;
        first.and(drained)
    }

    /// Waits for all tasks, which have been asked to stop, and aborts what is left after `grace`.
    async fn drain(&mut self, grace: Duration) -> Result<(), TaskError> {
        let deadline = Instant::now() + grace;
        let mut result = Ok(());
        loop {
            match timeout_at(deadline, self.next()).await {
                Ok(Some((_, outcome))) => result = result.and(outcome),
                Ok(None) => return result,
                Err(_) => break,
            }
        }
        let mut names: Vec<_> = self.names.values().copied().collect();
        names.sort_unstable();
        self.running.shutdown().await;
        result.and(Err(TaskError::Overran { grace, names }))
    }

    /// The next task to end, by name; `None` when there is none left.
    async fn next(&mut self) -> Option<(&'static str, Result<(), TaskError>)> {
        let ended = self.running.join_next_with_id().await?;
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let name = self.names.remove(&id).expect("every task is spawned with a name");
        let outcome = match ended {
            Ok((_, Ok(()))) => Ok(()),
            Ok((_, Err(source))) => Err(TaskError::Failed { name, source }),
            // Nobody else holds an abort handle, so a task that did not return has panicked.
            Err(_) => Err(TaskError::Panicked(name)),
        };
        Some((name, outcome))
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    const GRACE: Duration = Duration::from_secs(10);

    fn tasks() -> (Tasks, CancellationToken) {
        let stop = CancellationToken::new();
        (Tasks::new(stop.clone()), stop)
    }

    /// Runs until the end and checks the error's words, after making sure that everyone was asked to stop.
    async fn check(tasks: Tasks, stop: CancellationToken, expected: &str) {
        let error = tasks.run(GRACE).await.expect_err("the end of a long-lived task is an error");
        assert_eq!(error.to_string(), expected);
        assert!(stop.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn tasks_that_end_when_asked_end_well() {
        let (mut tasks, stop) = tasks();
        for name in ["hub", "server"] {
            tasks.spawn(name, stop.clone().cancelled_owned());
        }
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(1000)).await;
            stop.cancel();
        });
        let start = Instant::now();
        tasks.run(GRACE).await.unwrap();
        assert_eq!(start.elapsed(), Duration::from_secs(1000), "neither earlier nor after a grace period");
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_task_to_end_stops_the_others_and_is_named() {
        let (mut tasks, stop) = tasks();
        tasks.spawn("hub", stop.clone().cancelled_owned());
        tasks.spawn("policy", async {});
        check(tasks, stop, "task policy ended without being asked to stop").await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_task_is_named_and_keeps_its_cause() {
        let (mut tasks, stop) = tasks();
        tasks.try_spawn("server", async { Err("no descriptors left") });
        let error = tasks.run(GRACE).await.unwrap_err();
        assert_eq!(error.to_string(), "task server failed");
        assert_eq!(error.source().unwrap().to_string(), "no descriptors left");
        assert!(stop.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn a_panicked_task_is_named() {
        let (mut tasks, stop) = tasks();
        tasks.spawn("hub", pending());
        tasks.spawn("attest", async { panic!("on purpose") });
        check(tasks, stop, "task attest panicked").await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_while_stopping_is_not_lost() {
        let (mut tasks, stop) = tasks();
        let stopping = stop.clone();
        tasks.spawn("hub", async move {
            stopping.cancelled().await;
            panic!("on purpose");
        });
        stop.cancel();
        check(tasks, stop, "task hub panicked").await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_does_not_stop_is_aborted_after_the_grace_period_and_named() {
        let (mut tasks, stop) = tasks();
        let held = std::sync::Arc::new(());
        let inside = held.clone();
        tasks.spawn("server", async move {
            let _inside = inside;
            pending().await
        });
        tasks.spawn("hub", pending());
        tasks.spawn("policy", stop.clone().cancelled_owned());
        stop.cancel();
        let start = Instant::now();
        check(tasks, stop, "aborted after 10 s of grace: hub, server").await;
        assert_eq!(start.elapsed(), GRACE);
        assert_eq!(std::sync::Arc::strong_count(&held), 1, "the aborted future was dropped");
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_may_use_its_grace_period() {
        let (mut tasks, stop) = tasks();
        let stopping = stop.clone();
        tasks.spawn("server", async move {
            stopping.cancelled().await;
            tokio::time::sleep(GRACE - Duration::from_millis(1)).await;
        });
        stop.cancel();
        tasks.run(GRACE).await.unwrap();
    }
}
