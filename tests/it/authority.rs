//! Clients that send a socket path as `:authority`, byte for byte, against hyper behind the adapter.

use std::{collections::BTreeMap, io};

use bytes::Bytes;
use csrd::server::authority::AuthorityStream;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream},
    net::{UnixListener, UnixStream},
    sync::mpsc,
    task::JoinSet,
};

use crate::raw_h2::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, Indexing, Outcome, PADDED, PING, PRIORITY, RST_STREAM,
    RawClient, WINDOW_UPDATE, WITH_PRIORITY, field, frame, get_of_http, hello, indexed, literal, request, table_size,
    with_name,
};

/// Values of `:authority` that real clients send on a unix socket, and shorter ones.
const PATHS: [&str; 6] =
    ["", "/x", "run%2Fcsrd%2Fcsrd.sock", "unix:%2Frun%2Fcsrd%2Fcsrd.sock", "/run/csrd/csrd.sock", "%2f"];

const PROTOCOL_ERROR: u32 = 1;
const ENHANCE_YOUR_CALM: u32 = 11;

type Fields = Vec<(String, Vec<u8>)>;

/// What hyper's service was asked.
#[derive(Debug, PartialEq)]
struct Seen {
    authority: Option<String>,
    path: String,
    /// By name, as hyper keeps no order between names; then the trailers.
    fields: BTreeMap<String, Vec<Vec<u8>>>,
    trailers: BTreeMap<String, Vec<Vec<u8>>>,
    body: Bytes,
}

fn by_name(fields: &Fields) -> BTreeMap<String, Vec<Vec<u8>>> {
    let mut map = BTreeMap::<_, Vec<_>>::new();
    for (name, value) in fields {
        map.entry(name.clone()).or_default().push(value.clone());
    }
    map
}

fn fields(map: &http::HeaderMap) -> BTreeMap<String, Vec<Vec<u8>>> {
    by_name(&map.iter().map(|(name, value)| (name.to_string(), value.as_bytes().to_vec())).collect())
}

/// A client of hyper's HTTP/2 server, and what that server sees.
struct Connection<IO> {
    client: RawClient<IO>,
    seen: mpsc::Receiver<Seen>,
    _server: JoinSet<()>,
}

impl<IO: AsyncRead + AsyncWrite + Unpin + Send + 'static> Connection<IO> {
    fn new(client: IO, server: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let (sender, seen) = mpsc::channel(1000);
        let service = service_fn(move |request: Request<Incoming>| answer(request, sender.clone()));
        let mut tasks = JoinSet::new();
        let served = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(server), service);
        tasks.spawn(async move { drop(served.await) });
        Self { client: RawClient::new(client), seen, _server: tasks }
    }

    async fn check(&mut self, stream: u32, name: &str) -> Seen {
        assert_eq!(self.client.outcome(stream).await, Outcome::Answered, "{name}");
        self.seen.try_recv().expect("what is answered was seen")
    }
}

impl Connection<DuplexStream> {
    fn adapted() -> Self {
        let (client, server) = tokio::io::duplex(64 * 1024);
        Self::new(client, AuthorityStream::new(server))
    }

    fn stock() -> Self {
        let (client, server) = tokio::io::duplex(64 * 1024);
        Self::new(client, server)
    }
}

impl Connection<UnixStream> {
    fn adapted_unix() -> io::Result<Self> {
        let (client, server) = UnixStream::pair()?;
        Ok(Self::new(client, AuthorityStream::new(server)))
    }
}

async fn answer(
    request: Request<Incoming>,
    sender: mpsc::Sender<Seen>,
) -> Result<Response<Empty<Bytes>>, Box<dyn std::error::Error + Send + Sync>> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await?;
    let trailers = body.trailers().map(fields).unwrap_or_default();
    let seen = Seen {
        authority: parts.uri.authority().map(ToString::to_string),
        path: parts.uri.path().to_owned(),
        fields: fields(&parts.headers),
        trailers,
        body: body.to_bytes(),
    };
    sender.send(seen).await?;
    Ok(Response::new(Empty::new()))
}

fn is_path(seen: &Seen, path: &str) -> bool {
    (seen.authority.as_deref(), seen.path.as_str()) == (Some("localhost"), path)
}

/// Every way to name `:authority`, each with what a later request sends to name it again.
fn authorities(value: &str) -> Vec<(String, Vec<u8>, Vec<u8>)> {
    let value = value.as_bytes();
    let mut ways = Vec::new();
    for huffman in [false, true] {
        for indexing in [Indexing::Incremental, Indexing::Without, Indexing::Never] {
            let spelled = literal(indexing, b":authority", value, huffman);
            for (name, first) in [("static name", with_name(indexing, 1, value, huffman)), ("spelled name", spelled)] {
                // An entry of its own, the name of that entry with the value anew, or the same bytes again.
                let again = match indexing {
                    Indexing::Incremental => vec![indexed(62), with_name(Indexing::Without, 62, value, huffman)],
                    Indexing::Without | Indexing::Never => vec![first.clone()],
                };
                let name = format!("{name}, {indexing:?}, huffman {huffman}");
                ways.extend(again.into_iter().map(|again| (name.clone(), first.clone(), again)));
            }
        }
    }
    ways
}

#[tokio::test]
async fn a_path_as_authority_is_served_however_it_is_coded() {
    for value in PATHS {
        let mut ways = authorities(value);
        if value.is_empty() {
            ways.push(("a static entry".into(), indexed(1), indexed(1)));
        }
        for (name, first, again) in ways {
            let name = format!("{value:?}, {name}");
            let mut connection = Connection::adapted();
            let block = |authority: &[u8], path| [get_of_http(), field(":path", path), authority.to_vec()].concat();
            connection.client.send(&[hello(), request(1, &block(&first, "/1"))].concat()).await;
            let seen = connection.check(1, &name).await;
            assert!(is_path(&seen, "/1") && seen.fields.is_empty(), "{name}: {seen:?}");
            for stream in [3, 5] {
                connection.client.send(&request(stream, &block(&again, "/2"))).await;
                assert!(is_path(&connection.check(stream, &name).await, "/2"), "{name}");
            }
        }
    }
}

#[tokio::test]
async fn a_path_as_authority_is_served_on_a_unix_socket_byte_by_byte() {
    let mut connection = Connection::adapted_unix().expect("a pair of sockets");
    let entry = with_name(Indexing::Incremental, 1, b"/x", false);
    let first = [get_of_http(), field(":path", "/1"), entry].concat();
    let second = [get_of_http(), field(":path", "/2"), indexed(62)].concat();
    for byte in [hello(), request(1, &first), request(3, &second)].concat() {
        connection.client.send(&[byte]).await;
        tokio::task::yield_now().await;
    }
    assert!(is_path(&connection.check(1, "first").await, "/1"));
    assert!(is_path(&connection.check(3, "second").await, "/2"));
}

#[tokio::test]
async fn frames_before_the_first_request_pass_while_it_is_awaited() {
    let mut connection = Connection::adapted();
    connection.client.send(&hello()).await;
    connection.client.send(&frame(WINDOW_UPDATE, 0, 0, &[0, 0, 1, 0])).await;
    connection.client.send(&frame(PRIORITY, 0, 3, &[0, 0, 0, 0, 9])).await;
    connection.client.send(&frame(PING, 0, 0, b"12345678")).await;
    loop {
        let frame = connection.client.frame().await.expect("an answer to the ping");
        if frame.kind == PING {
            assert_eq!(frame.payload, b"12345678");
            break;
        }
    }
    // The half of a header block that is held does not hold back the ping before it.
    let block = [get_of_http(), field(":path", "/1"), field(":authority", "/x")].concat();
    let (start, end) = block.split_at(5);
    connection.client.send(&[frame(PING, 0, 0, b"abcdefgh"), frame(HEADERS, END_STREAM, 1, start)].concat()).await;
    while connection.client.frame().await.expect("an answer to the ping").payload != b"abcdefgh" {}
    connection.client.send(&frame(CONTINUATION, END_HEADERS, 1, end)).await;
    assert!(is_path(&connection.check(1, "after the pings").await, "/1"));
}

#[tokio::test]
async fn a_block_may_be_split_anywhere() {
    let entry = literal(Indexing::Incremental, b":authority", b"/run/csrd/csrd.sock", true);
    let block = [get_of_http(), field(":path", "/1"), entry, field("a", "b")].concat();
    let again = [get_of_http(), field(":path", "/2"), indexed(62), field("c", "d")].concat();
    let priority = [0, 0, 0, 0, 7];
    for at in 0..=block.len() {
        for (flags, before, after) in [
            (0, vec![], vec![]),
            (PADDED, vec![2], vec![0; 2]),
            (PADDED | WITH_PRIORITY, [&[1], &priority[..]].concat(), vec![0]),
        ] {
            let name = format!("split at {at} with flags {flags:#x}");
            let mut connection = Connection::adapted();
            connection.client.send(&hello()).await;
            for (stream, block, path, header) in [(1, &block, "/1", "a"), (3, &again, "/2", "c")] {
                let (start, end) = block.split_at(at.min(block.len()));
                let start = [&before[..], start, &after].concat();
                connection.client.send(&frame(HEADERS, END_STREAM | flags, stream, &start)).await;
                connection.client.send(&frame(CONTINUATION, END_HEADERS, stream, end)).await;
                let seen = connection.check(stream, &name).await;
                assert!(is_path(&seen, path) && seen.fields.contains_key(header), "{name}: {seen:?}");
            }
        }
    }
}

#[tokio::test]
async fn trailers_bodies_and_table_sizes_keep_their_meaning() {
    let mut connection = Connection::adapted();
    let entry = |name: &[u8], value: &[u8]| literal(Indexing::Incremental, name, value, false);
    let start = [get_of_http(), field(":path", "/1"), entry(b":authority", b"/x"), entry(b"a", b"1")].concat();
    let trailers = [entry(b"b", b"2"), indexed(63)].concat();
    connection.client.send(&[hello(), frame(HEADERS, END_HEADERS, 1, &start)].concat()).await;
    connection.client.send(&[frame(DATA, PADDED, 1, b"\x02body\0\0"), request(1, &trailers)].concat()).await;
    let seen = connection.check(1, "trailers").await;
    let pairs = |pairs: &[(&str, &str)]| {
        by_name(&pairs.iter().map(|(name, value)| (name.to_string(), value.as_bytes().to_vec())).collect())
    };
    assert!(is_path(&seen, "/1") && seen.body == "body");
    assert_eq!((seen.fields, seen.trailers), (pairs(&[("a", "1")]), pairs(&[("b", "2"), ("a", "1")])));

    // The table is emptied and grows again: index 62 is what came after.
    let block = [
        table_size(0),
        table_size(4096),
        get_of_http(),
        field(":path", "/2"),
        entry(b"c", b"3"),
        indexed(62),
        entry(b":authority", b""),
        indexed(63),
    ];
    connection.client.send(&request(3, &block.concat())).await;
    // The authority follows a header field here, which no server may accept: adapted or not, the stream is reset.
    assert_eq!(connection.client.outcome(3).await, Outcome::Reset(PROTOCOL_ERROR));
    connection
        .client
        .send(&request(5, &[get_of_http(), field(":path", "/3"), indexed(62), indexed(63)].concat()))
        .await;
    let seen = connection.check(5, "after a reset").await;
    assert!(is_path(&seen, "/3") && seen.fields == pairs(&[("c", "3")]), "{seen:?}");
}

#[tokio::test]
async fn a_block_means_to_hyper_what_it_means_without_the_adapter() {
    let start = [get_of_http(), field(":path", "/")].concat();
    let fields = |parts: &[Vec<u8>]| [start.clone(), parts.concat()].concat();
    let entry_of_4096 = literal(Indexing::Incremental, b"x", &[b'v'; 4096 - 33], false);
    for (name, block) in [
        ("nothing but the authority", vec![]),
        ("a whole request", start.clone()),
        ("no path", get_of_http()),
        ("an empty path", [get_of_http(), field(":path", "")].concat()),
        ("an authority after a field", fields(&[field("a", "b"), field(":authority", "x")])),
        ("a path after a field", fields(&[field("a", "b"), field(":path", "/2")])),
        ("two paths", fields(&[field(":path", "/2")])),
        ("two authorities", fields(&[field(":authority", "x")])),
        ("a host", fields(&[field("host", "/other")])),
        ("two hosts", fields(&[field("host", "a"), field("host", "b")])),
        ("an upper-case name", fields(&[field("Upper", "b")])),
        ("a name with a space", fields(&[field("a b", "c")])),
        ("an empty name", fields(&[field("", "b")])),
        ("an unknown pseudo-header", fields(&[field(":other", "b")])),
        ("a status", fields(&[field(":status", "200")])),
        ("a line break in a value", fields(&[field("a", "b\r\nc: d")])),
        ("a NUL in a value", fields(&[field("a", "b\0")])),
        ("connection", fields(&[field("connection", "close")])),
        ("transfer-encoding", fields(&[field("transfer-encoding", "chunked")])),
        ("te: gzip", fields(&[field("te", "gzip")])),
        ("te: trailers", fields(&[field("te", "trailers")])),
        ("a content-length that is wrong", fields(&[field("content-length", "7")])),
        ("two content-lengths", fields(&[field("content-length", "0"), field("content-length", "1")])),
        ("an index of zero", fields(&[indexed(0)])),
        ("an index past the table", fields(&[indexed(70)])),
        ("a size update after a field", fields(&[table_size(0)])),
        ("a table that may not be", [table_size(4097), start.clone()].concat()),
        ("a field cut short", fields(&[vec![0x00, 0x7f]])),
        ("a bad Huffman code", fields(&[vec![0x04, 0x81, 0x00]])),
        ("more than hyper's header list", fields(&[entry_of_4096.clone(), indexed(62).repeat(4)])),
        ("more than h2 suffers of a header list", fields(&[entry_of_4096, indexed(62).repeat(16)])),
    ] {
        let mut outcomes = Vec::new();
        for (mut connection, authority) in [
            (Connection::stock(), "localhost"),
            (Connection::adapted(), "localhost"),
            (Connection::adapted(), "run%2Fcsrd.sock"),
        ] {
            // On an established connection, so that the verdict is known.
            let opening = [get_of_http(), field(":path", "/0"), field(":authority", authority)].concat();
            connection.client.send(&[hello(), request(1, &opening)].concat()).await;
            connection.check(1, name).await;
            // Size updates stand first; nothing else minds an authority at its head.
            let at = if name == "a table that may not be" { block.len() } else { 0 };
            let block = [&block[..at], &field(":authority", authority), &block[at..]].concat();
            connection.client.send(&request(3, &block)).await;
            let outcome = connection.client.outcome(3).await;
            outcomes.push((outcome, connection.seen.try_recv().ok()));
        }
        assert_eq!(outcomes[0], outcomes[1], "{name}, untouched");
        let (stock, translated) = (&outcomes[0], &outcomes[2]);
        if let Outcome::GoneAway(PROTOCOL_ERROR | ENHANCE_YOUR_CALM) = stock.0 {
            assert_eq!(translated, &(Outcome::GoneAway(PROTOCOL_ERROR), None), "{name}, translated");
        } else {
            assert_eq!(translated, stock, "{name}, translated");
        }
    }
}

#[tokio::test]
async fn a_block_without_an_end_is_ended_by_hyper_or_for_it() {
    let part = frame(HEADERS, END_STREAM, 3, &[get_of_http(), field(":path", "/")].concat());
    let empty = frame(CONTINUATION, 0, 3, &[]);
    for (name, frames) in [
        ("a flood of continuations", [part.clone(), empty.repeat(1000)].concat()),
        (
            "a flood of full continuations",
            [part.clone(), frame(CONTINUATION, 0, 3, &[0x82; 16_384]).repeat(100)].concat(),
        ),
        ("a ping within a block", [part.clone(), frame(PING, 0, 0, &[0; 8])].concat()),
        ("another stream's continuation", [part.clone(), frame(CONTINUATION, END_HEADERS, 5, &[])].concat()),
        ("a continuation of nothing", empty),
        ("a frame above the maximum", frame(HEADERS, END_HEADERS, 3, &[0x82; 16_385])),
        ("too much padding", frame(HEADERS, END_HEADERS | PADDED, 3, &[200, 0x82])),
    ] {
        for authority in ["localhost", "/run/x.sock"] {
            let mut connection = Connection::adapted();
            let opening = [get_of_http(), field(":path", "/0"), field(":authority", authority)].concat();
            connection.client.send(&[hello(), request(1, &opening)].concat()).await;
            connection.check(1, name).await;
            connection.client.send(&frames).await;
            let outcome = connection.client.outcome(3).await;
            assert!(matches!(outcome, Outcome::GoneAway(_) | Outcome::Closed), "{name}: {outcome:?}");
        }
    }
}

/// A client with its own table, as fluke-hpack keeps it.
struct Model {
    random: StdRng,
    encoder: fluke_hpack::Encoder<'static>,
    authority: Option<&'static str>,
    /// Fields like those before fill the table and make indices.
    pool: Fields,
}

impl Model {
    fn new(seed: u64, authority: Option<&'static str>) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let pool = (0..60)
            .map(|name| {
                (
                    format!("x-{}", name % 25),
                    (0..random.random_range(0..220)).map(|_| random.random_range(b'!'..=b'~')).collect(),
                )
            })
            .collect();
        Self { random, encoder: fluke_hpack::Encoder::new(), authority, pool }
    }

    /// A request with a body on `stream`: its bytes, and what the server must see.
    fn request(&mut self, stream: u32) -> (Vec<u8>, Seen) {
        let path = format!("/{}", self.random.random_range(0..20));
        let mut pseudo = vec![(":method", "POST"), (":scheme", "http"), (":path", &path)];
        pseudo.extend(self.authority.map(|authority| (":authority", authority)));
        let pseudo = pseudo.into_iter().map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec()));
        let (fields, trailers) = (self.fields(), self.fields());
        let start = self.block(&pseudo.chain(fields.clone()).collect());
        let body: Vec<u8> = (0..self.random.random_range(0..50)).map(|_| self.random.random()).collect();
        let end = self.block(&trailers);
        let bytes =
            [self.frames(0, stream, &start), frame(DATA, 0, stream, &body), self.frames(END_STREAM, stream, &end)];
        let authority = self.authority.map(|authority| match authority {
            "fine.example:1" => authority.to_owned(),
            _ => "localhost".to_owned(),
        });
        let seen = Seen { authority, path, fields: by_name(&fields), trailers: by_name(&trailers), body: body.into() };
        (bytes.concat(), seen)
    }

    fn fields(&mut self) -> Fields {
        let count = self.random.random_range(0..20);
        (0..count).filter_map(|_| self.pool.choose(&mut self.random).cloned()).collect()
    }

    /// A header block, now and then with a table size update before it and fields outside the table in it.
    fn block(&mut self, fields: &Fields) -> Vec<u8> {
        let mut block = Vec::new();
        if self.random.random_ratio(1, 8) {
            let size = *[0, 100, 1000, 4096].choose(&mut self.random).expect("some sizes");
            self.encoder.set_max_table_size(size);
            block = table_size(size);
        }
        for (name, value) in fields {
            if self.random.random_ratio(1, 5) {
                let indexing = if self.random.random() { Indexing::Without } else { Indexing::Never };
                block.extend(literal(indexing, name.as_bytes(), value, false));
            } else {
                self.encoder.encode_header_into((name.as_bytes(), value), &mut block).expect("a Vec takes everything");
            }
        }
        block
    }

    /// HEADERS and CONTINUATION frames around a block, with padding and priority.
    fn frames(&mut self, flags: u8, stream: u32, block: &[u8]) -> Vec<u8> {
        let mut cuts: Vec<usize> =
            (0..self.random.random_range(0..4)).map(|_| self.random.random_range(0..=block.len())).collect();
        cuts.push(block.len());
        cuts.sort_unstable();
        let (mut flags, mut before, mut after) = (flags, Vec::new(), Vec::new());
        if self.random.random() {
            let padding = self.random.random();
            flags |= PADDED;
            before.push(padding);
            after = vec![0; usize::from(padding)];
        }
        if self.random.random() {
            flags |= WITH_PRIORITY;
            before.extend([0, 0, 0, 0, 1]);
        }
        let mut frames = Vec::new();
        let mut from = 0;
        for (position, to) in cuts.iter().enumerate() {
            let end = if position == cuts.len() - 1 { END_HEADERS } else { 0 };
            frames.extend(match position {
                0 => frame(HEADERS, flags | end, stream, &[&before, &block[..*to], &after[..]].concat()),
                _ => frame(CONTINUATION, end, stream, &block[from..*to]),
            });
            from = *to;
        }
        frames
    }
}

#[tokio::test]
async fn hyper_sees_what_a_random_client_sent() {
    let authorities = PATHS.into_iter().map(Some).chain([None, Some("fine.example:1")]);
    for (seed, authority) in authorities.enumerate() {
        let mut model = Model::new(seed as u64, authority);
        let mut connection = Connection::adapted();
        connection.client.send(&hello()).await;
        for stream in (1..200).step_by(2) {
            let (bytes, expected) = model.request(stream);
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (chunk, next) = rest.split_at(model.random.random_range(1..=rest.len().min(600)));
                connection.client.send(chunk).await;
                tokio::task::yield_now().await;
                rest = next;
            }
            let name = format!("authority {authority:?}, stream {stream}");
            assert_eq!(connection.check(stream, &name).await, expected, "{name}");
        }
    }
}

#[tokio::test]
async fn a_grpc_service_on_a_socket_file_answers_a_client_that_names_it_by_path() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("csrd.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let (_reporter, health) = tonic_health::server::health_reporter();
    let service = TowerToHyperService::new(tonic::service::Routes::new(health).prepare());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let (stream, _) = listener.accept().await.expect("a client");
        let io = TokioIo::new(AuthorityStream::new(stream));
        drop(http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await);
    });

    let mut client = RawClient::new(UnixStream::connect(&path).await.expect("a server"));
    let entry = |name: &str, value: &str| literal(Indexing::Incremental, name.as_bytes(), value.as_bytes(), false);
    let authority = path.to_str().expect("a path").replace('/', "%2F");
    let block = [
        entry(":method", "POST"),
        entry(":scheme", "http"),
        entry(":path", "/grpc.health.v1.Health/Check"),
        entry(":authority", &authority),
        entry("te", "trailers"),
        entry("content-type", "application/grpc"),
    ];
    // The first entry is the oldest: index 67 of six.
    let again: Vec<u8> = (62..68).rev().flat_map(indexed).collect();
    client.send(&hello()).await;
    for (stream, block) in [(1, block.concat()), (3, again)] {
        client.send(&frame(HEADERS, END_HEADERS, stream, &block)).await;
        client.send(&frame(DATA, END_STREAM, stream, &[0; 5])).await;
        loop {
            let frame = client.frame().await.expect("an answer");
            assert_ne!(frame.kind, RST_STREAM);
            if frame.kind == DATA {
                // HealthCheckResponse { status: SERVING }
                assert_eq!((frame.stream, &frame.payload[..]), (stream, &[0, 0, 0, 0, 2, 0x08, 1][..]));
                break;
            }
        }
    }
}
