//! Requests and what is said of them; those that are forged are in `forged`.

mod forged;

use std::{net::IpAddr, time::Duration};

use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequestCondition, CertificateSigningRequestStatus},
};
use rcgen::{BasicConstraints, CertificateParams, CustomExtension, DnType, IsCa, SanType};

use super::*;
use crate::{
    kubernetes::{MAX_REQUEST_BYTES, excerpt},
    policy::Source,
    x509::{KeyAlgorithm, PrivateKey},
};

const OWN: &str = "csrd.dev/workload";
const API_CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client";
const KUBELET_SERVING: &str = "kubernetes.io/kubelet-serving";
const SPIFFE_ID: &str = "spiffe://example.org/ns/production/sa/web";

/// What the API server has: the request and the two pods. A row changes one thing and leaves the rest good.
struct Case {
    object: CertificateSigningRequest,
    agent: PodFacts,
    pod: PodFacts,
    approves: &'static [&'static str],
}

fn policies() -> PolicySet {
    let text = "
apiVersion: csrd.dev/v1alpha1
kind: CertificatePolicy
metadata: {name: web}
spec:
  match: {kubernetes: {namespaces: [production]}}
  allow:
    uris: ['spiffe://example.org/ns/{kubernetes.namespace}/sa/{kubernetes.serviceAccount}']
    dnsNames: ['{kubernetes.serviceAccount}.production.svc']
    ipAddresses: ['{kubernetes.podIP}']
    lifetime: {min: 10m, default: 1h, max: 24h}
---
apiVersion: csrd.dev/v1alpha1
kind: CertificatePolicy
metadata: {name: people}
spec:
  match: {kubernetes: {namespaces: [people]}}
  signer: kubernetes.io/kube-apiserver-client
  allow:
    commonNames: [developer]
    organizations: [dev-team]
    usages: [digital signature, client auth]
";
    let source = Source { origin: "test".into(), text: text.into() };
    PolicySet::parse(&[source], OWN).unwrap_or_else(|problems| panic!("{problems:?}"))
}

fn pod(namespace: &str, name: &str, uid: &str, service_account: &str) -> PodFacts {
    PodFacts {
        namespace: namespace.into(),
        name: name.into(),
        uid: uid.into(),
        service_account: service_account.into(),
        node: "n1".into(),
        labels: BTreeMap::new(),
        namespace_labels: BTreeMap::new(),
        ips: vec!["10.1.0.7".parse().unwrap()],
        services: BTreeSet::new(),
    }
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

fn map(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
    entries.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
}

fn uri(uri: &str) -> SanType {
    SanType::URI(uri.try_into().unwrap())
}

fn dns(name: &str) -> SanType {
    SanType::DnsName(name.try_into().unwrap())
}

/// A PKCS#10 request of a P-256 key with these names, changed in one way.
fn pkcs10(names: Vec<SanType>, change: impl FnOnce(&mut CertificateParams)) -> ByteString {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = names;
    change(&mut params);
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    ByteString(params.serialize_request(&key).unwrap().pem().unwrap().into_bytes())
}

impl Case {
    fn good() -> Self {
        let mut object = CertificateSigningRequest::default();
        object.metadata.name = Some("csrd-0".into());
        object.metadata.uid = Some("csr-uid".into());
        object.metadata.resource_version = Some("7".into());
        object.metadata.labels = Some(map(&[(label::MANAGED_BY, label::MANAGER)]));
        object.metadata.annotations = Some(map(&[
            (annotation::POD_NAMESPACE, "production"),
            (annotation::POD_NAME, "web-0"),
            (annotation::POD_UID, "pod-uid"),
            (annotation::SERVICE_ACCOUNT, "web"),
            (annotation::NODE, "n1"),
        ]));
        object.spec = CertificateSigningRequestSpec {
            signer_name: OWN.into(),
            username: Some("system:serviceaccount:csrd-system:csrd-agent".into()),
            groups: Some(strings(&[
                "system:serviceaccounts",
                "system:serviceaccounts:csrd-system",
                "system:authenticated",
            ])),
            extra: Some(BTreeMap::from([
                (extra::NODE_NAME.to_owned(), strings(&["n1"])),
                (extra::POD_NAME.to_owned(), strings(&["agent-0"])),
                (extra::POD_UID.to_owned(), strings(&["agent-uid"])),
            ])),
            expiration_seconds: Some(3600),
            usages: Some(strings(&["digital signature", "server auth", "client auth"])),
            request: pkcs10(vec![uri(SPIFFE_ID)], |_| ()),
            ..CertificateSigningRequestSpec::default()
        };
        let agent = pod("csrd-system", "agent-0", "agent-uid", "csrd-agent");
        Self { object, agent, pod: pod("production", "web-0", "pod-uid", "web"), approves: &[] }
    }

    /// With a request for the API server's own signer, by the policy for people.
    fn api_client(user: &str, groups: &[&str]) -> Self {
        let mut case = Self::good();
        case.approves = &[API_CLIENT_SIGNER];
        case.pod.namespace = "people".into();
        case.annotate(annotation::POD_NAMESPACE, "people");
        case.object.spec.signer_name = API_CLIENT_SIGNER.into();
        case.object.spec.usages = Some(strings(&["digital signature", "client auth"]));
        case.object.spec.request = pkcs10(vec![], |params| {
            groups.iter().for_each(|group| params.distinguished_name.push(DnType::OrganizationName, *group));
            if !user.is_empty() {
                params.distinguished_name.push(DnType::CommonName, user);
            }
        });
        case
    }

    fn condition(&mut self, type_: &str) {
        let condition = CertificateSigningRequestCondition { type_: type_.into(), ..Default::default() };
        self.object.status.get_or_insert_default().conditions.get_or_insert_default().push(condition);
    }

    fn annotate(&mut self, key: &str, value: &str) {
        self.object.metadata.annotations.as_mut().unwrap().insert(key.into(), value.into());
    }

    fn bind(&mut self, key: &str, values: &[&str]) {
        self.object.spec.extra.as_mut().unwrap().insert(key.into(), strings(values));
    }

    /// `None` when it is left alone.
    fn verdict(self) -> Option<(Request, Result<Approval, Refusal>)> {
        let rules = Rules {
            signer: OWN.into(),
            approves: self.approves.iter().map(ToString::to_string).collect(),
            agent: ("csrd-system".into(), "csrd-agent".into()),
            kubelet_serving: false,
        };
        let path = "/apis/certificates.k8s.io/v1/certificatesigningrequests/csrd-0";
        let read = excerpt(path, &serde_json::to_value(self.object).unwrap());
        let request = screen(serde_json::from_value(read).unwrap(), &rules)?;
        let (agent, pod) = (Workload::of_pod(self.agent), Workload::of_pod(self.pod));
        let verdict = match &request.asked {
            Ok(Asked::Pod(claim)) => claim.decide(&agent, &pod, &rules, &policies()),
            Ok(Asked::Kubelet(kubelet)) => panic!("{kubelet:?}"),
            Err(refusal) => Err(refusal.clone()),
        };
        Some((request, verdict))
    }
}

fn approved(change: impl FnOnce(&mut Case)) -> (Request, Approval) {
    let mut case = Case::good();
    change(&mut case);
    let (request, verdict) = case.verdict().expect("it is addressed to us");
    (request, verdict.unwrap_or_else(|refusal| panic!("{refusal}")))
}

fn refusal(case: Case) -> Refusal {
    let (_, verdict) = case.verdict().expect("it is addressed to us");
    verdict.map(|approval| panic!("{:?}", approval.grant)).unwrap_err()
}

#[track_caller]
fn refused(reason: &str, change: impl FnOnce(&mut Case)) -> String {
    let mut case = Case::good();
    change(&mut case);
    let refusal = refusal(case);
    assert_eq!(refusal.reason(), reason, "{refusal}");
    refusal.to_string()
}

#[track_caller]
fn ignored(change: impl FnOnce(&mut Case)) {
    let mut case = Case::good();
    change(&mut case);
    assert!(case.verdict().is_none(), "it is answered");
}

#[test]
fn what_an_agent_asks_for_a_pod_of_its_node_within_policy_is_approved() {
    let (request, approval) = approved(|_| ());
    assert_eq!((request.node.as_str(), request.version.as_str(), request.approved), ("n1", "7", false));
    assert_eq!(approval.grant.policy(), "web");
    assert_eq!(approval.grant.names().uris, [SPIFFE_ID]);
    assert_eq!(approval.grant.lifetime(), Duration::from_secs(3600));
    approved(|case| {
        let names = vec![dns("web.production.svc"), SanType::IpAddress("10.1.0.7".parse::<IpAddr>().unwrap())];
        case.object.spec.request = pkcs10(names, |_| ());
    });
}

#[test]
fn what_is_not_addressed_to_us_or_has_its_answer_is_left_alone() {
    ignored(|case| case.object.spec.signer_name = "example.com/serving".into());
    ignored(|case| case.object.metadata.labels = None);
    ignored(|case| case.object.metadata.labels = Some(map(&[(label::MANAGED_BY, "helm")])));
    for answer in ["Denied", "Failed"] {
        ignored(|case| case.condition(answer));
    }
    ignored(|case| {
        let certificate = Some(ByteString(b"x".to_vec()));
        case.object.status = Some(CertificateSigningRequestStatus { certificate, ..Default::default() });
    });
}

/// GHSA-x7j5-fww5-mqmv and deckhouse#22901: a request for a signer that nobody spoke of was approved with the rest.
#[test]
fn a_request_for_another_signer_is_left_alone_whatever_else_is_right() {
    for signer in
        [KUBELET_SERVING, API_CLIENT_SIGNER, "kubernetes.io/kube-apiserver-client-kubelet", "csrd.dev/workloa"]
    {
        ignored(|case| case.object.spec.signer_name = signer.into());
    }
    ignored(|case| {
        *case = Case::api_client("developer", &["dev-team"]);
        case.approves = &[];
    });
}

/// talos-cloud-controller-manager#360: a user's name proves nothing without the groups of the authenticator.
#[test]
fn what_somebody_else_approved_for_our_signer_is_judged_all_the_same() {
    let (request, _) = approved(|case| case.condition("Approved"));
    assert!(request.approved);
    refused("POD_ON_OTHER_NODE", |case| {
        case.condition("Approved");
        case.pod.node = "n2".into();
    });
    // Neither an agent's nor a pod's: an administrator approved it by hand.
    let said = refused("NOT_AN_AGENT", |case| {
        case.condition("Approved");
        case.object.metadata.labels = None;
        case.object.spec.username = Some("developer".into());
    });
    assert!(said.starts_with("csrd signs only what an agent"), "{said}");
}

#[test]
fn a_client_of_the_api_server_is_approved_by_switch_and_policy_and_never_as_kubernetes_itself() {
    let verdict = |case: Case| case.verdict().expect("it is addressed to us").1;
    let approval = verdict(Case::api_client("developer", &["dev-team"])).unwrap();
    assert_eq!((approval.grant.policy(), approval.grant.signer()), ("people", API_CLIENT_SIGNER));
    for (user, groups) in [
        ("system:kube-controller-manager", &[][..]),
        ("system:serviceaccount:kube-system:admin", &[]),
        ("system:node:n1", &["system:nodes"]),
        ("developer", &["system:masters"]),
        ("developer", &["dev-team", "system:masters"]),
    ] {
        let refusal = refusal(Case::api_client(user, groups));
        assert_eq!(refusal.reason(), "NAME_NOT_ALLOWED", "{user} {groups:?}: {refusal}");
    }
    // Nobody's names: our signer would give the policy's offer, but this one goes by the request.
    let nobody = refusal(Case::api_client("", &[]));
    assert!(matches!(nobody.reason(), "NAMES_DIFFER" | "NOTHING_OFFERED"), "{nobody}");
    // Approved already: what follows is up to whose signer it is.
    ignored(|case| {
        *case = Case::api_client("developer", &[]);
        case.condition("Approved");
    });
}

#[test]
fn the_trace_of_the_issuance_is_taken_over_within_bounds() {
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    assert_eq!(approved(|case| case.annotate(annotation::TRACEPARENT, trace)).0.traceparent.as_deref(), Some(trace));
    let long = "0".repeat(MAX_ANNOTATION_BYTES + 1);
    assert_eq!(approved(|case| case.annotate(annotation::TRACEPARENT, &long)).0.traceparent, None);
}

#[test]
fn a_request_with_more_than_is_read_of_one_is_left_alone() {
    let mut case = Case::good();
    case.object.spec.groups.as_mut().unwrap().push("x".repeat(MAX_REQUEST_BYTES));
    assert!(case.verdict().is_none());
    let mut case = Case::good();
    case.annotate("example.org/not-looked-at", &"x".repeat(MAX_REQUEST_BYTES));
    assert!(case.verdict().unwrap().1.is_ok(), "of what is not looked at there may be any amount");
}
