//! The table of attacks: what a quiet neighbour notices while others do their worst to the same agent.
//!
//! `cargo bench --bench attacks` as root prints the whole table; `-- freeze entries` only the rows whose names begin so, and
//! `--principals 300` changes how many users the rows with "many" in their names have. Each row starts a release build of
//! the agent as a user of its own, under the shipped memory limit, and attackers that are processes of real users, and
//! prints figures beside the goals; `!` marks a goal that is missed. Nothing here passes or fails by its figures: it ends
//! with an error only if a row could not be run.

#![allow(clippy::disallowed_methods, reason = "a benchmark measures real time and starts real processes")]
#![allow(clippy::print_stdout, reason = "the table is what it is for")]

#[path = "../it"]
#[allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "shared with the integration tests, which use the rest"
)]
mod it {
    pub(crate) mod raw_h2;
}

mod act;
mod agent;
mod cast;
mod cgroup;
mod log;
mod neighbour;
mod probes;
mod rows;
mod scene;
mod table;

use std::process::ExitCode;

use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};

use table::Table;

/// Descriptors that an attacker may hold: more than any row's connections.
const DESCRIPTORS: u64 = 8192;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    if arguments.first().is_some_and(|argument| argument == act::ARGUMENT) {
        return runtime.block_on(act::act(&arguments[1..]));
    }
    let Some((names, principals)) = wanted(arguments) else {
        println!("usage: attacks [row...] [--principals 1..=10000]");
        return ExitCode::FAILURE;
    };
    if !geteuid().is_root() {
        println!("attacks need root: they are processes of other users");
        return ExitCode::FAILURE;
    }
    if raise_descriptors() < DESCRIPTORS {
        println!("attacks need {DESCRIPTORS} descriptors: raise the hard limit");
        return ExitCode::FAILURE;
    }
    let rows = rows::all(principals).into_iter();
    let rows = rows.filter(|row| names.is_empty() || names.iter().any(|name| row.name.starts_with(name.as_str())));
    let mut ended = ExitCode::SUCCESS;
    let mut table = Table::new();
    for row in rows {
        match runtime.block_on(scene::play(&row)) {
            Ok(figures) => table.row(&row, &figures),
            Err(error) => {
                println!("{}: not run: {error:#}", row.name);
                ended = ExitCode::FAILURE;
            }
        }
    }
    cgroup::remove_shares();
    ended
}

/// As many as may be, for this process and its children.
fn raise_descriptors() -> u64 {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Rows by the beginnings of their names, and how many principals "many" is.
fn wanted(arguments: Vec<String>) -> Option<(Vec<String>, usize)> {
    let (mut names, mut principals) = (Vec::new(), 1000);
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--principals" => principals = arguments.next()?.parse().ok().filter(|it| (1..=10_000).contains(it))?,
            flag if flag.starts_with('-') => return None,
            _ => names.push(argument),
        }
    }
    Some((names, principals))
}
