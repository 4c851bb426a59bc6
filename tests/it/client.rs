//! The client against a scripted agent on a real socket.

use csrd::{
    client::{Client, ClientError, Code, Event},
    proto::v1::{
        self, CertificateRequest, IssueCertificateResponse, StageKind, SubscribeResponse,
        issue_certificate_response::Event as Issued, subscribe_response::Event as Wire,
    },
};
use futures_util::{Stream, StreamExt as _};
use tempfile::TempDir;

use crate::fake_agent::{FakeAgent, certificate, current, event, renewed, status};

struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn agent(&self, scripts: Vec<Vec<Result<SubscribeResponse, tonic::Status>>>) -> FakeAgent {
        FakeAgent::start(&self.dir.path().join("s"), scripts)
    }

    fn client(&self) -> Client {
        Client::new(self.dir.path().join("s").to_str().unwrap().parse().unwrap())
    }

    fn subscribe(&self) -> impl Stream<Item = Result<Event, ClientError>> + Unpin + use<> {
        self.client().subscribe(wanted()).into_stream().boxed_local()
    }
}

fn wanted() -> CertificateRequest {
    CertificateRequest { common_name: "web".into(), ..Default::default() }
}

/// The tag of the next certificate; waits out lost connections.
async fn next_tag(events: &mut (impl Stream<Item = Result<Event, ClientError>> + Unpin)) -> String {
    loop {
        match events.next().await.expect("no end").expect("no refusal") {
            Event::Current(certificate) | Event::Renewed(certificate) => {
                let tag = certificate.certificate_chain.trim_start_matches("chain ").trim_end();
                assert_eq!(certificate.private_key.unwrap().trim_start_matches("key ").trim_end(), tag);
                return tag.to_owned();
            }
            Event::Disconnected { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_subscription_survives_a_restart_and_shows_nothing_twice() {
    let place = Place::new();
    let agent = place.agent(vec![vec![Ok(current("c1", 5, "a")), Ok(renewed("c1", 6, "b"))]]);
    let mut events = place.subscribe();
    assert_eq!(next_tag(&mut events).await, "a");
    assert_eq!(next_tag(&mut events).await, "b");
    let first = agent.subscribed();
    assert_eq!((first[0].certificate_id.as_str(), first[0].after_sequence), ("", 0));
    assert_eq!(first[0].request, Some(wanted()));
    drop(agent);

    let lost = events.next().await.unwrap().unwrap();
    let Event::Disconnected { error, retry_in } = lost else { panic!("{lost:?}") };
    assert_eq!(error.reason, ClientError::UNREACHABLE);
    assert!((100..=10_000).contains(&retry_in.as_millis()), "{retry_in:?}");

    // What a confused agent could send again, and what is older, is not shown.
    let again = [renewed("c1", 6, "b"), renewed("c1", 3, "old"), renewed("c1", 7, "c")];
    let agent = place.agent(vec![again.map(Ok).into()]);
    assert_eq!(next_tag(&mut events).await, "c");
    let second = agent.subscribed();
    assert_eq!((second[0].certificate_id.as_str(), second[0].after_sequence), ("c1", 6));
    assert_eq!(second[0].request, Some(wanted()));
    drop(agent);

    // A new credential counts for itself.
    let _agent = place.agent(vec![vec![Ok(current("c2", 1, "d"))]]);
    assert_eq!(next_tag(&mut events).await, "d");
}

#[tokio::test]
async fn only_a_refusal_ends_a_subscription() {
    async fn check(code: Code, ends: bool) {
        let place = Place::new();
        let _agent = place.agent(vec![vec![Err(status(code, "SOME_REASON", "words"))]]);
        let mut events = place.subscribe();
        match events.next().await.unwrap() {
            Err(error) if ends => {
                assert_eq!((error.code, error.reason.as_str(), error.message.as_str()), (code, "SOME_REASON", "words"));
                assert!(events.next().await.is_none());
            }
            Ok(Event::Disconnected { error, .. }) if !ends => assert_eq!(error.reason, "SOME_REASON"),
            other => panic!("{code:?}: {other:?}"),
        }
    }
    check(Code::PermissionDenied, true).await;
    check(Code::InvalidArgument, true).await;
    check(Code::Unauthenticated, true).await;
    check(Code::Unimplemented, true).await;
    check(Code::NotFound, true).await;
    check(Code::OutOfRange, true).await;
    check(Code::Unavailable, false).await;
    check(Code::Internal, false).await;
    check(Code::ResourceExhausted, false).await;
    check(Code::DeadlineExceeded, false).await;
}

#[tokio::test]
async fn every_kind_of_event_arrives_and_a_denial_is_the_end() {
    let place = Place::new();
    let at = Some(prost_types::Timestamp { seconds: 9, nanos: 0 });
    let delayed = v1::RenewalDelayed { reason: "BUSY".into(), message: "later".into(), retry_at: at, expires_at: at };
    let denied = v1::Denied { reason: "POLICY_CHANGED".into(), message: "policy web no longer matches".into() };
    let _agent = place.agent(vec![vec![
        Ok(current("c1", 1, "a")),
        Ok(SubscribeResponse { sequence: 2, event: None }),
        Ok(event(3, Wire::RenewalDelayed(delayed))),
        Ok(event(4, Wire::RenewalDue(v1::RenewalDue { expires_at: at }))),
        Ok(event(5, Wire::TrustBundleUpdated(v1::TrustBundleUpdated { trust_bundle: "roots".into() }))),
        Ok(event(6, Wire::Denied(denied))),
    ]]);
    let mut events = place.subscribe();
    assert_eq!(next_tag(&mut events).await, "a");
    let ninth = jiff::Timestamp::new(9, 0).unwrap();
    let expected = [
        Event::RenewalDelayed { reason: "BUSY".into(), message: "later".into(), retry_at: ninth, expires_at: ninth },
        Event::RenewalDue { expires_at: ninth },
        Event::TrustBundleUpdated("roots".into()),
    ];
    for expected in expected {
        assert_eq!(events.next().await.unwrap(), Ok(expected));
    }
    let error = events.next().await.unwrap().expect_err("denied");
    assert_eq!((error.code, error.reason.as_str()), (Code::PermissionDenied, "POLICY_CHANGED"));
    assert!(events.next().await.is_none());
}

#[tokio::test]
async fn an_event_out_of_contract_ends_with_a_bad_answer() {
    async fn check(wrong: SubscribeResponse) {
        let place = Place::new();
        let _agent = place.agent(vec![vec![Ok(wrong)]]);
        let error = place.subscribe().next().await.unwrap().expect_err("out of contract");
        assert_eq!(error.reason, ClientError::BAD_ANSWER);
    }
    check(event(1, Wire::Current(v1::Current { certificate: None }))).await;
    check(event(1, Wire::Renewed(v1::Renewed { certificate: None }))).await;
    check(event(1, Wire::RenewalDue(v1::RenewalDue { expires_at: None }))).await;
}

#[tokio::test]
async fn an_issuance_shows_its_stages_and_yields_the_certificate() {
    let place = Place::new();
    let agent = place.agent(vec![]);
    let stage = |kind: StageKind| {
        let stage = v1::Stage { kind: kind.into(), detail: String::new(), elapsed: None };
        Ok(IssueCertificateResponse { event: Some(Issued::Stage(stage)) })
    };
    let done = |tag| Ok(IssueCertificateResponse { event: Some(Issued::Certificate(certificate("c1", 1, tag))) });
    agent.will_issue(vec![stage(StageKind::Attested), stage(StageKind::Granted), done("a")]);
    let mut stages = Vec::new();
    let issued = place.client().issue(wanted(), |stage| stages.push(stage.kind())).await.unwrap();
    assert_eq!(stages, [StageKind::Attested, StageKind::Granted]);
    assert_eq!(issued.certificate_chain, "chain a\n");
    assert_eq!(agent.issued()[0].request, Some(wanted()));

    agent.will_issue(vec![stage(StageKind::Attested)]);
    let error = place.client().issue(wanted(), drop).await.expect_err("no certificate");
    assert_eq!((error.reason.as_str(), error.message.contains("without a certificate")), ("BAD_ANSWER", true));

    agent.will_issue(vec![Ok(IssueCertificateResponse { event: None })]);
    let error = place.client().issue(wanted(), drop).await.expect_err("unknown");
    assert!(error.message.contains("unknown kind"), "{error}");

    agent.will_issue(vec![Err(status(Code::PermissionDenied, "NO_POLICY", "no policy allows it"))]);
    let error = place.client().issue(wanted(), drop).await.expect_err("denied");
    assert_eq!(error.to_string(), "no policy allows it (NO_POLICY)");
}
