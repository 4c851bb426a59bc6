//! The `csrd` binary: what must be set for the whole process before anything runs, then [`csrd::cli::run`].

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[allow(clippy::print_stderr, reason = "nothing else can report it yet")]
fn main() -> ExitCode {
    csrd::cli::forbid_core_dumps();
    rustls::crypto::aws_lc_rs::default_provider().install_default().expect("nothing has run before main");
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(csrd::cli::run()),
        Err(error) => {
            eprintln!("csrd: cannot start the runtime: {error}");
            csrd::cli::Exit::Failure.into()
        }
    }
}
