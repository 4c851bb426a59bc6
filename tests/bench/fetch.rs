//! Certificates one at a time, many at a time, new and warm.

use std::time::{Duration, Instant};

use csrd::proto::v1;

use crate::{
    crypto,
    process::{Server, ask, subscribe},
    table::{Table, percentile},
};

/// Fetches of one measurement.
const FETCHES: usize = 5_000;
/// Fetches under way at once in the parallel row.
const PARALLEL: usize = 64;
/// Connections that share them.
const CONNECTIONS: usize = 4;

/// A first certificate for a name that the agent has not seen.
pub(crate) async fn new_identity(table: &mut Table) {
    const IDENTITIES: usize = 500;
    let server = Server::agent().await;
    let mut client = server.client().await;
    let mut times = Vec::new();
    for identity in 0..IDENTITIES {
        let began = Instant::now();
        subscribe(&mut client, ask(&format!("new-{identity}"))).await.expect("a certificate");
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    table.alone("new identity to its first certificate, embedded: p50", "ms", percentile(&times, 50), "< 5 ms");
    table.alone("new identity to its first certificate, embedded: p99", "ms", percentile(&times, 99), "");
}

/// A certificate that is at hand.
pub(crate) async fn warm(table: &mut Table) {
    let (floor, ours) = (Server::floor().await, Server::agent().await);
    // Alternating halves, so that a slow moment of the machine meets both.
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let (mut floor_cpu, mut our_cpu) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..2 {
        floor_cpu += one_at_a_time(&floor, &mut a).await;
        our_cpu += one_at_a_time(&ours, &mut b).await;
    }
    a.sort_by(f64::total_cmp);
    b.sort_by(f64::total_cmp);
    for (percent, name) in [(50, "p50"), (99, "p99")] {
        let what = format!("warm fetch, one at a time: {name}");
        table.beside(&what, "ms", percentile(&a, percent), percentile(&b, percent), "<= 2 x floor");
    }
    let per_call = |cpu: Duration| cpu.as_secs_f64() * 1e3 / (2 * FETCHES) as f64;
    table.beside("warm fetch: server CPU per call", "ms", per_call(floor_cpu), per_call(our_cpu), "<= 2 x floor");
    let (floor, ours) = (parallel(&floor).await, parallel(&ours).await);
    table.beside("warm fetch, 64 at a time", "/s", floor, ours, ">= 0.5 x floor");
}

/// Appends each fetch's milliseconds; returns the CPU time the server spent.
async fn one_at_a_time(server: &Server, times: &mut Vec<f64>) -> Duration {
    let mut client = server.client().await;
    for _ in 0..500 {
        subscribe(&mut client, ask("first")).await.expect("a certificate");
    }
    let cpu = server.cpu();
    for _ in 0..FETCHES {
        let began = Instant::now();
        subscribe(&mut client, ask("first")).await.expect("a certificate");
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    server.cpu() - cpu
}

/// Fetches a second with [`PARALLEL`] under way.
async fn parallel(server: &Server) -> f64 {
    const ROUNDS: usize = 400;
    let mut tasks = tokio::task::JoinSet::new();
    let began = Instant::now();
    for _ in 0..CONNECTIONS {
        let client = server.client().await;
        for _ in 0..PARALLEL / CONNECTIONS {
            let mut client = client.clone();
            tasks.spawn(async move {
                for _ in 0..ROUNDS {
                    subscribe(&mut client, ask("first")).await.expect("a certificate");
                }
            });
        }
    }
    tasks.join_all().await;
    (PARALLEL * ROUNDS) as f64 / began.elapsed().as_secs_f64()
}

/// Issuance with a key made by the agent, [`PARALLEL`] under way, in certificates for each second of the agent's CPU.
pub(crate) async fn issuance(table: &mut Table) {
    const ROUNDS: usize = 100;
    let server = Server::agent().await;
    let mut tasks = tokio::task::JoinSet::new();
    let cpu = server.cpu();
    for _ in 0..CONNECTIONS {
        let client = server.client().await;
        for _ in 0..PARALLEL / CONNECTIONS {
            let mut client = client.clone();
            tasks.spawn(async move {
                for _ in 0..ROUNDS {
                    let request = v1::IssueCertificateRequest { request: Some(ask("issue")) };
                    let mut answers = client.issue_certificate(request).await.expect("a stream").into_inner();
                    while answers.message().await.expect("an answer").is_some() {}
                }
            });
        }
    }
    tasks.join_all().await;
    let ours = (PARALLEL * ROUNDS) as f64 / (server.cpu() - cpu).as_secs_f64();
    let floor = crypto::keygen_and_sign_per_second();
    table.beside("embedded issuance, 64 at a time, per core", "/s", floor, ours, ">= 0.25 x floor");
}

/// CPU of an agent that has nothing to do but keep 1000 credentials.
pub(crate) async fn idle_cpu(table: &mut Table) {
    const CREDENTIALS: usize = 1000;
    const WATCHED: Duration = Duration::from_secs(20);
    let server = Server::agent().await;
    let mut client = server.client().await;
    let mut open = Vec::new();
    for credential in 0..CREDENTIALS {
        // A connection carries a bounded number of streams.
        if credential % 100 == 0 {
            client = server.client().await;
        }
        let request = v1::SubscribeRequest { request: Some(ask(&format!("idle-{credential}"))), ..Default::default() };
        let mut answers = client.subscribe(request).await.expect("a stream").into_inner();
        answers.message().await.expect("a certificate");
        open.push(answers);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let cpu = server.cpu();
    tokio::time::sleep(WATCHED).await;
    let percent = (server.cpu() - cpu).as_secs_f64() / WATCHED.as_secs_f64() * 100.0;
    table.alone("idle CPU with 1000 live credentials", "%", percent, "< 0.1 %");
}
