//! `csrd issue`: one certificate, as files or on stdout.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use super::{
    UsageError,
    request::{RequestArgs, SocketArgs},
};
use crate::{
    client::{
        Certificate,
        output::{self, Summary},
        printable,
        sink::{DEFAULT_KEY_MODE, Sink, Target},
    },
    proto::v1,
};

/// Ask for one certificate
///
/// Writes tls.crt (0644), tls.key (0600) and ca.crt (0644), or what -o or --combined says. Stages are shown on stderr
/// when it is a terminal.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    socket: SocketArgs,
    #[command(flatten)]
    request: RequestArgs,
    /// Output format
    #[arg(short, long, value_enum, default_value_t, help_heading = "Output")]
    output: Format,
    /// Folder for -o files
    #[arg(long, value_name = "DIR", default_value = ".", help_heading = "Output")]
    dir: PathBuf,
    /// One file with the key and then the chain (0600), as haproxy and the kubelet read it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["output", "dir", "csr"], help_heading = "Output")]
    combined: Option<PathBuf>,
    /// Name of the Secret for -o secret
    #[arg(long, value_parser = secret_name, required_if_eq("output", "secret"), help_heading = "Output")]
    name: Option<String>,
    /// Namespace of the Secret for -o secret [default: kubectl's]
    #[arg(long, value_name = "NAME", value_parser = namespace, requires = "name", help_heading = "Output")]
    namespace: Option<String>,
    /// Show the stages even if stderr is no terminal
    #[arg(short, long, help_heading = "Output")]
    verbose: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// Three files in --dir
    #[default]
    Files,
    /// One JSON object on stdout, with the private key
    Json,
    /// The private key and the chain on stdout
    Pem,
    /// A kubernetes.io/tls Secret on stdout, for kubectl apply --server-side -f -
    Secret,
}

/// Asks, shows the stages, writes.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.name.is_some() && args.output != Format::Secret {
        return Err(UsageError("--name is for -o secret".into()).into());
    }
    if args.output == Format::Secret && args.request.holds_key() {
        return Err(UsageError("-o secret needs the private key, which --csr keeps with you".into()).into());
    }
    let verbose = args.verbose || io::stderr().is_terminal();
    let request = args.request.into_request()?;
    let progress = |stage: v1::Stage| {
        if verbose {
            show(&stage_line(&stage));
        }
    };
    let target = match args.combined {
        Some(file) => Some(Target::Combined(file)),
        None if args.output == Format::Files => Some(Target::Files(args.dir)),
        None => None,
    };
    let sink = target.map(|target| Sink { target, key_mode: DEFAULT_KEY_MODE, owner: None });
    sink.as_ref().map_or(Ok(()), Sink::check)?;
    let certificate = args.socket.client().issue(request, progress).await?;
    match sink {
        Some(sink) => sink.write(&certificate)?,
        None => print(&certificate, args.output, args.name.as_deref(), args.namespace.as_deref())?,
    }
    if verbose {
        show(&Summary::from(&certificate).to_string());
    }
    Ok(ExitCode::SUCCESS)
}

fn print(certificate: &Certificate, format: Format, name: Option<&str>, namespace: Option<&str>) -> io::Result<()> {
    match format {
        Format::Json => super::print(&output::json(certificate)),
        Format::Secret => {
            let secret = output::secret(certificate, name.unwrap_or_default(), namespace);
            super::print(secret.expect("--csr was refused, so the agent made the key").as_bytes())
        }
        Format::Pem | Format::Files => super::print(&output::pem(certificate)),
    }
}

/// For example `   0.41 ms  granted    policy web`.
pub(super) fn stage_line(stage: &v1::Stage) -> String {
    let elapsed = stage.elapsed.and_then(|elapsed| Duration::try_from(elapsed).ok()).unwrap_or_default();
    let name = stage.kind().as_str_name().trim_start_matches("STAGE_KIND_").to_lowercase();
    format!("{:>9.2} ms  {name:<9}  {}", elapsed.as_secs_f64() * 1e3, printable(&stage.detail))
}

fn show(line: &str) {
    // The stages are a courtesy: a closed stderr must not cost the certificate.
    let _ = writeln!(io::stderr(), "{line}");
}

fn secret_name(text: &str) -> Result<String, String> {
    output::check_secret_name(text).map(|()| text.to_owned())
}

fn namespace(text: &str) -> Result<String, String> {
    output::check_namespace(text).map(|()| text.to_owned())
}
