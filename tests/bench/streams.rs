//! A thousand connections with one open stream each: their memory, and how a rotation reaches them.
//!
//! The client speaks just enough HTTP/2 to open a stream and then only reads, so that what is measured is the server.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use csrd::proto::v1;
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    task::JoinSet,
    time::timeout,
};

use crate::{
    it::raw_h2::{ACK, DATA, END_HEADERS, END_STREAM, HEADERS, SETTINGS, field, frame, hello},
    process::{Server, ask},
    table::Table,
};

const CONNECTIONS: usize = 1000;

/// Resident memory that 1000 connections with one idle stream each add.
pub(crate) async fn idle_memory(table: &mut Table) {
    let floor = added_kib(&Server::floor().await).await;
    let ours = added_kib(&Server::agent().await).await;
    table.beside("1000 connections with one idle stream, each", "KiB", floor, ours, "<= 20 KB");
}

async fn added_kib(server: &Server) -> f64 {
    let idle = server.resident_kib();
    let mut open = Vec::new();
    for _ in 0..CONNECTIONS {
        open.push(follow(&server.socket(), ask("first")).await);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    (server.resident_kib() - idle) / CONNECTIONS as f64
}

/// How far apart a renewal reaches the first and the last of 1000 subscribers.
pub(crate) async fn rotation(table: &mut Table) {
    const ROUNDS: usize = 5;
    /// Long enough for everyone to have subscribed before the first renewal.
    const LIFETIME_SECONDS: i64 = 12;
    let server = Server::agent().await;
    let lifetime = Some(prost_types::Duration { seconds: LIFETIME_SECONDS, nanos: 0 });
    let request = v1::CertificateRequest { lifetime, ..ask("rotated") };
    let mut open = Vec::new();
    for _ in 0..CONNECTIONS {
        open.push(follow(&server.socket(), request.clone()).await);
    }
    let mut spreads = Vec::new();
    for _ in 0..ROUNDS {
        let mut readers = JoinSet::new();
        for mut stream in open.drain(..) {
            readers.spawn(async move {
                let mut buffer = [0; 4096];
                stream.readable().await.expect("a renewal");
                let at = Instant::now();
                read_until_quiet(&mut stream, &mut buffer).await;
                (at, stream)
            });
        }
        let mut times = Vec::new();
        for (at, stream) in readers.join_all().await {
            times.push(at);
            open.push(stream);
        }
        let (first, last) = (times.iter().min().expect("a time"), times.iter().max().expect("a time"));
        spreads.push((*last - *first).as_secs_f64() * 1e3);
    }
    spreads.sort_by(f64::total_cmp);
    table.alone("rotation pushed to 1000 subscribers, first to last", "ms", spreads[ROUNDS / 2], "< 20 ms");
}

/// Opens a connection, subscribes, and reads the first certificate.
async fn follow(socket: &Path, request: v1::CertificateRequest) -> UnixStream {
    let mut stream = UnixStream::connect(socket).await.expect("a connection");
    let message = v1::SubscribeRequest { request: Some(request), ..Default::default() }.encode_to_vec();
    let mut body = vec![0];
    body.extend(u32::try_from(message.len()).expect("a small message").to_be_bytes());
    body.extend(message);
    let block: Vec<u8> = [
        field(":method", "POST"),
        field(":scheme", "http"),
        field(":path", "/csrd.v1.CertificateService/Subscribe"),
        field(":authority", "localhost"),
        field("content-type", "application/grpc"),
        field("te", "trailers"),
    ]
    .concat();
    let request = [hello(), frame(HEADERS, END_HEADERS, 1, &block), frame(DATA, END_STREAM, 1, &body)].concat();
    stream.write_all(&request).await.expect("the request");
    stream.write_all(&frame(SETTINGS, ACK, 0, &[])).await.expect("the acknowledgement");
    let mut buffer = [0; 4096];
    read_until_quiet(&mut stream, &mut buffer).await;
    stream
}

/// Reads what is there and what follows shortly.
async fn read_until_quiet(stream: &mut UnixStream, buffer: &mut [u8]) {
    let mut seen = 0;
    while let Ok(read) = timeout(Duration::from_millis(if seen > 600 { 2 } else { 5000 }), stream.read(buffer)).await {
        let read = read.expect("the server serves");
        assert!(read > 0, "the server closed the connection");
        seen += read;
    }
}
