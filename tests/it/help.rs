//! What `--help` says, of every command: a change is a change of the interface.

use std::process::Command;

fn help(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_csrd"))
        .args(arguments)
        .arg("--help")
        .env_remove("COLUMNS")
        .env_remove("CSRD_SOCKET")
        .output()
        .unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_help_of_every_command() {
    insta::assert_snapshot!("csrd", help(&[]));
    for command in
        ["demo", "agent", "controller", "issue", "watch", "whoami", "status", "health", "policy", "crd", "completion"]
    {
        insta::assert_snapshot!(command, help(&[command]));
    }
    insta::assert_snapshot!("policy_check", help(&["policy", "check"]));
}
