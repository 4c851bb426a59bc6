//! The `csrd` binary: what must be set for the whole process before anything runs, then [`csrd::cli::run`].

use std::{process::ExitCode, time::Duration};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long a thread that reads or hashes a file may hold up the end of the process.
const BLOCKING_GRACE: Duration = Duration::from_secs(1);

#[allow(clippy::print_stderr, reason = "nothing else can report it yet")]
fn main() -> ExitCode {
    csrd::cli::forbid_core_dumps();
    rustls::crypto::aws_lc_rs::default_provider().install_default().expect("nothing has run before main");
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => {
            let exit = runtime.block_on(csrd::cli::run());
            runtime.shutdown_timeout(BLOCKING_GRACE);
            exit
        }
        Err(error) => {
            eprintln!("csrd: cannot start the runtime: {error}");
            csrd::cli::Exit::Failure.into()
        }
    }
}
