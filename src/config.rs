//! The agent's configuration: a YAML file and flags in, a checked [`Config`] out; and, in `controller`, the controller's.
//!
//! Unknown keys are errors, and every default is here. What the files that it names hold is checked by whoever reads
//! them. An agent is either of a host, with a CA of its own and policies in files, or of a cluster, which has both.

pub mod controller;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    num::NonZeroU32,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, de::DeserializeOwned};

use crate::{
    files::{self, FileError},
    kubernetes::{NAMESPACE, SIGNER, TRUST_BUNDLE, TRUST_BUNDLE_KEY},
    policy::lifetime,
    signer::{
        embedded::{DEFAULT_CA_LIFETIME, EmbeddedConfig, MAX_CA_LIFETIME, MIN_CA_LIFETIME},
        kubernetes::{Approval, DEFAULT_BURST, DEFAULT_PER_SECOND},
    },
    socket::SocketPath,
    telemetry::Log,
    trust,
};

/// Bytes of a configuration file.
pub const MAX_CONFIG_BYTES: usize = 64 * 1024;
/// The state folder when neither flag nor file names one.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/csrd";
/// The policies when neither flag nor file names any.
pub const DEFAULT_POLICIES: &str = "/etc/csrd/policies";

/// The part of `limits.all` that `limits.perWorkload` is at most when the file does not set it: one in so many, so that
/// nobody is first allowed more than the hub then gives one principal.
const WORKLOAD_SHARE: u32 = 2;

/// The audience of ServiceAccount tokens when the file names none.
pub const DEFAULT_AUDIENCE: &str = "csrd";

/// What the agent is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The socket.
    pub socket: SocketPath,
    /// Listener for metrics and readiness; none unless set.
    pub admin: Option<SocketAddr>,
    /// Where policies come from, and who signs.
    pub mode: Mode,
    /// How logs are written.
    pub log: Log,
    /// Rates.
    pub limits: Rates,
}

/// Where policies come from, and who signs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Files, and the agent itself.
    Host {
        /// Policy files, or folders of them.
        policies: Vec<PathBuf>,
        /// The embedded signer's CA.
        ca: EmbeddedConfig,
    },
    /// The cluster, for both.
    Kubernetes(Kubernetes),
}

/// The cluster that the agent's node is part of.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Kubernetes {
    /// How to reach it; as the ServiceAccount of the agent's pod unless set.
    pub kubeconfig: Option<PathBuf>,
    /// The node's name, where the agent's token does not say it; must be what it says otherwise.
    pub node: Option<String>,
    /// Who approves requests.
    pub approval: Approval,
    /// The audience of tokens that pods may send along.
    pub audience: String,
    /// Signers that policies may name, the default one first.
    pub signers: Vec<ClusterSigner>,
}

/// A signerName of the cluster, and where its roots are published.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ClusterSigner {
    /// The signerName.
    pub name: String,
    /// Its roots.
    pub bundle: trust::Source,
}

/// Settings that the command line puts before the file's.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// The socket.
    pub socket: Option<SocketPath>,
    /// State folder.
    pub state_dir: Option<PathBuf>,
    /// Policies, in place of the file's.
    pub policies: Vec<PathBuf>,
    /// Listener for metrics and readiness.
    pub admin: Option<SocketAddr>,
    /// That the agent is in a cluster, whether or not the file says so.
    pub kubernetes: bool,
    /// The node's name.
    pub node: Option<String>,
}

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct File {
    socket: Option<SocketPath>,
    state_dir: Option<PathBuf>,
    policies: Option<Vec<PathBuf>>,
    admin: Option<SocketAddr>,
    signer: Option<SignerFile>,
    kubernetes: Option<Kubernetes>,
    log: Log,
    limits: LimitsFile,
}

/// Rates as they are written; what is left out depends on the mode.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct LimitsFile {
    all: Option<RateFile>,
    per_workload: Option<RateFile>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct SignerFile {
    embedded: EmbeddedFile,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct EmbeddedFile {
    ca_certificate: Option<PathBuf>,
    ca_key: Option<PathBuf>,
    chain: Option<PathBuf>,
    ca_lifetime: Option<String>,
}

/// Rates at which certificates are issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    /// All signers, all workloads.
    pub all: RateFile,
    /// Each workload's user.
    pub per_workload: RateFile,
}

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RateFile {
    /// Issuances a second.
    pub per_second: NonZeroU32,
    /// Issuances at once.
    pub burst: NonZeroU32,
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not read.
    #[error("configuration file {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: FileError,
    },
    /// The file is not a configuration.
    #[error("{}: {message}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, field and rule.
        message: String,
    },
    /// More for one than for all together.
    #[error("limits.perWorkload: its {field} is {one}, and that of limits.all is {all}: it must not be above it")]
    AboveAll {
        /// perSecond or burst.
        field: &'static str,
        /// Of one workload's user.
        one: NonZeroU32,
        /// Of all.
        all: NonZeroU32,
    },
    /// Half of a CA.
    #[error("{0}: caCertificate and caKey go together, and chain needs both")]
    HalfCa(&'static str),
    /// A lifetime for a CA that has one.
    #[error("signer.embedded: caLifetime is for a CA that the agent makes; leave it out beside caCertificate")]
    LifetimeOfGivenCa,
    /// Settings of a host's agent beside those of a cluster's.
    #[error("{0} is for an agent without a cluster; leave it out, or leave out kubernetes")]
    NotInCluster(&'static str),
    /// No signer.
    #[error("kubernetes.signers: name one at least, or leave it out for {SIGNER}")]
    NoSigner,
    /// Twice the same.
    #[error("kubernetes.signers: {0:?} is there twice")]
    SignerTwice(String),
    /// Nothing could be told from nothing.
    #[error("kubernetes.{0}: it must not be empty")]
    Empty(&'static str),
    /// No duration, or one from outside [`MIN_CA_LIFETIME`] to [`MAX_CA_LIFETIME`].
    #[error("{0}.caLifetime: {1}")]
    CaLifetime(&'static str, String),
    /// A Secret, and files.
    #[error(
        "signer: caSecret and caLifetime are for a CA that the controller makes; leave them out beside caCertificate"
    )]
    TwoCas,
    /// A signer that the controller does not approve for.
    #[error("approve: {name} is refused: {why}")]
    NeverApproved {
        /// Its name.
        name: String,
        /// Why not.
        why: &'static str,
    },
    /// A list that allows nothing.
    #[error("{0}: name at least one, or leave it out")]
    NothingListed(&'static str),
    /// Not the end of a DNS name.
    #[error("kubeletServing.dnsSuffixes: {0:?} is no DNS name such as nodes.example.org")]
    DnsSuffix(String),
}

impl Config {
    /// The configuration of the file at `path`, if one is given, with `overrides` put before it.
    pub fn load(path: Option<&Path>, overrides: Overrides) -> Result<Self, ConfigError> {
        let file: File = path.map(read).transpose()?.unwrap_or_default();
        let policies = if overrides.policies.is_empty() { file.policies } else { Some(overrides.policies) };
        let cluster = file.kubernetes.or_else(|| overrides.kubernetes.then(Kubernetes::default));
        let state_dir = overrides.state_dir.or(file.state_dir);
        let mode = match cluster {
            Some(_) if policies.is_some() => return Err(ConfigError::NotInCluster("policies")),
            Some(_) if file.signer.is_some() => return Err(ConfigError::NotInCluster("signer.embedded")),
            Some(_) if state_dir.is_some() => return Err(ConfigError::NotInCluster("stateDir")),
            Some(cluster) => Mode::Kubernetes(cluster.checked(overrides.node)?),
            None => Mode::Host {
                policies: policies.unwrap_or_else(|| vec![DEFAULT_POLICIES.into()]),
                ca: ca(
                    file.signer.unwrap_or_default().embedded,
                    state_dir.unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
                )?,
            },
        };
        let defaults = match mode {
            Mode::Host { .. } => Rates::HOST,
            Mode::Kubernetes(_) => Rates::KUBERNETES,
        };
        let limits = file.limits.checked(defaults)?;
        Ok(Self {
            socket: overrides.socket.or(file.socket).unwrap_or_default(),
            admin: overrides.admin.or(file.admin),
            mode,
            log: file.log,
            limits,
        })
    }
}

impl LimitsFile {
    /// The rates, with `defaults` for what is left out; one workload's are below those of all.
    fn checked(self, defaults: Rates) -> Result<Rates, ConfigError> {
        let all = self.all.unwrap_or(defaults.all);
        let Some(one) = self.per_workload else {
            return Ok(Rates { all, per_workload: defaults.per_workload.at_most(all.share()) });
        };
        for (field, one, all) in [("perSecond", one.per_second, all.per_second), ("burst", one.burst, all.burst)] {
            if one > all {
                return Err(ConfigError::AboveAll { field, one, all });
            }
        }
        Ok(Rates { all, per_workload: one })
    }
}

impl Kubernetes {
    fn checked(self, node: Option<String>) -> Result<Self, ConfigError> {
        let checked = Self { node: node.or(self.node), ..self };
        if checked.node.as_deref() == Some("") {
            return Err(ConfigError::Empty("node"));
        }
        if checked.audience.is_empty() {
            return Err(ConfigError::Empty("audience"));
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = checked.signers.iter().find(|signer| !names.insert(&signer.name)) {
            return Err(ConfigError::SignerTwice(twice.name.clone()));
        }
        if checked.signers.is_empty() { Err(ConfigError::NoSigner) } else { Ok(checked) }
    }
}

impl Default for Kubernetes {
    fn default() -> Self {
        let bundle = trust::Source::ConfigMap {
            namespace: NAMESPACE.to_owned(),
            name: TRUST_BUNDLE.to_owned(),
            key: TRUST_BUNDLE_KEY.to_owned(),
        };
        Self {
            kubeconfig: None,
            node: None,
            approval: Approval::default(),
            audience: DEFAULT_AUDIENCE.to_owned(),
            signers: vec![ClusterSigner { name: SIGNER.to_owned(), bundle }],
        }
    }
}

impl Rates {
    /// Of a CA in this process.
    pub const HOST: Self = Self { all: rate(500, 1000), per_workload: rate(50, 500) };
    /// Of an API server that many agents share; one pod may ask for half of what a node may.
    pub const KUBERNETES: Self = {
        let all = rate(DEFAULT_PER_SECOND, DEFAULT_BURST);
        Self { all, per_workload: all.share() }
    };
}

impl RateFile {
    const fn share(self) -> Self {
        const fn part(whole: NonZeroU32) -> u32 {
            if whole.get() < WORKLOAD_SHARE { 1 } else { whole.get() / WORKLOAD_SHARE }
        }
        rate(part(self.per_second), part(self.burst))
    }

    fn at_most(self, bound: Self) -> Self {
        Self { per_second: self.per_second.min(bound.per_second), burst: self.burst.min(bound.burst) }
    }
}

const fn rate(per_second: u32, burst: u32) -> RateFile {
    RateFile {
        per_second: NonZeroU32::new(per_second).expect("not zero"),
        burst: NonZeroU32::new(burst).expect("not zero"),
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = files::read_text(path, MAX_CONFIG_BYTES)
        .map_err(|source| ConfigError::File { path: path.to_owned(), source })?;
    serde_saphyr::from_str(&text)
        .map_err(|error| ConfigError::Invalid { path: path.to_owned(), message: error.to_string() })
}

/// The operator's CA, or one that is made and kept in `state_dir`.
fn ca(file: EmbeddedFile, state_dir: PathBuf) -> Result<EmbeddedConfig, ConfigError> {
    match (file.ca_certificate, file.ca_key, file.chain) {
        (Some(_), Some(_), _) if file.ca_lifetime.is_some() => Err(ConfigError::LifetimeOfGivenCa),
        (Some(certificate), Some(key), chain) => Ok(EmbeddedConfig::Given { certificate, key, chain }),
        (None, None, None) => {
            let ca_lifetime = ca_lifetime("signer.embedded", file.ca_lifetime.as_deref())?;
            Ok(EmbeddedConfig::Made { state_dir, ca_lifetime })
        }
        _ => Err(ConfigError::HalfCa("signer.embedded")),
    }
}

/// The lifetime of a CA that is made, at `field`.
fn ca_lifetime(field: &'static str, text: Option<&str>) -> Result<Duration, ConfigError> {
    let Some(text) = text else { return Ok(DEFAULT_CA_LIFETIME) };
    lifetime::parse(text, MIN_CA_LIFETIME..=MAX_CA_LIFETIME).map_err(|error| ConfigError::CaLifetime(field, error))
}

/// The `OTEL_*` variables of the process, for whoever sends traces.
#[allow(clippy::disallowed_methods, reason = "the environment is read in this file")]
pub fn otel_variables() -> BTreeMap<String, String> {
    // Variables that are not UTF-8 are none of ours.
    let variables =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    variables.filter(|(name, _)| name.starts_with("OTEL_")).collect()
}

/// The API server's address as every pod of a cluster is told it.
#[allow(clippy::disallowed_methods, reason = "the environment is read in this file")]
pub fn service_host() -> Option<String> {
    std::env::var("KUBERNETES_SERVICE_HOST").ok()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        Config::load(Some(file.path()), Overrides::default())
    }

    fn whole(error: ConfigError) -> String {
        format!("{:#}", anyhow::Error::new(error))
    }

    #[test]
    fn an_empty_configuration_is_the_defaults() {
        let config = Config::load(None, Overrides::default()).unwrap();
        assert_eq!(config, load("{}").unwrap());
        assert_eq!(config.socket, SocketPath::default());
        assert_eq!(config.admin, None);
    }

    #[test]
    fn the_shipped_file_says_the_defaults() {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/systemd/config.yaml");
        let shipped = Config::load(Some(&shipped), Overrides::default()).unwrap();
        let defaults = Config::load(None, Overrides { admin: shipped.admin, ..Overrides::default() }).unwrap();
        assert_eq!(shipped, defaults);
    }

    #[test]
    fn rates_that_are_left_out_suit_who_signs() {
        assert_eq!(load("{}").unwrap().limits, Rates::HOST);
        assert_eq!(load("kubernetes: {}").unwrap().limits, Rates::KUBERNETES);
        let given = load("{kubernetes: {}, limits: {all: {perSecond: 7, burst: 9}}}").unwrap().limits;
        assert_eq!(given, Rates { all: rate(7, 9), per_workload: rate(3, 4) }, "half of what all may");
        let given = load("limits: {all: {perSecond: 1, burst: 1}}").unwrap().limits;
        assert_eq!(given, Rates { all: rate(1, 1), per_workload: rate(1, 1) }, "but one at least");
        for defaults in [Rates::HOST, Rates::KUBERNETES] {
            assert_eq!(defaults.per_workload, defaults.per_workload.at_most(defaults.all.share()));
        }
        let given = load("limits: {all: {perSecond: 7, burst: 9}, perWorkload: {perSecond: 7, burst: 9}}").unwrap();
        assert_eq!(given.limits, Rates { all: rate(7, 9), per_workload: rate(7, 9) }, "as much as all is not above it");
    }

    #[test]
    fn a_flag_goes_before_the_file() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "socket: unix:///a.sock\npolicies: [/a]\nstateDir: /a").unwrap();
        let overrides = Overrides {
            socket: Some("/b.sock".parse().unwrap()),
            policies: vec!["/b".into()],
            state_dir: Some("/b".into()),
            ..Overrides::default()
        };
        let config = Config::load(Some(file.path()), overrides).unwrap();
        let ca = EmbeddedConfig::Made { state_dir: "/b".into(), ca_lifetime: DEFAULT_CA_LIFETIME };
        assert_eq!(config.socket.to_string(), "/b.sock");
        assert_eq!(config.mode, Mode::Host { policies: vec!["/b".into()], ca });
    }

    #[test]
    fn a_ca_is_made_or_given() {
        let made = |s| EmbeddedConfig::Made { state_dir: "/s".into(), ca_lifetime: Duration::from_secs(s) };
        let given = |chain: Option<&str>| EmbeddedConfig::Given {
            certificate: "/c".into(),
            key: "/k".into(),
            chain: chain.map(Into::into),
        };
        for (text, expected) in [
            ("caLifetime: 1m", made(60)),
            ("caLifetime: 175200h", made(20 * 365 * 24 * 60 * 60)),
            ("caCertificate: /c, caKey: /k", given(None)),
            ("caCertificate: /c, caKey: /k, chain: /r", given(Some("/r"))),
        ] {
            let config = load(&format!("{{stateDir: /s, signer: {{embedded: {{{text}}}}}}}")).unwrap();
            let Mode::Host { ca, .. } = config.mode else { panic!("{text} is of a host") };
            assert_eq!(ca, expected, "{text}");
        }
    }

    #[test]
    fn an_agent_of_a_cluster_has_its_policies_and_its_signers_there() {
        let mode = |text| load(text).unwrap_or_else(|error| panic!("{text}: {}", whole(error))).mode;
        let defaults = mode("kubernetes: {}");
        assert_eq!(defaults, Mode::Kubernetes(Kubernetes::default()));
        let overrides = Overrides { kubernetes: true, ..Overrides::default() };
        assert_eq!(Config::load(None, overrides).unwrap().mode, defaults);
        let signer = |name: &str, bundle| ClusterSigner { name: name.to_owned(), bundle };
        let (namespace, name, key) = ("a".to_owned(), "b".to_owned(), "c".to_owned());
        let whole = Kubernetes {
            kubeconfig: Some("/k".into()),
            node: Some("n".to_owned()),
            approval: Approval::Agent,
            audience: "x".to_owned(),
            signers: vec![
                signer("example.org/a", trust::Source::ConfigMap { namespace, name, key }),
                signer("example.org/b", trust::Source::File("/f".into())),
                signer("example.org/c", trust::Source::ClusterTrustBundle("t".to_owned())),
            ],
        };
        let text = "kubernetes:
  kubeconfig: /k
  node: n
  approval: agent
  audience: x
  signers:
    - {name: example.org/a, bundle: {configMap: {namespace: a, name: b, key: c}}}
    - {name: example.org/b, bundle: {file: /f}}
    - {name: example.org/c, bundle: {clusterTrustBundle: t}}
";
        assert_eq!(mode(text), Mode::Kubernetes(whole.clone()));
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let overrides = Overrides { node: Some("m".to_owned()), ..Overrides::default() };
        let flagged = Config::load(Some(file.path()), overrides).unwrap().mode;
        assert_eq!(flagged, Mode::Kubernetes(Kubernetes { node: Some("m".to_owned()), ..whole }));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        fn check(text: &str, part: &str) {
            let error = whole(load(text).expect_err(text));
            assert!(error.contains(part), "{error:?} does not say {part:?}");
        }
        check("sockt: /a", "unknown field `sockt`");
        check("log:\n  format: xml", "line 2");
        check("log: {ansi: true}", "unknown field `ansi`");
        check("limits: {all: {perSecond: 0, burst: 1}}", "line 1");
        let one = |rate: &str| format!("limits: {{all: {{perSecond: 7, burst: 9}}, perWorkload: {rate}}}");
        let above = "limits.perWorkload: its perSecond is 8, and that of limits.all is 7: it must not be above it";
        check(&one("{perSecond: 8, burst: 9}"), above);
        check(&one("{perSecond: 7, burst: 10}"), "its burst is 10, and that of limits.all is 9");
        check("{kubernetes: {}, limits: {perWorkload: {perSecond: 50, burst: 50}}}", "its perSecond is 50");
        check("signer: {embedded: {caKey: /k}}", "caCertificate and caKey go together");
        check("signer: {embedded: {chain: /c}}", "chain needs both");
        check("signer: {embedded: {caCertificate: /c, caKey: /k, caLifetime: 1h}}", "caLifetime is for a CA that");
        let bounds = "signer.embedded.caLifetime: it must lie between 1m and 175200h";
        check("signer: {embedded: {caLifetime: 59s}}", bounds);
        check("signer: {embedded: {caLifetime: 175200h1s}}", bounds);
        check("signer: {embedded: {caLifetime: 60}}", "signer.embedded.caLifetime: \"60\" is no duration");
        check("{kubernetes: {}, policies: [/p]}", "policies is for an agent without a cluster");
        check("{kubernetes: {}, stateDir: /s}", "stateDir is for an agent without a cluster");
        check("{kubernetes: {}, signer: {embedded: {}}}", "signer.embedded is for an agent without a cluster");
        check("kubernetes: {nodes: a}", "unknown field `nodes`");
        check("kubernetes: {approval: nobody}", "unknown variant `nobody`");
        check("kubernetes: {node: ''}", "kubernetes.node: it must not be empty");
        check("kubernetes: {audience: ''}", "kubernetes.audience: it must not be empty");
        check("kubernetes: {signers: []}", "kubernetes.signers: name one at least");
        let twice = "{name: a.b/c, bundle: {file: /f}}";
        check(&format!("kubernetes: {{signers: [{twice}, {twice}]}}"), "kubernetes.signers: \"a.b/c\" is there twice");
        check("kubernetes: {signers: [{name: a.b/c}]}", "missing field `bundle`");
        check("kubernetes: {signers: [{name: a.b/c, bundle: {url: /}}]}", "unknown variant `url`");
        check("kubernetes: {signers: [{name: a.b/c, bundle: {configMap: {name: a}}}]}", "missing field");
        check("socket: relative", "the socket must be given as unix:///absolute/path");
        check(&format!("# {}", "a".repeat(MAX_CONFIG_BYTES)), "it has more than 65536 bytes");
        load(&format!("# {}", "a".repeat(MAX_CONFIG_BYTES - 2))).unwrap();
        let error = Config::load(Some(Path::new("/nonexistent/x.yaml")), Overrides::default()).unwrap_err();
        let expected =
            "configuration file /nonexistent/x.yaml: it cannot be read: No such file or directory (os error 2)";
        assert_eq!(whole(error), expected);
    }
}
