//! PEM written without a copy left behind (RFC 7468); reading is the library's.

use base64::{Engine as _, engine::general_purpose::STANDARD};

/// Bytes in one line of 64 characters (RFC 7468 section 2).
const LINE_BYTES: usize = 48;

/// One block. The string is made in its final size, so that growing it leaves no part of a secret in freed memory.
pub(crate) fn encode(label: &str, der: &[u8]) -> String {
    let frame = "-----BEGIN -----\n-----END -----\n".len() + 2 * label.len();
    let mut text = String::with_capacity(frame + der.len().div_ceil(LINE_BYTES) * 65);
    text.extend(["-----BEGIN ", label, "-----\n"]);
    for line in der.chunks(LINE_BYTES) {
        STANDARD.encode_string(line, &mut text);
        text.push('\n');
    }
    text.extend(["-----END ", label, "-----\n"]);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_string_never_grows_and_reads_back() {
        for length in [0, 1, LINE_BYTES, LINE_BYTES + 1, 3000] {
            let der: Vec<u8> = (0..length).map(|i| i as u8).collect();
            let text = encode("PRIVATE KEY", &der);
            assert!(text.lines().all(|line| line.len() <= 64));
            assert_eq!(::pem::parse(&text).unwrap().contents(), der);
            let bound = "-----BEGIN -----\n-----END -----\n".len() + 2 * 11 + length.div_ceil(LINE_BYTES) * 65;
            assert_eq!(text.capacity(), bound, "{length}");
        }
    }
}
