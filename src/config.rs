//! The agent's configuration: a YAML file and flags in, a checked [`Config`] out.
//!
//! Unknown keys are errors, and every default is here. What the files that it names hold is checked by whoever reads
//! them.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    num::NonZeroU32,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// Bytes of a configuration file.
pub const MAX_CONFIG_BYTES: u64 = 64 * 1024;
/// Bytes of a socket's path: `sun_path` holds 108 with the closing NUL (unix(7)).
pub const MAX_SOCKET_PATH_BYTES: usize = 107;
/// The socket when neither flag nor file names one.
pub const DEFAULT_SOCKET: &str = "/run/csrd/csrd.sock";
/// The state folder when neither flag nor file names one.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/csrd";
/// The policies when neither flag nor file names any.
pub const DEFAULT_POLICIES: &str = "/etc/csrd/policies";

/// What the agent is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Path of the socket.
    pub socket: PathBuf,
    /// Where the embedded signer keeps its CA.
    pub state_dir: PathBuf,
    /// Policy files, or folders of them.
    pub policies: Vec<PathBuf>,
    /// Listener for metrics and readiness; none unless set.
    pub admin: Option<SocketAddr>,
    /// The embedded signer.
    pub embedded: EmbeddedFile,
    /// How logs are written.
    pub log: Log,
    /// Rates.
    pub limits: LimitsFile,
}

/// Settings that the command line puts before the file's.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// Path of the socket, or `unix:` and the path.
    pub socket: Option<String>,
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
    socket: Option<String>,
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

/// The embedded signer's CA: made in the state folder, or the operator's own files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct EmbeddedFile {
    /// The operator's CA certificate, PEM.
    pub ca_certificate: Option<PathBuf>,
    /// Its private key, PEM PKCS#8, readable by the agent's user only.
    pub ca_key: Option<PathBuf>,
    /// Certificates from above the CA certificate up to a root, PEM; needed when it is an intermediate.
    pub chain: Option<PathBuf>,
    /// Lifetime of a CA that the agent makes, in seconds.
    pub ca_lifetime_seconds: Option<u64>,
}

/// How logs are written.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Log {
    /// Text for people or JSON for machines.
    pub format: LogFormat,
    /// A `tracing` filter: `info`, or `info,csrd=debug`.
    pub level: String,
}

/// How a log line is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
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
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is too large to be a configuration.
    #[error("{}: {bytes} bytes, at most {MAX_CONFIG_BYTES} allowed", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The file is not a configuration.
    #[error("{}: {message}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, field and rule.
        message: String,
    },
    /// The socket is not a path that a socket can have.
    #[error("socket: {socket:?} {why}")]
    Socket {
        /// As it was given.
        socket: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// Half of a CA.
    #[error("signer.embedded: caCertificate and caKey go together, and chain needs both")]
    HalfCa,
}

impl Config {
    /// The configuration of the file at `path`, if one is given, with `overrides` put before it.
    pub fn load(path: Option<&Path>, overrides: Overrides) -> Result<Self, ConfigError> {
        let file = path.map(read).transpose()?.unwrap_or_default();
        let socket = overrides.socket.or(file.socket).unwrap_or_else(|| DEFAULT_SOCKET.to_owned());
        let policies = if overrides.policies.is_empty() { file.policies } else { Some(overrides.policies) };
        let embedded = file.signer.embedded;
        if embedded.ca_certificate.is_some() != embedded.ca_key.is_some()
            || (embedded.chain.is_some() && embedded.ca_key.is_none())
        {
            return Err(ConfigError::HalfCa);
        }
        Ok(Self {
            socket: socket_path(&socket)?,
            state_dir: overrides.state_dir.or(file.state_dir).unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
            policies: policies.unwrap_or_else(|| vec![DEFAULT_POLICIES.into()]),
            admin: overrides.admin.or(file.admin),
            embedded,
            log: file.log,
            limits: file.limits,
        })
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Text, level: "info".to_owned() }
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
    let unreadable = |source| ConfigError::Read { path: path.to_owned(), source };
    let bytes = fs::metadata(path).map_err(unreadable)?.len();
    if bytes > MAX_CONFIG_BYTES {
        return Err(ConfigError::TooLarge { path: path.to_owned(), bytes });
    }
    let text = fs::read_to_string(path).map_err(unreadable)?;
    serde_saphyr::from_str(&text)
        .map_err(|error| ConfigError::Invalid { path: path.to_owned(), message: error.to_string() })
}

/// The `OTEL_*` variables of the process, for whoever sends traces.
#[allow(clippy::disallowed_methods, reason = "the one place that reads the environment")]
pub fn otel_variables() -> BTreeMap<String, String> {
    // Variables that are not UTF-8 are none of ours.
    let variables =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    variables.filter(|(name, _)| name.starts_with("OTEL_")).collect()
}

/// The path in `unix:///path`, `unix:/path`, `unix:path` or a bare path.
pub fn socket_path(socket: &str) -> Result<PathBuf, ConfigError> {
    let bad = |why| ConfigError::Socket { socket: socket.chars().take(2 * MAX_SOCKET_PATH_BYTES).collect(), why };
    let path = match socket.strip_prefix("unix:") {
        Some(rest) => rest.strip_prefix("//").unwrap_or(rest),
        None => socket,
    };
    if path.is_empty() || path.contains('\0') {
        return Err(bad("is no path"));
    }
    if path.len() > MAX_SOCKET_PATH_BYTES {
        return Err(bad("is longer than the 107 bytes that a unix socket's path may have (unix(7))"));
    }
    Ok(path.into())
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

    #[test]
    fn an_empty_configuration_is_the_defaults() {
        let config = Config::load(None, Overrides::default()).unwrap();
        assert_eq!(config, load("{}").unwrap());
        assert_eq!(config.socket, Path::new(DEFAULT_SOCKET));
        assert_eq!(config.admin, None);
    }

    #[test]
    fn a_flag_goes_before_the_file() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "socket: unix:///a.sock\npolicies: [/a]\nstateDir: /state").unwrap();
        let overrides =
            Overrides { socket: Some("/b.sock".into()), policies: vec!["/b".into()], ..Overrides::default() };
        let config = Config::load(Some(file.path()), overrides).unwrap();
        assert_eq!((config.socket, config.policies), ("/b.sock".into(), vec!["/b".into()]));
        assert_eq!(config.state_dir, Path::new("/state"));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        fn check(text: &str, part: &str) {
            let error = load(text).expect_err(text).to_string();
            assert!(error.contains(part), "{error:?} does not say {part:?}");
        }
        check("sockt: /a", "unknown field `sockt`");
        check("log:\n  format: xml", "line 2");
        check("limits: {all: {perSecond: 0, burst: 1}}", "line 1");
        check("signer: {embedded: {caKey: /k}}", "caCertificate and caKey go together");
        check("signer: {embedded: {chain: /c}}", "chain needs both");
        check("socket: 'unix:'", "is no path");
        check(&format!("socket: /{}", "a".repeat(MAX_SOCKET_PATH_BYTES)), "107 bytes");
        check(&format!("# {}", "a".repeat(64 * 1024)), "at most 65536 allowed");
        let error = Config::load(Some(Path::new("/nonexistent/x.yaml")), Overrides::default()).unwrap_err();
        assert_eq!(error.to_string(), "cannot read /nonexistent/x.yaml");
    }

    #[test]
    fn a_socket_path_may_have_107_bytes() {
        let path = format!("/{}", "a".repeat(MAX_SOCKET_PATH_BYTES - 1));
        for socket in [path.clone(), format!("unix:{path}"), format!("unix://{path}")] {
            assert_eq!(socket_path(&socket).unwrap(), Path::new(&path));
        }
    }
}
