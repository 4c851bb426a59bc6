//! What operators see beside metrics: log lines, and traces over OTLP.
//!
//! One subscriber serves both. Log lines carry `trace_id` and `span_id` when they belong to a trace. Spans are made at
//! debug level under the target `csrd` and sent only when an `OTEL_*` variable names a collector (see [`Variables`]);
//! otherwise the filter's level disables them before anything is evaluated. Only spans are sent, never log lines, and a
//! span holds names from closed sets and none of a request's content. A collector that is down or slow affects nothing
//! else.
//!
//! | variable | meaning |
//! |---|---|
//! | `OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` | the collector's `http://` URL; traces are off without one |
//! | `OTEL_EXPORTER_OTLP_PROTOCOL`, `…_TRACES_PROTOCOL` | `http/protobuf` (default) or `grpc` |
//! | `OTEL_EXPORTER_OTLP_HEADERS`, `…_TRACES_HEADERS` | headers of each export, `key=value,…` |
//! | `OTEL_EXPORTER_OTLP_TIMEOUT`, `…_TRACES_TIMEOUT` | bound of one export with its retries, in ms (10000) |
//! | `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES` | the resource; the name is `csrd` by default |
//! | `OTEL_TRACES_SAMPLER`, `OTEL_TRACES_SAMPLER_ARG` | `parentbased_always_on` by default |
//! | `OTEL_TRACES_EXPORTER=none`, `OTEL_SDK_DISABLED=true` | switch traces off |
//! | `OTEL_BSP_SCHEDULE_DELAY`, `…_MAX_QUEUE_SIZE`, `…_MAX_EXPORT_BATCH_SIZE` | batches: ms (5000), spans (2048), spans (512) |

mod export;
mod lines;
mod span;
mod variables;
mod writer;

use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::ExporterBuildError;
use opentelemetry_sdk::trace::{BatchSpanProcessor, SdkTracer, SdkTracerProvider};
use serde::Deserialize;
use tracing::{Dispatch, Metadata, Subscriber};
use tracing_subscriber::{
    Layer, Registry,
    filter::{LevelFilter, ParseError, Targets, filter_fn},
    fmt::MakeWriter,
    layer::SubscriberExt,
    registry::LookupSpan,
};

pub use lines::{MAX_FIELD_BYTES, MAX_LINE_BYTES};
pub use span::{
    call_span, current, deliver_span, inject, link, record_status, renew_span, rpc_span, traceparent, verdict_span,
};
pub use variables::Variables;
pub use writer::{LOG_BACKLOG_BYTES_MAX, LOG_FLUSH_TIMEOUT, LogFlush, LogWriter};

use export::{Exporter, LateDispatch};
use lines::{JsonLines, TextFields, TextLines};
use variables::Traces;

/// The longest that [`Telemetry::shutdown`] waits for the collector.
pub const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// Targets that are silent unless the filter names them: what fails there is an error here, which is logged once, with its
/// reason and without the dump of an answer.
const SILENT: &str = "kube_client=off,kube_runtime=off";
/// The target that our spans are made under, as are those of the modules below it.
const TARGET: &str = "csrd";

/// How log lines look and which are written.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Log {
    /// Their form.
    pub format: LogFormat,
    /// `LEVEL` or `TARGET=LEVEL`, comma-separated.
    #[serde(rename = "level")]
    pub filter: String,
    /// Whether text is coloured: not configured, it depends on where the lines go.
    #[serde(skip)]
    pub ansi: bool,
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".to_owned(), ansi: false }
    }
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

/// Why there is no telemetry.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter does not parse.
    #[error("log filter {filter:?} is not a list of LEVEL or TARGET=LEVEL")]
    Filter {
        /// What was given.
        filter: String,
        /// Where it went wrong.
        source: ParseError,
    },
    /// A variable has a value that cannot be used.
    #[error("{name} {problem}, not {value:?}")]
    Variable {
        /// Its name.
        name: String,
        /// Its value.
        value: String,
        /// What it must be.
        problem: &'static str,
    },
    /// A variable is not a list of pairs; its value may hold credentials.
    #[error("{name} must be KEY=VALUE,… with percent-encoded values")]
    List {
        /// Its name.
        name: String,
    },
    /// The exporter's runtime could not be made, for want of descriptors.
    #[error("cannot start the trace exporter's runtime")]
    Runtime(#[source] std::io::Error),
    /// The exporter does not accept what the variables say.
    #[error("cannot make the trace exporter")]
    Exporter(#[from] ExporterBuildError),
}

/// Sends what is left when the process ends.
#[derive(Debug)]
pub struct Telemetry {
    traces: Option<SdkTracerProvider>,
    log: Option<LogFlush>,
}

impl Telemetry {
    /// Makes the subscriber that the process installs, writing log lines to `writer`.
    ///
    /// # Errors
    /// When the filter or a variable cannot be used. A collector that cannot be reached is no error.
    pub fn new<W>(log: &Log, variables: &Variables, writer: W) -> Result<(Dispatch, Self), TelemetryError>
    where
        W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
    {
        let late = LateDispatch::default();
        let traces = match Traces::from_variables(variables)? {
            Some(traces) => Some(provider(traces, late.clone())?),
            None => None,
        };
        let filter = format!("{SILENT},{}", log.filter).parse::<Targets>();
        let filter = filter.map_err(|source| TelemetryError::Filter { filter: log.filter.clone(), source })?;
        // Without spans to send the filter stands before everything, so that what it refuses is never evaluated.
        let dispatch = match &traces {
            Some(provider) => Dispatch::new(
                Registry::default().with(spans(provider.tracer(TARGET))).with(lines(log, writer).with_filter(filter)),
            ),
            None => Dispatch::new(Registry::default().with(filter).with(lines(log, writer))),
        };
        late.set(dispatch.downgrade()).expect("set once");
        Ok((dispatch, Self { traces, log: None }))
    }

    /// Waits for the log's last lines too, however this is dropped.
    pub fn flushing(self, log: LogFlush) -> Self {
        Self { log: Some(log), ..self }
    }

    /// Sends the spans that are left, blocking its thread for at most [`SHUTDOWN_TIMEOUT`], and then writes the lines that
    /// are left; needs no runtime.
    pub fn shutdown(self) {
        if let Some(provider) = self.traces {
            // What cannot be sent has been logged by the exporter.
            let _ = provider.shutdown_with_timeout(SHUTDOWN_TIMEOUT);
        }
        drop(self.log);
    }
}

/// An error and all that is behind it in one line: a refusal without its reason helps nobody. What an error of another
/// crate has said of its cause already is not said again.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.ends_with(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

fn provider(traces: Traces, log: LateDispatch) -> Result<SdkTracerProvider, TelemetryError> {
    let exporter = Exporter::new(&traces, log)?;
    let batches = BatchSpanProcessor::builder(exporter).with_batch_config(traces.batch).build();
    Ok(SdkTracerProvider::builder()
        .with_span_processor(batches)
        .with_sampler(traces.sampler)
        .with_resource(traces.resource)
        .build())
}

fn spans<S: Subscriber + for<'a> LookupSpan<'a>>(tracer: SdkTracer) -> impl Layer<S> {
    tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        .with_filter(filter_fn(is_our_span).with_max_level_hint(LevelFilter::DEBUG))
}

fn lines<S, W>(log: &Log, writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // The layer's own colours too: it gives them to the fields of spans.
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(log.ansi).fmt_fields(TextFields);
    match log.format {
        LogFormat::Text => layer.event_format(TextLines::new(log.ansi)).boxed(),
        LogFormat::Json => layer.event_format(JsonLines).boxed(),
    }
}

fn is_our_span(metadata: &Metadata<'_>) -> bool {
    let ours = metadata.target().strip_prefix(TARGET).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"));
    metadata.is_span() && ours
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Said(&'static str, #[source] Option<Box<Said>>);

    #[test]
    fn each_cause_is_said_once() {
        let chain = |texts: &[&'static str]| {
            let chained = texts.iter().rev().fold(None, |cause, text| Some(Box::new(Said(text, cause))));
            with_causes(&*chained.unwrap())
        };
        assert_eq!(chain(&["a"]), "a");
        assert_eq!(chain(&["cannot read", "no such file"]), "cannot read: no such file");
        assert_eq!(chain(&["cannot read: no such file", "no such file"]), "cannot read: no such file");
        assert_eq!(chain(&["a", "b: c", "c", "d"]), "a: b: c: d");
    }
}
