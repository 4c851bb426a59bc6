//! An agent that cannot work does not start: it says why, in words that name the file or the field, and leaves no socket.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose};

use crate::{
    agent::{Agent, ask, policy},
    attest::is_root,
};

const FAILED: i32 = 1;
const USAGE: i32 = 64;

/// Starts another agent beside `agent`, which must not come up: checks its exit code and what it says.
fn check(agent: &Agent, socket: &Path, flags: &[(&str, &Path)], code: i32, words: &[&str]) {
    let (state, policy) = (agent.path("other-state"), agent.path("policy.yaml"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_csrd"));
    command.arg("agent").arg("--socket").arg(socket).arg("--policy").arg(policy);
    if flags.iter().all(|(flag, _)| *flag != "--state-dir") {
        command.arg("--state-dir").arg(state);
    }
    for (flag, path) in flags {
        command.arg(flag).arg(path);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    for words in words {
        assert!(said.contains(words), "{said:?} does not say {words:?}");
    }
}

fn write(agent: &Agent, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = agent.path(name);
    fs::write(&path, content).unwrap();
    path
}

#[tokio::test]
async fn a_socket_that_cannot_be_had_is_named_with_the_reason() {
    let agent = Agent::start(&policy()).await;
    check(&agent, &agent.socket(), &[], FAILED, &["is in use by another process"]);
    fs::create_dir(agent.path("folder")).unwrap();
    check(&agent, &agent.path("folder"), &[], FAILED, &["is no socket"]);
    check(&agent, &agent.path(&"x".repeat(108)), &[], USAGE, &["at most 107"]);
    check(&agent, &agent.path("nowhere/s"), &[], FAILED, &["cannot listen on"]);
}

#[tokio::test]
async fn a_file_that_is_not_valid_is_named_with_the_field() {
    let agent = Agent::start(&policy()).await;
    let other = agent.path("other.sock");
    let config = write(&agent, "config.yaml", "sockt: x\n");
    check(&agent, &other, &[("--config", &config)], USAGE, &["config.yaml", "sockt"]);
    let state = write(&agent, "file", "");
    check(&agent, &other, &[("--state-dir", &state)], FAILED, &["file"]);
    assert!(!other.exists(), "no socket was left behind");
}

#[test]
fn a_policy_that_is_not_valid_or_could_take_too_long_is_named_with_its_field_and_bound() {
    fn check(policy: &str, words: &[&str]) {
        let agent = Agent::prepare(policy);
        let (code, said) = agent.refused_start();
        assert_eq!(code, Some(USAGE), "{said}");
        for words in [&["policy.yaml"], words].concat() {
            assert!(said.contains(words), "{said:?} does not say {words:?}");
        }
        assert!(!agent.socket().exists(), "no socket was left behind");
    }
    const BOUND: usize = 1 << 20;
    check("apiVersion: csrd.dev/v1alpha1\nkind: Nonsense\n", &["kind"]);
    let long = format!("{}#{}", policy(), "x".repeat(BOUND - policy().len()));
    assert_eq!(long.len(), BOUND + 1);
    check(&long, &["more than 1048576 bytes"]);
    let rule = "[1, 2, 3].all(x, ".repeat(20) + "true" + &")".repeat(20);
    let endless = format!("{}  rules: [{{expression: '{rule}', message: no}}]\n", policy());
    check(&endless, &["spec.rules[0]", "steps on the largest request"]);
    check(&policy().replace("*.example.org", &"*".repeat(200)), &["spec.allow.dnsNames[0]", "whole label"]);
    check(&policy().replace("*.example.org", &["*"; 60].join(".")), &["spec.allow.dnsNames[0]", "must not be '*'"]);
}

#[tokio::test]
async fn a_ca_that_cannot_be_used_is_named_with_the_reason() {
    let agent = Agent::start(&policy()).await;
    let other = agent.path("other.sock");
    let (certificate, key) = (agent.path("ca.crt"), agent.path("ca.key"));
    let embedded = format!("{{caCertificate: {}, caKey: {}}}", certificate.display(), key.display());
    let config = write(&agent, "config.yaml", format!("signer: {{embedded: {embedded}}}\n"));
    let refused = |words: &[&str]| check(&agent, &other, &[("--config", &config)], FAILED, words);

    let ca = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    write(&agent, "ca.crt", params.self_signed(&ca).unwrap().pem());
    write(&agent, "ca.key", ca.serialize_pem());
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    refused(&["ca.key", "mode 0644", "chmod 0600"]);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    write(&agent, "ca.key", KeyPair::generate().unwrap().serialize_pem());
    refused(&["ca.crt", "the private key does not belong to the first certificate"]);

    let leaf = agent.issue(ask("a.example.org")).await.unwrap();
    write(&agent, "ca.crt", leaf.certificate_chain);
    write(&agent, "ca.key", leaf.private_key);
    refused(&["ca.crt", "the first certificate is no CA"]);
    assert!(!other.exists(), "no socket was left behind");
}

#[test]
fn policies_that_others_may_write_are_refused_with_the_command_that_mends_it() {
    let agent = Agent::prepare(&policy());
    let file = agent.path("policy.yaml");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o664)).unwrap();
    let (code, said) = agent.refused_start();
    assert_eq!(code, Some(USAGE), "{said}");
    let expected = format!("group or others may write to {0} (mode 0664); run: chmod go-w {0}", file.display());
    assert!(said.contains(&expected), "{said}");
    assert!(!agent.socket().exists());
}

/// As a ConfigMap volume has it, in which others can write nothing because it is mounted read-only.
#[tokio::test]
async fn policies_in_a_volume_that_is_read_only_may_have_any_mode() {
    if !is_root("policies in a volume that is read-only") {
        return;
    }
    let volume = "mv policy.yaml p && mkdir policy.yaml && mount -t tmpfs -o mode=0777 none policy.yaml \
        && cp p policy.yaml/a.yaml";
    let (code, said) = Agent::prepare(&policy()).mounting(volume).refused_start();
    assert_eq!(code, Some(USAGE), "{said}");
    assert!(said.contains("(mode 0777); run: chmod go-w"), "{said}");
    Agent::prepare(&policy()).mounting(&format!("{volume} && mount -o remount,ro policy.yaml")).spawn().await;
}
