//! A caller whose program's path holds whole lines and codes of a terminal: what logs, tables and answers make of it.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Command, Output},
};

use csrd::text::is_shown;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    agent::{Agent, policy_for},
    attest::is_root,
};

/// Without any policy.
const STRANGER: u32 = 54_321;
/// With one.
const USER: u32 = 54_322;
/// The name of the program.
const NAME: &str = "web\n2026-11-29T00:00:00.000000Z  INFO csrd::hub::flight: certificate issued workload=root\r\x1b[2J\u{9b}1m\u{202e}";
/// The same, as it is shown.
const SHOWN: &str = r"web\n2026-11-29T00:00:00.000000Z  INFO csrd::hub::flight: certificate issued workload=root\r\u{1b}[2J\u{9b}1m\u{202e}";

struct Scene {
    agent: Agent,
    program: PathBuf,
    _folder: TempDir,
}

impl Scene {
    /// An agent that logs as `config` says, and a program with a false name.
    async fn new(config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (file, program) = (folder.path().join("config"), folder.path().join(NAME));
        fs::write(&file, config).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_csrd"), &program).unwrap();
        let agent = Agent::start_with(&policy_for(&[USER]), &[("CSRD_CONFIG", file.to_str().unwrap())]).await;
        Self { agent, program, _folder: folder }
    }

    /// What the program makes of `arguments`, run by `uid`.
    fn run(&self, uid: u32, arguments: &[&str]) -> Output {
        use std::os::unix::process::CommandExt as _;
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env("CSRD_SOCKET", self.agent.socket())
            .uid(uid)
            .gid(uid)
            .current_dir("/")
            .output()
            .unwrap()
    }

    /// The log, once it says `words`.
    #[allow(clippy::disallowed_methods, reason = "no runtime runs here")]
    fn log(&self, words: &str) -> String {
        for _ in 0..1000 {
            let log = fs::read_to_string(self.agent.path("log")).unwrap();
            if log.contains(words) {
                return log;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("the log never says {words:?}");
    }
}

fn steers(text: &str) -> bool {
    text.contains(|c: char| c != '\n' && !is_shown(c))
}

fn text(bytes: Vec<u8>) -> String {
    let text = String::from_utf8(bytes).unwrap();
    assert!(!steers(&text), "{text:?}");
    text
}

#[tokio::test]
async fn a_path_writes_no_line_of_the_log_and_no_code_of_a_terminal() {
    if !is_root("a_path_writes_no_line_of_the_log_and_no_code_of_a_terminal") {
        return;
    }
    let scene = Scene::new("log: {level: debug}").await;
    let refused = scene.run(STRANGER, &["issue", "--dns", "a.example.org", "-o", "pem"]);
    assert_eq!(refused.status.code(), Some(77));
    let said = text(refused.stderr);
    assert!(said.lines().count() == 1 && said.contains(SHOWN), "{said}");
    assert!(scene.run(USER, &["issue", "--dns", "a.example.org", "-o", "pem"]).status.success());
    let log = scene.log(" certificate issued ");
    assert!(!steers(&log), "{log:?}");
    let begins = |line: &&str| line.starts_with("20") && line.as_bytes()[4] == b'-' && line.contains('Z');
    assert!(log.lines().all(|line| begins(&line)), "{log}");
    // The message of a line comes after its target, and before its fields.
    let lines = |words: &str| {
        log.lines().filter(|line| line.split(" workload=").next().unwrap().ends_with(words)).collect::<Vec<_>>()
    };
    let [issued] = lines(": certificate issued")[..] else { panic!("not one line in {log}") };
    let [denied] = lines(": denied")[..] else { panic!("not one line in {log}") };
    let folder = scene.program.parent().unwrap().display().to_string();
    let workload = |uid| format!(r#" workload="uid {uid} {folder}/{}" "#, SHOWN.replace('\\', r"\\"));
    assert!(issued.contains(&workload(USER)) && issued.ends_with(r#" signer="embedded""#), "{issued}");
    assert!(denied.contains(&workload(STRANGER)) && denied.contains(r#" reason="NO_POLICY_MATCHES" "#), "{denied}");
    // Fields of spans are there too.
    assert!(log.lines().any(|line| line.contains(" DEBUG ") && line.contains("{") && line.contains("=")), "{log}");
}

#[tokio::test]
async fn a_path_draws_no_row_of_a_table_and_means_the_same_in_json() {
    if !is_root("a_path_draws_no_row_of_a_table_and_means_the_same_in_json") {
        return;
    }
    let scene = Scene::new("log: {format: json}").await;
    assert!(scene.run(USER, &["issue", "--dns", "a.example.org", "-o", "pem"]).status.success());
    let log = scene.log("certificate issued\"");
    assert!(!steers(&log), "{log:?}");
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let issued: Vec<_> = lines.iter().filter(|line| line["message"] == "certificate issued").collect();
    let shown = scene.program.parent().unwrap().join(SHOWN).display().to_string();
    assert_eq!(issued.len(), 1);
    assert_eq!(issued[0]["workload"], format!("uid {USER} {shown}"));

    let own = text(scene.run(USER, &["whoami"]).stdout);
    assert!(own.contains(&shown), "{own}");
    assert!(own.lines().all(|line| !line.starts_with("2026")), "{own}");
    let own: Value = serde_json::from_str(&text(scene.run(USER, &["whoami", "-o", "json"]).stdout)).unwrap();
    assert_eq!(own["facts"]["unix.executable"], scene.program.to_str().unwrap());

    let status = text(scene.run(0, &["status"]).stdout);
    assert_eq!(status.lines().count(), 2, "a header and a credential: {status}");
    assert!(status.contains(&shown), "{status}");
    let status: Value = serde_json::from_str(&text(scene.run(0, &["status", "-o", "json"]).stdout)).unwrap();
    assert_eq!(status["credentials"][0]["workload"], format!("uid {USER} {shown}"));
}
