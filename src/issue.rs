//! One attempt: key, signature, check, [`Credential`]. A plain function that knows no time but the clock's.
//!
//! There is no other way to a `Credential`, and none past the check of the signer's answer against the grant. Retrying,
//! renewing and sharing are the hub's.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tokio::{sync::Semaphore, task::spawn_blocking};
use tracing::{Instrument as _, debug_span};
use zeroize::Zeroizing;

use crate::{
    attest::Workload,
    clock::Clock,
    policy::Grant,
    signer::{Key, Sign, SignError, SigningRequest, Stage},
    x509::{Bundle, Chain, Csr, Expected, KeyAlgorithm, KeyError, PrivateKey, VerifyError},
};

/// RSA keys made at the same time, each taking a core for up to seconds. More requests wait their turn.
pub const MAX_RSA_KEYS_AT_ONCE: usize = 2;

static RSA_TURNS: Semaphore = Semaphore::const_new(MAX_RSA_KEYS_AT_ONCE);

/// Issues what was granted: with a key made here, or for the key that `held` proves its sender to hold.
pub async fn issue(
    signer: &dyn Sign,
    clock: &Clock,
    workload: &Workload,
    grant: Grant,
    held: Option<Arc<Csr>>,
    progress: &(dyn Fn(Stage) + Send + Sync),
) -> Result<Credential, IssueError> {
    let key = key(grant.key(), held).instrument(debug_span!("key")).await?;
    let request = SigningRequest { workload, grant: &grant, key: &key, progress };
    let chain = signer.sign(request).instrument(debug_span!("sign", signer = signer.name())).await?;
    let bundle = signer.bundle().borrow().clone();
    debug_span!("verify").in_scope(|| {
        let expected = Expected {
            names: grant.names(),
            usages: grant.usages(),
            public_key: key.public_key(),
            lifetime: grant.lifetime(),
            now: clock.now(),
        };
        chain.verify(&bundle, &expected)
    })?;
    progress(Stage::Issued);
    let private_key = match key {
        Key::Made(key) => Some(key),
        Key::Held(_) => None,
    };
    Ok(Credential { grant, chain, private_key, bundle, chain_pem: OnceLock::new(), key_pem: OnceLock::new() })
}

/// A verified certificate, its key if the agent made it, and the roots that verified it.
pub struct Credential {
    grant: Grant,
    chain: Chain,
    private_key: Option<PrivateKey>,
    bundle: Arc<Bundle>,
    chain_pem: OnceLock<Bytes>,
    key_pem: OnceLock<Bytes>,
}

impl Credential {
    /// What was granted.
    pub fn grant(&self) -> &Grant {
        &self.grant
    }

    /// Leaf and intermediates.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// The private key; `None` when the workload holds it.
    pub fn private_key(&self) -> Option<&PrivateKey> {
        self.private_key.as_ref()
    }

    /// The signer's roots at the time of issuing.
    pub fn bundle(&self) -> &Arc<Bundle> {
        &self.bundle
    }

    /// Start of validity.
    pub fn not_before(&self) -> SystemTime {
        self.chain.not_before()
    }

    /// End of validity.
    pub fn not_after(&self) -> SystemTime {
        self.chain.not_after()
    }

    /// The chain as PEM, written once for all subscribers.
    pub fn chain_pem(&self) -> Bytes {
        self.chain_pem.get_or_init(|| self.chain.to_pem().into()).clone()
    }

    /// The private key as PKCS#8 in DER, wiped when the last clone is dropped.
    pub fn key_der(&self) -> Option<Bytes> {
        self.private_key.as_ref().map(|key| Bytes::from_owner(key.to_der()))
    }

    /// The private key as PEM, written once, wiped when the credential and the last clone are dropped.
    pub fn key_pem(&self) -> Option<Bytes> {
        let key = self.private_key.as_ref()?;
        let pem = || Bytes::from_owner(Zeroizing::new(std::mem::take(&mut *key.to_pem()).into_bytes()));
        Some(self.key_pem.get_or_init(pem).clone())
    }
}

/// Shows no key.
impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let serial = self.chain.serial_hex();
        f.debug_struct("Credential").field("grant", &self.grant).field("serial", &serial).finish_non_exhaustive()
    }
}

/// Why an attempt failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IssueError {
    /// The key could not be made.
    #[error("cannot make a key")]
    Key(#[from] KeyError),
    /// The process is stopping, or a key-making thread died.
    #[error("making the key was interrupted")]
    Interrupted,
    /// The workload's own key is of another kind than granted.
    #[error("the request holds a key of kind {held}, but {granted} was granted")]
    KeyAlgorithm {
        /// What was granted.
        granted: KeyAlgorithm,
        /// What the request holds.
        held: KeyAlgorithm,
    },
    /// The signer refused or failed.
    #[error("the signer did not sign")]
    Sign(#[from] SignError),
    /// The signer's answer is not what was granted.
    #[error("the signer's certificate is refused")]
    Verify(#[from] VerifyError),
}

impl IssueError {
    /// Stable reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Key(_) => "KEY_NOT_MADE",
            Self::Interrupted => "INTERRUPTED",
            Self::KeyAlgorithm { .. } => "KEY_ALGORITHM_NOT_GRANTED",
            Self::Sign(error) => error.reason(),
            Self::Verify(_) => "CERTIFICATE_NOT_AS_GRANTED",
        }
    }

    /// Whether the same attempt may succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Key(_) | Self::Interrupted => true,
            Self::KeyAlgorithm { .. } => false,
            Self::Sign(error) => error.is_transient(),
            Self::Verify(error) => error.is_transient(),
        }
    }

    /// How long the signer wants to be left alone.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Sign(error) => error.retry_after(),
            _ => None,
        }
    }
}

async fn key(algorithm: KeyAlgorithm, held: Option<Arc<Csr>>) -> Result<Key, IssueError> {
    if let Some(csr) = held {
        let held = csr.public_key().algorithm();
        if held != algorithm {
            return Err(IssueError::KeyAlgorithm { granted: algorithm, held });
        }
        return Ok(Key::Held(csr));
    }
    if !algorithm.is_rsa() {
        return Ok(Key::Made(PrivateKey::generate(algorithm)?));
    }
    let turn = RSA_TURNS.acquire().await.expect("the semaphore is never closed");
    // The turn goes into the thread: a caller who hangs up does not stop the work, so it must not free the turn either.
    let work = spawn_blocking(move || {
        let _turn = turn;
        PrivateKey::generate(algorithm)
    });
    Ok(Key::Made(work.await.map_err(|_| IssueError::Interrupted)??))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::sync::watch;

    use super::*;
    use crate::{
        metrics::Metrics,
        signer::{
            Signing,
            embedded::{DEFAULT_CA_LIFETIME, Embedded},
        },
        x509::{DnsName, Names, Usages},
    };

    const LIFETIME: Duration = Duration::from_secs(3600);

    fn grant(key: KeyAlgorithm) -> Grant {
        let dns = vec![DnsName::parse("web.example").unwrap()];
        Grant::for_test(Names { dns, ..Names::default() }, Usages::DEFAULT, key, LIFETIME)
    }

    fn embedded(clock: &Clock) -> Embedded {
        Embedded::ephemeral(DEFAULT_CA_LIFETIME, clock, Metrics::new().signer("embedded")).unwrap()
    }

    async fn issue_from(
        signer: &dyn Sign,
        key: KeyAlgorithm,
        held: Option<Arc<Csr>>,
    ) -> Result<Credential, IssueError> {
        issue(signer, &Clock::system(), &Workload::of_uid(1), grant(key), held, &|_| ()).await
    }

    fn csr(key: &PrivateKey) -> Arc<Csr> {
        let request = rcgen::CertificateParams::default().serialize_request(key).unwrap();
        Arc::new(Csr::parse(request.der()).unwrap())
    }

    /// A signer that answers with what it was told to, and the bundle of another.
    #[derive(Debug)]
    struct Fake {
        answer: Result<Chain, SignError>,
        bundle: watch::Sender<Arc<Bundle>>,
    }

    impl Sign for Fake {
        fn name(&self) -> &str {
            "fake"
        }

        fn sign<'a>(&'a self, _request: SigningRequest<'a>) -> Signing<'a> {
            Box::pin(async { self.answer.clone() })
        }

        fn ready(&self) -> Result<(), SignError> {
            Ok(())
        }

        fn bundle(&self) -> watch::Receiver<Arc<Bundle>> {
            self.bundle.subscribe()
        }
    }

    #[tokio::test]
    async fn every_kind_of_key_is_made_certified_and_handed_over() {
        let signer = embedded(&Clock::system());
        for key in [KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Ed25519, KeyAlgorithm::Rsa2048] {
            let credential = issue_from(&signer, key, None).await.unwrap();
            assert_eq!(credential.grant(), &grant(key));
            let pem = credential.key_pem().unwrap();
            let made = PrivateKey::from_pem(&pem).unwrap();
            assert_eq!((made.algorithm(), made.public_key()), (key, credential.private_key().unwrap().public_key()));
            assert_eq!(&Chain::from_pem(&credential.chain_pem()).unwrap(), credential.chain());
            assert_eq!(credential.bundle(), &*signer.bundle().borrow());
            assert_eq!(credential.chain_pem().as_ptr(), credential.chain_pem().as_ptr());
            let validity = credential.not_after().duration_since(credential.not_before()).unwrap();
            assert!(validity <= LIFETIME + crate::signer::embedded::BACKDATE + Duration::from_secs(1));
        }
    }

    #[tokio::test]
    async fn a_held_key_is_certified_and_never_seen() {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP384).unwrap();
        let signer = embedded(&Clock::system());
        let credential = issue_from(&signer, KeyAlgorithm::EcdsaP384, Some(csr(&key))).await.unwrap();
        assert!(credential.private_key().is_none() && credential.key_pem().is_none());
    }

    #[tokio::test]
    async fn a_held_key_of_another_kind_is_refused() {
        let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        let error =
            issue_from(&embedded(&Clock::system()), KeyAlgorithm::EcdsaP256, Some(csr(&key))).await.unwrap_err();
        let (granted, held) = (KeyAlgorithm::EcdsaP256, KeyAlgorithm::Ed25519);
        assert_eq!(error, IssueError::KeyAlgorithm { granted, held });
        assert_eq!((error.reason(), error.is_transient()), ("KEY_ALGORITHM_NOT_GRANTED", false));
    }

    #[tokio::test]
    async fn what_a_signer_returns_is_not_believed() {
        let signer = embedded(&Clock::system());
        let other = issue_from(&signer, KeyAlgorithm::EcdsaP256, None).await.unwrap();
        let bundle = watch::Sender::new(signer.bundle().borrow().clone());
        let fake = Fake { answer: Ok(other.chain().clone()), bundle };
        let error = issue_from(&fake, KeyAlgorithm::EcdsaP256, None).await.unwrap_err();
        assert_eq!(error, IssueError::Verify(VerifyError::PublicKey));
        assert_eq!((error.reason(), error.is_transient()), ("CERTIFICATE_NOT_AS_GRANTED", false));
    }

    #[tokio::test]
    async fn a_signers_refusal_is_passed_on() {
        let bundle = embedded(&Clock::system()).bundle().borrow().clone();
        for (refusal, reason, transient) in [
            (SignError::CaNotValid, "CA_NOT_VALID", true),
            (SignError::NoKeyUsage, "USAGES_INCOMPLETE", false),
            (SignError::Key(KeyError::Sign), "CA_KEY_UNUSABLE", true),
            (SignError::Malformed, "SIGNER_MALFORMED_CERTIFICATE", false),
        ] {
            let fake = Fake { answer: Err(refusal.clone()), bundle: watch::Sender::new(bundle.clone()) };
            let error = issue_from(&fake, KeyAlgorithm::EcdsaP256, None).await.unwrap_err();
            assert_eq!((error.reason(), error.is_transient()), (reason, transient));
            assert_eq!(error, IssueError::Sign(refusal));
        }
    }

    #[tokio::test]
    async fn stages_are_told_in_order() {
        let clock = Clock::system();
        let stages = Mutex::new(Vec::new());
        let progress = |stage| stages.lock().unwrap().push(stage);
        let grant = grant(KeyAlgorithm::EcdsaP256);
        issue(&embedded(&clock), &clock, &Workload::of_uid(1), grant, None, &progress).await.unwrap();
        assert_eq!(*stages.lock().unwrap(), [Stage::Requested("embedded".to_owned()), Stage::Issued]);
    }

    #[tokio::test]
    async fn debug_shows_no_key() {
        let credential = issue_from(&embedded(&Clock::system()), KeyAlgorithm::Ed25519, None).await.unwrap();
        let _ = credential.key_pem();
        let shown = format!("{credential:?}");
        assert!(!shown.contains("PRIVATE") && !shown.contains("private_key"), "{shown}");
    }

    #[tokio::test]
    async fn an_rsa_key_waits_for_its_turn() {
        let signer = embedded(&Clock::system());
        let all = RSA_TURNS.acquire_many(MAX_RSA_KEYS_AT_ONCE as u32).await.unwrap();
        let mut waiting = Box::pin(issue_from(&signer, KeyAlgorithm::Rsa2048, None));
        assert!(futures_util::poll!(waiting.as_mut()).is_pending());
        // Other kinds do not wait.
        issue_from(&signer, KeyAlgorithm::EcdsaP256, None).await.unwrap();
        drop(all);
        waiting.await.unwrap();
    }
}
