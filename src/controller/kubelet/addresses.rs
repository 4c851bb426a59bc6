//! Whose addresses are whose: those that Nodes have, and those that are no Node's, whatever its status says.
//!
//! A kubelet writes its Node's status, so what stands there alone proves nothing. No Node has the ClusterIP of a Service, an
//! address in a range of Services, one that the API server is reached at, or one that means no single host; and none has a
//! name by which Services, pods or the API server are called. Until all of that is known, and while a watch of it may be
//! behind, nothing is judged. Not here: what may be asked for, and by whom.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use ipnet::IpNet;
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
    networking::v1::ServiceCIDR,
};
use kube::{Api, Client, runtime::watcher};

use super::{Kubelet, Refusal, addresses};
use crate::kubernetes::{
    Lag, MAX_NODE_BYTES, MAX_SERVICE_BYTES, MAX_SLICE_BYTES, WatchBackoff, is_beyond, page, report,
    watch::{Change, Told, follow},
};

/// Services, and Nodes, whose addresses are known: the ClusterIPs of a range of 16 bits.
pub const MAX_NAMED_SERVICES: usize = 65_536;
/// Namespace and label of the API server's own endpoints.
const API_SERVER: (&str, &str) = ("default", "kubernetes.io/service-name=kubernetes");

/// What certificates of kubelets are held to, beside what Nodes have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KubeletServing {
    /// Ranges that all IP addresses must be in; any if there are none.
    pub addresses: Option<Vec<IpNet>>,
    /// Domains that all DNS names must be in, but for the Node's own name; any if there are none.
    pub dns_suffixes: Option<Vec<String>>,
}

/// Addresses as they are known now; clones share them.
#[derive(Clone, Default)]
pub(in crate::controller) struct Addresses(Arc<Shared>);

#[derive(Default)]
struct Shared {
    known: Mutex<Known>,
    lag: Lag,
}

/// What is known of addresses.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The addresses of each Node.
    pub(super) nodes: Index<Vec<String>>,
    /// The ClusterIPs of each Service, by `name.namespace`; `None` of one with more than is read.
    pub(super) services: Index<Option<Vec<IpAddr>>>,
    /// The ranges that ClusterIPs come from.
    pub(super) ranges: Index<Vec<IpNet>>,
    /// The API server's endpoints.
    pub(super) endpoints: Index<Vec<IpAddr>>,
    /// Where the API server is by configuration, in lower case.
    pub(super) api_hosts: Vec<String>,
    pub(super) serving: KubeletServing,
}

/// Objects of one kind by name.
#[derive(Debug)]
pub(super) struct Index<T> {
    by_name: HashMap<String, T>,
    told: Told,
    /// Whether there are more than [`MAX_NAMED_SERVICES`].
    overflowed: bool,
    not_served: bool,
}

/// The addresses, and what follows them for as long as it is polled.
pub(in crate::controller) fn follow_all(
    client: Client,
    serving: KubeletServing,
    api_hosts: &[String],
) -> (Addresses, impl Future<Output = ()>) {
    let api_hosts = api_hosts.iter().map(|host| host.trim_end_matches('.').to_ascii_lowercase()).collect();
    let known = Known { api_hosts, serving, ..Known::default() };
    let all = Addresses(Arc::new(Shared { known: Mutex::new(known), lag: Lag::default() }));
    let following = all.clone();
    let paged = |max_bytes| watcher::Config::default().page_size(page(max_bytes));
    let run = async move {
        let (lag, known) = (&following.0.lag, || following.lock());
        let (all_nodes, all_services) = (Api::<Node>::all(client.clone()), Api::<Service>::all(client.clone()));
        let nodes = follow(all_nodes, paged(MAX_NODE_BYTES), lag.backoff(), read_node, |it| known().nodes.apply(it));
        let services = follow(all_services, paged(MAX_SERVICE_BYTES), lag.backoff(), read_service, |it| {
            known().services.apply(it);
        });
        let slices = Api::<EndpointSlice>::namespaced(client.clone(), API_SERVER.0);
        let slices = follow(slices, paged(MAX_SLICE_BYTES).labels(API_SERVER.1), lag.backoff(), read_slice, |it| {
            known().endpoints.apply(it);
        });
        // Where they are not served, each try fails, and nothing is behind for that.
        let (ranges, backoff) = (Api::<ServiceCIDR>::all(client), WatchBackoff::default());
        let ranges = follow(ranges, watcher::Config::default(), backoff, read_range, |it| known().ranges.apply(it));
        tokio::join!(nodes, services, slices, ranges);
    };
    (all, run)
}

impl Addresses {
    /// Judges what a kubelet asks for by what its Node's status has in it.
    ///
    /// # Errors
    /// What is not known yet, for which the request is to wait.
    pub(in crate::controller) fn judge(&self, kubelet: &Kubelet, own: &Node) -> Result<Result<(), Refusal>, String> {
        let known = self.lock();
        known.ready()?;
        match self.0.lag.is_over() {
            true => Ok(kubelet.judge(addresses(own), &known)),
            false => Err("a watch has failed, and has not had the time to catch up".to_owned()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().expect("no code panics while it holds the addresses")
    }
}

impl Known {
    fn ready(&self) -> Result<(), String> {
        self.nodes.told.ready("nodes")?;
        self.services.told.ready("services")?;
        self.endpoints.told.ready("endpointslices")?;
        if !self.ranges.not_served {
            self.ranges.told.ready("servicecidrs")?;
        }
        if self.nodes.overflowed {
            return Err(format!("there are more than {MAX_NAMED_SERVICES} nodes"));
        }
        let ranges = self.ranges.by_name.values().any(|ranges| !ranges.is_empty());
        match self.unread_service() {
            Some(which) if !ranges && self.serving.addresses.is_none() => Err(format!(
                "the ClusterIP of {which} is not known, and the API server tells no ServiceCIDR: \
                 list kubeletServing.addresses in the controller's configuration"
            )),
            _ => Ok(()),
        }
    }

    fn unread_service(&self) -> Option<String> {
        if self.services.overflowed {
            return Some(format!("some of more than {MAX_NAMED_SERVICES} Services"));
        }
        let unread = self.services.by_name.iter().find(|(_, addresses)| addresses.is_none());
        unread.map(|(name, _)| format!("Service {name:?}"))
    }

    /// Why no Node has that address, if none has.
    pub(super) fn is_no_nodes_address(&self, ip: IpAddr) -> Option<String> {
        let ip = ip.to_canonical();
        if means_no_host(ip) {
            return Some("it means no single host".to_owned());
        }
        if let Some(range) = self.ranges.by_name.values().flatten().find(|range| range.contains(&ip)) {
            return Some(format!("it is in {range}, a range of Services"));
        }
        let is_it = |addresses: &Vec<IpAddr>| addresses.contains(&ip);
        let mut services = self.services.by_name.iter();
        if let Some((service, _)) = services.find(|(_, addresses)| addresses.as_ref().is_some_and(is_it)) {
            return Some(format!("it is the ClusterIP of Service {service}"));
        }
        let is_host = |host: &String| host.parse::<IpAddr>().is_ok_and(|host| host.to_canonical() == ip);
        let api_server = self.endpoints.by_name.values().any(is_it) || self.api_hosts.iter().any(is_host);
        api_server.then(|| "the API server is there".to_owned())
    }

    /// Why no Node has that name, if none has.
    pub(super) fn is_no_nodes_name(&self, name: &str) -> Option<String> {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        let in_cluster = matches!(name.as_str(), "kubernetes" | "kubernetes.default" | "localhost")
            || name.split('.').any(|label| label == "svc")
            || [".localhost", ".pod.cluster.local"].iter().any(|end| name.ends_with(end));
        if in_cluster {
            return Some("Services, pods or every host are called so".to_owned());
        }
        if self.services.by_name.contains_key(&name) {
            return Some("a Service is called so".to_owned());
        }
        self.api_hosts.contains(&name).then(|| "the API server is called so".to_owned())
    }

    /// Whether the operator lets Nodes have that address.
    pub(super) fn lists_address(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.serving.addresses.as_ref().is_none_or(|ranges| ranges.iter().any(|range| range.contains(&ip)))
    }

    /// Whether the operator lets the Node `node` have that name.
    pub(super) fn lists_name(&self, name: &str, node: &str) -> bool {
        let within =
            |suffix: &String| name.strip_suffix(suffix.as_str()).is_some_and(|it| it.is_empty() || it.ends_with('.'));
        name == node || self.serving.dns_suffixes.as_ref().is_none_or(|suffixes| suffixes.iter().any(within))
    }

    /// The first of these names that another Node than `node` has too, and that Node.
    pub(super) fn shared(&self, asked: &[String], node: &str) -> Option<(String, String)> {
        let others = self.nodes.by_name.iter().filter(|(name, _)| *name != node);
        let mut theirs = others.flat_map(|(name, addresses)| addresses.iter().map(move |address| (name, address)));
        theirs.find_map(|(other, address)| {
            let name = asked.iter().find(|name| is_same(name, address))?;
            Some((name.clone(), other.clone()))
        })
    }
}

fn means_no_host(ip: IpAddr) -> bool {
    ip.is_unspecified()
        || ip.is_loopback()
        || ip.is_multicast()
        || match ip {
            IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        }
}

/// Whether both mean one host, as whoever verifies a certificate compares them.
fn is_same(name: &str, address: &str) -> bool {
    match (name.parse::<IpAddr>(), address.parse::<IpAddr>()) {
        (Ok(name), Ok(address)) => name.to_canonical() == address.to_canonical(),
        _ => name.eq_ignore_ascii_case(address.trim_end_matches('.')),
    }
}

impl<T> Index<T> {
    pub(super) fn apply(&mut self, change: Change<(String, T)>) {
        self.told.heard(&change);
        match change {
            Change::Put((name, it)) => self.put(name, it),
            Change::Gone((name, _)) => drop(self.by_name.remove(&name)),
            Change::All(all) => {
                self.by_name.clear();
                (self.overflowed, self.not_served) = (false, false);
                all.into_iter().for_each(|(name, it)| self.put(name, it));
            }
            Change::Silent(_) => {}
            Change::NotServed(_) => self.not_served = true,
        }
    }

    fn put(&mut self, name: String, it: T) {
        if self.by_name.len() < MAX_NAMED_SERVICES || self.by_name.contains_key(&name) {
            self.by_name.insert(name, it);
        } else {
            self.overflowed = true;
            report("addresses", "", &name, &format!("at most {MAX_NAMED_SERVICES} of a kind are known"));
        }
    }
}

impl<T> Default for Index<T> {
    fn default() -> Self {
        Self { by_name: HashMap::new(), told: Told::default(), overflowed: false, not_served: false }
    }
}

fn read_node(node: Node) -> (String, Vec<String>) {
    let its = addresses(&node).iter().map(|it| it.address.clone()).collect();
    (node.metadata.name.unwrap_or_default(), its)
}

/// A Service's name as its namespace's neighbours call it, and its ClusterIPs if they are read.
fn read_service(service: Service) -> (String, Option<Vec<IpAddr>>) {
    let metadata = service.metadata;
    let beyond = is_beyond(&metadata);
    let spec = service.spec.unwrap_or_default();
    let ips = spec.cluster_ips.into_iter().flatten().filter_map(|ip| ip.parse().ok()).collect();
    let name = format!("{}.{}", metadata.name.unwrap_or_default(), metadata.namespace.unwrap_or_default());
    (name, (!beyond).then_some(ips))
}

fn read_slice(slice: EndpointSlice) -> (String, Vec<IpAddr>) {
    let addresses = slice.endpoints.into_iter().flatten().flat_map(|endpoint| endpoint.addresses);
    let ips = addresses.filter_map(|ip| Some(ip.parse::<IpAddr>().ok()?.to_canonical())).collect();
    (slice.metadata.name.unwrap_or_default(), ips)
}

fn read_range(range: ServiceCIDR) -> (String, Vec<IpNet>) {
    let ranges = range.spec.and_then(|spec| spec.cidrs).unwrap_or_default();
    (range.metadata.name.unwrap_or_default(), ranges.iter().filter_map(|range| range.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kubernetes::{MAX_SELECTOR_LABELS, excerpt};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// All is listed, and there is nothing.
    fn nothing() -> Known {
        let mut known = Known::default();
        known.nodes.apply(Change::All(Vec::new()));
        known.services.apply(Change::All(Vec::new()));
        known.ranges.apply(Change::All(Vec::new()));
        known.endpoints.apply(Change::All(Vec::new()));
        known
    }

    fn service(selector_labels: usize) -> (String, Option<Vec<IpAddr>>) {
        let selector: serde_json::Map<_, _> = (0..selector_labels).map(|n| (format!("l{n}"), json!(""))).collect();
        let service = json!({"metadata": {"namespace": "shop", "name": "web"},
            "spec": {"selector": selector, "clusterIPs": ["10.96.0.7", "fd00::7"]}});
        read_service(serde_json::from_value(excerpt("/api/v1/services/web", &service)).unwrap())
    }

    #[test]
    fn nothing_is_judged_before_all_is_listed() {
        let mut known = Known::default();
        let missing = |known: &Known| known.ready().unwrap_err();
        assert_eq!(missing(&known), "nodes have not been listed yet");
        known.nodes.apply(Change::All(Vec::new()));
        assert_eq!(missing(&known), "services have not been listed yet");
        known.services.apply(Change::All(Vec::new()));
        assert_eq!(missing(&known), "endpointslices have not been listed yet");
        known.endpoints.apply(Change::All(Vec::new()));
        assert_eq!(missing(&known), "servicecidrs have not been listed yet");
        known.ranges.apply(Change::Silent("forbidden".to_owned()));
        assert_eq!(missing(&known), "servicecidrs cannot be listed: forbidden");
        known.ranges.apply(Change::NotServed("the server could not find it".to_owned()));
        assert_eq!(known.ready(), Ok(()), "Kubernetes 1.32 has none");
        known.ranges.apply(Change::All(Vec::new()));
        assert_eq!(known.ready(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn while_a_watch_may_be_behind_a_request_waits() {
        let all = Addresses(Arc::new(Shared { known: Mutex::new(nothing()), lag: Lag::default() }));
        let spec = serde_json::from_value(json!({"request": "", "signerName": "", "username": "system:node:n1",
            "groups": ["system:nodes"]}));
        let kubelet = Kubelet::read(&spec.unwrap()).unwrap();
        let own = Node::default();
        assert_eq!(all.judge(&kubelet, &own), Ok(Err(Refusal::Usages)));
        let wait = all.0.lag.backoff().next().unwrap();
        assert!(all.judge(&kubelet, &own).unwrap_err().contains("a watch has failed"));
        tokio::time::advance(wait + crate::kubernetes::ANSWER_WITHIN).await;
        assert!(all.judge(&kubelet, &own).is_ok());
    }

    #[test]
    fn where_a_cluster_ip_may_be_that_is_not_known_a_request_waits_unless_ranges_are() {
        let mut known = nothing();
        known.services.apply(Change::Put(service(MAX_SELECTOR_LABELS)));
        assert_eq!(known.ready(), Ok(()));
        known.services.apply(Change::Put(service(MAX_SELECTOR_LABELS + 1)));
        assert!(known.ready().unwrap_err().contains("the ClusterIP of Service \"web.shop\" is not known"));
        known.ranges.apply(Change::Put(("kubernetes".to_owned(), vec!["10.96.0.0/16".parse().unwrap()])));
        assert_eq!(known.ready(), Ok(()));
        known.ranges.apply(Change::All(Vec::new()));
        known.serving.addresses = Some(vec!["192.0.2.0/24".parse().unwrap()]);
        assert_eq!(known.ready(), Ok(()));
    }

    #[test]
    fn so_many_services_are_known_and_with_one_more_it_is_known_that_not_all_are() {
        let mut known = nothing();
        let all = |many: usize| (0..many).map(|n| (n.to_string(), Some(Vec::new()))).collect();
        known.services.apply(Change::All(all(MAX_NAMED_SERVICES)));
        assert_eq!(known.ready(), Ok(()));
        known.services.apply(Change::Put(("0".to_owned(), Some(Vec::new()))));
        assert_eq!(known.ready(), Ok(()), "it is no new one");
        known.services.apply(Change::Put(service(1)));
        assert!(known.ready().unwrap_err().contains("some of more than 65536 Services"));
        known.services.apply(Change::All(all(MAX_NAMED_SERVICES)));
        assert_eq!(known.ready(), Ok(()));
    }

    #[test]
    fn an_address_that_means_no_host_or_is_a_services_or_the_api_servers_is_no_nodes() {
        let mut known = nothing();
        known.services.apply(Change::Put(service(1)));
        known.ranges.apply(Change::Put(("kubernetes".to_owned(), vec!["10.97.0.0/16".parse().unwrap()])));
        let slice = json!({"metadata": {"name": "kubernetes"}, "addressType": "IPv4", "endpoints": [{"addresses": ["192.0.2.1"]}]});
        let path = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes";
        known.endpoints.apply(Change::Put(read_slice(serde_json::from_value(excerpt(path, &slice)).unwrap())));
        known.api_hosts = vec!["192.0.2.9".to_owned(), "2001:db8::9".to_owned(), "api.example.org".to_owned()];
        for (address, why) in [
            ("0.0.0.0", "it means no single host"),
            ("127.1.2.3", "it means no single host"),
            ("169.254.169.254", "it means no single host"),
            ("224.0.0.1", "it means no single host"),
            ("255.255.255.255", "it means no single host"),
            ("::", "it means no single host"),
            ("::1", "it means no single host"),
            ("::ffff:127.0.0.1", "it means no single host"),
            ("fe80::1", "it means no single host"),
            ("ff02::1", "it means no single host"),
            ("10.97.255.255", "it is in 10.97.0.0/16, a range of Services"),
            ("::ffff:10.97.0.1", "it is in 10.97.0.0/16, a range of Services"),
            ("10.96.0.7", "it is the ClusterIP of Service web.shop"),
            ("fd00::7", "it is the ClusterIP of Service web.shop"),
            ("192.0.2.1", "the API server is there"),
            ("192.0.2.9", "the API server is there"),
            ("2001:db8::9", "the API server is there"),
        ] {
            assert_eq!(known.is_no_nodes_address(ip(address)).as_deref(), Some(why), "{address}");
        }
        for address in ["10.96.0.8", "10.98.0.1", "192.0.2.2", "2001:db8::1", "fd00::8"] {
            assert_eq!(known.is_no_nodes_address(ip(address)), None, "{address}");
        }
    }

    #[test]
    fn a_name_that_services_pods_or_the_api_server_are_called_by_is_no_nodes() {
        let mut known = nothing();
        known.services.apply(Change::Put(service(1)));
        known.api_hosts = vec!["api.example.org".to_owned()];
        for name in [
            "kubernetes",
            "Kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
            "web.shop.svc.example.org",
            "svc",
            "localhost",
            "a.localhost",
            "10-0-0-1.shop.pod.cluster.local",
            "web.shop",
            "api.example.org",
            "API.example.org.",
        ] {
            assert!(known.is_no_nodes_name(name).is_some(), "{name}");
        }
        for name in
            ["n1", "n1.example.org", "svc1.example.org", "web.bank", "kubernetes.example.org", "pod.example.org"]
        {
            assert_eq!(known.is_no_nodes_name(name), None, "{name}");
        }
    }

    #[test]
    fn what_the_operator_lists_is_all_that_nodes_have_but_for_their_own_names() {
        let mut known = nothing();
        assert!(known.lists_address(ip("203.0.113.1")) && known.lists_name("any.example.com", "n1"));
        known.serving = KubeletServing {
            addresses: Some(vec!["10.0.0.0/8".parse().unwrap(), "2001:db8::/32".parse().unwrap()]),
            dns_suffixes: Some(vec!["nodes.example.org".to_owned()]),
        };
        let addresses = ["10.1.2.3", "2001:db8::1", "::ffff:10.1.2.3", "11.0.0.1", "2001:db9::1"];
        assert_eq!(addresses.map(|it| known.lists_address(ip(it))), [true, true, true, false, false]);
        let names = ["n1.nodes.example.org", "n1", "nodes.example.org", "n2", "evilnodes.example.org", "example.org"];
        assert_eq!(names.map(|it| known.lists_name(it, "n1")), [true, true, true, false, false, false]);
    }
}
