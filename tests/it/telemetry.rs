//! Traces as a collector receives them, over gRPC and over HTTP, and logs as an operator reads them.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails the test")]
#![allow(clippy::disallowed_methods, reason = "a test's collector is owned by the test's runtime")]

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use csrd::{
    telemetry::{self, Log, LogFormat, MAX_FIELD_BYTES, MAX_LINE_BYTES, Telemetry, Variables},
    text::is_shown,
};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind, status::StatusCode as SpanStatus},
};
use prost::Message as _;
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::mpsc,
    time::timeout,
};
use tokio_stream::wrappers::TcpListenerStream;
use tracing::{Dispatch, debug_span, dispatcher::with_default};
use tracing_subscriber::fmt::MakeWriter;

/// Long enough for a loaded machine; a test that passes never waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

const METHOD: &str = "csrd.v1.CertificateService/IssueCertificate";
const CALLERS_TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLERS_SPAN: &str = "b7ad6b7169203331";
/// Sent by the caller in a header, to be found nowhere else.
const TOKEN: &str = "eyJ0b2tlbg";

type Export = (HeaderMap, ExportTraceServiceRequest);

/// An OTLP receiver on a port of its own.
pub(crate) struct Collector {
    pub(crate) address: SocketAddr,
    exports: mpsc::UnboundedReceiver<Export>,
}

impl Collector {
    pub(crate) async fn grpc() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (received, exports) = mpsc::unbounded_channel();
        let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(Receiver(received)));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { address, exports }
    }

    pub(crate) async fn http(status: StatusCode) -> Self {
        Self::http_on(TcpListener::bind("127.0.0.1:0").await.unwrap(), status)
    }

    /// Answers every export with `status`.
    fn http_on(listener: TcpListener, status: StatusCode) -> Self {
        let address = listener.local_addr().unwrap();
        let (received, exports) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let received = received.clone();
                let service = service_fn(move |request: Request<Incoming>| {
                    let received = received.clone();
                    async move {
                        assert_eq!(request.uri().path(), "/v1/traces");
                        let headers = request.headers().clone();
                        let body = request.into_body().collect().await.unwrap().to_bytes();
                        let export = ExportTraceServiceRequest::decode(body).unwrap();
                        received.send((headers, export)).unwrap();
                        Response::builder().status(status).body(Full::<bytes::Bytes>::default())
                    }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Self { address, exports }
    }

    async fn export(&mut self) -> Export {
        timeout(PATIENCE, self.exports.recv()).await.expect("an export").expect("a collector")
    }

    /// Waits until as many spans have come, whatever their batches.
    async fn spans(&mut self, count: usize) -> Received {
        self.until(|received| received.spans.len() >= count).await
    }

    /// Waits until what has come is enough.
    pub(crate) async fn until(&mut self, enough: impl Fn(&Received) -> bool) -> Received {
        self.gather(enough).await.unwrap_or_else(|received| panic!("not enough in {:#?}", received.all))
    }

    /// What has come once it is enough, or when it never is.
    pub(crate) async fn gather(&mut self, enough: impl Fn(&Received) -> bool) -> Result<Received, Received> {
        let mut received = Received::default();
        let collected = async {
            while !enough(&received) {
                let (headers, export) = self.exports.recv().await.expect("a collector");
                received.add(headers, export);
            }
        };
        match timeout(PATIENCE, collected).await {
            Ok(()) => Ok(received),
            Err(_) => Err(received),
        }
    }
}

struct Receiver(mpsc::UnboundedSender<Export>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let headers = request.metadata().clone().into_headers();
        self.0.send((headers, request.into_inner())).unwrap();
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

#[derive(Default)]
pub(crate) struct Received {
    headers: HeaderMap,
    resource: HashMap<String, String>,
    /// By name; of several with one name, the last.
    spans: HashMap<String, Span>,
    pub(crate) all: Vec<Span>,
    /// By the ids of their spans.
    services: HashMap<Vec<u8>, String>,
    pub(crate) bytes: Vec<u8>,
}

impl Received {
    /// The service that sent it.
    pub(crate) fn service(&self, span: &Span) -> &str {
        &self.services[&span.span_id]
    }

    fn add(&mut self, headers: HeaderMap, export: ExportTraceServiceRequest) {
        self.bytes.extend(export.encode_to_vec());
        self.headers = headers;
        for resource in export.resource_spans {
            self.resource = attributes(&resource.resource.unwrap().attributes);
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                let service = self.resource.get("service.name").cloned().unwrap_or_default();
                self.services.insert(span.span_id.clone(), service);
                self.all.push(span);
            }
        }
        self.spans = self.all.iter().map(|span| (span.name.clone(), span.clone())).collect();
    }
}

fn attributes(list: &[KeyValue]) -> HashMap<String, String> {
    let text = |pair: &KeyValue| match pair.value.as_ref().unwrap().value.as_ref().unwrap() {
        Value::StringValue(text) => text.clone(),
        other => format!("{other:?}"),
    };
    list.iter().map(|pair| (pair.key.clone(), text(pair))).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Where the log lines of a test go.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    async fn wait_for(&self, words: &str) {
        let seen = async {
            while !self.text().contains(words) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, seen).await.unwrap_or_else(|_| panic!("{words:?} is not in {:?}", self.text()));
    }
}

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

fn telemetry(format: LogFormat, variables: &[(&str, &str)]) -> (Dispatch, Telemetry, Lines) {
    let lines = Lines::default();
    let log = Log { format, filter: "info".to_owned(), ansi: false };
    let variables: Variables = variables.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    let (dispatch, telemetry) = Telemetry::new(&log, &variables, lines.clone()).unwrap();
    (dispatch, telemetry, lines)
}

/// Sends to `address` soon after each span.
fn sending_to(address: SocketAddr, protocol: &str, more: &[(&str, &str)]) -> (Dispatch, Telemetry, Lines) {
    let endpoint = format!("http://{address}");
    let mut variables = vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
        ("OTEL_BSP_SCHEDULE_DELAY", "10"),
    ];
    variables.extend(more);
    telemetry(LogFormat::Text, &variables)
}

/// Waits at most as long as a test is patient; blocks nothing.
async fn shut_down(telemetry: Telemetry) {
    timeout(PATIENCE, tokio::task::spawn_blocking(|| telemetry.shutdown())).await.expect("a bounded end").unwrap();
}

fn request_headers() -> HeaderMap {
    let traceparent = format!("00-{CALLERS_TRACE}-{CALLERS_SPAN}-01");
    let mut headers = HeaderMap::new();
    headers.insert("traceparent", HeaderValue::try_from(traceparent).unwrap());
    headers.insert("tracestate", HeaderValue::from_static("vendor=1"));
    headers.insert("authorization", HeaderValue::try_from(format!("Bearer {TOKEN}")).unwrap());
    headers
}

/// An issuance as the server and the engines record it, and a renewal; returns the issuance's traceparent.
fn issue_and_renew() -> String {
    let rpc = telemetry::rpc_span(&request_headers(), &format!("/{METHOD}"));
    let (issuance, traceparent) = rpc.in_scope(|| {
        for stage in ["attest", "decide", "key", "sign", "verify", "deliver"] {
            let span = match stage {
                "attest" => debug_span!(target: "csrd::attest", "attest"),
                "decide" => debug_span!(target: "csrd::policy", "decide"),
                "key" => debug_span!(target: "csrd", "key"),
                "sign" => debug_span!(target: "csrd::signer", "sign", signer = "embedded"),
                "verify" => debug_span!(target: "csrd::issue", "verify"),
                _ => debug_span!(target: "csrd::hub", "deliver"),
            };
            span.in_scope(|| debug_span!(target: "hyper", "not ours").in_scope(|| {}));
        }
        (telemetry::current().unwrap(), telemetry::traceparent().unwrap())
    });
    telemetry::record_status(&rpc, tonic::Code::Ok.into(), "");
    drop(rpc);
    telemetry::renew_span(Some(&issuance)).in_scope(|| debug_span!(target: "csrd::signer", "resign").in_scope(|| {}));
    traceparent
}

async fn check_a_trace(mut collector: Collector, protocol: &str) {
    let more = [
        ("OTEL_SERVICE_NAME", "certificates"),
        ("OTEL_RESOURCE_ATTRIBUTES", "host.name=node-1"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=seven"),
    ];
    let (dispatch, telemetry, lines) = sending_to(collector.address, protocol, &more);
    let traceparent = with_default(&dispatch, issue_and_renew);
    let received = collector.spans(9).await;
    shut_down(telemetry).await;

    assert_eq!(received.headers["x-tenant"], "seven");
    assert_eq!(received.resource["service.name"], "certificates");
    assert_eq!(received.resource["service.version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(received.resource["host.name"], "node-1");

    let rpc = &received.spans[METHOD];
    assert_eq!((hex(&rpc.trace_id), hex(&rpc.parent_span_id)), (CALLERS_TRACE.into(), CALLERS_SPAN.into()));
    assert_eq!(rpc.trace_state, "vendor=1");
    assert_eq!(rpc.kind(), SpanKind::Server);
    let expected = [("rpc.method", METHOD), ("rpc.response.status_code", "OK"), ("rpc.system.name", "grpc")];
    assert_eq!(attributes(&rpc.attributes), expected.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    assert_eq!(traceparent, format!("00-{CALLERS_TRACE}-{}-01", hex(&rpc.span_id)));
    for stage in ["attest", "decide", "key", "sign", "verify", "deliver"] {
        let span = &received.spans[stage];
        assert_eq!((&span.trace_id, &span.parent_span_id), (&rpc.trace_id, &rpc.span_id), "{stage}");
    }

    let renew = &received.spans["renew"];
    assert_ne!(renew.trace_id, rpc.trace_id, "a renewal is a trace of its own");
    assert!(renew.parent_span_id.is_empty());
    let links: Vec<_> = renew.links.iter().map(|link| (&link.trace_id, &link.span_id)).collect();
    assert_eq!(links, [(&rpc.trace_id, &rpc.span_id)]);
    assert_eq!(received.spans["resign"].parent_span_id, renew.span_id);

    assert!(!String::from_utf8_lossy(&received.bytes).contains(TOKEN), "a header's secret went into a span");
    assert_eq!(lines.text(), "", "nothing to say when all is well");
}

#[tokio::test]
async fn the_spans_of_a_call_are_one_trace_under_its_caller_and_a_renewals_are_linked_to_it_over_grpc() {
    check_a_trace(Collector::grpc().await, "grpc").await;
}

#[tokio::test]
async fn the_spans_of_a_call_are_one_trace_under_its_caller_and_a_renewals_are_linked_to_it_over_http() {
    check_a_trace(Collector::http(StatusCode::OK).await, "http/protobuf").await;
}

#[tokio::test]
async fn a_failed_call_says_its_code_and_our_reason_and_whether_the_server_is_at_fault() {
    let mut collector = Collector::grpc().await;
    let (dispatch, telemetry, _) = sending_to(collector.address, "grpc", &[]);
    let mut check = async |code: tonic::Code, reason: &'static str, name: &str, servers_fault: bool| {
        with_default(&dispatch, || {
            telemetry::record_status(&telemetry::rpc_span(&HeaderMap::new(), "/a.B/C"), code.into(), reason);
        });
        let span = collector.spans(1).await.spans.remove("a.B/C").unwrap();
        assert!(span.parent_span_id.is_empty());
        let attributes = attributes(&span.attributes);
        assert_eq!(attributes["rpc.response.status_code"], name);
        assert_eq!(attributes["csrd.reason"], reason);
        assert_eq!(attributes.get("error.type").map(String::as_str), servers_fault.then_some(name));
        let status = span.status.map_or(SpanStatus::Unset, |status| status.code());
        assert_eq!(status == SpanStatus::Error, servers_fault, "{name}");
    };
    check(tonic::Code::PermissionDenied, "NO_POLICY", "PERMISSION_DENIED", false).await;
    check(tonic::Code::Unavailable, "STOPPING", "UNAVAILABLE", true).await;
    check(tonic::Code::Unauthenticated, "PEER_GONE", "UNAUTHENTICATED", false).await;
    shut_down(telemetry).await;
}

#[tokio::test]
async fn a_call_that_goes_out_carries_its_span() {
    let mut collector = Collector::grpc().await;
    let (dispatch, telemetry, _) = sending_to(collector.address, "grpc", &[]);
    let mut headers = HeaderMap::new();
    with_default(&dispatch, || telemetry::call_span("/a.B/C").in_scope(|| telemetry::inject(&mut headers)));
    let span = collector.spans(1).await.spans.remove("a.B/C").unwrap();
    assert_eq!(span.kind(), SpanKind::Client);
    assert_eq!(headers["traceparent"], format!("00-{}-{}-01", hex(&span.trace_id), hex(&span.span_id)));
    assert!(!headers.contains_key("tracestate"));
    shut_down(telemetry).await;
}

#[tokio::test]
async fn a_caller_that_is_not_sampled_is_not_sent_but_still_passed_on() {
    let mut collector = Collector::grpc().await;
    let (dispatch, telemetry, _) = sending_to(collector.address, "grpc", &[]);
    let mut headers = request_headers();
    let unsampled = format!("00-{CALLERS_TRACE}-{CALLERS_SPAN}-00");
    headers.insert("traceparent", HeaderValue::try_from(unsampled).unwrap());
    let traceparent = with_default(&dispatch, || {
        let passed_on = telemetry::rpc_span(&headers, "/a.B/Unsampled").in_scope(telemetry::traceparent);
        telemetry::rpc_span(&HeaderMap::new(), "/a.B/Sampled").in_scope(|| {});
        passed_on.unwrap()
    });
    assert!(traceparent.starts_with(&format!("00-{CALLERS_TRACE}-")) && traceparent.ends_with("-00"), "{traceparent}");
    assert_eq!(collector.spans(1).await.spans.into_keys().collect::<Vec<_>>(), ["a.B/Sampled"]);
    shut_down(telemetry).await;
}

#[tokio::test]
async fn an_absent_collector_is_logged_once_and_its_return_once() {
    for protocol in ["http/protobuf", "grpc"] {
        // Nobody else gets the port, and until it listens it refuses.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
        let (dispatch, telemetry, lines) = sending_to(socket.local_addr().unwrap(), protocol, &[]);
        let span = || with_default(&dispatch, || debug_span!(target: "csrd", "lost").in_scope(|| {}));
        span();
        lines.wait_for("traces cannot be sent").await;

        let mut collector = Collector::http_on(socket.listen(8).unwrap(), StatusCode::OK);
        if protocol == "http/protobuf" {
            span();
            collector.spans(1).await;
            lines.wait_for("traces are being sent again").await;
            assert_eq!(lines.text().lines().count(), 2, "{}", lines.text());
        }
        shut_down(telemetry).await;
        assert_eq!(lines.text().matches("cannot be sent").count(), 1, "{}", lines.text());
    }
}

#[tokio::test]
async fn a_collector_that_refuses_every_export_is_logged_once() {
    let mut collector = Collector::http(StatusCode::BAD_REQUEST).await;
    let (dispatch, telemetry, lines) = sending_to(collector.address, "http/protobuf", &[]);
    for _ in 0..3 {
        with_default(&dispatch, || debug_span!(target: "csrd", "refused").in_scope(|| {}));
        collector.export().await;
    }
    shut_down(telemetry).await;
    assert_eq!(lines.text().lines().count(), 1, "{}", lines.text());
    assert!(lines.text().contains("WARN") && lines.text().contains("traces cannot be sent"), "{}", lines.text());
}

#[tokio::test]
async fn a_collector_that_never_answers_delays_neither_spans_nor_the_end() {
    for protocol in ["http/protobuf", "grpc"] {
        // Connections are made by the kernel and never accepted.
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let more = [
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "50"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "4"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2"),
        ];
        let (dispatch, telemetry, lines) = sending_to(silent.local_addr().unwrap(), protocol, &more);
        with_default(&dispatch, || {
            for _ in 0..10_000 {
                debug_span!(target: "csrd", "dropped").in_scope(|| {});
            }
        });
        shut_down(telemetry).await;
        assert_eq!(lines.text().lines().count(), 1, "{}", lines.text());
    }
}

#[tokio::test]
async fn the_last_spans_are_sent_at_the_end() {
    let mut collector = Collector::grpc().await;
    let (dispatch, telemetry, _) = sending_to(collector.address, "grpc", &[("OTEL_BSP_SCHEDULE_DELAY", "3600000")]);
    with_default(&dispatch, || debug_span!(target: "csrd", "last").in_scope(|| {}));
    shut_down(telemetry).await;
    assert!(collector.spans(1).await.spans.contains_key("last"));
}

#[tokio::test]
async fn log_lines_name_their_trace_and_only_within_one() {
    let collector = Collector::grpc().await;
    let endpoint = format!("http://{}", collector.address);
    let grpc = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
    for format in [LogFormat::Text, LogFormat::Json] {
        let (dispatch, telemetry, lines) = telemetry(format, &[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint), grpc]);
        let traceparent = with_default(&dispatch, || {
            tracing::info!(policy = "web", "outside");
            tracing::debug!("too much detail");
            telemetry::rpc_span(&request_headers(), &format!("/{METHOD}")).in_scope(|| {
                tracing::warn!(policy = "web", "inside");
                telemetry::traceparent().unwrap()
            })
        });
        let span = traceparent.split('-').nth(2).unwrap();
        let text = lines.text();
        let [outside, inside] = text.lines().collect::<Vec<_>>().try_into().unwrap_or_else(|_| panic!("{text}"));
        match format {
            LogFormat::Text => {
                assert!(outside.ends_with(r#"INFO it::telemetry: outside policy="web""#), "{outside}");
                let end = format!(r#"WARN it::telemetry: inside policy="web" trace_id={CALLERS_TRACE} span_id={span}"#);
                assert!(inside.ends_with(&end), "{inside}");
            }
            LogFormat::Json => {
                let object = |line| serde_json::from_str::<serde_json::Value>(line).unwrap();
                assert_eq!(object(outside)["message"], "outside");
                assert_eq!(object(outside).get("trace_id"), None);
                let inside = object(inside);
                let fields = ["level", "message", "policy", "trace_id", "span_id"].map(|name| inside[name].clone());
                assert_eq!(fields, ["WARN", "inside", "web", CALLERS_TRACE, span]);
            }
        }
        shut_down(telemetry).await;
    }
}

/// What a caller can put into a path: the end of a line and the begin of another, a field, and what steers a terminal.
const EVIL: &str = "/tmp/a b reason=NONE \" x=\"\r\n2026-11-29T00:00:00Z  INFO csrd: certificate issued\x1b[2J\u{9b}1m\u{202e}\u{2028}\u{200b}\u{7f}";

#[derive(Debug, thiserror::Error)]
#[error("{EVIL}")]
struct Evil;

/// Lines of events with [`EVIL`] in every kind of field, within a span that has it too.
fn evil_lines(format: LogFormat, ansi: bool) -> String {
    let lines = Lines::default();
    let log = Log { format, filter: "debug".to_owned(), ansi };
    let (dispatch, _) = Telemetry::new(&log, &[].into_iter().collect(), lines.clone()).unwrap();
    with_default(&dispatch, || {
        debug_span!("span", evil = EVIL, number = 7).in_scope(|| {
            tracing::info!(text = EVIL, shown = %EVIL, debug = ?EVIL, failed = &Evil as &dyn std::error::Error, last = 1, "{EVIL}");
            tracing::info!(number = 1, yes = true, word = %"one", words = %"two words", "plain words");
        });
    });
    lines.text()
}

#[test]
fn no_value_begins_a_line_ends_a_field_or_steers_a_terminal() {
    let text = evil_lines(LogFormat::Text, false);
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(!text.contains(|c: char| c != '\n' && !is_shown(c)), "{text:?}");
    let escaped = r#"/tmp/a b reason=NONE \" x=\"\r\n2026-11-29T00:00:00Z  INFO csrd: certificate issued\u{1b}[2J\u{9b}1m\u{202e}\u{2028}\u{200b}\u{7f}"#;
    let [evil, plain] = text.lines().collect::<Vec<_>>().try_into().unwrap();
    let fields =
        format!(r#""{escaped}" text="{escaped}" shown="{escaped}" debug="{escaped}" failed="{escaped}" last=1"#);
    assert!(evil.ends_with(&format!(r#" INFO span{{evil="{escaped}" number=7}}: it::telemetry: {fields}"#)), "{evil}");
    assert!(plain.ends_with(r#": it::telemetry: plain words number=1 yes=true word=one words="two words""#), "{plain}");

    let json = evil_lines(LogFormat::Json, false);
    assert!(!json.contains(|c: char| c != '\n' && !is_shown(c)), "{json:?}");
    let objects = json.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let [evil, plain] = objects.collect::<Vec<_>>().try_into().unwrap();
    for name in ["message", "text", "shown", "failed"] {
        assert_eq!(evil[name], EVIL, "{name}");
    }
    assert_eq!([&evil["last"], &plain["number"], &plain["yes"]], [&json!(1), &json!(1), &json!(true)]);
    assert_eq!([&plain["level"], &plain["target"], &plain["words"]], ["INFO", "it::telemetry", "two words"]);
    assert!(plain["timestamp"].as_str().unwrap().ends_with('Z'), "{plain}");

    // On a terminal, the only codes are those of colours that are ours.
    let coloured = evil_lines(LogFormat::Text, true);
    assert!(coloured.contains("\x1b[3mtext\x1b[0m\x1b[2m=\x1b[0m\"/tmp"), "{coloured:?}");
    let codes = coloured.split('\x1b').skip(1).map(|rest| rest.split_inclusive('m').next().unwrap());
    let ours = |code: &str| code.len() <= 4 && code.starts_with('[') && code.ends_with('m');
    assert!(codes.clone().all(ours), "{:?}", codes.collect::<Vec<_>>());
}

#[test]
fn a_long_value_is_cut_and_hides_no_other() {
    for format in [LogFormat::Text, LogFormat::Json] {
        let (dispatch, _, lines) = telemetry(format, &[]);
        with_default(&dispatch, || {
            for bytes in [MAX_FIELD_BYTES - 2, MAX_FIELD_BYTES - 1] {
                let long = "x".repeat(bytes);
                tracing::info!(a = long, b = %long, c = %long, d = ?long, e = long, reason = "R", "{long}{long}");
            }
            let long = "x".repeat(MAX_FIELD_BYTES);
            tracing::info!(
                a = long,
                b = long,
                c = long,
                d = long,
                e = long,
                f = long,
                g = long,
                h = long,
                i = long,
                "m"
            );
        });
        let text = lines.text();
        let [fits, cut, full] = text.lines().collect::<Vec<_>>().try_into().unwrap();
        let long = |bytes| format!("\"{}\"", "x".repeat(bytes));
        assert!(fits.contains(&long(MAX_FIELD_BYTES - 2)) && !cut.contains(&long(MAX_FIELD_BYTES - 1)));
        assert_eq!(
            [fits, cut].map(|line| line.matches('…').count()),
            if format == LogFormat::Text { [1, 4] } else { [2, 6] }
        );
        assert!([fits, cut].iter().all(|line| line.contains(r#"reason="R""#) || line.contains(r#""reason":"R""#)));
        assert!(
            full.len() < MAX_LINE_BYTES + 256 && full.len() > MAX_LINE_BYTES - MAX_FIELD_BYTES - 64,
            "{}",
            full.len()
        );
        assert!(!full.contains(r"i="), "{full}");
        match format {
            LogFormat::Text => assert!(full.ends_with(" …"), "{full}"),
            LogFormat::Json => assert_eq!(serde_json::from_str::<serde_json::Value>(full).unwrap()["…"], true),
        }
    }
}

#[tokio::test]
async fn without_an_endpoint_there_are_logs_and_no_spans() {
    let (dispatch, telemetry, lines) = telemetry(LogFormat::Text, &[("OTEL_SERVICE_NAME", "certificates")]);
    with_default(&dispatch, || {
        let span = telemetry::rpc_span(&request_headers(), &format!("/{METHOD}"));
        assert!(span.is_disabled());
        span.in_scope(|| tracing::info!("inside"));
        assert_eq!(telemetry::current(), None);
    });
    assert!(lines.text().ends_with("INFO it::telemetry: inside\n"), "{}", lines.text());
    shut_down(telemetry).await;
}

#[test]
fn a_filter_or_a_variable_that_cannot_be_used_is_an_error() {
    let check = |filter: &str, variables: &[(&str, &str)], expected: &str| {
        let log = Log { format: LogFormat::Text, filter: filter.to_owned(), ansi: false };
        let variables = variables.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        let error = Telemetry::new(&log, &variables, io::sink).expect_err("an error");
        assert_eq!(error.to_string(), expected);
    };
    check("csrd=loud", &[], r#"log filter "csrd=loud" is not a list of LEVEL or TARGET=LEVEL"#);
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://collector");
    check("info", &[endpoint], r#"OTEL_EXPORTER_OTLP_ENDPOINT must begin with http://, not "ftp://collector""#);
}
