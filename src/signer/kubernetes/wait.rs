//! One request, from its creation to its certificate: what is done to it meanwhile, and how long each step may take.
//!
//! Invariant: only the object with the UID of the creation counts. A watch that ends, for whatever reason, is no answer:
//! the request is read again, and watched from there.

use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::api::WatchEvent;
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    APPROVAL_TIMEOUT, SIGNING_TIMEOUT,
    api::{CsrApi, Events},
    failure::{ApiError, KubernetesError, said},
};
use crate::{backoff::Backoff, signer::Stage};

/// Between a watch that ended and the next look.
const RESUME: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
/// Reason of the condition that the agent adds.
const APPROVED_BY_AGENT: &str = "AllowedByPolicy";

/// A request that has been created.
pub(super) struct Wait<'a> {
    api: &'a CsrApi,
    signer: &'a str,
    name: &'a str,
    uid: String,
    progress: &'a (dyn Fn(Stage) + Send + Sync),
    approved: bool,
    until: Instant,
    /// Why the request cannot be seen now.
    blind: Option<ApiError>,
}

impl<'a> Wait<'a> {
    pub(super) fn new(
        api: &'a CsrApi,
        signer: &'a str,
        name: &'a str,
        uid: String,
        progress: &'a (dyn Fn(Stage) + Send + Sync),
    ) -> Self {
        let until = Instant::now() + APPROVAL_TIMEOUT;
        Self { api, signer, name, uid, progress, approved: false, until, blind: None }
    }

    /// Approves the request; `message` goes into its condition.
    pub(super) async fn approve(&mut self, message: &str) -> Result<(), KubernetesError> {
        let approved = self.api.decide(self.name, ("Approved", APPROVED_BY_AGENT, message), false, self.until).await;
        let approved = approved.map_err(|source| match source {
            ApiError::NotFound(_) => KubernetesError::Deleted,
            source => KubernetesError::Api { action: "approve the CertificateSigningRequest", source },
        })?;
        // A signer may have been faster than the answer; its certificate is in an event, too.
        self.judge(&approved).map(drop)
    }

    /// The certificate, once it is there; `events` is the watch that was opened with the creation.
    pub(super) async fn certificate(mut self, events: Result<Events, ApiError>) -> Result<Vec<u8>, KubernetesError> {
        let mut events = self.sees(events)?;
        let mut interruptions = 0;
        loop {
            if let Some(open) = &mut events {
                match timeout_at(self.until, open.next()).await {
                    Err(_) => return Err(self.too_late()),
                    Ok(Some(Ok(WatchEvent::Added(csr) | WatchEvent::Modified(csr)))) => {
                        if let Some(certificate) = self.judge(&csr)? {
                            return Ok(certificate);
                        }
                    }
                    Ok(Some(Ok(WatchEvent::Deleted(_)))) => return Err(KubernetesError::Deleted),
                    Ok(Some(Ok(WatchEvent::Bookmark(_)))) => {}
                    // Closed, broken, or too old.
                    Ok(None | Some(Err(_) | Ok(WatchEvent::Error(_)))) => events = None,
                }
                continue;
            }
            interruptions += 1;
            let pause = RESUME.delay(interruptions, &mut rand::rng());
            if timeout_at(self.until, sleep(pause)).await.is_err() {
                return Err(self.too_late());
            }
            match self.api.get(self.name, self.until).await {
                Ok(csr) => {
                    if let Some(certificate) = self.judge(&csr)? {
                        return Ok(certificate);
                    }
                    let version = csr.metadata.resource_version.unwrap_or_default();
                    let watch = self.api.watch(self.name, &version, self.until).await;
                    events = self.sees(watch)?;
                }
                Err(ApiError::NotFound(_)) => return Err(KubernetesError::Deleted),
                Err(error) => events = self.sees(Err(error))?,
            }
        }
    }

    /// The watch, or none for now when the API server may only be away for a moment.
    fn sees(&mut self, events: Result<Events, ApiError>) -> Result<Option<Events>, KubernetesError> {
        match events {
            Ok(events) => {
                self.blind = None;
                Ok(Some(events))
            }
            Err(error) if error.passes() => {
                self.blind = Some(error);
                Ok(None)
            }
            // The watch is too old for the server: the next one begins with what is read now.
            Err(ApiError::Unexpected { code: 410, .. }) => Ok(None),
            Err(source) => Err(KubernetesError::Api { action: "watch the CertificateSigningRequest", source }),
        }
    }

    /// What has become of the request; the certificate, when there is one.
    fn judge(&mut self, csr: &CertificateSigningRequest) -> Result<Option<Vec<u8>>, KubernetesError> {
        if csr.metadata.uid.as_ref() != Some(&self.uid) {
            return Err(KubernetesError::Replaced);
        }
        let Some(status) = &csr.status else { return Ok(None) };
        for condition in status.conditions.iter().flatten() {
            let (reason, message) = (condition.reason.as_deref(), condition.message.as_deref());
            let said = said(&[reason, message].into_iter().flatten().collect::<Vec<_>>().join(": "));
            match condition.type_.as_str() {
                "Denied" => return Err(KubernetesError::Denied { said }),
                "Failed" => return Err(KubernetesError::Failed { signer: self.signer.to_owned(), said }),
                "Approved" if !self.approved => {
                    self.approved = true;
                    self.until = Instant::now() + SIGNING_TIMEOUT;
                    (self.progress)(Stage::Approved(said));
                }
                _ => {}
            }
        }
        // A certificate on a request that nobody approved is not waited for, and not taken.
        Ok(status.certificate.as_ref().filter(|_| self.approved).map(|certificate| certificate.0.clone()))
    }

    fn too_late(&mut self) -> KubernetesError {
        let signer = self.signer.to_owned();
        match self.blind.take() {
            Some(source) => KubernetesError::Api { action: "watch the CertificateSigningRequest", source },
            None if self.approved => KubernetesError::NotSigned { signer },
            None => KubernetesError::NotApproved { signer },
        }
    }
}
