//! What one principal may hold and how fast it may ask, at each bound and one past it, and that nobody else waits for it.

use futures_util::FutureExt as _;

use super::*;

#[tokio::test(start_paused = true)]
async fn the_longest_idle_entry_makes_room_for_a_new_one() {
    let bench = Bench::new();
    let mut ids = Vec::new();
    for n in 0..=MAX_IDLE_PER_PRINCIPAL {
        ids.push(bench.subscribe(1, &format!("n{n}.example.org")).await.unwrap().id());
    }
    let workload = Workload::of_uid(1);
    bench.subscribe(1, "one-past.example.org").await.unwrap();
    assert!(bench.hub.resume(&workload, &ids[0], 0).await.unwrap().is_none(), "the first to be idle is gone");
    assert!(bench.hub.resume(&workload, &ids[2], 0).await.unwrap().is_some(), "the others are not");
}

#[tokio::test(start_paused = true)]
async fn what_is_given_up_by_its_followers_is_bounded_at_once() {
    let bench = Bench::new();
    let mut held = Vec::new();
    for n in 0..=MAX_IDLE_PER_PRINCIPAL {
        held.push(bench.subscribe(1, &format!("n{n}.example.org")).await.unwrap());
    }
    held.clear();
    assert_eq!(bench.hub.lock().entries.len(), MAX_IDLE_PER_PRINCIPAL, "without waiting for another to be taken in");
    assert_eq!(bench.hub.0.metrics.credentials.get(), MAX_IDLE_PER_PRINCIPAL as i64);
    sleep(LINGER + Duration::from_secs(1)).await;
    assert_eq!(bench.hub.0.metrics.credentials.get(), 0, "the gauge follows the last ones too");
}

#[tokio::test(start_paused = true)]
async fn a_principal_may_hold_so_many_entries_and_not_one_more() {
    let bench = Bench::with_limits(Limits { entries_per_principal: 3, ..Limits::default() });
    let mut held = Vec::new();
    for n in 0..3 {
        held.push(bench.subscribe(1, &format!("n{n}.example.org")).await.unwrap());
    }
    let error = bench.subscribe(1, "one-past.example.org").await.expect_err("one past the bound");
    let words = "3 credentials are held by this workload's user, at most 3; close streams that are no longer needed";
    assert_eq!((error.reason(), error.to_string().as_str()), ("TOO_MANY_CREDENTIALS", words));
    bench.subscribe(2, "a.example.org").await.expect("another principal has its own bound");
    drop(held.pop());
    bench.subscribe(1, "one-past.example.org").await.expect("what nobody follows makes room");
}

#[tokio::test(start_paused = true)]
async fn when_all_entries_are_taken_the_largest_holder_gives_one_up_and_whoever_has_none_gets_a_first() {
    let bench = Bench::with_limits(Limits { entries: 3, entries_per_principal: 3, ..Limits::default() });
    let mut held = Vec::new();
    for n in 0..3 {
        held.push(bench.subscribe(1, &format!("n{n}.example.org")).await.unwrap());
    }
    // Its first event is its certificate.
    for subscription in &mut held {
        subscription.first().await.unwrap();
    }
    let first = bench.subscribe(2, "a.example.org").await.expect("whoever has none gets a first");
    let ends = held.iter_mut().map(|it| it.next().now_or_never()).filter_map(|event| match event {
        Some(Event::Ended(why)) => Some(why.reason()),
        _ => None,
    });
    assert_eq!(ends.collect::<Vec<_>>(), ["TOO_MANY_CREDENTIALS"], "one of the largest holder's, which is told why");
    let error = bench.subscribe(2, "b.example.org").await.expect_err("two and one is as even as three can be");
    let words = "3 credentials are held by all workloads together, at most 3; try again later";
    assert_eq!((error.reason(), error.to_string().as_str()), ("TOO_MANY_CREDENTIALS", words));
    drop(first);
    bench.subscribe(3, "a.example.org").await.expect("and so does the next");
}

#[tokio::test(start_paused = true)]
async fn one_principal_that_asks_too_fast_is_told_when_to_come_back_and_delays_nobody() {
    let bench = Bench::with_rates(1_000_000, 2);
    for name in ["a.example.org", "b.example.org"] {
        drop(bench.subscribe(1, name).await.unwrap());
    }
    let refused = bench.subscribe(1, "c.example.org").await.expect_err("one past the burst");
    let HubError::RateLimited { retry_after } = refused else { panic!("{refused}") };
    assert!(retry_after <= Duration::from_millis(500), "{retry_after:?}");
    bench.subscribe(2, "a.example.org").await.expect("another principal is not delayed");
    drop(bench.subscribe(1, "a.example.org").await.expect("what is at hand costs no token"));
    sleep(retry_after).await;
    bench.subscribe(1, "c.example.org").await.expect("as told");
}

#[tokio::test(start_paused = true)]
async fn after_a_clock_jump_renewals_pass_through_the_bucket_and_whoever_asks_goes_first() {
    const CREDENTIALS: usize = 60;
    let bench = Bench::with_rates(10, 1_000_000);
    let mut followed = Vec::new();
    for n in 0..CREDENTIALS {
        followed.push(bench.subscribe(1, &format!("n{n}.example.org")).await.unwrap());
    }
    let before = bench.calls();
    // Everything is due at once, as after a suspend, and the timers know nothing of it.
    bench.clock.step(HOUR.mul_f64(0.76));
    sleep(Duration::from_secs(1)).await;
    let in_a_second = bench.calls() - before;
    assert!(
        (4..=11).contains(&in_a_second),
        "{in_a_second} renewals in the first second of its half of 10/s, burst 10"
    );
    let began = bench.clock.now();
    bench.subscribe(2, "asked.example.org").await.unwrap();
    assert!(
        bench.clock.now().duration_since(began).unwrap() < Duration::from_millis(250),
        "the one who waits goes first"
    );
}

#[tokio::test(start_paused = true)]
async fn slow_flights_of_one_principal_delay_nobody_else() {
    const ASKED: usize = 100;
    let bench = Bench::new();
    *bench.signer.delay.lock().unwrap() = Duration::from_secs(1);
    let flood = (0..ASKED).map(|n| {
        let (hub, name) = (bench.hub.clone(), format!("n{n}.example.org"));
        tokio::spawn(async move { hub.subscribe(Arc::new(Workload::of_uid(1)), ask(&name), None).await.map(drop) })
    });
    let flood: Vec<_> = flood.collect();
    sleep(Duration::from_millis(10)).await;
    assert_eq!(bench.calls(), MAX_FLIGHTS_PER_PRINCIPAL, "so many at once and no more");
    let began = bench.clock.now();
    bench.subscribe(2, "a.example.org").await.expect("another principal");
    assert_eq!(bench.clock.now().duration_since(began).unwrap(), Duration::from_secs(1), "it did not wait");
    for asked in flood {
        asked.await.unwrap().expect("everyone is served in the end");
    }
}

#[tokio::test(start_paused = true)]
async fn so_many_flights_are_under_way_at_once_and_one_more_waits() {
    let bench = Bench::new();
    *bench.signer.delay.lock().unwrap() = Duration::from_secs(1);
    let ask_for = |n: usize, uid: usize| {
        let (hub, uid, name) = (bench.hub.clone(), u32::try_from(uid).unwrap(), format!("n{n}.example.org"));
        tokio::spawn(async move { hub.subscribe(Arc::new(Workload::of_uid(uid)), ask(&name), None).await.map(drop) })
    };
    // A few principals take all places but the last, and others those.
    let mut asked: Vec<_> = (0..MAX_FLIGHTS).map(|n| ask_for(n, 1 + n / MAX_FLIGHTS_PER_PRINCIPAL)).collect();
    sleep(Duration::from_millis(10)).await;
    assert_eq!(bench.calls(), MAX_FLIGHTS - FIRST_PLACES);
    asked.extend((0..=FIRST_PLACES).map(|n| ask_for(MAX_FLIGHTS + n, 20 + n)));
    sleep(Duration::from_millis(10)).await;
    assert_eq!(bench.calls(), MAX_FLIGHTS, "so many at once and no more");
    for asked in asked {
        asked.await.unwrap().expect("the last one had to wait");
    }
    assert_eq!(bench.calls(), MAX_FLIGHTS + FIRST_PLACES + 1);
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_too_long_is_told_so() {
    let bench = Bench::new();
    *bench.signer.delay.lock().unwrap() = FLIGHT_TIMEOUT - Duration::from_secs(1);
    let waiting: Vec<_> = (0..=2 * MAX_FLIGHTS_PER_PRINCIPAL)
        .map(|n| {
            let (hub, name) = (bench.hub.clone(), format!("n{n}.example.org"));
            tokio::spawn(async move { hub.subscribe(Arc::new(Workload::of_uid(1)), ask(&name), None).await.map(drop) })
        })
        .collect();
    let mut late = 0;
    for asked in waiting {
        if let Err(error) = asked.await.unwrap() {
            assert_eq!(error.reason(), "SIGNER_TIMEOUT");
            late += 1;
        }
    }
    assert!(late > MAX_FLIGHTS_PER_PRINCIPAL, "only the first round fits into the time: {late}");
}
