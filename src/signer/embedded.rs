//! The CA in this process: made on first start and rotated here, or given by the operator and read again when it changes.
//!
//! The private key never leaves. A new root is in [`Sign::bundle`] before the first leaf from it, across restarts and
//! crashes: on disk, a CA is announced first and activated later. When something cannot be read or written, the last good
//! CA goes on signing and the error is reported. Signing itself does no I/O and no parsing of keys.
//!
//! The controller's CA is kept in a Secret instead of a folder; the rest is the same.

mod authority;
mod files;
mod generations;
mod leaf;
mod secret;
mod store;

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use kube::Client;
use tokio::{sync::watch, task::spawn_blocking};
use tokio_util::sync::CancellationToken;

use self::{
    authority::Authority,
    files::Files,
    generations::{Generation, Generations, Step},
    secret::Secret,
    store::{Folder, Found, Kept, Store},
};
pub use self::{
    authority::{AuthorityError, BACKDATE},
    generations::{MAX_GENERATIONS, SETTLE},
    store::MAX_FILE_BYTES,
};
use super::{Sign, SignError, Signing, SigningRequest, Stage};
use crate::{clock::Clock, metrics::SignerMetrics, policy::lifetime, x509::Bundle};

/// The name that policies call this signer by.
pub const NAME: &str = "embedded";
/// Lifetime of a CA made here, unless configured.
pub const DEFAULT_CA_LIFETIME: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// The shortest lifetime of a CA made here.
pub const MIN_CA_LIFETIME: Duration = Duration::from_secs(60);
/// The longest lifetime of a CA made here.
pub const MAX_CA_LIFETIME: Duration = Duration::from_secs(20 * 365 * 24 * 60 * 60);
/// How often the operator's files, or the Secret, are looked at.
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(10);
/// The longest sleep without looking at the wall clock, which may jump.
pub const MAX_SLEEP: Duration = Duration::from_secs(5 * 60);
/// The shortest sleep, so that an error that stays costs no CPU.
const MIN_SLEEP: Duration = Duration::from_secs(1);

/// Where the CA comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EmbeddedConfig {
    /// Made here, kept in a folder, rotated.
    Made {
        /// The folder, made with mode 0700 if it is not there.
        state_dir: PathBuf,
        /// Lifetime of each CA, from [`MIN_CA_LIFETIME`] to [`MAX_CA_LIFETIME`].
        ca_lifetime: Duration,
    },
    /// The operator's, read again when a file changes.
    Given {
        /// PEM, the CA's certificate first.
        certificate: PathBuf,
        /// PEM private key, which nobody but its owner may read.
        key: PathBuf,
        /// PEM certificates above the CA up to a self-signed root, when `certificate` does not hold them.
        chain: Option<PathBuf>,
    },
}

/// The signer.
#[derive(Debug)]
pub struct Embedded {
    clock: Clock,
    metrics: SignerMetrics,
    /// Held while files are read or written; never while signing.
    source: Mutex<Source>,
    /// Held for a moment.
    generations: RwLock<Arc<Generations>>,
    bundle: watch::Sender<Arc<Bundle>>,
    /// The longest pause between looks at the source.
    interval: Duration,
}

#[derive(Debug)]
enum Source {
    /// Without a store, everything ends with the process.
    Made {
        store: Option<Store>,
        ca_lifetime: Duration,
    },
    Given(Files),
}

impl Embedded {
    /// Opens the CA, making it if there is none yet.
    pub fn open(config: EmbeddedConfig, clock: &Clock, metrics: SignerMetrics) -> Result<Self, EmbeddedError> {
        let now = clock.now();
        let mut generations = Generations::default();
        let source = match config {
            EmbeddedConfig::Made { state_dir, ca_lifetime } => {
                let folder = Folder::open(&state_dir)?;
                restore(folder.find()?, &mut generations, now)?;
                Source::Made { store: Some(Store::Folder(folder)), ca_lifetime }
            }
            EmbeddedConfig::Given { certificate, key, chain } => Source::Given(Files::new(certificate, key, chain)),
        };
        Self::start(source, generations, clock.clone(), metrics)
    }

    /// Opens the CA in a Secret, making both if they are not there yet.
    pub async fn open_secret(
        client: Client,
        namespace: &str,
        name: &str,
        ca_lifetime: Duration,
        clock: &Clock,
        metrics: SignerMetrics,
    ) -> Result<Self, EmbeddedError> {
        let store = Some(Store::Secret(Box::new(Secret::new(client, namespace, name))));
        let clock = clock.clone();
        let start = move || Self::start(Source::Made { store, ca_lifetime }, Generations::default(), clock, metrics);
        spawn_blocking(start).await.unwrap_or(Err(EmbeddedError::Interrupted))
    }

    /// A CA that ends with the process, for demonstrations and tests.
    pub fn ephemeral(ca_lifetime: Duration, clock: &Clock, metrics: SignerMetrics) -> Result<Self, EmbeddedError> {
        Self::start(Source::Made { store: None, ca_lifetime }, Generations::default(), clock.clone(), metrics)
    }

    fn start(
        mut source: Source,
        mut generations: Generations,
        clock: Clock,
        metrics: SignerMetrics,
    ) -> Result<Self, EmbeddedError> {
        let now = clock.now();
        if let Source::Made { ca_lifetime, .. } = source
            && !(MIN_CA_LIFETIME..=MAX_CA_LIFETIME).contains(&ca_lifetime)
        {
            return Err(EmbeddedError::Lifetime { lifetime: ca_lifetime });
        }
        loop {
            match source.advance(&mut generations, now) {
                Ok(true) => {}
                Ok(false) => break,
                // Another replica was faster; what it did is read next.
                Err(EmbeddedError::SecretChanged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let bundle = Arc::new(Bundle::new(generations.roots(now)).map_err(AuthorityError::from)?);
        let embedded = Self {
            clock,
            metrics,
            interval: match source {
                Source::Made { store: Some(Store::Secret(_)), .. } | Source::Given(_) => RELOAD_INTERVAL,
                Source::Made { .. } => MAX_SLEEP,
            },
            source: Mutex::new(source),
            generations: RwLock::new(Arc::new(generations)),
            bundle: watch::Sender::new(bundle),
        };
        embedded.measure(now);
        Ok(embedded)
    }

    /// Does all that is due: reads the operator's files if they have changed, makes, activates or forgets a CA. After an
    /// error the last good state is in force. It blocks on the disk.
    pub fn reload(&self) -> Result<(), EmbeddedError> {
        let mut source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.now();
        let mut generations = (*self.generations()).clone();
        loop {
            let advanced = source.advance(&mut generations, now);
            self.publish(&generations, now)?;
            if !advanced? {
                return Ok(());
            }
        }
    }

    /// Keeps the CA current until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        while stop.run_until_cancelled(tokio::time::sleep(self.pause())).await.is_some() {
            let this = self.clone();
            if let Ok(Err(error)) = spawn_blocking(move || this.reload()).await {
                tracing::error!(error = &error as &dyn std::error::Error, "the CA stays as it was");
            }
        }
    }

    fn pause(&self) -> Duration {
        let wake_at = self.generations().wake_at(self.clock.now());
        wake_at.map_or(self.interval, |when| self.clock.until(when)).clamp(MIN_SLEEP, self.interval)
    }

    /// The bundle first: whoever is asked to sign next must find its root there.
    fn publish(&self, generations: &Generations, now: SystemTime) -> Result<(), EmbeddedError> {
        let roots = generations.roots(now);
        // When every CA has ended, the last bundle is kept: a bundle is never empty.
        if !roots.is_empty() {
            let bundle = Bundle::new(roots).map_err(AuthorityError::from)?;
            self.bundle.send_if_modified(|current| {
                let changed = **current != bundle;
                if changed {
                    *current = Arc::new(bundle);
                }
                changed
            });
        }
        *self.generations.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(generations.clone());
        self.measure(now);
        Ok(())
    }

    fn measure(&self, now: SystemTime) {
        if let Some(authority) = self.generations().signing(now) {
            self.metrics.set_ca_not_after(authority.not_after());
        }
    }

    fn generations(&self) -> Arc<Generations> {
        self.generations.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Sign for Embedded {
    fn name(&self) -> &str {
        NAME
    }

    fn ready(&self) -> Result<(), SignError> {
        self.generations().signing(self.clock.now()).map(drop).ok_or(SignError::CaNotValid)
    }

    fn sign<'a>(&'a self, request: SigningRequest<'a>) -> Signing<'a> {
        Box::pin(async move {
            (request.progress)(Stage::Requested(NAME.to_owned()));
            let now = self.clock.now();
            let generations = self.generations();
            let authority = generations.signing(now).ok_or(SignError::CaNotValid)?;
            let grant = request.grant;
            authority.sign(grant.names(), grant.usages(), request.key.public_key(), grant.lifetime(), now)
        })
    }

    fn bundle(&self) -> watch::Receiver<Arc<Bundle>> {
        self.bundle.subscribe()
    }
}

impl Source {
    /// Does one thing that is due, on disk first. False when nothing was.
    fn advance(&mut self, generations: &mut Generations, now: SystemTime) -> Result<bool, EmbeddedError> {
        let (store, ca_lifetime, step) = match self {
            Self::Made { store, ca_lifetime } => {
                if let Some(found) = store.as_mut().map(Store::changed).transpose()?.flatten() {
                    let mut read = Generations::default();
                    restore(found, &mut read, now)?;
                    *generations = read;
                }
                let step = generations.due(now).or_else(|| generations.succession(now));
                (store.as_mut(), *ca_lifetime, step)
            }
            Self::Given(files) => {
                // What is due comes first, so that it does not wait for files that cannot be read.
                let mut step = generations.due(now);
                if step.is_none()
                    && let Some(authority) = files.changed(now)?
                {
                    generations.replace(authority, now);
                    step = generations.due(now);
                }
                (None, Duration::ZERO, step)
            }
        };
        match step {
            Some(Step::Make(number)) => {
                let generation = Generation { number, authority: Authority::make(ca_lifetime, now)? };
                if let Some(store) = store {
                    store.announce(number, &generation.authority.to_pem())?;
                }
                generations.announce(generation, Duration::ZERO, now);
                tracing::info!(number, "CA made; its root is in the trust bundle from now on");
            }
            Some(Step::Activate(number)) => {
                if let (Some(store), Some(next)) = (store, generations.next()) {
                    store.activate(number, &next.to_pem())?;
                }
                generations.activate();
                tracing::info!(number, "CA signs from now on");
            }
            Some(Step::Retire(number)) => {
                if let Some(store) = store {
                    store.retire(number)?;
                }
                generations.retire(number);
                tracing::info!(number, "CA forgotten");
            }
            None => return Ok(false),
        }
        Ok(true)
    }
}

/// Reads what an earlier process, or another replica, left.
fn restore(found: Found, generations: &mut Generations, now: SystemTime) -> Result<(), EmbeddedError> {
    let read = |Kept { number, path, pem }: Kept| {
        let authority = Authority::from_pem(&pem, &pem, &[]);
        let authority = authority.map_err(|source| EmbeddedError::Authority { path, source })?;
        Ok::<_, EmbeddedError>(Generation { number, authority })
    };
    for kept in found.activated {
        generations.restore(read(kept)?);
    }
    if let Some(kept) = found.next {
        generations.announce(read(kept)?, SETTLE, now);
    }
    Ok(())
}

/// Why there is no CA, or why it stays as it was.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// The disk said no.
    #[error("cannot {action} {}{}", path.display(), advice(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another process works in the state folder.
    #[error("the state folder {} is in use by another process", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// Others could put a CA of theirs into the state folder.
    #[error("the state folder {} has mode {mode:04o}, so others can write to it: chmod 0700", path.display())]
    FolderMode {
        /// The folder.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Others could read the key.
    #[error("the private key {} has mode {mode:04o}, so others can read it: chmod 0600", path.display())]
    KeyMode {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Somebody else's file or folder.
    #[error("{} belongs to uid {owner}, who can change it; it must belong to root or to uid {ours}, as which csrd runs", path.display())]
    Owner {
        /// Its path.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who we are.
        ours: u32,
    },
    /// A folder, device or pipe where a file must be.
    #[error("{} is no regular file", path.display())]
    NoFile {
        /// Its path.
        path: PathBuf,
    },
    /// A file over [`MAX_FILE_BYTES`].
    #[error("{} has {bytes} bytes, at most {MAX_FILE_BYTES} are read", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// A file that holds no usable CA.
    #[error("the CA in {} cannot be used", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: AuthorityError,
    },
    /// The API server said no.
    #[error("cannot {action} the Secret {}", secret.display())]
    Secret {
        /// What was tried.
        action: &'static str,
        /// Namespace and name.
        secret: PathBuf,
        /// Why not.
        source: Box<kube::Error>,
    },
    /// The API server did not answer.
    #[error("cannot {action} the Secret {}: no answer within {} s", secret.display(), within.as_secs())]
    SecretTimeout {
        /// What was tried.
        action: &'static str,
        /// Namespace and name.
        secret: PathBuf,
        /// How long it had.
        within: Duration,
    },
    /// Somebody else wrote it first.
    #[error("the Secret {} was changed by another at the same time; it is read again", secret.display())]
    SecretChanged {
        /// Namespace and name.
        secret: PathBuf,
    },
    /// Somebody deleted it.
    #[error(
        "the Secret {} is gone, and the CA it held signs on: put it back, or restart the controller to have a new CA",
        secret.display()
    )]
    SecretGone {
        /// Namespace and name.
        secret: PathBuf,
    },
    /// The process is stopping.
    #[error("opening the CA was interrupted")]
    Interrupted,
    /// A CA could not be made.
    #[error("cannot make a CA")]
    Make(#[from] AuthorityError),
    /// A lifetime out of bounds.
    #[error(
        "the CA's lifetime is {}, it must lie between {} and {}",
        lifetime::print(*lifetime),
        lifetime::print(MIN_CA_LIFETIME),
        lifetime::print(MAX_CA_LIFETIME)
    )]
    Lifetime {
        /// As configured.
        lifetime: Duration,
    },
}

/// What to do about an error of the disk, as the end of a sentence.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ": free space on its file system",
        io::ErrorKind::ReadOnlyFilesystem => {
            ": its file system is read-only, make it writable or choose another folder"
        }
        io::ErrorKind::PermissionDenied => ": give the agent's user access to it",
        io::ErrorKind::NotFound => ": it is not there",
        io::ErrorKind::NotADirectory => ": a part of the path is no folder",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

    use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyUsagePurpose};

    use super::*;
    use crate::{
        attest::Workload,
        issue::{Credential, IssueError, issue},
        metrics::Metrics,
        policy::Grant,
        x509::{Chain, KeyAlgorithm, Names, PrivateKey, Usages},
    };

    const LIFE: Duration = Duration::from_secs(1000 * 60);
    const OVERLAP: Duration = Duration::from_secs(100 * 60);

    fn clock() -> Clock {
        Clock::paused(SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000))
    }

    fn metrics() -> SignerMetrics {
        Metrics::new().signer(NAME)
    }

    fn made(dir: &Path) -> EmbeddedConfig {
        EmbeddedConfig::Made { state_dir: dir.to_owned(), ca_lifetime: LIFE }
    }

    async fn certificate(signer: &Embedded) -> Result<Credential, IssueError> {
        let names = Names { common_name: Some("web".to_owned()), ..Names::default() };
        let grant = Grant::for_test(names, Usages::DEFAULT, KeyAlgorithm::EcdsaP256, Duration::from_secs(60));
        issue(signer, &signer.clock, &Workload::of_uid(1), grant, None, &|_| ()).await
    }

    fn roots(signer: &Embedded) -> Vec<String> {
        signer.bundle().borrow().fingerprints()
    }

    /// The CA that signs now, by the fingerprint of its root.
    fn signing(signer: &Embedded) -> String {
        let now = signer.clock.now();
        let generations = signer.generations();
        let roots = generations.signing(now).expect("a CA signs").roots().to_vec();
        Bundle::new(roots).unwrap().fingerprints().remove(0)
    }

    #[tokio::test(start_paused = true)]
    async fn a_ca_made_on_first_start_is_there_on_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let first = Embedded::open(made(dir.path()), &clock(), metrics()).unwrap();
        certificate(&first).await.unwrap();
        let roots_before = roots(&first);
        drop(first);
        let second = Embedded::open(made(dir.path()), &clock(), metrics()).unwrap();
        assert_eq!(roots(&second), roots_before);
        assert!(dir.path().join("ca-1.pem").exists() && !dir.path().join("next-1.pem").exists());
    }

    #[tokio::test(start_paused = true)]
    async fn rotation_runs_by_itself_and_every_certificate_verifies() {
        let signer = Arc::new(Embedded::ephemeral(LIFE, &clock(), metrics()).unwrap());
        let stop = CancellationToken::new();
        let running = tokio::spawn(signer.clone().run(stop.clone()));
        let mut signers = std::collections::HashSet::new();
        for _ in 0..60 {
            tokio::time::sleep(Duration::from_secs(60 * 60)).await;
            certificate(&signer).await.unwrap();
            signers.insert(signing(&signer));
            assert!(roots(&signer).contains(&signing(&signer)));
        }
        assert!(signers.len() >= 5, "{}", signers.len());
        stop.cancel();
        running.await.unwrap();
    }

    /// What a crash can leave between any two steps on the disk, and what the next start makes of it.
    #[tokio::test(start_paused = true)]
    async fn a_crash_at_any_step_of_a_rotation_is_survived() {
        let dir = tempfile::tempdir().unwrap();
        let clock = clock();
        let open = || Embedded::open(made(dir.path()), &clock, metrics()).unwrap();
        let first = signing(&open());

        // Before the successor is whole: it is made again.
        fs::write(dir.path().join(".csrd-2"), "half a k").unwrap();
        tokio::time::advance(LIFE / 2).await;
        let signer = open();
        assert_eq!((signing(&signer), roots(&signer).len()), (first.clone(), 2));
        let announced = roots(&signer).remove(1);
        drop(signer);

        // Announced, and down until long after it was to sign: subscribers first get the bundle.
        tokio::time::advance(OVERLAP * 2).await;
        let signer = open();
        assert_eq!((signing(&signer), roots(&signer)), (first.clone(), vec![first.clone(), announced.clone()]));
        tokio::time::advance(SETTLE).await;
        signer.reload().unwrap();
        assert_eq!(signing(&signer), announced);
        drop(signer);

        // Activated: it goes on signing at once.
        let signer = open();
        assert_eq!((signing(&signer), roots(&signer)), (announced.clone(), vec![announced, first]));
        certificate(&signer).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_disk_that_fails_keeps_the_last_good_ca() {
        let dir = tempfile::tempdir().unwrap();
        let signer = Embedded::open(made(dir.path()), &clock(), metrics()).unwrap();
        fs::create_dir(dir.path().join("next-2.pem")).unwrap();
        tokio::time::advance(LIFE / 2).await;
        let error = signer.reload().unwrap_err();
        assert!(matches!(error, EmbeddedError::Io { action: "write", .. }), "{error}");
        assert_eq!(roots(&signer).len(), 1);
        certificate(&signer).await.unwrap();
        fs::remove_dir(dir.path().join("next-2.pem")).unwrap();
        signer.reload().unwrap();
        assert_eq!(roots(&signer).len(), 2);
        // Without a successor the end comes, and is said.
        fs::remove_file(dir.path().join("next-2.pem")).unwrap();
        tokio::time::advance(LIFE).await;
        signer.reload().unwrap_err();
        assert_eq!(certificate(&signer).await.unwrap_err(), IssueError::Sign(SignError::CaNotValid));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stored_ca_that_is_damaged_or_readable_stops_the_start() {
        let dir = tempfile::tempdir().unwrap();
        drop(Embedded::open(made(dir.path()), &clock(), metrics()).unwrap());
        let path = dir.path().join("ca-1.pem");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = Embedded::open(made(dir.path()), &clock(), metrics()).unwrap_err();
        assert!(matches!(error, EmbeddedError::KeyMode { mode: 0o644, .. }), "{error}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "").unwrap();
        let error = Embedded::open(made(dir.path()), &clock(), metrics()).unwrap_err();
        assert!(matches!(error, EmbeddedError::Authority { .. }), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn lifetimes_are_bounded() {
        let second = Duration::from_secs(1);
        for lifetime in [MIN_CA_LIFETIME, MAX_CA_LIFETIME] {
            Embedded::ephemeral(lifetime, &clock(), metrics()).unwrap();
        }
        for lifetime in [MIN_CA_LIFETIME - second, MAX_CA_LIFETIME + second, Duration::MAX] {
            let error = Embedded::ephemeral(lifetime, &clock(), metrics()).unwrap_err();
            assert!(matches!(error, EmbeddedError::Lifetime { .. }), "{error}");
        }
    }

    #[test]
    fn advice_says_what_to_do() {
        for (kind, part) in [
            (io::ErrorKind::StorageFull, "free space"),
            (io::ErrorKind::ReadOnlyFilesystem, "read-only"),
            (io::ErrorKind::PermissionDenied, "give the agent's user access"),
        ] {
            let error = EmbeddedError::Io { action: "write", path: "/state/ca".into(), source: kind.into() };
            let text = error.to_string();
            assert!(text.starts_with("cannot write /state/ca: ") && text.contains(part), "{text}");
        }
    }

    /// An operator's folder with a root and an intermediate under it.
    struct Operator {
        dir: tempfile::TempDir,
        now: SystemTime,
        root: CertificateParams,
        root_key: PrivateKey,
        root_pem: String,
    }

    impl Operator {
        fn new(now: SystemTime) -> Self {
            let root_key = PrivateKey::generate(KeyAlgorithm::EcdsaP384).unwrap();
            let root = Self::ca("root", now);
            let root_pem = root.self_signed(&root_key).unwrap().pem();
            let operator = Self { dir: tempfile::tempdir().unwrap(), now, root, root_key, root_pem };
            operator.issue();
            operator
        }

        fn ca(name: &str, now: SystemTime) -> CertificateParams {
            let mut params = CertificateParams::default();
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            (params.not_before, params.not_after) = (now.into(), (now + LIFE).into());
            params
        }

        /// Puts a new intermediate in place.
        fn issue(&self) {
            let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
            let by_root = Issuer::from_params(&self.root, &self.root_key);
            let intermediate = Self::ca("intermediate", self.now).signed_by(&key, &by_root).unwrap();
            self.put("key.pem", &key.to_pem());
            self.put("certificate.pem", &intermediate.pem());
            self.put("chain.pem", &self.root_pem);
        }

        fn put(&self, name: &str, text: &str) {
            let aside = self.path("aside");
            fs::write(&aside, text).unwrap();
            fs::set_permissions(&aside, fs::Permissions::from_mode(0o600)).unwrap();
            fs::rename(aside, self.path(name)).unwrap();
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn open(&self, clock: &Clock) -> Result<Embedded, EmbeddedError> {
            let [certificate, key, chain] = ["certificate.pem", "key.pem", "chain.pem"].map(|name| self.path(name));
            Embedded::open(EmbeddedConfig::Given { certificate, key, chain: Some(chain) }, clock, metrics())
        }
    }

    async fn chain(signer: &Embedded) -> Chain {
        certificate(signer).await.unwrap().chain().clone()
    }

    #[tokio::test(start_paused = true)]
    async fn an_operators_intermediate_signs_and_a_new_one_of_the_same_root_at_once() {
        let clock = clock();
        let operator = Operator::new(clock.now());
        let signer = operator.open(&clock).unwrap();
        let first = chain(&signer).await;
        assert_eq!(first.certificates().len(), 2);
        signer.reload().unwrap();
        assert_eq!(chain(&signer).await.certificates()[1], first.certificates()[1]);
        operator.issue();
        signer.reload().unwrap();
        assert_ne!(chain(&signer).await.certificates()[1], first.certificates()[1]);
        assert_eq!(roots(&signer).len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_operators_new_root_is_known_before_it_signs() {
        let clock = clock();
        let operator = Operator::new(clock.now());
        let signer = Arc::new(operator.open(&clock).unwrap());
        let first = chain(&signer).await;
        let mut bundle = signer.bundle();
        bundle.mark_unchanged();
        let stop = CancellationToken::new();
        let running = tokio::spawn(signer.clone().run(stop.clone()));

        let other = Operator::new(clock.now());
        for name in ["certificate.pem", "key.pem", "chain.pem"] {
            operator.put(name, &fs::read_to_string(other.path(name)).unwrap());
        }
        bundle.changed().await.unwrap();
        assert_eq!(bundle.borrow_and_update().roots().len(), 2);
        assert_eq!(chain(&signer).await.certificates()[1], first.certificates()[1]);
        tokio::time::sleep(SETTLE + RELOAD_INTERVAL).await;
        assert_ne!(chain(&signer).await.certificates()[1], first.certificates()[1]);
        assert_eq!(signer.bundle().borrow().roots().len(), 2);
        stop.cancel();
        running.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_operators_new_ca_signs_in_its_time_although_its_files_are_gone() {
        let clock = clock();
        let operator = Operator::new(clock.now());
        let signer = operator.open(&clock).unwrap();
        let first = chain(&signer).await;
        let other = Operator::new(clock.now());
        for name in ["certificate.pem", "key.pem", "chain.pem"] {
            operator.put(name, &fs::read_to_string(other.path(name)).unwrap());
        }
        signer.reload().unwrap();
        fs::remove_file(operator.path("key.pem")).unwrap();
        tokio::time::advance(SETTLE).await;
        signer.reload().unwrap_err();
        assert_ne!(chain(&signer).await.certificates()[1], first.certificates()[1]);
    }

    #[tokio::test(start_paused = true)]
    async fn broken_files_are_reported_once_and_change_nothing() {
        let clock = clock();
        let operator = Operator::new(clock.now());
        let signer = operator.open(&clock).unwrap();
        let good = fs::read_to_string(operator.path("key.pem")).unwrap();
        operator.put("key.pem", &PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap().to_pem());
        let error = signer.reload().unwrap_err();
        assert!(matches!(&error, EmbeddedError::Authority { source: AuthorityError::KeyMismatch, .. }), "{error}");
        signer.reload().unwrap();
        certificate(&signer).await.unwrap();
        fs::remove_file(operator.path("key.pem")).unwrap();
        signer.reload().unwrap_err();
        signer.reload().unwrap_err();
        operator.put("key.pem", &good);
        signer.reload().unwrap();
        certificate(&signer).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_operators_ca_is_judged_before_anything_is_served() {
        let clock = clock();
        let check = |spoil: &dyn Fn(&Operator), expected: &str| {
            let operator = Operator::new(clock.now());
            spoil(&operator);
            let error = operator.open(&clock).unwrap_err();
            let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            let text = format!("{error}: {source}");
            assert!(text.contains(expected), "{text}");
        };
        let chmod = |operator: &Operator| {
            fs::set_permissions(operator.path("key.pem"), fs::Permissions::from_mode(0o640)).unwrap();
        };
        check(&chmod, "has mode 0640");
        check(&|operator| operator.put("chain.pem", ""), "no root found");
        check(&|operator| operator.put("certificate.pem", "garbage"), "the certificates cannot be used");
        check(&|operator| fs::remove_file(operator.path("certificate.pem")).unwrap(), "cannot read");
        check(&|operator| operator.put("key.pem", "garbage"), "the private key cannot be used");
    }
}
