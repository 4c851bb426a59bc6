//! Spans of remote calls, and the W3C Trace Context that ties them to others.
//!
//! Names and attributes follow OpenTelemetry's semantic conventions for gRPC. While traces are off these functions do
//! nothing and allocate nothing. What a caller sends is checked before use: a `traceparent` that is not exactly in the
//! form of the standard starts a new trace, and nothing else of the request goes into a span.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    Context,
    trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState},
};
use tracing::{Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The longest `tracestate` that is passed on; W3C Trace Context section 3.3.1.5 asks for at least this much.
const MAX_TRACESTATE_BYTES: usize = 512;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// gRPC status codes in the order of their numbers, and whether the server is at fault, by the semantic conventions.
const CODES: [(&str, bool); 17] = [
    ("OK", false),
    ("CANCELLED", false),
    ("UNKNOWN", true),
    ("INVALID_ARGUMENT", false),
    ("DEADLINE_EXCEEDED", true),
    ("NOT_FOUND", false),
    ("ALREADY_EXISTS", false),
    ("PERMISSION_DENIED", false),
    ("RESOURCE_EXHAUSTED", false),
    ("FAILED_PRECONDITION", false),
    ("ABORTED", false),
    ("OUT_OF_RANGE", false),
    ("UNIMPLEMENTED", true),
    ("INTERNAL", true),
    ("UNAVAILABLE", true),
    ("DATA_LOSS", true),
    ("UNAUTHENTICATED", false),
];

/// The span of a call that has come in: `headers` may name the caller's span. `path` is that of a method which is served,
/// or what the conventions say for every other, `_OTHER`; a path that a caller made up must not get here.
pub fn rpc_span(headers: &HeaderMap, path: &str) -> Span {
    let method = method(path);
    let span = tracing::debug_span!(
        parent: None,
        "rpc",
        otel.name = method,
        otel.kind = "server",
        otel.status_code = Empty,
        rpc.system.name = "grpc",
        rpc.method = method,
        rpc.response.status_code = Empty,
        "error.type" = Empty,
        csrd.reason = Empty,
    );
    if !span.is_disabled()
        && let Some(caller) = remote_parent(headers)
    {
        // Fails when the span is only logged and not sent, and then there is nothing to tie together.
        let _ = span.set_parent(Context::new().with_remote_span_context(caller));
    }
    span
}

/// The span of a call that goes out to `path`, within the current span; see [`inject`].
pub fn call_span(path: &str) -> Span {
    let method = method(path);
    tracing::debug_span!(
        "call",
        otel.name = method,
        otel.kind = "client",
        otel.status_code = Empty,
        rpc.system.name = "grpc",
        rpc.method = method,
        rpc.response.status_code = Empty,
        "error.type" = Empty,
        csrd.reason = Empty,
    )
}

/// The span of a renewal: a trace of its own, linked to the issuance that began the credential.
pub fn renew_span(began: Option<&SpanContext>) -> Span {
    let span = tracing::debug_span!(parent: None, "renew", csrd.reason = Empty);
    if let Some(began) = began {
        link(&span, began);
    }
    span
}

/// The span of a certificate's way to one subscriber, within the trace of its issuance, which may have ended.
pub fn deliver_span(issuance: Option<&SpanContext>) -> Span {
    let span = tracing::debug_span!(parent: None, "deliver", csrd.reason = Empty);
    if let Some(issuance) = issuance
        && !span.is_disabled()
    {
        // Fails only for a span that is disabled.
        let _ = span.set_parent(Context::new().with_remote_span_context(issuance.clone()));
    }
    span
}

/// The span of a controller's verdict, within the trace of the issuance that its request names as `traceparent`.
pub fn verdict_span(traceparent: Option<&str>) -> Span {
    let span = tracing::debug_span!(parent: None, "verdict", csrd.reason = Empty);
    if !span.is_disabled()
        && let Some(issuance) = traceparent.and_then(|text| parse_traceparent(text, TraceState::default()))
    {
        // Fails only for a span that is disabled.
        let _ = span.set_parent(Context::new().with_remote_span_context(issuance));
    }
    span
}

/// Records how the call of a [`rpc_span`] or [`call_span`] ended: its gRPC status code, and our own reason if it failed.
pub fn record_status(span: &Span, code: i32, reason: &'static str) {
    if span.is_disabled() {
        return;
    }
    let (name, servers_fault) = usize::try_from(code).ok().and_then(|code| CODES.get(code)).unwrap_or(&CODES[2]);
    span.record("rpc.response.status_code", name);
    if *servers_fault {
        span.record("error.type", name);
        span.record("otel.status_code", "ERROR");
    }
    if !reason.is_empty() {
        span.record("csrd.reason", reason);
    }
}

/// Ties `span` to another trace's span.
pub fn link(span: &Span, other: &SpanContext) {
    if !span.is_disabled() {
        span.add_link(other.clone());
    }
}

/// The current span as others may refer to it; `None` while traces are off and outside of any span.
pub fn current() -> Option<SpanContext> {
    Context::map_current(|context| context.has_active_span().then(|| context.span().span_context().clone()))
        .filter(SpanContext::is_valid)
}

/// The current span in the form of the `traceparent` header.
pub fn traceparent() -> Option<String> {
    current().map(|span| format_traceparent(&span))
}

/// Names the current span in the headers of a call that goes out.
pub fn inject(headers: &mut HeaderMap) {
    let Some(span) = current() else {
        return;
    };
    if let Ok(value) = HeaderValue::try_from(format_traceparent(&span)) {
        headers.insert(TRACEPARENT, value);
    }
    match HeaderValue::try_from(span.trace_state().header()) {
        Ok(value) if !value.is_empty() => headers.insert(TRACESTATE, value),
        _ => headers.remove(TRACESTATE),
    };
}

/// The full method name: the path without its first slash.
fn method(path: &str) -> &str {
    path.strip_prefix('/').unwrap_or(path)
}

/// The span named by the caller, if it is named once and as W3C Trace Context section 3.2 says.
fn remote_parent(headers: &HeaderMap) -> Option<SpanContext> {
    let mut parents = headers.get_all(TRACEPARENT).iter();
    let (parent, None) = (parents.next()?, parents.next()) else {
        return None;
    };
    let state = headers.get(TRACESTATE).filter(|state| state.len() <= MAX_TRACESTATE_BYTES);
    let state = state.and_then(|state| state.to_str().ok()?.parse().ok());
    parse_traceparent(parent.to_str().ok()?, state.unwrap_or_default())
}

/// `version "-" trace-id "-" parent-id "-" trace-flags`, all in lower-case hexadecimal. A version after 00 may add
/// fields, which are ignored; version ff and all-zero ids are invalid.
fn parse_traceparent(text: &str, state: TraceState) -> Option<SpanContext> {
    fn hex(text: &str, digits: usize) -> Option<&str> {
        let valid = text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        valid.then_some(text)
    }
    let mut fields = text.split('-');
    let version = hex(fields.next()?, 2)?;
    let trace = TraceId::from_hex(hex(fields.next()?, 32)?).ok()?;
    let span = SpanId::from_hex(hex(fields.next()?, 16)?).ok()?;
    let flags = u8::from_str_radix(hex(fields.next()?, 2)?, 16).ok()?;
    if version == "ff" || (version == "00" && fields.next().is_some()) {
        return None;
    }
    let flags = TraceFlags::new(flags) & TraceFlags::SAMPLED;
    Some(SpanContext::new(trace, span, flags, true, state)).filter(SpanContext::is_valid)
}

fn format_traceparent(span: &SpanContext) -> String {
    format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn headers(list: &[(HeaderName, &str)]) -> HeaderMap {
        list.iter().map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn a_traceparent_is_taken_only_in_its_exact_form() {
        let parse = |text: &str| parse_traceparent(text, TraceState::default());
        let valid = parse(PARENT).unwrap();
        assert_eq!(format_traceparent(&valid), PARENT);
        assert!(valid.is_remote() && valid.is_sampled());
        assert!(!parse(&PARENT.replace("-01", "-00")).unwrap().is_sampled());
        assert_eq!(format_traceparent(&parse(&PARENT.replace("-01", "-ff")).unwrap()), PARENT, "unknown flags");
        assert!(parse("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-the-future-brings").is_some());
        for hostile in [
            "",
            "00",
            "---",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-00",
            "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-+7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "0-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0x",
            " 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert!(parse(hostile).is_none(), "{hostile:?}");
        }
    }

    #[test]
    fn a_caller_names_one_span_and_a_bounded_state() {
        assert!(remote_parent(&HeaderMap::new()).is_none());
        let state = |text: &str| {
            let headers = headers(&[(TRACEPARENT, PARENT), (TRACESTATE, text)]);
            remote_parent(&headers).expect("the state never spoils the parent").trace_state().header()
        };
        assert_eq!(state("a=1,b=2"), "a=1,b=2");
        assert_eq!(state("no pair"), "");
        // Keys and values have bounds of their own, so the length is made up of two members.
        let long = |length: usize| format!("a={},b={}", "x".repeat(250), "x".repeat(length - 255));
        assert_eq!(state(&long(MAX_TRACESTATE_BYTES - 5)).len(), MAX_TRACESTATE_BYTES - 5);
        assert_eq!(state(&long(MAX_TRACESTATE_BYTES + 1)), "");

        let mut twice = headers(&[(TRACEPARENT, PARENT)]);
        twice.append(TRACEPARENT, HeaderValue::from_static(PARENT));
        assert!(remote_parent(&twice).is_none());
        let not_text = HeaderMap::from_iter([(TRACEPARENT, HeaderValue::from_bytes(b"\xff").unwrap())]);
        assert!(remote_parent(&not_text).is_none());
    }

    #[test]
    fn a_method_is_the_path_without_its_slash() {
        assert_eq!(method("/csrd.v1.CertificateService/WhoAmI"), "csrd.v1.CertificateService/WhoAmI");
        assert_eq!(method("_OTHER"), "_OTHER");
    }

    #[test]
    fn without_traces_nothing_is_recorded_named_or_injected() {
        tracing::subscriber::with_default(tracing::subscriber::NoSubscriber::new(), || {
            let span = rpc_span(&headers(&[(TRACEPARENT, PARENT)]), "/a/b");
            assert!(span.is_disabled());
            record_status(&span, 0, "");
            let _entered = span.entered();
            assert!(call_span("/a/b").is_disabled() && renew_span(None).is_disabled());
            assert_eq!(current(), None);
            assert_eq!(traceparent(), None);
            let mut headers = HeaderMap::new();
            inject(&mut headers);
            assert!(headers.is_empty());
        });
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_taken_without_loss(text in "[0-9a-f]{0,3}(-[0-9a-fA-F+]{0,33}){0,5}") {
            if let Some(span) = parse_traceparent(&text, TraceState::default()) {
                prop_assert_eq!(&format_traceparent(&span)[2..53], &text[2..53]);
            }
        }
    }
}
