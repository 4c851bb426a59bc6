//! What a collector receives from the real agent and the real commands, from the client's own span to the delivery.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails the test")]

mod cluster;

use std::{collections::BTreeMap, fs, process::Stdio};

use http::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind};
use tokio::process::Command;

use crate::{
    agent::{Agent, policy},
    telemetry::{Collector, Received},
};

const ISSUE: &str = "csrd.v1.CertificateService/IssueCertificate";
const SUBSCRIBE: &str = "csrd.v1.CertificateService/Subscribe";
/// What the agent does for one issuance, within the span of the call.
const STEPS: [&str; 6] = ["attest", "decide", "deliver", "key", "sign", "verify"];

#[tokio::test]
async fn the_agent_and_its_clients_send_one_trace_for_an_issuance_and_one_for_a_renewal_over_grpc() {
    check(Collector::grpc().await, "grpc").await;
}

#[tokio::test]
async fn the_agent_and_its_clients_send_one_trace_for_an_issuance_and_one_for_a_renewal_over_http() {
    check(Collector::http(StatusCode::OK).await, "http/protobuf").await;
}

async fn check(mut collector: Collector, protocol: &str) {
    let endpoint = format!("http://{}", collector.address);
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
        ("OTEL_BSP_SCHEDULE_DELAY", "10"),
    ];
    let agent = Agent::start_with(&policy(), &variables).await;
    let command = |arguments: &[&str]| {
        let mut command = Command::from(agent.as_user(None));
        command.args(arguments).envs(variables).kill_on_drop(true).stdout(Stdio::piped()).stderr(Stdio::null());
        command
    };

    let issued = command(&["issue", "--dns", "a.example.org", "-o", "pem"]).output().await.unwrap();
    assert!(issued.status.success(), "{issued:?}");
    let received = collector.until(|received| received.all.len() >= 2 + STEPS.len()).await;
    check_issuance(&received.all, ISSUE);
    check_no_secret(&received, &issued.stdout);

    let folder = agent.path("tls");
    let flags = ["watch", "--dns", "b.example.org", "--lifetime", "2s", "--dir", folder.to_str().unwrap()];
    let mut watch = command(&flags).spawn().unwrap();
    let whole = |received: &Received| {
        let calls = received.all.iter().filter(|span| span.name == SUBSCRIBE).count();
        calls == 2 && renewal(received).is_some_and(|steps| steps.len() == 4)
    };
    let received = collector.until(whole).await;
    watch.kill().await.unwrap();
    let (began, later): (Vec<_>, Vec<_>) = {
        let trace = received.all.iter().find(|span| span.name == SUBSCRIBE).unwrap().trace_id.clone();
        received.all.iter().cloned().partition(|span| span.trace_id == trace)
    };
    let call = check_issuance(&began, SUBSCRIBE);
    let renew = later.iter().find(|span| span.name == "renew").unwrap();
    assert!(renew.parent_span_id.is_empty(), "a renewal is a trace of its own");
    let links: Vec<_> = renew.links.iter().map(|link| (&link.trace_id, &link.span_id)).collect();
    assert_eq!(links, [(&call.trace_id, &call.span_id)], "it is linked to the call that began the certificate");
    assert_eq!(renewal(&received).unwrap(), ["deliver", "key", "sign", "verify"]);
    check_no_secret(&received, &fs::read(folder.join("tls.key")).unwrap());
}

/// Checks that these are one trace: the client's span, in it the agent's, in it each step once. Returns the agent's.
fn check_issuance(spans: &[Span], method: &str) -> Span {
    let of_kind = |kind: SpanKind| {
        let mut found = spans.iter().filter(|span| span.name == method && span.kind() == kind);
        let (Some(span), None) = (found.next(), found.next()) else { panic!("not one {kind:?} in {spans:#?}") };
        span
    };
    let (client, server) = (of_kind(SpanKind::Client), of_kind(SpanKind::Server));
    assert!(client.parent_span_id.is_empty());
    assert_eq!(server.parent_span_id, client.span_id);
    let steps: Vec<_> = spans.iter().filter(|span| span.name != method).collect();
    assert!(steps.iter().all(|step| step.parent_span_id == server.span_id), "{steps:#?}");
    assert!(spans.iter().all(|span| span.trace_id == client.trace_id));
    assert_eq!(sorted(&steps), STEPS);
    server.clone()
}

/// The steps of the first renewal that has been delivered.
fn renewal(received: &Received) -> Option<Vec<&str>> {
    let mut steps: BTreeMap<_, Vec<&Span>> = BTreeMap::new();
    for span in &received.all {
        steps.entry(&span.parent_span_id).or_default().push(span);
    }
    let renew = received.all.iter().find(|span| span.name == "renew")?;
    steps.get(&renew.span_id).map(|steps| {
        assert!(steps.iter().all(|step| step.trace_id == renew.trace_id));
        sorted(steps)
    })
}

fn sorted<'a>(spans: &[&'a Span]) -> Vec<&'a str> {
    let mut names: Vec<_> = spans.iter().map(|span| span.name.as_str()).collect();
    names.sort_unstable();
    names
}

/// Looks for any part of the private key at the start of `pem`, as text and as bytes.
fn check_no_secret(received: &Received, pem: &[u8]) {
    const PART: usize = 12;
    let key = pem::parse(pem).unwrap();
    assert_eq!(key.tag(), "PRIVATE KEY");
    let text = String::from_utf8_lossy(pem);
    let lines: Vec<_> = text.lines().collect();
    let parts = lines.iter().map(|line| line.as_bytes()).chain(key.contents().chunks_exact(PART));
    for part in parts.chain([b"BEGIN ".as_slice()]) {
        let found = received.bytes.windows(part.len()).any(|window| window == part);
        assert!(!found, "{:?} was sent", String::from_utf8_lossy(part));
    }
}
