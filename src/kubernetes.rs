//! What the agent and the controller must call alike in a cluster, and how both reach it.
//!
//! Invariant: nothing here proves anything. Labels and annotations are written by whoever creates an object; the
//! controller takes them as a claim and checks it against what the API server itself wrote.

use std::path::{Path, PathBuf};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

/// The signer that the controller signs for, and that a policy in a cluster means when it names none.
pub const SIGNER: &str = "csrd.dev/workload";
/// Group of our own resources.
pub const GROUP: &str = "csrd.dev";
/// The ConfigMap that the controller publishes the roots of [`SIGNER`] in.
pub const TRUST_BUNDLE: &str = "csrd-trust-bundle";
/// The key of [`TRUST_BUNDLE`] that holds them, as PEM.
pub const TRUST_BUNDLE_KEY: &str = "ca.crt";

/// Annotations of a CertificateSigningRequest that an agent made: for which pod, and within which trace.
pub mod annotation {
    /// Namespace of the pod.
    pub const POD_NAMESPACE: &str = "csrd.dev/pod-namespace";
    /// Name of the pod.
    pub const POD_NAME: &str = "csrd.dev/pod-name";
    /// UID of the pod.
    pub const POD_UID: &str = "csrd.dev/pod-uid";
    /// Name of the pod's ServiceAccount.
    pub const SERVICE_ACCOUNT: &str = "csrd.dev/service-account";
    /// Name of the node that the pod and the agent are on.
    pub const NODE: &str = "csrd.dev/node";
    /// W3C `traceparent` of the issuance.
    pub const TRACEPARENT: &str = "csrd.dev/traceparent";
}

/// Labels of a CertificateSigningRequest that an agent made.
pub mod label {
    /// Tells ours from all others; the value is [`MANAGER`].
    pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
    /// The value of [`MANAGED_BY`].
    pub const MANAGER: &str = "csrd";
    /// Of which node's agent, by [`super::node_label`].
    pub const NODE: &str = "csrd.dev/node";
}

/// The value of [`label::NODE`]: the node's name, cut to what a label holds. Two nodes may share it, so it only narrows a
/// list.
pub fn node_label(node: &str) -> &str {
    let end = node.floor_char_boundary(MAX_LABEL_BYTES.min(node.len()));
    node[..end].trim_end_matches(|c: char| !c.is_ascii_alphanumeric())
}

/// Bytes in a label's value (Kubernetes, "Labels and Selectors").
const MAX_LABEL_BYTES: usize = 63;

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The file is no kubeconfig, or has not what its current context names.
    #[error("kubeconfig {}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: kube::config::KubeconfigError,
    },
    /// Not in a pod with a ServiceAccount.
    #[error("no kubeconfig is given, and this is no pod with a ServiceAccount token")]
    InCluster(#[from] kube::config::InClusterError),
    /// The credentials are of no use.
    #[error("the cluster's credentials cannot be used")]
    Client(#[from] kube::Error),
}

/// A client by the current context of `kubeconfig`, or else by the ServiceAccount of the pod that this process is in.
///
/// # Errors
/// See [`ConnectError`]. Nothing is sent yet, so a server that is away is no error.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client, ConnectError> {
    let config = match kubeconfig {
        Some(path) => {
            let of = |source| ConnectError::Kubeconfig { path: path.to_owned(), source };
            let read = Kubeconfig::read_from(path).map_err(of)?;
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await.map_err(of)?
        }
        None => Config::incluster()?,
    };
    Ok(Client::try_from(config)?)
}

/// What went wrong, in the API server's own words where it answered.
pub fn said(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        error => {
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(error);
            while let Some(error) = cause {
                // Some print their cause themselves.
                if !text.ends_with(&error.to_string()) {
                    text = format!("{text}: {error}");
                }
                cause = error.source();
            }
            text
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_label_is_a_valid_one_whatever_its_name() {
        let long = format!("{}.example.org", "a".repeat(MAX_LABEL_BYTES - 1));
        for (node, label) in [("node1", "node1"), ("a.b", "a.b"), (long.as_str(), &long[..MAX_LABEL_BYTES - 1])] {
            assert_eq!(node_label(node), label);
        }
        assert_eq!(node_label(&"a".repeat(MAX_LABEL_BYTES + 1)).len(), MAX_LABEL_BYTES);
    }
}
