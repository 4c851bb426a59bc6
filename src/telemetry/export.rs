//! Sends finished spans to the collector, from the batch processor's own thread.
//!
//! The OTLP clients need a tokio reactor; the exporter brings its own and runs it only while it exports, so the
//! process's runtime neither waits for the collector nor is needed for the last flush. A collector that is away costs
//! the spans of its absence and nothing else: the queue before this is bounded and drops, one export is bounded in time,
//! and only the change between away and back is logged.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use opentelemetry_otlp::{
    Protocol as OtlpProtocol, SpanExporter as OtlpExporter, WithExportConfig, WithHttpConfig, WithTonicConfig,
    tonic_types::metadata::MetadataMap,
};
use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    trace::{SpanData, SpanExporter},
};
use tokio::runtime::{Builder, Runtime};
use tracing::dispatcher::{self, WeakDispatch};

use super::{
    TelemetryError,
    variables::{Protocol, Traces},
};

/// The subscriber to log to, which exists only after the exporter.
pub(super) type LateDispatch = Arc<OnceLock<WeakDispatch>>;

/// An OTLP exporter with a reactor of its own.
pub(super) struct Exporter {
    otlp: OtlpExporter,
    /// `None` only while dropping.
    runtime: Option<Runtime>,
    endpoint: String,
    timeout: Duration,
    away: AtomicBool,
    log: LateDispatch,
}

impl Exporter {
    pub(super) fn new(traces: &Traces, log: LateDispatch) -> Result<Self, TelemetryError> {
        let runtime = Builder::new_current_thread().enable_all().build().map_err(TelemetryError::Runtime)?;
        // The gRPC client starts its worker when it is built.
        let entered = runtime.enter();
        let otlp = match traces.protocol {
            Protocol::Grpc => OtlpExporter::builder()
                .with_tonic()
                .with_endpoint(&traces.endpoint)
                .with_timeout(traces.timeout)
                .with_metadata(MetadataMap::from_headers(traces.headers.clone()))
                .build(),
            Protocol::HttpProtobuf => {
                let header = |(name, value): (&http::HeaderName, &http::HeaderValue)| {
                    Some((name.to_string(), value.to_str().ok()?.to_owned()))
                };
                OtlpExporter::builder()
                    .with_http()
                    .with_protocol(OtlpProtocol::HttpBinary)
                    .with_endpoint(&traces.endpoint)
                    .with_timeout(traces.timeout)
                    .with_headers(traces.headers.iter().filter_map(header).collect())
                    .build()
            }
        };
        drop(entered);
        Ok(Self {
            otlp: otlp?,
            runtime: Some(runtime),
            endpoint: traces.endpoint.clone(),
            timeout: traces.timeout,
            away: AtomicBool::new(false),
            log,
        })
    }

    fn send(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let runtime = self.runtime.as_ref().expect("present until dropped");
        // The clients bound a request but not the time to connect.
        let export = async { tokio::time::timeout(self.timeout, self.otlp.export(batch)).await };
        runtime.block_on(export).unwrap_or(Err(OTelSdkError::Timeout(self.timeout)))
    }

    fn log_change(&self, result: &OTelSdkResult) {
        if self.away.swap(result.is_err(), Ordering::Relaxed) == result.is_err() {
            return;
        }
        let Some(dispatch) = self.log.get().and_then(WeakDispatch::upgrade) else {
            return;
        };
        let endpoint = self.endpoint.as_str();
        dispatcher::with_default(&dispatch, || match result {
            Ok(()) => tracing::info!(endpoint, "traces are being sent again"),
            Err(error) => tracing::warn!(endpoint, %error, "traces cannot be sent and are dropped until they can"),
        });
    }
}

impl SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.send(batch);
        self.log_change(&result);
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.otlp.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.otlp.set_resource(resource);
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        // Never waits, not even for a name lookup that hangs.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exporter").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}
