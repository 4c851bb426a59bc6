//! A client below HTTP/2: writes any bytes, any header block, and reads frames. No library sends what is wrong.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(crate) const DATA: u8 = 0x0;
pub(crate) const HEADERS: u8 = 0x1;
pub(crate) const PRIORITY: u8 = 0x2;
pub(crate) const RST_STREAM: u8 = 0x3;
pub(crate) const SETTINGS: u8 = 0x4;
pub(crate) const PING: u8 = 0x6;
pub(crate) const GOAWAY: u8 = 0x7;
pub(crate) const WINDOW_UPDATE: u8 = 0x8;
pub(crate) const CONTINUATION: u8 = 0x9;

pub(crate) const END_STREAM: u8 = 0x1;
pub(crate) const ACK: u8 = 0x1;
pub(crate) const END_HEADERS: u8 = 0x4;
pub(crate) const PADDED: u8 = 0x8;
pub(crate) const WITH_PRIORITY: u8 = 0x20;

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Preface and the client's SETTINGS.
pub(crate) fn hello() -> Vec<u8> {
    [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()
}

/// A whole request without a body.
pub(crate) fn request(stream: u32, block: &[u8]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, block)
}

/// How a literal field is coded (RFC 7541 §6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Indexing {
    Incremental,
    Without,
    Never,
}

/// A field of the static or the dynamic table.
pub(crate) fn indexed(index: usize) -> Vec<u8> {
    integer(0x80, 7, index)
}

/// The entries of the static table that every request names.
pub(crate) fn get_of_http() -> Vec<u8> {
    [indexed(2), indexed(6)].concat()
}

/// A literal field whose name is an index of a table.
pub(crate) fn with_name(indexing: Indexing, name: usize, value: &[u8], huffman: bool) -> Vec<u8> {
    let (pattern, prefix) = match indexing {
        Indexing::Incremental => (0x40, 6),
        Indexing::Without => (0x00, 4),
        Indexing::Never => (0x10, 4),
    };
    [integer(pattern, prefix, name), string(value, huffman)].concat()
}

/// A literal field with its name spelled out.
pub(crate) fn literal(indexing: Indexing, name: &[u8], value: &[u8], huffman: bool) -> Vec<u8> {
    let pattern = with_name(indexing, 0, &[], false)[0];
    [&[pattern][..], &string(name, huffman), &string(value, huffman)].concat()
}

/// A plain literal field.
pub(crate) fn field(name: &str, value: &str) -> Vec<u8> {
    literal(Indexing::Without, name.as_bytes(), value.as_bytes(), false)
}

pub(crate) fn table_size(size: usize) -> Vec<u8> {
    integer(0x20, 5, size)
}

fn string(text: &[u8], huffman: bool) -> Vec<u8> {
    if !huffman {
        return [&integer(0, 7, text.len()), text].concat();
    }
    let mut bits = Vec::new();
    for octet in text {
        let (_, code, length) = HUFFMAN.iter().find(|(known, ..)| known == octet).expect("an octet with a known code");
        bits.extend((0..*length).rev().map(|shift| code >> shift & 1));
    }
    bits.resize(bits.len().next_multiple_of(8), 1);
    let coded: Vec<u8> = bits.chunks(8).map(|octet| octet.iter().fold(0, |all, bit| all << 1 | *bit as u8)).collect();
    [integer(0x80, 7, coded.len()), coded].concat()
}

fn integer(pattern: u8, prefix: u32, value: usize) -> Vec<u8> {
    let mask = (1 << prefix) - 1;
    if value < mask {
        return vec![pattern | value as u8];
    }
    let mut out = vec![pattern | mask as u8];
    let mut rest = value - mask;
    while rest > 0x7f {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
    out
}

/// RFC 7541 appendix B: octet, code and its bits, for what names and paths are made of.
#[rustfmt::skip]
const HUFFMAN: &[(u8, u32, u32)] = &[
    (b'%', 0x15, 6), (b'-', 0x16, 6), (b'.', 0x17, 6), (b'/', 0x18, 6), (b'0', 0x0, 5), (b'1', 0x1, 5),
    (b'2', 0x2, 5), (b'3', 0x19, 6), (b'4', 0x1a, 6), (b'5', 0x1b, 6), (b'6', 0x1c, 6), (b'7', 0x1d, 6),
    (b'8', 0x1e, 6), (b'9', 0x1f, 6), (b':', 0x5c, 7), (b'_', 0x22, 6), (b'a', 0x3, 5), (b'b', 0x23, 6),
    (b'c', 0x4, 5), (b'd', 0x24, 6), (b'e', 0x5, 5), (b'f', 0x25, 6), (b'g', 0x26, 6), (b'h', 0x27, 6),
    (b'i', 0x6, 5), (b'j', 0x74, 7), (b'k', 0x75, 7), (b'l', 0x28, 6), (b'm', 0x29, 6), (b'n', 0x2a, 6),
    (b'o', 0x7, 5), (b'p', 0x2b, 6), (b'q', 0x76, 7), (b'r', 0x2c, 6), (b's', 0x8, 5), (b't', 0x9, 5),
    (b'u', 0x2d, 6), (b'v', 0x77, 7), (b'w', 0x78, 7), (b'x', 0x79, 7), (b'y', 0x7a, 7), (b'z', 0x7b, 7),
    (b'A', 0x21, 6), (b'B', 0x5d, 7), (b'C', 0x5e, 7), (b'D', 0x5f, 7), (b'E', 0x60, 7), (b'F', 0x61, 7),
];

/// A frame that the server sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

/// How a request, or the connection with it, ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Response headers came.
    Answered,
    /// RST_STREAM with this error code.
    Reset(u32),
    /// GOAWAY with this error code.
    GoneAway(u32),
    /// The connection ended without a word.
    Closed,
}

/// The client's end of a connection.
pub(crate) struct RawClient<IO> {
    io: IO,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> RawClient<IO> {
    pub(crate) fn new(io: IO) -> Self {
        Self { io }
    }

    /// Sends bytes; `false` once the server has hung up.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> bool {
        self.io.write_all(bytes).await.is_ok()
    }

    pub(crate) async fn frame(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        self.io.read_exact(&mut head).await.ok()?;
        let [l0, l1, l2, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, l0, l1, l2]) as usize];
        self.io.read_exact(&mut payload).await.ok()?;
        Some(Frame { kind, flags, stream: u32::from_be_bytes(stream), payload })
    }

    /// Reads until the fate of `stream` is known, acknowledging SETTINGS on the way.
    pub(crate) async fn outcome(&mut self, stream: u32) -> Outcome {
        while let Some(frame) = self.frame().await {
            match frame.kind {
                HEADERS if frame.stream == stream => return Outcome::Answered,
                RST_STREAM if frame.stream == stream => return Outcome::Reset(code(&frame.payload)),
                GOAWAY => return Outcome::GoneAway(code(&frame.payload[4..])),
                SETTINGS if frame.flags & ACK == 0 => drop(self.send(&self::frame(SETTINGS, ACK, 0, &[])).await),
                _ => {}
            }
        }
        Outcome::Closed
    }
}

fn code(payload: &[u8]) -> u32 {
    u32::from_be_bytes(*payload.first_chunk().expect("an error code"))
}
