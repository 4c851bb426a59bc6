//! Walks DER strictly: nothing after a value, no list but of whole values. The parsers beneath are lenient here.

use x509_parser::asn1_rs::{Any, Class, FromDer as _, Tag};

/// The one value that `bytes` is; `None` if it is malformed or anything follows it.
pub(super) fn only(bytes: &[u8]) -> Option<Any<'_>> {
    match Any::from_der(bytes) {
        Ok((&[], value)) => Some(value),
        _ => None,
    }
}

/// The values that `bytes` is a list of; `None` if the last one is cut short.
pub(super) fn children(mut bytes: &[u8]) -> Option<Vec<Any<'_>>> {
    let mut values = Vec::new();
    while !bytes.is_empty() {
        let (rest, value) = Any::from_der(bytes).ok()?;
        values.push(value);
        bytes = rest;
    }
    Some(values)
}

/// Whether `value` has the universal tag `tag`.
pub(super) fn is(value: &Any<'_>, tag: Tag) -> bool {
    value.class() == Class::Universal && value.tag() == tag
}

/// The digits of a positive INTEGER without the sign byte; `None` for anything else, zero and padding included.
pub(super) fn positive<'a>(value: &Any<'a>) -> Option<&'a [u8]> {
    if !is(value, Tag::Integer) {
        return None;
    }
    match value.data {
        [0, digits @ ..] if digits.first().is_some_and(|first| *first >= 0x80) => Some(digits),
        digits @ [1..=0x7f, ..] => Some(digits),
        _ => None,
    }
}
