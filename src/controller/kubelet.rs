//! Serving certificates of kubelets, for clusters in which nobody else approves them: only with a switch of their own.
//!
//! Approved is what a node asks for itself: the requester is `system:node:X` of the group `system:nodes`, which is also
//! the subject, and every name is an address that Node X has and no other Node. GHSA-x7j5-fww5-mqmv is what comes of less:
//! whoever may make a request gets the API server's own names. Addresses are what the kubelet, or the cloud's controller,
//! wrote into the Node's status. What is no Node's whatever it says, as the addresses of Services and of the API server,
//! `addresses` knows, and what the operator lists. So a node that lies there can have an address outside of the cluster
//! that nobody has listed against, and can keep another from its certificate, which is seen in the log; it gets none for it.
//! Requests of anybody but a node are left alone.

mod addresses;

use std::net::IpAddr;

use k8s_openapi::api::{
    certificates::v1::CertificateSigningRequestSpec,
    core::v1::{Node, NodeAddress},
};

use self::addresses::Known;
pub(super) use self::addresses::{Addresses, follow_all};
pub use self::addresses::{KubeletServing, MAX_NAMED_SERVICES};
use super::verdict::pkcs10;
use crate::x509::{Csr, CsrError, DnsName, Names, Usage, Usages};

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

    /// Judges by the addresses of the Node, and by what is known of all others.
    fn judge(&self, addresses: &[NodeAddress], known: &Known) -> Result<(), Refusal> {
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
        self.check_reserved(names, known)?;
        if let Some(name) = self.foreign(names, addresses) {
            return Err(Refusal::Name { name, node: self.node.clone() });
        }
        let (ips, dns) = (names.ips.iter().map(ToString::to_string), names.dns.iter().map(ToString::to_string));
        let asked: Vec<_> = ips.chain(dns).collect();
        if let Some((name, other)) = known.shared(&asked, &self.node) {
            return Err(Refusal::Shared { name, other });
        }
        self.check_listed(names, known)
    }

    /// None may be one that no Node has, whatever the Node's status says.
    fn check_reserved(&self, names: &Names, known: &Known) -> Result<(), Refusal> {
        let ip = |ip: &IpAddr| Some((ip.to_string(), known.is_no_nodes_address(*ip)?));
        let dns = |name: &DnsName| Some((name.to_string(), known.is_no_nodes_name(name.as_str())?));
        match names.ips.iter().find_map(ip).or_else(|| names.dns.iter().find_map(dns)) {
            Some((name, why)) => Err(Refusal::Reserved { name, why }),
            None => Ok(()),
        }
    }

    /// All must be such as the operator lists.
    fn check_listed(&self, names: &Names, known: &Known) -> Result<(), Refusal> {
        let ip = names.ips.iter().find(|ip| !known.lists_address(**ip)).map(ToString::to_string);
        let dns =
            || names.dns.iter().find(|name| !known.lists_name(name.as_str(), &self.node)).map(ToString::to_string);
        match ip.or_else(dns) {
            Some(name) => Err(Refusal::NotListed { name }),
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
            let known = of(&["Hostname", "InternalDNS", "ExternalDNS"], &|address| address == name.as_str());
            name.is_wildcard() || !known
        };
        let ip = names.ips.iter().find(is_ip).map(ToString::to_string);
        let dns = || names.dns.iter().find(is_dns).map(ToString::to_string);
        ip.or_else(dns).or_else(|| names.uris.first().cloned())
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
    #[error("{name:?} is no Node's: {why}")]
    Reserved { name: String, why: String },
    #[error("{name:?} is in no range and no domain that kubeletServing lists in the controller's configuration")]
    NotListed { name: String },
    #[error("{name:?} is no address of Node {node}, or is a wildcard")]
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
            Self::Reserved { .. } | Self::Name { .. } | Self::Shared { .. } | Self::NotListed { .. } => {
                "NAME_NOT_ALLOWED"
            }
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
    use crate::{
        kubernetes::{excerpt, watch::Change},
        x509::{KeyAlgorithm, PrivateKey},
    };

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
        verdict_with(KubeletServing::default(), change)
    }

    fn verdict_with(serving: KubeletServing, change: impl FnOnce(&mut Case)) -> Option<Result<(), Refusal>> {
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
            ("InternalDNS", "api.example.org"),
            ("InternalIP", "10.96.0.1"),
            ("InternalIP", "127.0.0.1"),
            ("InternalDNS", "*.example.org"),
            ("InternalDNS", "n2.example.org"),
            ("InternalIP", "10.0.0.2"),
            ("ExternalIP", "2001:db8::2"),
            ("Other", "10.0.0.9"),
        ];
        let own = node("n1", &addresses);
        let mut known = Known { serving, api_hosts: vec!["api.example.org".into()], ..Known::default() };
        let all = |node: &Node| super::addresses(node).iter().map(|it| it.address.clone()).collect();
        known.nodes.apply(Change::Put(("n1".into(), all(&own))));
        let others = ["N2.example.org.", "10.0.0.2", "2001:DB8:0::2"].map(Into::into);
        known.nodes.apply(Change::Put(("n2".into(), others.into())));
        known.ranges.apply(Change::Put(("kubernetes".into(), vec!["10.96.0.0/16".parse().unwrap()])));
        Kubelet::read(&spec).map(|kubelet| kubelet.judge(super::addresses(&own), &known))
    }

    fn node(name: &str, addresses: &[(&str, &str)]) -> Node {
        let addresses = addresses.iter().map(|(type_, address)| json!({"type": type_, "address": address}));
        let status = json!({"addresses": addresses.collect::<Vec<_>>()});
        let node =
            json!({"metadata": {"name": name, "uid": "u"}, "spec": {"podCIDR": "10.1.0.0/24"}, "status": status});
        serde_json::from_value(excerpt("/api/v1/nodes/n", &node)).unwrap()
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
    fn what_is_no_nodes_is_refused_whatever_the_nodes_status_says() {
        for name in [dns("kubernetes.default.svc"), dns("api.example.org"), ip("10.96.0.1"), ip("127.0.0.1")] {
            let refusal = verdict(|case| case.names.push(name.clone())).unwrap().unwrap_err();
            assert!(matches!(refusal, Refusal::Reserved { .. }), "{name:?}: {refusal}");
            assert_eq!(refusal.reason(), "NAME_NOT_ALLOWED");
        }
    }

    #[test]
    fn where_the_operator_lists_what_nodes_have_another_name_is_refused() {
        let listed = |ranges: &[&str], suffix: &str| KubeletServing {
            addresses: Some(ranges.iter().map(|it| it.parse().unwrap()).collect()),
            dns_suffixes: Some(vec![suffix.into()]),
        };
        let both = ["10.0.0.0/8", "2001:db8::/32"];
        assert_eq!(verdict_with(listed(&both, "example.org"), |_| ()), Some(Ok(())));
        for serving in [listed(&both[..1], "example.org"), listed(&both, "example.com")] {
            let refusal = verdict_with(serving, |_| ()).unwrap().unwrap_err();
            assert!(matches!(refusal, Refusal::NotListed { .. }), "{refusal}");
        }
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
