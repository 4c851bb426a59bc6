//! A real `csrd agent`: its own process, a real socket, a CA on disk; killed and started again as operators do.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Output},
    time::Duration,
};

use csrd::proto::v1::{
    self, certificate_service_client::CertificateServiceClient, status_service_client::StatusServiceClient,
    subscribe_response::Event,
};
use tempfile::TempDir;
use tokio::{task::JoinSet, time::timeout};
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

use crate::attest::is_root;

/// Far above what anything here takes, for a machine under load.
const PATIENCE: Duration = Duration::from_secs(60);

/// An agent as a process; killed when dropped.
pub(crate) struct Agent {
    child: Option<Child>,
    pub(crate) folder: TempDir,
}

impl Agent {
    /// An agent whose policies are `policy`, ready to serve.
    pub(crate) async fn start(policy: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // Other users' clients must be able to reach the socket.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(folder.path().join("policy.yaml"), policy).unwrap();
        let mut agent = Self { child: None, folder };
        agent.spawn().await;
        agent
    }

    pub(crate) async fn spawn(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_csrd"));
        command.arg("agent").arg("--socket").arg(self.socket()).arg("--state-dir").arg(self.path("state"));
        command.arg("--policy").arg(self.path("policy.yaml")).stderr(fs::File::create(self.path("log")).unwrap());
        self.child = Some(command.spawn().unwrap());
        timeout(PATIENCE, self.answers()).await.expect("the agent serves");
    }

    async fn answers(&mut self) {
        while self.try_channel().await.is_err() {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "the agent ended at its start: {ended:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("s")
    }

    fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Asks the agent to stop and waits, while clients of this test's runtime go on, until it has.
    async fn terminate(&mut self) -> std::process::ExitStatus {
        let mut child = self.child.take().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        tokio::task::spawn_blocking(move || child.wait()).await.unwrap().unwrap()
    }

    async fn try_channel(&self) -> Result<Channel, tonic::transport::Error> {
        Endpoint::from_shared(format!("unix://{}", self.socket().display())).unwrap().connect().await
    }

    pub(crate) async fn client(&self) -> CertificateServiceClient<Channel> {
        CertificateServiceClient::new(self.try_channel().await.unwrap())
    }

    async fn issue(&self, request: v1::CertificateRequest) -> Result<v1::Certificate, Status> {
        use v1::issue_certificate_response::Event;
        let request = v1::IssueCertificateRequest { request: Some(request) };
        let mut answers = self.client().await.issue_certificate(request).await?.into_inner();
        loop {
            match answers.message().await?.expect("the certificate comes last").event {
                Some(Event::Certificate(certificate)) => {
                    assert!(answers.message().await?.is_none(), "nothing follows the certificate");
                    return Ok(certificate);
                }
                Some(Event::Stage(_)) => {}
                None => panic!("an empty event"),
            }
        }
    }

    async fn subscribe(&self, request: v1::SubscribeRequest) -> Result<Streaming<v1::SubscribeResponse>, Status> {
        Ok(self.client().await.subscribe(request).await?.into_inner())
    }

    /// A command of ours as `uid`.
    fn command(&self, uid: Option<u32>, arguments: &[&str]) -> Output {
        self.as_user(uid).args(arguments).output().unwrap()
    }

    /// Our program as `uid`, to be given its arguments.
    pub(crate) fn as_user(&self, uid: Option<u32>) -> Command {
        let program = env!("CARGO_BIN_EXE_csrd");
        let mut command = match uid {
            None => Command::new(program),
            Some(uid) => {
                // The binary may lie in a folder that only root can enter.
                let copy = self.path("csrd");
                if !copy.exists() {
                    assert!(Command::new("cp").arg(program).arg(&copy).status().unwrap().success());
                }
                let mut command = Command::new("setpriv");
                command.args([&format!("--reuid={uid}"), &format!("--regid={uid}"), "--clear-groups", "--"]).arg(copy);
                command
            }
        };
        command.env("CSRD_SOCKET", self.socket());
        command
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Lets users have names of example.org; certificates live as short as asked.
pub(crate) fn policy_for(uids: &[u32]) -> String {
    format!(
        "apiVersion: csrd.dev/v1alpha1
kind: CertificatePolicy
metadata: {{name: test}}
spec:
  match: {{unix: {{uids: {uids:?}}}}}
  allow:
    commonNames: ['{}']
    dnsNames: ['*.example.org']
    keys: [ecdsa-p256, ecdsa-p384, ed25519, rsa-2048, rsa-3072, rsa-4096]
    usages: [digital signature, key encipherment, server auth, client auth]
    lifetime: {{min: 2s, default: 1h, max: 24h}}
  offer: [{{spiffeId: 'spiffe://example.org/user/{{unix.uid}}'}}]
",
        "x".repeat(64)
    )
}

pub(crate) fn policy() -> String {
    policy_for(&[uid()])
}

fn uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn ask(name: &str) -> v1::CertificateRequest {
    v1::CertificateRequest { dns_names: vec![name.to_owned()], ..Default::default() }
}

fn lasting(seconds: i64, request: v1::CertificateRequest) -> v1::CertificateRequest {
    v1::CertificateRequest { lifetime: Some(prost_types::Duration { seconds, nanos: 0 }), ..request }
}

fn follow(request: v1::CertificateRequest) -> v1::SubscribeRequest {
    v1::SubscribeRequest { request: Some(request), ..Default::default() }
}

/// The next certificate of a stream, with its sequence.
async fn next_certificate(stream: &mut Streaming<v1::SubscribeResponse>) -> Result<(u64, v1::Certificate), Status> {
    loop {
        let answer = timeout(PATIENCE, stream.message()).await.expect("an answer in time")?;
        let answer = answer.ok_or_else(|| Status::unknown("a subscription never ends with OK"))?;
        match answer.event {
            Some(Event::Current(v1::Current { certificate })) | Some(Event::Renewed(v1::Renewed { certificate })) => {
                return Ok((answer.sequence, certificate.expect("it carries a certificate")));
            }
            _ => {}
        }
    }
}

pub(crate) fn reason(status: &Status) -> String {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(info.domain, "csrd.dev");
    info.reason
}

#[tokio::test]
async fn every_kind_of_key_is_issued_and_the_private_half_fits() {
    let agent = Agent::start(&policy()).await;
    for algorithm in [
        v1::KeyAlgorithm::Unspecified,
        v1::KeyAlgorithm::EcdsaP256,
        v1::KeyAlgorithm::EcdsaP384,
        v1::KeyAlgorithm::Ed25519,
        v1::KeyAlgorithm::Rsa2048,
    ] {
        let key = Some(v1::certificate_request::Key::Generate(algorithm.into()));
        let certificate = agent.issue(v1::CertificateRequest { key, ..ask("a.example.org") }).await.unwrap();
        let key = csrd::x509::PrivateKey::from_pem(&certificate.private_key).unwrap();
        let chain = csrd::x509::Chain::from_pem(&certificate.certificate_chain).unwrap();
        let (_, leaf) = x509_parser::parse_x509_certificate(chain.leaf_der()).unwrap();
        assert_eq!(leaf.public_key().raw, key.public_key().spki_der(), "{algorithm:?}");
    }
}

#[tokio::test]
async fn a_request_without_names_gets_what_policy_offers() {
    let agent = Agent::start(&policy()).await;
    let certificate = agent.issue(v1::CertificateRequest::default()).await.unwrap();
    let chain = csrd::x509::Chain::from_pem(&certificate.certificate_chain).unwrap();
    let (_, leaf) = x509_parser::parse_x509_certificate(chain.leaf_der()).unwrap();
    let names = format!("{:?}", leaf.subject_alternative_name().unwrap().unwrap().value.general_names);
    assert!(names.contains(&format!("spiffe://example.org/user/{}", uid())), "{names}");
}

#[tokio::test]
async fn input_that_nobody_should_send_gets_its_code_its_reason_and_the_field() {
    async fn check(agent: &Agent, request: v1::CertificateRequest, code: Code, expected: &str, words: &str) {
        let refused = match agent.issue(request.clone()).await {
            Err(refused) => refused,
            Ok(_) => panic!("{request:?} was granted"),
        };
        assert_eq!((refused.code(), reason(&refused).as_str()), (code, expected), "{request:?}: {}", refused.message());
        assert!(refused.message().contains(words), "{:?} does not say {words:?}", refused.message());
        let streamed = agent.subscribe(follow(request)).await.expect_err("Subscribe refuses what Issue refuses");
        assert_eq!(streamed.code(), code);
    }
    let agent = Agent::start(&policy()).await;
    let invalid = Code::InvalidArgument;
    for (name, words) in [
        ("A.example.org", "a-z"),
        ("a.example.org.", "1 to 63 bytes"),
        ("a\0.example.org", "a-z"),
        ("ä.example.org", "xn--"),
        ("a.*.example.org", "whole first label"),
        ("*.org", "two labels"),
        ("10.0.0.1", "IP name"),
        (&format!("{}.example.org", "a".repeat(64)), "63 bytes"),
        (&"a.".repeat(127), "253 bytes"),
    ] {
        check(&agent, ask(name), invalid, "NAME_INVALID", words).await;
    }
    let many = v1::CertificateRequest {
        dns_names: (0..10_000).map(|n| format!("{n}.example.org")).collect(),
        ..Default::default()
    };
    let refused = agent.issue(many).await.expect_err("10,000 names");
    assert!(refused.message().contains("at most"), "{refused:?}");
    let names = |count| (0..count).map(|n| format!("n{n}.example.org")).collect();
    let request = v1::CertificateRequest { dns_names: names(65), ..Default::default() };
    check(&agent, request, invalid, "NAME_INVALID", "65 given, at most 64 allowed").await;
    agent.issue(v1::CertificateRequest { dns_names: names(64), ..Default::default() }).await.expect("at the bound");

    let of = |change: fn(&mut v1::CertificateRequest)| {
        let mut request = ask("a.example.org");
        change(&mut request);
        request
    };
    let long = "x".repeat(65);
    let request = v1::CertificateRequest { common_name: long.clone(), ..Default::default() };
    check(&agent, request, invalid, "NAME_INVALID", "1 to 64").await;
    agent
        .issue(v1::CertificateRequest { common_name: long[1..].to_owned(), ..Default::default() })
        .await
        .expect("64 characters are allowed");
    let request = of(|request| request.ip_addresses = vec!["10.0.0.300".into()]);
    check(&agent, request, invalid, "NAME_INVALID", "no IPv4 or IPv6 address").await;
    let request = of(|request| request.uris = vec!["spiffe://Example.org/x".into()]);
    check(&agent, request, invalid, "NAME_INVALID", "no SPIFFE ID").await;
    let request = of(|request| request.uris = vec![format!("https://example.org/{}", "x".repeat(2048))]);
    check(&agent, request, invalid, "NAME_INVALID", "2048 bytes").await;
    let request = of(|request| request.usages = vec![99]);
    check(&agent, request, invalid, "REQUEST_INVALID", "usages: 99").await;
    let request = of(|request| request.usages = vec![1; 17]);
    check(&agent, request, invalid, "REQUEST_INVALID", "at most 16").await;
    let request = of(|request| request.key = Some(v1::certificate_request::Key::Generate(99)));
    check(&agent, request, invalid, "REQUEST_INVALID", "generate: 99").await;
    for (seconds, nanos) in [(0, 0), (-1, 0), (60, 1), (i64::MAX, 0)] {
        let request =
            v1::CertificateRequest { lifetime: Some(prost_types::Duration { seconds, nanos }), ..ask("a.example.org") };
        check(&agent, request, invalid, "REQUEST_INVALID", "whole seconds").await;
    }
    let request = of(|request| request.policy = "x".repeat(254));
    check(&agent, request, invalid, "REQUEST_INVALID", "at most 253").await;
    let request = of(|request| request.signer_name = "x".repeat(507));
    check(&agent, request, Code::PermissionDenied, "SIGNER_NOT_ALLOWED", "signer").await;
    let request = of(|request| request.signer_name = "x".repeat(508));
    check(&agent, request, invalid, "REQUEST_INVALID", "signer_name: 508 bytes given, at most 507").await;
    for pkcs10 in [&b"garbage"[..], &[], &[0x30; 16 * 1024 + 1]] {
        let held = v1::HeldKey { pkcs10: pkcs10.to_vec().into(), rotate_key: false };
        let key = Some(v1::certificate_request::Key::Held(held));
        let refused = agent.issue(v1::CertificateRequest { key: key.clone(), ..Default::default() }).await;
        let refused = refused.expect_err("no request");
        assert_eq!(refused.code(), invalid, "{refused:?}");
        assert!(refused.message().starts_with("held.pkcs10: ") && !reason(&refused).is_empty(), "{refused:?}");
        check(&agent, v1::CertificateRequest { key, ..ask("a.example.org") }, invalid, "REQUEST_INVALID", "leave")
            .await;
    }
    let denied = Code::PermissionDenied;
    let request = of(|request| request.policy = "other".into());
    assert_eq!(agent.issue(request).await.expect_err("no such policy").code(), denied);
    check(&agent, ask("a.example.com"), denied, "NAME_NOT_ALLOWED", "policy test: dnsNames: \"a.example.com\"").await;
    let request = of(|request| request.lifetime = Some(prost_types::Duration { seconds: 86_401, nanos: 0 }));
    check(&agent, request, denied, "LIFETIME_NOT_ALLOWED", "24h").await;

    let missing = agent.client().await.issue_certificate(v1::IssueCertificateRequest { request: None }).await;
    assert_eq!(reason(&missing.expect_err("nothing asked")), "REQUEST_INVALID");
    let unknown = v1::SubscribeRequest { certificate_id: "no such id".into(), ..Default::default() };
    let unknown = agent.subscribe(unknown).await.expect_err("no such id");
    assert_eq!((unknown.code(), reason(&unknown).as_str()), (Code::NotFound, "CERTIFICATE_UNKNOWN"));
    for (signer_name, code, expected) in [
        ("none".to_owned(), Code::FailedPrecondition, "SIGNER_UNKNOWN"),
        ("x".repeat(507), Code::FailedPrecondition, "SIGNER_UNKNOWN"),
        ("x".repeat(508), invalid, "REQUEST_INVALID"),
    ] {
        let bundle = v1::WatchTrustBundleRequest { signer_name };
        let unknown = agent.client().await.watch_trust_bundle(bundle).await.expect_err("no such signer");
        assert_eq!((unknown.code(), reason(&unknown).as_str()), (code, expected));
    }
    agent.issue(ask("still.example.org")).await.expect("after all that the agent serves");
}

#[tokio::test]
async fn the_roots_verify_what_was_issued_and_have_the_fingerprints_that_are_said() {
    let agent = Agent::start(&policy()).await;
    let certificate = agent.issue(ask("a.example.org")).await.unwrap();
    let mut roots = agent.client().await.watch_trust_bundle(v1::WatchTrustBundleRequest::default()).await.unwrap();
    let roots = roots.get_mut().message().await.unwrap().unwrap();
    assert_eq!(roots.trust_bundle, certificate.trust_bundle);
    let bundle = csrd::x509::Bundle::from_pem(&roots.trust_bundle).unwrap();
    assert_eq!(bundle.fingerprints(), roots.sha256_fingerprints);
}

#[tokio::test]
async fn a_subscription_is_pushed_renewals_and_resumes_after_the_last_sequence() {
    let agent = Agent::start(&policy()).await;
    let request = lasting(4, ask("a.example.org"));
    let mut stream = agent.subscribe(follow(request.clone())).await.unwrap();
    let (first_sequence, first) = next_certificate(&mut stream).await.unwrap();
    let (second_sequence, second) = next_certificate(&mut stream).await.unwrap();
    assert!(second_sequence > first_sequence && second.serial_number != first.serial_number);
    drop(stream);
    let resume = |after_sequence| v1::SubscribeRequest {
        certificate_id: second.certificate_id.clone(),
        after_sequence,
        request: Some(request.clone()),
    };
    let (again, _) = next_certificate(&mut agent.subscribe(resume(first_sequence)).await.unwrap()).await.unwrap();
    assert!(again >= second_sequence, "what was missed is told");
    let (later, _) = next_certificate(&mut agent.subscribe(resume(again)).await.unwrap()).await.unwrap();
    assert!(later > again, "what was seen is not");
}

#[tokio::test]
async fn a_hundred_subscribers_live_through_a_stop_and_a_kill_and_see_nothing_older() {
    const SUBSCRIBERS: usize = 100;
    let mut agent = Agent::start(&policy()).await;
    let mut seen = vec![(v1::SubscribeRequest::default(), 0_u64, 0_i64); SUBSCRIBERS];
    for (n, (resume, ..)) in seen.iter_mut().enumerate() {
        resume.request = Some(lasting(5, ask(&format!("n{}.example.org", n % 10))));
    }
    for stop in ["TERM", "KILL", "TERM"] {
        let mut followers = JoinSet::new();
        for (mut resume, mut last, mut not_after) in seen.drain(..) {
            let mut client = agent.client().await;
            followers.spawn(async move {
                let mut stream = client.subscribe(resume.clone()).await.unwrap().into_inner();
                loop {
                    match next_certificate(&mut stream).await {
                        Ok((sequence, certificate)) => {
                            let ends = certificate.not_after.unwrap().seconds;
                            assert!(sequence > last, "{sequence} after {last}");
                            assert!(ends >= not_after, "an older certificate after a newer one");
                            (last, not_after) = (sequence, ends);
                            resume.certificate_id = certificate.certificate_id;
                            resume.after_sequence = sequence;
                        }
                        Err(status) => break (status, (resume, last, not_after)),
                    }
                }
            });
        }
        tokio::time::sleep(Duration::from_secs(4)).await;
        if stop == "TERM" {
            let ended = agent.terminate().await;
            assert!(ended.success(), "{ended}");
        } else {
            agent.kill();
        }
        while let Some(follower) = followers.join_next().await {
            let (status, follower) = follower.unwrap();
            if stop == "TERM" {
                assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "AGENT_STOPPING"));
            }
            assert!(follower.1 > 0, "every follower had a certificate");
            seen.push(follower);
        }
        assert_eq!(seen.len(), SUBSCRIBERS);
        agent.spawn().await;
    }
}

#[tokio::test]
async fn a_policy_that_takes_the_right_ends_the_stream_and_a_bad_one_changes_nothing() {
    let agent = Agent::start(&policy()).await;
    let mut stream = agent.subscribe(follow(ask("a.example.org"))).await.unwrap();
    next_certificate(&mut stream).await.unwrap();
    let write = |text: &str| {
        fs::write(agent.path("policy.new"), text).unwrap();
        fs::rename(agent.path("policy.new"), agent.path("policy.yaml")).unwrap();
    };
    write("kind: [nonsense");
    tokio::time::sleep(Duration::from_secs(2)).await;
    agent.issue(ask("b.example.org")).await.expect("the last good policies stay in force");
    write(&policy().replace("example.org", "example.net"));
    let answer = timeout(PATIENCE, stream.message()).await.expect("in time").unwrap().unwrap();
    let Some(Event::Denied(denied)) = answer.event else { panic!("{answer:?}") };
    assert!(denied.message.contains("policy test") && denied.message.contains("a.example.org"), "{denied:?}");
    let end = stream.message().await.expect_err("the stream ends");
    assert_eq!((end.code(), reason(&end)), (Code::PermissionDenied, denied.reason));
    let refused = agent.issue(ask("a.example.org")).await.expect_err("no longer");
    assert_eq!(refused.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn each_user_gets_what_policy_gives_it_and_the_third_is_refused_in_the_rules_words() {
    if !is_root("each_user_gets_what_policy_gives_it_and_the_third_is_refused_in_the_rules_words") {
        return;
    }
    let web = policy_for(&[60_001]).replace("name: test", "name: web").replace("*.example.org", "web.example.org");
    let db = policy_for(&[60_002]).replace("name: test", "name: db").replace("*.example.org", "db.example.org");
    let agent = Agent::start(&format!("{web}---\n{db}")).await;
    for (uid, own, others) in
        [(60_001, "web.example.org", "db.example.org"), (60_002, "db.example.org", "web.example.org")]
    {
        let granted = agent.command(Some(uid), &["issue", "--dns", own, "-o", "pem"]);
        assert!(granted.status.success(), "{granted:?}");
        let refused = agent.command(Some(uid), &["issue", "--dns", others, "-o", "pem"]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(77), "{said}");
        assert!(said.contains(others) && said.contains("none of its entries"), "{said}");
        assert!(refused.stdout.is_empty());
    }
    let nobody = agent.command(Some(60_003), &["issue", "--dns", "web.example.org", "-o", "pem"]);
    let said = String::from_utf8_lossy(&nobody.stderr).into_owned();
    assert_eq!(nobody.status.code(), Some(77), "{said}");
    assert!(said.contains("no policy matches uid 60003"), "{said}");
    assert!(!said.contains("60001") && !said.contains("60002"), "it says nothing of others: {said}");
    // Credentials are shown to their own workload and to operators.
    let rows = |uid| String::from_utf8(agent.command(uid, &["status", "-o", "json"]).stdout).unwrap();
    assert!(rows(Some(60_001)).contains("web.example.org") && !rows(Some(60_001)).contains("db.example.org"));
    assert!(!rows(Some(60_003)).contains("example.org"));
    assert!(rows(None).contains("web.example.org") && rows(None).contains("db.example.org"), "root sees all");
    let all = StatusServiceClient::new(agent.try_channel().await.unwrap());
    assert_eq!({ all }.list_credentials(v1::ListCredentialsRequest {}).await.unwrap().get_ref().credentials.len(), 2);
}

#[tokio::test]
async fn health_and_reflection_answer_on_the_same_socket() {
    let agent = Agent::start(&policy()).await;
    let channel = agent.try_channel().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    for service in ["", "csrd.v1.CertificateService"] {
        let request = tonic_health::pb::HealthCheckRequest { service: service.into() };
        let answer = health.check(request).await.unwrap();
        assert_eq!(answer.get_ref().status(), tonic_health::pb::health_check_response::ServingStatus::Serving);
    }
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let list = MessageRequest::ListServices(String::new());
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let answers = ServerReflectionClient::new(channel).server_reflection_info(tokio_stream::once(request)).await;
    let answer = answers.unwrap().get_mut().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else { panic!("{answer:?}") };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    for service in ["csrd.v1.CertificateService", "csrd.v1.StatusService", "grpc.health.v1.Health"] {
        assert!(names.contains(&service), "{names:?}");
    }
}

/// Runs an agent that must not start; returns its exit code and what it said.
fn refused_start(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_csrd")).arg("agent").args(arguments).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[tokio::test]
async fn an_agent_that_cannot_work_does_not_start_and_says_why() {
    let agent = Agent::start(&policy()).await;
    let text = |path: PathBuf| path.to_str().unwrap().to_owned();
    let (policy_path, state) = (text(agent.path("policy.yaml")), text(agent.path("other-state")));
    let start = |socket: &Path, extra: &[&str]| {
        let mut arguments = vec!["--socket", socket.to_str().unwrap(), "--state-dir", &state, "--policy", &policy_path];
        arguments.extend(extra);
        refused_start(&arguments)
    };
    let check = |(code, said): (Option<i32>, String), expected: i32, words: &str| {
        assert_eq!(code, Some(expected), "{said}");
        assert!(said.contains(words), "{said:?} does not say {words:?}");
    };
    fs::write(agent.path("config.yaml"), "signer: {embedded: {caLifetime: 59s}}\n").unwrap();
    let bounds = "signer.embedded.caLifetime: it must lie between 1m and 175200h";
    check(start(&agent.path("other.sock"), &["--config", &text(agent.path("config.yaml"))]), 64, bounds);
    assert!(!Path::new(&state).exists(), "nothing was made");
    check(start(&agent.socket(), &[]), 1, "is in use by another process");
    fs::create_dir(agent.path("folder")).unwrap();
    check(start(&agent.path("folder"), &[]), 1, "is no socket");
    check(start(&agent.path(&"x".repeat(108)), &[]), 64, "at most 107 are possible");
    check(start(&agent.path("nowhere/s"), &[]), 1, "cannot listen on");
    let other = agent.path("other.sock");
    fs::write(agent.path("bad.yaml"), "apiVersion: csrd.dev/v1alpha1\nkind: Nonsense\n").unwrap();
    check(start(&other, &["--policy", &text(agent.path("bad.yaml"))]), 64, "bad.yaml");
    fs::write(agent.path("config.yaml"), "sockt: x\n").unwrap();
    check(start(&other, &["--config", &text(agent.path("config.yaml"))]), 64, "sockt");
    check(start(&other, &["--config", "/nonexistent"]), 64, "it cannot be read: No such file");
    // The CA: a key of another certificate, a key that others can read, a folder that is a file.
    let state_of = |name: &str| text(agent.path(name));
    fs::write(agent.path("file"), "").unwrap();
    let arguments = ["--socket", other.to_str().unwrap(), "--policy", &policy_path, "--state-dir", &state_of("file")];
    let (code, said) = refused_start(&arguments);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("file"), "{said}");
    let issued = agent.issue(ask("a.example.org")).await.unwrap();
    fs::write(agent.path("ca.crt"), &issued.certificate_chain).unwrap();
    fs::write(agent.path("ca.key"), &issued.private_key).unwrap();
    let config = format!(
        "signer: {{embedded: {{caCertificate: {}, caKey: {}}}}}\n",
        text(agent.path("ca.crt")),
        text(agent.path("ca.key"))
    );
    fs::write(agent.path("config.yaml"), config).unwrap();
    fs::set_permissions(agent.path("ca.key"), fs::Permissions::from_mode(0o644)).unwrap();
    check(start(&other, &["--config", &text(agent.path("config.yaml"))]), 1, "ca.key");
    fs::set_permissions(agent.path("ca.key"), fs::Permissions::from_mode(0o600)).unwrap();
    check(start(&other, &["--config", &text(agent.path("config.yaml"))]), 1, "ca.crt");
    assert!(!other.exists(), "no socket was left behind");
}

#[tokio::test]
async fn the_ca_outlives_the_process_and_nobody_else_can_read_it() {
    let mut agent = Agent::start(&policy()).await;
    let before = agent.issue(ask("a.example.org")).await.unwrap();
    agent.kill();
    agent.spawn().await;
    let after = agent.issue(ask("a.example.org")).await.unwrap();
    assert_eq!(before.trust_bundle, after.trust_bundle);
    assert_eq!(fs::metadata(agent.path("state")).unwrap().mode() & 0o777, 0o700);
    for file in fs::read_dir(agent.path("state")).unwrap() {
        let file = file.unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600, "{:?}", file.path());
    }
}

#[tokio::test]
async fn a_stopped_agent_leaves_no_socket_and_a_killed_ones_socket_is_taken_over() {
    let mut agent = Agent::start(&policy()).await;
    agent.kill();
    assert!(agent.socket().exists());
    agent.spawn().await;
    assert!(agent.terminate().await.success());
    assert!(!agent.socket().exists());
}

#[tokio::test]
async fn an_agent_killed_at_any_stage_hands_out_a_whole_certificate_or_none_and_starts_again() {
    use v1::{StageKind, issue_certificate_response::Event};
    let mut agent = Agent::start(&policy()).await;
    let roots = agent.issue(ask("a.example.org")).await.unwrap().trust_bundle;
    for last in [StageKind::Attested, StageKind::Granted, StageKind::Requested, StageKind::Issued] {
        let request = v1::IssueCertificateRequest { request: Some(ask("a.example.org")) };
        let mut answers = agent.client().await.issue_certificate(request).await.unwrap().into_inner();
        let mut certificate = None;
        loop {
            match answers.message().await {
                Ok(Some(v1::IssueCertificateResponse { event: Some(Event::Stage(stage)) })) if stage.kind() == last => {
                    agent.kill();
                }
                Ok(Some(v1::IssueCertificateResponse { event: Some(Event::Certificate(whole)) })) => {
                    certificate = Some(whole);
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        if let Some(certificate) = certificate {
            csrd::x509::Chain::from_pem(&certificate.certificate_chain).unwrap();
            csrd::x509::PrivateKey::from_pem(&certificate.private_key).unwrap();
        }
        agent.spawn().await;
        assert_eq!(agent.issue(ask("a.example.org")).await.unwrap().trust_bundle, roots, "after {last:?}");
    }
}
