//! `csrd issue`: one certificate, as files or on stdout.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use zeroize::Zeroizing;

use super::{
    UsageError,
    request::{RequestArgs, SocketArgs},
};
use crate::{
    client::{
        output::{self, Summary},
        sink::{DEFAULT_KEY_MODE, Sink, Target},
    },
    files,
    proto::v1,
    text::printable,
};

/// Bytes of the file of --server-ca.
const MAX_ROOTS_BYTES: usize = 1 << 20;
/// Where every pod with a ServiceAccount token has the roots of its API server.
const CLUSTER_ROOTS: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";

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
    /// As root, write even where other users may write: they can still take the files away
    #[arg(long, help_heading = "Output")]
    shared_folder: bool,
    /// Name of the Secret for -o secret
    #[arg(long, value_parser = secret_name, required_if_eq("output", "secret"), help_heading = "Output")]
    name: Option<String>,
    /// Namespace of the Secret for -o secret [default: kubectl's]
    #[arg(long, value_name = "NAME", value_parser = namespace, requires = "name", help_heading = "Output")]
    namespace: Option<String>,
    /// Address of the API server for -o kubeconfig, for example https://10.0.0.1:6443
    #[arg(long, value_name = "URL", value_parser = server, required_if_eq("output", "kubeconfig"), help_heading = "Output")]
    server: Option<String>,
    /// PEM roots of the API server for -o kubeconfig
    #[arg(long, value_name = "FILE", default_value = CLUSTER_ROOTS, help_heading = "Output")]
    server_ca: PathBuf,
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
    /// A kubeconfig with the certificate as its user on stdout; the signer must be kubernetes.io/kube-apiserver-client
    Kubeconfig,
}

/// Asks, shows the stages, writes.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.name.is_some() && args.output != Format::Secret {
        return Err(UsageError("--name is for -o secret".into()).into());
    }
    if args.server.is_some() && args.output != Format::Kubeconfig {
        return Err(UsageError("--server is for -o kubeconfig".into()).into());
    }
    if matches!(args.output, Format::Secret | Format::Kubeconfig) && args.request.holds_key() {
        return Err(
            UsageError("-o secret and -o kubeconfig need the private key, which --csr keeps with you".into()).into()
        );
    }
    // Before anything is issued that could then not be written.
    let roots = match args.output {
        Format::Kubeconfig => read_roots(&args.server_ca)?,
        _ => String::new(),
    };
    let verbose = args.verbose || io::stderr().is_terminal();
    let mut request = args.request.into_request()?;
    if args.output == Format::Kubeconfig && request.usages.is_empty() {
        // kubectl is a client, and kubernetes.io/kube-apiserver-client signs for nothing else.
        request.usages = vec![v1::Usage::ClientAuth.into(), v1::Usage::DigitalSignature.into()];
    }
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
    let shared_folder = args.shared_folder;
    let sink = target.map(|target| Sink { target, key_mode: DEFAULT_KEY_MODE, owner: None, shared_folder });
    sink.as_ref().map_or(Ok(()), Sink::check)?;
    let certificate = args.socket.client().issue(request, progress).await?;
    match sink {
        Some(sink) => sink.write(&certificate)?,
        None => super::print(&match args.output {
            Format::Json => output::json(&certificate),
            Format::Secret => {
                let secret = output::secret(&certificate, &args.name.unwrap_or_default(), args.namespace.as_deref());
                bytes(secret.expect(KEY_IS_OURS))
            }
            Format::Kubeconfig => {
                bytes(output::kubeconfig(&certificate, &args.server.unwrap_or_default(), &roots).expect(KEY_IS_OURS))
            }
            Format::Pem | Format::Files => output::pem(&certificate),
        })?,
    }
    if verbose {
        show(&Summary::from(&certificate).to_string());
    }
    Ok(ExitCode::SUCCESS)
}

const KEY_IS_OURS: &str = "--csr was refused, so the agent made the key";

/// The same memory, which is wiped as before.
fn bytes(mut text: Zeroizing<String>) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(std::mem::take(&mut *text).into_bytes())
}

fn read_roots(path: &Path) -> Result<String, UsageError> {
    let refuse = |why: String| UsageError(format!("--server-ca {}: {why}", path.display()));
    let text = files::read_text(path, MAX_ROOTS_BYTES).map_err(|error| refuse(error.to_string()))?;
    match text.contains("-----BEGIN CERTIFICATE-----") {
        true => Ok(text),
        false => Err(refuse("holds no PEM certificate".to_owned())),
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

fn server(text: &str) -> Result<String, String> {
    output::check_server(text).map(|()| text.to_owned())
}

fn namespace(text: &str) -> Result<String, String> {
    output::check_namespace(text).map(|()| text.to_owned())
}
