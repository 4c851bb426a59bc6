//! A real `csrd agent`: its own process, a real socket, a CA on disk; killed and started again as operators do.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::PathBuf,
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
    /// Run by this shell script, in a mount namespace of its own, whose arguments are the agent's command line.
    script: Option<String>,
    variables: Vec<(String, String)>,
}

impl Agent {
    /// An agent whose policies are `policy`, ready to serve.
    pub(crate) async fn start(policy: &str) -> Self {
        Self::start_with(policy, &[]).await
    }

    /// Likewise, with environment variables.
    pub(crate) async fn start_with(policy: &str, variables: &[(&str, &str)]) -> Self {
        let mut agent = Self::prepare(policy);
        agent.variables = variables.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        agent.spawn().await;
        agent
    }

    /// An agent that is yet to be spawned.
    pub(crate) fn prepare(policy: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // An agent refuses policies that a group may write, as some users' umask has it.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        // Other users' clients must be able to reach the socket.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(folder.path().join("policy.yaml"), policy).unwrap();
        Self { child: None, folder, script: None, variables: Vec::new() }
    }

    /// Lets `script` make the agent's mounts; it finds the agent's folder as its working directory. Needs root.
    pub(crate) fn mounting(mut self, script: &str) -> Self {
        self.script = Some(format!("{script} && exec \"$@\""));
        self
    }

    pub(crate) fn serve(&self) -> Command {
        let program = env!("CARGO_BIN_EXE_csrd");
        let mut command = match &self.script {
            None => Command::new(program),
            Some(script) => {
                let mut command = Command::new("unshare");
                command.args(["--mount", "sh", "-c", script, "sh", program]);
                command
            }
        };
        command.arg("agent").arg("--socket").arg(self.socket()).arg("--state-dir").arg(self.path("state"));
        command.arg("--policy").arg(self.path("policy.yaml")).current_dir(self.folder.path());
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }

    /// The exit code and the words of an agent that must not start.
    pub(crate) fn refused_start(&self) -> (Option<i32>, String) {
        let output = self.serve().output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    pub(crate) async fn spawn(&mut self) {
        let mut command = self.serve();
        command.stderr(fs::File::create(self.path("log")).unwrap());
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

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
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

    pub(crate) async fn issue(&self, request: v1::CertificateRequest) -> Result<v1::Certificate, Status> {
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

    pub(crate) async fn subscribe(
        &self,
        request: v1::SubscribeRequest,
    ) -> Result<Streaming<v1::SubscribeResponse>, Status> {
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

pub(crate) fn ask(name: &str) -> v1::CertificateRequest {
    v1::CertificateRequest { dns_names: vec![name.to_owned()], ..Default::default() }
}

pub(crate) fn lasting(seconds: i64, request: v1::CertificateRequest) -> v1::CertificateRequest {
    v1::CertificateRequest { lifetime: Some(prost_types::Duration { seconds, nanos: 0 }), ..request }
}

pub(crate) fn follow(request: v1::CertificateRequest) -> v1::SubscribeRequest {
    v1::SubscribeRequest { request: Some(request), ..Default::default() }
}

/// The next certificate of a stream, with its sequence.
pub(crate) async fn next_certificate(
    stream: &mut Streaming<v1::SubscribeResponse>,
) -> Result<(u64, v1::Certificate), Status> {
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
        let (told, mut all_told) = tokio::sync::mpsc::channel::<()>(1);
        for (mut resume, mut last, mut not_after) in seen.drain(..) {
            let mut client = agent.client().await;
            let mut told = Some(told.clone());
            followers.spawn(async move {
                let mut stream = client.subscribe(resume.clone()).await.unwrap().into_inner();
                loop {
                    match next_certificate(&mut stream).await {
                        Ok((sequence, certificate)) => {
                            let ends = certificate.not_after.unwrap().seconds;
                            assert!(sequence > last, "{sequence} after {last}");
                            assert!(ends >= not_after, "an older certificate after a newer one");
                            (last, not_after) = (sequence, ends);
                            drop(told.take());
                            resume.certificate_id = certificate.certificate_id;
                            resume.after_sequence = sequence;
                        }
                        Err(status) => break (status, (resume, last, not_after)),
                    }
                }
            });
        }
        drop(told);
        timeout(PATIENCE, all_told.recv()).await.expect("every follower has a certificate");
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
    let read = async {
        while !fs::read_to_string(agent.path("log")).unwrap().contains("the last good set stays in force") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, read).await.expect("the file is read");
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

/// When an agent dies in the course of an issuance.
#[derive(Debug, Clone, Copy)]
enum Death {
    /// So long after the request began to be sent.
    After(Duration),
    /// When the caller has read this stage; the agent is further by then.
    At(v1::StageKind),
    /// When the caller has read it all.
    Afterwards,
}

#[tokio::test]
async fn whenever_an_agent_is_killed_its_caller_has_a_whole_certificate_or_none_and_the_ca_is_kept() {
    use v1::StageKind::{Attested, Granted, Issued, Requested};
    const STEPS: u32 = 32;
    const STEP: Duration = Duration::from_micros(120);
    let mut agent = Agent::start(&policy()).await;
    let roots = agent.issue(ask("a.example.org")).await.unwrap().trust_bundle;
    let deaths = (0..STEPS).map(|step| Death::After(STEP * step));
    let deaths = deaths.chain([Attested, Granted, Requested, Issued].map(Death::At)).chain([Death::Afterwards]);
    for (round, death) in deaths.enumerate() {
        let certificate = issue_until(&mut agent, death).await;
        match round as u32 {
            0 => assert!(certificate.is_none(), "nothing had been sent"),
            // All but the last two rounds end in the hands of the scheduler.
            round if round > STEPS + 3 => assert!(certificate.is_some()),
            _ => {}
        }
        if let Some(certificate) = certificate {
            check_whole(&certificate, &roots);
        }
        agent.spawn().await;
        assert_eq!(agent.issue(ask("a.example.org")).await.unwrap().trust_bundle, roots, "{death:?}");
    }
}

/// Asks for a certificate of an agent that is killed; returns the certificate if it arrived.
async fn issue_until(agent: &mut Agent, death: Death) -> Option<v1::Certificate> {
    use v1::issue_certificate_response::Event;
    const MAX_STAGES: usize = 8;
    let mut client = agent.client().await;
    let (tell, mut told) = tokio::sync::mpsc::channel(MAX_STAGES);
    let mut call = JoinSet::new();
    call.spawn(async move {
        let request = v1::IssueCertificateRequest { request: Some(ask("a.example.org")) };
        let mut answers = client.issue_certificate(request).await.ok()?.into_inner();
        let mut certificate = None;
        while let Ok(Some(answer)) = answers.message().await {
            match answer.event.expect("no event is empty") {
                Event::Stage(stage) => tell.try_send(stage.kind()).expect("each stage is sent once"),
                Event::Certificate(whole) => certificate = Some(whole),
            }
        }
        certificate
    });
    match death {
        Death::After(delay) => {
            // Timers are too coarse.
            let began = tokio::time::Instant::now();
            while began.elapsed() < delay {
                tokio::task::yield_now().await;
            }
        }
        Death::At(last) => while told.recv().await.expect("each stage is told") != last {},
        Death::Afterwards => while told.recv().await.is_some() {},
    }
    agent.kill();
    call.join_next().await.unwrap().unwrap()
}

/// Chain and key belong together and lead to the roots.
fn check_whole(certificate: &v1::Certificate, roots: &[u8]) {
    use csrd::x509::{Bundle, Chain, DnsName, Expected, Names, PrivateKey, Usage};
    assert_eq!(certificate.trust_bundle, roots);
    let key = PrivateKey::from_pem(&certificate.private_key).unwrap();
    let names = Names { dns: vec![DnsName::parse("a.example.org").unwrap()], ..Names::default() };
    let expected = Expected {
        names: &names,
        usages: [Usage::DigitalSignature, Usage::ServerAuth, Usage::ClientAuth].into_iter().collect(),
        public_key: key.public_key(),
        lifetime: Duration::from_secs(3600),
        now: csrd::clock::Clock::system().now(),
    };
    let chain = Chain::from_pem(&certificate.certificate_chain).unwrap();
    chain.verify(&Bundle::from_pem(roots).unwrap(), &expected).unwrap();
}
