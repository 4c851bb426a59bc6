//! The budgets: each figure beside its floor, measured in the same run on the same machine by the same client.
//!
//! `cargo bench` prints the table. The floor is a tonic server on a unix socket that attests nobody and streams one
//! canned answer of the same size (current-thread runtime), or what the row says. Nothing here passes or fails: machines
//! are noisy, ratios hold.

#![allow(clippy::disallowed_methods, reason = "a benchmark measures real time and starts real processes")]
#![allow(clippy::print_stdout, reason = "the table is what it is for")]

#[path = "../it/raw_h2.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with the integration tests, which use the rest")]
mod raw_h2;

mod crypto;
mod fetch;
mod floor;
mod process;
mod streams;
mod table;

use table::Table;

fn main() {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(floor::ARGUMENT) {
        return floor::serve(&arguments.next().expect("the floor is given a socket"));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut table = Table::new();
        process::start(&mut table).await;
        fetch::new_identity(&mut table).await;
        fetch::warm(&mut table).await;
        fetch::issuance(&mut table).await;
        streams::idle_memory(&mut table).await;
        streams::rotation(&mut table).await;
        fetch::idle_cpu(&mut table).await;
        process::binary(&mut table);
    });
}
