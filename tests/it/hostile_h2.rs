//! Clients that hold what they can: each is refused within a bound, and another client is served all the while.
//!
//! Time is paused, so a minute of silence is a moment; connections are pipes, so that nothing else tells the time.

use std::{num::NonZeroU32, sync::Arc, time::Duration, time::SystemTime};

use csrd::{
    attest::{Attestor, Caller, Workload},
    clock::Clock,
    hub::{self, Hub, Rate},
    metrics::Metrics,
    policy::PolicySet,
    server::{
        Engine, FIRST_REQUEST_TIMEOUT, Limits, MAX_REQUEST_BYTES, MAX_STREAMS_PER_CONNECTION, REQUEST_BODY_TIMEOUT,
        Server, WINDOW_BYTES,
    },
};
use tokio::{
    io::DuplexStream,
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::raw_h2::{
    ACK, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, Outcome, PING, RST_STREAM, RawClient, SETTINGS,
    WINDOW_UPDATE, field, frame, hello, indexed,
};

const REFUSED_STREAM: u32 = 7;
const ENHANCE_YOUR_CALM: u32 = 11;

/// Room for everything a test sends, where it is not the pipe that shall stop it.
const WIDE: usize = 16 * 1024 * 1024;

/// The server and its connections.
pub(crate) struct Host {
    pub(crate) server: Server,
    connections: JoinSet<()>,
    _policies: watch::Sender<Arc<PolicySet>>,
}

impl Host {
    fn new() -> Self {
        Self::with_metrics(Metrics::new())
    }

    pub(crate) fn with_metrics(metrics: Metrics) -> Self {
        let rate = Rate { per_second: NonZeroU32::MIN, burst: NonZeroU32::MIN };
        let (sender, policies) = watch::channel(Arc::new(PolicySet::default()));
        let hub = Hub::new(hub::Parts {
            clock: Clock::paused(SystemTime::UNIX_EPOCH),
            policies,
            signers: Vec::new(),
            signer_rate: rate,
            principal_rate: rate,
            seed: 1,
            metrics: metrics.clone(),
        });
        let engine = Engine {
            hub,
            attestor: Arc::new(Attestor::new()),
            default_signer: String::new(),
            operator_uid: 0,
            limits: Limits::default(),
            metrics,
            stop: CancellationToken::new(),
        };
        let (_, health) = tonic_health::server::health_reporter();
        let server = Server::new(engine, Routes::new(health));
        Self { server, connections: JoinSet::new(), _policies: sender }
    }

    fn connect(&mut self, pipe_bytes: usize) -> RawClient<DuplexStream> {
        let (client, io) = tokio::io::duplex(pipe_bytes);
        let (server, caller) = (self.server.clone(), Caller::Fixed(Arc::new(Workload::of_uid(1000))));
        self.connections.spawn(async move { server.connection(io, 1000, Ok(caller)).await });
        RawClient::new(client)
    }

    /// Another client gets its answer.
    async fn serves_its_neighbour(&mut self) {
        let mut neighbour = self.connect(WIDE);
        neighbour.send(&[hello(), who_am_i(1), frame(DATA, END_STREAM, 1, &[0; 5])].concat()).await;
        assert_eq!(neighbour.outcome(1).await, Outcome::Answered);
        let answer = neighbour.frame().await.expect("the answer's message");
        assert!(answer.kind == DATA && answer.payload.len() > 20, "{answer:?}");
    }
}

/// The headers of a call whose message is still to come.
fn who_am_i(stream: u32) -> Vec<u8> {
    let block = [
        indexed(3),
        indexed(6),
        field(":path", "/csrd.v1.CertificateService/WhoAmI"),
        field(":authority", "run%2Fcsrd.sock"),
        field("te", "trailers"),
        field("content-type", "application/grpc"),
    ];
    frame(HEADERS, END_HEADERS, stream, &block.concat())
}

fn code(frame: &Frame) -> u32 {
    let at = if frame.kind == GOAWAY { 4 } else { 0 };
    u32::from_be_bytes(*frame.payload[at..].first_chunk().expect("an error code"))
}

/// Everything the server says until it has seen all that was sent, or ends the connection.
async fn answers(client: &mut RawClient<DuplexStream>) -> Vec<Frame> {
    client.send(&frame(PING, 0, 0, b"the last")).await;
    let mut frames = Vec::new();
    while let Some(frame) = client.frame().await {
        let last = frame.kind == GOAWAY || frame.payload == b"the last";
        frames.push(frame);
        if last {
            break;
        }
    }
    frames
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_streams_of_one_client_are_refused_past_their_bound() {
    let mut host = Host::new();
    let mut client = host.connect(WIDE);
    client.send(&hello()).await;
    let mut stream = 1;
    for _ in 0..100 {
        for _ in 0..100 {
            client.send(&who_am_i(stream)).await;
            stream += 2;
        }
        host.serves_its_neighbour().await;
    }
    let frames = answers(&mut client).await;
    let refused = frames.iter().filter(|frame| frame.kind == RST_STREAM && code(frame) == REFUSED_STREAM).count();
    let ended = frames.iter().any(|frame| frame.kind == GOAWAY);
    assert!(ended || refused >= 10_000 - MAX_STREAMS_PER_CONNECTION as usize, "{refused} refused");
    host.serves_its_neighbour().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_of_one_byte_a_minute_loses_its_connection() {
    let mut host = Host::new();
    let start = [hello(), who_am_i(1)].concat();
    for sent in [0, 10, hello().len(), hello().len() + 3, start.len() - 1] {
        let mut client = host.connect(WIDE);
        client.send(&start[..sent]).await;
        // The next byte would come after a minute.
        let began = Instant::now();
        let closed = async { while client.frame().await.is_some() {} };
        assert!(timeout(Duration::from_secs(60), closed).await.is_ok(), "still open after {sent} bytes");
        assert!(began.elapsed() >= FIRST_REQUEST_TIMEOUT, "closed {:?} after {sent} bytes", began.elapsed());
        host.serves_its_neighbour().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_of_one_byte_a_minute_ends_its_call() {
    let mut host = Host::new();
    let mut client = host.connect(WIDE);
    client.send(&[hello(), who_am_i(1), frame(DATA, 0, 1, &[0])].concat()).await;
    let began = Instant::now();
    let outcome = client.outcome(1).await;
    assert!(matches!(outcome, Outcome::Answered | Outcome::Reset(_)), "{outcome:?}");
    assert!(began.elapsed() < REQUEST_BODY_TIMEOUT * 2, "{:?}", began.elapsed());
    host.serves_its_neighbour().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_reads_is_not_read_from() {
    let pipe = 1024;
    let calls = |stream: u32| [who_am_i(stream), frame(DATA, END_STREAM, stream, &[0; 5])].concat();
    let pings = |_| frame(PING, 0, 0, &[0; 8]);
    let settings = |_| frame(SETTINGS, 0, 0, &[]);
    for (name, flood) in [("calls", &calls as &dyn Fn(u32) -> Vec<u8>), ("PING", &pings), ("SETTINGS", &settings)] {
        let mut host = Host::new();
        let mut client = host.connect(pipe);
        client.send(&hello()).await;
        client.send(&calls(1)).await;
        let mut taken = 0;
        for stream in (3..200_001).step_by(2) {
            let bytes = flood(stream);
            // Nothing else waits for time, so a second passes only if the pipe stays full.
            if timeout(Duration::from_secs(1), client.send(&bytes)).await != Ok(true) {
                break;
            }
            taken += bytes.len();
        }
        assert!(taken < 1024 * 1024, "{name}: {taken} bytes were taken");
        host.serves_its_neighbour().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_resets_ends_the_connection() {
    let mut host = Host::new();
    let mut client = host.connect(WIDE);
    client.send(&hello()).await;
    for stream in (1..20_001).step_by(2) {
        client.send(&[who_am_i(stream), frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat()).await;
    }
    let frames = answers(&mut client).await;
    let last = frames.last().expect("an answer");
    assert_eq!((last.kind, code(last)), (GOAWAY, ENHANCE_YOUR_CALM));
    host.serves_its_neighbour().await;
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_pings_or_settings_is_answered_and_keeps_nobody_waiting() {
    for kind in [PING, SETTINGS] {
        let mut host = Host::new();
        let mut client = host.connect(WIDE);
        client.send(&[hello(), who_am_i(1)].concat()).await;
        let payload: &[u8] = if kind == PING { &[0; 8] } else { &[] };
        for _ in 0..100 {
            client.send(&frame(kind, 0, 0, payload).repeat(100)).await;
            host.serves_its_neighbour().await;
        }
        let frames = answers(&mut client).await;
        let answered = frames.iter().filter(|frame| frame.kind == kind && frame.flags == ACK).count();
        assert!(answered >= 10_000 || frames.iter().any(|frame| frame.kind == GOAWAY), "{answered}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_of_a_gibibyte_is_refused_at_its_length() {
    for (declared, name) in [(1u32 << 30, "a gibibyte"), (MAX_REQUEST_BYTES as u32 + 1, "one past the bound")] {
        let mut host = Host::new();
        let mut client = host.connect(WIDE);
        let prefix = [&[0][..], &declared.to_be_bytes()].concat();
        client.send(&[hello(), who_am_i(1), frame(DATA, 0, 1, &prefix)].concat()).await;
        // As much as flow control lets a client send, and then as much again as it is given.
        let (mut sent, mut window) = (5, 65_535usize);
        let ended = loop {
            while window - sent >= 8192 {
                client.send(&frame(DATA, 0, 1, &[0; 8192])).await;
                sent += 8192;
            }
            match client.frame().await {
                Some(frame) if frame.kind == WINDOW_UPDATE && frame.stream == 1 => window += code(&frame) as usize,
                Some(frame) if frame.stream == 1 => break frame,
                Some(_) => {}
                None => panic!("{name}: the connection ended"),
            }
        };
        assert!(sent <= 2 * WINDOW_BYTES as usize, "{name}: {sent} bytes were taken");
        assert_eq!((ended.kind, grpc_status(&ended)), (HEADERS, Some("11".to_owned())), "{name}");
        host.serves_its_neighbour().await;
    }
}

/// OUT_OF_RANGE is 11.
fn grpc_status(headers: &Frame) -> Option<String> {
    let fields = fluke_hpack::Decoder::new().decode(&headers.payload).expect("hyper's own header block");
    fields.into_iter().find(|(name, _)| name == b"grpc-status").map(|(_, value)| String::from_utf8_lossy(&value).into())
}
