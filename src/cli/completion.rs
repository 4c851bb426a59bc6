//! `csrd completion`: a completion script on stdout.

use std::process::ExitCode;

use clap_complete::Shell;

/// Print a shell completion script
///
/// For bash: csrd completion bash > /etc/bash_completion.d/csrd
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell to complete for
    shell: Shell,
}

/// Prints the script for `command`.
pub fn run(args: Args, mut command: clap::Command) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "csrd", &mut script);
    super::print(&script)?;
    Ok(ExitCode::SUCCESS)
}
