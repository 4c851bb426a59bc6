//! HPACK for one direction: reads a client's header blocks (RFC 7541), writes fields as plain literals.
//!
//! The invariant: after every block the table here equals the client's, so an index names what the client meant; a
//! block that breaks a rule is an error, never a guess. Writing uses no table, so there is nothing to keep in step.
//! Every byte comes from whoever could open the socket, and the whole daemon waits while one is read. That is why this
//! is ours: `hpack`, `fluke-hpack` and `httlib-hpack` panic on the single byte `0x3f` (RUSTSEC-2023-0085), and
//! `loona-hpack`, which does not, builds 257 hash map entries for every Huffman-coded string and takes a table size
//! update anywhere in a block. The tests hold this one against `fluke-hpack` and against hyper's own decoder.

use std::{borrow::Cow, collections::VecDeque};

/// Most bytes the dynamic table may hold: the initial `SETTINGS_HEADER_TABLE_SIZE` (RFC 9113 §6.5.2), which hyper keeps.
pub(super) const TABLE_BYTES_MAX: usize = 4096;

/// Octets of one integer, prefix included: values stay below 2^29, as in h2.
const INTEGER_BYTES_MAX: usize = 5;

/// What RFC 7541 §4.1 adds to name and value when it counts the size of a field.
const FIELD_OVERHEAD: usize = 32;

/// Why a header block cannot be read; each is a connection error (RFC 9113 §4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum HpackError {
    #[error("the header block ends inside a field")]
    Truncated,
    #[error("an integer has more than {INTEGER_BYTES_MAX} octets")]
    Integer,
    #[error("an index names no entry of the table")]
    Index,
    #[error("a string is not a valid huffman code")]
    Huffman,
    #[error("a table size update is above {TABLE_BYTES_MAX} bytes or follows a field")]
    SizeUpdate,
    #[error("the header list is larger than it may be")]
    ListSize,
}

/// A name and a value.
type Field<'a> = (Cow<'a, [u8]>, Cow<'a, [u8]>);
type Entry = (Box<[u8]>, Box<[u8]>);

/// Reads header blocks in the order in which the client sent them.
#[derive(Debug)]
pub(super) struct Decoder {
    /// Newest first.
    entries: VecDeque<Entry>,
    size: usize,
    size_max: usize,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self { entries: VecDeque::new(), size: 0, size_max: TABLE_BYTES_MAX }
    }

    /// Calls `each` with every name and value of a complete header block, at most `list_max` bytes of them (RFC 9113
    /// §6.5.2 counting, so an indexed field costs what it stands for). After an error the table is no longer the client's.
    pub(super) fn decode(
        &mut self,
        mut block: &[u8],
        list_max: usize,
        mut each: impl FnMut(&[u8], &[u8]),
    ) -> Result<(), HpackError> {
        let mut list = 0;
        let mut emit = |name: &[u8], value: &[u8]| {
            list += name.len() + value.len() + FIELD_OVERHEAD;
            if list > list_max {
                return Err(HpackError::ListSize);
            }
            each(name, value);
            Ok(())
        };
        let mut resizable = true;
        while let Some(&first) = block.first() {
            match first {
                // §6.1: indexed field.
                0x80.. => {
                    let (name, value) = self.entry(integer(&mut block, 7)?)?;
                    emit(name, value)?;
                }
                // §6.2.1: literal field with incremental indexing.
                0x40.. => {
                    let (name, value) = self.literal(&mut block, 6)?;
                    emit(&name, &value)?;
                    let entry = (Box::from(name), Box::from(value));
                    self.insert(entry);
                }
                // §6.3: dynamic table size update, at the start of a block only (§4.2).
                0x20.. => {
                    let size = integer(&mut block, 5)?;
                    if !resizable || size > TABLE_BYTES_MAX {
                        return Err(HpackError::SizeUpdate);
                    }
                    self.size_max = size;
                    self.evict();
                    continue;
                }
                // §6.2.2 and §6.2.3: literal field without indexing, and never indexed.
                _ => {
                    let (name, value) = self.literal(&mut block, 4)?;
                    emit(&name, &value)?;
                }
            }
            resizable = false;
        }
        Ok(())
    }

    fn literal<'a, 'b: 'a>(&'a self, block: &mut &'b [u8], prefix: u32) -> Result<Field<'a>, HpackError> {
        let name = match integer(block, prefix)? {
            0 => string(block)?,
            index => Cow::Borrowed(self.entry(index)?.0),
        };
        Ok((name, string(block)?))
    }

    fn entry(&self, index: usize) -> Result<(&[u8], &[u8]), HpackError> {
        let position = index.checked_sub(1).ok_or(HpackError::Index)?;
        match STATIC_TABLE.get(position) {
            Some((name, value)) => Ok((name.as_bytes(), value.as_bytes())),
            None => {
                let (name, value) = self.entries.get(position - STATIC_TABLE.len()).ok_or(HpackError::Index)?;
                Ok((name, value))
            }
        }
    }

    /// §4.4: an entry larger than the table empties it and is not kept.
    fn insert(&mut self, entry: Entry) {
        self.size += field_size(&entry);
        self.entries.push_front(entry);
        self.evict();
    }

    fn evict(&mut self) {
        while self.size > self.size_max {
            let oldest = self.entries.pop_back().expect("a table of size above zero has an entry");
            self.size -= field_size(&oldest);
        }
    }
}

/// Appends one field as a literal without indexing, new name, no Huffman code (§6.2.2).
pub(super) fn encode_literal(name: &[u8], value: &[u8], out: &mut Vec<u8>) {
    out.push(0x00);
    for text in [name, value] {
        encode_length(text.len(), out);
        out.extend_from_slice(text);
    }
}

/// §5.1 with a prefix of 7 bits.
fn encode_length(length: usize, out: &mut Vec<u8>) {
    const PREFIX: usize = 0x7f;
    let Some(mut rest) = length.checked_sub(PREFIX) else {
        return out.push(length as u8);
    };
    out.push(PREFIX as u8);
    while rest > 0x7f {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

fn field_size((name, value): &Entry) -> usize {
    name.len() + value.len() + FIELD_OVERHEAD
}

/// §5.1: takes an integer that begins in the low `prefix` bits of the first octet.
fn integer(block: &mut &[u8], prefix: u32) -> Result<usize, HpackError> {
    let mask = (1 << prefix) - 1;
    let mut value = usize::from(octet(block)?) & mask;
    if value < mask {
        return Ok(value);
    }
    for position in 0..INTEGER_BYTES_MAX - 1 {
        let next = octet(block)?;
        value += usize::from(next & 0x7f) << (7 * position);
        if next & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(HpackError::Integer)
}

/// §5.2.
fn string<'a>(block: &mut &'a [u8]) -> Result<Cow<'a, [u8]>, HpackError> {
    let coded = block.first().is_some_and(|first| first & 0x80 != 0);
    let length = integer(block, 7)?;
    let (text, rest) = block.split_at_checked(length).ok_or(HpackError::Truncated)?;
    *block = rest;
    Ok(if coded { Cow::Owned(huffman(text)?) } else { Cow::Borrowed(text) })
}

fn octet(block: &mut &[u8]) -> Result<u8, HpackError> {
    let (&first, rest) = block.split_first().ok_or(HpackError::Truncated)?;
    *block = rest;
    Ok(first)
}

/// §5.2: the padding is less than an octet and all ones; the code for EOS is never part of a string.
fn huffman(coded: &[u8]) -> Result<Vec<u8>, HpackError> {
    let mut text = Vec::with_capacity(coded.len() * 8 / 5);
    let (mut bits, mut length) = (0u32, 0);
    for octet in coded {
        for shift in (0..8).rev() {
            bits = bits << 1 | u32::from(octet >> shift & 1);
            length += 1;
            let row = HUFFMAN.rows.get(length).ok_or(HpackError::Huffman)?;
            if let Some(offset) = bits.checked_sub(row.first).filter(|offset| *offset < row.count) {
                let symbol = HUFFMAN.symbols[(row.start + offset) as usize];
                text.push(u8::try_from(symbol).map_err(|_| HpackError::Huffman)?);
                (bits, length) = (0, 0);
            }
        }
    }
    let padded = length < 8 && bits == (1 << length) - 1;
    if padded { Ok(text) } else { Err(HpackError::Huffman) }
}

/// The code is canonical: codes of one length are consecutive and in the order of their symbols, so that the lengths
/// alone give all of it.
struct Huffman {
    /// By length in bits.
    rows: [Row; HUFFMAN_BITS_MAX + 1],
    /// By code.
    symbols: [u16; 257],
}

/// The codes of one length.
#[derive(Clone, Copy)]
struct Row {
    first: u32,
    count: u32,
    /// Where their symbols start.
    start: u32,
}

const HUFFMAN_BITS_MAX: usize = 30;

static HUFFMAN: Huffman = {
    let mut huffman = Huffman { rows: [Row { first: 0, count: 0, start: 0 }; HUFFMAN_BITS_MAX + 1], symbols: [0; 257] };
    let (mut length, mut code, mut placed) = (1, 0, 0);
    while length <= HUFFMAN_BITS_MAX {
        code <<= 1;
        let start = placed;
        let mut symbol = 0;
        while symbol < HUFFMAN_LENGTHS.len() {
            if HUFFMAN_LENGTHS[symbol] as usize == length {
                huffman.symbols[placed as usize] = symbol as u16;
                placed += 1;
            }
            symbol += 1;
        }
        huffman.rows[length] = Row { first: code, count: placed - start, start };
        code += placed - start;
        length += 1;
    }
    huffman
};

/// RFC 7541 appendix B: bits of the code for each octet, then for EOS.
#[rustfmt::skip]
const HUFFMAN_LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];

/// RFC 7541 appendix A.
#[rustfmt::skip]
static STATIC_TABLE: [(&str, &str); 61] = [
    (":authority", ""), (":method", "GET"), (":method", "POST"), (":path", "/"), (":path", "/index.html"),
    (":scheme", "http"), (":scheme", "https"), (":status", "200"), (":status", "204"), (":status", "206"),
    (":status", "304"), (":status", "400"), (":status", "404"), (":status", "500"), ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"), ("accept-language", ""), ("accept-ranges", ""), ("accept", ""),
    ("access-control-allow-origin", ""), ("age", ""), ("allow", ""), ("authorization", ""), ("cache-control", ""),
    ("content-disposition", ""), ("content-encoding", ""), ("content-language", ""), ("content-length", ""),
    ("content-location", ""), ("content-range", ""), ("content-type", ""), ("cookie", ""), ("date", ""), ("etag", ""),
    ("expect", ""), ("expires", ""), ("from", ""), ("host", ""), ("if-match", ""), ("if-modified-since", ""),
    ("if-none-match", ""), ("if-range", ""), ("if-unmodified-since", ""), ("last-modified", ""), ("link", ""),
    ("location", ""), ("max-forwards", ""), ("proxy-authenticate", ""), ("proxy-authorization", ""), ("range", ""),
    ("referer", ""), ("refresh", ""), ("retry-after", ""), ("server", ""), ("set-cookie", ""),
    ("strict-transport-security", ""), ("transfer-encoding", ""), ("user-agent", ""), ("vary", ""), ("via", ""),
    ("www-authenticate", ""),
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Fields = Vec<(Vec<u8>, Vec<u8>)>;

    fn decode(decoder: &mut Decoder, block: &[u8]) -> Result<Fields, HpackError> {
        let mut fields = Vec::new();
        decoder.decode(block, 64 * 1024, |name, value| fields.push((name.to_vec(), value.to_vec())))?;
        Ok(fields)
    }

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter_map(|b| (b as char).to_digit(16)).map(|d| d as u8).collect();
        digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    fn huffman_encode(text: &[u8]) -> Vec<u8> {
        let mut bits = Vec::new();
        for octet in text {
            let length = HUFFMAN_LENGTHS[usize::from(*octet)];
            let position = HUFFMAN.symbols.iter().position(|symbol| *symbol == u16::from(*octet)).unwrap() as u32;
            let row = HUFFMAN.rows[usize::from(length)];
            let code = row.first + position - row.start;
            bits.extend((0..length).rev().map(|shift| code >> shift & 1));
        }
        bits.resize(bits.len().next_multiple_of(8), 1);
        bits.chunks(8).map(|octet| octet.iter().fold(0, |all, bit| all << 1 | *bit as u8)).collect()
    }

    #[test]
    fn the_examples_of_rfc_7541_are_read() {
        // Appendices C.3 (no Huffman code), C.4, and C.6 (a table of 256 bytes that evicts).
        let requests = [
            ("8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d", 4),
            ("8286 84be 5808 6e6f 2d63 6163 6865", 5),
            ("8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65", 5),
        ];
        let coded_requests = [
            ("8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff", 4),
            ("8286 84be 5886 a8eb 1064 9cbf", 5),
            ("8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf", 5),
        ];
        for examples in [requests, coded_requests] {
            let mut decoder = Decoder::new();
            let last = examples.map(|(block, count)| {
                let fields = decode(&mut decoder, &hex(block)).unwrap();
                assert_eq!(fields.len(), count);
                fields
            });
            assert_eq!(last[0][3], (b":authority".to_vec(), b"www.example.com".to_vec()));
            assert_eq!(last[2][3], (b":authority".to_vec(), b"www.example.com".to_vec()));
            assert_eq!(last[2][4], (b"custom-key".to_vec(), b"custom-value".to_vec()));
            assert_eq!(decoder.size, 164);
        }

        let mut decoder = Decoder::new();
        decode(&mut decoder, &hex("3fe101")).unwrap();
        let responses = [
            "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad 1718 63c7 8f0b 97c8 e9ae 82ae 43d3",
            "4883 640e ffc1 c0bf",
            "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d d7f2 e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07",
        ];
        let fields = responses.map(|block| decode(&mut decoder, &hex(block)).unwrap());
        assert_eq!(fields[1][0], (b":status".to_vec(), b"307".to_vec()));
        assert_eq!(fields[1][1], (b"cache-control".to_vec(), b"private".to_vec()));
        assert_eq!(fields[2][1], (b"cache-control".to_vec(), b"private".to_vec()));
        assert_eq!(fields[2][5].0, b"set-cookie");
        assert_eq!(decoder.size, 215);
    }

    #[test]
    fn a_block_that_breaks_a_rule_is_an_error() {
        use HpackError::*;
        let fields_of_4096 = [&[0x00, 0x01, b'a', 0x7f, 0xe0, 0x1e][..], &[b'b'; 4063]].concat();
        for (name, block, expected) in [
            ("an index of zero", &[0x80][..], Err(Index)),
            ("the last static entry", &[0xbd], Ok(1)),
            ("one past the static table", &[0xbe], Err(Index)),
            ("a name index past the table", &[0x7f, 0x00, 0x00], Err(Index)),
            ("a size update without its integer", &[0x3f], Err(Truncated)),
            ("a size update cut short", &[0x3f, 0x80], Err(Truncated)),
            ("an integer of five octets", &[0x3f, 0x80, 0x80, 0x80, 0x00], Ok(0)),
            ("an integer of six octets", &[0x3f, 0x80, 0x80, 0x80, 0x80, 0x00], Err(Integer)),
            ("a table of 4096 bytes", &[0x3f, 0xe1, 0x1f], Ok(0)),
            ("a table of 4097 bytes", &[0x3f, 0xe2, 0x1f], Err(SizeUpdate)),
            ("a table of no bytes, then of 4096", &[0x20, 0x3f, 0xe1, 0x1f, 0x82], Ok(1)),
            ("a size update after a field", &[0x82, 0x20], Err(SizeUpdate)),
            ("an entry of the table", &[0x40, 1, b'a', 1, b'b', 0xbe], Ok(2)),
            ("one past the entries of the table", &[0x40, 1, b'a', 1, b'b', 0xbf], Err(Index)),
            ("a literal without a name", &[0x00], Err(Truncated)),
            ("a literal without a value", &[0x00, 0x01, b'a'], Err(Truncated)),
            ("a value cut short", &[0x00, 0x01, b'a', 0x02, b'b'], Err(Truncated)),
            ("an empty name and value", &[0x00, 0x00, 0x00], Ok(1)),
            ("huffman: five bits of '0' and padding", &[0x04, 0x81, 0x07], Ok(1)),
            ("huffman: padding of zeros", &[0x04, 0x81, 0x00], Err(Huffman)),
            ("huffman: seven bits of padding", &[0x04, 0x82, 0xfe, 0x7f], Ok(1)),
            ("huffman: an octet of padding", &[0x04, 0x82, 0xf8, 0xff], Err(Huffman)),
            ("huffman: EOS", &[0x04, 0x84, 0xff, 0xff, 0xff, 0xff], Err(Huffman)),
            ("a list of 4096 bytes", &fields_of_4096, Ok(1)),
            ("a list past its bound", &[&fields_of_4096[..], &[0x82]].concat(), Err(ListSize)),
            ("an empty block", &[], Ok(0)),
        ] {
            let mut count = 0;
            let outcome = Decoder::new().decode(block, 4096, |_, _| count += 1).map(|()| count);
            assert_eq!(outcome, expected, "{name}");
        }
    }

    #[test]
    fn a_smaller_table_forgets_its_oldest_entries() {
        // Two entries of 34 bytes each; sizes of 31 and more take a second octet.
        for (resize, kept) in [(&[0x3f, 37][..], 2), (&[0x3f, 36], 1), (&[0x3f, 3], 1), (&[0x3f, 2], 0), (&[0x20], 0)] {
            let mut decoder = Decoder::new();
            decode(&mut decoder, &[0x40, 1, b'a', 1, b'b', 0x40, 1, b'c', 1, b'd']).unwrap();
            decode(&mut decoder, resize).unwrap();
            for entry in 0..2 {
                let expected = if entry < kept { Ok(1) } else { Err(HpackError::Index) };
                assert_eq!(decode(&mut decoder, &[0xbe + entry]).map(|fields| fields.len()), expected, "{resize:?}");
            }
        }
    }

    #[test]
    fn an_entry_larger_than_the_table_empties_it() {
        let mut decoder = Decoder::new();
        decode(&mut decoder, &[0x40, 1, b'a', 1, b'b']).unwrap();
        assert_eq!(decode(&mut decoder, &[0xbe]).unwrap().len(), 1);
        let large = [&[0x40, 1, b'a', 0x7f, 0x81, 0x1f][..], &[b'b'; 4096]].concat();
        decode(&mut decoder, &large).unwrap();
        assert_eq!(decode(&mut decoder, &[0xbe]), Err(HpackError::Index));
    }

    #[test]
    fn every_octet_has_the_code_that_another_implementation_gives_it() {
        for octet in 0..=u8::MAX {
            let coded = huffman_encode(&[octet]);
            assert_eq!(huffman(&coded), Ok(vec![octet]));
            assert_eq!(fluke_hpack::huffman::HuffmanDecoder::new().decode(&coded), Ok(vec![octet]));
        }
    }

    /// One field in any of its forms; indices reach a little past a table of few entries.
    fn representation() -> impl Strategy<Value = Vec<u8>> {
        let text = || {
            (proptest::collection::vec(any::<u8>(), 0..60), any::<bool>()).prop_map(|(text, coded)| {
                let text = if coded { huffman_encode(&text) } else { text };
                let mut out = Vec::new();
                encode_length(text.len(), &mut out);
                out[0] |= if coded { 0x80 } else { 0 };
                [out, text].concat()
            })
        };
        prop_oneof![
            3 => (1u8..=63).prop_map(|index| vec![0x80 | index]),
            6 => (prop_oneof![Just(0x40u8), Just(0x00), Just(0x10)], text(), text())
                .prop_map(|(kind, name, value)| [vec![kind], name, value].concat()),
            3 => (1u8..=62, text()).prop_map(|(index, value)| [vec![0x40 | index], value].concat()),
            1 => (62u8..=100).prop_map(|index| vec![0x80 | index]),
        ]
    }

    /// Size updates as a rule where they belong.
    fn block() -> impl Strategy<Value = Vec<u8>> {
        let size_update = || (0u8..=30).prop_map(|size| vec![0x20 | size]);
        let wide_update = (0u8..=0x20).prop_map(|high| vec![0x3f, 0x80, high]);
        let updates = prop_oneof![8 => Just(vec![]), 1 => size_update(), 2 => wide_update];
        let fields = proptest::collection::vec(prop_oneof![200 => representation(), 1 => size_update()], 0..30);
        (updates, fields).prop_map(|(updates, fields)| [updates, fields.concat()].concat())
    }

    proptest! {
        #[test]
        fn another_implementation_reads_the_same(
            blocks in proptest::collection::vec(block(), 1..12)
        ) {
            let (mut ours, mut theirs) = (Decoder::new(), fluke_hpack::Decoder::new());
            theirs.set_max_allowed_table_size(TABLE_BYTES_MAX);
            for block in blocks {
                let read = decode(&mut ours, &block);
                prop_assert!(ours.size <= ours.size_max && ours.size_max <= TABLE_BYTES_MAX);
                match read {
                    Ok(fields) if !fields.is_empty() => prop_assert_eq!(theirs.decode(&block), Ok(fields)),
                    // It refuses a block of size updates alone, which h2 takes.
                    Ok(_) => drop(theirs.decode(&block)),
                    // It takes a size update anywhere.
                    Err(HpackError::SizeUpdate) => break,
                    Err(_) => { prop_assert!(theirs.decode(&block).is_err()); break }
                }
            }
        }

        #[test]
        fn no_bytes_make_it_panic(blocks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..8)) {
            let mut decoder = Decoder::new();
            for block in blocks {
                drop(decode(&mut decoder, &block));
                prop_assert!(decoder.size <= TABLE_BYTES_MAX);
            }
        }

        #[test]
        fn what_is_written_reads_back(
            fields in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..300), proptest::collection::vec(any::<u8>(), 0..300)), 0..20)
        ) {
            let mut block = Vec::new();
            for (name, value) in &fields {
                encode_literal(name, value, &mut block);
            }
            prop_assert_eq!(decode(&mut Decoder::new(), &block), Ok(fields));
        }
    }
}
