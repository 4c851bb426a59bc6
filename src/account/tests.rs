//! The account's rules, each at its bound and one past it.

use futures_util::FutureExt as _;

use super::*;

const ONE: Principal = Principal::user(1);
const TWO: Principal = Principal::user(2);
const OWN_UID: u32 = 900;

fn limits() -> Limits {
    Limits {
        connections: 3,
        connections_per_principal: 3,
        bytes: 100 * CONNECTION_BYTES,
        bytes_per_principal: 100 * CONNECTION_BYTES,
        streams_per_principal: 1,
        arriving_per_principal: 1,
        entries: 2,
        entries_per_principal: 2,
        refusals_burst: 2,
    }
}

fn account(limits: Limits) -> Account {
    Account::new(limits, OWN_UID, &Metrics::new())
}

fn is_given_up(seat: &Seat) -> bool {
    seat.given_up().now_or_never().is_some()
}

/// Nothing is remembered of those that left.
fn check_clean(account: &Account) {
    let books = account.lock();
    let clean = books.seats.is_empty() && books.ledgers.iter().all(|it| it.held == 0 && it.holders.is_empty());
    drop(books);
    assert!(clean);
}

#[test]
fn places_are_given_up_to_each_bound_and_come_back_when_dropped() {
    let account = account(Limits { connections_per_principal: 2, ..limits() });
    let first = account.seat(ONE).expect("the first of two");
    let second = account.seat(ONE).expect("the second of two");
    assert_eq!(account.seat(ONE).unwrap_err(), Full::Own { held: 2, max: 2 }, "one past the principal's bound");
    drop(first);
    let third = account.seat(ONE).expect("one came back");
    let call = second.call().expect("the only one");
    assert_eq!(third.call().unwrap_err(), (Kind::Calls, Full::Own { held: 1, max: 1 }), "on whichever connection");
    let other = account.seat(TWO).expect("another principal has its own");
    drop(other.call().expect("calls too"));
    let arriving = account.take(Kind::Arriving, ONE).expect("the only one");
    assert!(account.take(Kind::Arriving, ONE).is_err() && account.take(Kind::Arriving, TWO).is_ok());
    drop((second, third, call, arriving, other));
    check_clean(&account);
}

#[tokio::test(start_paused = true)]
async fn when_all_connections_are_taken_the_largest_holder_gives_up_its_idlest() {
    let account = account(limits());
    let greedy: Vec<_> = (0..3).map(|_| account.seat(ONE).expect("there is room")).collect();
    let call = greedy[0].call().unwrap();
    tokio::time::sleep(FRESH_FOR).await;
    let newcomer = account.seat(TWO).expect("one of another's three");
    let ended: Vec<_> = greedy.iter().map(|seat| is_given_up(seat)).collect();
    assert_eq!(ended, [false, true, false], "the oldest without a call");
    assert_eq!(account.seat(TWO).unwrap_err(), Full::All { held: 3, max: 3 }, "two and one is as even as can be");
    assert!(matches!(account.seat(ONE), Err(Full::All { .. })), "the largest holder takes nothing back");
    assert!(!is_given_up(&newcomer));
    drop((greedy, call, newcomer));
    check_clean(&account);
}

#[tokio::test(start_paused = true)]
async fn whoever_has_nothing_gets_a_first_place_from_the_idlest_of_those_that_hold_one() {
    let account = account(limits());
    let mut seats = Vec::new();
    for uid in 1..=3 {
        seats.push(account.seat(Principal::user(uid)).unwrap());
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    // The first one speaks, and so is not the idlest any more.
    drop(seats[0].call().unwrap());
    let _newcomer = account.seat(Principal::user(4)).expect("a first place");
    let ended: Vec<_> = seats.iter().map(|seat| is_given_up(seat)).collect();
    assert_eq!(ended, [false, true, false]);
}

#[test]
fn root_and_the_agents_user_have_places_of_their_own_and_nobody_else_has() {
    for uid in [0, OWN_UID] {
        let account = account(Limits { connections: 2, connections_per_principal: 1, ..limits() });
        let others: Vec<_> = (1..=2).map(|uid| account.seat(Principal::user(uid)).unwrap()).collect();
        let operator = account.seat(Principal::user(uid)).expect("a place of its own");
        assert!(others.iter().all(|seat| !is_given_up(seat)), "nobody gives one up for it");
        let _first = account.seat(Principal::user(3)).expect("others have their first all the same");
        assert!(!is_given_up(&operator), "and not from an operator's own");
    }
}

#[test]
fn bytes_are_shared_as_connections_are_and_end_with_their_connection() {
    let bytes = 16 * CONNECTION_BYTES;
    let account = account(Limits { bytes, bytes_per_principal: bytes, connections: 10, ..limits() });
    let greedy = [account.seat(ONE).unwrap(), account.seat(ONE).unwrap()];
    let held = [greedy[0].hold(5 * CONNECTION_BYTES).unwrap(), greedy[1].hold(8 * CONNECTION_BYTES).unwrap()];
    let newcomer = account.seat(TWO).expect("the last of the room");
    let one_past = greedy[0].hold(1).unwrap_err();
    assert_eq!(one_past, Full::All { held: bytes, max: bytes }, "the largest holder gets no more");
    let more = newcomer.hold(CONNECTION_BYTES).expect("the other holds more");
    assert_eq!([is_given_up(&greedy[0]), is_given_up(&greedy[1])], [true, false], "the idlest");
    assert!(greedy[0].hold(1).is_err(), "nothing is held for a connection that was given up");
    drop((greedy, held, newcomer, more));
    check_clean(&account);
}

#[tokio::test(start_paused = true)]
async fn a_call_of_one_that_holds_few_finds_room_where_all_is_taken_by_connections() {
    let bytes = 4 * CONNECTION_BYTES;
    let account = account(Limits { bytes, bytes_per_principal: bytes, connections: 10, ..limits() });
    let mut others = Vec::new();
    for uid in 2..=4 {
        others.push(account.seat(Principal::user(uid)).unwrap());
        tokio::time::sleep(FRESH_FOR).await;
    }
    let seat = account.seat(ONE).unwrap();
    let _call = seat.call().expect("of the idlest of all");
    assert_eq!(others.iter().map(|it| is_given_up(it)).collect::<Vec<_>>(), [true, false, false]);
    assert!(!is_given_up(&seat));
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_was_just_made_is_no_idler_than_one_with_a_call() {
    let account = account(Limits { connections: 2, streams_per_principal: 9, ..limits() });
    let busy = account.seat(ONE).unwrap();
    let _call = busy.call().unwrap();
    tokio::time::sleep(FRESH_FOR).await;
    let fresh = account.seat(TWO).unwrap();
    let _first = account.seat(Principal::user(3)).unwrap();
    assert_eq!([is_given_up(&busy), is_given_up(&fresh)], [true, false]);
}

#[test]
fn whoever_holds_few_gives_none_up_to_one_that_holds_some() {
    let few = 4;
    for (holds, gives) in [(few, false), (few + 1, true)] {
        let account = account(Limits { connections: holds + 1, connections_per_principal: 10, ..limits() });
        let largest: Vec<_> = (0..holds).map(|_| account.seat(ONE).unwrap()).collect();
        let _first = account.seat(TWO).unwrap();
        assert_eq!(account.seat(TWO).is_ok(), gives, "{holds}");
        let _none = account.seat(Principal::user(3)).expect("one that holds nothing gets a first all the same");
        assert!(largest.iter().any(|seat| is_given_up(seat)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_given_up_or_finds_no_place_costs_its_principal_a_seconds_worth_of_connects() {
    let account = account(Limits { connections: 1, ..limits() });
    let _given_up = account.seat(ONE).unwrap();
    let _first = account.seat(TWO).unwrap();
    assert!(account.seat(TWO).is_err());
    for principal in [ONE, TWO] {
        assert_eq!((0..1000).filter(|_| account.check(Pace::Connects, principal, 1).is_ok()).count(), 800);
    }
}

#[test]
fn one_principals_share_of_bytes_is_a_bound_though_there_is_room() {
    let account = account(Limits { bytes_per_principal: CONNECTION_BYTES + CALL_BYTES, ..limits() });
    let seat = account.seat(ONE).unwrap();
    let mut held = seat.hold(CALL_BYTES - 1).unwrap();
    held.grow(1).expect("at the bound");
    let max = CONNECTION_BYTES + CALL_BYTES;
    assert_eq!(held.grow(1).unwrap_err(), Full::Own { held: max, max });
    assert_eq!(seat.call().unwrap_err(), (Kind::Bytes, Full::Own { held: max, max }));
    assert_eq!(held.bytes, CALL_BYTES);
    drop(held);
    drop(seat.call().expect("what was held came back"));
}

#[test]
fn a_call_that_finds_no_room_holds_nothing() {
    let account = account(Limits { bytes_per_principal: CONNECTION_BYTES, ..limits() });
    let seat = account.seat(ONE).unwrap();
    assert!(seat.call().is_err() && seat.call().is_err());
    drop(seat);
    check_clean(&account);
}

#[test]
fn entries_say_who_has_to_give_one_up() {
    let account = account(limits());
    let held = [account.take(Kind::Entries, ONE).unwrap(), account.take(Kind::Entries, ONE).unwrap()];
    assert_eq!(account.take(Kind::Entries, ONE).unwrap_err(), Full::Own { held: 2, max: 2 });
    assert_eq!(account.take(Kind::Entries, TWO).unwrap_err(), Full::Of(ONE));
    drop(held);
    account.take(Kind::Entries, TWO).expect("there is room");
    check_clean(&account);
}

#[test]
fn nobody_is_asked_to_give_up_for_more_than_there_is() {
    let account = account(limits());
    let seats = [account.seat(ONE).unwrap(), account.seat(TWO).unwrap()];
    assert!(seats[0].hold(101 * CONNECTION_BYTES).is_err());
    assert!(!is_given_up(&seats[1]));
}

#[tokio::test(start_paused = true)]
async fn whoever_is_refused_too_often_has_to_wait_and_nobody_else_has() {
    let account = account(limits());
    for _ in 0..2 {
        assert_eq!(account.wait(Pace::Refusals, ONE), Duration::ZERO);
        account.spend(Pace::Refusals, ONE);
    }
    let wait = account.wait(Pace::Refusals, ONE);
    assert_eq!(wait, Duration::from_millis(50), "a twentieth of a second for one more");
    assert_eq!(account.check(Pace::Refusals, ONE, 1), Err(wait));
    assert_eq!(account.check(Pace::Refusals, TWO, 1), Ok(()));
    tokio::time::sleep(wait).await;
    assert_eq!(account.check(Pace::Refusals, ONE, 1), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn where_many_connect_without_end_one_that_asks_for_few_is_served_all_the_same() {
    let account = account(limits());
    let (mut set_up, mut neighbours) = (0, 0);
    for round in 0..100 {
        // A hundred tries a second of each of a thousand, and twenty of their neighbour.
        set_up += (10..1010).filter(|uid| account.may_connect(Principal::user(*uid))).count();
        if round % 5 == 0 {
            neighbours += usize::from(account.may_connect(ONE));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(neighbours, 20, "each of the neighbour's");
    // Five of each, and two seconds' worth of all together.
    assert!(set_up <= 7_000, "{set_up}");
    let later = (10..1010).filter(|uid| account.may_connect(Principal::user(*uid))).count();
    assert!(later < 300, "{later} of a thousand that try without end");
}

#[tokio::test(start_paused = true)]
async fn one_principal_writes_few_lines_and_all_together_no_more_than_the_bound() {
    let account = account(limits());
    let written = (0..1000).filter(|_| account.line(ONE).is_some()).count();
    assert_eq!(written, 10, "the burst of one");
    assert_eq!(account.line(TWO), Some(Line { left_out: Some(990) }), "the next line says how many were left out");
    assert_eq!(account.line(TWO), Some(Line { left_out: None }));
    // A thousand principals, each of which has lines left, for ten seconds.
    let mut written = 0;
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        written += (10..1010).filter(|uid| account.line(Principal::user(*uid)).is_some()).count();
    }
    let most = 40 + 10 * LINES_PER_SECOND as usize;
    assert!((10 * LINES_PER_SECOND as usize..=most).contains(&written), "{written}");
}

#[tokio::test(start_paused = true)]
async fn buckets_that_owe_nothing_are_forgotten() {
    let account = account(limits());
    for uid in 0..100_000 {
        account.spend(Pace::Refusals, Principal::user(uid));
        if uid % 1000 == 0 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
    let remembered = account.lock().paces.remembered(Pace::Refusals);
    assert!(remembered < 10_000, "{remembered}");
}
