//! `csrd health`: whether an agent or a controller is healthy, as an exit code for probes.
//!
//! A kubelet runs this every few seconds, so it is one call on one connection within one deadline, and starts no telemetry.

use std::{
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use super::{Exit, request::SocketArgs};
use crate::client::{ClientError, Health};

/// From the start to the answer; less than `timeoutSeconds` of the shipped probes, so that this command says what is wrong.
pub const DEADLINE: Duration = Duration::from_secs(3);

/// Ask an agent or a controller whether it can issue; for probes
///
/// Exits with 0 if so, and otherwise with 69 and the reason on stderr.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    socket: SocketArgs,
    /// Only ask whether it answers, whatever it says of itself
    #[arg(long)]
    live: bool,
}

/// Asks; says why not.
pub async fn run(args: Args) -> ExitCode {
    let answer = args.socket.client().health(DEADLINE).await;
    let Some(why) = why_not(answer, args.live) else { return ExitCode::SUCCESS };
    // Nothing is left to report to when stderr is closed.
    let _ = writeln!(io::stderr(), "csrd: {why}");
    Exit::Unavailable.into()
}

fn why_not(answer: Result<Health, ClientError>, live: bool) -> Option<String> {
    match answer {
        Ok(Health::Serving) => None,
        Ok(Health::NotServing(why)) => (!live).then(|| format!("not ready: {why}")),
        // A refusal is an answer: whoever gives it is alive.
        Err(error) => (!live || error.reason == ClientError::UNREACHABLE).then(|| error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Code;

    #[test]
    fn ready_means_serving_and_alive_means_any_answer() {
        fn check(answer: Result<Health, ClientError>, ready: Option<&str>, live: Option<&str>) {
            assert_eq!(why_not(answer.clone(), false).as_deref(), ready, "{answer:?}");
            assert_eq!(why_not(answer.clone(), true).as_deref(), live, "{answer:?}");
        }
        let error = |reason: &str| ClientError { code: Code::Unavailable, reason: reason.into(), message: "m".into() };
        check(Ok(Health::Serving), None, None);
        check(Ok(Health::NotServing("the CA has ended".into())), Some("not ready: the CA has ended"), None);
        check(Err(error("TOO_MANY_STREAMS")), Some("m (TOO_MANY_STREAMS)"), None);
        check(Err(error(ClientError::UNREACHABLE)), Some("m (AGENT_UNREACHABLE)"), Some("m (AGENT_UNREACHABLE)"));
    }
}
