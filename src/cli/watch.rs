//! `csrd watch`: files that stay fresh, and a process that is told when they change.
//!
//! Invariants: the newest certificate received is on disk or will be tried again; nobody is told before the files are
//! there; a failure to write or to tell never ends the watch, and neither does an agent that is away. It ends with a
//! signal, with its child, or with a refusal; a child outlives a refusal, because its certificate is still valid.

mod notify;
mod process;

use std::{
    ffi::OsString,
    io::{self, Write as _},
    path::PathBuf,
    pin::pin,
    process::ExitCode,
    time::Duration,
};

use futures_util::StreamExt as _;
use rustix::process::Signal;
use tokio::time::{Instant, sleep_until};

use self::{
    notify::{Exec, Words, parse_signal},
    process::{Child, Signals},
};
use super::{
    UsageError,
    request::{RequestArgs, SocketArgs},
};
use crate::{
    backoff::Backoff,
    client::{
        Certificate, ClientError, Event,
        output::Line,
        sink::{DEFAULT_KEY_MODE, KeyMode, Owner, Sink, Target},
    },
    telemetry::with_causes,
};

/// Waits between tries to write.
const REWRITE: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(60));

/// Keep certificate files fresh, and tell a process when they change
///
/// In --dir, tls.crt, tls.key and ca.crt are links into ..data, which always leads to one whole set. A renewal the disk
/// refuses is tried again; the old files stay. An agent that is away is waited for.
///
/// Root writes only where no other user may write, on the whole way to --dir: others read from there. To write into a
/// folder of a user, run as that user. --shared-folder lifts this.
///
/// With -- CMD, CMD is started when the files are there and signalled at each renewal; SIGTERM, SIGINT, SIGHUP, SIGUSR1
/// and SIGUSR2 are passed on to it, and its exit code (128 + n for signal n) becomes ours. It starts without core dumps
/// (ulimit -c). When the agent refuses to renew, CMD runs on with the files it has.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    socket: SocketArgs,
    #[command(flatten)]
    request: RequestArgs,
    /// Folder in which tls.crt, tls.key and ca.crt change together
    #[arg(long, value_name = "DIR", required_unless_present = "combined", help_heading = "Files")]
    dir: Option<PathBuf>,
    /// One file with the key and then the chain, instead of a folder
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dir", "csr"], help_heading = "Files")]
    combined: Option<PathBuf>,
    /// Mode of the file with the private key
    #[arg(long, default_value_t = DEFAULT_KEY_MODE, help_heading = "Files")]
    mode: KeyMode,
    /// Owner of the files, by numbers [default: this user]
    #[arg(long, value_name = "UID:GID", help_heading = "Files")]
    owner: Option<Owner>,
    /// As root, write even where other users may write: they can still take the files away
    #[arg(long, help_heading = "Files")]
    shared_folder: bool,
    /// Write the files, tell, and exit: for an init container
    #[arg(long, conflicts_with = "command", help_heading = "Files")]
    once: bool,
    /// Signal for the process of --pid-file or for CMD [default: HUP]
    #[arg(long, value_parser = parse_signal, requires = "told", help_heading = "After each change")]
    signal: Option<Signal>,
    /// Signal the process whose id is in this file
    #[arg(long, value_name = "FILE", group = "told", help_heading = "After each change")]
    pid_file: Option<PathBuf>,
    /// Run this command: split at blanks, no shell, no quotes, 30 s at most
    #[arg(long, value_name = "COMMAND", help_heading = "After each change")]
    exec: Option<Words>,
    /// Format of the lines about what happens: on stdout, or on stderr when there is a CMD
    #[arg(short, long, value_enum, default_value_t, help_heading = "Options")]
    output: LineFormat,
    /// Program that uses the files
    #[arg(last = true, value_name = "CMD", group = "told", help_heading = "Arguments")]
    command: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum LineFormat {
    /// For people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

/// Watches until a signal, the end of the child, or a refusal.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let target = match (args.combined, args.dir) {
        (Some(file), _) => Target::Combined(file),
        (None, Some(dir)) => Target::Folder(dir),
        (None, None) => return Err(UsageError("one of --dir and --combined is needed".into()).into()),
    };
    let mut watch = Watch {
        sink: Sink { target, key_mode: args.mode, owner: args.owner, shared_folder: args.shared_folder },
        output: args.output,
        once: args.once,
        newest: None,
        rewrite_at: None,
        failures: 0,
        signal: args.signal.unwrap_or(Signal::HUP),
        pid_file: args.pid_file,
        exec: args.exec.map(Exec::new),
        program: args.command,
        child: None,
    };
    // Before a certificate is asked for that could then not be written.
    watch.sink.check()?;
    let request = args.request.into_request()?;
    let mut signals = Signals::new()?;
    let mut events = pin!(args.socket.client().subscribe(request).into_stream().fuse());
    loop {
        let rewrite_at = watch.rewrite_at;
        tokio::select! {
            // In order: what ends the watch is rare and must not wait behind what goes on.
            biased;
            code = process::ended(&mut watch.child) => return Ok(code?),
            signal = signals.next() => if let Some(code) = watch.signalled(signal) { return Ok(code) },
            outcome = notify::ended(&mut watch.exec) => watch.told(outcome)?,
            () = sleep_until(rewrite_at.unwrap_or_else(Instant::now)), if rewrite_at.is_some() => watch.write()?,
            Some(event) = events.next() => watch.happened(event)?,
        }
        if watch.once && watch.is_done() {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

struct Watch {
    sink: Sink,
    output: LineFormat,
    once: bool,
    /// The newest certificate received, with the newest roots.
    newest: Option<Certificate>,
    /// When to try again to write it; `None` when it is on disk.
    rewrite_at: Option<Instant>,
    /// Failures to write in a row.
    failures: u32,
    signal: Signal,
    pid_file: Option<PathBuf>,
    exec: Option<Exec>,
    /// Empty when there is none to be started.
    program: Vec<OsString>,
    /// The program, once it was started.
    child: Option<Child>,
}

impl Watch {
    fn happened(&mut self, event: Result<Event, ClientError>) -> anyhow::Result<()> {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                self.print(&Line::from(&error));
                // A child runs on: its certificate is valid until it expires.
                return if self.child.is_some() { Ok(()) } else { Err(error.into()) };
            }
        };
        self.print(&Line::from(&event));
        match event {
            Event::Current(certificate) | Event::Renewed(certificate) => {
                let same = self.newest.replace(certificate.clone()).is_some_and(|old| old.same_files_as(&certificate));
                if same { Ok(()) } else { self.write() }
            }
            Event::TrustBundleUpdated(bundle) => match (&mut self.newest, &self.sink.target) {
                (Some(newest), Target::Folder(_) | Target::Files(_)) => {
                    newest.trust_bundle = bundle;
                    self.write()
                }
                _ => Ok(()),
            },
            Event::RenewalDelayed { .. } | Event::RenewalDue { .. } | Event::Disconnected { .. } => Ok(()),
        }
    }

    /// Puts the newest certificate on disk and tells whoever reads it, or plans to try again.
    fn write(&mut self) -> anyhow::Result<()> {
        let Some(newest) = &self.newest else { return Ok(()) };
        match self.sink.write(newest) {
            Ok(()) => {
                (self.rewrite_at, self.failures) = (None, 0);
                self.print(&Line::Written { path: &self.sink.target.to_string() });
                self.tell()
            }
            Err(error) if self.once => Err(error.into()),
            Err(error) => {
                self.failures = self.failures.saturating_add(1);
                let wait = REWRITE.delay(self.failures, &mut rand::rng());
                self.rewrite_at = Some(Instant::now() + wait);
                let message = with_causes(&error);
                self.print(&Line::WriteFailed { message: &message, retry_in_ms: wait.as_millis() });
                Ok(())
            }
        }
    }

    /// Tells everybody who is to know that the files have changed.
    fn tell(&mut self) -> anyhow::Result<()> {
        if let Some(path) = &self.pid_file {
            self.told(notify::signal_pid_file(path, self.signal))?;
        }
        if let Some(exec) = &mut self.exec {
            exec.start();
        }
        match (&self.child, self.program.as_slice()) {
            (Some(child), _) => self.told(child.signal(self.signal)),
            (None, [program, arguments @ ..]) => {
                self.child = Some(Child::start(program, arguments)?);
                Ok(())
            }
            (None, []) => Ok(()),
        }
    }

    fn told(&self, outcome: Result<String, String>) -> anyhow::Result<()> {
        match outcome {
            Ok(how) => self.print(&Line::Notified { how: &how }),
            Err(message) if self.once => anyhow::bail!(message),
            Err(message) => self.print(&Line::NotifyFailed { message: &message }),
        }
        Ok(())
    }

    /// Passes `signal` on to the child; without one, an exit code when it asks to end.
    fn signalled(&self, signal: Signal) -> Option<ExitCode> {
        if let Some(child) = &self.child {
            if let Err(message) = child.signal(signal) {
                self.print(&Line::NotifyFailed { message: &message });
            }
            return None;
        }
        let ends = [Signal::TERM, Signal::INT, Signal::HUP].contains(&signal);
        // A program that was never started did not end well.
        let code = || if self.program.is_empty() { ExitCode::SUCCESS } else { process::killed_by(signal.as_raw()) };
        ends.then(code)
    }

    fn is_done(&self) -> bool {
        let idle = self.exec.as_ref().is_none_or(|exec| !exec.is_running());
        self.newest.is_some() && self.rewrite_at.is_none() && idle
    }

    /// A line about what happened. Keeping the files fresh matters more than a reader of lines that has gone away.
    fn print(&self, line: &Line<'_>) {
        let line = match self.output {
            LineFormat::Text => line.text(),
            LineFormat::Json => line.json(),
        };
        // stdout belongs to the program, if there is one.
        let _ = match self.program.is_empty() {
            true => writeln!(io::stdout(), "{line}"),
            false => writeln!(io::stderr(), "{line}"),
        };
    }
}
