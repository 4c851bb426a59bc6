//! Clients that hold what they can: each is refused within a bound, and another client is served all the while.
//!
//! Time is paused, so a minute of silence is a moment; connections are pipes, so that nothing else tells the time.

use std::{num::NonZeroU32, sync::Arc, time::Duration, time::SystemTime};

use csrd::{
    account::{Account, CALL_BYTES, CONNECTION_BYTES, Limits, Principal},
    attest::{Attestor, Caller, Capabilities, Workload, prepare_listener},
    clock::Clock,
    hub::{self, Hub},
    metrics::Metrics,
    policy::PolicySet,
    proto::v1::{WatchTrustBundleRequest, WhoAmIRequest, certificate_service_client::CertificateServiceClient},
    rate::Rate,
    server::{
        Engine, FIRST_REQUEST_TIMEOUT, FRAME_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MAX_HEADER_BYTES,
        MAX_REQUEST_BYTES, MAX_STREAMS_PER_CONNECTION, MAX_UNSENT_BYTES, MESSAGE_TIMEOUT, Server, WINDOW_BYTES,
    },
    signer::embedded::{self, Embedded},
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::DuplexStream,
    net::{UnixListener, UnixStream},
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Status,
    service::Routes,
    transport::{Channel, Endpoint},
};

use crate::{
    agent::reason,
    host::{self, Signer},
    raw_h2::{
        ACK, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, Outcome, PING, RST_STREAM, RawClient, SETTINGS,
        WINDOW_UPDATE, field, frame, hello, indexed,
    },
};

const REFUSED_STREAM: u32 = 7;
const ENHANCE_YOUR_CALM: u32 = 11;
/// Streams that h2 refuses on one connection before it ends it.
const MAX_REFUSALS: usize = 1024;

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
        Self::with(Limits::default(), Metrics::new())
    }

    pub(crate) fn with_metrics(metrics: Metrics) -> Self {
        Self::with(Limits::default(), metrics)
    }

    pub(crate) fn with(limits: Limits, metrics: Metrics) -> Self {
        let account = Account::new(limits, 0, &metrics);
        let clock = Clock::paused(SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 31));
        let rate = Rate { per_second: NonZeroU32::MIN, burst: NonZeroU32::MIN };
        let (sender, policies) = watch::channel(Arc::new(PolicySet::default()));
        let signer = metrics.signer(embedded::NAME);
        let signer = Embedded::ephemeral(embedded::DEFAULT_CA_LIFETIME, &clock, signer).unwrap();
        let hub = Hub::new(hub::Parts {
            clock,
            policies,
            pods: None,
            signers: vec![Arc::new(signer)],
            signer_rate: rate,
            principal_rate: rate,
            account: account.clone(),
            seed: 1,
            metrics: metrics.clone(),
        });
        let engine = Engine {
            hub,
            attestor: Arc::new(Attestor::new()),
            default_signer: embedded::NAME.to_owned(),
            operator_uid: 0,
            account,
            metrics,
            stop: CancellationToken::new(),
        };
        let (_, health) = tonic_health::server::health_reporter();
        let server = Server::new(engine, Routes::new(health));
        Self { server, connections: JoinSet::new(), _policies: sender }
    }

    fn connect(&mut self, pipe_bytes: usize) -> RawClient<DuplexStream> {
        RawClient::new(self.pipe(1000, pipe_bytes))
    }

    fn pipe(&mut self, uid: u32, bytes: usize) -> DuplexStream {
        let (client, io) = tokio::io::duplex(bytes);
        let (server, caller) = (self.server.clone(), Caller::Fixed(Arc::new(Workload::of_uid(uid))));
        let seat = server.seat(Principal::user(uid)).expect("there is room");
        self.connections.spawn(async move { server.connection(io, seat, Ok(caller)).await });
        client
    }

    /// A client that does as it should, of a user.
    async fn client(&mut self, uid: u32) -> CertificateServiceClient<Channel> {
        let mut pipe = Some(TokioIo::new(self.pipe(uid, WIDE)));
        let connector = tower::service_fn(move |_| {
            std::future::ready(pipe.take().ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected)))
        });
        let channel = Endpoint::from_static("http://localhost").connect_with_connector(connector).await;
        CertificateServiceClient::new(channel.unwrap())
    }

    /// Another client gets its answer.
    async fn serves_its_neighbour(&mut self) {
        // Each time another one, so that none asks too often.
        let uid = 2000 + u32::try_from(self.connections.len()).unwrap();
        let mut neighbour = RawClient::new(self.pipe(uid, WIDE));
        neighbour.send(&[hello(), who_am_i(1), frame(DATA, END_STREAM, 1, &[0; 5])].concat()).await;
        assert_eq!(neighbour.outcome(1).await, Outcome::Answered);
        let answer = neighbour.frame().await.expect("the answer's message");
        assert!(answer.kind == DATA && answer.payload.len() > 20, "{answer:?}");
    }
}

/// The headers of a call whose message is still to come.
fn who_am_i(stream: u32) -> Vec<u8> {
    request(stream, "/csrd.v1.CertificateService/WhoAmI")
}

/// Likewise, of any method.
fn request(stream: u32, path: &str) -> Vec<u8> {
    let block = [
        indexed(3),
        indexed(6),
        field(":path", path),
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
async fn ten_thousand_streams_of_one_client_are_refused_past_their_bound_until_the_connection_ends() {
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
    assert_eq!(refused, MAX_REFUSALS);
    let last = frames.last().expect("an answer");
    assert_eq!((last.kind, code(last)), (GOAWAY, ENHANCE_YOUR_CALM));
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
        assert_eq!(began.elapsed().as_secs(), FIRST_REQUEST_TIMEOUT.as_secs(), "after {sent} bytes");
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
    assert_eq!(began.elapsed().as_secs(), MESSAGE_TIMEOUT.as_secs());
    host.serves_its_neighbour().await;
}

#[tokio::test(start_paused = true)]
async fn a_frame_or_a_header_block_that_is_begun_is_ended_in_time_on_an_old_connection_too() {
    let half_frame = who_am_i(3)[..20].to_vec();
    let half_block = frame(HEADERS, 0, 3, &[0; 4]);
    let half_data = [who_am_i(3), frame(DATA, 0, 3, &[0; 5])[..11].to_vec()].concat();
    for (name, begun) in [("frame", half_frame), ("header block", half_block), ("DATA", half_data)] {
        let mut host = Host::new();
        let mut client = host.connect(WIDE);
        client.send(&[hello(), who_am_i(1), frame(DATA, END_STREAM, 1, &[0; 5])].concat()).await;
        assert_eq!(client.outcome(1).await, Outcome::Answered);
        sleep(FIRST_REQUEST_TIMEOUT * 2).await;
        let began = Instant::now();
        client.send(&begun).await;
        while client.frame().await.is_some() {}
        assert_eq!(began.elapsed().as_secs(), FRAME_TIMEOUT.as_secs(), "{name}");
        host.serves_its_neighbour().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_that_trickles_has_no_more_time_than_one_that_stalls() {
    let mut host = Host::new();
    let mut client = host.connect(WIDE);
    client.send(&[hello(), who_am_i(1), frame(DATA, 0, 1, &[0, 0, 0, 0, 200])].concat()).await;
    let began = Instant::now();
    let trickle = async {
        for _ in 0..100 {
            sleep(MESSAGE_TIMEOUT / 10).await;
            client.send(&frame(DATA, 0, 1, &[0])).await;
        }
    };
    let _ = timeout(MESSAGE_TIMEOUT + Duration::from_millis(100), trickle).await;
    let outcome = client.outcome(1).await;
    assert!(matches!(outcome, Outcome::Answered | Outcome::Reset(_)), "{outcome:?}");
    assert_eq!(began.elapsed().as_secs(), MESSAGE_TIMEOUT.as_secs());
}

/// Room for one connection of 1000's with one call, and nothing besides.
fn room_for_one_call() -> Limits {
    Limits { bytes_per_principal: CONNECTION_BYTES + CALL_BYTES + 1024, ..Limits::default() }
}

#[tokio::test(start_paused = true)]
async fn what_is_begun_and_not_ended_is_charged_to_its_principal() {
    let payload = vec![0; 8 * 1024];
    let block = frame(HEADERS, 0, 1, &field("x-filler", &"a".repeat(payload.len())));
    let message = [who_am_i(1), frame(DATA, 0, 1, &[&[0, 0, 0, 64, 0][..], &payload].concat())].concat();
    for (name, begun) in [("header block", block), ("message", message)] {
        let mut host = Host::with(room_for_one_call(), Metrics::new());
        let mut client = host.connect(WIDE);
        let began = Instant::now();
        client.send(&[hello(), begun.clone()].concat()).await;
        let refused = timeout(Duration::from_secs(1), async {
            while client.frame().await.is_some_and(|frame| !matches!(frame.kind, HEADERS | RST_STREAM)) {}
        });
        assert!(refused.await.is_ok() && began.elapsed() < Duration::from_secs(1), "{name}: at once, not in time");
        let mut host = Host::with(Limits::default(), Metrics::new());
        let mut client = host.connect(WIDE);
        client.send(&[hello(), begun].concat()).await;
        while let Ok(Some(f)) = timeout(Duration::from_secs(1), client.frame()).await {
            eprintln!("{f:?} {}", String::from_utf8_lossy(&f.payload));
        }
        let o = timeout(Duration::from_secs(1), client.outcome(1)).await;
        assert!(o.is_err(), "{o:?} {name}: where there is room it waits");
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_not_read_is_charged_to_its_principal() {
    let policies: String = (0..200)
        .map(|n| {
            format!(
                "---\napiVersion: csrd.dev/v1alpha1\nkind: CertificatePolicy\nmetadata: {{name: p{n}}}\n\
                 spec: {{match: {{unix: {{uids: [1000, 1001]}}}}, allow: {{dnsNames: [\"{n}.example.org\"]}}}}\n"
            )
        })
        .collect();
    let ca = Signer::new(embedded::NAME, Duration::ZERO);
    let limits = Limits { bytes_per_principal: 512 * 1024, ..Limits::default() };
    let mut host = host::Host::new(&policies, &[ca], limits);
    let calls = |from: u32| {
        let call = |n: u32| [who_am_i(2 * n + 1), frame(DATA, END_STREAM, 2 * n + 1, &[0; 5])].concat();
        (from..from + 40).flat_map(call).collect::<Vec<_>>()
    };
    // It has given the agent no leave to send more than the first 64 KiB.
    let mut client = RawClient::new(host.pipe(WIDE));
    client.send(&[hello(), calls(0)].concat()).await;
    sleep(Duration::from_secs(1)).await;
    let held = host.metrics.account("bytes", None).get();
    assert!(held > 0 && held <= 512 * 1024, "{held} bytes are held");
}

#[tokio::test(start_paused = true)]
async fn a_user_that_connects_too_often_is_turned_away_and_another_is_not() {
    // The pace is one of real sockets, whose users this test cannot choose; what it asks is the account.
    let account = Account::new(Limits::default(), 0, &Metrics::new());
    let (greedy, other) = (Principal::user(1000), Principal::user(1001));
    let accepted = (0..2000).filter(|_| account.may_connect(greedy)).count();
    assert_eq!(accepted, 1000, "the burst");
    assert!(account.may_connect(other));
    sleep(Duration::from_secs(1)).await;
    assert_eq!((0..2000).filter(|_| account.may_connect(greedy)).count(), 200, "a second's worth");
}

#[tokio::test(start_paused = true)]
async fn who_am_i_is_limited_for_each_user() {
    let mut host = Host::new();
    let mut client = host.client(1000).await;
    let mut answered = 0;
    let refused = loop {
        match client.who_am_i(WhoAmIRequest {}).await {
            Ok(_) => answered += 1,
            Err(refused) => break refused,
        }
    };
    assert_eq!(answered, 500, "the burst, by eight policies each");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::ResourceExhausted, "RATE_LIMITED"));
    host.client(1001).await.who_am_i(WhoAmIRequest {}).await.expect("another user");
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
async fn of_a_stream_that_its_client_does_not_read_no_more_is_held_than_the_bound() {
    const PIPE: usize = 1024;
    let (ca, other) = (Signer::new(embedded::NAME, Duration::ZERO), Signer::new(embedded::NAME, Duration::ZERO));
    let mut host = host::Host::new("", std::slice::from_ref(&ca), Limits::default());
    // Both the stream and the connection would take all of it, if their client read.
    let mut client = RawClient::new(host.pipe(PIPE));
    let call = request(1, "/csrd.v1.CertificateService/WatchTrustBundle");
    client.send(&[hello(), call, frame(DATA, END_STREAM, 1, &[0; 5])].concat()).await;
    let one = ca.roots.borrow().clone();
    ca.add_root_of(&other);
    let both = ca.roots.borrow().clone();
    let mut offered = 0;
    while offered < usize::from(u16::MAX) - both.pem().len() {
        let roots = if *ca.roots.borrow() == both { &one } else { &both };
        offered += roots.pem().len();
        ca.roots.send_replace(roots.clone());
        sleep(Duration::from_millis(1)).await;
    }
    let mut held = 0;
    while let Ok(Some(frame)) = timeout(Duration::from_secs(1), client.frame()).await {
        held += if frame.kind == DATA { frame.payload.len() } else { 0 };
    }
    // Beside it are what the pipe holds, a message on its way into the buffer, one out of it, and the newest at the end.
    let bound = MAX_UNSENT_BYTES + PIPE + 3 * both.pem().len();
    assert!((MAX_UNSENT_BYTES..=bound).contains(&held), "{held} of {offered} bytes were held, at most {bound} allowed");
}

#[tokio::test(start_paused = true)]
async fn a_silent_client_is_asked_whether_it_lives_and_dropped_when_it_does_not_say() {
    let mut host = Host::new();
    let mut client = host.connect(WIDE);
    client.send(&[hello(), who_am_i(1), frame(DATA, END_STREAM, 1, &[0; 5])].concat()).await;
    answers(&mut client).await;
    for (answers, waits) in [(true, KEEPALIVE_INTERVAL), (false, KEEPALIVE_INTERVAL)] {
        let began = Instant::now();
        let ping = loop {
            let frame = client.frame().await.expect("the connection is open");
            if frame.kind == PING && frame.flags & ACK == 0 {
                break frame;
            }
        };
        assert_eq!(began.elapsed().as_secs(), waits.as_secs());
        if answers {
            client.send(&frame(PING, ACK, 0, &ping.payload)).await;
        }
    }
    let began = Instant::now();
    while client.frame().await.is_some() {}
    assert_eq!(began.elapsed().as_secs(), KEEPALIVE_TIMEOUT.as_secs());
    host.serves_its_neighbour().await;
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
async fn each_of_a_flood_of_pings_or_settings_is_answered_and_keeps_nobody_waiting() {
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
        // One more than the flood: the SETTINGS of the greeting, or the last PING.
        assert_eq!(answered, 10_001);
        host.serves_its_neighbour().await;
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

#[tokio::test(start_paused = true)]
async fn a_connection_has_as_many_calls_as_its_bound_and_one_more_when_one_has_ended() {
    let mut host = Host::new();
    let mut client = host.connect(WIDE);
    client.send(&hello()).await;
    let streams = |count: u32| (0..count).map(|n| 2 * n + 1);
    for stream in streams(MAX_STREAMS_PER_CONNECTION) {
        client.send(&who_am_i(stream)).await;
    }
    assert!(answers(&mut client).await.iter().all(|frame| frame.kind != RST_STREAM), "at the bound");
    let past = 2 * MAX_STREAMS_PER_CONNECTION + 1;
    client.send(&who_am_i(past)).await;
    assert_eq!(client.outcome(past).await, Outcome::Reset(REFUSED_STREAM));
    client.send(&frame(DATA, END_STREAM, 1, &[0; 5])).await;
    assert_eq!(client.outcome(1).await, Outcome::Answered);
    client.send(&[who_am_i(past + 2), frame(DATA, END_STREAM, past + 2, &[0; 5])].concat()).await;
    assert_eq!(client.outcome(past + 2).await, Outcome::Answered);
}

#[tokio::test(start_paused = true)]
async fn headers_are_read_below_their_bound_and_refused_at_it() {
    // h2 takes less than it announces, not as much.
    for (short, status) in [(1, b"200"), (0, b"431")] {
        let mut host = Host::new();
        let mut client = host.connect(WIDE);
        let fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/csrd.v1.CertificateService/WhoAmI"),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
        ];
        // RFC 9113 section 10.5.1: the length of name and value, and 32.
        let used: usize = fields.iter().map(|(name, value)| name.len() + value.len() + 32).sum();
        let filler = "x".repeat(MAX_HEADER_BYTES as usize - used - "x-filler".len() - 32 - short);
        let mut block: Vec<u8> = fields.iter().flat_map(|(name, value)| field(name, value)).collect();
        block.extend(field("x-filler", &filler));
        client
            .send(&[hello(), frame(HEADERS, END_HEADERS, 1, &block), frame(DATA, END_STREAM, 1, &[0; 5])].concat())
            .await;
        let headers = loop {
            let frame = client.frame().await.expect("an answer");
            if frame.kind == HEADERS {
                break fluke_hpack::Decoder::new().decode(&frame.payload).unwrap();
            }
        };
        assert_eq!(headers[0], (b":status".to_vec(), status.to_vec()), "{short} bytes below the bound");
        host.serves_its_neighbour().await;
    }
}

/// Checks that a bound was met.
fn check_refused<T>(answer: Result<T, Status>, expected: &str, words: &str) {
    let refused = answer.err().expect("one past the bound");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::ResourceExhausted, expected), "{refused:?}");
    assert!(refused.message().contains(words), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn one_stream_past_a_users_bound_is_refused_while_another_user_is_served() {
    let mut host = Host::with(Limits { streams_per_principal: 2, ..Limits::default() }, Metrics::new());
    let mut bundles = Vec::new();
    for _ in 0..2 {
        // Connections of one user share the bound.
        let mut client = host.client(1000).await;
        bundles.push(client.watch_trust_bundle(WatchTrustBundleRequest::default()).await.expect("at the bound"));
    }
    let mut client = host.client(1000).await;
    let refused = client.watch_trust_bundle(WatchTrustBundleRequest::default()).await;
    check_refused(refused, "TOO_MANY_STREAMS", "at most 2 allowed");
    host.client(1001).await.watch_trust_bundle(WatchTrustBundleRequest::default()).await.expect("another user");
    drop(bundles.pop());
    tokio::time::sleep(Duration::from_millis(1)).await;
    client.watch_trust_bundle(WatchTrustBundleRequest::default()).await.expect("one has ended");
}

#[tokio::test(start_paused = true)]
async fn one_arriving_request_past_a_users_bound_is_refused_while_another_user_is_served() {
    let mut host = Host::with(Limits { arriving_per_principal: 2, ..Limits::default() }, Metrics::new());
    let mut waiting = host.connect(WIDE);
    waiting.send(&[hello(), who_am_i(1)].concat()).await;
    answers(&mut waiting).await;
    let mut client = host.client(1000).await;
    client.who_am_i(WhoAmIRequest {}).await.expect("at the bound");
    waiting.send(&who_am_i(3)).await;
    answers(&mut waiting).await;
    check_refused(client.who_am_i(WhoAmIRequest {}).await, "TOO_MANY_REQUESTS", "at most 2 allowed");
    host.client(1001).await.who_am_i(WhoAmIRequest {}).await.expect("another user");
    waiting.send(&frame(DATA, END_STREAM, 1, &[0; 5])).await;
    assert_eq!(waiting.outcome(1).await, Outcome::Answered);
    client.who_am_i(WhoAmIRequest {}).await.expect("one has arrived");
}

#[tokio::test]
async fn one_connection_past_a_users_bound_is_closed_until_another_has_ended() {
    let mut host = Host::with(Limits { connections_per_principal: 2, ..Limits::default() }, Metrics::new());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    prepare_listener(&listener, Capabilities::probe()).unwrap();
    let server = host.server.clone();
    host.connections.spawn(server.serve(listener));
    let call = async || {
        let mut client = RawClient::new(UnixStream::connect(&path).await.unwrap());
        client.send(&[hello(), who_am_i(1), frame(DATA, END_STREAM, 1, &[0; 5])].concat()).await;
        let outcome = client.outcome(1).await;
        (client, outcome)
    };
    let ((first, one), (_second, two)) = (call().await, call().await);
    assert_eq!((one, two), (Outcome::Answered, Outcome::Answered), "at the bound");
    assert_eq!(call().await.1, Outcome::Closed, "one past the bound");
    drop(first);
    // The server sees the end of the one in its own time.
    let served = async { while call().await.1 != Outcome::Answered {} };
    timeout(Duration::from_secs(60), served).await.expect("one has ended");
}
