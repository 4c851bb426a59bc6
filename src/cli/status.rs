//! `csrd status`: the agent's live credentials.

use std::process::ExitCode;

use super::{TableFormat, request::SocketArgs};
use crate::client::output;

/// List live credentials: your own, or all of them for root and the agent's user
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
    let credentials = args.socket.client().credentials().await?;
    let text = match args.output {
        TableFormat::Table => output::credentials(&credentials, super::table_style()),
        TableFormat::Json => output::credentials_json(&credentials),
    };
    super::print(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
