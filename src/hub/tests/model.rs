//! The hub under any order of events, drawn from a seed.

use std::{collections::HashMap, time::Duration};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::time::{sleep, timeout};

use super::{Bench, policy, unavailable};
use crate::hub::{Event, FLIGHT_TIMEOUT, LINGER, Subscription};

/// Followers come and go while the signer fails, policies change and hours pass. Whatever happens: at most one flight a
/// certificate (the signer asserts it), sequences grow, no certificate ends before one that was shown earlier, nothing
/// follows a denial, and no certificate is shown that the policies in force refuse.
#[tokio::test(start_paused = true)]
async fn whatever_happens_no_follower_sees_an_older_certificate_or_anything_after_a_denial() {
    const SEEDS: u64 = 12;
    const STEPS: usize = 150;
    for seed in 0..SEEDS {
        let bench = Bench::with_rates(50, 1_000_000);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut followers: HashMap<usize, Follower> = HashMap::new();
        for step in 0..STEPS {
            match rng.random_range(0..10) {
                0..4 => {
                    let (uid, name) = (rng.random_range(1..4), format!("n{}.example.org", rng.random_range(0..4)));
                    if let Ok(subscription) = bench.subscribe(uid, &name).await {
                        followers.insert(step, Follower::new(subscription));
                    }
                }
                4 => drop(followers.keys().next().copied().and_then(|key| followers.remove(&key))),
                5 => bench.fail(rng.random_bool(0.5).then(unavailable)),
                6 if rng.random_bool(0.3) => {
                    let names = if rng.random_bool(0.3) { "n0.example.org" } else { "*.example.org" };
                    bench.policies.send_replace(policy(&[names]));
                }
                _ => sleep(Duration::from_secs(rng.random_range(1..1800))).await,
            }
            for follower in followers.values_mut() {
                follower.drain(seed).await;
            }
        }
        drop(followers);
        bench.fail(None);
        sleep(LINGER + FLIGHT_TIMEOUT).await;
        assert!(bench.hub.lock().is_clean(), "seed {seed}: everything is forgotten in the end");
        bench.stop.cancel();
    }
}

struct Follower {
    subscription: Subscription,
    sequence: u64,
    not_after: std::time::SystemTime,
    over: bool,
}

impl Follower {
    fn new(subscription: Subscription) -> Self {
        Self { subscription, sequence: 0, not_after: std::time::SystemTime::UNIX_EPOCH, over: false }
    }

    async fn drain(&mut self, seed: u64) {
        while let Ok(event) = timeout(Duration::ZERO, self.subscription.next()).await {
            if self.over {
                assert!(matches!(event, Event::Denied(..) | Event::Ended(_)), "seed {seed}: {event:?} after the end");
                return;
            }
            if let Some(sequence) = event.sequence() {
                assert!(sequence > self.sequence, "seed {seed}: {event:?} after {}", self.sequence);
                self.sequence = sequence;
            }
            match event {
                Event::Certificate(_, live) => {
                    assert!(live.credential.not_after() >= self.not_after, "seed {seed}: an older certificate");
                    self.not_after = live.credential.not_after();
                }
                Event::Denied(..) | Event::Ended(_) => self.over = true,
                _ => {}
            }
        }
    }
}
