//! One issuance in a cluster as a collector receives it: the pod's command, the agent, the controller, and what the API
//! server tells of its own part.

use std::{collections::HashMap, fmt, fs};

use opentelemetry_proto::tonic::trace::v1::Span;
use serde_json::json;

use super::ISSUE;
use crate::{
    attest::is_root,
    cluster::{ControlPlane, Options, eventually},
    controller::{agent::Agent, deployment::Deployment},
    pods::cgroup::Cgroup,
    telemetry::{Collector, Received},
};

const CREATE: &str = "create certificatesigningrequests";

/// Service, span, and the span above.
const PARTS: [(&str, &str, &str); 15] = [
    ("pod", ISSUE, ""),
    ("agent", ISSUE, ISSUE),
    ("agent", "attest", ISSUE),
    ("agent", "decide", ISSUE),
    ("agent", "key", ISSUE),
    ("agent", "sign", ISSUE),
    ("agent", "csr", "sign"),
    ("agent", CREATE, "csr"),
    ("apiserver", "POST /apis/certificates.k8s.io/v1/certificatesigningrequests", CREATE),
    ("controller", "verdict", "sign"),
    ("controller", "approve", "verdict"),
    ("controller", "sign", "verdict"),
    ("apiserver", "PATCH /apis/certificates.k8s.io/v1/certificatesigningrequests/{:name}/status", "sign"),
    ("agent", "verify", ISSUE),
    ("agent", "deliver", ISSUE),
];

#[tokio::test]
async fn in_a_cluster_an_issuance_is_one_trace_to_which_the_api_server_links() {
    if !is_root("in_a_cluster_an_issuance_is_one_trace_to_which_the_api_server_links") {
        return;
    }
    let mut collector = Collector::grpc().await;
    let config = tempfile::NamedTempFile::new().unwrap();
    let tracing = json!({
        "apiVersion": "apiserver.config.k8s.io/v1",
        "kind": "TracingConfiguration",
        "endpoint": collector.address,
        "samplingRatePerMillion": 1_000_000,
    });
    fs::write(&config, tracing.to_string()).unwrap();
    let flag = format!("--tracing-config-file={}", config.path().display());
    let Some(cluster) = ControlPlane::start(Options { apiserver: vec![flag], ..Options::default() }).await else {
        return;
    };
    let deployment = Deployment::on(&cluster).await;
    let endpoint = format!("http://{}", collector.address);
    let variables = |service| {
        [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_BSP_SCHEDULE_DELAY", "10"),
            ("OTEL_SERVICE_NAME", service),
        ]
    };
    let _controller = deployment.controller_with("", &variables("controller")).await;
    let agent = Agent::start(&deployment, &variables("agent")).await;
    eventually("the agent can issue", async || (agent.readiness().await.0 == 200).then_some(())).await;
    let cgroup = Cgroup::of(&deployment.workload(0).await);
    let mut issue = agent.command(&cgroup, &["issue", "--dns", "web.example.org", "-o", "pem"]);
    let issued = issue.envs(variables("pod")).output().await.unwrap();
    assert!(issued.status.success(), "{issued:?}");

    let whole = |received: &Received| Trace::find(received).is_some_and(|trace| trace.missing().is_empty());
    let (Ok(received) | Err(received)) = collector.gather(whole).await;
    let trace = Trace::find(&received).expect("the command sends its span");
    eprintln!("{trace}");
    assert_eq!(trace.missing(), []);
    trace.walk(trace.root, "", &mut |span, above| {
        let ours = trace.received.service(span) != "apiserver";
        assert_eq!(span.trace_id == trace.root.trace_id, ours, "{} below {above}", span.name);
    });
}

struct Trace<'a> {
    received: &'a Received,
    root: &'a Span,
    /// By parent, of whatever trace, in order of their beginning; of a root, by the span that it links to.
    below: HashMap<&'a [u8], Vec<&'a Span>>,
}

impl<'a> Trace<'a> {
    fn find(received: &'a Received) -> Option<Self> {
        let root = received.all.iter().find(|span| span.name == ISSUE && span.parent_span_id.is_empty())?;
        let mut below: HashMap<_, Vec<_>> = HashMap::new();
        for span in &received.all {
            let above = match span.links.first() {
                Some(link) if span.parent_span_id.is_empty() => &link.span_id,
                _ => &span.parent_span_id,
            };
            below.entry(above.as_slice()).or_default().push(span);
        }
        below.values_mut().for_each(|spans| spans.sort_by_key(|span| span.start_time_unix_nano));
        Some(Self { received, root, below })
    }

    /// Those of [`PARTS`] that have not come.
    fn missing(&self) -> Vec<(&'static str, &'static str, &'static str)> {
        let mut missing = PARTS.to_vec();
        self.walk(self.root, "", &mut |span, above| {
            let service = self.received.service(span);
            missing.retain(|part| *part != (service, span.name.as_str(), above));
        });
        missing
    }

    fn walk(&self, span: &Span, above: &str, tell: &mut impl FnMut(&Span, &str)) {
        tell(span, above);
        for below in self.below.get(span.span_id.as_slice()).into_iter().flatten() {
            self.walk(below, &span.name, tell);
        }
    }

    fn draw(&self, out: &mut fmt::Formatter<'_>, span: &Span, depth: usize) -> fmt::Result {
        let millis = (span.end_time_unix_nano - span.start_time_unix_nano) as f64 / 1e6;
        let linked = if span.parent_span_id.is_empty() && depth > 0 { "~> " } else { "" };
        let service = self.received.service(span);
        writeln!(out, "{:10}  {millis:8.2} ms  {}{linked}{}", service, "  ".repeat(depth), span.name)?;
        for below in self.below.get(span.span_id.as_slice()).into_iter().flatten() {
            self.draw(out, below, depth + 1)?;
        }
        Ok(())
    }
}

impl fmt::Display for Trace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.draw(f, self.root, 0)
    }
}
