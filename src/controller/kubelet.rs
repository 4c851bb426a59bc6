//! Serving certificates of kubelets, for clusters in which nobody else approves them: only with a switch of their own.
//!
//! Approved is what a node asks for itself: the requester is `system:node:X` of the group `system:nodes`, which is also
//! the subject, and every name is an address that Node X has and no other Node. GHSA-x7j5-fww5-mqmv is what comes of less:
//! whoever may make a request gets the API server's own names. Addresses are what the kubelet, or the cloud's controller,
//! wrote into the Node's status. So a node that lies there can have an address that is no Node's, and can keep another from
//! its certificate, which is seen in the log; it gets none for it. Wildcards and names of Services are refused whatever it
//! says. Requests of anybody but a node are left alone.

use std::{future::ready, net::IpAddr, sync::Arc};

use futures_util::StreamExt as _;
use k8s_openapi::api::{
    certificates::v1::CertificateSigningRequestSpec,
    core::v1::{Node, NodeAddress, NodeStatus},
};
use kube::{
    Api, Client,
    core::ObjectMeta,
    runtime::{
        WatchStreamExt as _,
        reflector::{self, Store},
        watcher::{self, watcher},
    },
};

use super::{requests::PAGE, verdict::pkcs10};
use crate::{
    kubernetes::WatchBackoff,
    x509::{Csr, CsrError, DnsName, Names, Usage, Usages},
};

/// The signer that every cluster has for them.
pub(super) const SIGNER: &str = "kubernetes.io/kubelet-serving";
/// Group of all nodes, and the one organization of their certificates.
const NODES: &str = "system:nodes";
/// What a node's user begins with.
const NODE: &str = "system:node:";
/// Usages of a serving certificate; key encipherment may be added for RSA keys.
const USAGES: Usages = Usages::empty().with(Usage::DigitalSignature).with(Usage::ServerAuth);

/// What a node asks for itself.
#[derive(Debug)]
pub(super) struct Kubelet {
    pub(super) node: String,
    usages: Option<Usages>,
    pkcs10: Result<Vec<u8>, CsrError>,
}

/// The addresses of all Nodes, and what follows them for as long as it is polled.
pub(super) fn follow(client: Client) -> (Store<Node>, impl Future<Output = ()>) {
    let (nodes, writer) = reflector::store();
    let config = watcher::Config::default().page_size(PAGE);
    let watched = watcher(Api::<Node>::all(client), config).backoff(WatchBackoff::default());
    let follow = watched.modify(keep_addresses).reflect(writer).for_each(|event| {
        if let Err(error) = event {
            tracing::warn!(error = &error as &dyn std::error::Error, "Nodes cannot be followed");
        }
        ready(())
    });
    (nodes, follow)
}

/// Most of a Node is something else.
fn keep_addresses(node: &mut Node) {
    let addresses = node.status.take().and_then(|status| status.addresses);
    *node = Node {
        metadata: ObjectMeta { name: node.metadata.name.take(), ..ObjectMeta::default() },
        status: Some(NodeStatus { addresses, ..NodeStatus::default() }),
        ..Node::default()
    };
}

/// What a Node's status says.
pub(super) fn addresses(node: &Node) -> &[NodeAddress] {
    node.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default()
}

impl Kubelet {
    /// `None` if no node made the request.
    pub(super) fn read(spec: &CertificateSigningRequestSpec) -> Option<Self> {
        let node = spec.username.as_ref()?.strip_prefix(NODE)?;
        spec.groups.iter().flatten().find(|group| *group == NODES)?;
        let usages = spec.usages.iter().flatten().map(|name| Usage::from_name(name));
        Some(Self { node: node.to_owned(), usages: usages.collect(), pkcs10: pkcs10(spec.request.0.clone()) })
    }

    /// Judges by the addresses of the Node, and of all others.
    pub(super) fn judge(&self, addresses: &[NodeAddress], all: &[Arc<Node>]) -> Result<(), Refusal> {
        let beside = self.usages.map(|usages| usages.minus(Usages::empty().with(Usage::KeyEncipherment)));
        if beside != Some(USAGES) {
            return Err(Refusal::Usages);
        }
        let csr = Csr::parse(self.pkcs10.as_ref().map_err(Clone::clone)?)?;
        let names = csr.names();
        if names.common_name.as_deref() != Some(&*format!("{NODE}{}", self.node)) || names.organizations != [NODES] {
            return Err(Refusal::Subject { node: self.node.clone() });
        }
        if names.san_count() == 0 {
            return Err(Refusal::NoName);
        }
        if let Some(name) = self.foreign(names, addresses) {
            return Err(Refusal::Name { name, node: self.node.clone() });
        }
        match self.shared(names, all) {
            Some((name, other)) => Err(Refusal::Shared { name, other }),
            None => Ok(()),
        }
    }

    /// The first name that is none of the node's.
    fn foreign(&self, names: &Names, addresses: &[NodeAddress]) -> Option<String> {
        let of = |types: &[&str], value: &dyn Fn(&str) -> bool| {
            addresses.iter().any(|it| types.contains(&it.type_.as_str()) && value(&it.address))
        };
        let is_ip = |ip: &&IpAddr| {
            !of(&["InternalIP", "ExternalIP", "Hostname"], &|address| address.parse::<IpAddr>().as_ref() == Ok(*ip))
        };
        let is_dns = |name: &&DnsName| {
            let text = name.as_str();
            let service = text == "kubernetes" || text.ends_with(".svc") || text.contains(".svc.");
            let known = of(&["Hostname", "InternalDNS", "ExternalDNS"], &|address| address == text);
            service || name.is_wildcard() || !known
        };
        let ip = names.ips.iter().find(is_ip).map(ToString::to_string);
        let dns = || names.dns.iter().find(is_dns).map(ToString::to_string);
        ip.or_else(dns).or_else(|| names.uris.first().cloned())
    }

    /// The first name that another Node has too, and that Node: one of them lies.
    fn shared(&self, names: &Names, all: &[Arc<Node>]) -> Option<(String, String)> {
        let (ips, dns) = (names.ips.iter().map(ToString::to_string), names.dns.iter().map(ToString::to_string));
        let asked: Vec<_> = ips.chain(dns).collect();
        for node in all.iter().filter(|node| node.metadata.name.as_ref() != Some(&self.node)) {
            for NodeAddress { address, .. } in addresses(node) {
                if let Some(name) = asked.iter().find(|name| is_same(name, address)) {
                    return Some((name.clone(), node.metadata.name.clone().unwrap_or_default()));
                }
            }
        }
        None
    }
}

/// Whether both mean one host, as whoever verifies a certificate compares them.
fn is_same(name: &str, address: &str) -> bool {
    match (name.parse::<IpAddr>(), address.parse::<IpAddr>()) {
        (Ok(name), Ok(address)) => name == address,
        _ => name.eq_ignore_ascii_case(address.trim_end_matches('.')),
    }
}

/// Why a kubelet's request is denied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("spec.usages must be digital signature and server auth, with key encipherment at most beside them")]
    Usages,
    #[error("the subject must be the requester: organization {NODES} alone and common name {NODE}{node}")]
    Subject { node: String },
    #[error("no DNS name and no IP address is asked for")]
    NoName,
    #[error("{name:?} is no address of Node {node}, or is a wildcard or a Service's name")]
    Name { name: String, node: String },
    #[error("{name:?} is an address of Node {other} too, and only one of the two can have it")]
    Shared { name: String, other: String },
    #[error("Node {node} is not there")]
    NodeGone { node: String },
    #[error("spec.request")]
    Pkcs10(#[from] CsrError),
}

impl Refusal {
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Usages => "USAGE_NOT_ALLOWED",
            Self::Subject { .. } => "SUBJECT_NOT_REQUESTER",
            Self::NoName => "NO_NAME",
            Self::Name { .. } | Self::Shared { .. } => "NAME_NOT_ALLOWED",
            Self::NodeGone { .. } => "NODE_GONE",
            Self::Pkcs10(error) => error.reason(),
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;
    use rcgen::{CertificateParams, DistinguishedName, DnType, SanType};
    use serde_json::json;

    use super::*;
    use crate::x509::{KeyAlgorithm, PrivateKey};

    /// What node n1 asks for; a row changes one thing.
    struct Case {
        user: &'static str,
        groups: Vec<String>,
        usages: Vec<&'static str>,
        subject: (&'static str, Vec<&'static str>),
        names: Vec<SanType>,
    }

    fn dns(name: &str) -> SanType {
        SanType::DnsName(name.try_into().unwrap())
    }

    fn ip(address: &str) -> SanType {
        SanType::IpAddress(address.parse().unwrap())
    }

    fn verdict(change: impl FnOnce(&mut Case)) -> Option<Result<(), Refusal>> {
        let mut case = Case {
            user: "system:node:n1",
            groups: vec![NODES.into(), "system:authenticated".into()],
            usages: vec!["digital signature", "server auth"],
            subject: ("system:node:n1", vec![NODES]),
            names: vec![dns("n1"), dns("n1.example.org"), ip("10.0.0.1"), ip("2001:db8::1")],
        };
        change(&mut case);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        case.subject.1.iter().for_each(|o| params.distinguished_name.push(DnType::OrganizationName, *o));
        params.distinguished_name.push(DnType::CommonName, case.subject.0);
        params.subject_alt_names = case.names;
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let spec = CertificateSigningRequestSpec {
            username: Some(case.user.into()),
            groups: Some(case.groups),
            usages: Some(case.usages.into_iter().map(Into::into).collect()),
            request: ByteString(params.serialize_request(&key).unwrap().pem().unwrap().into_bytes()),
            ..CertificateSigningRequestSpec::default()
        };
        let addresses = [
            ("Hostname", "n1"),
            ("InternalDNS", "n1.example.org"),
            ("InternalIP", "10.0.0.1"),
            ("ExternalIP", "2001:db8::1"),
            // As a node that lies would write it.
            ("InternalDNS", "kubernetes.default.svc"),
            ("InternalDNS", "*.example.org"),
            ("InternalDNS", "n2.example.org"),
            ("InternalIP", "10.0.0.2"),
            ("ExternalIP", "2001:db8::2"),
            ("Other", "10.0.0.9"),
        ];
        let own = node("n1", &addresses);
        let other =
            node("n2", &[("Hostname", "N2.example.org."), ("InternalIP", "10.0.0.2"), ("Other", "2001:DB8:0::2")]);
        Kubelet::read(&spec).map(|kubelet| kubelet.judge(super::addresses(&own), &[own.clone(), other]))
    }

    fn node(name: &str, addresses: &[(&str, &str)]) -> Arc<Node> {
        let addresses = addresses.iter().map(|(type_, address)| json!({"type": type_, "address": address}));
        let status = json!({"addresses": addresses.collect::<Vec<_>>()});
        let node =
            json!({"metadata": {"name": name, "uid": "u"}, "spec": {"podCIDR": "10.1.0.0/24"}, "status": status});
        let mut node = serde_json::from_value(node).unwrap();
        keep_addresses(&mut node);
        Arc::new(node)
    }

    #[track_caller]
    fn refused(reason: &str, change: impl FnOnce(&mut Case)) {
        let refusal = verdict(change).expect("a node made it").unwrap_err();
        assert_eq!(refusal.reason(), reason, "{refusal}");
    }

    #[test]
    fn what_a_node_asks_for_its_own_addresses_is_approved() {
        assert_eq!(verdict(|_| ()), Some(Ok(())));
        assert_eq!(verdict(|case| case.usages.push("key encipherment")), Some(Ok(())));
        assert_eq!(verdict(|case| case.names.truncate(1)), Some(Ok(())));
    }

    #[test]
    fn whoever_is_no_node_is_left_alone() {
        assert_eq!(verdict(|case| case.user = "n1"), None);
        assert_eq!(verdict(|case| case.user = "system:serviceaccount:kube-system:node"), None);
        assert_eq!(verdict(|case| case.groups = vec!["system:authenticated".into()]), None);
    }

    #[test]
    fn the_subject_is_the_requester() {
        refused("SUBJECT_NOT_REQUESTER", |case| case.subject.0 = "system:node:n2");
        refused("SUBJECT_NOT_REQUESTER", |case| case.user = "system:node:n2");
        refused("SUBJECT_NOT_REQUESTER", |case| case.subject.1 = vec!["system:masters"]);
        refused("SUBJECT_NOT_REQUESTER", |case| case.subject.1.push("system:masters"));
        refused("SUBJECT_NOT_REQUESTER", |case| case.subject.1.clear());
    }

    #[test]
    fn names_are_the_nodes_own_and_no_services() {
        for name in [
            dns("n2"),
            dns("*.example.org"),
            dns("kubernetes"),
            dns("kubernetes.default.svc"),
            dns("web.production.svc.cluster.local"),
            ip("10.0.0.3"),
            ip("10.0.0.9"),
            SanType::URI("spiffe://example.org/node".try_into().unwrap()),
        ] {
            refused("NAME_NOT_ALLOWED", |case| case.names.push(name.clone()));
        }
        refused("NO_NAME", |case| case.names.clear());
    }

    #[test]
    fn a_name_that_another_node_has_too_is_neithers() {
        for name in [dns("n2.example.org"), ip("10.0.0.2"), ip("2001:db8::2")] {
            let refusal = verdict(|case| case.names.push(name.clone())).unwrap().unwrap_err();
            assert!(matches!(&refusal, Refusal::Shared { other, .. } if other == "n2"), "{name:?}: {refusal}");
            assert_eq!(refusal.reason(), "NAME_NOT_ALLOWED");
        }
    }

    #[test]
    fn usages_are_those_of_a_server_and_no_others() {
        for usages in [
            &[][..],
            &["server auth"],
            &["digital signature"],
            &["digital signature", "server auth", "client auth"],
            &["digital signature", "server auth", "cert sign"],
        ] {
            refused("USAGE_NOT_ALLOWED", |case| case.usages = usages.to_vec());
        }
    }
}
