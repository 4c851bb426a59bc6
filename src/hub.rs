//! Credentials over time: issued once, renewed, fanned out to whoever follows them.
//!
//! An `Entry` is one credential of one workload. It is issued by at most one flight at a time, renewed at a
//! point drawn once per certificate, and published through a `watch` channel, so that a slow follower sees the newest
//! state and never an older certificate after a newer one. A certificate that is still valid is never given up for a
//! failed renewal. An entry that nobody follows is not renewed and is forgotten, with its key, after [`LINGER`].
//!
//! This is the only stateful, timed actor. [`Hub`] is its handle: every method takes the lock for a moment and never
//! across an await. [`Hub::run`] is its body: it alone starts flights, so their order and the token bucket hold there.
//! What one attempt does is `issue`'s business; who may ask is `policy`'s.

mod entry;
mod flight;
mod following;
mod queue;
mod state;
mod subscription;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt,
    hash::{Hash, Hasher},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime},
};

use rand::{SeedableRng as _, rngs::StdRng};
use tokio::sync::{Notify, watch};

use crate::{
    account::{Account, Full, Line, Principal},
    attest::{Pods, Workload},
    clock::Clock,
    issue::IssueError,
    metrics::{Metrics, SignerMetrics},
    policy::{self, Ask, Denial, Grant, PolicySet},
    rate::{Buckets, Rate},
    signer::{Sign, Stage},
    x509::{Bundle, Csr},
};

pub use entry::{Delay, Live};
pub use following::Following;
pub use state::Row;
pub use subscription::{Event, Subscription};

use entry::{Entry, Flight, Key};
use queue::{Queue, Turn};
use state::State;

/// How long an entry that nobody follows is kept for a follower that comes back.
pub const LINGER: Duration = Duration::from_secs(300);
/// Entries one principal may hold that nobody follows; the longest idle goes first.
pub const MAX_IDLE_PER_PRINCIPAL: usize = 256;
/// Flights under way at once; more wait for their turn.
pub const MAX_FLIGHTS: usize = 64;
/// Flights of one principal under way at once: slow ones, as with large RSA keys, delay nobody else's.
pub const MAX_FLIGHTS_PER_PRINCIPAL: usize = 8;
/// Places among [`MAX_FLIGHTS`] that only a principal with no flight under way may take: slow flights of a few principals
/// leave a first place to all others.
pub const FIRST_PLACES: usize = MAX_FLIGHTS / 4;
/// How long a caller waits for its certificate, in the queue and for the signer.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);
/// How long one attempt may take before it counts as failed.
pub const FLIGHT_TIMEOUT: Duration = Duration::from_secs(60);
/// The renew point is drawn between these fractions of a certificate's remaining life, so that its successor is out
/// before 80 % of it.
pub const RENEW_WINDOW: (f64, f64) = (0.55, 0.75);
/// The longest sleep without reading the wall clock again, so that suspend and clock steps are noticed.
pub const MAX_SLEEP: Duration = Duration::from_secs(300);
/// How long flights may go on after a stop is asked for.
pub const STOP_GRACE: Duration = Duration::from_secs(5);

/// What the hub stands on.
#[derive(Debug)]
pub struct Parts {
    /// Wall clock.
    pub clock: Clock,
    /// Policies in force.
    pub policies: watch::Receiver<Arc<PolicySet>>,
    /// The pods of this node, in a cluster: what a credential's owner is now.
    pub pods: Option<Pods>,
    /// Signers this agent has; a grant names one of them.
    pub signers: Vec<Arc<dyn Sign>>,
    /// Issuances to all signers together.
    pub signer_rate: Rate,
    /// Issuances asked for by one principal.
    pub principal_rate: Rate,
    /// What each principal holds, and may hold.
    pub account: Account,
    /// Seed of the renewal jitter.
    pub seed: u64,
    /// Counters and gauges.
    pub metrics: Metrics,
}

/// A handle on the hub; clones share it.
#[derive(Clone)]
pub struct Hub(Arc<Shared>);

struct Shared {
    clock: Clock,
    policies: watch::Receiver<Arc<PolicySet>>,
    pods: Option<Pods>,
    signers: BTreeMap<String, Signer>,
    metrics: Metrics,
    account: Account,
    principals: Buckets<Principal>,
    /// Tells `run` that there is something to start or an earlier moment to wake at.
    wake: Notify,
    state: Mutex<State>,
}

/// A signer with its metrics, resolved once.
struct Signer {
    sign: Arc<dyn Sign>,
    metrics: SignerMetrics,
}

/// A key made by the caller, with what it wants done at the renew point.
#[derive(Clone, Debug)]
pub struct Held {
    /// The caller's request.
    pub csr: Arc<Csr>,
    /// When set, the key is never certified twice: the follower is told to rotate it.
    pub rotate_key: bool,
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.csr.der() == other.csr.der() && self.rotate_key == other.rotate_key
    }
}

impl Eq for Held {}

impl Hash for Held {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.csr.der().hash(state);
    }
}

/// A step of an issuance that its caller is told of.
#[derive(Clone, Debug)]
pub enum Step {
    /// The policy of that name allows all that was asked.
    Granted(String),
    /// The signer is at work.
    Signer(Stage),
}

/// Called with each step of a first issuance.
pub type Progress = Arc<dyn Fn(Step) + Send + Sync>;

impl Hub {
    /// A hub over `parts`; nothing moves until [`Hub::run`].
    pub fn new(parts: Parts) -> Self {
        let signers = parts.signers.into_iter().map(|sign| {
            let metrics = parts.metrics.signer(sign.name());
            (sign.name().to_owned(), Signer { sign, metrics })
        });
        let signers = signers.collect();
        Self(Arc::new(Shared {
            state: Mutex::new(State::new(Queue::new(parts.signer_rate), StdRng::seed_from_u64(parts.seed))),
            clock: parts.clock,
            policies: parts.policies,
            pods: parts.pods,
            signers,
            metrics: parts.metrics,
            account: parts.account,
            principals: Buckets::new(parts.principal_rate),
            wake: Notify::new(),
        }))
    }

    /// Issues a new certificate, whatever else the workload has, and follows it.
    ///
    /// Returns once it is there; `progress` is told each stage. When the caller goes away the flight still lands.
    pub async fn issue(
        &self,
        workload: Arc<Workload>,
        ask: Ask,
        held: Option<Held>,
        progress: Progress,
    ) -> Result<Subscription, HubError> {
        let decision = self.decide(&workload, &ask)?;
        progress(Step::Granted(decision.0.policy().to_owned()));
        self.admit(&workload)?;
        let subscription = {
            let mut state = self.lock();
            let entry = Entry::new(workload, ask, held, decision, None, Some(progress));
            self.insert(&mut state, entry)?
        };
        self.0.wake.notify_one();
        subscription.live().await
    }

    /// Follows the credential of this request: the one at hand if the workload has it, else a newly issued one.
    pub async fn subscribe(
        &self,
        workload: Arc<Workload>,
        ask: Ask,
        held: Option<Held>,
    ) -> Result<Subscription, HubError> {
        let key = Arc::new(Key { workload, ask, held });
        if let Some(subscription) = self.follow(&key)? {
            return subscription.live().await;
        }
        let decision = self.decide(&key.workload, &key.ask)?;
        self.admit(&key.workload)?;
        let subscription = {
            let mut state = self.lock();
            // No await lies between the look-up and here, but another thread may have been faster.
            match state.id_of(&key) {
                Some(id) => self.join(&mut state, id),
                None => {
                    let (workload, ask, held) = (key.workload.clone(), key.ask.clone(), key.held.clone());
                    let entry = Entry::new(workload, ask, held, decision, Some(key), None);
                    self.insert(&mut state, entry)?
                }
            }
        };
        self.0.wake.notify_one();
        subscription.live().await
    }

    /// Follows the credential of that id after `after`, if the workload has one; another's id is as unknown as none.
    pub async fn resume(&self, workload: &Workload, id: &str, after: u64) -> Result<Option<Subscription>, HubError> {
        let Ok(id) = u128::from_str_radix(id, 16) else { return Ok(None) };
        let subscription = {
            let mut state = self.lock();
            match state.entries.get(&id) {
                Some(entry) if entry.is_of(workload) => {
                    self.confirm(&mut state, id)?;
                    self.join(&mut state, id)
                }
                _ => return Ok(None),
            }
        };
        Ok(Some(subscription.live().await?.after(after)))
    }

    /// The live credentials that `visible` lets through, soonest expiry first.
    pub fn rows(&self, visible: impl Fn(&Workload) -> bool) -> Vec<Row> {
        self.lock().rows(visible)
    }

    /// The roots of one signer.
    pub fn bundle(&self, name: &str) -> Option<watch::Receiver<Arc<Bundle>>> {
        self.0.signers.get(name).map(|signer| signer.sign.bundle())
    }

    /// The policies in force.
    pub fn policies(&self) -> Arc<PolicySet> {
        self.0.policies.borrow().clone()
    }

    /// The wall clock by which certificates are judged here.
    pub fn now(&self) -> SystemTime {
        self.0.clock.now()
    }

    /// The policies in force, as they change.
    pub fn watch_policies(&self) -> watch::Receiver<Arc<PolicySet>> {
        self.0.policies.clone()
    }

    /// What a workload is, as it changes.
    pub fn watch_workload(&self, workload: Arc<Workload>) -> Following {
        Following::new(self.clone(), workload)
    }

    /// What the policies in force say, with those policies.
    fn decide(&self, workload: &Workload, ask: &Ask) -> Result<(Grant, Arc<PolicySet>), HubError> {
        let policies = self.policies();
        let decided = tracing::debug_span!("decide").in_scope(|| policy::decide(&policies, workload, ask));
        match decided {
            Ok(grant) => {
                self.0.metrics.decisions.good();
                Ok((grant, policies))
            }
            Err(denial) => {
                self.0.metrics.decisions.bad(denial.reason());
                if let Some(Line { left_out }) = self.0.account.line(workload.principal()) {
                    tracing::info!(%workload, reason = denial.reason(), %denial, left_out, "denied");
                }
                Err(HubError::Denied(Arc::new(denial)))
            }
        }
    }

    /// Follows an entry that is at hand under the policies in force.
    fn follow(&self, key: &Arc<Key>) -> Result<Option<Subscription>, HubError> {
        let mut state = self.lock();
        let Some(id) = state.id_of(key) else { return Ok(None) };
        self.confirm(&mut state, id)?;
        Ok(Some(self.join(&mut state, id)))
    }

    /// Makes sure that the entry's grant stands under the policies in force and for what its workload is now, which may be
    /// newer than the last sweep.
    fn confirm(&self, state: &mut State, id: u128) -> Result<(), HubError> {
        match self.revise(state, id) {
            Some(lost) => Err(lost),
            None => Ok(()),
        }
    }

    /// Decides on an entry again if its pod or the policies have changed. A lost right ends it, and is returned.
    fn revise(&self, state: &mut State, id: u128) -> Option<HubError> {
        let (now, entry) = (self.0.clock.now(), state.entries.get(&id)?);
        match self.workload_now(&entry.workload) {
            Ok(workload) => state.becomes(id, workload),
            Err(gone) => {
                state.lost(id, gone.clone(), now);
                self.publish_gauges(state);
                return Some(gone);
            }
        }
        state.redecide(id, &self.policies(), now).inspect(|_| self.publish_gauges(state))
    }

    /// What a workload is now, as far as it is told: a pod's facts change, and it ends. While nobody tells, it is what it
    /// was.
    fn workload_now(&self, workload: &Arc<Workload>) -> Result<Arc<Workload>, HubError> {
        match (&self.0.pods, workload.pod()) {
            (Some(pods), Some(pod)) => match pods.by_uid(&pod.uid) {
                None if pods.synced() => Err(HubError::PodGone(workload.to_string())),
                now => Ok(now.unwrap_or_else(|| workload.clone())),
            },
            _ => Ok(workload.clone()),
        }
    }

    /// A follower of `id`, which must be there. An expired certificate is renewed at once.
    fn join(&self, state: &mut State, id: u128) -> Subscription {
        let (now, first_due) = (self.0.clock.now(), state.first_due());
        state.followed(id, now);
        let entry = &state.entries[&id];
        if entry.snapshot.borrow().live().is_some_and(|live| live.credential.not_after() <= now) {
            state.enqueue(id, Turn::AskedNow);
        }
        let sooner = first_due.is_none_or(|before| state.first_due().is_some_and(|first| first < before));
        // Queued here, or by a decision just before.
        if sooner || matches!(state.entries[&id].flight, Flight::Queued(..)) {
            self.0.wake.notify_one();
        }
        Subscription::new(self.clone(), id, state.entries[&id].snapshot.subscribe())
    }

    fn insert(&self, state: &mut State, entry: Entry) -> Result<Subscription, HubError> {
        self.signer(&entry.grant)?;
        let rx = entry.snapshot.subscribe();
        let id = state.insert(entry, &self.0.account)?;
        // The workload may have changed since it was attested, and the sweep that this called for may be over.
        self.confirm(state, id)?;
        state.enqueue(id, Turn::AskedNow);
        self.publish_gauges(state);
        Ok(Subscription::new(self.clone(), id, rx))
    }

    /// The signer that a grant names.
    fn signer(&self, grant: &Grant) -> Result<&Signer, HubError> {
        self.0.signers.get(grant.signer()).ok_or_else(|| HubError::UnknownSigner {
            policy: grant.policy().to_owned(),
            signer: grant.signer().to_owned(),
            known: self.0.signers.keys().cloned().collect::<Vec<_>>().join(", "),
        })
    }

    /// Charges the principal for one issuance.
    fn admit(&self, workload: &Workload) -> Result<(), HubError> {
        self.0.principals.check(&workload.principal()).map_err(|retry_after| HubError::RateLimited { retry_after })
    }

    /// Whether the entry's owner is `workload`, or is what is left of it and policy still grants it the same certificate.
    fn may_have(&self, id: u128, workload: &Workload) -> bool {
        let state = self.lock();
        state.entries.get(&id).is_some_and(|entry| {
            let same = |grant| state::same_certificate(&grant, &entry.grant);
            let granted = || policy::decide(&self.policies(), workload, &entry.ask).is_ok_and(same);
            *entry.workload == *workload || (workload.is_still(&entry.workload) && granted())
        })
    }

    /// A follower has gone: when it was the last one, the entry starts to linger.
    fn left(&self, id: u128) {
        let mut state = self.lock();
        state.left(id, self.0.clock.now());
        self.publish_gauges(&state);
    }

    fn publish_gauges(&self, state: &State) {
        self.0.metrics.credentials.set(state.entries.len() as i64);
        self.0.metrics.renewals_waiting.set(state.queue.renewals() as i64);
        self.0.metrics.set_earliest_expiry(state.earliest_expiry());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect("no code panics while it holds the hub's lock")
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub").field("signers", &self.0.signers.keys()).finish_non_exhaustive()
    }
}

fn too_many(full: &Full) -> String {
    match full {
        Full::Own { held, max } => {
            format!(
                "{held} credentials are held by this workload's user, at most {max}; close streams that are no longer needed"
            )
        }
        Full::All { held, max } => {
            format!("{held} credentials are held by all workloads together, at most {max}; try again later")
        }
        Full::Of(_) => "all credentials are held by others; try again later".to_owned(),
    }
}

/// Why the hub has no certificate for a caller.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HubError {
    /// Policy refuses.
    #[error("{0}")]
    Denied(Arc<Denial>),
    /// The pod has ended or was deleted.
    #[error("{0} is gone: it has ended, or was deleted or replaced")]
    PodGone(String),
    /// A policy names a signer that this agent does not have.
    #[error(
        "policy {policy} names signer {signer:?}, and this agent has {known}: correct the policy, or give the agent that signer"
    )]
    UnknownSigner {
        /// The policy.
        policy: String,
        /// The signer it names.
        signer: String,
        /// The signers there are.
        known: String,
    },
    /// The principal asks too fast.
    #[error("too many certificates asked for; try again in {} ms", retry_after.as_millis())]
    RateLimited {
        /// When one more would be allowed.
        retry_after: Duration,
    },
    /// The principal, or all together, hold as many credentials as the agent keeps.
    #[error("{}", too_many(.0))]
    TooMany(Full),
    /// Another principal had none, and this one had most: its idlest was given up.
    #[error(
        "the agent has no room for more credentials, and this workload's user held most of them: this one was given up"
    )]
    GivenUp,
    /// The attempt failed.
    #[error(transparent)]
    Issue(Arc<IssueError>),
    /// The attempt took longer than [`FLIGHT_TIMEOUT`], or the caller has waited for [`ANSWER_TIMEOUT`].
    #[error("no certificate within {} s: the signer, or the queue before it, is slow", FLIGHT_TIMEOUT.as_secs())]
    TimedOut,
    /// The attempt's task panicked; a fault of the agent.
    #[error("the issuance was lost to a fault of the agent; its log has the details")]
    Lost,
    /// A renewal failed and the certificate has expired since.
    #[error("the certificate has expired, or policy grants another by now, and its renewal fails: {0}")]
    Expired(String),
    /// A renewal is still waiting for its turn and the end of its certificate comes near; nothing has failed.
    #[error(
        "the renewal is waiting for its turn: more certificates are asked of this agent than its signers or its limits allow"
    )]
    Queued,
    /// The entry was given up while the caller waited for it.
    #[error("the agent is stopping")]
    Stopping,
}

impl HubError {
    /// Stable reason for `ErrorInfo` and metric labels.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Denied(denial) => denial.reason(),
            Self::PodGone(_) => "POD_GONE",
            Self::UnknownSigner { .. } => "SIGNER_UNKNOWN",
            Self::RateLimited { .. } => "RATE_LIMITED",
            Self::TooMany(_) | Self::GivenUp => "TOO_MANY_CREDENTIALS",
            Self::Issue(error) => error.reason(),
            Self::TimedOut => "SIGNER_TIMEOUT",
            Self::Lost => "ISSUANCE_LOST",
            Self::Expired(_) => "CERTIFICATE_EXPIRED",
            Self::Queued => "RENEWAL_QUEUED",
            Self::Stopping => "AGENT_STOPPING",
        }
    }

    /// How long the signer wants to be left alone.
    fn retry_after(&self) -> Duration {
        match self {
            Self::Issue(error) => error.retry_after().unwrap_or_default(),
            _ => Duration::ZERO,
        }
    }
}
