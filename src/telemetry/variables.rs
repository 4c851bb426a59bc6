//! The standard `OTEL_*` variables that say whether, where and how traces are sent.
//!
//! Read from a map, never from the process, by the rules of the OpenTelemetry specification ("Environment Variable
//! Specification" and "OTLP Exporter"), with three differences. Traces are off until an endpoint is named, so that a
//! host without a collector is not asked to connect to one; a value that cannot be used is an error at start-up and not
//! a warning; and the collector is reached without TLS, which is meant for one on the same host or network.

use std::{collections::BTreeMap, str::FromStr, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use opentelemetry::KeyValue;
use opentelemetry_sdk::{
    Resource,
    resource::TelemetryResourceDetector,
    trace::{BatchConfig, BatchConfigBuilder, Sampler},
};
use percent_encoding::percent_decode_str;

use super::TelemetryError;

/// Variables by name; an empty value counts as unset.
pub type Variables = BTreeMap<String, String>;

/// Time for one export when no variable says otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Where and how traces are sent. Not `Debug`: the headers carry credentials.
pub(super) struct Traces {
    pub(super) protocol: Protocol,
    /// The whole URL.
    pub(super) endpoint: String,
    pub(super) headers: HeaderMap,
    /// Of one export with its retries.
    pub(super) timeout: Duration,
    pub(super) sampler: Sampler,
    pub(super) resource: Resource,
    pub(super) batch: BatchConfig,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Grpc,
    HttpProtobuf,
}

impl Traces {
    /// `None` when traces are off.
    pub(super) fn from_variables(variables: &Variables) -> Result<Option<Self>, TelemetryError> {
        let variables = Reader(variables);
        if variables.text("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        match variables.text("OTEL_TRACES_EXPORTER") {
            None | Some("otlp") => {}
            Some("none") => return Ok(None),
            Some(other) => return Err(invalid("OTEL_TRACES_EXPORTER", other, "must be otlp or none")),
        }
        let protocol = variables.protocol()?;
        let Some(endpoint) = variables.endpoint(protocol)? else {
            return Ok(None);
        };
        Ok(Some(Self {
            protocol,
            endpoint,
            headers: variables.headers()?,
            timeout: variables.timeout()?,
            sampler: variables.sampler()?,
            resource: variables.resource()?,
            batch: variables.batch()?,
        }))
    }
}

struct Reader<'a>(&'a Variables);

impl<'a> Reader<'a> {
    fn text(&self, name: &str) -> Option<&'a str> {
        self.0.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    /// The variable for traces, or else the one for all signals: `OTEL_EXPORTER_OTLP[_TRACES]_{suffix}`.
    fn otlp(&self, suffix: &str) -> Option<(String, &'a str)> {
        ["OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"].into_iter().find_map(|prefix| {
            let name = format!("{prefix}{suffix}");
            self.text(&name).map(|value| (name, value))
        })
    }

    fn positive<T: FromStr + PartialOrd + Default>(&self, name: &str) -> Result<Option<T>, TelemetryError> {
        let Some(text) = self.text(name) else {
            return Ok(None);
        };
        let number = text.parse().ok().filter(|number| *number > T::default());
        number.map(Some).ok_or_else(|| invalid(name, text, "must be a whole number above zero"))
    }

    fn protocol(&self) -> Result<Protocol, TelemetryError> {
        match self.otlp("PROTOCOL") {
            None => Ok(Protocol::HttpProtobuf),
            Some((_, "http/protobuf")) => Ok(Protocol::HttpProtobuf),
            Some((_, "grpc")) => Ok(Protocol::Grpc),
            Some((name, value)) => Err(invalid(&name, value, "must be grpc or http/protobuf")),
        }
    }

    fn endpoint(&self, protocol: Protocol) -> Result<Option<String>, TelemetryError> {
        let Some((name, value)) = self.otlp("ENDPOINT") else {
            return Ok(None);
        };
        let uri: Uri = value.parse().map_err(|_| invalid(&name, value, "must be a URL"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                return Err(invalid(&name, value, "must be http://, TLS to the collector is not built in"));
            }
            _ => return Err(invalid(&name, value, "must begin with http://")),
        }
        // The endpoint for all signals is a base, to which OTLP/HTTP appends a path for each; the one for traces is not.
        let is_base = name == "OTEL_EXPORTER_OTLP_ENDPOINT" && protocol == Protocol::HttpProtobuf;
        Ok(Some(if is_base { format!("{}/v1/traces", value.trim_end_matches('/')) } else { value.to_owned() }))
    }

    fn headers(&self) -> Result<HeaderMap, TelemetryError> {
        let mut headers = HeaderMap::new();
        let Some((name, list)) = self.otlp("HEADERS") else {
            return Ok(headers);
        };
        for (key, value) in pairs(list, &name)? {
            let header = HeaderName::from_str(key).ok().zip(HeaderValue::from_str(&value).ok());
            let (key, mut value) = header.ok_or_else(|| TelemetryError::List { name: name.clone() })?;
            value.set_sensitive(true);
            headers.append(key, value);
        }
        Ok(headers)
    }

    fn timeout(&self) -> Result<Duration, TelemetryError> {
        let Some((name, _)) = self.otlp("TIMEOUT") else {
            return Ok(DEFAULT_TIMEOUT);
        };
        Ok(self.positive(&name)?.map_or(DEFAULT_TIMEOUT, Duration::from_millis))
    }

    fn sampler(&self) -> Result<Sampler, TelemetryError> {
        let ratio = || match self.text("OTEL_TRACES_SAMPLER_ARG") {
            None => Ok(Sampler::TraceIdRatioBased(1.0)),
            Some(text) => match text.parse() {
                Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(Sampler::TraceIdRatioBased(ratio)),
                _ => Err(invalid("OTEL_TRACES_SAMPLER_ARG", text, "must be a number from 0 to 1")),
            },
        };
        let parent_based = |root| Sampler::ParentBased(Box::new(root));
        Ok(match self.text("OTEL_TRACES_SAMPLER") {
            None | Some("parentbased_always_on") => parent_based(Sampler::AlwaysOn),
            Some("parentbased_always_off") => parent_based(Sampler::AlwaysOff),
            Some("parentbased_traceidratio") => parent_based(ratio()?),
            Some("always_on") => Sampler::AlwaysOn,
            Some("always_off") => Sampler::AlwaysOff,
            Some("traceidratio") => ratio()?,
            Some(other) => {
                let problem = "must be always_on, always_off, traceidratio, or one of these after parentbased_";
                return Err(invalid("OTEL_TRACES_SAMPLER", other, problem));
            }
        })
    }

    fn resource(&self) -> Result<Resource, TelemetryError> {
        const NAME: &str = "OTEL_RESOURCE_ATTRIBUTES";
        let mut resource = Resource::builder_empty()
            .with_detector(Box::new(TelemetryResourceDetector))
            .with_service_name("csrd")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
        for (key, value) in pairs(self.text(NAME).unwrap_or_default(), NAME)? {
            resource = resource.with_attribute(KeyValue::new(key.to_owned(), value));
        }
        if let Some(name) = self.text("OTEL_SERVICE_NAME") {
            resource = resource.with_service_name(name.to_owned());
        }
        Ok(resource.build())
    }

    fn batch(&self) -> Result<BatchConfig, TelemetryError> {
        let mut batch = BatchConfigBuilder::default();
        if let Some(delay_ms) = self.positive("OTEL_BSP_SCHEDULE_DELAY")? {
            batch = batch.with_scheduled_delay(Duration::from_millis(delay_ms));
        }
        if let Some(spans) = self.positive("OTEL_BSP_MAX_QUEUE_SIZE")? {
            batch = batch.with_max_queue_size(spans);
        }
        if let Some(spans) = self.positive("OTEL_BSP_MAX_EXPORT_BATCH_SIZE")? {
            batch = batch.with_max_export_batch_size(spans);
        }
        Ok(batch.build())
    }
}

/// `key=value,key=value` with percent-encoded values, as in W3C Baggage without properties.
fn pairs<'a>(list: &'a str, name: &str) -> Result<Vec<(&'a str, String)>, TelemetryError> {
    let pair = |member: &'a str| {
        let (key, value) = member.split_once('=')?;
        let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
        (!key.trim().is_empty()).then(|| (key.trim(), value.into_owned()))
    };
    let members = list.split(',').filter(|member| !member.trim().is_empty());
    let pairs: Option<_> = members.map(pair).collect();
    pairs.ok_or_else(|| TelemetryError::List { name: name.to_owned() })
}

fn invalid(name: &str, value: &str, problem: &'static str) -> TelemetryError {
    TelemetryError::Variable { name: name.to_owned(), value: value.to_owned(), problem }
}

#[cfg(test)]
mod tests {
    use opentelemetry::Key;

    use super::*;

    const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318");

    fn variables(list: &[(&str, &str)]) -> Variables {
        list.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    fn traces(list: &[(&str, &str)]) -> Option<Traces> {
        Traces::from_variables(&variables(list)).expect("usable variables")
    }

    #[test]
    fn traces_are_off_until_an_endpoint_is_named_and_can_be_switched_off() {
        for list in [
            &[][..],
            &[("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")],
            &[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")],
            &[ENDPOINT, ("OTEL_SDK_DISABLED", "True")],
            &[ENDPOINT, ("OTEL_TRACES_EXPORTER", "none")],
        ] {
            assert!(traces(list).is_none(), "{list:?}");
        }
        for list in [&[ENDPOINT][..], &[ENDPOINT, ("OTEL_SDK_DISABLED", "0"), ("OTEL_TRACES_EXPORTER", "otlp")]] {
            assert!(traces(list).is_some(), "{list:?}");
        }
    }

    #[test]
    fn the_protocol_and_the_endpoint_follow_the_standard() {
        fn check(list: &[(&str, &str)], protocol: Protocol, endpoint: &str) {
            let traces = traces(list).expect("an endpoint is named");
            assert_eq!((traces.protocol, traces.endpoint.as_str()), (protocol, endpoint), "{list:?}");
        }
        let base = "OTEL_EXPORTER_OTLP_ENDPOINT";
        let own = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
        let protocol = "OTEL_EXPORTER_OTLP_PROTOCOL";
        let own_protocol = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL";
        check(&[(base, "http://c:4318")], Protocol::HttpProtobuf, "http://c:4318/v1/traces");
        check(&[(base, "http://c:4318/otlp/")], Protocol::HttpProtobuf, "http://c:4318/otlp/v1/traces");
        check(&[(own, "http://c:4318/mine")], Protocol::HttpProtobuf, "http://c:4318/mine");
        check(&[(base, "http://a"), (own, "http://b/x")], Protocol::HttpProtobuf, "http://b/x");
        check(&[(base, "http://c:4317"), (protocol, "grpc")], Protocol::Grpc, "http://c:4317");
        check(
            &[(base, "http://c"), (protocol, "grpc"), (own_protocol, "http/protobuf")],
            Protocol::HttpProtobuf,
            "http://c/v1/traces",
        );
    }

    #[test]
    fn headers_timeout_and_resource_are_read() {
        let read = traces(&[
            ENDPOINT,
            ("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer%20abc, x-tenant = 7 ,"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "1500"),
            ("OTEL_RESOURCE_ATTRIBUTES", "host.name=node-1,team=a%2Cb,service.name=ignored"),
            ("OTEL_SERVICE_NAME", "certificates"),
        ])
        .unwrap();
        assert_eq!(read.headers["authorization"], "Bearer abc");
        assert_eq!(read.headers["x-tenant"], "7");
        assert!(!format!("{:?}", read.headers).contains("abc"), "credentials are not shown");
        assert_eq!(read.timeout, Duration::from_millis(1500));
        let attribute = |name: &'static str| read.resource.get(&Key::new(name)).map(|value| value.to_string());
        assert_eq!(attribute("service.name").unwrap(), "certificates");
        assert_eq!(attribute("service.version").unwrap(), env!("CARGO_PKG_VERSION"));
        assert_eq!(attribute("host.name").unwrap(), "node-1");
        assert_eq!(attribute("team").unwrap(), "a,b");
        assert_eq!(attribute("telemetry.sdk.language").unwrap(), "rust");

        let plain = traces(&[ENDPOINT]).unwrap();
        assert_eq!(plain.timeout, DEFAULT_TIMEOUT);
        assert_eq!(plain.resource.get(&Key::new("service.name")).unwrap().to_string(), "csrd");
    }

    #[test]
    fn samplers_have_their_standard_names() {
        fn check(sampler: &str, argument: &str, expected: &str) {
            let list = [ENDPOINT, ("OTEL_TRACES_SAMPLER", sampler), ("OTEL_TRACES_SAMPLER_ARG", argument)];
            assert_eq!(format!("{:?}", traces(&list).unwrap().sampler), expected);
        }
        check("", "", "ParentBased(AlwaysOn)");
        check("always_on", "", "AlwaysOn");
        check("always_off", "", "AlwaysOff");
        check("traceidratio", "0.25", "TraceIdRatioBased(0.25)");
        check("traceidratio", "", "TraceIdRatioBased(1.0)");
        check("parentbased_always_on", "", "ParentBased(AlwaysOn)");
        check("parentbased_always_off", "", "ParentBased(AlwaysOff)");
        check("parentbased_traceidratio", "1", "ParentBased(TraceIdRatioBased(1.0))");
    }

    #[test]
    fn a_value_that_cannot_be_used_is_an_error_that_names_it() {
        fn check(name: &str, value: &str, expected: &str) {
            let mut list = variables(&[ENDPOINT, ("OTEL_TRACES_SAMPLER", "traceidratio")]);
            list.insert(name.to_owned(), value.to_owned());
            let error = Traces::from_variables(&list).err().expect("an unusable value");
            assert_eq!(error.to_string(), format!("{name} {expected}"));
        }
        let not = |value: &str, problem: &str| format!("{problem}, not {value:?}");
        let url = "must begin with http://";
        let tls = "must be http://, TLS to the collector is not built in";
        let number = "must be a whole number above zero";
        let ratio = "must be a number from 0 to 1";
        let list = "must be KEY=VALUE,… with percent-encoded values";
        check("OTEL_TRACES_EXPORTER", "jaeger", &not("jaeger", "must be otlp or none"));
        check("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", &not("http/json", "must be grpc or http/protobuf"));
        check("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a b", &not("http://a b", "must be a URL"));
        check("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4317", &not("localhost:4317", url));
        check("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://c", &not("https://c", tls));
        check("OTEL_EXPORTER_OTLP_TIMEOUT", "0", &not("0", number));
        check("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "10s", &not("10s", number));
        check("OTEL_BSP_MAX_QUEUE_SIZE", "-1", &not("-1", number));
        check("OTEL_TRACES_SAMPLER_ARG", "1.01", &not("1.01", ratio));
        check("OTEL_TRACES_SAMPLER_ARG", "NaN", &not("NaN", ratio));
        // These may hold credentials and are not repeated.
        check("OTEL_EXPORTER_OTLP_HEADERS", "Bearer secret", list);
        check("OTEL_EXPORTER_OTLP_HEADERS", "a b=secret", list);
        check("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "a=%0Asecret", list);
        check("OTEL_EXPORTER_OTLP_HEADERS", "a=%ff", list);
        check("OTEL_RESOURCE_ATTRIBUTES", "=x", list);
        let sampler = "must be always_on, always_off, traceidratio, or one of these after parentbased_";
        check("OTEL_TRACES_SAMPLER", "xray", &not("xray", sampler));
    }
}
