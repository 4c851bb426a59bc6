//! The command line: one file for each command, one exit code for each kind of end.
//!
//! Invariants: what a command was asked for goes to stdout and everything else to stderr; a secret goes to stdout only
//! when an output that holds it was asked for by name; exit codes are stable. Besides the configuration, this is the
//! only part that reads the environment (through clap, so that `--help` names every variable).

pub mod agent;
pub mod completion;
pub mod controller;
pub mod crd;
pub mod demo;
pub mod health;
pub mod issue;
pub mod policy;
pub mod request;
pub mod status;
pub mod watch;
pub mod whoami;

use std::{
    io::{self, IsTerminal as _, Write as _},
    process::ExitCode,
};

use clap::Parser as _;
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};

use crate::{
    client::{ClientError, Code, output::Style, sink::SinkError},
    config::otel_variables,
    tasks::TaskError,
    telemetry::{Log, LogFormat, Telemetry, with_causes},
    text::printable,
};

const EXIT_CODES: &str = "Exit codes:
   0  done
   1  failed; the error on stderr says what and why
  64  the command line, a file it names, or the request is not valid
  69  no agent answers on the socket, or it cannot serve this now: try again
  70  a task of the agent was lost
  77  denied by policy";

#[derive(Debug, clap::Parser)]
#[command(name = "csrd", version, about = "Certificates for workloads: attested, allowed by policy, streamed, renewed")]
#[command(after_help = EXIT_CODES, max_term_width = 110, subcommand_required = true, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Demo(demo::Args),
    Agent(agent::Args),
    Controller(controller::Args),
    Issue(issue::Args),
    Watch(watch::Args),
    Whoami(whoami::Args),
    Status(status::Args),
    Health(health::Args),
    Policy(policy::Args),
    Crd(crd::Args),
    Completion(completion::Args),
}

/// How a command ends when it does not end well: the numbers of sysexits.h, where it has one. Stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It failed.
    Failure = 1,
    /// EX_USAGE: the command line, the configuration or the request is not valid.
    Usage = 64,
    /// EX_UNAVAILABLE: no agent answers.
    Unavailable = 69,
    /// EX_SOFTWARE: a task of the agent ended that should have run on.
    TaskLost = 70,
    /// EX_NOPERM: denied by policy.
    Denied = 77,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error that whoever wrote the command line or the configuration can mend; ends with [`Exit::Usage`].
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

impl UsageError {
    /// Says the whole chain of an error in one line.
    fn of(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self(with_causes(&error))
    }
}

/// Runs the command that the process was started with.
pub async fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing is left to report to when stdout or stderr is closed.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage.into() } else { ExitCode::SUCCESS };
        }
    };
    cli.command.run().await.unwrap_or_else(|error| {
        let _ = writeln!(io::stderr(), "csrd: {}", lines(&with_causes(&*error)));
        exit(&error).into()
    })
}

impl Command {
    async fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Demo(args) => demo::run(args).await,
            Self::Agent(args) => agent::run(args).await,
            Self::Controller(args) => controller::run(args).await,
            Self::Issue(args) => traced(issue::run(args)).await,
            Self::Watch(args) => traced(watch::run(args)).await,
            Self::Whoami(args) => traced(whoami::run(args)).await,
            Self::Status(args) => traced(status::run(args)).await,
            Self::Health(args) => Ok(health::run(args).await),
            Self::Policy(args) => policy::run(args),
            Self::Crd(args) => crd::run(args),
            Self::Completion(args) => completion::run(args, <Cli as clap::CommandFactory>::command()),
        }
    }
}

/// Runs a command that calls the agent, and sends its traces if an `OTEL_*` variable names a collector.
async fn traced(command: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    let variables = otel_variables();
    if variables.is_empty() {
        return command.await;
    }
    // The only lines are those that say why traces cannot be sent.
    let log = Log { format: LogFormat::Text, filter: "warn".into(), ansi: false };
    let started = Telemetry::new(&log, &variables, io::stderr);
    let (dispatch, telemetry) = started.map_err(UsageError::of)?;
    tracing::dispatcher::set_global_default(dispatch)?;
    let ended = command.await;
    telemetry.shutdown();
    ended
}

/// An error as a terminal may have it. Its own lines stay: each problem of a policy file has one, in which everything that
/// the file says is escaped already.
fn lines(error: &str) -> String {
    error.lines().map(printable).collect::<Vec<_>>().join("\n")
}

/// The exit code for an error: the first one in its chain that has a code of its own.
fn exit(error: &anyhow::Error) -> Exit {
    let known = |cause: &(dyn std::error::Error + 'static)| match cause.downcast_ref::<ClientError>() {
        Some(error) => Some(match error.code {
            Code::InvalidArgument => Exit::Usage,
            Code::PermissionDenied => Exit::Denied,
            Code::Unavailable => Exit::Unavailable,
            _ => Exit::Failure,
        }),
        None if cause.is::<UsageError>() => Some(Exit::Usage),
        None if cause.downcast_ref().is_some_and(SinkError::is_usage) => Some(Exit::Usage),
        None => cause.is::<TaskError>().then_some(Exit::TaskLost),
    };
    error.chain().find_map(known).unwrap_or(Exit::Failure)
}

/// Makes the kernel write no core file of this process, which may hold a private key or a token.
///
/// The limit is 1 byte, not 0: a limit of 0 stops core files but not a pipe to a handler (core(5)), while the kernel
/// dumps nothing at all at 1. It is the soft limit only, so that a child of `csrd watch` may raise it for itself. Where
/// the hard limit is 0 already, a handler is stopped only by [`forbid_tracing`]; the systemd unit therefore sets 1.
pub fn forbid_core_dumps() {
    let maximum = getrlimit(Resource::Core).maximum;
    let limit = Rlimit { current: Some(1.min(maximum.unwrap_or(1))), maximum };
    // Lowering a soft limit cannot fail (setrlimit(2)).
    let _ = setrlimit(Resource::Core, limit);
}

/// Lets the agent have as many descriptors as it is allowed: a connection takes three, of which the soft limit that most
/// hosts set (1024) would allow 340.
///
/// Returns that many.
fn raise_descriptor_limit() -> usize {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Raising a soft limit to its hard limit cannot fail (setrlimit(2)).
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    getrlimit(Resource::Nofile).current.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX))
}

/// Keeps the kernel from giving the agent 2 MiB pages unasked, where it is set to: an idle agent would fill a few of them.
///
/// For the agent only: a child of `csrd watch` would inherit it.
fn forbid_huge_pages() {
    // PR_SET_THP_DISABLE fails only where the kernel has no huge pages (PR_SET_THP_DISABLE(2const)).
    let _ = rustix::thread::disable_transparent_huge_pages(true);
}

/// Keeps other processes of the same user from attaching to this one and reading its memory; for the agent, which holds
/// the CA key.
///
/// The kernel dumps no core of such a process either, be it to a file or to a handler.
///
/// Not for the other commands: it also gives `/proc/PID` to root (proc(5)), and an agent that runs as the same ordinary
/// user must read there who its callers are.
pub fn forbid_tracing() {
    // PR_SET_DUMPABLE fails only for values other than 0 and 1 (PR_SET_DUMPABLE(2const)).
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// How answers that are tables are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum TableFormat {
    /// For people
    #[default]
    Table,
    /// For programs
    Json,
}

fn table_style() -> Style {
    if io::stdout().is_terminal() { Style::Terminal } else { Style::Plain }
}

/// Writes what was asked for to stdout. A reader that has seen enough and closed the pipe (`| head`) is no error.
fn print(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::policy::{Problem, watch::LoadError};

    /// What the limit is for is said at [`forbid_core_dumps`].
    #[test]
    fn the_systemd_unit_leaves_the_limit_that_stops_a_core_handler_too() {
        let unit = include_str!("../deploy/systemd/csrd.service");
        let limits: Vec<_> = unit.lines().filter(|line| line.starts_with("LimitCORE=")).collect();
        assert_eq!(limits, ["LimitCORE=1"]);
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn an_error_keeps_its_own_lines_and_steers_no_terminal() {
        let problem = Problem { file: "a\nb".into(), line: 3, field: "\u{1b}[2J".into(), message: "\u{202e}".into() };
        let error = LoadError(vec![problem.clone(), problem]);
        let line = r"  a\nb:3: \u{1b}[2J: \u{202e}";
        assert_eq!(lines(&error.to_string()), format!("2 problems in the policy files\n{line}\n{line}"));
        assert_eq!(lines("a\u{1b}[2J"), r"a\u{1b}[2J");
    }

    #[test]
    fn an_error_ends_with_the_code_of_the_first_cause_that_has_one() {
        fn check(error: anyhow::Error, expected: Exit) {
            assert_eq!(exit(&error), expected, "{error:#}");
        }
        let answer = |code| ClientError { code, reason: "R".into(), message: "m".into() };
        check(anyhow::anyhow!("anything"), Exit::Failure);
        check(answer(Code::InvalidArgument).into(), Exit::Usage);
        check(answer(Code::PermissionDenied).into(), Exit::Denied);
        check(answer(Code::Unavailable).into(), Exit::Unavailable);
        check(answer(Code::Internal).into(), Exit::Failure);
        check(TaskError::Ended("hub").into(), Exit::TaskLost);
        check(UsageError("--lifetime: not a duration".into()).into(), Exit::Usage);
        check(SinkError::Planted("a".into()).into(), Exit::Usage);
        check(SinkError::Occupied("a".into()).into(), Exit::Failure);
        check(anyhow::Error::new(UsageError("no".into())).context("reading the request"), Exit::Usage);
    }
}
