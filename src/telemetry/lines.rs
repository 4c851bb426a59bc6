//! Log lines, text or JSON, that name the trace and span they belong to.

use std::fmt;

use tracing::{Event, Subscriber};
use tracing_subscriber::{
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{DefaultFields, Format, Full, Json, JsonFields, Writer},
    },
    registry::LookupSpan,
};

use super::span;

/// One line of text for each event, for people.
pub(super) struct TextLines(Format<Full>);

/// One JSON object for each event, on a line of its own.
pub(super) struct JsonLines(Format<Json>);

impl TextLines {
    pub(super) fn new(ansi: bool) -> Self {
        Self(Format::default().with_ansi(ansi))
    }
}

impl JsonLines {
    pub(super) fn new() -> Self {
        Self(Format::default().json().flatten_event(true).with_current_span(false).with_span_list(false))
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> FormatEvent<S, DefaultFields> for TextLines {
    fn format_event(
        &self,
        context: &FmtContext<'_, S, DefaultFields>,
        mut to: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let Some(span) = span::current() else {
            return self.0.format_event(context, to, event);
        };
        let line = line(&self.0, context, event)?;
        writeln!(to, "{} trace_id={} span_id={}", line.trim_end(), span.trace_id(), span.span_id())
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> FormatEvent<S, JsonFields> for JsonLines {
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut to: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let Some(span) = span::current() else {
            return self.0.format_event(context, to, event);
        };
        let line = line(&self.0, context, event)?;
        let object = line.trim_end().strip_suffix('}').ok_or(fmt::Error)?;
        writeln!(to, r#"{object},"trace_id":"{}","span_id":"{}"}}"#, span.trace_id(), span.span_id())
    }
}

fn line<S, N, F>(format: &F, context: &FmtContext<'_, S, N>, event: &Event<'_>) -> Result<String, fmt::Error>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    let mut line = String::new();
    format.format_event(context, Writer::new(&mut line), event)?;
    Ok(line)
}
