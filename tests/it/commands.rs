//! Commands that need no agent, as processes.

use std::{
    fs,
    process::{Command, Output},
};

fn csrd(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_csrd")).args(arguments).env_remove("CSRD_SOCKET").output().unwrap()
}

#[test]
fn a_demo_of_one_renewal_shows_it_all_and_ends_well() {
    let shown = csrd(&["demo", "--renewals", "1"]);
    assert!(shown.status.success(), "{shown:?}");
    let text = String::from_utf8(shown.stdout).unwrap();
    let mut rest = text.as_str();
    let begin = ["agent ", "policy ", "attested", "granted", "issued ", "handshake ", "renewal 1 ", "handshake "];
    for words in begin {
        let at = rest.find(words).unwrap_or_else(|| panic!("no {words:?} where it should be in:\n{text}"));
        rest = &rest[at + words.len()..];
    }
    assert_eq!(text.matches("mutual TLS").count(), 2, "{text}");
}

#[test]
fn a_policy_check_ends_with_what_was_decided() {
    let folder = tempfile::tempdir().unwrap();
    let (good, bad) = (folder.path().join("good.yaml"), folder.path().join("bad.yaml"));
    let policy = crate::agent::policy_for(&[1000]);
    fs::write(&good, &policy).unwrap();
    fs::write(&bad, policy.replace("dnsNames", "dnsName")).unwrap();
    let check = |file: &std::path::Path, flags: &str, code: i32, words: &str| {
        let arguments = ["policy", "check", file.to_str().unwrap()].into_iter().chain(flags.split_whitespace());
        let output = csrd(&arguments.collect::<Vec<_>>());
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(words), "{said:?} does not say {words:?}");
    };
    check(&good, "--uid 1000 --dns a.example.org", 0, "policy test grants");
    check(&good, "--uid 1000 --dns a.example.com", 77, "denied: NAME_NOT_ALLOWED");
    check(&good, "--uid 1001 --dns a.example.org", 77, "uid 1001 is not among its uids");
    check(&good, "--uid 1000 --dns A.example.org", 64, "A.example.org");
    check(&good, "--dns a.example.org", 64, "--uid");
    check(&bad, "--uid 1000", 64, "bad.yaml:8: spec.allow.dnsName");
    check(&folder.path().join("none"), "--uid 1000", 64, "none");
}

#[test]
fn the_definition_in_deploy_is_the_one_that_is_printed() {
    let printed = csrd(&["crd"]);
    assert!(printed.status.success(), "{printed:?}");
    let kept = include_str!("../../deploy/kubernetes/base/crd.yaml");
    assert!(String::from_utf8(printed.stdout).unwrap() == kept, "csrd crd > deploy/kubernetes/base/crd.yaml");
}

#[test]
fn a_kubeconfig_that_cannot_be_read_is_a_mistake_of_whoever_started() {
    let folder = tempfile::tempdir().unwrap();
    let absent = folder.path().join("absent").display().to_string();
    for (command, config) in [("agent", "{kubernetes: {kubeconfig: ABSENT}}"), ("controller", "{kubeconfig: ABSENT}")] {
        let file = folder.path().join(command);
        fs::write(&file, config.replace("ABSENT", &absent)).unwrap();
        let output = csrd(&[command, "--config", file.to_str().unwrap()]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{said}");
        assert!(said.contains(&absent) && said.matches("No such file").count() == 1, "{said}");
    }
}
