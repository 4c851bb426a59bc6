//! What operators count: every metric of the process, registered here and nowhere else.
//!
//! | name | type | labels | meaning |
//! |---|---|---|---|
//! | `csrd_attest_total` | counter | `result` ok, refused; `reason` | attestations of a caller |
//! | `csrd_decisions_total` | counter | `result` granted, denied; `reason` | policy decisions |
//! | `csrd_issuances_total` | counter | `signer`; `result` ok, error; `reason` | attempts to get a certificate signed |
//! | `csrd_issuance_duration_seconds` | histogram | `signer` | time of one attempt, failed ones included |
//! | `csrd_renewals_total` | counter | `result` ok, error; `reason` | renewals of a credential already delivered |
//! | `csrd_renewals_waiting` | gauge | | renewals that are due and wait for their turn |
//! | `csrd_credentials` | gauge | | live credentials |
//! | `csrd_subscribers` | gauge | | open streams that follow a credential or a trust bundle |
//! | `csrd_connections` | gauge | | open connections to the socket |
//! | `csrd_connections_refused_total` | counter | `reason` | connections closed before they were served |
//! | `csrd_account_held` | gauge | `kind` connections, bytes, calls, arriving, entries | what all callers hold of it |
//! | `csrd_account_limit` | gauge | `kind` connections, bytes, entries | what they may hold together; it follows from memory and descriptors at the start |
//! | `csrd_policy_loads_total` | counter | `result` ok, error | loads of the policy set; after an error the last good set stays |
//! | `csrd_policy_generation` | gauge | | number of the policy set in force, from 1 |
//! | `csrd_ca_not_after_seconds` | gauge | `signer` | end of the CA certificate in force, Unix time |
//! | `csrd_credential_earliest_expiry_seconds` | gauge | | first end of a credential, Unix time, also of one that nobody has followed for up to 5 minutes; `inf` when there is none |
//! | `csrd_api_requests_total` | counter | `verb`; `result` ok, error; `reason` | requests about CertificateSigningRequests to the API server |
//! | `csrd_api_request_duration_seconds` | histogram | `verb` | time of one such request |
//! | `csrd_csr_verdicts_total` | counter | `result` approved, refused; `reason` | the controller's verdicts |
//! | `csrd_csr_waiting` | gauge | | requests that wait for their turn in the controller |
//! | `csrd_leading` | gauge | | 1 in the controller that leads |
//! | `csrd_build_info` | info | `version` | what is running |
//!
//! No label carries anything a caller can choose: `result` and `reason` are `&'static str` (`reason` is empty when the
//! result is good, and otherwise one of the closed set of `ErrorInfo.reason`; a refused connection has a set of its own,
//! see [`ConnectionRefused`]), `verb` is one of the few that csrd uses, and `signer` comes from configuration. Nothing here knows a workload.

use std::{
    ops::Deref,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Metric, Registry, Unit},
};

/// Content type of [`Families::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// From a warm embedded signer (under a millisecond) to a person who approves (a minute).
const DURATION_BUCKETS_SECONDS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0];

type Timestamp = Gauge<f64, AtomicU64>;
type Durations<L> = Family<L, Histogram, fn() -> Histogram>;

/// All metrics; clones share them.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Families>);

/// Why a connection was closed before it was served: there was no call that could have been told.
#[derive(Clone, Copy, Debug)]
pub enum ConnectionRefused {
    /// `TOO_MANY_CONNECTIONS`: its principal, or all together, have as many as they may.
    TooMany,
    /// `TOO_MANY_BYTES`: its principal, or all together, hold as much memory as they may.
    TooManyBytes,
    /// `TOO_FAST`: its principal connects too often.
    TooFast,
    /// `SILENT`: no whole request came in time.
    Silent,
    /// `UNFINISHED`: a frame or a header block was begun and not ended in time.
    Unfinished,
}

/// The metrics by name; see the table above.
#[derive(Debug)]
pub struct Families {
    registry: Registry,
    /// `csrd_attest_total`.
    pub attest: Outcomes,
    /// `csrd_decisions_total`.
    pub decisions: Outcomes,
    /// `csrd_renewals_total`.
    pub renewals: Outcomes,
    /// `csrd_renewals_waiting`.
    pub renewals_waiting: Gauge,
    /// `csrd_credentials`.
    pub credentials: Gauge,
    /// `csrd_subscribers`; see [`counted`].
    pub subscribers: Gauge,
    /// `csrd_connections`; see [`counted`].
    pub connections: Gauge,
    /// `csrd_csr_verdicts_total`.
    pub csr_verdicts: Outcomes,
    /// `csrd_csr_waiting`.
    pub csr_waiting: Gauge,
    /// `csrd_leading`; see [`counted`].
    pub leading: Gauge,
    issuances: Family<SignerOutcome, Counter>,
    issuance_duration: Durations<SignerName>,
    connections_refused: Family<Reason, Counter>,
    account_held: Family<Kind, Gauge>,
    account_limit: Family<Kind, Gauge>,
    policy_loads: Family<LoadResult, Counter>,
    policy_generation: Gauge,
    ca_not_after: Family<SignerName, Timestamp>,
    earliest_expiry: Timestamp,
    api_requests: Family<ApiOutcome, Counter>,
    api_request_duration: Durations<Verb>,
}

impl Metrics {
    /// Registers every metric.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("csrd");
        let r = &mut registry;
        let info = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        r.register("build", "What is running", info);
        let seconds = Some(Unit::Seconds);
        let families = Families {
            attest: Outcomes::add(r, "attest", "Attestations of a caller", ["ok", "refused"]),
            decisions: Outcomes::add(r, "decisions", "Policy decisions", ["granted", "denied"]),
            issuances: add(r, "issuances", "Attempts to get a certificate signed", None, Family::default()),
            issuance_duration: durations(r, "issuance_duration", "Time of one attempt to get a certificate signed"),
            renewals: Outcomes::add(r, "renewals", "Renewals of a delivered credential", ["ok", "error"]),
            renewals_waiting: add(r, "renewals_waiting", "Renewals that wait for their turn", None, Gauge::default()),
            credentials: add(r, "credentials", "Live credentials", None, Gauge::default()),
            subscribers: add(
                r,
                "subscribers",
                "Open streams that follow a credential or roots",
                None,
                Gauge::default(),
            ),
            connections: add(r, "connections", "Open connections to the socket", None, Gauge::default()),
            connections_refused: add(
                r,
                "connections_refused",
                "Connections closed before they were served",
                None,
                Family::default(),
            ),
            account_held: add(r, "account_held", "What all callers hold", None, Family::default()),
            account_limit: add(r, "account_limit", "What all callers may hold together", None, Family::default()),
            policy_loads: add(r, "policy_loads", "Loads of the policy set", None, Family::default()),
            policy_generation: add(r, "policy_generation", "Number of the policy set in force", None, Gauge::default()),
            ca_not_after: add(
                r,
                "ca_not_after",
                "End of the CA in force, Unix time",
                seconds.clone(),
                Family::default(),
            ),
            csr_verdicts: Outcomes::add(r, "csr_verdicts", "Verdicts of the controller", ["approved", "refused"]),
            csr_waiting: add(r, "csr_waiting", "Requests that wait for their turn", None, Gauge::default()),
            leading: add(r, "leading", "Whether this replica leads", None, Gauge::default()),
            earliest_expiry: add(
                r,
                "credential_earliest_expiry",
                "First end of a live credential, Unix time",
                seconds,
                Timestamp::default(),
            ),
            api_requests: add(
                r,
                "api_requests",
                "Requests about CertificateSigningRequests to the API server",
                None,
                Family::default(),
            ),
            api_request_duration: durations(
                r,
                "api_request_duration",
                "Time of one request about a CertificateSigningRequest",
            ),
            registry,
        };
        // Series that exist from the start show a rate of zero instead of nothing.
        for result in ["ok", "error"] {
            drop(families.policy_loads.get_or_create(&LoadResult { result }));
        }
        families.set_earliest_expiry(None);
        Self(Arc::new(families))
    }

    /// The metrics of one signer, resolved once; `name` must come from configuration, never from a caller.
    pub fn signer(&self, name: &str) -> SignerMetrics {
        let signer = || SignerName { signer: name.to_owned() };
        let outcome = SignerOutcome { signer: name.to_owned(), result: "ok", reason: "" };
        SignerMetrics {
            signed: self.issuances.get_or_create_owned(&outcome),
            duration: self.issuance_duration.get_or_create_owned(&signer()),
            not_after: self.ca_not_after.get_or_create_owned(&signer()),
            issuances: self.issuances.clone(),
            signer: signer(),
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for Metrics {
    type Target = Families;

    fn deref(&self) -> &Families {
        &self.0
    }
}

impl Families {
    /// Counts a connection that was closed before it was served.
    pub fn connection_refused(&self, why: ConnectionRefused) {
        let reason = match why {
            ConnectionRefused::TooMany => "TOO_MANY_CONNECTIONS",
            ConnectionRefused::TooManyBytes => "TOO_MANY_BYTES",
            ConnectionRefused::TooFast => "TOO_FAST",
            ConnectionRefused::Silent => "SILENT",
            ConnectionRefused::Unfinished => "UNFINISHED",
        };
        self.connections_refused.get_or_create(&Reason { reason }).inc();
    }

    /// The gauge of what all callers hold of `kind`, of which they may hold `limit` together.
    pub fn account(&self, kind: &'static str, limit: Option<usize>) -> Gauge {
        if let Some(limit) = limit {
            self.account_limit.get_or_create(&Kind { kind }).set(i64::try_from(limit).unwrap_or(i64::MAX));
        }
        self.account_held.get_or_create_owned(&Kind { kind })
    }

    /// A new policy set is in force.
    pub fn policy_loaded(&self, generation: u64) {
        self.policy_loads.get_or_create(&LoadResult { result: "ok" }).inc();
        self.policy_generation.set(i64::try_from(generation).unwrap_or(i64::MAX));
    }

    /// A policy set was not loaded, and the last good one stays in force.
    pub fn policy_load_failed(&self) {
        self.policy_loads.get_or_create(&LoadResult { result: "error" }).inc();
    }

    /// Counts a request to the API server that took `took`; `reason` is the error's `reason()`.
    pub fn api_request(&self, verb: &'static str, outcome: Result<(), &'static str>, took: Duration) {
        let (result, reason) = outcome.map_or_else(|reason| ("error", reason), |()| ("ok", ""));
        self.api_requests.get_or_create(&ApiOutcome { verb, result, reason }).inc();
        self.api_request_duration.get_or_create(&Verb { verb }).observe(took.as_secs_f64());
    }

    /// The first end of a live credential; `None` when there is none.
    pub fn set_earliest_expiry(&self, not_after: Option<SystemTime>) {
        self.earliest_expiry.set(not_after.map_or(f64::INFINITY, unix_seconds));
    }

    /// The OpenMetrics text format 1.0, to be served as [`CONTENT_TYPE`].
    pub fn encode(&self) -> String {
        let mut text = String::new();
        text::encode(&mut text, &self.registry).expect("writing to a string does not fail");
        text
    }
}

/// A counter of good results and, by reason, of bad ones.
#[derive(Debug)]
pub struct Outcomes {
    family: Family<Outcome, Counter>,
    good: Counter,
    bad: &'static str,
}

impl Outcomes {
    fn add(registry: &mut Registry, name: &str, help: &str, [good, bad]: [&'static str; 2]) -> Self {
        let family: Family<Outcome, Counter> = add(registry, name, help, None, Family::default());
        let good = family.get_or_create_owned(&Outcome { result: good, reason: "" });
        Self { family, good, bad }
    }

    /// Counts a good result; one atomic addition.
    pub fn good(&self) {
        self.good.inc();
    }

    /// Counts a bad result; `reason` is the error's `reason()`.
    pub fn bad(&self, reason: &'static str) {
        self.family.get_or_create(&Outcome { result: self.bad, reason }).inc();
    }
}

/// The metrics of one signer.
#[derive(Clone, Debug)]
pub struct SignerMetrics {
    signer: SignerName,
    issuances: Family<SignerOutcome, Counter>,
    signed: Counter,
    duration: Histogram,
    not_after: Timestamp,
}

impl SignerMetrics {
    /// Counts a certificate that was signed and checked, `took` after it was asked for.
    pub fn issued(&self, took: Duration) {
        self.signed.inc();
        self.duration.observe(took.as_secs_f64());
    }

    /// Counts an attempt that failed after `took`; `reason` is the error's `reason()`.
    pub fn failed(&self, reason: &'static str, took: Duration) {
        let signer = self.signer.signer.clone();
        self.issuances.get_or_create(&SignerOutcome { signer, result: "error", reason }).inc();
        self.duration.observe(took.as_secs_f64());
    }

    /// The end of the CA certificate now in force.
    pub fn set_ca_not_after(&self, not_after: SystemTime) {
        self.not_after.set(unix_seconds(not_after));
    }
}

/// Counts one in `gauge` until the returned value is dropped.
pub fn counted(gauge: &Gauge) -> Counted {
    gauge.inc();
    Counted(gauge.clone())
}

/// One, counted while it lives; see [`counted`].
#[derive(Debug)]
pub struct Counted(Gauge);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Outcome {
    result: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct LoadResult {
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ApiOutcome {
    verb: &'static str,
    result: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Verb {
    verb: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SignerName {
    signer: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SignerOutcome {
    signer: String,
    result: &'static str,
    reason: &'static str,
}

/// Registers a metric and keeps a handle to it.
fn add<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, unit: Option<Unit>, metric: M) -> M {
    match unit {
        Some(unit) => registry.register_with_unit(name, help, unit, metric.clone()),
        None => registry.register(name, help, metric.clone()),
    }
    metric
}

/// Registers a histogram of durations for each value of a label.
fn durations<L>(registry: &mut Registry, name: &str, help: &str) -> Durations<L>
where
    L: Clone + Eq + std::hash::Hash + EncodeLabelSet + std::fmt::Debug + Send + Sync + 'static,
{
    let family: Durations<L> = Family::new_with_constructor(|| Histogram::new(DURATION_BUCKETS_SECONDS));
    add(registry, name, help, Some(Unit::Seconds), family)
}

fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics_with_everything() -> Metrics {
        let metrics = Metrics::new();
        metrics.attest.good();
        metrics.attest.bad("PEER_GONE");
        metrics.decisions.bad("NO_POLICY");
        metrics.renewals.bad("SIGNER_UNAVAILABLE");
        metrics.connection_refused(ConnectionRefused::TooMany);
        metrics.account("connections", Some(10)).set(2);
        metrics.policy_loaded(3);
        let signer = metrics.signer("embedded");
        signer.issued(Duration::from_millis(2));
        signer.failed("CA_EXPIRED", Duration::from_secs(90));
        signer.set_ca_not_after(UNIX_EPOCH + Duration::from_secs(1_900_000_000));
        metrics.api_request("create", Ok(()), Duration::from_millis(2));
        metrics.api_request("create", Err("API_THROTTLED"), Duration::from_millis(2));
        metrics
    }

    #[test]
    fn names_help_and_types_are_as_documented() {
        let text = metrics_with_everything().encode();
        let described: Vec<_> = text.lines().filter(|line| line.starts_with('#')).collect();
        insta::assert_snapshot!(described.join("\n"), @r"
        # HELP csrd_build What is running.
        # TYPE csrd_build info
        # HELP csrd_attest Attestations of a caller.
        # TYPE csrd_attest counter
        # HELP csrd_decisions Policy decisions.
        # TYPE csrd_decisions counter
        # HELP csrd_issuances Attempts to get a certificate signed.
        # TYPE csrd_issuances counter
        # HELP csrd_issuance_duration_seconds Time of one attempt to get a certificate signed.
        # TYPE csrd_issuance_duration_seconds histogram
        # UNIT csrd_issuance_duration_seconds seconds
        # HELP csrd_renewals Renewals of a delivered credential.
        # TYPE csrd_renewals counter
        # HELP csrd_renewals_waiting Renewals that wait for their turn.
        # TYPE csrd_renewals_waiting gauge
        # HELP csrd_credentials Live credentials.
        # TYPE csrd_credentials gauge
        # HELP csrd_subscribers Open streams that follow a credential or roots.
        # TYPE csrd_subscribers gauge
        # HELP csrd_connections Open connections to the socket.
        # TYPE csrd_connections gauge
        # HELP csrd_connections_refused Connections closed before they were served.
        # TYPE csrd_connections_refused counter
        # HELP csrd_account_held What all callers hold.
        # TYPE csrd_account_held gauge
        # HELP csrd_account_limit What all callers may hold together.
        # TYPE csrd_account_limit gauge
        # HELP csrd_policy_loads Loads of the policy set.
        # TYPE csrd_policy_loads counter
        # HELP csrd_policy_generation Number of the policy set in force.
        # TYPE csrd_policy_generation gauge
        # HELP csrd_ca_not_after_seconds End of the CA in force, Unix time.
        # TYPE csrd_ca_not_after_seconds gauge
        # UNIT csrd_ca_not_after_seconds seconds
        # HELP csrd_csr_verdicts Verdicts of the controller.
        # TYPE csrd_csr_verdicts counter
        # HELP csrd_csr_waiting Requests that wait for their turn.
        # TYPE csrd_csr_waiting gauge
        # HELP csrd_leading Whether this replica leads.
        # TYPE csrd_leading gauge
        # HELP csrd_credential_earliest_expiry_seconds First end of a live credential, Unix time.
        # TYPE csrd_credential_earliest_expiry_seconds gauge
        # UNIT csrd_credential_earliest_expiry_seconds seconds
        # HELP csrd_api_requests Requests about CertificateSigningRequests to the API server.
        # TYPE csrd_api_requests counter
        # HELP csrd_api_request_duration_seconds Time of one request about a CertificateSigningRequest.
        # TYPE csrd_api_request_duration_seconds histogram
        # UNIT csrd_api_request_duration_seconds seconds
        # EOF
        ");
    }

    #[test]
    fn the_table_of_the_module_names_every_series_and_no_other() {
        let text = metrics_with_everything().encode();
        let mut exposed: Vec<_> = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split(['{', ' ']).next().unwrap())
            .map(|name| match name.rsplit_once('_') {
                Some((histogram, "bucket" | "sum" | "count")) => histogram,
                _ => name,
            })
            .collect();
        exposed.sort_unstable();
        exposed.dedup();
        let rows = include_str!("metrics.rs").lines().filter(|line| line.starts_with("//! | `"));
        let mut documented = Vec::new();
        for row in rows {
            let [_, name, kind, _, meaning, _] = row.split('|').map(str::trim).collect::<Vec<_>>()[..] else {
                panic!("{row} has four columns");
            };
            let name = name.trim_matches('`');
            let family = ["_total", "_info"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            assert!(text.contains(&format!("# TYPE {family} {kind}\n")) && !meaning.is_empty(), "{row}");
            documented.push(name);
        }
        documented.sort_unstable();
        assert_eq!(exposed, documented);
    }

    #[test]
    fn values_are_exposed_under_their_labels() {
        let metrics = metrics_with_everything();
        let held = counted(&metrics.connections);
        let second = counted(&metrics.connections);
        drop(second);
        metrics.policy_load_failed();
        let text = metrics.encode();
        for line in [
            r#"csrd_attest_total{result="ok",reason=""} 1"#,
            r#"csrd_attest_total{result="refused",reason="PEER_GONE"} 1"#,
            r#"csrd_decisions_total{result="granted",reason=""} 0"#,
            r#"csrd_decisions_total{result="denied",reason="NO_POLICY"} 1"#,
            r#"csrd_issuances_total{signer="embedded",result="ok",reason=""} 1"#,
            r#"csrd_issuances_total{signer="embedded",result="error",reason="CA_EXPIRED"} 1"#,
            r#"csrd_issuance_duration_seconds_bucket{le="0.0025",signer="embedded"} 1"#,
            r#"csrd_issuance_duration_seconds_bucket{le="60.0",signer="embedded"} 1"#,
            r#"csrd_issuance_duration_seconds_bucket{le="+Inf",signer="embedded"} 2"#,
            r#"csrd_renewals_total{result="error",reason="SIGNER_UNAVAILABLE"} 1"#,
            "csrd_connections 1",
            r#"csrd_connections_refused_total{reason="TOO_MANY_CONNECTIONS"} 1"#,
            r#"csrd_policy_loads_total{result="ok"} 1"#,
            r#"csrd_policy_loads_total{result="error"} 1"#,
            "csrd_policy_generation 3",
            r#"csrd_ca_not_after_seconds{signer="embedded"} 1900000000.0"#,
            "csrd_credential_earliest_expiry_seconds inf",
            r#"csrd_api_requests_total{verb="create",result="ok",reason=""} 1"#,
            r#"csrd_api_requests_total{verb="create",result="error",reason="API_THROTTLED"} 1"#,
            r#"csrd_api_request_duration_seconds_count{verb="create"} 2"#,
            concat!(r#"csrd_build_info{version=""#, env!("CARGO_PKG_VERSION"), r#""} 1"#),
        ] {
            assert!(text.lines().any(|exposed| exposed == line), "{line} is not in\n{text}");
        }
        drop(held);
        assert!(metrics.encode().contains("\ncsrd_connections 0\n"));
    }

    #[test]
    fn a_time_before_1970_is_exposed_as_zero() {
        let metrics = Metrics::new();
        metrics.set_earliest_expiry(Some(UNIX_EPOCH - Duration::from_secs(1)));
        assert!(metrics.encode().contains("\ncsrd_credential_earliest_expiry_seconds 0.0\n"));
        metrics.set_earliest_expiry(Some(UNIX_EPOCH + Duration::from_millis(1500)));
        assert!(metrics.encode().contains("\ncsrd_credential_earliest_expiry_seconds 1.5\n"));
    }
}
