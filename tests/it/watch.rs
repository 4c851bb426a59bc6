//! `csrd watch` as a process: files, whoever is told, signals, exit codes.

use std::{
    fs,
    io::{BufRead as _, BufReader, Lines},
    os::unix::{
        fs::{MetadataExt as _, chown},
        process::ExitStatusExt as _,
    },
    path::Path,
    process::{Child, ChildStderr, ChildStdout, Command, Stdio},
    time::Duration,
};

use csrd::{
    proto::v1::{self, subscribe_response::Event},
    text::is_shown,
};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use tonic::Code;

use crate::{
    attest::is_root,
    fake_agent::{Place, current, event, renewed, status},
};

/// So often is looked for what takes a moment; a minute is far above it, for a machine under load.
const TRIES: usize = 6000;
const POLL: Duration = Duration::from_millis(10);

impl Place {
    fn watch(&self, arguments: &[&str]) -> Watch {
        let mut command = self.command(&[&["watch"], arguments].concat());
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(process.stdout.take().unwrap()).lines();
        let stderr = BufReader::new(process.stderr.take().unwrap()).lines();
        Watch { process, stdout, stderr }
    }
}

struct Watch {
    process: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    stderr: Lines<BufReader<ChildStderr>>,
}

impl Watch {
    /// Reads stdout up to the line that begins with `start`.
    fn line(&mut self, start: &str) -> String {
        find(&mut self.stdout, start)
    }

    /// Waits until the agent has more subscriptions than `before`.
    #[allow(clippy::disallowed_methods, reason = "no runtime runs here")]
    fn subscribes(&mut self, place: &Place, before: usize) {
        for _ in 0..TRIES {
            if place.agent.subscribed().len() > before {
                return;
            }
            assert_eq!(self.process.try_wait().unwrap(), None, "it has ended");
            std::thread::sleep(POLL);
        }
        panic!("it does not subscribe");
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    fn code(&mut self) -> Option<i32> {
        self.process.wait().unwrap().code()
    }
}

/// A test that fails leaves no process behind.
impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn find(lines: &mut impl Iterator<Item = std::io::Result<String>>, start: &str) -> String {
    let mut seen = Vec::new();
    for line in lines {
        let line = line.unwrap();
        if line.starts_with(start) {
            return line;
        }
        seen.push(line);
    }
    panic!("no line begins with {start:?}: {seen:#?}");
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.as_ref().display()))
}

#[test]
fn once_writes_tells_and_exits() {
    let place = Place::new(vec![Ok(current("c1", 1, "a"))]);
    let mut watch = place.watch(&["--dir", "tls", "--once", "--exec", "cp tls/tls.crt copy"]);
    assert_eq!(watch.code(), Some(0));
    assert_eq!(read(place.path("tls/tls.key")), "key a\n");
    assert_eq!(read(place.path("copy")), "chain a\n");
    assert_eq!(watch.line("written"), "written: tls");
    assert_eq!(watch.line("notified"), "notified: cp tls/tls.crt copy");

    for (failing, words) in [
        (["--dir", "s", "--exec", "true"], "cannot make the folder s"),
        (["--dir", "tls", "--exec", "false"], "false: exit status: 1"),
        (["--dir", "tls", "--pid-file", "absent"], "pid file absent"),
    ] {
        let place = Place::new(vec![Ok(current("c1", 1, "a"))]);
        let mut watch = place.watch(&[&failing[..], &["--once"]].concat());
        assert_eq!(watch.code(), Some(1), "{failing:?}");
        find(&mut watch.stderr, &format!("csrd: {words}"));
    }
}

#[test]
fn a_child_starts_with_the_files_is_told_gets_signals_and_gives_its_code() {
    let place = Place::new(vec![]);
    let script = "trap 'echo hup $(cat tls/tls.crt)' HUP; trap 'echo usr2' USR2; trap 'exit 7' TERM
                  echo ready $(cat tls/tls.crt); while :; do sleep 0.02; done";
    let mut watch = place.watch(&["--dir", "tls", "--", "sh", "-c", script]);
    // Until there is a certificate, there is no child.
    watch.subscribes(&place, 0);
    place.agent.push(current("c1", 1, "a"));
    assert_eq!(watch.line(""), "ready chain a");
    place.agent.push(renewed("c1", 2, "b"));
    assert_eq!(watch.line(""), "hup chain b");
    // The same files again are no change.
    place.agent.push(current("c1", 3, "b"));
    place.agent.push(renewed("c1", 4, "c"));
    assert_eq!(watch.line(""), "hup chain c");
    watch.signal(Signal::USR2);
    assert_eq!(watch.line(""), "usr2");
    watch.signal(Signal::TERM);
    assert_eq!(watch.code(), Some(7));
    // Our own lines leave stdout to the child.
    find(&mut watch.stderr, "renewed");
}

#[test]
fn a_child_that_is_killed_or_cannot_start_is_told_apart() {
    fn check(command: &[&str], code: i32) {
        let place = Place::new(vec![Ok(current("c1", 1, "a"))]);
        let mut watch = place.watch(&[&["--dir", "tls", "--"], command].concat());
        assert_eq!(watch.code(), Some(code), "{command:?}");
    }
    check(&["sh", "-c", "exit 0"], 0);
    check(&["sh", "-c", "exit 77"], 77);
    check(&["sh", "-c", "kill -KILL $$"], 128 + 9);
    check(&["sh", "-c", "kill -TERM $$"], 128 + 15);
    check(&["/nonexistent/program"], 1);
}

#[test]
fn a_refusal_ends_a_watch_but_not_its_child() {
    let denied = || {
        let denied = v1::Denied { reason: "POLICY_CHANGED".into(), message: "policy web no longer matches".into() };
        vec![Ok(current("c1", 1, "a")), Ok(event(2, Event::Denied(denied)))]
    };
    let place = Place::new(denied());
    let mut watch = place.watch(&["--dir", "tls"]);
    assert_eq!(watch.code(), Some(77));
    assert_eq!(watch.line("refused"), "refused: policy web no longer matches (POLICY_CHANGED)");
    assert_eq!(read(place.path("tls/tls.key")), "key a\n", "the certificate is valid until it expires");

    let place = Place::new(denied());
    let script = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.02; done";
    let mut watch = place.watch(&["--dir", "tls", "--", "sh", "-c", script]);
    find(&mut watch.stderr, "refused");
    // The refusal may be here before the shell has set its trap.
    assert_eq!(watch.line(""), "ready");
    watch.signal(Signal::TERM);
    assert_eq!(watch.code(), Some(5));

    let place = Place::new(vec![Err(status(Code::InvalidArgument, "BAD_NAME", "dns_names: no"))]);
    let mut watch = place.watch(&["--dir", "tls", "--", "true"]);
    assert_eq!(watch.code(), Some(64));
    assert!(!place.path("tls").exists());
}

#[test]
fn a_signal_ends_a_watch_well_unless_its_program_never_ran() {
    fn check(arguments: &[&str], signal: Signal, code: i32) {
        let place = Place::new(vec![]);
        let mut watch = place.watch(&[&["--dir", "tls"], arguments].concat());
        watch.subscribes(&place, 0);
        watch.signal(signal);
        assert_eq!(watch.code(), Some(code), "{arguments:?} {signal:?}");
    }
    check(&[], Signal::TERM, 0);
    check(&[], Signal::INT, 0);
    check(&[], Signal::HUP, 0);
    check(&["--", "true"], Signal::TERM, 128 + 15);
}

#[test]
fn the_process_of_a_pid_file_is_signalled_after_each_change() {
    let place = Place::new(vec![Ok(current("c1", 1, "a"))]);
    let script = "trap 'cat both.pem' USR1; echo $$ > pid; echo ready; while :; do sleep 0.02; done";
    let mut reader =
        Command::new("sh").args(["-c", script]).current_dir(place.path("")).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(reader.stdout.take().unwrap()).lines();
    find(&mut lines, "ready");
    let mut watch = place.watch(&["--combined", "both.pem", "--pid-file", "pid", "--signal", "USR1"]);
    find(&mut lines, "chain a");
    watch.line("notified: SIGUSR1 to process ");
    // A combined file holds no roots, so new ones change nothing.
    let roots = v1::TrustBundleUpdated { trust_bundle: "roots b\n".into() };
    place.agent.push(event(2, Event::TrustBundleUpdated(roots)));
    place.agent.push(renewed("c1", 3, "b"));
    watch.line("trust bundle updated");
    assert!(watch.line("").starts_with("renewed"));
    find(&mut lines, "chain b");
    reader.kill().unwrap();
    reader.wait().unwrap();
}

#[test]
fn flags_that_contradict_each_other_are_refused() {
    fn check(arguments: &[&str], words: &str) {
        let place = Place::new(vec![]);
        let mut watch = place.watch(arguments);
        assert_eq!(watch.code(), Some(64), "{arguments:?}");
        let said: Vec<_> = watch.stderr.by_ref().map(Result::unwrap).collect();
        assert!(said.join("\n").contains(words), "{arguments:?}: {said:#?}");
        assert!(place.agent.subscribed().is_empty());
    }
    check(&[], "--dir <DIR>");
    check(&["--dir", "a", "--combined", "b"], "cannot be used with");
    check(&["--combined", "b", "--csr", "c"], "cannot be used with");
    check(&["--dir", "a", "--once", "--", "true"], "cannot be used with");
    check(&["--dir", "a", "--pid-file", "p", "--", "true"], "cannot be used with");
    check(&["--dir", "a", "--signal", "HUP"], "required arguments were not provided");
    check(&["--dir", "a", "--signal", "KILL", "--", "true"], "must be HUP, INT");
    check(&["--dir", "a", "--mode", "0644"], "give nothing to others");
    check(&["--dir", "a", "--owner", "www"], "UID:GID");
    check(&["--dir", "a", "--exec", " "], "must name a program");
}

#[test]
fn root_is_told_of_a_folder_that_others_may_change_before_anything_is_asked_for() {
    if !is_root("root_is_told_of_a_folder_that_others_may_change_before_anything_is_asked_for") {
        return;
    }
    let place = Place::new(vec![Ok(current("c1", 1, "a"))]);
    fs::create_dir(place.path("tls")).unwrap();
    chown(place.path("tls"), Some(3003), Some(3003)).unwrap();
    for arguments in [&["watch", "--dir", "tls"][..], &["watch", "--combined", "tls/both"], &["issue", "--dir", "tls"]]
    {
        let output = place.command(arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{said}");
        for words in ["/tls is not root's alone (owner 3003, mode 0755)", "run csrd as user 3003", "--shared-folder"] {
            assert!(said.contains(words), "{said:?} does not say {words:?}");
        }
    }
    assert!(place.agent.subscribed().is_empty() && place.agent.issued().is_empty());
    assert_eq!(fs::read_dir(place.path("tls")).unwrap().count(), 0);
    let mut watch = place.watch(&["--dir", "tls", "--owner", "3003:3003", "--once", "--shared-folder"]);
    assert_eq!(watch.code(), Some(0));
    assert_eq!(fs::metadata(place.path("tls/tls.key")).unwrap().uid(), 3003);
    assert_eq!(read(place.path("tls/tls.key")), "key a\n");
}

#[test]
fn lines_and_errors_of_a_watch_steer_no_terminal() {
    let refusal = "no\x1b[2J\ncurrent: serial 0b\u{202e}";
    let denied = || v1::Denied { reason: "POLICY_CHANGED".into(), message: refusal.into() };
    for (format, expected) in
        [("text", r"no\u{1b}[2J\ncurrent: serial 0b\u{202e}"), ("json", r"no\\u{1b}[2J\\ncurrent")]
    {
        let place = Place::new(vec![Ok(current("c1", 1, "a")), Ok(event(2, Event::Denied(denied())))]);
        let output = place.command(&["watch", "--dir", "t\x1b[31m\nls", "-o", format]).output().unwrap();
        let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        assert_eq!((out.lines().count(), err.lines().count()), (3, 1), "{out}{err}");
        assert!(!format!("{out}{err}").contains(|c: char| c != '\n' && !is_shown(c)), "{out:?} {err:?}");
        assert!(out.contains(expected), "{out}");
        if format == "json" {
            let written: serde_json::Value = serde_json::from_str(out.lines().nth(1).unwrap()).unwrap();
            assert_eq!(written["path"], "t\x1b[31m\nls");
        }
    }
}

#[test]
fn a_crash_leaves_no_core_file() {
    let maximum = getrlimit(Resource::Core).maximum;
    setrlimit(Resource::Core, Rlimit { current: maximum, maximum }).unwrap();
    let place = Place::new(vec![]);
    let mut watch = place.watch(&["--dir", "tls"]);
    watch.subscribes(&place, 0);
    // Not SIGSEGV: the standard library handles the first, and one that was sent does not come again.
    watch.signal(Signal::ABORT);
    let status = watch.process.wait().unwrap();
    assert_eq!((status.signal(), status.core_dumped()), (Some(Signal::ABORT.as_raw()), false));
}

#[test]
fn lines_are_json_when_told_and_hold_no_key() {
    let roots = v1::TrustBundleUpdated { trust_bundle: "roots b\n".into() };
    let place = Place::new(vec![Ok(current("c1", 1, "a")), Ok(event(2, Event::TrustBundleUpdated(roots)))]);
    let mut watch = place.watch(&["--dir", "tls", "-o", "json"]);
    let mut events = Vec::new();
    while events.len() < 4 {
        let line = watch.line("");
        assert!(!line.contains("key a"), "{line}");
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        events.push(line["event"].as_str().unwrap().to_owned());
    }
    assert_eq!(events, ["current", "written", "trust_bundle_updated", "written"]);
    assert_eq!(read(place.path("tls/ca.crt")), "roots b\n");
    assert_eq!(read(place.path("tls/tls.crt")), "chain a\n");
}

#[test]
fn a_write_that_fails_is_tried_again_and_the_old_files_stay() {
    let place = Place::new(vec![Ok(current("c1", 1, "a"))]);
    let mut watch = place.watch(&["--dir", "tls"]);
    watch.line("written");
    fs::create_dir(place.path("tls/..data_tmp")).unwrap();
    place.agent.push(renewed("c1", 2, "b"));
    let line = watch.line("write failed");
    assert!(line.contains("cannot remove tls/..data_tmp") && line.contains("the old files stay"), "{line}");
    assert_eq!(read(place.path("tls/tls.key")), "key a\n");
    // What is newer than what failed is what will be written.
    place.agent.push(renewed("c1", 3, "c"));
    watch.line("renewed");
    fs::remove_dir(place.path("tls/..data_tmp")).unwrap();
    watch.line("written");
    assert_eq!(read(place.path("tls/tls.key")), "key c\n");
}

#[test]
fn a_watch_that_is_killed_leaves_a_whole_set_and_its_successor_goes_on() {
    const KILLS: u64 = 20;
    const RENEWALS_BEFORE_A_KILL: u64 = 10;
    let place = Place::new(vec![]);
    let mut sequence = 0;
    for _ in 0..KILLS {
        let known = place.agent.subscribed().len();
        let mut watch = place.watch(&["--dir", "tls"]);
        watch.subscribes(&place, known);
        for _ in 0..RENEWALS_BEFORE_A_KILL {
            sequence += 1;
            place.agent.push(renewed("c1", sequence, &sequence.to_string()));
        }
        // Somewhere in the middle of a write, never at the same place.
        watch.line("written");
        watch.process.kill().unwrap();
        watch.process.wait().unwrap();
        let data = fs::canonicalize(place.path("tls/..data")).unwrap();
        let chain = read(data.join("tls.crt"));
        let tag = chain.strip_prefix("chain ").unwrap();
        assert_eq!(read(data.join("tls.key")), format!("key {tag}"));
        assert_eq!(read(data.join("ca.crt")), format!("roots {tag}"));
    }
    let mut watch = place.watch(&["--dir", "tls"]);
    watch.subscribes(&place, KILLS as usize);
    place.agent.push(renewed("c1", sequence + 1, "last"));
    watch.line("written");
    assert_eq!(read(place.path("tls/tls.key")), "key last\n");
    let sets = fs::read_dir(place.path("tls"))
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_str().unwrap().starts_with("..csrd_"));
    assert_eq!(sets.count(), 2, "this one and the one before");
}
