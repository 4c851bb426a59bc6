//! The controller's configuration: a YAML file in, a checked [`Controller`] out.

use std::{
    collections::BTreeSet,
    fmt,
    net::SocketAddr,
    num::NonZeroU32,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};

use super::{ConfigError, RateFile, ca_lifetime, read};
use crate::{
    controller::{Ca, KubeletServing},
    kubernetes::{NAMESPACE, SIGNER},
    signer::embedded::EmbeddedConfig,
    telemetry::Log,
    x509::DnsName,
};

/// ServiceAccount of the agents, unless configured.
pub const DEFAULT_AGENT: &str = "csrd-agent";
/// The Secret with the CA, unless configured.
pub const DEFAULT_CA_SECRET: &str = "csrd-ca";

/// Signers whose requests are approved for no pod, with the reason.
const NEVER_APPROVED: [(&str, &str); 3] = [
    (
        "kubernetes.io/kubelet-serving",
        "its certificates are for kubelets, and no pod is one; for kubelets there is kubeletServing",
    ),
    (
        "kubernetes.io/kube-apiserver-client-kubelet",
        "whoever holds one of its certificates is a node to the API server",
    ),
    ("kubernetes.io/legacy-unknown", "the API takes no requests for it"),
];

/// What the controller is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Controller {
    /// How to reach the API server; `None` means by the pod's own ServiceAccount.
    pub kubeconfig: Option<PathBuf>,
    /// Where the Lease, the Secret and the agents are.
    pub namespace: String,
    /// ServiceAccount of the agents, in `namespace`.
    pub agent: String,
    /// The signer's own name.
    pub signer: String,
    /// Where its CA comes from.
    pub ca: Ca,
    /// Others' signers, whose requests are approved.
    pub approve: BTreeSet<String>,
    /// For which names kubelets' serving certificates are approved, if they are.
    pub kubelet_serving: Option<KubeletServing>,
    /// Namespaces that get the trust bundle, beside `namespace` and those with the label.
    pub bundle_namespaces: Vec<String>,
    /// Verdicts for each node.
    pub per_node: RateFile,
    /// Listener for metrics and readiness; none unless set.
    pub admin: Option<SocketAddr>,
    /// How logs are written.
    pub log: Log,
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
    kubelet_serving: KubeletServingFile,
    trust_bundle: TrustBundleFile,
    limits: LimitsFile,
    admin: Option<SocketAddr>,
    log: Log,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct SignerFile {
    name: Option<String>,
    ca_secret: Option<String>,
    ca_lifetime: Option<String>,
    ca_certificate: Option<PathBuf>,
    ca_key: Option<PathBuf>,
    chain: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct TrustBundleFile {
    namespaces: Vec<String>,
}

/// `true`, `false`, or what certificates are held to.
#[derive(Debug, Default)]
enum KubeletServingFile {
    #[default]
    Off,
    On(KubeletListsFile),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct KubeletListsFile {
    addresses: Option<Vec<IpNet>>,
    dns_suffixes: Option<Vec<String>>,
}

impl<'de> Deserialize<'de> for KubeletServingFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = KubeletServingFile;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false, or {addresses: [...], dnsSuffixes: [...]}")
            }

            fn visit_bool<E>(self, on: bool) -> Result<KubeletServingFile, E> {
                Ok(if on { KubeletServingFile::On(KubeletListsFile::default()) } else { KubeletServingFile::Off })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<KubeletServingFile, A::Error> {
                KubeletListsFile::deserialize(MapAccessDeserializer::new(map)).map(KubeletServingFile::On)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct LimitsFile {
    per_node: RateFile,
}

/// A node of 110 pods that all ask at once, twice, and a renewal of each every five seconds.
impl Default for LimitsFile {
    fn default() -> Self {
        let number = |number| NonZeroU32::new(number).expect("not zero");
        Self { per_node: RateFile { per_second: number(20), burst: number(220) } }
    }
}

impl Controller {
    /// The configuration of the file at `path`, if one is given, else the defaults.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let file: File = path.map(read).transpose()?.unwrap_or_default();
        let signer = file.signer.name.clone().unwrap_or_else(|| SIGNER.to_owned());
        for name in &file.approve {
            if let Some((_, why)) = NEVER_APPROVED.iter().find(|(never, _)| never == name) {
                return Err(ConfigError::NeverApproved { name: name.clone(), why });
            }
            if *name == signer {
                return Err(ConfigError::NeverApproved {
                    name: name.clone(),
                    why: "it is the controller's own signer",
                });
            }
        }
        Ok(Self {
            kubeconfig: file.kubeconfig,
            namespace: file.namespace.unwrap_or_else(|| NAMESPACE.to_owned()),
            agent: file.agent.unwrap_or_else(|| DEFAULT_AGENT.to_owned()),
            signer,
            ca: ca(file.signer)?,
            approve: file.approve,
            kubelet_serving: kubelet_serving(file.kubelet_serving)?,
            bundle_namespaces: file.trust_bundle.namespaces,
            per_node: file.limits.per_node,
            admin: file.admin,
            log: file.log,
        })
    }
}

fn kubelet_serving(file: KubeletServingFile) -> Result<Option<KubeletServing>, ConfigError> {
    let KubeletServingFile::On(KubeletListsFile { addresses, dns_suffixes }) = file else { return Ok(None) };
    if addresses.as_ref().is_some_and(Vec::is_empty) {
        return Err(ConfigError::NothingListed("kubeletServing.addresses"));
    }
    if dns_suffixes.as_ref().is_some_and(Vec::is_empty) {
        return Err(ConfigError::NothingListed("kubeletServing.dnsSuffixes"));
    }
    for suffix in dns_suffixes.iter().flatten() {
        DnsName::parse(suffix)
            .ok()
            .filter(|name| !name.is_wildcard())
            .ok_or_else(|| ConfigError::DnsSuffix(suffix.clone()))?;
    }
    Ok(Some(KubeletServing { addresses, dns_suffixes }))
}

/// The operator's files, or a Secret.
fn ca(file: SignerFile) -> Result<Ca, ConfigError> {
    match (file.ca_certificate, file.ca_key, file.chain) {
        (Some(_), Some(_), _) if file.ca_secret.is_some() || file.ca_lifetime.is_some() => Err(ConfigError::TwoCas),
        (Some(certificate), Some(key), chain) => Ok(Ca::Files(EmbeddedConfig::Given { certificate, key, chain })),
        (None, None, None) => Ok(Ca::Secret {
            name: file.ca_secret.unwrap_or_else(|| DEFAULT_CA_SECRET.to_owned()),
            lifetime: ca_lifetime("signer", file.ca_lifetime.as_deref())?,
        }),
        _ => Err(ConfigError::HalfCa("signer")),
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, time::Duration};

    use super::*;
    use crate::signer::embedded::DEFAULT_CA_LIFETIME;

    fn load(text: &str) -> Result<Controller, ConfigError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        Controller::load(Some(file.path()))
    }

    #[test]
    fn nothing_configured_is_a_controller_of_the_shipped_deployment() {
        let config = Controller::load(None).unwrap();
        assert_eq!(config, load("{}").unwrap());
        assert_eq!((config.signer.as_str(), config.namespace.as_str()), (SIGNER, NAMESPACE));
        assert_eq!(config.ca, Ca::Secret { name: DEFAULT_CA_SECRET.into(), lifetime: DEFAULT_CA_LIFETIME });
        assert!(config.approve.is_empty() && config.bundle_namespaces.is_empty() && config.kubelet_serving.is_none());
    }

    #[test]
    fn what_is_configured_is_taken() {
        let config = load(
            "{kubeconfig: /k, namespace: n, agent: a, approve: [kubernetes.io/kube-apiserver-client],
            signer: {name: example.com/x, caSecret: s, caLifetime: 1h}, trustBundle: {namespaces: [b]},
            kubeletServing: true, limits: {perNode: {perSecond: 1, burst: 2}}}",
        )
        .unwrap();
        assert_eq!(
            (config.signer.as_str(), config.namespace.as_str(), config.agent.as_str()),
            ("example.com/x", "n", "a")
        );
        assert_eq!(config.ca, Ca::Secret { name: "s".into(), lifetime: Duration::from_secs(3600) });
        assert_eq!((config.bundle_namespaces, config.per_node.burst.get()), (vec!["b".to_owned()], 2));
        assert!(config.approve.contains("kubernetes.io/kube-apiserver-client") && config.kubelet_serving.is_some());
        let config = load("signer: {caCertificate: /c, caKey: /k}").unwrap();
        let given = EmbeddedConfig::Given { certificate: "/c".into(), key: "/k".into(), chain: None };
        assert_eq!(config.ca, Ca::Files(given));
    }

    #[test]
    fn kubelets_are_answered_where_it_is_switched_on_and_for_what_is_listed() {
        let serving = |text: &str| load(&format!("kubeletServing: {text}")).unwrap().kubelet_serving;
        assert_eq!(serving("false"), None);
        let all = Some(KubeletServing { addresses: None, dns_suffixes: None });
        assert_eq!((serving("true"), serving("{}")), (all.clone(), all));
        let listed = serving("{addresses: [10.0.0.0/8, 'fd00::/8'], dnsSuffixes: [nodes.example.org]}").unwrap();
        assert_eq!(listed.addresses.unwrap(), ["10.0.0.0/8", "fd00::/8"].map(|range| range.parse().unwrap()));
        assert_eq!(listed.dns_suffixes.unwrap(), ["nodes.example.org"]);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        fn check(text: &str, part: &str) {
            let error = load(text).expect_err(text).to_string();
            assert!(error.contains(part), "{error:?} does not say {part:?}");
        }
        check("sockt: /a", "unknown field `sockt`");
        check("signer: {caKey: /k}", "signer: caCertificate and caKey go together");
        check("signer: {caCertificate: /c, caKey: /k, caSecret: s}", "leave them out beside caCertificate");
        check("signer: {caCertificate: /c, caKey: /k, caLifetime: 1h}", "leave them out beside caCertificate");
        check("signer: {caLifetime: 59s}", "signer.caLifetime: it must lie between 1m and");
        check("kubeletServing: {address: [10.0.0.0/8]}", "unknown field `address`");
        check("kubeletServing: {addresses: [10.0.0.0/33]}", "kubeletServing");
        check("kubeletServing: {addresses: []}", "kubeletServing.addresses: name at least one");
        check("kubeletServing: {dnsSuffixes: []}", "kubeletServing.dnsSuffixes: name at least one");
        check("kubeletServing: {dnsSuffixes: ['*.example.org']}", "is no DNS name such as");
        check("kubeletServing: {dnsSuffixes: ['.example.org']}", "is no DNS name such as");
        check("kubeletServing: yes, please", "true, false, or {addresses");
        check("approve: [csrd.dev/workload]", "it is the controller's own signer");
        for (never, why) in NEVER_APPROVED {
            check(&format!("approve: [{never}]"), why);
        }
    }
}
