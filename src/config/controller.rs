//! The controller's configuration: a YAML file in, a checked [`Controller`] out.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    num::NonZeroU32,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;

use super::{ConfigError, EmbeddedFile, RateFile, ca_lifetime, read};
use crate::{
    kubernetes,
    signer::embedded::EmbeddedConfig,
    telemetry::Log,
};

/// Where everything of ours is, unless configured.
pub const DEFAULT_NAMESPACE: &str = "csrd-system";
/// ServiceAccount of the agents, unless configured.
pub const DEFAULT_AGENT: &str = "csrd-agent";
/// The Secret with the CA, unless configured.
pub const DEFAULT_CA_SECRET: &str = "csrd-ca";

/// Signers whose requests are approved for nobody's pods, with the reason.
const NEVER_APPROVED: [(&str, &str); 3] = [
    ("kubernetes.io/kubelet-serving", "its certificates are for kubelets, and no pod is one"),
    ("kubernetes.io/kube-apiserver-client-kubelet", "whoever holds one of its certificates is a node"),
    ("kubernetes.io/legacy-unknown", "the API takes no requests for it"),
];

/// What the controller is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Controller {
    /// How to reach the API server; `None` means by the pod's own ServiceAccount.
    pub kubeconfig: Option<PathBuf>,
    /// Where the Lease, the Secret and the agents' trust bundle are.
    pub namespace: String,
    /// ServiceAccount of the agents, in `namespace`.
    pub agent: String,
    /// The signer's own name.
    pub signer: String,
    /// Where its CA comes from.
    pub ca: Ca,
    /// Others' signers, whose requests are approved.
    pub approves: BTreeSet<String>,
    /// Namespaces that get the trust bundle, beside `namespace` and those with the label.
    pub bundle_namespaces: Vec<String>,
    /// Verdicts for each node.
    pub per_node: RateFile,
    /// Listener for metrics and readiness; none unless set.
    pub admin: Option<SocketAddr>,
    /// How logs are written.
    pub log: Log,
}

/// Where the signer's CA comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ca {
    /// A Secret, made if it is not there, and rotated.
    Secret {
        /// Its name.
        name: String,
        /// Lifetime of each CA.
        lifetime: Duration,
    },
    /// The operator's files.
    Files(EmbeddedConfig),
}

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct File {
    kubeconfig: Option<PathBuf>,
    namespace: Option<String>,
    agent: Option<String>,
    signer: SignerFile,
    approve: BTreeSet<String>,
    trust_bundle: TrustBundleFile,
    limits: LimitsFile,
    admin: Option<SocketAddr>,
    log: Log,
}
