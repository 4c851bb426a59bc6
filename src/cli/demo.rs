//! `csrd demo`: the whole product in one process: an agent with an embedded CA on a temporary socket, and a workload that
//! asks it for a certificate, proves it in a mutual-TLS handshake, and is pushed every renewal.
//!
//! Agent and workload meet on a real socket, so the attestation, the policy and the pushes are those of production. Only
//! the CA is not kept. Needs no root, no configuration and no network.

mod handshake;

use std::{
    io::{self, Write as _},
    pin::pin,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use jiff::Timestamp;
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;

use crate::{
    account::Limits,
    agent::{self, Parts},
    client::{Certificate, Client, Event},
    clock::Clock,
    config::Rates,
    metrics::Metrics,
    policy::{EMBEDDED, PolicySet, Source},
    proto::v1,
    server::admin::Readiness,
    signer::{
        Sign,
        embedded::{self, Embedded},
    },
};

/// Lifetime of the demo's certificates, so that a renewal comes every few seconds.
const LIFETIME_SECONDS: i64 = 8;
/// The name under which the demo's workload serves.
const SERVER_NAME: &str = "demo.csrd.internal";

/// Show it all in one process: issue, handshake, live renewals
///
/// Starts an agent with an embedded CA on a temporary socket, acts as a workload, and stops at Ctrl-C.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// End after this many renewals instead of at Ctrl-C
    #[arg(long, value_name = "N")]
    renewals: Option<u32>,
}

/// Runs agent and workload until the workload has seen enough.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let folder = tempfile::Builder::new().prefix("csrd-demo-").tempdir().context("making a folder for the socket")?;
    let stop = CancellationToken::new();
    let clock = Clock::system();
    let uid = rustix::process::geteuid().as_raw();
    let (policies, in_force) = tokio::sync::watch::channel(Arc::new(demo_policies(uid)));
    let metrics = Metrics::new();
    let (name, ca_lifetime) = (embedded::NAME, embedded::DEFAULT_CA_LIFETIME);
    let signer = Arc::new(Embedded::ephemeral(ca_lifetime, &clock, metrics.signer(name))?);
    let (readiness, limits) = (Readiness::new(), Rates::HOST);
    let bound = agent::build(Parts {
        socket: folder.path().join("csrd.sock"),
        admin: None,
        policies: in_force,
        cluster: None,
        signers: vec![signer.clone() as Arc<dyn Sign>],
        signer_rate: limits.all.into(),
        principal_rate: limits.per_workload.into(),
        limits: Limits::default(),
        seed: rand::random(),
        metrics,
        readiness,
        background: vec![("embedded signer", Box::pin(signer.run(stop.clone())))],
        clock: clock.clone(),
        stop: stop.clone(),
    })
    .await?;
    say(format_args!("agent      serves {} with an embedded CA", bound.socket.display()))?;
    say(format_args!(
        "policy     \"demo\" allows user {uid}: {SERVER_NAME} and spiffe://demo.csrd.internal/user/{uid}"
    ))?;
    let client = Client::new(bound.socket.to_string_lossy().parse()?);
    let workload = async {
        let seen = tokio::select! {
            seen = workload(&client, &clock, args.renewals) => seen,
            _ = tokio::signal::ctrl_c() => Ok(()),
        };
        stop.cancel();
        seen
    };
    let (agent, workload) = tokio::join!(bound.run(), workload);
    drop(policies);
    workload?;
    agent?;
    Ok(ExitCode::SUCCESS)
}

/// What a workload does with the socket.
async fn workload(client: &Client, clock: &Clock, renewals: Option<u32>) -> anyhow::Result<()> {
    let wanted = v1::CertificateRequest {
        dns_names: vec![SERVER_NAME.to_owned()],
        uris: vec![format!("spiffe://demo.csrd.internal/user/{}", rustix::process::geteuid().as_raw())],
        lifetime: Some(prost_types::Duration { seconds: LIFETIME_SECONDS, nanos: 0 }),
        ..Default::default()
    };
    let mut certificate =
        client.issue(wanted.clone(), |stage| drop(say(format_args!("{}", super::issue::stage_line(&stage))))).await?;
    show("issued", &certificate, clock).await?;
    let mut events = pin!(client.subscribe(wanted).after(&certificate).into_stream());
    let mut seen = 0;
    while renewals.is_none_or(|renewals| seen < renewals) {
        match events.next().await.context("the subscription ended")?? {
            Event::Renewed(renewed) | Event::Current(renewed) => {
                seen += 1;
                let left = seconds_to(certificate.not_after, clock)?;
                say(format_args!("renewal {seen}  pushed {left:.1} s before the last one ends"))?;
                certificate = renewed;
                show("renewed", &certificate, clock).await?;
            }
            other => say(format_args!("event      {other:?}"))?,
        }
    }
    Ok(())
}

/// Shows a certificate, and that a client and a server with it accept each other.
async fn show(what: &str, certificate: &Certificate, clock: &Clock) -> anyhow::Result<()> {
    let Certificate { serial_number, not_after, renew_at, .. } = certificate;
    let (life, renewal) = (seconds_to(*not_after, clock)?, seconds_to(*renew_at, clock)?);
    let began = tokio::time::Instant::now();
    say(format_args!("{what:<9}  serial {serial_number}, ends in {life:.1} s, renewal in {renewal:.1} s"))?;
    let session = handshake::with(certificate, SERVER_NAME).await.context("the mutual-TLS handshake failed")?;
    let took = Duration::as_secs_f64(&began.elapsed()) * 1e3;
    say(format_args!("handshake  {session} in {took:.1} ms, each side verified the other"))
}

fn seconds_to(time: Timestamp, clock: &Clock) -> anyhow::Result<f64> {
    Ok(clock.until(time.try_into()?).as_secs_f64())
}

/// The demo's policy; deny by default holds here too.
fn demo_policies(uid: u32) -> PolicySet {
    let text = format!(
        "apiVersion: csrd.dev/v1alpha1
kind: CertificatePolicy
metadata: {{name: demo}}
spec:
  match: {{unix: {{uids: [{uid}]}}}}
  allow:
    dnsNames: [{SERVER_NAME}]
    uris: ['spiffe://demo.csrd.internal/user/{{unix.uid}}']
    lifetime: {{default: {LIFETIME_SECONDS}s, max: {LIFETIME_SECONDS}s}}
"
    );
    PolicySet::parse(&[Source { origin: "demo".to_owned(), text }], EMBEDDED).expect("the demo's policy is valid")
}

fn say(line: std::fmt::Arguments<'_>) -> anyhow::Result<()> {
    Ok(writeln!(io::stdout(), "{line}")?)
}
