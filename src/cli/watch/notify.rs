//! Telling a process that the files have changed: a signal by pid file, or a command that is run.

use std::{
    future::{self, Future},
    path::Path,
    pin::Pin,
    process::Stdio,
    str::FromStr,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{process::Command, time::timeout};

use crate::{files::read_text, telemetry::with_causes};

/// How long a command may run.
const EXEC_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes in a pid file: the longest number and a line end, with room to spare.
const MAX_PID_FILE_BYTES: usize = 32;

/// Signals that programs take as "read your files again" or as an end.
const SIGNALS: [(&str, Signal); 7] = [
    ("HUP", Signal::HUP),
    ("INT", Signal::INT),
    ("QUIT", Signal::QUIT),
    ("USR1", Signal::USR1),
    ("USR2", Signal::USR2),
    ("TERM", Signal::TERM),
    ("WINCH", Signal::WINCH),
];

/// Reads the name of a signal, with or without `SIG`, in any case.
pub(super) fn parse_signal(text: &str) -> Result<Signal, &'static str> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let known = SIGNALS.into_iter().find(|(known, _)| *known == name);
    known.map(|(_, signal)| signal).ok_or("must be HUP, INT, QUIT, USR1, USR2, TERM or WINCH")
}

/// For example `SIGHUP`.
pub(super) fn signal_name(signal: Signal) -> String {
    match SIGNALS.into_iter().find(|(_, known)| *known == signal) {
        Some((name, _)) => format!("SIG{name}"),
        None => format!("signal {}", signal.as_raw()),
    }
}

/// Signals the process whose id is in the file at `path`; what was done, or why not.
pub(super) fn signal_pid_file(path: &Path, signal: Signal) -> Result<String, String> {
    let failed = |why: &str| format!("pid file {}: {why}", path.display());
    let text = read_text(path, MAX_PID_FILE_BYTES).map_err(|error| failed(&with_causes(&error)))?;
    // Only digits: to kill(2) zero and negative numbers are groups of processes.
    let digits = Some(text.trim()).filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
    let pid =
        digits.and_then(|digits| Pid::from_raw(digits.parse().ok()?)).ok_or_else(|| failed("holds no process id"))?;
    let done = format!("{} to process {}", signal_name(signal), pid.as_raw_nonzero());
    kill_process(pid, signal).map_err(|errno| failed(&format!("{done}: {errno}")))?;
    Ok(done)
}

type Outcome = Result<String, String>;

/// A program and its arguments, as they were split at blanks.
#[derive(Clone, Debug)]
pub(super) struct Words(Vec<String>);

impl FromStr for Words {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let words: Vec<_> = text.split_ascii_whitespace().map(str::to_owned).collect();
        if words.is_empty() { Err("must name a program") } else { Ok(Self(words)) }
    }
}

/// A command that is run after each change, never twice at the same time.
pub(super) struct Exec {
    words: Words,
    running: Option<Pin<Box<dyn Future<Output = Outcome>>>>,
    /// The files changed while it ran.
    again: bool,
}

impl Exec {
    pub(super) fn new(words: Words) -> Self {
        Self { words, running: None, again: false }
    }

    /// Runs the command now, or once more when it ends: it may have read the old files.
    pub(super) fn start(&mut self) {
        if self.running.is_some() {
            self.again = true;
        } else {
            self.running = Some(Box::pin(run(self.words.clone())));
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }
}

/// The outcome of a running command; pending while there is none. Cancel safe.
pub(super) async fn ended(exec: &mut Option<Exec>) -> Outcome {
    let Some(Exec { running: Some(running), .. }) = exec else { return future::pending().await };
    let outcome = running.await;
    if let Some(exec) = exec {
        exec.running = None;
        if std::mem::take(&mut exec.again) {
            exec.start();
        }
    }
    outcome
}

async fn run(Words(words): Words) -> Outcome {
    let shown = words.join(" ");
    let failed = |why: &dyn std::fmt::Display| format!("{shown}: {why}");
    let mut command = Command::new(&words[0]);
    // Its output is about what it did, not the lines that stdout is for.
    command.args(&words[1..]).stdin(Stdio::null()).stdout(std::io::stderr()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| failed(&error))?;
    match timeout(EXEC_TIMEOUT, child.wait()).await {
        Ok(Ok(status)) if status.success() => Ok(shown),
        Ok(Ok(status)) => Err(failed(&status)),
        Ok(Err(error)) => Err(failed(&error)),
        Err(_) => Err(failed(&format_args!("ran for {} s and was killed", EXEC_TIMEOUT.as_secs()))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_signal_has_a_name() {
        fn check(text: &str, expected: Option<Signal>) {
            assert_eq!(parse_signal(text).ok(), expected, "{text}");
        }
        check("HUP", Some(Signal::HUP));
        check("SIGUSR1", Some(Signal::USR1));
        check("sigterm", Some(Signal::TERM));
        check("KILL", None);
        check("SIGSIGHUP", None);
        check("1", None);
        check("", None);
        assert_eq!(signal_name(Signal::WINCH), "SIGWINCH");
        assert_eq!(signal_name(Signal::ALARM), format!("signal {}", Signal::ALARM.as_raw()));
    }

    #[test]
    fn a_pid_file_names_one_process() {
        fn check(content: &str, expected: &str) {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), content).unwrap();
            let message = signal_pid_file(file.path(), Signal::WINCH).expect_err(content);
            assert!(message.contains(expected), "{content:?}: {message}");
        }
        for content in ["", "0", "-1", "-5", "+5", "1 2", "pid", "4294967296"] {
            check(content, "holds no process id");
        }
        check(&"9".repeat(MAX_PID_FILE_BYTES), "holds no process id");
        check(&"9".repeat(MAX_PID_FILE_BYTES + 1), "more than 32 bytes");
        // Above the kernel's PID_MAX_LIMIT.
        check("2147483647\n", "SIGWINCH to process 2147483647: No such process");
        assert!(
            signal_pid_file(Path::new("/nonexistent"), Signal::WINCH).expect_err("absent").contains("/nonexistent")
        );

        let file = tempfile::NamedTempFile::new().unwrap();
        let own = std::process::id();
        fs::write(file.path(), format!("{own}\n")).unwrap();
        // SIGWINCH is ignored by default (signal(7)).
        assert_eq!(signal_pid_file(file.path(), Signal::WINCH), Ok(format!("SIGWINCH to process {own}")));
    }

    async fn outcome(text: &str) -> Outcome {
        let mut exec = Some(Exec::new(text.parse().unwrap()));
        exec.as_mut().unwrap().start();
        ended(&mut exec).await
    }

    #[tokio::test]
    async fn a_command_is_run_without_a_shell() {
        assert_eq!(outcome("test $HOME = $HOME").await, Ok("test $HOME = $HOME".into()));
        assert_eq!(outcome("false").await, Err("false: exit status: 1".into()));
        let missing = outcome("/nonexistent/reload now").await.expect_err("absent");
        assert!(missing.starts_with("/nonexistent/reload now: No such file"), "{missing}");
        assert!(" ".parse::<Words>().is_err());
    }

    #[tokio::test]
    async fn changes_during_a_run_cause_one_more_run() {
        let mut exec = Some(Exec::new("true".parse().unwrap()));
        for _ in 0..3 {
            exec.as_mut().unwrap().start();
        }
        assert!(ended(&mut exec).await.is_ok());
        assert!(exec.as_ref().unwrap().is_running());
        assert!(ended(&mut exec).await.is_ok());
        assert!(!exec.as_ref().unwrap().is_running());
    }

    #[tokio::test]
    async fn a_command_is_killed_after_its_time() {
        let mut exec = Some(Exec::new("sleep 1000".parse().unwrap()));
        exec.as_mut().unwrap().start();
        let mut running = Box::pin(ended(&mut exec));
        // Started in real time, then the clock is wound forward.
        assert!(futures_util::poll!(&mut running).is_pending());
        tokio::time::pause();
        tokio::time::advance(EXEC_TIMEOUT).await;
        assert_eq!(running.await, Err("sleep 1000: ran for 30 s and was killed".into()));
    }
}
