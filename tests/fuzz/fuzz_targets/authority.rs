//! However a client's bytes arrive, hyper gets the same, and it ends the same way.
#![no_main]

use csrd::server::authority::AuthorityStream;
use futures_util::FutureExt;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncRead, AsyncReadExt};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn read(client: impl AsyncRead + Unpin) -> (Vec<u8>, bool) {
    let mut out = Vec::new();
    let ended = AuthorityStream::new(client).read_to_end(&mut out).now_or_never().expect("the client is always ready");
    (out, ended.is_ok())
}

fuzz_target!(|input: (usize, &[u8])| {
    let (at, frames) = input;
    let (start, end) = frames.split_at(at % (frames.len() + 1));
    assert_eq!(read(PREFACE.chain(frames)), read(PREFACE.chain(start).chain(end)));
});
