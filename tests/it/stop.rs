//! What becomes of the calls under way when the agent is told to stop. Time is paused, and connections are pipes.

use std::time::Duration;

use csrd::{
    account::Limits,
    proto::v1::{self, certificate_service_client::CertificateServiceClient, issue_certificate_response::Event},
    server::stop,
    signer::embedded,
};
use tokio::time::{Instant, sleep};
use tonic::{Code, Status, Streaming, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_client::HealthClient};
use tonic_reflection::pb::v1::{ServerReflectionRequest, server_reflection_client::ServerReflectionClient};

use crate::{
    agent::{policy_for, reason},
    host::{Host, Signer, UID},
};

const MOMENT: Duration = Duration::from_millis(100);

/// A host whose signer takes its time.
fn host(delay: Duration, limits: Limits) -> Host {
    Host::new(&policy_for(&[UID]), &[Signer::new(embedded::NAME, delay)], limits)
}

async fn watch_health(channel: &Channel) -> Result<Streaming<HealthCheckResponse>, Status> {
    let request = HealthCheckRequest { service: String::new() };
    Ok(HealthClient::new(channel.clone()).watch(request).await?.into_inner())
}

fn ask() -> Option<v1::CertificateRequest> {
    Some(v1::CertificateRequest { dns_names: vec!["a.example.org".into()], ..Default::default() })
}

#[tokio::test(start_paused = true)]
async fn an_issuance_is_delivered_if_it_lands_in_time_and_told_to_come_back_if_not() {
    for (delay, delivered) in [(stop::CALL - MOMENT, true), (stop::CALL + MOMENT, false)] {
        let mut host = host(delay, Limits::default());
        let channel = host.connect().await;
        let request = v1::IssueCertificateRequest { request: ask() };
        let mut events = CertificateServiceClient::new(channel).issue_certificate(request).await.unwrap().into_inner();
        let mut message = events.message().await;
        host.stop.cancel();
        let mut certificate = None;
        while let Ok(Some(v1::IssueCertificateResponse { event: Some(event) })) = message {
            if let Event::Certificate(it) = event {
                certificate = Some(it);
            }
            message = events.message().await;
        }
        assert_eq!(certificate.is_some(), delivered, "{delay:?}: {message:?}");
        match message {
            Ok(None) => assert!(delivered),
            Ok(Some(odd)) => panic!("{odd:?}"),
            Err(status) => {
                assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "AGENT_STOPPING"));
                assert!(!delivered);
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_open_stream_ends_at_the_stop_and_so_does_its_connection() {
    async fn told<T: std::fmt::Debug>(name: &str, mut stream: Streaming<T>) {
        let status = loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("{name}: ended without a status"),
                Err(status) => break status,
            }
        };
        assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "AGENT_STOPPING"), "{name}");
    }
    let mut host = host(Duration::ZERO, Limits::default());
    let channel = host.connect().await;
    let mut client = CertificateServiceClient::new(channel.clone());
    let request = v1::SubscribeRequest { request: ask(), ..Default::default() };
    let subscription = client.subscribe(request).await.unwrap().into_inner();
    let roots = client.watch_trust_bundle(v1::WatchTrustBundleRequest::default()).await.unwrap().into_inner();
    let health = watch_health(&channel).await.unwrap();
    // On a connection of its own: a client that goes on sending keeps its connection for as long as it may.
    let mut reflection = ServerReflectionClient::new(host.connect().await);
    let requests = tokio_stream::pending::<ServerReflectionRequest>();
    let reflection = reflection.server_reflection_info(requests).await.unwrap().into_inner();
    let stopped = Instant::now();
    host.stop.cancel();
    told("Subscribe", subscription).await;
    told("WatchTrustBundle", roots).await;
    told("health.Watch", health).await;
    told("ServerReflectionInfo", reflection).await;
    host.connections.join_next().await.unwrap().unwrap();
    assert!(stopped.elapsed() < MOMENT, "{:?}", stopped.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_not_answered_yet_is_told_of_the_stop() {
    let mut host = host(stop::AGENT, Limits::default());
    let channel = host.connect().await;
    let mut client = CertificateServiceClient::new(channel);
    let request = v1::SubscribeRequest { request: ask(), ..Default::default() };
    let stop = host.stop.clone();
    let (answer, ()) = tokio::join!(client.subscribe(request), async move {
        sleep(MOMENT).await;
        stop.cancel();
    });
    let status = answer.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "AGENT_STOPPING"));
}

#[tokio::test(start_paused = true)]
async fn streams_of_every_service_are_bounded_and_their_places_come_back() {
    let limits = Limits { streams_per_principal: 2, ..Limits::default() };
    let mut host = host(Duration::ZERO, limits);
    let channel = host.connect().await;
    let first = watch_health(&channel).await.unwrap();
    let _second = watch_health(&channel).await.unwrap();
    let refused = watch_health(&channel).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::ResourceExhausted, "TOO_MANY_STREAMS"));
    drop(first);
    sleep(MOMENT).await;
    assert!(watch_health(&channel).await.is_ok());
}
