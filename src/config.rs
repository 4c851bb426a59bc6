//! The agent's configuration: a YAML file and flags in, a checked [`Config`] out.
//!
//! Unknown keys are errors, and every default is here. What the files that it names hold is checked by whoever reads
//! them.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    num::NonZeroU32,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    files::{self, FileError},
    policy::lifetime,
    signer::embedded::{DEFAULT_CA_LIFETIME, EmbeddedConfig, MAX_CA_LIFETIME, MIN_CA_LIFETIME},
    socket::SocketPath,
    telemetry::Log,
};

/// Bytes of a configuration file.
pub const MAX_CONFIG_BYTES: usize = 64 * 1024;
/// The state folder when neither flag nor file names one.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/csrd";
/// The policies when neither flag nor file names any.
pub const DEFAULT_POLICIES: &str = "/etc/csrd/policies";

/// What the agent is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The socket.
    pub socket: SocketPath,
    /// Policy files, or folders of them.
    pub policies: Vec<PathBuf>,
    /// Listener for metrics and readiness; none unless set.
    pub admin: Option<SocketAddr>,
    /// The embedded signer's CA.
    pub ca: EmbeddedConfig,
    /// How logs are written.
    pub log: Log,
    /// Rates.
    pub limits: LimitsFile,
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
}

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct File {
    socket: Option<SocketPath>,
    state_dir: Option<PathBuf>,
    policies: Option<Vec<PathBuf>>,
    admin: Option<SocketAddr>,
    signer: SignerFile,
    log: Log,
    limits: LimitsFile,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct LimitsFile {
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
    /// Half of a CA.
    #[error("signer.embedded: caCertificate and caKey go together, and chain needs both")]
    HalfCa,
    /// A lifetime for a CA that has one.
    #[error("signer.embedded: caLifetime is for a CA that the agent makes; leave it out beside caCertificate")]
    LifetimeOfGivenCa,
    /// No duration, or one from outside [`MIN_CA_LIFETIME`] to [`MAX_CA_LIFETIME`].
    #[error("signer.embedded.caLifetime: {0}")]
    CaLifetime(String),
}

impl Config {
    /// The configuration of the file at `path`, if one is given, with `overrides` put before it.
    pub fn load(path: Option<&Path>, overrides: Overrides) -> Result<Self, ConfigError> {
        let file = path.map(read).transpose()?.unwrap_or_default();
        let state_dir = overrides.state_dir.or(file.state_dir).unwrap_or_else(|| DEFAULT_STATE_DIR.into());
        let policies = if overrides.policies.is_empty() { file.policies } else { Some(overrides.policies) };
        Ok(Self {
            socket: overrides.socket.or(file.socket).unwrap_or_default(),
            policies: policies.unwrap_or_else(|| vec![DEFAULT_POLICIES.into()]),
            admin: overrides.admin.or(file.admin),
            ca: ca(file.signer.embedded, state_dir)?,
            log: file.log,
            limits: file.limits,
        })
    }
}

impl Default for LimitsFile {
    fn default() -> Self {
        let rate = |per_second, burst| RateFile {
            per_second: NonZeroU32::new(per_second).expect("not zero"),
            burst: NonZeroU32::new(burst).expect("not zero"),
        };
        Self { all: rate(500, 1000), per_workload: rate(50, 500) }
    }
}

fn read(path: &Path) -> Result<File, ConfigError> {
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
            let given = file.ca_lifetime.map(|text| lifetime::parse(&text, MIN_CA_LIFETIME..=MAX_CA_LIFETIME));
            let ca_lifetime = given.transpose().map_err(ConfigError::CaLifetime)?.unwrap_or(DEFAULT_CA_LIFETIME);
            Ok(EmbeddedConfig::Made { state_dir, ca_lifetime })
        }
        _ => Err(ConfigError::HalfCa),
    }
}

/// The `OTEL_*` variables of the process, for whoever sends traces.
#[allow(clippy::disallowed_methods, reason = "the one place that reads the environment")]
pub fn otel_variables() -> BTreeMap<String, String> {
    // Variables that are not UTF-8 are none of ours.
    let variables =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    variables.filter(|(name, _)| name.starts_with("OTEL_")).collect()
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, time::Duration};

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
        assert_eq!((config.socket.to_string().as_str(), config.policies), ("/b.sock", vec!["/b".into()]));
        assert_eq!(config.ca, EmbeddedConfig::Made { state_dir: "/b".into(), ca_lifetime: DEFAULT_CA_LIFETIME });
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
            assert_eq!(config.ca, expected, "{text}");
        }
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
        check("signer: {embedded: {caKey: /k}}", "caCertificate and caKey go together");
        check("signer: {embedded: {chain: /c}}", "chain needs both");
        check("signer: {embedded: {caCertificate: /c, caKey: /k, caLifetime: 1h}}", "caLifetime is for a CA that");
        let bounds = "signer.embedded.caLifetime: it must lie between 1m and 175200h";
        check("signer: {embedded: {caLifetime: 59s}}", bounds);
        check("signer: {embedded: {caLifetime: 175200h1s}}", bounds);
        check("signer: {embedded: {caLifetime: 60}}", "signer.embedded.caLifetime: \"60\" is no duration");
        check("socket: relative", "the socket must be given as unix:///absolute/path");
        check(&format!("# {}", "a".repeat(MAX_CONFIG_BYTES)), "it has more than 65536 bytes");
        load(&format!("# {}", "a".repeat(MAX_CONFIG_BYTES - 2))).unwrap();
        let error = Config::load(Some(Path::new("/nonexistent/x.yaml")), Overrides::default()).unwrap_err();
        let expected =
            "configuration file /nonexistent/x.yaml: it cannot be read: No such file or directory (os error 2)";
        assert_eq!(whole(error), expected);
    }
}
