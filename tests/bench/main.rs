//! The budgets: each figure beside its floor, measured in the same run on the same machine by the same client.
//!
//! `cargo bench` prints the table; `cargo bench -- warm` only the rows of the groups whose name has that in it. The floor is a tonic server on a unix socket that attests nobody and streams one
//! canned answer of the same size (current-thread runtime), or what the row says. Nothing here passes or fails: machines
//! are noisy, ratios hold.

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
    pub(crate) mod cluster;
    pub(crate) mod pods {
        pub(crate) mod cgroup;
    }
    pub(crate) mod raw_h2;
}

mod authority;
mod crypto;
mod csr;
mod fetch;
mod floor;
mod pod;
mod process;
mod streams;
mod table;

use table::Table;

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let wanted = arguments.next().unwrap_or_default();
    if wanted == floor::ARGUMENT {
        return floor::serve(&arguments.next().expect("the floor is given a socket"));
    }
    if wanted == pod::ARGUMENT {
        return pod::act(&arguments.next().expect("a pod is given a socket"));
    }
    let wants = |group: &str| group.contains(&wanted);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut table = Table::new();
        if wants("start") {
            process::start(&mut table).await;
        }
        if wants("new") {
            fetch::new_identity(&mut table).await;
        }
        if wants("warm") {
            fetch::warm(&mut table).await;
        }
        if wants("issuance") {
            fetch::issuance(&mut table).await;
        }
        if wants("adapter") {
            authority::adapter(&mut table).await;
        }
        if wants("memory") {
            streams::idle_memory(&mut table).await;
        }
        if wants("rotation") {
            streams::rotation(&mut table).await;
        }
        if wants("idle") {
            fetch::idle_cpu(&mut table).await;
        }
        if wants("binary") {
            process::binary(&mut table);
        }
        if wants("cluster") {
            csr::figures(&mut table).await;
        }
    });
}
