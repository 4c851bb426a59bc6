//! `csrd health` as a kubelet runs it: a process of its own, an exit code, and a line that says why not.

use std::{path::Path, process::Output};

use csrd::server::{admin::Readiness, health};
use tokio::{net::UnixListener, process::Command};
use tokio_util::sync::CancellationToken;

use crate::agent::{Agent, policy_for};

async fn run(socket: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_csrd"));
    command.arg("health").args(arguments).env("CSRD_SOCKET", socket).output().await.unwrap()
}

/// Asks for both; `expected` is what stderr has, with exit code 69, or `None` with 0.
async fn check(socket: &Path, ready: Option<&str>, live: Option<&str>) {
    let (asked, alive) = tokio::join!(run(socket, &[]), run(socket, &["--live"]));
    for (output, expected) in [(asked, ready), (alive, live)] {
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(if expected.is_some() { 69 } else { 0 }), "{said}");
        assert_eq!(said, expected.map(|why| format!("csrd: {why}\n")).unwrap_or_default());
        assert!(output.stdout.is_empty());
    }
}

#[tokio::test]
async fn an_agent_is_healthy_while_it_runs() {
    let agent = Agent::start(&policy_for(&[0])).await;
    let socket = agent.socket();
    check(&socket, None, None).await;
    drop(agent);
    let gone =
        format!("no agent answers at {}: No such file or directory (os error 2) (AGENT_UNREACHABLE)", socket.display());
    check(&socket, Some(&gone), Some(&gone)).await;
}

#[tokio::test]
async fn what_cannot_issue_is_alive_and_says_why_it_is_not_ready() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, readiness, stop) = (folder.path().join("s"), Readiness::new(), CancellationToken::new());
    let condition = readiness.condition("cluster");
    condition.fails("policies have not been listed\x1b[2J yet");
    let served = health::serve(UnixListener::bind(&socket).unwrap(), readiness, stop.clone());
    let asked = async {
        let why = "not ready: cluster: policies have not been listed\\u{1b}[2J yet";
        check(&socket, Some(why), None).await;
        condition.holds();
        check(&socket, None, None).await;
        stop.cancel();
    };
    tokio::join!(served, asked);
}

#[tokio::test]
async fn what_listens_and_does_not_answer_is_not_alive() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let _listening = UnixListener::bind(&socket).unwrap();
    let silent = format!("{} does not answer within 3 s (AGENT_UNREACHABLE)", socket.display());
    check(&socket, Some(&silent), Some(&silent)).await;
}
