//! The rows: each an attack that once worked.

use crate::{
    agent::{MEMBER, OUTSIDER, Settings},
    cast::Group,
    probes::Other,
};

/// Users of attackers: with a policy, and without any.
const MEMBERS: u32 = 10_000;
const OUTSIDERS: u32 = 30_000;

const SECONDS: u64 = 15;
/// Rows in which many things are begun one after another.
const LONG_SECONDS: u64 = 25;

/// One attack.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// What `Did::done` counts, or `None` where what is held counts.
    pub(crate) rate: Option<&'static str>,
    pub(crate) agent: Settings,
    pub(crate) groups: Vec<Group>,
    pub(crate) others: Option<Other>,
    pub(crate) seconds: u64,
}

impl Row {
    fn new(name: &str, rate: Option<&'static str>, groups: Vec<Group>) -> Self {
        Self { name: name.to_owned(), rate, agent: Settings::default(), groups, others: None, seconds: SECONDS }
    }

    fn with(self, agent: Settings) -> Self {
        Self { agent, ..self }
    }

    fn others(self, other: Other) -> Self {
        Self { others: Some(other), ..self }
    }

    fn long(self) -> Self {
        Self { seconds: LONG_SECONDS, ..self }
    }
}

/// One process of a user without a policy.
fn outsider(part: &'static str, many: usize) -> Vec<Group> {
    outsiders(part, 1, many)
}

/// So many of them, each of its own user.
fn outsiders(part: &'static str, processes: usize, many: usize) -> Vec<Group> {
    group(part, OUTSIDERS, OUTSIDER, processes, many)
}

/// The same of users with a policy.
fn members(part: &'static str, processes: usize, many: usize) -> Vec<Group> {
    group(part, MEMBERS, MEMBER, processes, many)
}

fn group(part: &'static str, first_uid: u32, gid: u32, processes: usize, many: usize) -> Vec<Group> {
    vec![Group { part, first_uid, gid, processes: processes as u32, many }]
}

/// All rows, those of one principal before those of many.
pub(crate) fn all(principals: usize) -> Vec<Row> {
    let cluster = || Settings { all: (25, 50), per_workload: (25, 50), ..Settings::default() };
    // (descriptors - 512) / 3 places for connections: 512.
    let crowded = || Settings { descriptors: 2048, ..Settings::default() };
    let views = || Settings { policies: (200, 60), ..Settings::default() };
    let many = |name: &str| format!("{name}-many");
    vec![
        Row::new("alone", Some("/s"), Vec::new()),
        Row::new("freeze", Some("sockets/s"), outsider("freeze", 1)),
        Row::new("freeze-unread", Some("sockets/s"), outsider("freeze-unread", 1)),
        Row::new("freeze-many", Some("sockets/s"), outsiders("freeze", principals, 1)).long(),
        Row::new("port-34", None, outsider("operators", 34)),
        Row::new("port-500", None, outsider("operators", 500)),
        Row::new("renewals", Some("certificates/s"), members("issue", 1, 16)).with(cluster()),
        Row::new(&many("renewals"), Some("certificates/s"), members("issue", principals, 1)).with(cluster()).long(),
        Row::new("idle", None, outsider("idle", 4000)),
        Row::new("half", None, outsider("half", 4000)),
        Row::new("unfinished", None, outsider("unfinished", 4000)),
        Row::new(&many("idle"), None, outsiders("idle", principals, 8)).long(),
        Row::new(&many("half"), None, outsiders("half", principals, 4)).long(),
        Row::new(&many("unfinished"), None, outsiders("unfinished", principals, 2)).long(),
        Row::new("entries", None, members("subscribe", 16, 2048)).others(Other::Newcomer).long(),
        Row::new(&many("entries"), None, members("subscribe", principals, 40)).others(Other::Newcomer).long(),
        Row::new("refused", Some("calls/s"), outsider("refused", 128)),
        Row::new("passed", Some("sockets/s"), outsider("passed", 1)),
        Row::new("nacks", Some("messages/s"), members("nack", 1, 1)),
        Row::new("nacks-delta", Some("messages/s"), members("nack-delta", 1, 1)),
        Row::new("places", None, outsiders("idle", 520, 1)).with(crowded()).others(Other::Status),
        Row::new("connects", Some("connections/s"), outsider("connect", 4)).others(Other::WhoAmI),
        Row::new(&many("connects"), Some("connections/s"), outsiders("connect", principals, 1))
            .others(Other::WhoAmI)
            .long(),
        Row::new("whoami", Some("calls/s"), members("whoami", 1, 256)).with(views()),
    ]
}
