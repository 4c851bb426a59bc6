//! The quiet neighbour: a workload with a policy that asks little and at a steady pace, and notices when it waits.
//!
//! It retries nothing. Over one connection that it holds it makes a call every [`HELD_EVERY`], in turns `WhoAmI` and a
//! certificate that is at hand (only that where it is told that `WhoAmI` is dear); every [`NEW_EVERY`] it makes a new connection with one `WhoAmI`; and all the while it
//! follows a certificate that is renewed every few seconds.

use std::{
    cell::RefCell,
    fmt,
    rc::Rc,
    str::FromStr,
    time::{Duration, Instant},
};

use csrd::proto::v1::{self, subscribe_response::Event};
use tokio::time::{sleep, timeout};
use tonic::{Status, Streaming};

use crate::act::{Client, Orders, connect, now};

const HELD_EVERY: Duration = Duration::from_millis(10);
const NEW_EVERY: Duration = Duration::from_millis(50);
/// A call that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(5);
/// The lifetime of the certificate that is followed: some renewals in a row.
const LIFETIME_SECONDS: i64 = 8;
/// What it says once its connection and its certificate are there.
pub(crate) const READY: &str = "ready";

/// What it noticed; as text, what its process prints.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    /// Milliseconds of calls over the held connection, and over new ones.
    pub(crate) held: Spread,
    pub(crate) new: Spread,
    /// Calls and connections that failed or took longer than [`PATIENCE`], and streams that ended.
    pub(crate) failures: u64,
    pub(crate) renewals: u64,
    /// Those that came after the end of the certificate before, or had not come by then.
    pub(crate) late: u64,
    /// Messages that a renewal is delayed.
    pub(crate) delayed: u64,
    /// The first failure in words.
    pub(crate) first: String,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spread {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

#[derive(Debug, Default)]
struct Seen {
    held: Vec<f64>,
    new: Vec<f64>,
    report: Report,
}

type Shared = Rc<RefCell<Seen>>;

/// Gets ready, and lives from the moment on at which all begin.
pub(crate) async fn live(orders: Orders) -> Report {
    let seen = Shared::default();
    let Some((client, stream)) = ready(&orders, &seen).await else { return report(seen) };
    println!("{READY}");
    let orders = orders.begun().await;
    let followed = follow(&orders, stream, &seen);
    tokio::join!(held(&orders, client, &seen), new(&orders, &seen), followed);
    report(seen)
}

/// A connection, and a stream whose first certificate was read from it.
async fn ready(orders: &Orders, seen: &Shared) -> Option<(Client, (Following, Streaming<v1::SubscribeResponse>))> {
    let connected = timeout(PATIENCE, async {
        let mut client = connect(orders).await?;
        warm(&mut client).await?;
        let stream = subscribe(&mut client).await?;
        Ok::<_, Status>((client, stream))
    });
    let connected = failed(seen, "getting ready", connected.await);
    if connected.is_none() {
        // Whatever the reason, there is nothing to measure.
        seen.borrow_mut().report.failures += 1;
    }
    connected
}

fn ask(name: &str) -> v1::CertificateRequest {
    v1::CertificateRequest { dns_names: vec![format!("{name}.neighbour.test")], ..Default::default() }
}

/// A certificate that is at hand, from its second time on.
async fn warm(client: &mut Client) -> Result<(), Status> {
    let request = v1::SubscribeRequest { request: Some(ask("warm")), ..Default::default() };
    let mut answers = client.subscribe(request).await?.into_inner();
    answers.message().await?.ok_or_else(|| Status::unavailable("no answer")).map(drop)
}

async fn who_am_i(client: &mut Client) -> Result<(), Status> {
    client.who_am_i(v1::WhoAmIRequest {}).await.map(drop)
}

/// `None` and a failure more, if it did not go well in time.
fn failed<T>(seen: &Shared, what: &str, outcome: Result<Result<T, Status>, impl Sized>) -> Option<T> {
    let text = match outcome {
        Ok(Ok(value)) => return Some(value),
        Ok(Err(status)) => format!("{:?} {}", status.code(), status.message()),
        Err(_) => format!("no answer in {} s", PATIENCE.as_secs()),
    };
    let report = &mut seen.borrow_mut().report;
    report.failures += 1;
    if report.first.is_empty() {
        report.first = format!("{what}: {}", text.replace(['\n', '\t'], " "));
    }
    None
}

/// Adds what a call took that was due every so often: a caller that had not waited for it would have had to wait for
/// the rest of it at each of the times that were missed.
fn record(times: &mut Vec<f64>, took: Duration, every: Duration) {
    let mut left = took;
    loop {
        times.push(left.as_secs_f64() * 1e3);
        match left.checked_sub(every) {
            Some(rest) if !rest.is_zero() => left = rest,
            _ => return,
        }
    }
}

async fn held(orders: &Orders, mut client: Client, seen: &Shared) {
    let mut turn = 0;
    while !orders.over() {
        let began = Instant::now();
        turn += 1;
        let (what, outcome) = match turn % 2 {
            0 if orders.many == 0 => ("WhoAmI", timeout(PATIENCE, who_am_i(&mut client)).await),
            _ => ("a certificate at hand", timeout(PATIENCE, warm(&mut client)).await),
        };
        let took = began.elapsed();
        failed(seen, what, outcome);
        record(&mut seen.borrow_mut().held, took, HELD_EVERY);
        sleep(HELD_EVERY.saturating_sub(took)).await;
    }
}

async fn new(orders: &Orders, seen: &Shared) {
    while !orders.over() {
        let began = Instant::now();
        let called = async {
            let mut client = connect(orders).await?;
            if orders.many == 0 { who_am_i(&mut client).await } else { warm(&mut client).await }
        };
        let outcome = timeout(PATIENCE, called).await;
        let took = began.elapsed();
        failed(seen, "a call over a new connection", outcome);
        record(&mut seen.borrow_mut().new, took, NEW_EVERY);
        sleep(NEW_EVERY.saturating_sub(took)).await;
    }
}

/// Milliseconds since 1970 at which the certificate in force ends.
type Following = u64;

async fn subscribe(client: &mut Client) -> Result<(Following, Streaming<v1::SubscribeResponse>), Status> {
    let lifetime = Some(prost_types::Duration { seconds: LIFETIME_SECONDS, nanos: 0 });
    let request = v1::CertificateRequest { lifetime, ..ask("renewed") };
    let request = v1::SubscribeRequest { request: Some(request), ..Default::default() };
    let mut answers = client.subscribe(request).await?.into_inner();
    let first = answers.message().await?.ok_or_else(|| Status::unavailable("no answer"))?;
    match first.event {
        Some(Event::Current(v1::Current { certificate: Some(certificate) })) => Ok((ends(&certificate), answers)),
        other => Err(Status::internal(format!("{other:?}"))),
    }
}

fn ends(certificate: &v1::Certificate) -> u64 {
    certificate.not_after.as_ref().map_or(0, |at| at.seconds as u64 * 1000 + at.nanos as u64 / 1_000_000)
}

/// Counts renewals, and those that are late.
async fn follow(orders: &Orders, followed: (Following, Streaming<v1::SubscribeResponse>), seen: &Shared) {
    let (mut end, mut stream) = followed;
    while let Ok(message) = timeout(orders.left(), stream.message()).await {
        match message.map(|message| message.and_then(|message| message.event)) {
            Ok(Some(Event::Renewed(v1::Renewed { certificate: Some(certificate) }))) => {
                let report = &mut seen.borrow_mut().report;
                report.renewals += 1;
                report.late += u64::from(now() > end);
                end = ends(&certificate);
            }
            Ok(Some(Event::RenewalDelayed(_))) => seen.borrow_mut().report.delayed += 1,
            Ok(Some(_)) => {}
            ended => {
                let status = ended.err().unwrap_or_else(|| Status::unavailable("it ended"));
                failed::<()>(seen, "the stream of renewals", Ok::<_, ()>(Err(status)));
                (end, stream) = loop {
                    if orders.over() {
                        return;
                    }
                    let anew = timeout(orders.left(), async { subscribe(&mut connect(orders).await?).await }).await;
                    if let Ok(Ok((ends, stream))) = anew {
                        seen.borrow_mut().report.late += u64::from(now() > end);
                        break (ends, stream);
                    }
                    sleep(NEW_EVERY).await;
                };
            }
        }
    }
    seen.borrow_mut().report.late += u64::from(now() > end);
}

fn report(seen: Shared) -> Report {
    let Seen { held, new, report } = seen.take();
    Report { held: Spread::of(held), new: Spread::of(new), ..report }
}

impl Spread {
    fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        let at = |percent: usize| times.get((times.len() * percent / 100).min(times.len().saturating_sub(1)));
        let at = |percent| at(percent).copied().unwrap_or(f64::NAN);
        Self { p50: at(50), p99: at(99), max: at(100) }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Spread { p50, p99, max } in [self.held, self.new] {
            write!(f, "{p50}\t{p99}\t{max}\t")?;
        }
        write!(f, "{}\t{}\t{}\t{}\t{}", self.failures, self.renewals, self.late, self.delayed, self.first)
    }
}

impl FromStr for Report {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> anyhow::Result<Self> {
        let fields: Vec<&str> = line.split('\t').collect();
        anyhow::ensure!(fields.len() == 11, "no report: {line:?}");
        let spread = |at: usize| -> anyhow::Result<Spread> {
            Ok(Spread { p50: fields[at].parse()?, p99: fields[at + 1].parse()?, max: fields[at + 2].parse()? })
        };
        Ok(Self {
            held: spread(0)?,
            new: spread(3)?,
            failures: fields[6].parse()?,
            renewals: fields[7].parse()?,
            late: fields[8].parse()?,
            delayed: fields[9].parse()?,
            first: fields[10].to_owned(),
        })
    }
}
