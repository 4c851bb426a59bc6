//! What a workload is handed unasked, over time: its identities, the certificate of each that is wanted, and their roots.
//!
//! An identity is in here for as long as a policy in force offers it; when none is left, [`Identities::changed`] ends with
//! the policies' reasons. Certificates are the hub's: nothing is issued that nobody wants, and all streams of a workload
//! share one. One that cannot be had does not hold up the others; it is asked for again. What of this is told, in which
//! form and under which name is up to the services.

use std::{collections::BTreeMap, future, mem, pin::Pin, sync::Arc, time::Duration};

use futures_util::future::select_all;
use opentelemetry::trace::SpanContext;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tonic::Code;
use tracing::Instrument as _;

use super::{call::Call, refusal::Refusal};
use crate::{
    hub::{Event, Following, Hub, HubError, Live, Subscription},
    policy::{self, Ask, Offer, PolicySet},
    spiffe::SpiffeId,
    x509::{Bundle, Names},
};

/// Identities of one workload; what policies offer beyond is left out. Clients of the Workload API take no more.
pub const MAX_IDENTITIES: usize = 100;
/// How long after a failure a certificate is asked for again.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Whether the identity at that place and of that name is meant.
type Choice = Box<dyn Fn(usize, &str) -> bool + Send + Sync>;
type Subscribing = Pin<Box<dyn Future<Output = Result<(Subscription, Live), HubError>> + Send>>;

/// The identities of one workload, in order of policy name and then as offered; those without a SPIFFE ID come last.
pub(super) struct Identities {
    hub: Hub,
    workload: Following,
    policies: watch::Receiver<Arc<PolicySet>>,
    offered: fn(&Offer) -> bool,
    /// Those whose certificates are wanted.
    wanted: Choice,
    list: Vec<Identity>,
}

/// One offer of a policy.
pub(super) struct Identity {
    /// The SPIFFE ID, or the first DNS name of an offer without one.
    pub(super) name: String,
    /// The SPIFFE ID of its trust domain.
    pub(super) trust_domain: Option<String>,
    pub(super) hint: String,
    pub(super) certificate: Certificate,
    ask: Ask,
    signer: String,
    /// `None` when the policy names a signer that is not there.
    roots: Option<watch::Receiver<Arc<Bundle>>>,
}

/// Where the certificate of an identity stands.
pub(super) enum Certificate {
    Unwanted,
    Pending(Subscribing),
    Live(Subscription, Live),
    /// Not to be had; asked for again at that moment.
    Failed(Refusal, Instant),
}

/// What has changed.
enum Change {
    /// There is a new certificate, from this trace.
    Certificate(Option<SpanContext>),
    /// The right to it may be lost.
    Denied,
    /// It is time to ask for it again.
    Retry,
    /// The roots, or that there is no certificate.
    Other,
}

impl Identities {
    /// What policies offer to the workload of `call`, as far as `offered` says. Certificates are asked for in the current span.
    pub(super) fn of(
        call: &Call,
        offered: fn(&Offer) -> bool,
        wanted: impl Fn(usize, &str) -> bool + Send + Sync + 'static,
    ) -> Result<Self, Refusal> {
        let hub = call.engine.hub.clone();
        let policies = hub.watch_policies();
        let workload = hub.watch_workload(call.workload.clone());
        let mut identities = Self { hub, workload, policies, offered, wanted: Box::new(wanted), list: Vec::new() };
        identities.follow_policies()?;
        Ok(identities)
    }

    /// Wants these certificates from now on, and no others.
    pub(super) fn want(&mut self, wanted: impl Fn(usize, &str) -> bool + Send + Sync + 'static) {
        self.wanted = Box::new(wanted);
        self.ask_for_wanted();
    }

    /// The identities; at least one.
    pub(super) fn list(&self) -> &[Identity] {
        &self.list
    }

    /// The certificate of one of them, if it is at hand and has not expired.
    pub(super) fn live<'a>(&self, identity: &'a Identity) -> Option<&'a Live> {
        match &identity.certificate {
            Certificate::Live(_, live) => Some(live).filter(|live| live.credential.not_after() > self.hub.now()),
            _ => None,
        }
    }

    /// Whether it is known of each wanted certificate whether it can be had.
    pub(super) fn settled(&self) -> bool {
        !self.list.iter().any(|identity| matches!(identity.certificate, Certificate::Pending(_)))
    }

    /// The credentials that are followed.
    pub(super) fn subscriptions(&self) -> impl Iterator<Item = &Subscription> {
        self.list.iter().filter_map(|identity| match &identity.certificate {
            Certificate::Live(subscription, _) => Some(subscription),
            _ => None,
        })
    }

    /// The roots of each trust domain, of every signer that certifies names of it; by the trust domain's SPIFFE ID.
    pub(super) fn bundles(&self) -> BTreeMap<&str, Vec<Arc<Bundle>>> {
        let mut bundles: BTreeMap<&str, Vec<Arc<Bundle>>> = BTreeMap::new();
        for identity in &self.list {
            let (Some(trust_domain), Some(roots)) = (&identity.trust_domain, identity.roots()) else { continue };
            let of_domain = bundles.entry(trust_domain).or_default();
            if !of_domain.contains(&roots) {
                of_domain.push(roots);
            }
        }
        bundles
    }

    /// Waits for the next change, and returns the trace of a new certificate. Cancel safe.
    ///
    /// # Errors
    /// No policy offers anything any more, or the pod is gone.
    pub(super) async fn changed(&mut self) -> Result<Option<SpanContext>, Refusal> {
        let changes = self.list.iter_mut().map(|identity| Box::pin(identity.changed()));
        let (change, at) = tokio::select! {
            biased;
            Ok(()) = self.policies.changed() => (Change::Other, None),
            other = self.workload.changed() => {
                other.map_err(|gone| Refusal::from(&gone))?;
                (Change::Other, None)
            }
            (change, at, _) = select_all(changes) => (change, Some(at)),
        };
        match (change, at) {
            (Change::Certificate(trace), _) => return Ok(trace),
            (Change::Other, Some(_)) => {}
            (Change::Retry, _) => self.ask_for_wanted(),
            (Change::Denied, _) if !self.policies.has_changed().unwrap_or(false) => {}
            (Change::Denied | Change::Other, _) => self.follow_policies()?,
        }
        Ok(None)
    }

    /// Takes in what the policies in force offer, and keeps what is at hand of it.
    fn follow_policies(&mut self) -> Result<(), Refusal> {
        let policies = self.policies.borrow_and_update().clone();
        let mut offers = policy::offers(&policies, self.workload.workload());
        offers.retain(self.offered);
        offers.sort_by_key(|offer| !is_spiffe(offer));
        if offers.len() > MAX_IDENTITIES {
            let (workload, offers) = (self.workload.workload(), offers.len());
            tracing::warn!(%workload, offers, "policies offer more identities than {MAX_IDENTITIES}; the last are left out");
        }
        let mut before = mem::take(&mut self.list);
        for offer in offers.into_iter().take(MAX_IDENTITIES) {
            let (ask, signer) = (offer.ask(), offer.grant.signer());
            let at_hand = before.iter().position(|it| (&it.ask, it.signer.as_str()) == (&ask, signer));
            let mut identity = match at_hand {
                Some(at) => before.swap_remove(at),
                None => Identity::new(&self.hub, ask, signer),
            };
            identity.hint = offer.hint;
            self.list.push(identity);
        }
        if self.list.is_empty() {
            let denial = policy::nothing_offered(&policies, self.workload.workload());
            return Err(Refusal::new(Code::PermissionDenied, denial.reason(), denial.to_string()));
        }
        self.ask_for_wanted();
        Ok(())
    }

    /// Asks for the certificates that are wanted and not at hand, and gives up those that are not wanted.
    fn ask_for_wanted(&mut self) {
        for (place, identity) in self.list.iter_mut().enumerate() {
            let wanted = (self.wanted)(place, &identity.name);
            match identity.certificate {
                Certificate::Pending(_) | Certificate::Live(..) if wanted => {}
                _ if !wanted => identity.certificate = Certificate::Unwanted,
                _ => {
                    let workload = self.workload.workload().clone();
                    let (hub, ask) = (self.hub.clone(), identity.ask.clone());
                    let subscribed = async move {
                        let mut subscription = hub.subscribe(workload, ask, None).await?;
                        let live = subscription.first().await?;
                        Ok((subscription, live))
                    };
                    identity.certificate = Certificate::Pending(Box::pin(subscribed.in_current_span()));
                }
            }
        }
    }
}

/// Whether an offer is an identity of the SPIFFE kind.
pub(super) fn is_spiffe(offer: &Offer) -> bool {
    spiffe_id(offer.grant.names()).is_some()
}

fn spiffe_id(names: &Names) -> Option<SpiffeId> {
    names.uris.iter().find_map(|uri| SpiffeId::parse(uri).ok())
}

impl Identity {
    fn new(hub: &Hub, ask: Ask, signer: &str) -> Self {
        let roots = hub.bundle(signer);
        let spiffe_id = spiffe_id(&ask.names);
        let trust_domain = spiffe_id.as_ref().map(|id| id.trust_domain().to_owned());
        let name = spiffe_id.map(|id| id.as_str().to_owned());
        let name = name.or_else(|| ask.names.dns.first().map(ToString::to_string)).unwrap_or_default();
        let (hint, certificate, signer) = (String::new(), Certificate::Unwanted, signer.to_owned());
        Self { name, trust_domain, hint, certificate, ask, signer, roots }
    }

    /// The roots of its signer, never older than its certificate.
    pub(super) fn roots(&self) -> Option<Arc<Bundle>> {
        // None before they have been read the first time.
        self.roots.as_ref().map(|roots| roots.borrow().clone()).filter(|roots| !roots.is_empty())
    }

    async fn changed(&mut self) -> Change {
        let roots = async {
            match &mut self.roots {
                Some(roots) => roots.changed().await.is_ok(),
                None => false,
            }
        };
        tokio::select! {
            true = roots => Change::Other,
            change = self.certificate.changed() => change,
        }
    }
}

impl Certificate {
    async fn changed(&mut self) -> Change {
        let failed = |error: &HubError| Self::Failed(Refusal::from(error), Instant::now() + RETRY_AFTER);
        match self {
            Self::Unwanted => future::pending().await,
            Self::Failed(_, retry_at) => {
                sleep_until(*retry_at).await;
                Change::Retry
            }
            Self::Pending(subscribed) => {
                let subscribed = subscribed.await;
                let change = match &subscribed {
                    Ok((_, live)) => Change::Certificate(live.trace.clone()),
                    Err(HubError::Denied(_) | HubError::PodGone(_)) => Change::Denied,
                    Err(_) => Change::Other,
                };
                *self = subscribed.map_or_else(|error| failed(&error), |(it, live)| Self::Live(it, live));
                change
            }
            Self::Live(subscription, live) => loop {
                let (error, change) = match subscription.next().await {
                    Event::Certificate(_, renewed) => {
                        *live = renewed;
                        return Change::Certificate(live.trace.clone());
                    }
                    // The signer's roots are watched beside, and a renewal that is late is no business of these services.
                    Event::Bundle(..) | Event::Delayed(..) | Event::RotationDue(..) => continue,
                    Event::Denied(_, lost) => (lost, Change::Denied),
                    Event::Ended(error) => (error, Change::Other),
                };
                *self = failed(&error);
                return change;
            },
        }
    }
}
