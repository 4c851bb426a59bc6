//! `csrd issue`, `whoami` and `status` as processes: outputs, modes, exit codes, and where a key may appear.

use std::{fs, net::TcpListener, os::unix::fs::PermissionsExt as _, path::Path, process::Output};

use csrd::proto::v1::{
    self, IssueCertificateResponse, StageKind, certificate_request::Key, issue_certificate_response::Event,
};
use tonic::{Code, Status};

use crate::fake_agent::{Place, certificate, status};

impl Place {
    fn will_issue(&self) {
        let stage = v1::Stage {
            kind: StageKind::Granted.into(),
            detail: "policy \x1b[1mweb".into(),
            elapsed: Some(prost_types::Duration { seconds: 0, nanos: 410_000 }),
        };
        let events = [Event::Stage(stage), Event::Certificate(certificate("c1", 1, "a"))];
        self.agent.will_issue(events.map(|event| Ok(IssueCertificateResponse { event: Some(event) })).into());
    }

    fn will_refuse(&self, code: Code) {
        let refusal: Status = status(code, "SOME_REASON", "words");
        self.agent.will_issue(vec![Err(refusal)]);
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

fn read(path: impl AsRef<Path>) -> (String, u32) {
    (fs::read_to_string(&path).unwrap(), fs::metadata(&path).unwrap().permissions().mode() & 0o7777)
}

#[test]
fn a_folder_that_watch_keeps_is_refused_before_anything_is_asked_for() {
    let place = Place::new(vec![]);
    fs::create_dir(place.path("tls")).unwrap();
    std::os::unix::fs::symlink(".set", place.path("tls/..data")).unwrap();
    let output = place.run(&["issue", "--dns", "web.example.org", "--dir", "tls"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("tls is kept fresh by `csrd watch`: choose another folder"), "{output:?}");
    assert!(place.agent.issued().is_empty());
}

#[test]
fn files_have_their_modes_and_the_key_is_nowhere_else() {
    let place = Place::new(vec![]);
    place.will_issue();
    let output = place.run(&["issue", "--dns", "web.example.org", "--dir", "tls", "-v"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(read(place.path("tls/tls.crt")), ("chain a\n".into(), 0o644));
    assert_eq!(read(place.path("tls/tls.key")), ("key a\n".into(), 0o600));
    assert_eq!(read(place.path("tls/ca.crt")), ("roots a\n".into(), 0o644));
    assert_eq!(stdout(&output), "");
    let shown = stderr(&output);
    assert!(shown.starts_with("     0.41 ms  granted    policy \\u{1b}[1mweb\n"), "{shown}");
    assert!(!shown.contains("key a"), "{shown}");

    place.will_issue();
    let output = place.run(&["issue", "--combined", "both.pem"]);
    assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
    assert_eq!(read(place.path("both.pem")), ("key a\nchain a\n".into(), 0o600));
}

#[test]
fn stdout_carries_what_was_asked_for_by_name() {
    let place = Place::new(vec![]);
    let issue = |arguments: &[&str]| {
        place.will_issue();
        let output = place.run(&[&["issue"], arguments].concat());
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        stdout(&output).to_owned()
    };
    let json: serde_json::Value = serde_json::from_str(&issue(&["-o", "json"])).unwrap();
    assert_eq!((&json["private_key"], &json["policy"]), (&"key a\n".into(), &"web".into()));
    assert_eq!(issue(&["-o", "pem"]), "key a\nchain a\n");
    let secret = issue(&["-o", "secret", "--name", "web", "--namespace", "production"]);
    assert!(secret.contains("kind: Secret") && secret.contains("namespace: \"production\""), "{secret}");
    let left = fs::read_dir(place.path("")).unwrap().count();
    assert_eq!(left, 1, "only the socket: nothing was written to disk");
    fs::write(place.path("cluster.crt"), "-----BEGIN CERTIFICATE-----\nroots").unwrap();
    let config = issue(&["-o", "kubeconfig", "--server", "https://10.0.0.1:6443", "--server-ca", "cluster.crt"]);
    assert!(config.contains("server: \"https://10.0.0.1:6443\"") && config.contains("client-key-data: "), "{config}");
}

#[test]
fn the_request_is_what_the_flags_say() {
    let place = Place::new(vec![]);
    place.will_issue();
    let flags = "issue --cn web --org a --org b --dns x.example.org --ip 10.0.0.7 --uri spiffe://td/w --usage client-auth \
                 --lifetime 1h30m --key ed25519 --signer embedded --policy web -o pem";
    let output = place.run(&flags.split_whitespace().collect::<Vec<_>>());
    assert!(output.status.success(), "{output:?}");
    let expected = v1::CertificateRequest {
        common_name: "web".into(),
        organizations: vec!["a".into(), "b".into()],
        dns_names: vec!["x.example.org".into()],
        ip_addresses: vec!["10.0.0.7".into()],
        uris: vec!["spiffe://td/w".into()],
        usages: vec![v1::Usage::ClientAuth.into()],
        lifetime: Some(prost_types::Duration { seconds: 5400, nanos: 0 }),
        signer_name: "embedded".into(),
        policy: "web".into(),
        key: Some(Key::Generate(v1::KeyAlgorithm::Ed25519.into())),
    };
    assert_eq!(place.agent.issued()[0].request, Some(expected));

    let key = rcgen::KeyPair::generate().unwrap();
    let csr = rcgen::CertificateParams::new(["web.example.org".to_owned()]).unwrap().serialize_request(&key).unwrap();
    fs::write(place.path("csr.pem"), csr.pem().unwrap()).unwrap();
    place.will_issue();
    let output = place.run(&["issue", "--csr", "csr.pem", "-o", "pem"]);
    assert!(output.status.success(), "{output:?}");
    let held = v1::HeldKey { pkcs10: csr.der().to_vec().into(), rotate_key: false };
    let expected = v1::CertificateRequest { key: Some(Key::Held(held)), ..Default::default() };
    assert_eq!(place.agent.issued()[1].request, Some(expected));
}

#[test]
fn a_call_names_its_span_when_traces_are_sent() {
    let place = Place::new(vec![]);
    // A collector that takes connections and never answers.
    let collector = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", collector.local_addr().unwrap());
    place.will_issue();
    assert!(place.run(&["issue", "-o", "pem"]).status.success());
    place.will_issue();
    let mut traced = place.command(&["issue", "-o", "pem"]);
    traced.env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint).env("OTEL_EXPORTER_OTLP_TIMEOUT", "50");
    assert!(traced.output().unwrap().status.success());
    let [None, Some(traceparent)] = &place.agent.traceparents()[..] else { panic!("{:?}", place.agent.traceparents()) };
    // W3C Trace Context section 3.2.2: version, trace id, parent id, sampled.
    assert!(traceparent.starts_with("00-") && traceparent.ends_with("-01") && traceparent.len() == 55, "{traceparent}");

    let mut wrong = place.command(&["issue", "-o", "pem"]);
    let output = wrong.env("OTEL_TRACES_EXPORTER", "jaeger").output().unwrap();
    assert_eq!(output.status.code(), Some(64));
    assert!(stderr(&output).contains("OTEL_TRACES_EXPORTER must be otlp or none"), "{output:?}");
}

#[test]
fn an_end_has_its_exit_code() {
    fn check(refusal: Option<Code>, arguments: &[&str], code: i32, words: &str) {
        let place = Place::new(vec![]);
        if let Some(refusal) = refusal {
            place.will_refuse(refusal);
        }
        let output = place.run(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?} {output:?}");
        assert!(stderr(&output).contains(words), "{arguments:?} {output:?}");
    }
    check(Some(Code::PermissionDenied), &["issue"], 77, "csrd: words (SOME_REASON)\n");
    check(Some(Code::InvalidArgument), &["issue"], 64, "csrd: words (SOME_REASON)\n");
    check(Some(Code::Unavailable), &["issue"], 69, "csrd: words (SOME_REASON)\n");
    check(Some(Code::Internal), &["issue"], 1, "csrd: words (SOME_REASON)\n");
    check(None, &["status"], 77, "csrd: only root may list (NOT_YOURS)\n");
    check(None, &["issue", "--socket", "/nonexistent"], 69, "no agent answers at /nonexistent");
    check(None, &["issue", "--socket", "relative"], 64, "unix:///absolute/path");
    check(None, &["issue", "--lifetime", "soon"], 64, "write for example 90s");
    check(None, &["issue", "--key", "dsa"], 64, "must be ecdsa-p256");
    check(None, &["issue", "--usage", "code-signing"], 64, "must be server-auth");
    check(None, &["issue", "--csr", "x", "--cn", "web"], 64, "cannot be used with");
    check(None, &["issue", "--csr", "x", "--combined", "y"], 64, "cannot be used with");
    check(None, &["issue", "--csr", "/nonexistent"], 64, "--csr /nonexistent: cannot be read: No such file");
    check(
        None,
        &["issue", "--csr", "s", "-o", "secret", "--name", "web"],
        64,
        "-o secret and -o kubeconfig need the private key",
    );
    check(None, &["issue", "-o", "secret"], 64, "--name");
    check(None, &["issue", "-o", "secret", "--name", "Web"], 64, "must be 1 to 253");
    check(None, &["issue", "--name", "web"], 64, "--name is for -o secret");
    check(None, &["issue", "--namespace", "prod"], 64, "--name");
    check(None, &["issue", "-o", "kubeconfig"], 64, "--server");
    check(None, &["issue", "-o", "kubeconfig", "--server", "http://10.0.0.1"], 64, "must be the API server's address");
    check(None, &["issue", "--server", "https://10.0.0.1"], 64, "--server is for -o kubeconfig");
    let absent = ["issue", "-o", "kubeconfig", "--server", "https://a", "--server-ca", "/nonexistent"];
    check(None, &absent, 64, "--server-ca /nonexistent: it cannot be read");
    check(None, &["nonsense"], 64, "unrecognized subcommand");
    check(None, &[], 64, "Usage: csrd <COMMAND>");
    check(None, &["--version"], 0, "");
    check(None, &["issue", "--help"], 0, "");
}

#[test]
fn whoami_prints_plain_columns_into_a_pipe_and_json_when_told() {
    let place = Place::new(vec![]);
    let output = place.run(&["whoami"]);
    assert!(output.status.success(), "{output:?}");
    assert!(stdout(&output).starts_with("FACT      VALUE\nunix.uid  1000\n"), "{output:?}");
    let json: serde_json::Value = serde_json::from_str(stdout(&place.run(&["whoami", "-o", "json"]))).unwrap();
    assert_eq!(json["facts"]["unix.uid"], "1000");
}
