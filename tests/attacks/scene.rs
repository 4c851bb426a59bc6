//! One row: an agent, its quiet neighbour, the attackers, and what others try meanwhile.

use std::{pin::pin, time::Duration};

use tokio::time::sleep;

use crate::{
    act::{Did, now},
    agent::Agent,
    cast::{self, Neighbour},
    neighbour::Report,
    probes::{self, Tries},
    rows::Row,
};

/// How often memory and log are looked at.
const LOOK: Duration = Duration::from_millis(200);
/// Looks at others after the attackers have left.
const AFTERWARDS: u32 = 2;

/// What came of a row.
#[derive(Debug)]
pub(crate) struct Figures {
    pub(crate) did: Did,
    pub(crate) neighbour: Report,
    pub(crate) probes: Tries,
    pub(crate) others: Option<Tries>,
    /// Peak of the agent's resident memory.
    pub(crate) peak_mib: f64,
    /// How the agent ended, if it did.
    pub(crate) fate: Option<String>,
    pub(crate) lines: u64,
    pub(crate) busiest: u64,
    pub(crate) limited: bool,
}

/// Plays a row to its end.
pub(crate) async fn play(row: &Row) -> anyhow::Result<Figures> {
    let mut agent = Agent::start(&row.agent).await?;
    let place = agent.place.clone();
    let time = Duration::from_secs(row.seconds);
    let (begin, hold) = std::io::pipe()?;
    let neighbour = Neighbour::start(&place, &begin, time, row.agent.policies.0 > 0).await?;
    let mut children = Vec::new();
    for group in &row.groups {
        children.extend(group.start(&place, &begin, time).await?);
    }
    agent.log.begin();
    let until = now() + row.seconds * 1000;
    drop(hold);
    let attack = async {
        let (did, report) = tokio::join!(cast::ended(children, time), neighbour.report(time));
        anyhow::Ok((did, report?))
    };
    let tried = async {
        match row.others {
            Some(other) => Some(probes::others(&place, other, until).await),
            None => None,
        }
    };
    let mut played = pin!(async {
        let (attacked, probes, others) = tokio::join!(attack, probes::kubelet(place.admin, until), tried);
        attacked.map(|(did, neighbour)| (did, neighbour, probes, others))
    });
    let (did, neighbour, probes, mut others) = loop {
        tokio::select! {
            played = &mut played => break played?,
            () = sleep(LOOK) => agent.look(),
        }
    };
    agent.look();
    let (lines, busiest) = (agent.log.lines, agent.log.busiest);
    if let (Some(other), Some(others)) = (row.others, &mut others) {
        for turn in 0..AFTERWARDS {
            others.add(probes::tried(&place, other, probes::TIMES + turn).await);
        }
    }
    let (peak_mib, fate, limited) = (agent.peak_mib(), agent.fate(), agent.is_limited());
    Ok(Figures { did, neighbour, probes, others, peak_mib, fate, lines, busiest, limited })
}
