//! Envoy's secret discovery: what each name finds, and when each kind of stream is told. Time is paused, connections are pipes.

use std::{fmt::Debug, sync::atomic::Ordering, time::Duration};

use csrd::{
    account::Limits,
    proto::{
        envoy::{
            config::core::v3::{DataSource, Node, data_source::Specifier},
            extensions::transport_sockets::tls::v3::{
                CertificateValidationContext, Secret, SpiffeCertValidatorConfig, secret::Type,
            },
            service::{
                discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse},
                secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient,
            },
        },
        google::rpc,
    },
    server::{MAX_DISCOVERY_REQUEST_BYTES, MAX_SECRET_NAME_BYTES, MAX_SECRETS, MESSAGE_TIMEOUT},
    signer::embedded::NAME,
    x509::Chain,
};
use prost::Message as _;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::{
    agent::reason,
    host::{Host, Signer},
    workload_api::{NEVER, TD, end, id, next, policy, silent},
};

const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
const WEB: &str = "spiffe://example.org/web";
const DB: &str = "spiffe://example.org/db";

fn web_and_db() -> String {
    policy("web", NAME, &["dnsNames: [plain.example.org]", &id("web"), &id("db")])
}

struct Scene {
    host: Host,
    client: SecretDiscoveryServiceClient<Channel>,
}

/// A stream of one kind, with the caller's side of it.
struct Stream<Q, R> {
    requests: mpsc::Sender<Q>,
    answers: Streaming<R>,
}

impl Scene {
    async fn new(policy: &str) -> Self {
        Self::of(Host::new(policy, &[Signer::new(NAME, Duration::ZERO)], Limits::default())).await
    }

    async fn of(mut host: Host) -> Self {
        let client = SecretDiscoveryServiceClient::new(host.connect().await);
        Self { host, client }
    }

    async fn fetch(&mut self, names: &[&str]) -> Result<Vec<Secret>, Status> {
        let response = self.client.fetch_secrets(ask(names)).await?.into_inner();
        assert_eq!(response.type_url, TYPE_URL);
        Ok(secrets(&response))
    }

    async fn world(&mut self, first: DiscoveryRequest) -> Stream<DiscoveryRequest, DiscoveryResponse> {
        let (requests, received) = mpsc::channel(8);
        let answers = self.client.stream_secrets(ReceiverStream::new(received)).await.unwrap().into_inner();
        requests.send(first).await.unwrap();
        Stream { requests, answers }
    }

    async fn delta(&mut self, first: DeltaDiscoveryRequest) -> Stream<DeltaDiscoveryRequest, DeltaDiscoveryResponse> {
        let (requests, received) = mpsc::channel(8);
        let answers = self.client.delta_secrets(ReceiverStream::new(received)).await.unwrap().into_inner();
        requests.send(first).await.unwrap();
        Stream { requests, answers }
    }
}

impl<Q, R: Debug> Stream<Q, R> {
    async fn send(&self, request: Q) {
        self.requests.send(request).await.unwrap_or_else(|_| panic!("the stream is open"));
    }

    async fn next(&mut self) -> R {
        next(&mut self.answers).await
    }

    async fn silent(&mut self, period: Duration) {
        silent(&mut self.answers, period).await;
    }

    async fn end(&mut self) -> Status {
        end(&mut self.answers).await
    }
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| name.to_string()).collect()
}

fn ask(names: &[&str]) -> DiscoveryRequest {
    DiscoveryRequest { resource_names: owned(names), type_url: TYPE_URL.into(), ..Default::default() }
}

fn ack(names: &[&str], of: &DiscoveryResponse) -> DiscoveryRequest {
    DiscoveryRequest { version_info: of.version_info.clone(), response_nonce: of.nonce.clone(), ..ask(names) }
}

fn error() -> Option<rpc::Status> {
    Some(rpc::Status { code: 13, message: "not\nthis one".into(), details: Vec::new() })
}

fn secrets(response: &DiscoveryResponse) -> Vec<Secret> {
    response.resources.iter().map(|any| Secret::decode(&*any.value).unwrap()).collect()
}

fn names(response: &DiscoveryResponse) -> Vec<String> {
    secrets(response).into_iter().map(|secret| secret.name).collect()
}

fn inline(source: &Option<DataSource>) -> &[u8] {
    match &source.as_ref().unwrap().specifier {
        Some(Specifier::InlineBytes(bytes)) => bytes,
        other => panic!("{other:?}"),
    }
}

/// The names in a certificate.
fn leaf(secret: &Secret) -> String {
    let Some(Type::TlsCertificate(certificate)) = &secret.r#type else { panic!("{secret:?}") };
    let chain = Chain::from_pem(inline(&certificate.certificate_chain)).unwrap();
    let key = csrd::x509::PrivateKey::from_pem(inline(&certificate.private_key)).unwrap();
    let (_, leaf) = x509_parser::parse_x509_certificate(chain.leaf_der()).unwrap();
    assert_eq!(leaf.public_key().raw, key.public_key().spki_der());
    format!("{:?}", leaf.subject_alternative_name().unwrap().unwrap().value.general_names)
}

fn context(secret: &Secret) -> &CertificateValidationContext {
    let Some(Type::ValidationContext(context)) = &secret.r#type else { panic!("{secret:?}") };
    context
}

/// The trust domains of the SPIFFE validator.
fn domains(secret: &Secret) -> Vec<String> {
    let context = context(secret);
    assert!(context.trusted_ca.is_none());
    let validator = context.custom_validator_config.as_ref().unwrap();
    assert_eq!(validator.name, "envoy.tls.cert_validator.spiffe");
    let config = validator.typed_config.as_ref().unwrap();
    let wanted = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig";
    assert_eq!(config.type_url, wanted);
    let domains = SpiffeCertValidatorConfig::decode(&*config.value).unwrap().trust_domains;
    assert!(domains.iter().all(|domain| inline(&domain.trust_bundle).starts_with(b"-----BEGIN CERTIFICATE-----")));
    domains.into_iter().map(|domain| domain.name).collect()
}

#[tokio::test(start_paused = true)]
async fn each_name_finds_its_secret_and_one_that_finds_nothing_hinders_no_other() {
    let policies = web_and_db() + &policy("zoo", NAME, &["spiffeId: spiffe://other.org/zoo"]);
    let mut scene = Scene::new(&policies).await;
    let found = scene.fetch(&[DB, "default", WEB, "plain.example.org"]).await.unwrap();
    let by_name: Vec<_> = found.iter().map(|secret| (secret.name.as_str(), leaf(secret))).collect();
    for ((name, leaf), wanted) in
        by_name.iter().zip([("default", WEB), ("plain.example.org", "plain"), (DB, DB), (WEB, WEB)])
    {
        assert_eq!(*name, wanted.0);
        assert!(leaf.contains(wanted.1), "{leaf}");
    }
    let found =
        scene.fetch(&["ROOTCA", "ALL", TD, "spiffe://other.org", "file-root:system", "spiffe://no.org", ""]).await;
    let found: Vec<_> = found.unwrap().iter().map(|secret| (secret.name.clone(), domains(secret).join(" "))).collect();
    let wanted = [
        ("ALL", "example.org other.org"),
        ("ROOTCA", "example.org"),
        (TD, "example.org"),
        ("spiffe://other.org", "other.org"),
    ];
    assert_eq!(found, wanted.map(|(name, domains)| (name.to_owned(), domains.to_owned())));
    let all: Vec<_> = scene.fetch(&[]).await.unwrap().into_iter().map(|secret| secret.name).collect();
    assert_eq!(all, ["plain.example.org", TD, DB, WEB, "spiffe://other.org", "spiffe://other.org/zoo"]);
    assert!(scene.fetch(&["nothing"]).await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_workload_without_spiffe_ids_verifies_by_roots_alone() {
    let mut scene = Scene::new(&policy("web", NAME, &["dnsNames: [a.example.org, b.example.org]"])).await;
    let found = scene.fetch(&["ROOTCA", "ALL", "default", "b.example.org"]).await.unwrap();
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(inline(&context(&found[0]).trusted_ca).starts_with(b"-----BEGIN CERTIFICATE-----"));
    assert!(leaf(&found[1]).contains("a.example.org"));
}

#[tokio::test(start_paused = true)]
async fn an_envoy_may_ask_for_plain_roots_and_is_remembered() {
    let mut scene = Scene::new(&web_and_db()).await;
    let node = |value| {
        let value = prost_types::Value { kind: Some(value) };
        let fields = [("disable_spiffe_cert_validation".to_owned(), value)].into_iter().collect();
        Some(Node { metadata: Some(prost_types::Struct { fields }), ..Default::default() })
    };
    use prost_types::value::Kind::{BoolValue, NumberValue, StringValue};
    let kinds = [
        (BoolValue(true), true),
        (StringValue("True".into()), true),
        (BoolValue(false), false),
        (StringValue("no".into()), false),
        (NumberValue(1.0), false),
    ];
    for (value, plain) in kinds {
        let mut stream = scene.world(DiscoveryRequest { node: node(value.clone()), ..ask(&["ROOTCA"]) }).await;
        let first = stream.next().await;
        assert_eq!(context(&secrets(&first)[0]).trusted_ca.is_some(), plain, "{value:?}");
        stream.send(ack(&["ALL", TD], &first)).await;
        let second = stream.next().await;
        assert_eq!(names(&second).len(), if plain { 1 } else { 2 }, "roots of several domains are not mixed");
        assert_eq!(context(secrets(&second).last().unwrap()).trusted_ca.is_some(), plain);
    }
}

#[tokio::test(start_paused = true)]
async fn only_certificates_that_are_asked_for_are_issued() {
    let mut scene = Scene::new(&web_and_db()).await;
    let mut stream = scene.world(ask(&["ROOTCA"])).await;
    let first = stream.next().await;
    assert!(scene.host.counts("csrd_credentials 0") && scene.host.counts("csrd_subscribers 1"));
    stream.send(ack(&["ROOTCA", DB], &first)).await;
    stream.next().await;
    assert!(scene.host.counts("csrd_credentials 1"));
}

#[tokio::test(start_paused = true)]
async fn the_state_of_the_world_is_told_whole_at_each_change_and_never_twice() {
    let mut scene = Scene::new(&web_and_db()).await;
    let mut stream = scene.world(ask(&["default", "ROOTCA", "file-root:system"])).await;
    let first = stream.next().await;
    assert_eq!((first.version_info.as_str(), first.nonce.as_str(), first.type_url.as_str()), ("1", "1", TYPE_URL));
    assert_eq!(names(&first), ["ROOTCA", "default"]);
    stream.send(ack(&["default", "ROOTCA", "file-root:system"], &first)).await;
    stream.silent(Duration::from_secs(60)).await;

    // Taken or not, a response is not told again; the next change is.
    stream
        .send(DiscoveryRequest {
            version_info: String::new(),
            error_detail: error(),
            ..ack(&["default", "ROOTCA", "file-root:system"], &first)
        })
        .await;
    stream.silent(Duration::from_secs(60)).await;
    let renewed = stream.next().await;
    assert_eq!((renewed.version_info.as_str(), names(&renewed)), ("2", owned(&["ROOTCA", "default"])));
    assert_ne!(renewed.resources, first.resources);

    // A change of names is answered at once, unless it answers an earlier response.
    stream.send(ack(&[DB], &first)).await;
    stream.silent(Duration::from_secs(60)).await;
    stream.send(ack(&[DB, WEB, "default"], &renewed)).await;
    let third = stream.next().await;
    assert_eq!((third.version_info.as_str(), names(&third)), ("3", owned(&["default", DB, WEB])));

    // None is all only at the start.
    stream.send(ack(&[], &third)).await;
    stream.silent(NEVER).await;
    let mut all = scene.world(ask(&[])).await;
    let first = all.next().await;
    assert_eq!(names(&first), ["plain.example.org", TD, DB, WEB]);
    all.send(ack(&[], &first)).await;
    all.silent(Duration::from_secs(60)).await;
}

#[tokio::test(start_paused = true)]
async fn a_name_that_finds_nothing_finds_it_when_a_policy_offers_it() {
    let mut scene = Scene::new(&policy("web", NAME, &[&id("web")])).await;
    let mut stream = scene.world(ask(&[DB])).await;
    stream.silent(Duration::from_secs(60)).await;
    scene.host.set_policy(&web_and_db());
    assert_eq!(names(&stream.next().await), [DB]);
    scene.host.set_policy(&policy("web", NAME, &[&id("web")]));
    stream.silent(Duration::from_secs(60)).await;
    scene.host.set_policy("");
    let status = stream.end().await;
    assert_eq!((status.code(), reason(&status).as_str()), (Code::PermissionDenied, "NO_POLICY_MATCHES"));
}

#[tokio::test(start_paused = true)]
async fn new_roots_are_told_to_whoever_asked_for_roots() {
    let (ca, next_ca) = (Signer::new(NAME, Duration::ZERO), Signer::new(NAME, Duration::ZERO));
    let mut scene = Scene::of(Host::new(&web_and_db(), std::slice::from_ref(&ca), Limits::default())).await;
    let mut roots = scene.world(ask(&["ROOTCA"])).await;
    let mut certificate = scene.world(ask(&["default"])).await;
    let mut delta = scene.delta(subscribe(&["default", "ROOTCA"])).await;
    let before = roots.next().await;
    certificate.next().await;
    delta.next().await;
    ca.add_root_of(&next_ca);
    let after = roots.next().await;
    assert!(after.resources[0].value.len() > before.resources[0].value.len());
    assert_eq!(told(&delta.next().await), ["ROOTCA"]);
    certificate.silent(Duration::from_secs(60)).await;
}

fn subscribe(names: &[&str]) -> DeltaDiscoveryRequest {
    let names = owned(names);
    DeltaDiscoveryRequest { resource_names_subscribe: names, type_url: TYPE_URL.into(), ..Default::default() }
}

fn unsubscribe(names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { resource_names_unsubscribe: owned(names), ..Default::default() }
}

fn told(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|resource| resource.name.as_str()).collect()
}

#[tokio::test(start_paused = true)]
async fn delta_tells_only_what_changed_and_names_what_is_not_there() {
    let mut scene = Scene::new(&web_and_db()).await;
    let mut stream = scene.delta(subscribe(&["ROOTCA", DB, "nothing"])).await;
    let first = stream.next().await;
    assert_eq!((told(&first), &first.removed_resources), (vec!["ROOTCA", DB], &owned(&["nothing"])));
    assert_eq!((first.nonce.as_str(), first.type_url.as_str()), ("1", TYPE_URL));
    let secret = Secret::decode(&*first.resources[1].resource.as_ref().unwrap().value).unwrap();
    assert!(leaf(&secret).contains(DB));

    let ack = DeltaDiscoveryRequest { response_nonce: "1".into(), ..Default::default() };
    let nack = DeltaDiscoveryRequest { error_detail: error(), ..ack.clone() };
    stream.send(ack).await;
    stream.send(nack).await;
    stream.silent(Duration::from_secs(60)).await;
    let renewed = stream.next().await;
    assert_eq!((told(&renewed), renewed.nonce.as_str()), (vec![DB], "2"));
    assert_ne!(renewed.resources[0].version, first.resources[1].version);

    // Once more, if it is asked for once more; never again once it is unwanted.
    stream.send(subscribe(&[DB, WEB])).await;
    let again = stream.next().await;
    assert_eq!(told(&again), [DB, WEB]);
    assert_eq!(again.resources[0].version, renewed.resources[0].version);
    stream.send(unsubscribe(&[DB, WEB])).await;
    stream.silent(NEVER).await;

    // A policy takes one away, and another one the rest.
    stream.send(subscribe(&[DB, WEB])).await;
    stream.next().await;
    scene.host.set_policy(&policy("web", NAME, &[&id("web")]));
    let removed = stream.next().await;
    assert_eq!((told(&removed), &removed.removed_resources), (vec![], &owned(&[DB])));
    scene.host.set_policy("");
    assert_eq!(stream.end().await.code(), Code::PermissionDenied);
}

#[tokio::test(start_paused = true)]
async fn delta_goes_on_where_an_earlier_stream_ended() {
    let mut scene = Scene::new(&web_and_db()).await;
    let mut stream = scene.delta(subscribe(&[DB, "ROOTCA"])).await;
    let first = stream.next().await;
    let versions = first.resources.iter().map(|it| (it.name.clone(), it.version.clone())).collect();
    let again = DeltaDiscoveryRequest { initial_resource_versions: versions, ..subscribe(&[DB, "ROOTCA", WEB]) };
    let mut later = scene.delta(again).await;
    assert_eq!(told(&later.next().await), [WEB]);
}

#[tokio::test(start_paused = true)]
async fn delta_follows_everything_there_is() {
    for first in [subscribe(&[]), subscribe(&["*"])] {
        let mut scene = Scene::new(&web_and_db()).await;
        let mut stream = scene.delta(first).await;
        assert_eq!(told(&stream.next().await), ["plain.example.org", TD, DB, WEB]);
        scene.host.set_policy(&policy("web", NAME, &[&id("web"), &id("new")]));
        let gone = stream.next().await;
        assert_eq!(gone.removed_resources, ["plain.example.org", DB]);
        assert_eq!(told(&stream.next().await), ["spiffe://example.org/new"]);
        stream.send(unsubscribe(&["*"])).await;
        stream.silent(Duration::from_secs(1)).await;
        scene.host.set_policy(&web_and_db());
        stream.silent(NEVER).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_signer_that_fails_holds_up_nothing_else() {
    let ca = Signer::new(NAME, Duration::ZERO);
    ca.down.store(true, Ordering::Relaxed);
    let mut scene = Scene::of(Host::new(&web_and_db(), std::slice::from_ref(&ca), Limits::default())).await;
    let mut world = scene.world(ask(&["default", "ROOTCA"])).await;
    let mut delta = scene.delta(subscribe(&["default", "ROOTCA"])).await;
    let (first, changes) = (world.next().await, delta.next().await);
    assert_eq!((names(&first), told(&changes)), (owned(&["ROOTCA"]), vec!["ROOTCA"]));
    assert!(changes.removed_resources.is_empty(), "it is there, and cannot be had just now");
    ca.down.store(false, Ordering::Relaxed);
    assert_eq!(names(&world.next().await), ["ROOTCA", "default"]);
    assert_eq!(told(&delta.next().await), ["default"]);
}

#[tokio::test(start_paused = true)]
async fn bounds_and_other_types_are_refused_by_name() {
    let mut scene = Scene::new(&web_and_db()).await;
    let many = |count: usize| (0..count).map(|n| n.to_string()).collect::<Vec<_>>();
    let request = |resource_names| DiscoveryRequest { resource_names, ..ask(&[]) };
    let long = |bytes| vec!["n".repeat(bytes)];
    for within in [many(MAX_SECRETS), long(MAX_SECRET_NAME_BYTES)] {
        scene.client.fetch_secrets(request(within)).await.unwrap();
    }
    let other = DiscoveryRequest { type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster".into(), ..ask(&[]) };
    for (request, words) in [
        (request(many(MAX_SECRETS + 1)), "resource_names: 257 are asked for, at most 256 allowed"),
        (request(long(MAX_SECRET_NAME_BYTES + 1)), "resource_names: 2049 bytes in one, at most 2048 allowed"),
        (other, "type_url: only type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret is served"),
    ] {
        let unary = scene.client.fetch_secrets(request.clone()).await.unwrap_err();
        let streamed = scene.world(request).await.end().await;
        for status in [unary, streamed] {
            assert_eq!((status.code(), reason(&status).as_str()), (Code::InvalidArgument, "REQUEST_INVALID"));
            assert_eq!(status.message(), words);
        }
    }
    // Names add up over the requests of a delta stream.
    let mut stream = scene.delta(subscribe(&["a"])).await;
    stream.next().await;
    stream.send(DeltaDiscoveryRequest { resource_names_subscribe: many(MAX_SECRETS), ..Default::default() }).await;
    assert_eq!(stream.end().await.code(), Code::InvalidArgument);

    let sized = |bytes: usize| {
        let node = |id: usize| Some(Node { id: "i".repeat(id), ..Default::default() });
        let overhead = DiscoveryRequest { node: node(bytes), ..ask(&["ROOTCA"]) }.encoded_len() - bytes;
        DiscoveryRequest { node: node(bytes - overhead), ..ask(&["ROOTCA"]) }
    };
    assert_eq!(sized(MAX_DISCOVERY_REQUEST_BYTES).encoded_len(), MAX_DISCOVERY_REQUEST_BYTES);
    scene.world(sized(MAX_DISCOVERY_REQUEST_BYTES)).await.next().await;
    let status = scene.world(sized(MAX_DISCOVERY_REQUEST_BYTES + 1)).await.end().await;
    assert_eq!((status.code(), reason(&status).as_str()), (Code::OutOfRange, "REQUEST_INVALID"));
}

#[tokio::test(start_paused = true)]
async fn a_stream_waits_for_its_first_request_as_long_as_any_and_then_for_as_long_as_it_takes() {
    let mut scene = Scene::new(&web_and_db()).await;
    let (requests, received) = mpsc::channel::<DiscoveryRequest>(1);
    let mut late = scene.client.stream_secrets(ReceiverStream::new(received)).await.unwrap().into_inner();
    let status = timeout(MESSAGE_TIMEOUT * 2, late.message()).await.unwrap().unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::InvalidArgument, "REQUEST_INVALID"));
    drop(requests);

    let mut stream = scene.world(ask(&["ROOTCA"])).await;
    let first = stream.next().await;
    stream.silent(MESSAGE_TIMEOUT * 100).await;
    stream.send(ack(&[TD], &first)).await;
    assert_eq!(names(&stream.next().await), [TD]);
    // A caller that has said all it has to say is still told.
    let (sender, _) = mpsc::channel(1);
    drop(std::mem::replace(&mut stream.requests, sender));
    stream.silent(MESSAGE_TIMEOUT * 100).await;
    scene.host.stop.cancel();
    let status = stream.end().await;
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "AGENT_STOPPING"));
}
