//! What `allow.ipAddresses` holds: networks, and the pod's own addresses.

use std::net::IpAddr;

use ipnet::IpNet;

use super::fact::Callers;
use crate::{attest::Facts, x509::name::parse_ip};

/// The entry that stands for the pod's own addresses.
pub(super) const POD_IP: &str = "{kubernetes.podIP}";

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Addresses {
    Network(IpNet),
    /// Those that the kubelet has reported for the pod; with the host's network they are the node's.
    Pod,
}

impl Addresses {
    /// The error is a sentence for the policy's author.
    pub(super) fn parse(text: &str, callers: Callers) -> Result<Self, String> {
        match callers {
            Callers::Pods if text == POD_IP => Ok(Self::Pod),
            Callers::Pods if text.contains('{') => Err(format!("the one slot here is {POD_IP}")),
            Callers::Processes if text.contains('{') => Err("no {fact} slots here".to_owned()),
            _ => parse_network(text).map(Self::Network),
        }
    }

    pub(super) fn contain(&self, ip: &IpAddr, facts: &Facts) -> bool {
        match (self, facts) {
            (Self::Network(network), _) => network.contains(ip),
            (Self::Pod, Facts::Pod(pod)) => pod.ips.contains(ip),
            (Self::Pod, Facts::Process(_)) => false,
        }
    }

    /// As the caller may see it.
    pub(super) fn shown_to(&self, facts: &Facts) -> String {
        match (self, facts) {
            (Self::Pod, Facts::Pod(pod)) if !pod.ips.is_empty() => {
                pod.ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
            }
            (Self::Pod, _) => format!("{POD_IP} (grants nothing: the pod has no address yet)"),
            (Self::Network(network), _) => network.to_string(),
        }
    }
}

fn parse_network(text: &str) -> Result<IpNet, String> {
    let network = match text.contains('/') {
        true => text.parse().ok(),
        false => parse_ip(text).map(IpNet::from).ok(),
    };
    let network = network.ok_or("it must be a network such as 10.0.0.0/8 or an address")?;
    if network.addr() != network.network() {
        return Err(format!("it has host bits set; write {}", network.trunc()));
    }
    match network.addr() {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Err("write IPv4 addresses as IPv4".to_owned()),
        _ => Ok(network),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_written_as_networks() {
        for (text, expected) in [
            ("10.0.0.0/8", Ok("10.0.0.0/8")),
            ("10.0.0.1", Ok("10.0.0.1/32")),
            ("2001:db8::/32", Ok("2001:db8::/32")),
            ("0.0.0.0/0", Ok("0.0.0.0/0")),
            ("10.0.0.1/8", Err("it has host bits set; write 10.0.0.0/8")),
            ("::ffff:10.0.0.0/104", Err("write IPv4 addresses as IPv4")),
            ("10.0.0.0/33", Err("it must be a network such as 10.0.0.0/8 or an address")),
            ("10.0.0/8", Err("it must be a network such as 10.0.0.0/8 or an address")),
        ] {
            assert_eq!(
                parse_network(text).map(|network| network.to_string()).as_deref().map_err(String::as_str),
                expected
            );
        }
        assert!(parse_network("::ffff:10.0.0.1").is_err());
        assert!(parse_network("ten").is_err());
    }

    #[test]
    fn the_pods_own_addresses_are_an_entry_of_their_own() {
        let ips = |ips: &[&str]| {
            let ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
            Facts::Pod(crate::attest::PodFacts {
                namespace: String::new(),
                name: String::new(),
                uid: String::new(),
                service_account: String::new(),
                node: String::new(),
                labels: [].into(),
                namespace_labels: [].into(),
                ips,
                services: [].into(),
            })
        };
        let own = Addresses::parse(POD_IP, Callers::Pods).unwrap();
        let pod = ips(&["10.0.0.7", "fd00::7"]);
        for (ip, contained) in [("10.0.0.7", true), ("fd00::7", true), ("10.0.0.8", false)] {
            assert_eq!(own.contain(&ip.parse().unwrap(), &pod), contained, "{ip}");
        }
        assert_eq!(own.shown_to(&pod), "10.0.0.7, fd00::7");
        assert_eq!(own.shown_to(&ips(&[])), "{kubernetes.podIP} (grants nothing: the pod has no address yet)");
        assert!(!own.contain(&"10.0.0.7".parse().unwrap(), &ips(&[])));
        let other = Addresses::parse("{kubernetes.node}", Callers::Pods);
        assert_eq!(other.unwrap_err(), "the one slot here is {kubernetes.podIP}");
        assert_eq!(Addresses::parse(POD_IP, Callers::Processes).unwrap_err(), "no {fact} slots here");
    }
}
