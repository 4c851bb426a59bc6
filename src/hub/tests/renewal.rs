//! Renewals in time, and what becomes of those that fail.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_certificate_is_renewed_within_its_window_and_the_old_one_never_comes_back() {
    let bench = Bench::new();
    let began = bench.clock.now();
    let mut subscription = bench.subscribe(1, "a.example.org").await.unwrap();
    let first = certificate(subscription.next().await);
    let second = certificate(subscription.next().await);
    let renewed_after = bench.clock.now().duration_since(began).unwrap();
    let (earliest, latest) = (HOUR.mul_f64(RENEW_WINDOW.0), HOUR.mul_f64(RENEW_WINDOW.1) + Duration::from_secs(1));
    assert!((earliest..=latest).contains(&renewed_after), "{renewed_after:?}");
    assert!(second.issued > first.issued && second.credential.not_after() > first.credential.not_after());
}

#[tokio::test(start_paused = true)]
async fn a_failed_renewal_keeps_the_certificate_says_so_and_is_tried_again_before_the_end() {
    let bench = Bench::new();
    let mut subscription = bench.subscribe(1, "a.example.org").await.unwrap();
    let first = certificate(subscription.next().await);
    bench.fail(Some(unavailable()));
    let Event::Delayed(_, delay, live) = subscription.next().await else { panic!("a delay was expected") };
    assert_eq!(live.credential.chain().serial_hex(), first.credential.chain().serial_hex());
    assert_eq!(delay.reason, "CA_NOT_VALID");
    assert!(delay.retry_at < live.credential.not_after(), "the retry comes before the end");
    bench.fail(None);
    let second = certificate(subscription.next().await);
    assert!(bench.clock.now() < first.credential.not_after(), "renewed while the old one was valid");
    assert!(second.delay.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_signer_that_asks_to_be_left_alone_is_but_no_longer_than_the_certificate_lives() {
    let bench = Bench::new();
    let mut subscription = bench.subscribe(1, "a.example.org").await.unwrap();
    certificate(subscription.next().await);
    let busy = |seconds| {
        let source = kubernetes::ApiError::Throttled { retry_after: Duration::from_secs(seconds) };
        Some(SignError::Kubernetes(kubernetes::KubernetesError::Api { action: "create", source }))
    };
    bench.fail(busy(60));
    let Event::Delayed(_, delay, _) = subscription.next().await else { panic!("a delay was expected") };
    assert!(delay.retry_at >= bench.clock.now() + Duration::from_secs(60));
    bench.fail(busy(100_000));
    let Event::Delayed(_, delay, live) = subscription.next().await else { panic!("a delay was expected") };
    assert_eq!(delay.retry_at, live.credential.not_after());
}

#[tokio::test(start_paused = true)]
async fn a_signer_that_stays_away_costs_a_bounded_number_of_tries_and_the_expired_certificate_is_not_served() {
    let bench = Bench::new();
    let mut subscription = bench.subscribe(1, "a.example.org").await.unwrap();
    let first = certificate(subscription.next().await);
    bench.fail(Some(unavailable()));
    while bench.clock.now() <= first.credential.not_after() {
        let Event::Delayed(..) = subscription.next().await else { panic!("only delays were expected") };
    }
    assert!(bench.calls() < 40, "{} tries in the last half of an hour", bench.calls());
    let refused = bench.subscribe(1, "a.example.org").await.expect_err("the only certificate has expired");
    assert_eq!(refused.reason(), "CERTIFICATE_EXPIRED");
    bench.fail(None);
    assert!(certificate(subscription.next().await).credential.not_after() > bench.clock.now());
}

#[tokio::test(start_paused = true)]
async fn a_first_issuance_that_fails_says_why_and_leaves_nothing_behind() {
    let bench = Bench::new();
    bench.fail(Some(unavailable()));
    let error = bench.subscribe(1, "a.example.org").await.expect_err("the signer is away");
    assert_eq!(error.reason(), "CA_NOT_VALID");
    assert!(bench.hub.lock().entries.is_empty());
    bench.fail(None);
    bench.subscribe(1, "a.example.org").await.expect("the next try is a new one");
}

#[tokio::test(start_paused = true)]
async fn a_signer_that_never_answers_is_given_up_after_the_flight_timeout() {
    let bench = Bench::new();
    *bench.signer.delay.lock().unwrap() = 2 * FLIGHT_TIMEOUT;
    let began = bench.clock.now();
    assert_eq!(bench.subscribe(1, "a.example.org").await.expect_err("no answer").reason(), "SIGNER_TIMEOUT");
    assert_eq!(bench.clock.now().duration_since(began).unwrap(), FLIGHT_TIMEOUT);
}
