//! Foreign text made showable: what a caller, a tenant or another server chose, on its way to people.
//!
//! The only place that decides which characters may stand in a log line, a table, a message or an Event. Everything that
//! could steer a terminal, begin another line, reorder what is read or hide is escaped visibly, as Rust writes it; the end
//! of what is too long is replaced by a mark. Deliberately not here: which texts are foreign. The log's formatter, the
//! command line and the messages of refusals and conditions send all of theirs through here.

use std::fmt::{self, Write as _};

/// Bytes of one shown text, unless its place has a bound of its own.
pub const MAX_SHOWN_BYTES: usize = 4096;
/// Stands for what was cut off.
pub const MARK: &str = "…";

/// Whether a character is shown as it is.
///
/// The standard library's table of printable characters decides (`char::escape_debug`). Not in it are controls (C0, DEL,
/// C1), marks of direction, zero-width characters, separators of lines and paragraphs, every blank but the space, and what
/// is drawn over the character before it.
pub fn is_shown(c: char) -> bool {
    matches!(c, ' '..='~') || c.escape_debug().len() == 1
}

/// `text` on one line, with every character escaped that is not shown, in at most [`MAX_SHOWN_BYTES`].
pub fn printable(text: &str) -> String {
    printable_within(text, MAX_SHOWN_BYTES)
}

/// Likewise, in at most `max_bytes`.
pub fn printable_within(text: &str, max_bytes: usize) -> String {
    escaped(text, max_bytes, Form::Bare)
}

/// Likewise, as one word: in quotes, with quotes and backslashes escaped. The quotes count.
pub fn quoted(text: &str, max_bytes: usize) -> String {
    format!("\"{}\"", escaped(text, max_bytes.saturating_sub(2), Form::Quoted))
}

/// `text` as a JSON string of at most `max_bytes` with its quotes, without characters that are not shown.
pub fn json_string(text: &str, max_bytes: usize) -> String {
    format!("\"{}\"", escaped(text, max_bytes.saturating_sub(2), Form::Json))
}

/// JSON that says the same without characters that are not shown, line ends between tokens apart.
///
/// A serializer escapes only what RFC 8259 section 7 demands, which leaves DEL, C1 and the marks of direction to steer a
/// terminal. In JSON such a character can stand in a string only, where its escape means the same.
pub fn json(text: String) -> String {
    if text.chars().all(|c| c == '\n' || is_shown(c)) {
        return text;
    }
    text.chars().fold(String::with_capacity(text.len()), |mut safe, c| {
        match c {
            '\n' | '"' | '\\' => safe.push(c),
            c => Form::Json.push(&mut safe, c),
        }
        safe
    })
}

/// The beginning of what `value` prints, at least `min_bytes` of it and at most one piece more. The rest is never made.
pub fn beginning(value: &dyn fmt::Display, min_bytes: usize) -> String {
    struct Beginning(String, usize);
    impl fmt::Write for Beginning {
        fn write_str(&mut self, piece: &str) -> fmt::Result {
            let left = self.1.saturating_sub(self.0.len());
            self.0.push_str(&piece[..piece.ceil_char_boundary(left.min(piece.len()))]);
            if self.0.len() < self.1 { Ok(()) } else { Err(fmt::Error) }
        }
    }
    let mut beginning = Beginning(String::new(), min_bytes);
    // It fails when there is enough.
    let _ = write!(beginning, "{value}");
    beginning.0
}

/// Prints its text as [`printable`] does, for a `Display` that is one line.
pub struct Printable<'a>(pub &'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(self.0))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Bare,
    Quoted,
    Json,
}

impl Form {
    fn push(self, to: &mut String, c: char) {
        match c {
            '"' | '\\' if self != Self::Bare => to.extend(['\\', c]),
            c if is_shown(c) => to.push(c),
            c if self == Self::Json && !matches!(c, '\n' | '\r' | '\t') => {
                // RFC 8259 section 7: beyond the first plane, a pair of surrogates.
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(to, "\\u{unit:04x}").expect("writing to a string does not fail");
                }
            }
            c => to.extend(c.escape_debug()),
        }
    }
}

/// Cut between escapes, so that none of them is shown in part.
fn escaped(text: &str, max_bytes: usize, form: Form) -> String {
    let (mut shown, mut keep) = (String::with_capacity(text.len().min(max_bytes)), 0);
    for c in text.chars() {
        form.push(&mut shown, c);
        if shown.len() > max_bytes {
            shown.truncate(keep);
            shown.push_str(MARK);
            return shown;
        }
        if shown.len() + MARK.len() <= max_bytes {
            keep = shown.len();
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What must never reach a terminal or a log as it is.
    const STEERING: [std::ops::RangeInclusive<char>; 12] = [
        '\0'..='\u{1f}',
        '\u{7f}'..='\u{a0}',
        '\u{ad}'..='\u{ad}',
        '\u{61c}'..='\u{61c}',
        '\u{180e}'..='\u{180e}',
        '\u{2000}'..='\u{200f}',
        '\u{2028}'..='\u{202f}',
        '\u{205f}'..='\u{206f}',
        '\u{3000}'..='\u{3000}',
        '\u{feff}'..='\u{feff}',
        '\u{fff9}'..='\u{fffb}',
        '\u{e0001}'..='\u{e007f}',
    ];

    fn steers(c: char) -> bool {
        c.is_control() || STEERING.iter().any(|range| range.contains(&c))
    }

    #[test]
    fn what_steers_a_terminal_ends_a_line_or_hides_is_not_shown() {
        let shown: Vec<_> = STEERING.into_iter().flatten().filter(|c| is_shown(*c)).collect();
        assert!(shown.is_empty(), "{shown:?}");
        for c in "aZ09 ~\"'\\/=…éß中🦀".chars() {
            assert!(is_shown(c), "{c}");
        }
    }

    #[test]
    fn escapes_are_those_of_rust() {
        fn check(text: &str, bare: &str, word: &str, json: &str) {
            assert_eq!([printable(text), quoted(text, 99), json_string(text, 99)], [bare, word, json]);
        }
        check(
            "uid 1000 /usr/bin/wéb",
            "uid 1000 /usr/bin/wéb",
            r#""uid 1000 /usr/bin/wéb""#,
            r#""uid 1000 /usr/bin/wéb""#,
        );
        check(
            "a\x1b]0;b\x07\n\u{9b}",
            r"a\u{1b}]0;b\u{7}\n\u{9b}",
            r#""a\u{1b}]0;b\u{7}\n\u{9b}""#,
            r#""a\u001b]0;b\u0007\n\u009b""#,
        );
        check(
            "\u{202e}gpj\u{e0041}",
            r"\u{202e}gpj\u{e0041}",
            r#""\u{202e}gpj\u{e0041}""#,
            r#""\u202egpj\udb40\udc41""#,
        );
        check(r#"C:\"x""#, r#"C:\"x""#, r#""C:\\\"x\"""#, r#""C:\\\"x\"""#);
        check("", "", r#""""#, r#""""#);
    }

    #[test]
    fn what_is_too_long_is_cut_one_past_its_bound_between_escapes() {
        assert_eq!(printable(&"x".repeat(MAX_SHOWN_BYTES)), "x".repeat(MAX_SHOWN_BYTES));
        let cut = format!("{}…", "x".repeat(MAX_SHOWN_BYTES - MARK.len()));
        assert_eq!(printable(&"x".repeat(MAX_SHOWN_BYTES + 1)), cut);
        assert_eq!([printable_within("a\u{202e}", 9), printable_within("a\u{202e}", 8)], [r"a\u{202e}", "a…"]);
        assert_eq!([quoted("abcd", 6), quoted("abcde", 6)], [r#""abcd""#, r#""a…""#]);
        assert_eq!(
            [printable_within("abcd", 4), printable_within("abcde", 4), printable_within("éé", 3)],
            ["abcd", "a…", "…"]
        );
    }

    #[test]
    fn no_more_is_made_of_a_long_text_than_is_wanted() {
        struct Endless;
        impl fmt::Display for Endless {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                loop {
                    f.write_str("é\n")?;
                }
            }
        }
        assert_eq!([beginning(&Endless, 2), beginning(&Endless, 4)], ["é", "é\né"]);
        assert_eq!(beginning(&"abc", 4), "abc");
    }

    proptest! {
        #[test]
        fn nothing_that_is_printable_steers_whatever_it_was(text in any::<String>(), evil in "[\\x00-\\x1f\\x7f-\\u{9f}\\u{200b}-\\u{206f}\"\\\\=]{0,40}", max in 9..600_usize) {
            let text = format!("{evil}{text}{evil}");
            let shown = printable_within(&text, max);
            prop_assert!(!shown.contains(steers) && shown.len() <= max, "{shown:?}");
            prop_assert_eq!(&printable_within(&shown, max), &shown, "once is enough");
            let word = quoted(&text, max);
            prop_assert!(!word.contains(steers) && word.len() <= max, "{word:?}");
            let json = json_string(&text, max);
            prop_assert!(!json.contains(steers) && json.len() <= max, "{json:?}");
            let read: String = serde_json::from_str(&json).unwrap();
            prop_assert!(text.starts_with(read.strip_suffix(MARK).unwrap_or(&read)));
        }

        #[test]
        fn json_without_what_steers_means_the_same(text in any::<String>(), evil in "[\\x00-\\x1f\\x7f-\\u{9f}\\u{200b}-\\u{206f}\"\\\\]{0,40}") {
            let value = serde_json::json!({ (evil.clone()): [text, evil] });
            let safe = json(format!("{value:#}\n"));
            prop_assert!(!safe.replace('\n', "").contains(steers), "{safe:?}");
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&safe).unwrap(), value);
        }
    }
}
