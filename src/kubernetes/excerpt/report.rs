//! What is said of objects beyond their bounds: one line of each sort within a time, whoever makes how many.

use std::sync::Mutex;

use tokio::time::{Duration, Instant};

/// Of one sort of objects beyond a bound, one is logged within this time, with the number of the others.
pub const SAID_EVERY: Duration = Duration::from_secs(60);

/// Logs that an object counts as nothing, for the bound that it is beyond; not more often than [`SAID_EVERY`] for one sort
/// of objects.
pub fn report(sort: &'static str, namespace: &str, name: &str, bound: &str) {
    static SAID: Mutex<Vec<(&'static str, Instant, u64)>> = Mutex::new(Vec::new());
    let mut said = SAID.lock().expect("no code panics while it holds this");
    let now = Instant::now();
    let others = match said.iter_mut().find(|(before, ..)| *before == sort) {
        Some((_, at, others)) if now - *at < SAID_EVERY => {
            *others += 1;
            return;
        }
        Some((_, at, others)) => {
            *at = now;
            std::mem::take(others)
        }
        None => {
            said.push((sort, now, 0));
            0
        }
    };
    drop(said);
    tracing::warn!(sort, ?namespace, ?name, others, "beyond a bound, and counts as nothing: {bound}");
}
