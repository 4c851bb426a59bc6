//! Processes of other users: this program again, each with one part.

use std::{io::PipeReader, process::Stdio, time::Duration};

use anyhow::Context as _;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};

use crate::{
    act::{self, Did},
    agent::{NEIGHBOUR, Place},
    cgroup,
    neighbour::{READY, Report},
};

/// How long a process may take beyond its time.
const GRACE: Duration = Duration::from_secs(15);
/// How long a started process has before all begin.
const TO_START: Duration = Duration::from_millis(2);
/// Processes that are started before those already there get a turn.
const BATCH: u32 = 8;

/// Attackers that do the same.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) part: &'static str,
    /// The first one's user; each next one has the next.
    pub(crate) first_uid: u32,
    pub(crate) gid: u32,
    pub(crate) processes: u32,
    /// Calls, connections or threads of each.
    pub(crate) many: usize,
}

/// This program as another user, killed when dropped.
pub(crate) fn command(place: &Place, part: &str, (uid, gid): (u32, u32), time: Duration, many: usize) -> Command {
    let mut command = Command::new(&place.attacker);
    command.arg(act::ARGUMENT).arg(part).arg(&place.socket).arg(place.admin.to_string());
    command.arg(time.as_secs().to_string()).arg(many.to_string());
    command.uid(uid).gid(gid).current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.kill_on_drop(true);
    command
}

impl Group {
    /// Starts all, which act when `begin` ends, and stop by themselves.
    pub(crate) async fn start(&self, place: &Place, begin: &PipeReader, time: Duration) -> anyhow::Result<Vec<Child>> {
        let mut started = Vec::new();
        for number in 0..self.processes {
            let user = (self.first_uid + number, self.gid);
            let child = command(place, self.part, user, time, self.many).stdin(begin.try_clone()?).spawn();
            let child = child.with_context(|| format!("starting {} number {number}", self.part))?;
            cgroup::share(cgroup::ATTACKERS, child.id());
            started.push(child);
            if number % BATCH == BATCH - 1 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        tokio::time::sleep(TO_START * self.processes).await;
        Ok(started)
    }
}

/// What all of them did together; one that does not stop is killed.
pub(crate) async fn ended(children: Vec<Child>, left: Duration) -> Did {
    let by = tokio::time::Instant::now() + left + GRACE;
    let mut did = Did::default();
    for child in children {
        if let Ok(Ok(output)) = tokio::time::timeout_at(by, child.wait_with_output()).await
            && let Ok(one) = String::from_utf8_lossy(&output.stdout).trim().parse()
        {
            did += one;
        } else {
            did.stuck += 1;
        }
    }
    did
}

/// The quiet neighbour's process.
pub(crate) struct Neighbour(Child);

impl Neighbour {
    /// Returns once it is ready.
    pub(crate) async fn start(
        place: &Place,
        begin: &PipeReader,
        time: Duration,
        dear_views: bool,
    ) -> anyhow::Result<Self> {
        let mut child = command(place, "neighbour", (NEIGHBOUR, NEIGHBOUR), time, usize::from(dear_views))
            .stdin(begin.try_clone()?)
            .spawn()?;
        cgroup::share(cgroup::NEIGHBOUR, child.id());
        let mut output = BufReader::with_capacity(1, child.stdout.as_mut().context("piped")?);
        let mut line = String::new();
        timeout(GRACE, output.read_line(&mut line)).await.context("the neighbour does not get ready")??;
        anyhow::ensure!(line.trim() == READY, "the neighbour does not get ready: {line}");
        Ok(Self(child))
    }

    pub(crate) async fn report(mut self, left: Duration) -> anyhow::Result<Report> {
        let mut text = String::new();
        let output = self.0.stdout.as_mut().context("piped")?;
        timeout(left + GRACE, output.read_to_string(&mut text)).await.context("the neighbour does not stop")??;
        text.trim_end_matches('\n').parse()
    }
}
