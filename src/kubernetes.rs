//! What the agent and the controller must call alike in a cluster, and how both reach it.
//!
//! Invariant: nothing here proves anything. Labels and annotations are written by whoever creates an object; the
//! controller takes them as a claim and checks it against what the API server itself wrote.

mod excerpt;
mod trace;
pub mod watch;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use hyper_rustls::{FixedServerNameResolver, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use kube::{
    Api, Client, Config,
    api::PostParams,
    client::{Body, ConfigExt as _},
    config::{KubeConfigOptions, Kubeconfig},
    runtime::utils,
};
use tokio::time::Instant;
use tower::{BoxError, ServiceBuilder};

#[cfg(test)]
pub(crate) use self::excerpt::excerpt;
pub use self::excerpt::{
    BEYOND, MAX_LABELS, MAX_NAMESPACE_BYTES, MAX_NODE_BYTES, MAX_POD_BYTES, MAX_REQUEST_BYTES, MAX_SELECTOR_LABELS,
    MAX_SERVICE_BYTES, MAX_SLICE_BYTES, MAX_TRUST_BUNDLE_BYTES, SAID_EVERY, is_beyond, page, report,
};
use crate::backoff::Backoff;

/// The signer that the controller signs for, and that a policy in a cluster means when it names none.
pub const SIGNER: &str = "csrd.dev/workload";
/// The longest wait for one answer of the API server.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Group of our own resources.
pub const GROUP: &str = "csrd.dev";
/// The namespace that agents and controller run in.
pub const NAMESPACE: &str = "csrd-system";
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

/// What the API server adds to the user of a token that is bound to a pod, in `extra`: nobody else can write it.
pub mod extra {
    use std::collections::BTreeMap;

    /// Name of the node that the pod is on.
    pub const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
    /// Name of the pod.
    pub const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
    /// UID of the pod.
    pub const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

    /// The value of `key`, if there is exactly one: which of several is meant nobody knows.
    pub fn one<'a>(extra: Option<&'a BTreeMap<String, Vec<String>>>, key: &str) -> Option<&'a String> {
        match extra?.get(key)?.as_slice() {
            [value] => Some(value),
            _ => None,
        }
    }
}

/// The value of [`label::NODE`]: the node's name, cut to what a label holds. Two nodes may share it, so it only narrows a
/// list.
pub fn node_label(node: &str) -> &str {
    let end = node.floor_char_boundary(MAX_LABEL_BYTES.min(node.len()));
    node[..end].trim_end_matches(|c: char| !c.is_ascii_alphanumeric())
}

/// Between tries while the API server is away: seldom enough for a cluster of agents, and soon after it is back.
pub const RETRY: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));
/// A watch that has not failed for so long begins with short waits again.
pub const WATCH_HELD: Duration = Duration::from_secs(60);

/// [`RETRY`] for kube's watchers. Their own default lets up to a minute pass after an outage, in which a right that
/// was taken away would stay in force.
#[derive(Debug, Default)]
pub struct WatchBackoff {
    failures: u32,
    failed_at: Option<Instant>,
    lag: Lag,
}

/// Until when watches may be behind: clones share it. A watch in which nothing changes tells nothing, so nobody knows when
/// one that failed has caught up. It has the wait before its next try for that, and [`ANSWER_WITHIN`]; what is known is not
/// held to be old for longer, unless the next try fails too.
#[derive(Clone, Debug, Default)]
pub struct Lag(Arc<Mutex<Option<Instant>>>);

impl Lag {
    /// The waits of one more watch.
    pub fn backoff(&self) -> WatchBackoff {
        WatchBackoff { lag: self.clone(), ..WatchBackoff::default() }
    }

    /// Whether no watch may be behind.
    pub fn is_over(&self) -> bool {
        self.until().is_none_or(|until| until <= Instant::now())
    }

    fn until(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().expect("no code panics while it holds the lag")
    }
}

impl Iterator for WatchBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let held = self.failed_at.replace(now).is_none_or(|before| now - before > WATCH_HELD);
        self.failures = if held { 1 } else { self.failures.saturating_add(1) };
        let wait = RETRY.delay(self.failures, &mut rand::rng());
        let mut until = self.lag.until();
        *until = (*until).max(Some(now + wait + ANSWER_WITHIN));
        Some(wait)
    }
}

impl utils::Backoff for WatchBackoff {
    /// Does nothing: an event that comes before each try of a list would reset it, and lists would be tried without end.
    fn reset(&mut self) {}
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
/// All that it sends shares one HTTP/2 connection, however many watches are open. Of objects that others write it brings
/// excerpts, whose size has a bound; see [`is_beyond`]. Nothing is sent a second time: whoever
/// asks knows whether it may, and how long there is.
///
/// # Errors
/// See [`ConnectError`]. Nothing is sent yet, so a server that is away is no error.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client, ConnectError> {
    client(configuration(kubeconfig).await?)
}

/// Where [`connect`] finds the API server: the host of its URL, and the name to expect in its certificate if that is another.
///
/// # Errors
/// As there.
pub async fn api_hosts(kubeconfig: Option<&Path>) -> Result<Vec<String>, ConnectError> {
    let config = configuration(kubeconfig).await?;
    let host = config.cluster_url.host().map(|host| host.trim_matches(['[', ']']).to_owned());
    Ok(host.into_iter().chain(config.tls_server_name).collect())
}

async fn configuration(kubeconfig: Option<&Path>) -> Result<Config, ConnectError> {
    let Some(path) = kubeconfig else { return Ok(Config::incluster()?) };
    let of = |source| ConnectError::Kubeconfig { path: path.to_owned(), source };
    let read = Kubeconfig::read_from(path).map_err(of)?;
    Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await.map_err(of)
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
        .map_request(trace::name_span)
        .map_future(trace::record_audit_id)
        .layer_fn(excerpt::Excerpts)
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}

/// This process, as the API server knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its user name.
    pub username: String,
    /// The node that its token is bound to.
    pub(crate) node: Option<String>,
    /// UID of the pod that its token is bound to.
    pub pod_uid: Option<String>,
}

/// Why the agent's node is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// Neither source names one.
    #[error("the agent's token names no node; name it with --node, or run the agent in a pod with a projected token")]
    Unnamed,
    /// The sources disagree.
    #[error("the agent's token is of node {claimed:?}, and {configured:?} is configured; leave the latter out")]
    Conflict {
        /// The token's.
        claimed: String,
        /// The operator's.
        configured: String,
    },
}

impl Identity {
    /// Asks the API server.
    ///
    /// # Errors
    /// It does not answer, or does not know this process.
    pub async fn ask(client: &Client) -> kube::Result<Self> {
        let reviews = Api::<SelfSubjectReview>::all(client.clone());
        let review = reviews.create(&PostParams::default(), &SelfSubjectReview::default()).await?;
        let user = review.status.and_then(|status| status.user_info).unwrap_or_default();
        let [node, pod_uid] =
            [extra::NODE_NAME, extra::POD_UID].map(|key| extra::one(user.extra.as_ref(), key).cloned());
        Ok(Self { username: user.username.unwrap_or_default(), node, pod_uid })
    }

    /// The node that this process is on. What the API server says is proven; what is configured serves where it says
    /// nothing, and must be the same otherwise.
    ///
    /// # Errors
    /// No node, or two.
    pub fn node(&self, configured: Option<&str>) -> Result<String, NodeError> {
        match (&self.node, configured) {
            (Some(claimed), Some(configured)) if claimed != configured => {
                Err(NodeError::Conflict { claimed: claimed.clone(), configured: configured.to_owned() })
            }
            (Some(node), _) => Ok(node.clone()),
            (None, Some(node)) => Ok(node.to_owned()),
            (None, None) => Err(NodeError::Unnamed),
        }
    }
}

/// Whether the same request may succeed later, without anybody changing anything about it.
pub fn is_transient(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.code == 429 || status.code >= 500,
        _ => true,
    }
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

    #[tokio::test(start_paused = true)]
    async fn a_watch_is_tried_ever_less_often_up_to_ten_seconds_until_it_has_held() {
        let mut backoff = WatchBackoff::default();
        let mut wait = || {
            utils::Backoff::reset(&mut backoff);
            backoff.next().unwrap()
        };
        assert!(wait() <= Duration::from_millis(500));
        let longest = Duration::from_secs(10);
        let waits: Vec<_> = (0..9).map(|_| wait()).collect();
        assert!(waits.iter().all(|wait| *wait <= longest) && waits[8] >= longest / 2, "{waits:?}");
        tokio::time::advance(WATCH_HELD).await;
        assert!(wait() >= longest / 2);
        tokio::time::advance(WATCH_HELD + Duration::from_millis(1)).await;
        assert!(wait() <= Duration::from_millis(500));
    }

    #[tokio::test(start_paused = true)]
    async fn watches_may_be_behind_until_the_last_that_failed_has_had_its_time() {
        let lag = Lag::default();
        let (mut first, mut second) = (lag.backoff(), lag.backoff());
        assert!(lag.is_over());
        let long = (0..9).filter_map(|_| first.next()).max().unwrap();
        assert!(second.next().unwrap() < long);
        tokio::time::advance(long + ANSWER_WITHIN - Duration::from_millis(1)).await;
        assert!(!lag.is_over());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(lag.is_over());
    }

    #[tokio::test]
    async fn the_api_servers_hosts_are_those_of_the_configuration() {
        for (server, name, hosts) in [
            ("https://10.96.0.1:6443", "", vec!["10.96.0.1"]),
            ("https://[fd00::1]:6443/prefix", "", vec!["fd00::1"]),
            (
                "https://api.example.org",
                "tls-server-name: inner.example.org",
                vec!["api.example.org", "inner.example.org"],
            ),
        ] {
            let file = tempfile::NamedTempFile::new().unwrap();
            let text = format!(
                "{{clusters: [{{name: a, cluster: {{server: '{server}', {name}}}}}], users: [{{name: a, user: {{}}}}],
                contexts: [{{name: a, context: {{cluster: a, user: a}}}}], current-context: a}}"
            );
            std::fs::write(file.path(), text).unwrap();
            assert_eq!(api_hosts(Some(file.path())).await.unwrap(), hosts);
        }
    }

    #[test]
    fn a_nodes_label_is_a_valid_one_whatever_its_name() {
        let long = format!("{}.example.org", "a".repeat(MAX_LABEL_BYTES - 1));
        for (node, label) in [("node1", "node1"), ("a.b", "a.b"), (long.as_str(), &long[..MAX_LABEL_BYTES - 1])] {
            assert_eq!(node_label(node), label);
        }
        assert_eq!(node_label(&"a".repeat(MAX_LABEL_BYTES + 1)).len(), MAX_LABEL_BYTES);
    }
}
