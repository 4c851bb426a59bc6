//! The hub under any order of events, drawn from a seed.

use std::{collections::HashMap, time::Duration};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::time::{sleep, timeout};

use super::{Bench, ask, policy, unavailable};
use crate::{
    attest::Workload,
    hub::{Event, FLIGHT_TIMEOUT, Hub, LINGER, Live, Subscription},
};

/// Followers come and go while the signer fails, policies change and hours pass. Whatever happens: at most one flight a
/// certificate (the signer asserts it), sequences grow, no certificate ends before one that was shown earlier, nothing
/// follows a denial, and each certificate has the names that the policies in force grant when it is shown, and no other.
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
                        followers.insert(step, Follower::new(subscription, uid, name));
                    }
                }
                4 => drop(followers.keys().next().copied().and_then(|key| followers.remove(&key))),
                5 => bench.fail(rng.random_bool(0.5).then(unavailable)),
                6 if rng.random_bool(0.3) => {
                    let names = if rng.random_bool(0.3) { "n0.example.org" } else { "*.example.org" };
                    bench.policies.send_replace(policy(&[names]));
                    // The hub hears of it, while flights are under way and followers have not read their last event.
                    sleep(Duration::from_millis(rng.random_range(1..30))).await;
                }
                _ => sleep(Duration::from_secs(rng.random_range(1..1800))).await,
            }
            for follower in followers.values_mut() {
                follower.drain(&bench.hub, seed).await;
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
    uid: u32,
    /// What it asked for.
    name: String,
}

impl Follower {
    fn new(subscription: Subscription, uid: u32, name: String) -> Self {
        Self { subscription, sequence: 0, not_after: std::time::SystemTime::UNIX_EPOCH, over: false, uid, name }
    }

    /// That the policies in force grant what is shown, by the names in the certificate itself.
    fn judge(&self, hub: &Hub, live: &Live, seed: u64) {
        let decided = policy::decide(&hub.policies(), &Workload::of_uid(self.uid), &ask(&self.name));
        let granted = decided.unwrap_or_else(|denial| panic!("seed {seed}: shown, and {denial}"));
        let chain = live.credential.chain();
        let (_, leaf) = x509_parser::parse_x509_certificate(chain.leaf_der()).expect("a certificate");
        let names = leaf.subject_alternative_name().expect("it is well-formed").expect("it has names");
        let names: Vec<_> = names.value.general_names.iter().map(ToString::to_string).collect();
        assert_eq!(names, [format!("DNSName({})", self.name)], "seed {seed}");
        assert_eq!(granted.names().dns, ask(&self.name).names.dns, "seed {seed}");
    }

    async fn drain(&mut self, hub: &Hub, seed: u64) {
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
                    self.judge(hub, &live, seed);
                    assert!(live.credential.not_after() >= self.not_after, "seed {seed}: an older certificate");
                    self.not_after = live.credential.not_after();
                }
                Event::Denied(..) | Event::Ended(_) => self.over = true,
                _ => {}
            }
        }
    }
}
