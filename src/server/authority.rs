//! Lets clients in whose `:authority` is a socket path, by standing between the accepted stream and hyper.
//!
//! On a unix socket gRPC-core sends the percent-encoded path as `:authority`, grpc-java the raw path, grpcurl a third
//! form. None of them is an authority (RFC 3986 §3.2), so h2 resets every call (hyperium/h2#487). The first header block
//! of a connection decides: if its authority parses, or there is none, every byte of the connection passes untouched
//! and this adapter is one branch. Otherwise each header block of the connection is decoded, an authority that does not
//! parse becomes `localhost`, and the block is written anew without compression. A longer value in the client's own
//! coding would not do: hyper's dynamic table would evict earlier than the client's and later indices would name the
//! wrong fields.
//!
//! The invariant: hyper sees what the client sent, apart from that one value. Nothing else is judged here: a repeated
//! pseudo-header, an upper-case name, a `host` beside the authority reach hyper as they came. What cannot be
//! translated ends the connection. Bytes from the server pass untouched. Time limits are the listener's.

mod frames;
mod hpack;

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use self::frames::{Frames, Step};

pub use self::frames::{CONTINUATIONS_MAX, HELD_BYTES_MAX, LIST_BYTES_MAX};

/// Bytes of a header block taken from the stream at a time.
const TAKE_BYTES: usize = 1024;

/// One accepted connection, as hyper is to see it.
#[derive(Debug)]
pub struct AuthorityStream<IO> {
    io: IO,
    /// `None` once everything passes untouched.
    frames: Option<Box<Frames>>,
}

impl<IO> AuthorityStream<IO> {
    /// Wraps a connection from which nothing has been read.
    pub fn new(io: IO) -> Self {
        Self { io, frames: Some(Box::default()) }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for AuthorityStream<IO> {
    /// Reads no byte beyond the part of a frame it waits for, so a verdict leaves nothing behind, and returns after
    /// at most one header block. Fails with [`io::ErrorKind::UnexpectedEof`] if the client ends inside a header block
    /// that was to be translated.
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let Some(frames) = &mut this.frames else {
                return Pin::new(&mut this.io).poll_read(cx, buf);
            };
            match frames.step() {
                Step::Give => {
                    frames.give(buf);
                    return Poll::Ready(Ok(()));
                }
                Step::Pass(wanted) => {
                    let wanted = wanted.min(buf.remaining());
                    let mut part = ReadBuf::new(buf.initialize_unfilled_to(wanted));
                    ready!(Pin::new(&mut this.io).poll_read(cx, &mut part))?;
                    frames.passed(part.filled());
                    let passed = part.filled().len();
                    buf.advance(passed);
                    return Poll::Ready(Ok(()));
                }
                Step::Take(wanted) => {
                    let mut bytes = [MaybeUninit::uninit(); TAKE_BYTES];
                    let mut part = ReadBuf::uninit(&mut bytes[..wanted.min(TAKE_BYTES)]);
                    ready!(Pin::new(&mut this.io).poll_read(cx, &mut part))?;
                    match part.filled() {
                        [] => frames.end()?,
                        taken => frames.take(taken),
                    }
                }
                Step::Untouched => this.frames = None,
                Step::End => return Poll::Ready(Ok(())),
            }
        }
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for AuthorityStream<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};
    use tokio::io::AsyncReadExt;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const HEADERS: u8 = 0x1;
    const SETTINGS: u8 = 0x4;
    const CONTINUATION: u8 = 0x9;
    const END_HEADERS: u8 = 0x4;

    /// A block as written anew, or as held with the frame head that went past the bound.
    const READY_BYTES_MAX: usize = 64 * 1024 + 5 * 9 + 5;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    }

    fn literal(name: &str, value: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        hpack::encode_literal(name.as_bytes(), value, &mut out);
        out
    }

    /// Preface and SETTINGS, then one header block on stream 1.
    fn opening(block: &[u8]) -> Vec<u8> {
        [PREFACE, &frame(SETTINGS, 0, 0, &[]), &frame(HEADERS, END_HEADERS, 1, block)].concat()
    }

    /// A client whose every chunk is one read.
    struct Chunks(std::collections::VecDeque<Vec<u8>>);

    impl AsyncRead for Chunks {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            if let Some(mut chunk) = self.0.pop_front() {
                let rest = chunk.split_off(chunk.len().min(buf.remaining()));
                buf.put_slice(&chunk);
                if !rest.is_empty() {
                    self.0.push_front(rest);
                }
            }
            Poll::Ready(Ok(()))
        }
    }

    /// What the adapter does at the end of a connection.
    #[derive(Debug, PartialEq)]
    enum Mode {
        Inspecting,
        Translating,
        Untouched,
    }

    /// What hyper gets and how it ends; checks the bounds on the way.
    fn read(chunks: &[&[u8]]) -> (Vec<u8>, Result<(), io::ErrorKind>, Mode) {
        let mut stream = AuthorityStream::new(Chunks(chunks.iter().map(|chunk| chunk.to_vec()).collect()));
        let (mut out, mut buf) = (Vec::new(), [0; 4096]);
        loop {
            let outcome = stream.read(&mut buf).now_or_never().expect("the source is always ready");
            let mode = match &stream.frames {
                Some(frames) => {
                    let (held, ready, translating) = frames.state();
                    assert!(held <= HELD_BYTES_MAX && ready <= READY_BYTES_MAX, "{held} {ready}");
                    if translating { Mode::Translating } else { Mode::Inspecting }
                }
                None => Mode::Untouched,
            };
            match outcome {
                Ok(0) => return (out, Ok(()), mode),
                Ok(count) => out.extend_from_slice(&buf[..count]),
                Err(error) => return (out, Err(error.kind()), mode),
            }
        }
    }

    fn check_untouched(input: &[u8], name: &str) {
        let bytes: Vec<&[u8]> = input.chunks(1).collect();
        for chunks in [&[input][..], &bytes] {
            let (out, outcome, mode) = read(chunks);
            assert_eq!((outcome, mode), (Ok(()), Mode::Untouched), "{name}");
            assert!(out == input, "{name}: {} bytes became {}", input.len(), out.len());
        }
    }

    #[test]
    fn a_connection_with_a_parseable_authority_or_none_passes_untouched() {
        let later = frame(HEADERS, END_HEADERS, 3, &literal(":authority", b"/not/an/authority"));
        for (name, block) in [
            ("a host", literal(":authority", b"localhost")),
            ("a host and port", literal(":authority", b"[::1]:443")),
            ("a user", literal(":authority", b"me%20@host:1")),
            ("none", literal(":path", b"/x")),
            ("a host header that is a path", literal("host", b"/run/x.sock")),
            ("an authority that no field may have", literal(":authority", b"a\0b")),
            ("an authority with a line break", literal(":authority", b"a\r\nb: c")),
            ("no fields", vec![]),
            ("a block that cannot be decoded", [literal(":authority", b"/x"), vec![0x80]].concat()),
        ] {
            check_untouched(&[opening(&block), later.clone(), frame(0, 1, 3, b"data")].concat(), name);
        }
    }

    #[test]
    fn what_is_not_http2_or_ends_early_passes_untouched() {
        let bad = opening(&literal(":authority", b"/x"));
        for cut in 0..bad.len() {
            assert_eq!(read(&[&bad[..cut]]).0, bad[..cut], "{cut}");
        }
        check_untouched(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", "http/1");
        check_untouched(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r!", "a preface that goes wrong at its end");
        check_untouched(
            &[PREFACE, &frame(CONTINUATION, END_HEADERS, 1, &literal(":authority", b"/x"))].concat(),
            "bare",
        );
    }

    #[test]
    fn an_authority_that_does_not_parse_becomes_localhost() {
        for value in ["", "/x", "run%2Fcsrd%2Fcsrd.sock", "unix:%2Frun%2Fcsrd.sock", "/run/csrd/csrd.sock", "a b", "ü"]
        {
            let input = opening(&[literal(":authority", value.as_bytes()), literal("x", b"y")].concat());
            let expected = opening(&[literal(":authority", b"localhost"), literal("x", b"y")].concat());
            assert_eq!(read(&[&input]), (expected, Ok(()), Mode::Translating), "{value}");
        }
    }

    #[test]
    fn every_authority_of_a_block_is_replaced_and_nothing_else() {
        let odd = [
            literal("host", b"/x"),
            literal(":authority", b"fine"),
            literal(":Authority", b"/x"),
            literal("UPPER", b"\0"),
            literal(":path", b""),
        ];
        let input = opening(&[literal(":authority", b"/x"), odd.concat(), literal(":authority", b"")].concat());
        let replaced = literal(":authority", b"localhost");
        let expected = opening(&[replaced.clone(), odd.concat(), replaced].concat());
        assert_eq!(read(&[&input]).0, expected);
    }

    #[test]
    fn padding_goes_and_priority_and_end_of_stream_stay() {
        let block = literal(":authority", b"/x");
        let translated = literal(":authority", b"localhost");
        let priority = [0x80, 0, 0, 3, 200];
        for (flags, before, after, kept, priority_kept) in [
            (0x00, vec![], vec![], 0x00, &[][..]),
            (0x01, vec![], vec![], 0x01, &[]),
            (0x08, vec![3], vec![0; 3], 0x00, &[]),
            (0x08, vec![0], vec![], 0x00, &[]),
            (0x20, priority.to_vec(), vec![], 0x20, &priority),
            (0x29, [&[2], &priority[..]].concat(), vec![0; 2], 0x21, &priority),
            (0xd2, vec![], vec![], 0x00, &[]),
        ] {
            let payload = [before, block.clone(), after].concat();
            let input = [PREFACE, &frame(HEADERS, END_HEADERS | flags, 1, &payload)].concat();
            let expected = frame(HEADERS, END_HEADERS | kept, 1, &[priority_kept, &translated].concat());
            assert_eq!(read(&[&input]).0[PREFACE.len()..], expected, "{flags:#x}");
        }
    }

    #[test]
    fn the_reserved_bit_of_a_stream_is_not_part_of_its_number() {
        let (start, end) = (literal(":authority", b"/x"), literal("x", b"y"));
        let frames = [frame(HEADERS, 0, 0x8000_0001, &start), frame(CONTINUATION, END_HEADERS, 1, &end)];
        let expected = frame(HEADERS, END_HEADERS, 1, &[literal(":authority", b"localhost"), end].concat());
        assert_eq!(read(&[PREFACE, &frames.concat()]).0[PREFACE.len()..], expected);
    }

    #[test]
    fn padding_or_priority_longer_than_the_frame_is_refused() {
        for (flags, payload) in [(0x08, &[][..]), (0x08, &[1]), (0x20, &[0; 4]), (0x28, &[1, 0, 0, 0, 0, 0])] {
            let frame = frame(HEADERS, END_HEADERS | flags, 1, payload);
            check_untouched(&[PREFACE, &frame].concat(), "before the verdict");
            check_refused(&frame);
        }
    }

    /// After the verdict `frames` make a block that no decoder can read, and nothing after it is read.
    fn check_refused(frames: &[u8]) {
        let start = opening(&literal(":authority", b"/x"));
        let translated = opening(&literal(":authority", b"localhost"));
        let input = [&start, frames, &frame(0x6, 0, 0, &[0; 8])].concat();
        let (out, outcome, _) = read(&[&input]);
        assert!(outcome.is_ok());
        let refusal = &out[translated.len()..];
        assert_eq!((&refusal[..5], &refusal[9..]), (&[0, 0, 1, HEADERS, END_HEADERS][..], &[0x80][..]));
    }

    #[test]
    fn what_cannot_be_translated_ends_the_connection() {
        let part = frame(HEADERS, 0, 3, &literal("x", b"y"));
        for (name, frames) in [
            ("an index out of the table", frame(HEADERS, END_HEADERS, 3, &[0xff, 0x00])),
            ("a table size above the setting", frame(HEADERS, END_HEADERS, 3, &[0x3f, 0xe2, 0x1f])),
            ("another frame inside a block", [part.clone(), frame(0x6, 0, 0, &[0; 8])].concat()),
            ("another stream's continuation", [part.clone(), frame(CONTINUATION, END_HEADERS, 5, &[])].concat()),
            ("a second block inside a block", [part.clone(), frame(HEADERS, END_HEADERS, 3, &[])].concat()),
        ] {
            println!("{name}");
            check_refused(&frames);
        }
    }

    #[test]
    fn a_client_that_ends_inside_a_block_to_be_translated_is_an_error() {
        let start = opening(&literal(":authority", b"/x"));
        for rest in [frame(HEADERS, 0, 3, b""), frame(HEADERS, END_HEADERS, 3, b"abc")[..10].to_vec()] {
            let (out, outcome, _) = read(&[&start, &rest]);
            assert_eq!(out, opening(&literal(":authority", b"localhost")));
            assert_eq!(outcome, Err(io::ErrorKind::UnexpectedEof));
        }
        let (out, outcome, _) = read(&[&start, &[0, 0, 1]]);
        assert!(outcome.is_ok() && out.ends_with(&[0, 0, 1]), "a frame head alone is nothing to translate");
    }

    /// A block of a field for each frame, with payloads of these lengths; the first is padded if there is room.
    fn fragments(lengths: &[usize]) -> Vec<u8> {
        let last = lengths.len() - 1;
        let frames = lengths.iter().enumerate().map(|(position, length)| {
            let padding = if position == 0 && *length > 1000 { 255 } else { 0 };
            let of_length = |value: usize| {
                let field = literal("n", &vec![b'v'; value]);
                let (before, after) = if padding > 0 { (&[255][..], &[0; 255][..]) } else { (&[][..], &[][..]) };
                Some([before, &field, after].concat()).filter(|payload| payload.len() == *length)
            };
            let payload = (length - padding - 8..*length).find_map(of_length).expect("some value has the length");
            let kind = if position == 0 { HEADERS } else { CONTINUATION };
            let flags = if padding > 0 { 0x08 } else { 0 } | if position == last { END_HEADERS } else { 0 };
            frame(kind, flags, 3, &payload)
        });
        frames.collect::<Vec<_>>().concat()
    }

    /// `within` is translated; `beyond` is refused after a verdict, and untouched before one.
    fn check_bound(within: &[u8], beyond: &[u8]) {
        let start = opening(&literal(":authority", b"/x"));
        let (out, outcome, mode) = read(&[&start, within]);
        assert_eq!((outcome, mode), (Ok(()), Mode::Translating));
        assert!(!out.ends_with(&[0x80]), "the block within the bound is not refused");
        check_refused(beyond);
        check_untouched(&[PREFACE, beyond].concat(), "beyond the bound");
    }

    #[test]
    fn a_block_is_held_up_to_its_bound_and_no_further() {
        let rest = HELD_BYTES_MAX - 3 * (16_384 + 9) - 9;
        // Padding is held but not translated, so that the list stays within its own bound.
        check_bound(&fragments(&[16_384, 16_384, 16_384, rest]), &fragments(&[16_384, 16_384, 16_384, rest + 1]));
    }

    #[test]
    fn a_frame_is_held_up_to_its_bound_and_no_further() {
        check_bound(&fragments(&[16_384]), &fragments(&[16_385]));
        check_bound(&fragments(&[40, 16_384]), &fragments(&[40, 16_385]));
    }

    #[test]
    fn a_block_has_continuations_up_to_their_bound_and_no_more() {
        let within = vec![40; CONTINUATIONS_MAX + 1];
        let beyond = vec![40; CONTINUATIONS_MAX + 2];
        check_bound(&fragments(&within), &fragments(&beyond));
    }

    #[test]
    fn a_list_is_translated_up_to_its_bound_and_no_further() {
        // One entry of 4,000 bytes by RFC 7541 §4.1, named over and over: few bytes that stand for many.
        let entry = [vec![0x40], literal("n", &[b'v'; 4000 - 33])[1..].to_vec()].concat();
        let named = LIST_BYTES_MAX / 4000 - 1;
        let rest = LIST_BYTES_MAX - (named + 1) * 4000;
        let block =
            |extra: usize| [entry.clone(), vec![0xbe; named], literal("n", &vec![b'v'; rest - 33 + extra])].concat();
        check_bound(&frame(HEADERS, END_HEADERS, 3, &block(0)), &frame(HEADERS, END_HEADERS, 3, &block(1)));
    }

    #[test]
    fn reads_into_a_full_buffer_are_not_an_end() {
        let mut stream = AuthorityStream::new(io::Cursor::new(opening(&[])));
        assert_eq!(stream.read(&mut []).now_or_never().unwrap().unwrap(), 0);
        assert_eq!(stream.read(&mut [0; 3]).now_or_never().unwrap().unwrap(), 3);
    }

    /// However the bytes arrive, hyper gets the same.
    fn check_chunking(input: &[u8], cuts: &[usize]) {
        let mut chunks = Vec::new();
        let mut rest = input;
        for cut in cuts.iter().chain([&input.len()]) {
            let (chunk, next) = rest.split_at((*cut).min(rest.len()));
            // An empty read would be an end.
            chunks.extend((!chunk.is_empty()).then_some(chunk));
            rest = next;
        }
        assert_eq!(read(&[input]), read(&chunks));
    }

    /// A connection of a client whose authority does not parse, with everything that a block may have.
    fn conversation() -> Vec<u8> {
        let first =
            [&[0x82, 0x86, 0x44, 2, b'/', b'p', 0x41, 2, b'/', b'x', 0x40, 1, b'a', 0x82, 0x1c, 0x64][..]].concat();
        let second = [0x82, 0x86, 0xc0, 0xbf, 0xbe, 0x50, 1, b'z'];
        [
            PREFACE.to_vec(),
            frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 255, 255]),
            frame(0x8, 0, 0, &[0, 0, 1, 0]),
            frame(HEADERS, END_HEADERS, 1, &first),
            frame(0, 1, 1, &[0; 20]),
            frame(HEADERS, 0x29, 3, &[&[1, 0, 0, 0, 0, 9], &second[..4], &[0]].concat()),
            frame(CONTINUATION, 0, 3, &second[4..5]),
            frame(CONTINUATION, END_HEADERS, 3, &second[5..]),
            frame(HEADERS, END_HEADERS | 1, 5, &[0x20, 0x3f, 0xe1, 0x1f, 0x82, 0x41, 1, b'/']),
            frame(0x3, 0, 5, &[0, 0, 0, 8]),
        ]
        .concat()
    }

    #[test]
    fn a_mutated_conversation_keeps_the_bounds_however_it_arrives() {
        let mut random = StdRng::seed_from_u64(0x6373_7264);
        let original = conversation();
        assert_eq!(read(&[&original]).2, Mode::Translating);
        for _ in 0..3_000 {
            let mut input = original.clone();
            for _ in 0..random.random_range(0..4) {
                let at = random.random_range(PREFACE.len()..input.len());
                match random.random_range(0..4) {
                    0 => input[at] = random.random(),
                    1 => input[at] ^= 1 << random.random_range(0..8),
                    2 => drop(input.remove(at)),
                    _ => input.insert(at, random.random()),
                }
            }
            let cuts: Vec<usize> = (0..random.random_range(0..40)).map(|_| random.random_range(1..20)).collect();
            check_chunking(&input, &cuts);
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_keep_the_bounds_however_they_arrive(
            http2 in any::<bool>(),
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
            cuts in proptest::collection::vec(1usize..30, 0..30),
        ) {
            let input = [if http2 { PREFACE } else { &[] }, &bytes].concat();
            check_chunking(&input, &cuts);
        }

        #[test]
        fn arbitrary_frames_keep_the_bounds_however_they_arrive(
            frames in proptest::collection::vec(
                (prop_oneof![Just(1u8), Just(9), 0u8..12], any::<u8>(), 0u32..4, proptest::collection::vec(any::<u8>(), 0..60)),
                0..12,
            ),
            cuts in proptest::collection::vec(1usize..30, 0..30),
        ) {
            let frames = frames.iter().map(|(kind, flags, stream, payload)| frame(*kind, *flags, *stream, payload));
            let input = [opening(&literal(":authority", b"/x")), frames.collect::<Vec<_>>().concat()].concat();
            check_chunking(&input, &cuts);
        }
    }
}
