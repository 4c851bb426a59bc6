//! What else is tried while an attack goes on: the kubelet's probes, and commands of other users.

use std::{
    net::SocketAddr,
    process::Stdio,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::Command,
    time::{sleep, timeout},
};

use crate::{
    act::now,
    agent::{NEWCOMER, Place},
};

/// As in the shipped manifests, but oftener.
const EVERY: Duration = Duration::from_millis(500);
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// Tries of others in a row.
pub(crate) const TIMES: u32 = 6;
/// A command that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Tries and how many of them failed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tries {
    pub(crate) all: u64,
    pub(crate) failed: u64,
    /// The first failure in words.
    pub(crate) first: String,
}

impl Tries {
    pub(crate) fn add(&mut self, failure: Option<String>) {
        self.all += 1;
        if let Some(failure) = failure {
            self.failed += 1;
            if self.first.is_empty() {
                self.first = failure;
            }
        }
    }
}

/// Asks for `/livez` and `/readyz` until the end.
pub(crate) async fn kubelet(admin: SocketAddr, until: u64) -> Tries {
    let mut tries = Tries::default();
    while now() < until {
        for path in ["/livez", "/readyz"] {
            let failure = match timeout(PROBE_TIMEOUT, probe(admin, path)).await {
                Ok(Ok(true)) => None,
                Ok(Ok(false)) => Some(format!("{path}: not 200")),
                Ok(Err(error)) => Some(format!("{path}: {error}")),
                Err(_) => Some(format!("{path}: no answer in {} s", PROBE_TIMEOUT.as_secs())),
            };
            tries.add(failure);
        }
        sleep(EVERY).await;
    }
    tries
}

async fn probe(admin: SocketAddr, path: &str) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(admin).await?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: {admin}\r\nconnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(answer.starts_with(b"HTTP/1.1 200"))
}

/// What others try.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Other {
    /// `csrd whoami` as a user who does nothing else.
    WhoAmI,
    /// `csrd status` as root.
    Status,
    /// The first subscription of a user who has none yet, each time another.
    Newcomer,
}

/// [`TIMES`] times, evenly until the end.
pub(crate) async fn others(place: &Place, other: Other, until: u64) -> Tries {
    let mut tries = Tries::default();
    for turn in 0..TIMES {
        let left = Duration::from_millis(until.saturating_sub(now()));
        let began = Instant::now();
        let failure = tried(place, other, turn).await;
        tries.add(failure);
        sleep((left / (TIMES - turn)).saturating_sub(began.elapsed())).await;
    }
    tries
}

/// Why it failed, if it did.
pub(crate) async fn tried(place: &Place, other: Other, turn: u32) -> Option<String> {
    let mut command = match other {
        Other::WhoAmI => {
            let mut command = Command::new(&place.program);
            command.arg("whoami").arg("--socket").arg(&place.socket).uid(NEWCOMER).gid(NEWCOMER);
            command
        }
        Other::Status => {
            let mut command = Command::new(&place.program);
            command.arg("status").arg("--socket").arg(&place.socket);
            command
        }
        Other::Newcomer => {
            let mut command = Command::new(&place.attacker);
            command.arg(crate::act::ARGUMENT).arg("first").arg(&place.socket).arg(place.admin.to_string());
            command.args(["0", "1"]).uid(NEWCOMER + turn).gid(NEWCOMER);
            command
        }
    };
    command.current_dir("/").stdin(Stdio::null()).kill_on_drop(true);
    match timeout(PATIENCE, command.output()).await {
        Ok(Ok(output)) if output.status.success() => None,
        Ok(Ok(output)) => {
            let said = [output.stdout, output.stderr].concat();
            Some(String::from_utf8_lossy(&said).lines().next().unwrap_or("failed").to_owned())
        }
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => Some(format!("no end in {} s", PATIENCE.as_secs())),
    }
}
