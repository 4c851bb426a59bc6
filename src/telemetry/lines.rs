//! Log lines, text or JSON, that name the trace and span they belong to.
//!
//! Names of fields are ours, values may be anybody's. Every value goes through [`Fields`], so that no call site can forget:
//! one event is one line, of a bounded length, with no character that steers a terminal, and no value can pass for another
//! field. In text a value stands bare when it is one word, and in quotes otherwise, as `key="two words"`; so does a message
//! that has an equals sign.

use std::fmt;

use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    field::RecordFields,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{Format, Full, Writer},
        time::{FormatTime as _, SystemTime},
    },
    registry::LookupSpan,
};

use super::{span, with_causes};
use crate::text::{self, MARK, is_shown};

/// Bytes of one value in a log line, as they are written.
pub const MAX_FIELD_BYTES: usize = 1024;
/// Bytes of the message and the fields of one log line, or of the fields of one span in it. No event of ours has as many
/// fields as would fill it, so that a long value hides none of the others.
pub const MAX_LINE_BYTES: usize = 8 * 1024;

/// One line of text for each event, for people.
pub(super) struct TextLines(Format<Full>);

/// One JSON object for each event, on a line of its own.
pub(super) struct JsonLines;

/// Fields as text.
pub(super) struct TextFields;

impl TextLines {
    pub(super) fn new(ansi: bool) -> Self {
        Self(Format::default().with_ansi(ansi))
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> FormatEvent<S, TextFields> for TextLines {
    fn format_event(
        &self,
        context: &FmtContext<'_, S, TextFields>,
        mut to: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let Some(span) = span::current() else {
            return self.0.format_event(context, to, event);
        };
        let mut line = String::new();
        self.0.format_event(context, Writer::new(&mut line), event)?;
        writeln!(to, "{} trace_id={} span_id={}", line.trim_end(), span.trace_id(), span.span_id())
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> FormatEvent<S, TextFields> for JsonLines {
    fn format_event(&self, _: &FmtContext<'_, S, TextFields>, mut to: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        to.write_str(r#"{"timestamp":""#)?;
        SystemTime.format_time(&mut to)?;
        write!(to, r#"","level":"{}""#, event.metadata().level())?;
        Fields::record(to.by_ref(), Form::Json, |fields| event.record(fields))?;
        write!(to, r#","target":{}"#, text::json_string(event.metadata().target(), MAX_FIELD_BYTES))?;
        if let Some(span) = span::current() {
            write!(to, r#","trace_id":"{}","span_id":"{}""#, span.trace_id(), span.span_id())?;
        }
        to.write_str("}\n")
    }
}

impl<'writer> FormatFields<'writer> for TextFields {
    fn format_fields<R: RecordFields>(&self, to: Writer<'writer>, fields: R) -> fmt::Result {
        let form = if to.has_ansi_escapes() { Form::Coloured } else { Form::Text };
        Fields::record(to, form, |visitor| fields.record(visitor))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Text,
    /// For a terminal.
    Coloured,
    Json,
}

/// The fields of one event or span on their way into a line.
struct Fields<'writer> {
    to: Writer<'writer>,
    form: Form,
    /// Bytes that the line still has room for; nothing more is written once a field has found too little.
    left: Option<usize>,
    empty: bool,
    written: fmt::Result,
}

impl<'writer> Fields<'writer> {
    fn record(to: Writer<'writer>, form: Form, record: impl FnOnce(&mut Self)) -> fmt::Result {
        let mut fields = Self { to, form, left: Some(MAX_LINE_BYTES), empty: true, written: Ok(()) };
        record(&mut fields);
        fields.written
    }

    /// Writes a value that is safe already.
    fn write(&mut self, name: &str, value: &str) {
        let Some(left) = self.left else { return };
        self.left = left.checked_sub(name.len() + value.len() + r#","":"#.len());
        let cut = self.left.is_none();
        let gap = if self.empty { "" } else { " " };
        let written = match self.form {
            Form::Json if cut => write!(self.to, r#","{MARK}":true"#),
            Form::Json => write!(self.to, r#","{name}":{value}"#),
            _ if cut => write!(self.to, "{gap}{MARK}"),
            _ if name == MESSAGE => write!(self.to, "{gap}{value}"),
            Form::Text => write!(self.to, "{gap}{name}={value}"),
            Form::Coloured => write!(self.to, "{gap}\x1b[3m{name}\x1b[0m\x1b[2m=\x1b[0m{value}"),
        };
        self.empty = false;
        self.written = self.written.and(written);
    }

    fn write_text(&mut self, name: &str, value: &str, value_in_text: fn(&str) -> String) {
        let value = match self.form {
            Form::Json => text::json_string(value, MAX_FIELD_BYTES),
            _ if name == MESSAGE => message(value),
            _ => value_in_text(value),
        };
        self.write(name, &value);
    }

    fn write_number(&mut self, field: &Field, number: impl fmt::Display) {
        self.write(field.name(), &number.to_string());
    }
}

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // One byte more than fits, for what reads it to see that there is more.
        let beginning = text::beginning(&format_args!("{value:?}"), MAX_FIELD_BYTES + 1);
        self.write_text(field.name(), &beginning, word);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.write_text(field.name(), value, |value| text::quoted(value, MAX_FIELD_BYTES));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.write_text(field.name(), &with_causes(value), word);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.write_number(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.write_number(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.write_number(field, value);
    }
}

/// What tracing calls the field of an event's words.
const MESSAGE: &str = "message";

/// Words without an equals sign are no field, wherever they end.
fn message(text: &str) -> String {
    if text.contains('=') { text::quoted(text, MAX_FIELD_BYTES) } else { text::printable_within(text, MAX_FIELD_BYTES) }
}

/// As it is when nothing in it can be taken for the end of the value, otherwise in quotes.
fn word(value: &str) -> String {
    let fits = value.len() <= MAX_FIELD_BYTES && !value.is_empty() && value.chars().all(is_shown);
    let is_word = || !value.contains([' ', '=', '"', '\\']);
    if fits && (is_word() || is_quoted(value)) { value.to_owned() } else { text::quoted(value, MAX_FIELD_BYTES) }
}

/// Whether it is one quoted word already, as `{:?}` makes of a string.
fn is_quoted(value: &str) -> bool {
    let inner = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    let closed = |inner: &str| {
        let escaped = inner.chars().try_fold(false, |escaped, c| match (escaped, c) {
            (false, '"') => None,
            (false, '\\') => Some(true),
            _ => Some(false),
        });
        escaped == Some(false)
    };
    inner.is_some_and(closed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_one_word_or_stands_in_quotes() {
        fn check(value: &str, expected: &str) {
            assert_eq!(word(value), expected);
        }
        check("/usr/bin/web", "/usr/bin/web");
        check("12", "12");
        check("", r#""""#);
        check("uid 1000 /usr/bin/web", r#""uid 1000 /usr/bin/web""#);
        check("x reason=NONE", r#""x reason=NONE""#);
        check("a=b", r#""a=b""#);
        check(r#"a"b"#, r#""a\"b""#);
        check(r"a\", r#""a\\""#);
        check("a\nb\u{202e}", r#""a\nb\u{202e}""#);
        check("a\u{a0}b", r#""a\u{a0}b""#);
        // What a string's `{:?}` has put in quotes stays, and nothing that only looks like it.
        check(r#""a \"b\" c""#, r#""a \"b\" c""#);
        check(r#""a" reason="b""#, r#""\"a\" reason=\"b\"""#);
        check(r#""a\""#, r#""\"a\\\"""#);
        check(r#"""#, r#""\"""#);
        check(&"x".repeat(MAX_FIELD_BYTES), &"x".repeat(MAX_FIELD_BYTES));
        check(&"x".repeat(MAX_FIELD_BYTES + 1), &format!("\"{}…\"", "x".repeat(MAX_FIELD_BYTES - 2 - MARK.len())));
    }

    #[test]
    fn words_that_could_be_a_field_stand_in_quotes() {
        assert_eq!(message("certificate issued"), "certificate issued");
        assert_eq!(message("refused: a\r\nb \"c\""), r#"refused: a\r\nb "c""#);
        assert_eq!(message("refused: a reason=NONE"), r#""refused: a reason=NONE""#);
    }
}
