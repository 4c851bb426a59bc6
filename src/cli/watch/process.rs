//! The child of a watch, and the signals that are passed on to it.
//!
//! Deliberately not here: reaping orphans as an init would; a program that leaves some needs an init around the watch.

use std::{
    ffi::OsString,
    future::{self, poll_fn},
    io,
    os::unix::process::ExitStatusExt as _,
    process::{ExitCode, ExitStatus},
    task::Poll,
};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{self, SignalKind};

use super::notify::signal_name;

/// What a watch ends with or passes on.
const PASSED_ON: [Signal; 5] = [Signal::TERM, Signal::INT, Signal::HUP, Signal::USR1, Signal::USR2];

/// The program that uses the files.
pub(super) struct Child(tokio::process::Child);

impl Child {
    /// Starts it with our standard streams.
    pub(super) fn start(program: &OsString, arguments: &[OsString]) -> anyhow::Result<Self> {
        let child = tokio::process::Command::new(program).args(arguments).spawn();
        Ok(Self(child.with_context(|| format!("cannot start {}", program.display()))?))
    }

    /// Signals it; what was done, or why not.
    pub(super) fn signal(&self, signal: Signal) -> Result<String, String> {
        // Its id is not given to another process before it has been waited for, and then `id` is `None`.
        let pid = self.0.id().and_then(|id| Pid::from_raw(id.try_into().ok()?)).ok_or("the child has ended")?;
        let done = format!("{} to process {}", signal_name(signal), pid.as_raw_nonzero());
        kill_process(pid, signal).map_err(|errno| format!("{done}: {errno}"))?;
        Ok(done)
    }
}

/// Waits for the child's end; pending while there is none. Cancel safe.
pub(super) async fn ended(child: &mut Option<Child>) -> io::Result<ExitCode> {
    match child {
        Some(child) => Ok(exit_code(child.0.wait().await?)),
        None => future::pending().await,
    }
}

/// The exit code of a shell for a program that a signal killed.
pub(super) fn killed_by(signal: i32) -> ExitCode {
    ExitCode::from(u8::try_from(128 + signal).unwrap_or(u8::MAX))
}

fn exit_code(status: ExitStatus) -> ExitCode {
    match (status.code(), status.signal()) {
        (Some(code), _) => ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)),
        (None, signal) => killed_by(signal.unwrap_or_default()),
    }
}

/// The signals that are sent to us.
pub(super) struct Signals(Vec<(Signal, unix::Signal)>);

impl Signals {
    /// From now on these signals no longer end the process.
    pub(super) fn new() -> io::Result<Self> {
        let listen = |signal: Signal| Ok((signal, unix::signal(SignalKind::from_raw(signal.as_raw()))?));
        Ok(Self(PASSED_ON.into_iter().map(listen).collect::<io::Result<_>>()?))
    }

    /// The next signal. Cancel safe.
    pub(super) async fn next(&mut self) -> Signal {
        poll_fn(|context| {
            for (signal, stream) in &mut self.0 {
                if stream.poll_recv(context).is_ready() {
                    return Poll::Ready(*signal);
                }
            }
            Poll::Pending
        })
        .await
    }
}
