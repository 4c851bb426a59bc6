//! What this program does when it is started again as another user: one part of an attack, or the quiet neighbour.
//!
//! `--act PART SOCKET ADMIN SECONDS MANY`: for so long from the end of its standard input on, and with that many of whatever
//! the part holds or does at once. It prints one line, which its starter reads.

mod calls;
mod connections;
mod sockets;
mod streams;

use std::{
    error::Error,
    fmt,
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use csrd::proto::v1::certificate_service_client::CertificateServiceClient;
use rustix::process::{Signal, set_parent_process_death_signal};
use tokio::io::AsyncReadExt as _;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use crate::neighbour;

/// The first argument of such a process.
pub(crate) const ARGUMENT: &str = "--act";

pub(crate) type Client = CertificateServiceClient<Channel>;

/// What a part works with.
#[derive(Clone, Debug)]
pub(crate) struct Orders {
    pub(crate) socket: PathBuf,
    pub(crate) admin: SocketAddr,
    pub(crate) time: Duration,
    /// Milliseconds since 1970, from [`begun`](Self::begun) on.
    until: u64,
    pub(crate) many: usize,
}

/// What a part did; as text, what its process prints.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Did {
    /// Calls, connections or messages that went through.
    pub(crate) done: u64,
    /// Those that were refused or broke.
    pub(crate) refused: u64,
    /// The most that were held open at once.
    pub(crate) open: u64,
    /// Processes that did not stop and were killed; what they did is not known.
    pub(crate) stuck: u64,
}

impl Orders {
    fn parse(arguments: &[String]) -> Option<Self> {
        let [socket, admin, seconds, many] = arguments else { return None };
        Some(Self {
            socket: socket.into(),
            admin: admin.parse().ok()?,
            time: Duration::from_secs(seconds.parse().ok()?),
            until: u64::MAX,
            many: many.parse().ok()?,
        })
    }

    /// Waits until all parts may begin: the end of the standard input that they share.
    pub(crate) async fn begun(self) -> Self {
        let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
        Self { until: now() + self.time.as_millis() as u64, ..self }
    }

    /// What is left of the time.
    pub(crate) fn left(&self) -> Duration {
        Duration::from_millis(self.until.saturating_sub(now()))
    }

    pub(crate) fn over(&self) -> bool {
        self.left().is_zero()
    }
}

/// Milliseconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// A client on a connection of its own, which fails with the innermost reason.
pub(crate) async fn connect(orders: &Orders) -> Result<Client, Status> {
    channel(orders).await.map(Client::new)
}

/// The connection alone.
async fn channel(orders: &Orders) -> Result<Channel, Status> {
    let endpoint = Endpoint::from_shared(format!("unix://{}", orders.socket.display())).expect("a unix address");
    endpoint.connect().await.map_err(|error| {
        let mut reason: &dyn Error = &error;
        while let Some(source) = reason.source() {
            reason = source;
        }
        Status::unavailable(reason.to_string())
    })
}

impl std::ops::AddAssign for Did {
    fn add_assign(&mut self, other: Self) {
        self.done += other.done;
        self.refused += other.refused;
        self.open += other.open;
        self.stuck += other.stuck;
    }
}

impl fmt::Display for Did {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.done, self.refused, self.open)
    }
}

impl FromStr for Did {
    type Err = ();

    fn from_str(line: &str) -> Result<Self, ()> {
        let numbers: Result<Vec<u64>, _> = line.split(' ').map(str::parse).collect();
        match numbers.map_err(drop)?[..] {
            [done, refused, open] => Ok(Self { done, refused, open, stuck: 0 }),
            _ => Err(()),
        }
    }
}

/// Plays a part and prints what came of it.
pub(crate) async fn act(arguments: &[String]) -> ExitCode {
    // No part outlives its starter.
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    let Some((part, rest)) = arguments.split_first() else { return ExitCode::FAILURE };
    if part == sockets::SCRIBBLER {
        sockets::scribble();
        return ExitCode::SUCCESS;
    }
    let Some(orders) = Orders::parse(rest) else { return ExitCode::FAILURE };
    if part == "neighbour" {
        println!("{}", neighbour::live(orders).await);
        return ExitCode::SUCCESS;
    }
    let orders = orders.begun().await;
    let did = match part.as_str() {
        "first" => {
            return match calls::first(&orders).await {
                Ok(()) => ExitCode::SUCCESS,
                Err(status) => {
                    println!("{:?} {}", status.code(), status.message());
                    ExitCode::FAILURE
                }
            };
        }
        "freeze" => sockets::freeze(&orders, false),
        "freeze-unread" => sockets::freeze(&orders, true),
        "passed" => sockets::passed(&orders),
        "connect" => sockets::connect(&orders),
        "operators" => connections::operators(&orders).await,
        "idle" => connections::hold(&orders, connections::Kind::Idle).await,
        "half" => connections::hold(&orders, connections::Kind::HalfBlock).await,
        "unfinished" => connections::hold(&orders, connections::Kind::Unfinished).await,
        "issue" => calls::issue(&orders).await,
        "refused" => calls::refused(&orders).await,
        "whoami" => calls::who_am_i(&orders).await,
        "subscribe" => streams::subscribe(&orders).await,
        "nack" => streams::nack(&orders).await,
        "nack-delta" => streams::nack_delta(&orders).await,
        _ => return ExitCode::FAILURE,
    };
    println!("{did}");
    ExitCode::SUCCESS
}
