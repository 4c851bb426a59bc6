//! Turns: a neighbour's renewal is in time whatever others ask for, and nobody waits for ever.

use std::ops::Range;

use tokio::time::Instant;

use super::*;
use crate::hub::queue::{PRESSING_AFTER, PRINCIPAL_SHARE};

/// The cluster's rate of all signers.
const ALL: Rate = Rate { per_second: NonZeroU32::new(25).unwrap(), burst: NonZeroU32::new(110).unwrap() };
/// A rate of one principal that is no bound at all beside it.
const NO_BOUND: Rate = Rate { per_second: NonZeroU32::new(50).unwrap(), burst: NonZeroU32::new(500).unwrap() };
/// The shortest lifetime over the API server.
const TEN_MINUTES: Duration = Duration::from_secs(600);
const PRINCIPALS: u32 = 1000;
/// The neighbour of them all.
const NEIGHBOUR: u32 = 5000;

/// Lets those users have any name of `example.org`, for `lifetime`.
fn lasting(users: Range<u32>, lifetime: &str) -> Arc<PolicySet> {
    let users: Vec<_> = users.chain([NEIGHBOUR]).collect();
    let sources = users.chunks(64).enumerate().map(|(n, users)| Source {
        origin: format!("test-{n}"),
        text: format!(
            "apiVersion: csrd.dev/v1alpha1\nkind: CertificatePolicy\nmetadata: {{name: test-{n}}}\n\
             spec: {{match: {{unix: {{uids: {users:?}}}}}, allow: {{dnsNames: ['*.example.org'], lifetime: {{min: 1s, default: {lifetime}}}}}}}\n"
        ),
    });
    Arc::new(PolicySet::parse(&sources.collect::<Vec<_>>(), EMBEDDED).expect("the policy is valid"))
}

/// Asks for new certificates without pause.
async fn ask_without_pause(hub: Hub, uid: u32) {
    loop {
        let asked = hub.issue(Arc::new(Workload::of_uid(uid)), ask("flood.example.org"), None, Arc::new(|_| {})).await;
        if let Err(HubError::RateLimited { retry_after }) = asked {
            sleep(retry_after).await;
        }
    }
}

/// Renewals of `follower` until `until`, none of them late and none told to be.
async fn renewed_in_time(bench: &Bench, follower: &mut Subscription, until: SystemTime) -> usize {
    let (mut renewals, mut not_after) = (0, certificate(follower.next().await).credential.not_after());
    while not_after < until {
        let live = certificate(follower.next().await);
        let now = bench.clock.now();
        assert!(now < not_after, "late by {:?}", now.duration_since(not_after));
        (renewals, not_after) = (renewals + 1, live.credential.not_after());
    }
    renewals
}

#[tokio::test(start_paused = true)]
async fn a_neighbours_renewal_is_never_late_beside_one_principal_with_sixteen_calls_under_way() {
    let bench = Bench::with(ALL, NO_BOUND);
    bench.policies.send_replace(lasting(1..2, "10s"));
    let mut neighbour = bench.subscribe(NEIGHBOUR, "a.example.org").await.unwrap();
    // A cluster takes some 40 ms for one.
    *bench.signer.delay.lock().unwrap() = Duration::from_millis(40);
    let flood: Vec<_> = (0..16).map(|_| tokio::spawn(ask_without_pause(bench.hub.clone(), 1))).collect();
    let until = bench.clock.now() + Duration::from_secs(60);
    let renewed = timeout(Duration::from_secs(120), renewed_in_time(&bench, &mut neighbour, until)).await;
    assert!(renewed.expect("it is not starved") >= 8);
    flood.iter().for_each(JoinHandle::abort);
}

#[tokio::test(start_paused = true)]
async fn a_neighbours_renewal_is_never_late_beside_a_thousand_principals_that_ask_without_pause() {
    let bench = Bench::with(ALL, NO_BOUND);
    bench.policies.send_replace(lasting(1..1 + PRINCIPALS, "10m"));
    let mut neighbour = bench.subscribe(NEIGHBOUR, "a.example.org").await.unwrap();
    // They come just before its renewal.
    sleep(TEN_MINUTES.mul_f64(RENEW_WINDOW.0) - Duration::from_secs(1)).await;
    let flood: Vec<_> = (1..=PRINCIPALS).map(|uid| tokio::spawn(ask_without_pause(bench.hub.clone(), uid))).collect();
    let until = bench.clock.now() + TEN_MINUTES / 2;
    let renewed = timeout(TEN_MINUTES, renewed_in_time(&bench, &mut neighbour, until)).await;
    assert_eq!(renewed.expect("it is not starved"), 1);
    flood.iter().for_each(JoinHandle::abort);
}

/// A queue by itself: flights take no time, and what was served is put back by a script.
struct Counter {
    queue: Queue,
    began: Instant,
}

fn of(principal: u64) -> Principal {
    Principal::user(u32::try_from(principal).unwrap())
}

impl Counter {
    fn new(all: Rate) -> Self {
        Self { queue: Queue::new(all), began: Instant::now() }
    }

    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000) + self.began.elapsed()
    }

    /// Puts in one flight of `principal`, by whose number it is known.
    fn push(&mut self, principal: u64, turn: Turn) {
        self.queue.push(of(principal), turn, principal.into());
    }

    fn asks(&mut self, principal: u64) {
        self.push(principal, Turn::AskedNow);
    }

    /// A renewal that presses already.
    fn presses(&mut self, principal: u64) {
        let now = self.now();
        self.push(principal, Turn::Renewal(now));
    }

    /// The next principal that is served, once there is a token.
    async fn next(&mut self) -> u64 {
        loop {
            match self.queue.pop(self.now()) {
                Ok(Some(id)) => {
                    let principal = u64::try_from(id).unwrap();
                    self.queue.landed(of(principal));
                    return principal;
                }
                Ok(None) => panic!("nothing waits"),
                Err(wait) => sleep(wait).await,
            }
        }
    }
}

/// What one of the thousand puts in again whenever it was served, and at first.
type Habit = fn(&mut Counter, u64);

#[tokio::test(start_paused = true)]
async fn a_renewal_waits_for_one_turn_of_each_principal_in_either_lane_and_no_more() {
    const ASKS: Habit = Counter::asks;
    const PRESSES: Habit = Counter::presses;
    // Drawn at the end of the window, of the shortest lifetime.
    let left = TEN_MINUTES.mul_f64(1.0 - RENEW_WINDOW.1);
    let bound = Duration::from_secs(u64::from(2 * PRINCIPALS)) / ALL.per_second.get();
    assert!(bound < left, "{bound:?} of {left:?}");
    type Habits = fn(u64) -> Habit;
    let rows: [(&str, Habits); 4] = [
        ("all ask", |_| ASKS),
        ("all renew in a hurry", |_| PRESSES),
        ("half and half", |principal| if principal % 2 == 0 { ASKS } else { PRESSES }),
        ("one renews in a hurry", |principal| if principal == 1 { PRESSES } else { ASKS }),
    ];
    for (row, habit) in rows {
        let mut counter = Counter::new(ALL);
        for principal in 1..=u64::from(PRINCIPALS) {
            // Its next one stands behind the first, so that its line never ends.
            habit(principal)(&mut counter, principal);
            habit(principal)(&mut counter, principal);
        }
        for _ in 0..10 {
            let (due, neighbour) = (counter.now(), u64::from(NEIGHBOUR));
            counter.push(neighbour, Turn::Renewal(due + left.mul_f64(PRESSING_AFTER)));
            loop {
                let served = counter.next().await;
                if served == neighbour {
                    break;
                }
                habit(served)(&mut counter, served);
            }
            let waited = counter.now().duration_since(due).unwrap();
            assert!(waited <= bound, "{row}: {waited:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn pressing_renewals_and_turns_alternate_while_both_wait() {
    for (asking, pressing) in [(2, 2), (1000, 2), (2, 1000)] {
        let mut counter = Counter::new(rate(1000));
        (0..asking).for_each(|principal| counter.asks(principal));
        (asking..asking + pressing).for_each(|principal| counter.presses(principal));
        let mut asked = 0;
        for _ in 0..1000 {
            let served = counter.next().await;
            if served < asking {
                asked += 1;
                counter.asks(served);
            } else {
                counter.presses(served);
            }
        }
        assert!((499..=501).contains(&asked), "{asked} of 1000 turns beside {pressing} in a hurry");
    }
}

#[tokio::test(start_paused = true)]
async fn a_pressing_renewal_goes_before_what_its_own_principal_asks_for_and_another_one_after_it() {
    let mut counter = Counter::new(rate(1000));
    let now = counter.now();
    let (pressing, asked, calm) = (1, 2, 3);
    counter.queue.push(of(7), Turn::Renewal(now + HOUR), calm);
    counter.queue.push(of(7), Turn::AskedNow, asked);
    counter.queue.push(of(7), Turn::Renewal(now), pressing);
    for expected in [pressing, asked, calm] {
        assert_eq!(counter.queue.pop(now), Ok(Some(expected)));
    }
    assert_eq!(counter.queue.pop(now), Ok(None));
}

#[tokio::test(start_paused = true)]
async fn one_principal_has_its_share_of_tokens_and_leaves_the_others_to_its_neighbours() {
    let mut counter = Counter::new(ALL);
    let share = u64::from(ALL.burst.get() / PRINCIPAL_SHARE);
    (0..2 * share).for_each(|_| counter.asks(1));
    for _ in 0..share {
        assert_eq!(counter.next().await, 1);
    }
    assert_eq!(counter.began.elapsed(), Duration::ZERO, "its burst");
    let wait = counter.queue.pop(counter.now()).expect_err("one past its burst");
    let each = Duration::from_secs(1) / (ALL.per_second.get() / PRINCIPAL_SHARE);
    assert!(wait <= each && !wait.is_zero(), "{wait:?}");
    counter.asks(2);
    assert_eq!(counter.queue.pop(counter.now()), Ok(Some(2)), "a neighbour needs not wait");
    counter.queue.landed(of(2));
    for _ in 0..share {
        counter.next().await;
    }
    let took = counter.began.elapsed();
    assert!(took >= each * u32::try_from(share - 1).unwrap(), "{share} more in {took:?}");
    assert!(counter.queue.is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_last_places_are_for_principals_that_have_none_under_way() {
    let mut counter = Counter::new(rate(1_000_000));
    let now = counter.now();
    let many = u64::try_from(MAX_FLIGHTS / MAX_FLIGHTS_PER_PRINCIPAL).unwrap();
    for principal in 0..many {
        (0..MAX_FLIGHTS_PER_PRINCIPAL).for_each(|_| counter.asks(principal));
    }
    let fly = |counter: &mut Counter| std::iter::from_fn(|| counter.queue.pop(now).unwrap()).count();
    assert_eq!(fly(&mut counter), MAX_FLIGHTS - FIRST_PLACES, "slow flights of a few take no more");
    let newcomers = u64::try_from(FIRST_PLACES).unwrap();
    (100..100 + newcomers).for_each(|principal| counter.asks(principal));
    assert_eq!(fly(&mut counter), FIRST_PLACES, "each newcomer has its first place at once");
    counter.asks(200);
    assert_eq!(fly(&mut counter), 0, "one past them all");
    counter.queue.landed(of(0));
    assert_eq!(counter.queue.pop(now), Ok(Some(200)), "and the next place that is free is the newcomer's");
}

/// A bench whose neighbour has a certificate of a minute and all its places taken from before the renewal is due, by
/// flights that take almost a minute themselves.
async fn bench_without_a_place() -> (Bench, Subscription, Live) {
    let bench = Bench::new();
    bench.policies.send_replace(lasting(1..2, "60s"));
    let mut neighbour = bench.subscribe(NEIGHBOUR, "a.example.org").await.unwrap();
    let first = certificate(neighbour.next().await);
    sleep(Duration::from_secs(20)).await;
    *bench.signer.delay.lock().unwrap() = Duration::from_secs(45);
    for n in 0..MAX_FLIGHTS_PER_PRINCIPAL {
        let (hub, name) = (bench.hub.clone(), format!("slow{n}.example.org"));
        tokio::spawn(
            async move { hub.subscribe(Arc::new(Workload::of_uid(NEIGHBOUR)), ask(&name), None).await.map(drop) },
        );
    }
    sleep(Duration::from_millis(1)).await;
    *bench.signer.delay.lock().unwrap() = Duration::from_millis(10);
    (bench, neighbour, first)
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_waits_too_long_for_its_turn_is_told_once_and_no_longer_when_it_has_come() {
    let (bench, mut neighbour, first) = bench_without_a_place().await;
    let Event::Delayed(_, delay, live) = neighbour.next().await else { panic!("a delay was expected") };
    assert_eq!((delay.reason, delay.queued), ("RENEWAL_QUEUED", true));
    assert_eq!(live.credential.chain().serial_hex(), first.credential.chain().serial_hex());
    let (now, not_after) = (bench.clock.now(), first.credential.not_after());
    // Half of what was left when it was due, and half of that again.
    let left = not_after.duration_since(now).unwrap().as_secs_f64();
    let had = not_after.duration_since(first.renew_at).unwrap().as_secs_f64();
    assert!((had / left - 4.0).abs() < 0.1, "{left} s of {had} s are left");
    assert!(bench.hub.0.metrics.encode().contains("csrd_renewals_waiting 1"));
    assert!(delay.retry_at > now && delay.retry_at <= now + FLIGHT_TIMEOUT + Duration::from_secs(1));
    let second = certificate(neighbour.next().await);
    assert!(second.delay.is_none() && second.issued > first.issued, "told once, then renewed");
    assert!(bench.clock.now() <= delay.retry_at, "as told");
    assert!(bench.hub.0.metrics.encode().contains("csrd_renewals_waiting 0"));
}

#[tokio::test(start_paused = true)]
async fn whoever_joins_a_credential_whose_renewal_still_waits_after_its_end_waits_with_it() {
    let (bench, _neighbour, first) = bench_without_a_place().await;
    sleep(first.credential.not_after().duration_since(bench.clock.now()).unwrap()).await;
    let mut joined = bench.subscribe(NEIGHBOUR, "a.example.org").await.expect("nothing has failed");
    assert!(certificate(joined.next().await).credential.not_after() > bench.clock.now());
}
