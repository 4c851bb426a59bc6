//! The client's half of a connection, frame by frame, without I/O.
//!
//! The invariant: of the client's bytes only an unfinished frame head or header block is kept, within
//! [`HELD_BYTES_MAX`]; everything else is handed on at once, since hyper may be waiting for it. A header block that
//! breaks a bound or a rule before the verdict goes to hyper as it came. After the verdict hyper no longer has the
//! client's table, so it gets a block that no table can read, which it answers as it would have answered the original:
//! by ending the connection.

use std::io;

use http::{HeaderValue, uri::Authority};
use tokio::io::ReadBuf;

use super::hpack::{self, Decoder};
use crate::server::MAX_HEADER_BYTES;

/// Most bytes of one header block, frame heads and padding included, kept while it arrives.
pub const HELD_BYTES_MAX: usize = 64 * 1024;

/// Largest header list that is translated, in RFC 9113 §6.5.2 counting: four times the list size that hyper is told, past
/// which h2 ends the connection. What lies between, hyper answers with 431.
pub const LIST_BYTES_MAX: usize = 4 * MAX_HEADER_BYTES as usize;

/// Most CONTINUATION frames of one header block: as many as h2 takes at hyper's header list size.
pub const CONTINUATIONS_MAX: usize = 6;

/// Longest frame payload: the initial `SETTINGS_MAX_FRAME_SIZE` (RFC 9113 §6.5.2), which hyper keeps.
const PAYLOAD_BYTES_MAX: usize = 16_384;

/// What every HTTP/2 client sends first (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const AUTHORITY: &[u8] = b":authority";
const REPLACEMENT: &[u8] = b"localhost";

/// Index 0, which RFC 7541 §6.1 makes a decoding error.
const UNREADABLE_BLOCK: &[u8] = &[0x80];

const HEADERS: u8 = 0x1;
const CONTINUATION: u8 = 0x9;

const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
const PRIORITY_BYTES: usize = 5;

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// [`Frames::give`] has bytes for hyper.
    Give,
    /// Read at most so many bytes for hyper and show them to [`Frames::passed`].
    Pass(usize),
    /// Read at most so many bytes for [`Frames::take`]; if there are none, call [`Frames::end`].
    Take(usize),
    /// Pass on everything from here.
    Untouched,
    /// Read nothing more.
    End,
}

/// Where in the client's bytes the connection is.
#[derive(Debug, Clone, Copy)]
enum Position {
    /// So many bytes of the preface have passed.
    Preface(usize),
    /// So many bytes of a frame head are in `head`.
    Head(usize),
    /// So many bytes of a payload are still to pass.
    Payload(usize),
    /// So many bytes of a payload are still to be held, of a frame with these flags.
    Block(usize, u8),
    Untouched,
    End,
}

/// The state of one connection until it passes untouched.
#[derive(Debug)]
pub(super) struct Frames {
    position: Position,
    /// The first header block had an authority that does not parse.
    translating: bool,
    decoder: Decoder,
    head: [u8; Head::BYTES],
    /// The frames of an unfinished header block, as they came.
    held: Vec<u8>,
    continuations: usize,
    /// Bytes for hyper, of which the first `given` have gone.
    ready: Vec<u8>,
    given: usize,
}

impl Default for Frames {
    fn default() -> Self {
        Self {
            position: Position::Preface(0),
            translating: false,
            decoder: Decoder::new(),
            head: [0; Head::BYTES],
            held: Vec::new(),
            continuations: 0,
            ready: Vec::new(),
            given: 0,
        }
    }
}

impl Frames {
    pub(super) fn step(&self) -> Step {
        if !self.ready.is_empty() {
            return Step::Give;
        }
        match self.position {
            Position::Preface(seen) => Step::Pass(PREFACE.len() - seen),
            Position::Head(filled) => Step::Take(Head::BYTES - filled),
            Position::Payload(rest) => Step::Pass(rest),
            Position::Block(rest, _) => Step::Take(rest),
            Position::Untouched => Step::Untouched,
            Position::End => Step::End,
        }
    }

    pub(super) fn give(&mut self, buf: &mut ReadBuf<'_>) {
        let rest = &self.ready[self.given..];
        let count = rest.len().min(buf.remaining());
        buf.put_slice(&rest[..count]);
        self.given += count;
        if self.given == self.ready.len() {
            self.ready = Vec::new();
            self.given = 0;
        }
    }

    pub(super) fn passed(&mut self, bytes: &[u8]) {
        self.position = match self.position {
            Position::Preface(seen) if !PREFACE[seen..].starts_with(bytes) => Position::Untouched,
            Position::Preface(seen) if seen + bytes.len() < PREFACE.len() => Position::Preface(seen + bytes.len()),
            Position::Payload(rest) if bytes.len() < rest => Position::Payload(rest - bytes.len()),
            _ => Position::Head(0),
        };
    }

    pub(super) fn take(&mut self, bytes: &[u8]) {
        match self.position {
            Position::Head(filled) => {
                let end = filled + bytes.len();
                self.head[filled..end].copy_from_slice(bytes);
                self.position = Position::Head(end);
                if end == Head::BYTES {
                    self.head_complete(Head::parse(&self.head));
                }
            }
            Position::Block(rest, flags) => {
                self.held.extend_from_slice(bytes);
                self.position = Position::Block(rest - bytes.len(), flags);
                if bytes.len() == rest {
                    self.frame_held(flags);
                }
            }
            _ => unreachable!("bytes are taken for a head or a header block"),
        }
    }

    /// The client has ended where [`Step::Take`] wanted bytes.
    pub(super) fn end(&mut self) -> io::Result<()> {
        if self.translating && !self.held.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the client ended inside a header block"));
        }
        if let Position::Head(filled) = self.position {
            self.held.extend_from_slice(&self.head[..filled]);
        }
        self.pass_untouched();
        if self.translating {
            self.position = Position::End;
        }
        Ok(())
    }

    fn head_complete(&mut self, head: Head) {
        let within = !self.held.is_empty();
        if !within && head.kind != HEADERS {
            self.ready.extend_from_slice(&self.head);
            self.position = if head.length == 0 { Position::Head(0) } else { Position::Payload(head.length) };
            return;
        }
        let continues = within && head.kind == CONTINUATION && head.stream == Head::of(&self.held).stream;
        self.continuations = if within { self.continuations + 1 } else { 0 };
        self.held.extend_from_slice(&self.head);
        if within && !continues
            || self.continuations > CONTINUATIONS_MAX
            || head.length > PAYLOAD_BYTES_MAX
            || self.held.len() + head.length > HELD_BYTES_MAX
        {
            self.refuse();
        } else if head.length == 0 {
            self.frame_held(head.flags);
        } else {
            self.position = Position::Block(head.length, head.flags);
        }
    }

    /// A whole HEADERS or CONTINUATION frame is held.
    fn frame_held(&mut self, flags: u8) {
        if flags & END_HEADERS == 0 {
            self.position = Position::Head(0);
            return;
        }
        match translate(&self.held, &mut self.decoder) {
            Some(block) if block.replaced || self.translating => {
                if !self.translating {
                    tracing::debug!("the client's :authority does not parse: its header blocks are translated");
                }
                self.translating = true;
                self.held = Vec::new();
                self.ready = block.frames;
                self.position = Position::Head(0);
            }
            Some(_) => self.pass_untouched(),
            None => self.refuse(),
        }
    }

    /// The header block breaks a rule or a bound: hyper shall say so.
    fn refuse(&mut self) {
        if !self.translating {
            return self.pass_untouched();
        }
        let stream = Head::of(&self.held).stream;
        self.held = Vec::new();
        Head { length: UNREADABLE_BLOCK.len(), kind: HEADERS, flags: END_HEADERS, stream }.put(&mut self.ready);
        self.ready.extend_from_slice(UNREADABLE_BLOCK);
        self.position = Position::End;
    }

    fn pass_untouched(&mut self) {
        self.ready.append(&mut self.held);
        self.position = Position::Untouched;
    }

    /// Bytes kept of a block, bytes made for hyper, and the verdict.
    #[cfg(test)]
    pub(super) fn state(&self) -> (usize, usize, bool) {
        (self.held.len(), self.ready.len(), self.translating)
    }
}

/// A header block as hyper is to see it.
struct Translated {
    frames: Vec<u8>,
    /// An authority was replaced.
    replaced: bool,
}

/// Rebuilds one header block from its frames, of which the last has END_HEADERS; `None` if they or the block are malformed.
fn translate(frames: &[u8], decoder: &mut Decoder) -> Option<Translated> {
    let (head, mut payload, mut rest) = Head::split(frames)?;
    let mut padding = 0;
    if head.flags & PADDED != 0 {
        (padding, payload) = payload.split_first().map(|(padding, payload)| (usize::from(*padding), payload))?;
    }
    let priority_bytes = if head.flags & PRIORITY != 0 { PRIORITY_BYTES } else { 0 };
    let (priority, payload) = payload.split_at_checked(priority_bytes)?;
    let mut block = payload[..payload.len().checked_sub(padding)?].to_vec();
    while !rest.is_empty() {
        let (_, fragment, next) = Head::split(rest)?;
        block.extend_from_slice(fragment);
        rest = next;
    }

    let mut payload = priority.to_vec();
    let mut replaced = false;
    let decoded = decoder.decode(&block, LIST_BYTES_MAX, |name, value| {
        let replace = name == AUTHORITY && is_foreign_authority(value);
        replaced |= replace;
        hpack::encode_literal(name, if replace { REPLACEMENT } else { value }, &mut payload);
    });
    if let Err(error) = decoded {
        tracing::debug!(%error, "a client's header block cannot be decoded");
        return None;
    }
    let flags = head.flags & (END_STREAM | PRIORITY);
    Some(Translated { frames: split_into_frames(&payload, flags, head.stream), replaced })
}

/// Whether hyper would refuse this authority although any field may have such a value: one with a NUL or a line break
/// is malformed by RFC 9113 §8.2.1, whatever its name, and stays for hyper to refuse.
fn is_foreign_authority(value: &[u8]) -> bool {
    Authority::try_from(value).is_err() && HeaderValue::from_bytes(value).is_ok()
}

fn split_into_frames(payload: &[u8], flags: u8, stream: u32) -> Vec<u8> {
    let mut frames = Vec::with_capacity(payload.len() + Head::BYTES);
    let (mut kind, mut flags, mut rest) = (HEADERS, flags, payload);
    loop {
        let (fragment, next) = rest.split_at(rest.len().min(PAYLOAD_BYTES_MAX));
        if next.is_empty() {
            flags |= END_HEADERS;
        }
        Head { length: fragment.len(), kind, flags, stream }.put(&mut frames);
        frames.extend_from_slice(fragment);
        if next.is_empty() {
            return frames;
        }
        (kind, flags, rest) = (CONTINUATION, 0, next);
    }
}

/// RFC 9113 §4.1.
struct Head {
    length: usize,
    kind: u8,
    flags: u8,
    /// Without the reserved bit.
    stream: u32,
}

impl Head {
    const BYTES: usize = 9;

    fn parse(&[l0, l1, l2, kind, flags, s0, s1, s2, s3]: &[u8; Self::BYTES]) -> Self {
        Self {
            length: u32::from_be_bytes([0, l0, l1, l2]) as usize,
            kind,
            flags,
            stream: u32::from_be_bytes([s0, s1, s2, s3]) & 0x7fff_ffff,
        }
    }

    /// The head of the first of some held frames.
    fn of(frames: &[u8]) -> Self {
        Self::parse(frames.first_chunk().expect("what is held begins with a head"))
    }

    /// The first frame and what follows it.
    fn split(frames: &[u8]) -> Option<(Self, &[u8], &[u8])> {
        let (head, rest) = frames.split_first_chunk()?;
        let head = Self::parse(head);
        let (payload, rest) = rest.split_at_checked(head.length)?;
        Some((head, payload, rest))
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.length as u32).to_be_bytes()[1..]);
        out.extend_from_slice(&[self.kind, self.flags]);
        out.extend_from_slice(&self.stream.to_be_bytes());
    }
}
