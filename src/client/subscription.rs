//! Following one certificate across lost connections and restarts of the agent.
//!
//! The subscription remembers the certificate's id and the last sequence it saw, and comes back with both and with the
//! request, which serves when the agent no longer knows the id. So nothing is shown twice, nothing is missed, and an
//! older certificate never follows a newer one. It ends only with an error that asking again cannot mend.

use std::time::Duration;

use futures_util::{Stream, stream};
use jiff::Timestamp;
use tokio::time::sleep;
use tonic::Streaming;

use super::{Client, ClientError, Code, certificate};
use crate::{backoff::Backoff, client::Certificate, proto::v1, text::printable};

/// Waits between connections: 0.1 s at least, 10 s at most.
const RECONNECT: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));

/// What became of the certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The certificate in force, at the start and whenever the agent sends its full state.
    Current(Certificate),
    /// A new certificate replaces the last one.
    Renewed(Certificate),
    /// A renewal failed; the certificate stays valid.
    RenewalDelayed {
        /// The agent's stable reason.
        reason: String,
        /// One sentence.
        message: String,
        /// When it tries again.
        retry_at: Timestamp,
        /// When the certificate ends.
        expires_at: Timestamp,
    },
    /// The caller holds the key and asked to rotate it.
    RenewalDue {
        /// When the certificate ends.
        expires_at: Timestamp,
    },
    /// New roots, PEM, the whole set.
    TrustBundleUpdated(String),
    /// The agent is away; the subscription comes back by itself.
    Disconnected {
        /// Why.
        error: ClientError,
        /// When it connects again.
        retry_in: Duration,
    },
}

/// One followed certificate.
#[derive(Debug)]
pub struct Subscription {
    client: Client,
    resume: v1::SubscribeRequest,
    open: Option<Streaming<v1::SubscribeResponse>>,
    /// Failures since the last answer.
    failures: u32,
    wait: Duration,
}

impl Subscription {
    pub(super) fn new(client: Client, wanted: v1::CertificateRequest) -> Self {
        let resume = v1::SubscribeRequest { request: Some(wanted), ..Default::default() };
        Self { client, resume, open: None, failures: 0, wait: Duration::ZERO }
    }

    /// This subscription from the next event of `certificate` on, which the caller has.
    #[must_use]
    pub fn after(mut self, certificate: &Certificate) -> Self {
        self.resume.certificate_id.clone_from(&certificate.certificate_id);
        self.resume.after_sequence = certificate.sequence;
        self
    }

    /// The events. The first error is the last item. Dropping a pending `next()` loses nothing.
    pub fn into_stream(self) -> impl Stream<Item = Result<Event, ClientError>> {
        stream::unfold(Some(self), |state: Option<Self>| async move {
            let mut subscription = state?;
            let next = subscription.next().await;
            let rest = next.is_ok().then_some(subscription);
            Some((next, rest))
        })
    }

    async fn next(&mut self) -> Result<Event, ClientError> {
        sleep(std::mem::take(&mut self.wait)).await;
        loop {
            match self.receive().await {
                Ok(response) => {
                    self.failures = 0;
                    if let Some(event) = self.accept(response)? {
                        return Ok(event);
                    }
                }
                Err(error) if error.is_transient() => {
                    self.open = None;
                    self.failures = self.failures.saturating_add(1);
                    self.wait = RECONNECT.delay(self.failures, &mut rand::rng());
                    return Ok(Event::Disconnected { error, retry_in: self.wait });
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn receive(&mut self) -> Result<v1::SubscribeResponse, ClientError> {
        let stream = match &mut self.open {
            Some(stream) => stream,
            None => self.open.insert(self.client.open(self.resume.clone()).await?),
        };
        match stream.message().await {
            Ok(Some(response)) => Ok(response),
            // The agent ends no stream with OK; something between did.
            Ok(None) => Err(ClientError {
                code: Code::Unavailable,
                reason: ClientError::UNREACHABLE.into(),
                message: "the stream ended".into(),
            }),
            Err(status) => Err(self.client.failed(status)),
        }
    }

    /// Takes note of where the stream stands; `None` for what has been seen before and for kinds of a newer agent.
    fn accept(&mut self, response: v1::SubscribeResponse) -> Result<Option<Event>, ClientError> {
        use v1::subscribe_response::Event as Wire;
        let missing = || ClientError::bad_answer("has an event without its certificate");
        let event = match response.event {
            None => return Ok(None),
            Some(Wire::Current(current)) => Event::Current(current.certificate.ok_or_else(missing)?.try_into()?),
            Some(Wire::Renewed(renewed)) => Event::Renewed(renewed.certificate.ok_or_else(missing)?.try_into()?),
            Some(Wire::RenewalDelayed(delayed)) => Event::RenewalDelayed {
                reason: printable(&delayed.reason),
                message: printable(&delayed.message),
                retry_at: certificate::timestamp("retry_at", delayed.retry_at)?,
                expires_at: certificate::timestamp("expires_at", delayed.expires_at)?,
            },
            Some(Wire::RenewalDue(due)) => {
                Event::RenewalDue { expires_at: certificate::timestamp("expires_at", due.expires_at)? }
            }
            Some(Wire::TrustBundleUpdated(update)) => {
                Event::TrustBundleUpdated(certificate::pem("trust_bundle", &update.trust_bundle)?)
            }
            Some(Wire::Denied(denied)) => {
                return Err(ClientError {
                    code: Code::PermissionDenied,
                    reason: printable(&denied.reason),
                    message: printable(&denied.message),
                });
            }
        };
        if let Event::Current(certificate) | Event::Renewed(certificate) = &event
            && certificate.certificate_id != self.resume.certificate_id
        {
            // Another credential: its sequence has nothing to do with the last one's.
            self.resume.certificate_id.clone_from(&certificate.certificate_id);
            self.resume.after_sequence = 0;
        }
        if response.sequence <= self.resume.after_sequence {
            return Ok(None);
        }
        self.resume.after_sequence = response.sequence;
        Ok(Some(event))
    }
}
