//! What the agent and the controller must call alike in a cluster, and how both reach it.
//!
//! Invariant: nothing here proves anything. Labels and annotations are written by whoever creates an object; the
//! controller takes them as a claim and checks it against what the API server itself wrote.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_rustls::{FixedServerNameResolver, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use kube::{
    Client, Config,
    client::{Body, ConfigExt as _},
    config::{KubeConfigOptions, Kubeconfig},
};
use tower::{BoxError, ServiceBuilder};

/// The signer that the controller signs for, and that a policy in a cluster means when it names none.
pub const SIGNER: &str = "csrd.dev/workload";
/// Group of our own resources.
pub const GROUP: &str = "csrd.dev";

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

/// What the API server adds to the user of a token that is bound to a pod, in `extra`: nobody else can write it.
pub mod extra {
    /// Name of the node that the pod is on.
    pub const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
    /// Name of the pod.
    pub const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
    /// UID of the pod.
    pub const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
}

/// The value of [`label::NODE`]: the node's name, cut to what a label holds. Two nodes may share it, so it only narrows a
/// list.
pub fn node_label(node: &str) -> &str {
    let end = node.floor_char_boundary(MAX_LABEL_BYTES.min(node.len()));
    node[..end].trim_end_matches(|c: char| !c.is_ascii_alphanumeric())
}

/// How long a connection to the API server may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// After so long without a word from the API server it is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// How long its answer may take before the connection is given up.
const PING_TIMEOUT: Duration = Duration::from_secs(10);
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
    /// A proxy stands before the API server.
    #[error("the kubeconfig names a proxy, which is not supported: reach the API server directly")]
    Proxy,
    /// The name to expect in the API server's certificate.
    #[error("the kubeconfig's tls-server-name is no server name")]
    ServerName,
}

/// A client by the current context of `kubeconfig`, or else by the ServiceAccount of the pod that this process is in.
///
/// All that it sends shares one HTTP/2 connection, however many watches are open. Nothing is sent a second time: whoever
/// asks knows whether it may, and how long there is.
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
    client(config)
}

/// kube's own layers over a connector that offers HTTP/2.
fn client(config: Config) -> Result<Client, ConnectError> {
    if config.proxy_url.is_some() {
        return Err(ConnectError::Proxy);
    }
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    let mut tls = HttpsConnectorBuilder::new().with_tls_config(config.rustls_client_config()?).https_or_http();
    if let Some(name) = &config.tls_server_name {
        let name = name.clone().try_into().map_err(|_| ConnectError::ServerName)?;
        tls = tls.with_server_name_resolver(FixedServerNameResolver::new(name));
    }
    let connector = tls.enable_all_versions().wrap_connector(tcp);
    let http: legacy::Client<_, Body> = legacy::Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .http2_keep_alive_interval(PING_INTERVAL)
        .http2_keep_alive_timeout(PING_TIMEOUT)
        .build(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
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
