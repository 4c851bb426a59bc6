//! Disks that are full or read-only, as real file systems in a mount namespace of the agent's own.

use std::{fs, process::Command};

use crate::{
    agent::{Agent, ask, follow, lasting, next_certificate, policy},
    attest::is_root,
};

/// A small file system at the state folder.
const SMALL: &str = "mkdir -p state && mount -t tmpfs -o size=64k,mode=0700 none state";
/// Takes what is left of it.
const FILL: &str = "{ cat /dev/zero > state/rest; true; } 2>/dev/null";
const READ_ONLY: &str = "mount -o remount,ro none state";

#[test]
fn a_first_start_on_a_disk_that_takes_nothing_names_the_path_and_what_to_do() {
    if !is_root("a_first_start_on_a_disk_that_takes_nothing_names_the_path_and_what_to_do") {
        return;
    }
    let check = |spoil: &str, words: &[&str]| {
        let agent = Agent::prepare(&policy()).mounting(&format!("{SMALL} && {spoil}"));
        let (code, said) = agent.refused_start();
        assert_eq!(code, Some(1), "{said}");
        for words in [&[agent.path("state").to_str().unwrap()], words].concat() {
            assert!(said.contains(words), "{said:?} does not say {words:?}");
        }
        assert!(!agent.socket().exists(), "no socket was left behind");
    };
    check(FILL, &["cannot write", "free space"]);
    check(READ_ONLY, &["cannot write", "read-only"]);
}

#[tokio::test]
async fn an_agent_that_runs_goes_on_when_its_disk_takes_nothing_more() {
    if !is_root("an_agent_that_runs_goes_on_when_its_disk_takes_nothing_more") {
        return;
    }
    let mut agent = Agent::prepare(&policy()).mounting(SMALL);
    agent.spawn().await;
    let mut stream = agent.subscribe(follow(lasting(2, ask("a.example.org")))).await.unwrap();
    let (mut sequence, _) = next_certificate(&mut stream).await.unwrap();
    for spoil in [FILL, READ_ONLY] {
        let mut inside = Command::new("nsenter");
        inside.args(["--mount", "--target", &agent.pid().to_string(), "sh", "-c"]);
        let script = format!("cd {} && {spoil}", agent.folder.path().display());
        assert!(inside.arg(script).status().unwrap().success());
        let root = format!("/proc/{}/root{}", agent.pid(), agent.path("state/more").display());
        assert!(fs::write(root, [0; 4096]).is_err(), "nothing more can be written");
        agent.issue(ask("b.example.org")).await.expect("a certificate needs no disk");
        let (renewed, _) = next_certificate(&mut stream).await.unwrap();
        assert!(renewed > sequence, "renewals go on");
        sequence = renewed;
    }
}
