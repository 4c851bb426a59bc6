//! The requests of the cluster: watched, queued, answered, many at a time.
//!
//! One watch for each signer's name, which resumes where it was, or lists again when it was cut off for too long. What
//! the queue had no room for is found by a sweep: a list, page by page, beside the watch, so that a node with too many
//! requests delays nobody else's news.

use std::{pin::Pin, sync::Arc};

use futures_util::{Stream, StreamExt as _, stream::select_all};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::{
    Api, Client,
    api::ListParams,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use tokio::{
    task::{JoinError, JoinSet},
    time::{Duration, Instant, sleep_until},
};

use super::{
    answer::Answers,
    kubelet,
    queue::{Outcome, Queue},
    verdict::{Request, screen},
};
use crate::{
    kubernetes::{MAX_REQUEST_BYTES, WatchBackoff, page},
    rate::Rate,
};

/// Requests answered at a time.
pub const MAX_UNDER_WAY: usize = 32;
/// Requests read at a time.
pub const PAGE: u32 = page(MAX_REQUEST_BYTES);
/// The shortest pause between sweeps.
pub const SWEEP_PAUSE: Duration = Duration::from_secs(5);

type Watched = Pin<Box<dyn Stream<Item = Result<Event<CertificateSigningRequest>, watcher::Error>> + Send>>;

/// What has ended.
enum Done {
    Turn(String, Outcome),
    /// The requests of one page, and the rest.
    Page(Result<(Vec<Request>, Option<Sweep>), kube::Error>),
}

/// A list under way.
struct Sweep {
    signers: Vec<String>,
    next: Option<String>,
}

struct Requests {
    answers: Arc<Answers>,
    queue: Queue,
    work: JoinSet<Done>,
    turns: usize,
    /// Whether something was dropped since the last sweep began.
    dropped: bool,
    sweeping: bool,
    sweep_at: Instant,
}

/// Answers requests for ever.
pub(super) async fn run(answers: Arc<Answers>, per_node: Rate) {
    let watches = signers(&answers).into_iter().map(|signer| watch(answers.client.clone(), &signer));
    let mut watched = select_all(watches);
    let mut requests = Requests {
        answers,
        queue: Queue::new(per_node),
        work: JoinSet::new(),
        turns: 0,
        dropped: false,
        sweeping: false,
        sweep_at: Instant::now(),
    };
    loop {
        let wake = requests.start();
        tokio::select! {
            Some(event) = watched.next() => requests.hear(event),
            Some(done) = requests.work.join_next() => requests.end(done),
            () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
        }
    }
}

fn signers(answers: &Answers) -> Vec<String> {
    let rules = &answers.rules;
    let kubelets = rules.kubelet_serving.then(|| kubelet::SIGNER.to_owned());
    rules.approves.iter().chain([&rules.signer]).cloned().chain(kubelets).collect()
}

fn of_signer(signer: &str) -> String {
    format!("spec.signerName={signer}")
}

fn watch(client: Client, signer: &str) -> Watched {
    let config = watcher::Config::default().fields(&of_signer(signer)).page_size(PAGE);
    Box::pin(watcher(Api::all(client), config).backoff(WatchBackoff::default()))
}

impl Requests {
    /// Starts all that may start; returns when time alone lets more of it start.
    fn start(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let mut wake = None;
        while self.turns < MAX_UNDER_WAY {
            match self.queue.next(now) {
                Ok(turn) => {
                    self.turns += 1;
                    let answers = self.answers.clone();
                    self.work.spawn(async move {
                        let uid = turn.request.uid.clone();
                        Done::Turn(uid, answers.answer(turn).await)
                    });
                }
                Err(look_again) => {
                    wake = look_again;
                    break;
                }
            }
        }
        self.answers.metrics.csr_waiting.set(i64::try_from(self.queue.waiting()).unwrap_or(i64::MAX));
        self.dropped |= self.queue.wants_sweep();
        if self.dropped && !self.sweeping {
            if self.sweep_at > now {
                return [wake, Some(self.sweep_at)].into_iter().flatten().min();
            }
            (self.dropped, self.sweeping) = (false, true);
            self.sweep(Sweep { signers: signers(&self.answers), next: None });
        }
        wake
    }

    fn hear(&mut self, event: Result<Event<CertificateSigningRequest>, watcher::Error>) {
        match event {
            Ok(Event::Apply(object) | Event::InitApply(object)) => {
                if let Some(request) = screen(object, &self.answers.rules) {
                    self.queue.offer(request);
                }
            }
            Ok(Event::Delete(object)) => self.queue.forget(&object.metadata.uid.unwrap_or_default()),
            Ok(Event::Init | Event::InitDone) => {}
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the watch of requests is taken up again");
            }
        }
    }

    fn end(&mut self, done: Result<Done, JoinError>) {
        match done {
            Ok(Done::Turn(uid, outcome)) => {
                self.turns -= 1;
                self.queue.end(&uid, outcome, Instant::now());
            }
            Ok(Done::Page(Ok((requests, rest)))) => {
                requests.into_iter().for_each(|request| self.queue.offer(request));
                match rest {
                    Some(rest) => self.sweep(rest),
                    None => self.rest(),
                }
            }
            Ok(Done::Page(Err(error))) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "requests that were dropped are not found yet"
                );
                self.dropped = true;
                self.rest();
            }
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    fn rest(&mut self) {
        self.sweeping = false;
        self.sweep_at = Instant::now() + SWEEP_PAUSE;
    }

    fn sweep(&mut self, sweep: Sweep) {
        let answers = self.answers.clone();
        self.work.spawn(async move { Done::Page(sweep.page(&answers).await) });
    }
}

impl Sweep {
    /// The next page.
    async fn page(mut self, answers: &Answers) -> Result<(Vec<Request>, Option<Self>), kube::Error> {
        let Some(signer) = self.signers.last() else { return Ok((Vec::new(), None)) };
        let parameters = ListParams { continue_token: self.next, ..ListParams::default().fields(&of_signer(signer)) };
        let page = Api::all(answers.client.clone()).list(&parameters.limit(PAGE)).await?;
        let requests = page.items.into_iter().filter_map(|object| screen(object, &answers.rules)).collect();
        self.next = page.metadata.continue_.filter(|token| !token.is_empty());
        if self.next.is_none() {
            self.signers.pop();
        }
        Ok((requests, (!self.signers.is_empty()).then_some(self)))
    }
}
