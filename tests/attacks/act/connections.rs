//! Connections that are held: idle, or with something unfinished on each.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::AsyncReadExt as _,
    net::{TcpStream, UnixStream},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{Did, Orders};
use crate::it::raw_h2::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, HEADERS, Outcome, PING, RST_STREAM, RawClient, SETTINGS,
    WINDOW_UPDATE, field, frame, get_of_http, hello, request,
};

/// Pause before a connection is tried that takes the place of one that was refused or ended.
const ANEW: Duration = Duration::from_millis(10);
/// What a frame carries: less than every peer takes (RFC 9113 §6.5.2).
const PAYLOAD: usize = 16_000;
/// Bytes of a message of which all but the last few are sent.
const MESSAGE: usize = 256 * 1024;

/// What is on a connection.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// One stream that is told about roots, which takes no policy.
    Idle,
    /// Half a header block, after a good request.
    HalfBlock,
    /// Two requests, each with most of the largest message.
    Unfinished,
}

type Open = Arc<AtomicU64>;

/// One of those that are open, until dropped.
struct Counted(Open);

impl Counted {
    fn new(open: &Open) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(open.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Keeps `many` connections open until the time is over.
pub(super) async fn hold(orders: &Orders, kind: Kind) -> Did {
    let socket = orders.socket.clone();
    keep(orders, move |open| {
        let socket = socket.clone();
        async move {
            let Ok(stream) = UnixStream::connect(&socket).await else { return };
            let mut client = RawClient::new(stream);
            match kind {
                Kind::Idle => idle(&mut client, &open).await,
                Kind::HalfBlock => half_block(&mut client, &open).await,
                Kind::Unfinished => unfinished(&mut client, &open).await,
            }
        }
    })
    .await
}

/// Silent connections to the operators' port.
pub(super) async fn operators(orders: &Orders) -> Did {
    let admin: SocketAddr = orders.admin;
    keep(orders, move |open| async move {
        let Ok(mut stream) = TcpStream::connect(admin).await else { return };
        let _counted = Counted::new(&open);
        let _ = stream.read(&mut [0; 64]).await;
    })
    .await
}

async fn keep<F: Future<Output = ()> + 'static>(
    orders: &Orders,
    connection: impl Fn(Open) -> F + Clone + 'static,
) -> Did {
    let open = Open::default();
    let mut did = Did::default();
    let local = tokio::task::LocalSet::new();
    local
        .run_until(async {
            let mut connections = JoinSet::new();
            while !orders.over() {
                if connections.len() < orders.many {
                    connections.spawn_local(connection(open.clone()));
                    did.done += 1;
                    // Some at a time, so that the agent reads the first while the next are made.
                    let pause =
                        if did.done > orders.many as u64 { ANEW } else { Duration::from_millis(did.done % 8 / 7) };
                    sleep(pause).await;
                } else {
                    let _ = timeout(orders.left().min(Duration::from_millis(200)), connections.join_next()).await;
                }
                while connections.try_join_next().is_some() {}
                did.open = did.open.max(open.load(Ordering::Relaxed));
            }
        })
        .await;
    did.refused = did.done.saturating_sub(did.open);
    did
}

fn call(path: &str) -> Vec<u8> {
    [
        field(":method", "POST"),
        field(":scheme", "http"),
        field(":path", path),
        field(":authority", "localhost"),
        field("content-type", "application/grpc"),
        field("te", "trailers"),
    ]
    .concat()
}

/// Answers what a live client answers.
async fn acknowledge(client: &mut RawClient<UnixStream>, seen: &Frame) -> bool {
    match seen.kind {
        SETTINGS | PING if seen.flags & ACK == 0 => {
            let payload = if seen.kind == PING { &seen.payload[..] } else { &[] };
            client.send(&frame(seen.kind, ACK, 0, payload)).await
        }
        _ => true,
    }
}

async fn idle(client: &mut RawClient<UnixStream>, open: &Open) {
    let block = call("/csrd.v1.CertificateService/WatchTrustBundle");
    let ask = [hello(), frame(HEADERS, END_HEADERS, 1, &block), frame(DATA, END_STREAM, 1, &[0; 5])].concat();
    if !client.send(&ask).await {
        return;
    }
    let mut counted = None;
    while let Some(seen) = client.frame().await {
        if seen.kind == HEADERS && counted.is_none() {
            counted = Some(Counted::new(open));
        }
        if !acknowledge(client, &seen).await {
            return;
        }
    }
}

async fn half_block(client: &mut RawClient<UnixStream>, open: &Open) {
    let first = [hello(), request(1, &get_of_http())].concat();
    if !client.send(&first).await || client.outcome(1).await != Outcome::Answered {
        return;
    }
    let _counted = Counted::new(open);
    // A literal field whose value is announced with 60,000 bytes (RFC 7541 §6.2.2, §5.1), of which some never come.
    let head = [&get_of_http()[..], &[0x00, 1, b'x', 0x7f, 0xe1, 0xd3, 0x03]].concat();
    let mut block = [&head[..], &vec![b'a'; PAYLOAD - head.len()]].concat();
    let mut kind = HEADERS;
    for _ in 0..3 {
        if !client.send(&frame(kind, 0, 3, &block)).await {
            return;
        }
        (kind, block) = (CONTINUATION, vec![b'a'; PAYLOAD]);
    }
    while let Some(seen) = client.frame().await {
        if !acknowledge(client, &seen).await {
            return;
        }
    }
}

/// How much of a message has been sent and how much may be.
struct Sending {
    stream: u32,
    sent: usize,
    credit: usize,
}

impl Sending {
    fn new(stream: u32) -> Self {
        Self { stream, sent: 0, credit: 65_535 }
    }
}

async fn unfinished(client: &mut RawClient<UnixStream>, open: &Open) {
    let block = call("/csrd.v1.CertificateService/Subscribe");
    let begin = |stream| frame(HEADERS, END_HEADERS, stream, &block);
    let mut next = 5;
    let mut messages = [Sending::new(1), Sending::new(3)];
    let mut credit: usize = 65_535;
    if !client.send(&[hello(), begin(1), begin(3)].concat()).await {
        return;
    }
    let _counted = Counted::new(open);
    loop {
        for message in &mut messages {
            while message.sent < MESSAGE - PAYLOAD && credit.min(message.credit) >= PAYLOAD {
                let mut payload = vec![7; PAYLOAD];
                if message.sent == 0 {
                    payload[0] = 0;
                    payload[1..5].copy_from_slice(&(MESSAGE as u32 - 5).to_be_bytes());
                }
                if !client.send(&frame(DATA, 0, message.stream, &payload)).await {
                    return;
                }
                (message.sent, message.credit, credit) =
                    (message.sent + PAYLOAD, message.credit - PAYLOAD, credit - PAYLOAD);
            }
        }
        let Some(seen) = client.frame().await else { return };
        let message = messages.iter_mut().find(|message| message.stream == seen.stream);
        match (seen.kind, message) {
            (WINDOW_UPDATE, message) => {
                let more = seen.payload.first_chunk().map_or(0, |size| u32::from_be_bytes(*size) as usize);
                match message {
                    Some(message) => message.credit += more,
                    None if seen.stream == 0 => credit += more,
                    None => {}
                }
            }
            // Refused, or given up: the next takes its place.
            (HEADERS | RST_STREAM, Some(message)) if seen.kind == RST_STREAM || seen.flags & END_STREAM != 0 => {
                sleep(Duration::from_millis(100)).await;
                *message = Sending::new(next);
                if !client.send(&begin(next)).await {
                    return;
                }
                next += 2;
            }
            _ => {
                if !acknowledge(client, &seen).await {
                    return;
                }
            }
        }
    }
}
