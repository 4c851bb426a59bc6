//! What each principal may hold, how fast it may ask, and who gives something up when there is no more.
//!
//! A [`Principal`] is a pod, or a user of the host. Everything that it can make the agent hold is counted here:
//! connections, the bytes held for them, calls, requests that arrive, and entries of the hub; and everything that it
//! can make the agent do is paced here: accepting, refusing, logging. The rules, in this order:
//!
//! 1. One principal holds at most its share of each kind, whatever is free.
//! 2. While there is room, nobody is asked to give anything up.
//! 3. When there is none, a principal that holds less than the largest holder gets what it asks for, and the largest
//!    holder gives up its idlest. A principal that holds nothing always gets a first place.
//! 4. A principal that holds few gives none up to one that holds some already: small holders would take from each other
//!    without end. One that had to give up a connection, or found no place for one, pays for it in its pace of connects.
//! 5. Root and the agent's own user have [`Limits::RESERVE`] of every kind besides.
//!
//! The totals follow from the memory limit and the descriptors that the agent finds at its start; see [`Limits::of`].
//! Deliberately not here: who a principal is (`attest` says so), and turns at a signer (the hub's queue).

mod limits;
mod memory;
mod pace;

use std::{
    array,
    collections::HashMap,
    fmt,
    hash::{DefaultHasher, Hash, Hasher as _},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::{
    limits::Bound,
    pace::{Connects, Lines, Paces},
};
pub use self::{
    limits::{CALL_BYTES, CONNECTION_BYTES, ENTRY_BYTES, Limits, OWN_BYTES},
    memory::memory_limit,
    pace::{LINES_PER_SECOND, Line, Pace},
};
use crate::metrics::Metrics;

/// What a connection that is given up, or finds no place, costs its principal in its pace of connects: a second's worth.
const NO_PLACE_COST: usize = 200;
/// How long a connection without a call is no idler than one with a call: its first is on its way.
const FRESH_FOR: Duration = Duration::from_secs(1);
/// Bytes of what is not complete that are counted with its connection or call.
const FREE_BYTES: usize = 1024;
/// What buffers hold of a byte that is kept, at most: they double as they grow.
const BUFFERED_TIMES: usize = 2;
/// Connections that are closed at most to make room for one more.
const GIVEN_UP_AT_ONCE_MAX: usize = 64;

/// Who bears the bounds on what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Principal(u64);

impl Principal {
    /// Callers whose process or pod is unknown: they share one principal's bounds.
    pub const UNKNOWN: Self = Self(u64::MAX >> 1);

    /// A user of the host.
    pub const fn user(uid: u32) -> Self {
        Self(uid as u64)
    }

    /// A pod, by its UID; never a user, whose ids have 32 bits.
    pub fn pod(uid: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        uid.hash(&mut hasher);
        Self(hasher.finish() | 1 << 63)
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Connections to the socket.
    Connections,
    /// Bytes of memory that connections and their calls make the agent hold.
    Bytes,
    /// Calls under way, open streams among them.
    Calls,
    /// Requests whose message is not there yet.
    Arriving,
    /// Credentials that the hub keeps.
    Entries,
}

impl Kind {
    /// Every kind, in the order of its number.
    pub const ALL: [Self; 5] = [Self::Connections, Self::Bytes, Self::Calls, Self::Arriving, Self::Entries];

    /// Its name, for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Bytes => "bytes",
            Self::Calls => "calls",
            Self::Arriving => "arriving",
            Self::Entries => "entries",
        }
    }
}

/// Why a principal gets no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// It has its share.
    Own {
        /// What it holds.
        held: usize,
        /// Its share.
        max: usize,
    },
    /// All is taken, and nobody holds more than it does.
    All {
        /// What all hold together.
        held: usize,
        /// The total.
        max: usize,
    },
    /// All is taken, and this principal, the largest holder, has to give one up first.
    Of(Principal),
}

/// The account; clones share it.
#[derive(Clone)]
pub struct Account(Arc<Shared>);

struct Shared {
    limits: Limits,
    /// Root and the agent's own user.
    operators: [Principal; 2],
    /// What is held of each kind, for operators.
    gauges: [Gauge; Kind::ALL.len()],
    books: Mutex<Books>,
}

struct Books {
    ledgers: [Ledger; Kind::ALL.len()],
    /// Each principal's connections, by their numbers.
    seats: HashMap<Principal, HashMap<u64, Mark>>,
    counter: u64,
    paces: Paces,
    lines: Lines,
    connects: Connects,
}

/// What is held of one kind.
#[derive(Default)]
struct Ledger {
    held: usize,
    holders: HashMap<Principal, usize>,
}

/// A connection as the account sees it.
struct Mark {
    /// Everything that is held for it.
    bytes: usize,
    /// Calls under way on it.
    calls: usize,
    /// When it was made.
    since: Instant,
    /// When a call last began or ended.
    active: Instant,
    given_up: CancellationToken,
}

/// One place, held until this is dropped.
#[derive(Debug)]
pub struct Place {
    account: Account,
    kind: Kind,
    principal: Principal,
}

/// A connection's place; it has to be given up when another principal needs it more.
#[derive(Debug)]
pub struct Seat {
    account: Account,
    principal: Principal,
    number: u64,
    given_up: CancellationToken,
}

/// Bytes held for a connection until this is dropped.
#[derive(Debug)]
pub struct Held {
    seat: Arc<Seat>,
    bytes: usize,
}

/// A call of a connection, until this is dropped.
#[derive(Debug)]
pub struct OpenCall {
    held: Held,
    _place: Place,
}

impl Account {
    /// Nothing is held yet; `own_uid` is the agent's user.
    pub fn new(limits: Limits, own_uid: u32, metrics: &Metrics) -> Self {
        let limit = |kind| Some(limits.bound(kind).total).filter(|total| *total < usize::MAX);
        Self(Arc::new(Shared {
            limits,
            operators: [Principal::user(0), Principal::user(own_uid)],
            gauges: Kind::ALL.map(|kind| metrics.account(kind.as_str(), limit(kind))),
            books: Mutex::new(Books {
                ledgers: array::from_fn(|_| Ledger::default()),
                seats: HashMap::new(),
                counter: 0,
                paces: Paces::new(&limits),
                lines: Lines::new(),
                connects: Connects::new(),
            }),
        }))
    }

    /// The bounds.
    pub fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// One of `kind` for `principal`, if there is one; nobody is asked to give one up.
    ///
    /// # Errors
    /// See [`Full`].
    pub fn take(&self, kind: Kind, principal: Principal) -> Result<Place, Full> {
        self.add(&mut self.lock(), kind, principal, 1)?;
        Ok(Place { account: self.clone(), kind, principal })
    }

    /// A place for a connection, with [`CONNECTION_BYTES`]; others' connections are given up for it by the rules.
    ///
    /// # Errors
    /// [`Full::Own`] or [`Full::All`].
    pub fn seat(&self, principal: Principal) -> Result<Arc<Seat>, Full> {
        let mut books = self.lock();
        self.room_for_seat(&mut books, principal).inspect_err(|_| {
            books.paces.spend(Pace::Connects, principal, NO_PLACE_COST);
        })?;
        books.counter += 1;
        let (number, given_up) = (books.counter, CancellationToken::new());
        let now = Instant::now();
        let mark = Mark { bytes: CONNECTION_BYTES, calls: 0, since: now, active: now, given_up: given_up.clone() };
        books.seats.entry(principal).or_default().insert(number, mark);
        Ok(Arc::new(Seat { account: self.clone(), principal, number, given_up }))
    }

    /// Spends `cost` of `principal`'s `pace`, or says how long until there is so much.
    ///
    /// # Errors
    /// The wait.
    pub fn check(&self, pace: Pace, principal: Principal, cost: usize) -> Result<(), Duration> {
        let mut books = self.lock();
        let wait = books.paces.wait(pace, principal, cost);
        if !wait.is_zero() {
            return Err(wait);
        }
        books.paces.spend(pace, principal, cost);
        Ok(())
    }

    /// How long `principal` has to wait for its next of `pace`; zero for most.
    pub fn wait(&self, pace: Pace, principal: Principal) -> Duration {
        self.lock().paces.wait(pace, principal, 1)
    }

    /// Spends one of `principal`'s `pace`, whether or not there is one.
    pub fn spend(&self, pace: Pace, principal: Principal) {
        self.lock().paces.spend(pace, principal, 1);
    }

    /// Whether a new connection of `principal` is set up, or turned away at once.
    pub fn may_connect(&self, principal: Principal) -> bool {
        let books = &mut *self.lock();
        books.connects.next(&mut books.paces, principal)
    }

    /// Whether `principal` may make the agent write a log line now.
    pub fn line(&self, principal: Principal) -> Option<Line> {
        let books = &mut *self.lock();
        books.lines.next(&mut books.paces, principal)
    }

    fn room_for_seat(&self, books: &mut Books, principal: Principal) -> Result<(), Full> {
        self.make_room(books, Kind::Connections, principal, 1, 0)?;
        let bytes = self.make_room(books, Kind::Bytes, principal, CONNECTION_BYTES, 0);
        bytes.inspect_err(|_| self.remove(books, Kind::Connections, principal, 1))
    }

    /// Takes `amount`, and asks the largest holders to give up their idlest connections for it; so does one that would
    /// hold no more than `modest` of all others, whatever they hold.
    fn make_room(
        &self,
        books: &mut Books,
        kind: Kind,
        principal: Principal,
        amount: usize,
        modest: usize,
    ) -> Result<(), Full> {
        for _ in 0..GIVEN_UP_AT_ONCE_MAX {
            let own = books.ledgers[kind as usize].holders.get(&principal).copied().unwrap_or(0);
            match self.add(books, kind, principal, amount) {
                Err(Full::All { .. }) if own + amount <= modest && self.give_up_idlest(books, kind, principal) => {}
                Err(Full::Of(_)) if self.give_up_idlest(books, kind, principal) => {}
                Err(Full::Of(_)) => break,
                done => return done,
            }
        }
        Err(Full::All { held: books.ledgers[kind as usize].held, max: self.0.limits.bound(kind).total })
    }

    /// Who holds what of a ledger, without operators, who give up nothing of what is theirs alone.
    fn holders<'a>(&'a self, ledger: &'a Ledger, kind: Kind) -> impl Iterator<Item = (Principal, usize)> + 'a {
        let own = Limits::reserve(self.0.limits.bound(kind).total);
        let may_give = move |(it, held): &(Principal, usize)| !self.0.operators.contains(it) || *held > own;
        ledger.holders.iter().map(|(it, held)| (*it, *held)).filter(may_give)
    }

    fn add(&self, books: &mut Books, kind: Kind, principal: Principal, amount: usize) -> Result<(), Full> {
        let bound = self.bound(kind, principal);
        let ledger = &books.ledgers[kind as usize];
        ledger.may_take(bound, principal, amount, || {
            let others = self.holders(ledger, kind).filter(|(it, _)| *it != principal);
            others.max_by_key(|(_, held)| *held)
        })?;
        let ledger = &mut books.ledgers[kind as usize];
        *ledger.holders.entry(principal).or_default() += amount;
        ledger.held += amount;
        self.0.gauges[kind as usize].set(ledger.held as i64);
        Ok(())
    }

    fn remove(&self, books: &mut Books, kind: Kind, principal: Principal, amount: usize) {
        let ledger = &mut books.ledgers[kind as usize];
        let held = ledger.holders.get_mut(&principal).expect("what is given back was taken");
        *held -= amount;
        if *held == 0 {
            ledger.holders.remove(&principal);
        }
        ledger.held -= amount;
        self.0.gauges[kind as usize].set(ledger.held as i64);
    }

    /// The bound for `principal`: operators have a reserve.
    fn bound(&self, kind: Kind, principal: Principal) -> Bound {
        let bound = self.0.limits.bound(kind);
        let reserve = if self.0.operators.contains(&principal) { Limits::reserve(bound.total) } else { 0 };
        Bound { total: bound.total.saturating_add(reserve), ..bound }
    }

    /// Ends the idlest connection of those that hold most of `kind`; false if they have none.
    fn give_up_idlest(&self, books: &mut Books, kind: Kind, for_whom: Principal) -> bool {
        let others = || self.holders(&books.ledgers[kind as usize], kind).filter(|(it, _)| *it != for_whom);
        let Some(most) = others().map(|(_, held)| held).max() else { return false };
        // Where all hold few, the idlest of all: one more or less says nothing then.
        let enough = if most > self.0.limits.bound(kind).few { most } else { 1 };
        let largest = others().filter(|(_, held)| *held >= enough).map(|(it, _)| it);
        let marks = largest.flat_map(|it| books.seats.get(&it).into_iter().flatten().map(move |mark| (it, mark)));
        // The oldest of those that were made at once.
        let idlest = marks.min_by_key(|(_, (number, mark))| {
            let active = mark.calls > 0 || mark.since.elapsed() < FRESH_FOR;
            (active, mark.active, **number)
        });
        let Some((principal, number)) = idlest.map(|(principal, (number, _))| (principal, *number)) else {
            return false;
        };
        if let Some(mark) = self.unseat(books, principal, number) {
            mark.given_up.cancel();
            books.paces.spend(Pace::Connects, principal, NO_PLACE_COST);
        }
        true
    }

    /// Forgets a connection and gives back all that was held for it.
    fn unseat(&self, books: &mut Books, principal: Principal, number: u64) -> Option<Mark> {
        let marks = books.seats.get_mut(&principal)?;
        let mark = marks.remove(&number)?;
        if marks.is_empty() {
            books.seats.remove(&principal);
        }
        self.remove(books, Kind::Connections, principal, 1);
        self.remove(books, Kind::Bytes, principal, mark.bytes);
        Some(mark)
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.0.books.lock().expect("no code panics while it counts")
    }
}

impl Ledger {
    /// Whether `principal` may have `amount` more, by the rules at the top.
    fn may_take(
        &self,
        bound: Bound,
        principal: Principal,
        amount: usize,
        largest: impl FnOnce() -> Option<(Principal, usize)>,
    ) -> Result<(), Full> {
        let own = self.holders.get(&principal).copied().unwrap_or(0);
        if own.saturating_add(amount) > bound.each {
            return Err(Full::Own { held: own, max: bound.each });
        }
        if self.held.saturating_add(amount) <= bound.total {
            return Ok(());
        }
        match largest() {
            Some((largest, held)) if own == 0 || held > bound.few.max(own + amount) => Err(Full::Of(largest)),
            _ => Err(Full::All { held: self.held, max: bound.total }),
        }
    }
}

impl Seat {
    /// Whose connection it is.
    pub fn principal(&self) -> Principal {
        self.principal
    }

    /// The account that it is part of.
    pub fn account(&self) -> &Account {
        &self.account
    }

    /// Ends when the place is needed for somebody else.
    pub async fn given_up(&self) {
        self.given_up.cancelled().await;
    }

    /// Counts `bytes` that are held for this connection; others' connections are given up for them by the rules.
    ///
    /// # Errors
    /// [`Full::Own`] or [`Full::All`].
    pub fn hold(self: &Arc<Self>, bytes: usize) -> Result<Held, Full> {
        let mut books = self.account.lock();
        if self.mark(&mut books).is_none() {
            let max = self.account.limits().bound(Kind::Bytes).each;
            return Err(Full::Own { held: max, max });
        }
        // A call is short, or needed: whoever holds few connections is not kept from making it.
        let modest = self.account.limits().bound(Kind::Bytes).few;
        self.account.make_room(&mut books, Kind::Bytes, self.principal, bytes, modest)?;
        if let Some(mark) = self.mark(&mut books) {
            mark.bytes += bytes;
        }
        Ok(Held { seat: self.clone(), bytes })
    }

    /// Makes `held` cover so many bytes of what is not complete; it may cover more already.
    ///
    /// # Errors
    /// As [`Seat::hold`].
    pub fn cover(self: &Arc<Self>, held: &mut Option<Held>, begun: usize) -> Result<(), Full> {
        let wanted = begun.saturating_sub(FREE_BYTES) * BUFFERED_TIMES;
        let more = wanted.saturating_sub(held.as_ref().map_or(0, |held| held.bytes));
        match held {
            _ if more == 0 => Ok(()),
            Some(held) => held.grow(more),
            none => self.hold(more).map(|more| *none = Some(more)),
        }
    }

    /// A place for a call on this connection, with [`CALL_BYTES`].
    ///
    /// # Errors
    /// The kind of which there is no more, with [`Full::Own`] or [`Full::All`].
    pub fn call(self: &Arc<Self>) -> Result<OpenCall, (Kind, Full)> {
        let place = self.account.take(Kind::Calls, self.principal).map_err(|full| (Kind::Calls, full))?;
        let held = self.hold(CALL_BYTES).map_err(|full| (Kind::Bytes, full))?;
        if let Some(mark) = self.mark(&mut self.account.lock()) {
            (mark.calls, mark.active) = (mark.calls + 1, Instant::now());
        }
        Ok(OpenCall { held, _place: place })
    }

    fn mark<'a>(&self, books: &'a mut Books) -> Option<&'a mut Mark> {
        books.seats.get_mut(&self.principal)?.get_mut(&self.number)
    }
}

impl Held {
    /// Counts `bytes` more.
    ///
    /// # Errors
    /// As [`Seat::hold`].
    fn grow(&mut self, bytes: usize) -> Result<(), Full> {
        let mut more = self.seat.hold(bytes)?;
        self.bytes += std::mem::take(&mut more.bytes);
        Ok(())
    }
}

impl OpenCall {
    /// Counts `bytes` more for this call's connection.
    ///
    /// # Errors
    /// As [`Seat::hold`].
    pub fn hold(&self, bytes: usize) -> Result<Held, Full> {
        self.held.seat.hold(bytes)
    }

    /// Whose call it is.
    pub fn seat(&self) -> &Seat {
        &self.held.seat
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.account.remove(&mut self.account.lock(), self.kind, self.principal, 1);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.account.unseat(&mut self.account.lock(), self.principal, self.number);
    }
}

impl Drop for Held {
    /// What was held for a connection that was given up has been given back with it.
    fn drop(&mut self) {
        let (seat, account) = (&self.seat, &self.seat.account);
        let mut books = account.lock();
        if let Some(mark) = seat.mark(&mut books) {
            mark.bytes -= self.bytes;
            account.remove(&mut books, Kind::Bytes, seat.principal, self.bytes);
        }
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        if let Some(mark) = self.held.seat.mark(&mut self.held.seat.account.lock()) {
            (mark.calls, mark.active) = (mark.calls - 1, Instant::now());
        }
    }
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Account").field("limits", &self.0.limits).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
