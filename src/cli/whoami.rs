//! `csrd whoami`: the caller in the agent's eyes.

use std::process::ExitCode;

use super::{TableFormat, request::SocketArgs};
use crate::client::output;

/// Show how the agent sees this process, which policies match it, what they grant, and why not
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    socket: SocketArgs,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: TableFormat,
}

/// Asks and prints.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let answer = args.socket.client().who_am_i().await?;
    let text = match args.output {
        TableFormat::Table => output::who_am_i(&answer, super::table_style()),
        TableFormat::Json => output::who_am_i_json(&answer),
    };
    super::print(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
