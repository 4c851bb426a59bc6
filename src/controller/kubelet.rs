//! Serving certificates of kubelets, for clusters in which nobody else approves them: only with a switch of their own.
//!
//! Approved is what a node asks for itself: the requester is `system:node:X` of the group `system:nodes`, which is also
//! the subject, and every name is an address that Node X has. GHSA-x7j5-fww5-mqmv is what comes of less: whoever may make
//! a request gets the API server's own names. Addresses are what the kubelet, or the cloud's controller, wrote into the
//! Node's status, so a node that lies there could be given another's; names of Services are refused whatever it says.
//! Requests of anybody but a node are left alone.

use std::net::IpAddr;

use k8s_openapi::api::{certificates::v1::CertificateSigningRequestSpec, core::v1::NodeAddress};

use super::verdict::pkcs10;
use crate::x509::{Csr, CsrError, Names, Usage, Usages};

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

impl Kubelet {
    /// `None` if no node made the request.
    pub(super) fn read(spec: &CertificateSigningRequestSpec) -> Option<Self> {
        let node = spec.username.as_ref()?.strip_prefix(NODE)?;
        spec.groups.iter().flatten().find(|group| *group == NODES)?;
        let usages = spec.usages.iter().flatten().map(|name| Usage::from_name(name));
        Some(Self { node: node.to_owned(), usages: usages.collect(), pkcs10: pkcs10(spec.request.0.clone()) })
    }

    /// Judges by the addresses of the Node.
    pub(super) fn judge(&self, addresses: &[NodeAddress]) -> Result<(), Refusal> {
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
        match self.foreign(names, addresses) {
            Some(name) => Err(Refusal::Name { name, node: self.node.clone() }),
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
        let is_dns = |name: &String| {
            let service = name == "kubernetes" || name.ends_with(".svc") || name.contains(".svc.");
            service || !of(&["Hostname", "InternalDNS", "ExternalDNS"], &|address| address == name)
        };
        let ip = names.ips.iter().find(is_ip).map(ToString::to_string);
        let dns = || names.dns.iter().map(ToString::to_string).find(is_dns);
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
    #[error("{name:?} is no address of Node {node}, or is a Service's name")]
    Name { name: String, node: String },
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
            Self::Name { .. } => "NAME_NOT_ALLOWED",
            Self::NodeGone { .. } => "NODE_GONE",
            Self::Pkcs10(error) => error.reason(),
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;
    use rcgen::{CertificateParams, DistinguishedName, DnType, SanType};

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
            ("Other", "10.0.0.9"),
        ];
        let addresses = addresses.map(|(type_, address)| NodeAddress { type_: type_.into(), address: address.into() });
        Kubelet::read(&spec).map(|kubelet| kubelet.judge(&addresses))
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
            ip("10.0.0.2"),
            ip("10.0.0.9"),
            SanType::URI("spiffe://example.org/node".try_into().unwrap()),
        ] {
            refused("NAME_NOT_ALLOWED", |case| case.names.push(name.clone()));
        }
        refused("NO_NAME", |case| case.names.clear());
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
