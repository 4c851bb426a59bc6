//! Whose request is next: nodes take turns, each with a quota, so that none can starve the others.
//!
//! What is over a node's quota waits; nothing is denied for being much. Memory is bounded: a node has at most
//! [`MAX_WAITING_PER_NODE`] requests in here and all together [`MAX_WAITING`], but every node has room for
//! [`MIN_WAITING_PER_NODE`]. What finds no room is dropped and remembered as a fact about its node, for which
//! [`Queue::wants_sweep`] asks to list the requests again once there is room. Pure: time is an argument.

use std::collections::{BTreeSet, HashMap, VecDeque};

use tokio::time::{Duration, Instant};

use super::verdict::Request;
use crate::rate::{Buckets, Rate};

/// Requests of one node in here.
pub const MAX_WAITING_PER_NODE: usize = 256;
/// Requests of all nodes in here, those aside that each node has room for.
pub const MAX_WAITING: usize = 4096;
/// Requests that each node has room for, however many others wait.
pub const MIN_WAITING_PER_NODE: usize = 8;
/// Requests of one node under way.
pub const MAX_UNDER_WAY_PER_NODE: usize = 8;
/// How long a request that was answered is remembered, so that the echo of the answer is not taken for news.
pub const REMEMBERED: Duration = Duration::from_secs(60);

/// Requests that wait and that are under way.
pub(super) struct Queue {
    entries: HashMap<String, Entry>,
    lines: HashMap<String, Line>,
    /// Nodes with a request that is ready, next first.
    turns: VecDeque<String>,
    later: BTreeSet<(Instant, String)>,
    answered: VecDeque<(Instant, String)>,
    waiting: usize,
    quota: Buckets<String>,
}

/// One request, by its UID.
struct Entry {
    node: String,
    state: State,
    failures: u32,
}

enum State {
    Ready(Box<Request>),
    Later(Instant, Box<Request>),
    /// With a newer version, if one came meanwhile.
    UnderWay(Option<Box<Request>>),
    Answered,
}

/// One node's requests.
#[derive(Default)]
struct Line {
    ready: VecDeque<String>,
    waiting: usize,
    under_way: usize,
    overflowed: bool,
}

/// A request whose turn it is.
#[derive(Debug)]
pub(super) struct Turn {
    pub(super) request: Box<Request>,
    /// How often it was tried before.
    pub(super) failures: u32,
}

/// How a turn ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// There is nothing more to do.
    Answered,
    /// It has changed meanwhile: the watch brings what it is now.
    Changed,
    /// To be tried again then.
    Again(Instant, Box<Request>),
}

impl Queue {
    pub(super) fn new(per_node: Rate) -> Self {
        Self {
            entries: HashMap::new(),
            lines: HashMap::new(),
            turns: VecDeque::new(),
            later: BTreeSet::new(),
            answered: VecDeque::new(),
            waiting: 0,
            quota: Buckets::new(per_node),
        }
    }

    /// Takes in a request, or its newer version.
    pub(super) fn offer(&mut self, request: Request) {
        let request = Box::new(request);
        match self.entries.get_mut(&request.uid).map(|entry| &mut entry.state) {
            None => self.add(request),
            Some(State::Answered) => {}
            Some(State::UnderWay(newer)) => *newer = Some(request),
            Some(State::Ready(old) | State::Later(_, old)) => *old = request,
        }
    }

    fn add(&mut self, request: Box<Request>) {
        let line = self.lines.entry(request.node.clone()).or_default();
        let room =
            line.waiting < MIN_WAITING_PER_NODE || (line.waiting < MAX_WAITING_PER_NODE && self.waiting < MAX_WAITING);
        if !room {
            line.overflowed = true;
            return;
        }
        self.insert(request, 0);
    }

    fn insert(&mut self, request: Box<Request>, failures: u32) {
        let (uid, node) = (request.uid.clone(), request.node.clone());
        let line = self.lines.entry(node.clone()).or_default();
        line.waiting += 1;
        self.waiting += 1;
        if line.ready.is_empty() {
            self.turns.push_back(node.clone());
        }
        line.ready.push_back(uid.clone());
        self.entries.insert(uid, Entry { node, state: State::Ready(request), failures });
    }

    /// Forgets a request that was deleted.
    pub(super) fn forget(&mut self, uid: &str) {
        let Some(entry) = self.entries.remove(uid) else { return };
        match entry.state {
            State::Ready(_) => {
                if let Some(line) = self.lines.get_mut(&entry.node) {
                    line.ready.retain(|ready| ready != uid);
                    if line.ready.is_empty() {
                        self.turns.retain(|node| *node != entry.node);
                    }
                }
                self.leave(&entry.node);
                self.sweep_line(&entry.node);
            }
            State::Later(at, _) => {
                self.later.remove(&(at, uid.to_owned()));
                self.leave(&entry.node);
                self.sweep_line(&entry.node);
            }
            // Its end is yet to come.
            State::UnderWay(_) => {
                self.entries.insert(uid.to_owned(), Entry { state: State::UnderWay(None), ..entry });
            }
            State::Answered => {}
        }
    }

    /// The next request, or when to look again, if time alone brings one.
    pub(super) fn next(&mut self, now: Instant) -> Result<Turn, Option<Instant>> {
        self.wake(now);
        let mut look_again = self.later.first().map(|(at, _)| *at);
        for _ in 0..self.turns.len() {
            let Some(node) = self.turns.pop_front() else { break };
            let line = self.lines.get_mut(&node).expect("a node with a turn has a line");
            if line.under_way < MAX_UNDER_WAY_PER_NODE {
                match self.quota.check(&node) {
                    Ok(()) => {
                        let uid = line.ready.pop_front().expect("a node with a turn has a request that is ready");
                        line.under_way += 1;
                        if !line.ready.is_empty() {
                            self.turns.push_back(node.clone());
                        }
                        self.leave(&node);
                        return Ok(self.start(&uid));
                    }
                    Err(wait) => look_again = [look_again, Some(now + wait)].into_iter().flatten().min(),
                }
            }
            self.turns.push_back(node);
        }
        Err(look_again)
    }

    /// A turn has ended.
    pub(super) fn end(&mut self, uid: &str, outcome: Outcome, now: Instant) {
        let Some(Entry { node, state, failures }) = self.entries.remove(uid) else { return };
        let State::UnderWay(newer) = state else { unreachable!("only `end` ends a turn") };
        if let Some(line) = self.lines.get_mut(&node) {
            line.under_way -= 1;
        }
        match (outcome, newer) {
            (Outcome::Answered, _) => {
                self.answered.push_back((now + REMEMBERED, uid.to_owned()));
                self.entries.insert(uid.to_owned(), Entry { node: node.clone(), state: State::Answered, failures });
            }
            (Outcome::Changed, None) => {}
            (Outcome::Changed, Some(newer)) => self.insert(newer, failures + 1),
            (Outcome::Again(at, old), newer) => self.put_off(at, newer.unwrap_or(old), failures + 1),
        }
        self.sweep_line(&node);
    }

    /// Requests that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Whether a request was dropped that there is room for now; says so once.
    pub(super) fn wants_sweep(&mut self) -> bool {
        if self.waiting >= MAX_WAITING {
            return false;
        }
        let roomy = |line: &&mut Line| line.overflowed && line.waiting <= MAX_WAITING_PER_NODE / 2;
        let mut found = false;
        for line in self.lines.values_mut().filter(roomy) {
            line.overflowed = false;
            found = true;
        }
        found
    }

    fn put_off(&mut self, at: Instant, request: Box<Request>, failures: u32) {
        let (uid, node) = (request.uid.clone(), request.node.clone());
        self.lines.entry(node.clone()).or_default().waiting += 1;
        self.waiting += 1;
        self.later.insert((at, uid.clone()));
        self.entries.insert(uid, Entry { node, state: State::Later(at, request), failures });
    }

    /// Lets those whose time has come stand in line, and forgets answers that are old.
    fn wake(&mut self, now: Instant) {
        while self.later.first().is_some_and(|(at, _)| *at <= now) {
            let (_, uid) = self.later.pop_first().expect("it has a first");
            let Some(entry) = self.entries.remove(&uid) else { continue };
            if let State::Later(_, request) = entry.state {
                self.leave(&entry.node);
                self.insert(request, entry.failures);
            }
        }
        while self.answered.front().is_some_and(|(at, _)| *at <= now) {
            let (_, uid) = self.answered.pop_front().expect("it has a first");
            if self.entries.get(&uid).is_some_and(|entry| matches!(entry.state, State::Answered)) {
                self.entries.remove(&uid);
            }
        }
    }

    fn start(&mut self, uid: &str) -> Turn {
        let entry = self.entries.get_mut(uid).expect("it is ready");
        match std::mem::replace(&mut entry.state, State::UnderWay(None)) {
            State::Ready(request) => Turn { request, failures: entry.failures },
            _ => unreachable!("it is ready"),
        }
    }

    fn leave(&mut self, node: &str) {
        self.waiting -= 1;
        if let Some(line) = self.lines.get_mut(node) {
            line.waiting -= 1;
        }
    }

    fn sweep_line(&mut self, node: &str) {
        let over = |line: &Line| line.waiting == 0 && line.under_way == 0 && line.ready.is_empty() && !line.overflowed;
        if self.lines.get(node).is_some_and(over) {
            self.lines.remove(node);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;
    use crate::controller::verdict::Refusal;

    fn rate(per_second: u32, burst: u32) -> Rate {
        Rate { per_second: NonZeroU32::new(per_second).unwrap(), burst: NonZeroU32::new(burst).unwrap() }
    }

    fn plenty() -> Rate {
        rate(1_000_000, 1_000_000)
    }

    fn request(node: &str, uid: &str) -> Request {
        Request {
            name: uid.to_owned(),
            uid: uid.to_owned(),
            version: "1".to_owned(),
            node: node.to_owned(),
            approved: false,
            looked_twice: false,
            traceparent: None,
            asked: Err(Refusal::Expiration),
        }
    }

    fn offer(queue: &mut Queue, node: &str, count: usize) {
        (0..count).for_each(|at| queue.offer(request(node, &format!("{node}-{at}"))));
    }

    /// The UID of the next turn.
    fn next(queue: &mut Queue) -> Option<String> {
        queue.next(Instant::now()).ok().map(|turn| turn.request.uid)
    }

    fn answer(queue: &mut Queue, uid: &str) {
        queue.end(uid, Outcome::Answered, Instant::now());
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_with_thousands_of_requests_delays_another_nodes_one_by_a_single_turn() {
        let mut queue = Queue::new(plenty());
        offer(&mut queue, "greedy", 10_000);
        offer(&mut queue, "n1", 1);
        let first = next(&mut queue).unwrap();
        assert!(first.starts_with("greedy"));
        assert_eq!(next(&mut queue).unwrap(), "n1-0");
        // The queue holds what it may and remembers that there is more.
        assert_eq!(queue.waiting(), MAX_WAITING_PER_NODE - 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_over_the_quota_waits_and_is_not_lost() {
        let mut queue = Queue::new(rate(2, 3));
        offer(&mut queue, "n1", 5);
        offer(&mut queue, "n2", 1);
        let mut served = Vec::new();
        while let Some(uid) = next(&mut queue) {
            answer(&mut queue, &uid);
            served.push(uid);
        }
        assert_eq!(served, ["n1-0", "n2-0", "n1-1", "n1-2"]);
        let wake = queue.next(Instant::now()).unwrap_err().unwrap();
        assert_eq!(wake - Instant::now(), Duration::from_millis(500));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!((next(&mut queue).unwrap(), next(&mut queue).unwrap()), ("n1-3".into(), "n1-4".into()));
        assert_eq!(queue.waiting(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_has_so_many_under_way_and_no_more() {
        let mut queue = Queue::new(plenty());
        offer(&mut queue, "n1", MAX_UNDER_WAY_PER_NODE + 1);
        let under_way: Vec<_> = std::iter::from_fn(|| next(&mut queue)).collect();
        assert_eq!(under_way.len(), MAX_UNDER_WAY_PER_NODE);
        assert_eq!(queue.next(Instant::now()).unwrap_err(), None, "only an end lets the next one start");
        answer(&mut queue, &under_way[0]);
        assert!(next(&mut queue).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn what_finds_no_room_is_asked_for_again_once_there_is_some() {
        let mut queue = Queue::new(plenty());
        offer(&mut queue, "n1", MAX_WAITING_PER_NODE);
        assert!(!queue.wants_sweep());
        queue.offer(request("n1", "one too many"));
        assert_eq!(queue.waiting(), MAX_WAITING_PER_NODE);
        assert!(!queue.wants_sweep(), "there is no room yet");
        while queue.waiting() > MAX_WAITING_PER_NODE / 2 {
            let uid = next(&mut queue).unwrap();
            answer(&mut queue, &uid);
        }
        assert!(queue.wants_sweep());
        assert!(!queue.wants_sweep(), "once");
    }

    #[tokio::test(start_paused = true)]
    async fn all_nodes_together_are_bounded_and_each_has_some_room() {
        let mut queue = Queue::new(plenty());
        let nodes = MAX_WAITING / MAX_WAITING_PER_NODE;
        (0..nodes).for_each(|node| offer(&mut queue, &format!("greedy{node}"), MAX_WAITING_PER_NODE));
        assert_eq!(queue.waiting(), MAX_WAITING);
        offer(&mut queue, "late", MIN_WAITING_PER_NODE + 1);
        assert_eq!(queue.waiting(), MAX_WAITING + MIN_WAITING_PER_NODE);
    }

    #[tokio::test(start_paused = true)]
    async fn the_echo_of_an_answer_is_no_news_and_is_forgotten_in_time() {
        let mut queue = Queue::new(plenty());
        queue.offer(request("n1", "a"));
        let uid = next(&mut queue).unwrap();
        answer(&mut queue, &uid);
        queue.offer(request("n1", "a"));
        assert_eq!(next(&mut queue), None);
        tokio::time::advance(REMEMBERED).await;
        assert_eq!(next(&mut queue), None);
        assert!(queue.entries.is_empty() && queue.lines.is_empty() && queue.answered.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_newer_version_takes_the_place_of_the_one_that_waits_or_conflicted() {
        let mut queue = Queue::new(plenty());
        let newer = |version: &str| Request { version: version.to_owned(), ..request("n1", "a") };
        queue.offer(newer("1"));
        queue.offer(newer("2"));
        assert_eq!(queue.next(Instant::now()).unwrap().request.version, "2");
        queue.offer(newer("3"));
        queue.end("a", Outcome::Changed, Instant::now());
        let turn = queue.next(Instant::now()).unwrap();
        assert_eq!((turn.request.version.as_str(), turn.failures), ("3", 1));
        queue.end("a", Outcome::Changed, Instant::now());
        assert_eq!(next(&mut queue), None, "the watch is yet to tell");
        queue.offer(newer("4"));
        assert_eq!(queue.next(Instant::now()).unwrap().request.version, "4");
    }

    #[tokio::test(start_paused = true)]
    async fn what_failed_comes_again_at_its_time() {
        let mut queue = Queue::new(plenty());
        queue.offer(request("n1", "a"));
        let turn = queue.next(Instant::now()).unwrap();
        let at = Instant::now() + Duration::from_secs(3);
        queue.end("a", Outcome::Again(at, turn.request), Instant::now());
        assert_eq!(queue.next(Instant::now()).unwrap_err(), Some(at));
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(queue.next(Instant::now()).unwrap().failures, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn whatever_is_deleted_leaves_nothing_behind() {
        let mut queue = Queue::new(plenty());
        for uid in ["ready", "later", "under way", "gone while under way"] {
            queue.offer(request("n1", uid));
        }
        for _ in 0..4 {
            let turn = queue.next(Instant::now()).unwrap();
            let outcome = match turn.request.uid.as_str() {
                "later" => Outcome::Again(Instant::now() + Duration::from_secs(9), turn.request),
                "ready" => Outcome::Again(Instant::now(), turn.request),
                _ => continue,
            };
            let uid = if matches!(&outcome, Outcome::Again(_, request) if request.uid == "later") {
                "later"
            } else {
                "ready"
            };
            queue.end(uid, outcome, Instant::now());
        }
        queue.wake(Instant::now());
        for uid in ["ready", "later", "gone while under way", "never there"] {
            queue.forget(uid);
        }
        queue.end("gone while under way", Outcome::Changed, Instant::now());
        queue.end("under way", Outcome::Changed, Instant::now());
        assert_eq!((queue.waiting(), next(&mut queue)), (0, None));
        assert!(queue.entries.is_empty() && queue.lines.is_empty() && queue.turns.is_empty() && queue.later.is_empty());
    }
}
