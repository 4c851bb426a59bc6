//! Rules: CEL expressions over `workload` and `request`, compiled and proven short at load.
//!
//! Invariant: a [`Rule`] that exists needs at most [`MAX_COST`] steps for any input within the bounds of an ask, as
//! `estimate` counts them; facts beyond the bounds that it counts with are refused.
//!
//! Left out: `matches` (`allow` has patterns, and a regular expression's cost is not visible in its size), timestamps and
//! durations (`request.lifetimeSeconds` is a number).

mod estimate;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, LazyLock},
};

pub use self::estimate::{MAX_COST, MAX_DEPTH};
use cel::{Context, Env, IdedExpr, Value, parser::Parser};

use super::{
    MAX_NAME_BYTES, Terms, clipped,
    fact::{Callers, MAX_SERVICES},
    selector::{MAX_LABEL_BYTES, MAX_LABEL_KEY_BYTES},
    shown,
};
use crate::attest::{Facts, PodFacts, UnixFacts};

/// Bytes in one expression.
pub const MAX_EXPRESSION_BYTES: usize = 1024;
/// Supplementary groups of a caller that rules can see; a caller with more is refused by every rule.
pub const MAX_RULE_GROUPS: usize = 1024;
/// Labels of a pod, or of its namespace, that rules can see; a pod with more is refused by every rule.
pub const MAX_RULE_LABELS: usize = 128;

/// Brackets inside each other, counted before parsing because the parser descends once for each.
const MAX_BRACKETS: usize = 24;
/// Stack of the thread that parses one expression; virtual memory, given back when it ends.
const PARSER_STACK_BYTES: usize = 16 << 20;
/// Bytes in any one text among the facts (PATH_MAX, limits.h).
const MAX_FACT_BYTES: usize = 4096;
/// Addresses of a pod: one for each family.
const MAX_POD_IPS: usize = 2;
/// Characters of an evaluation error that are kept.
const MAX_ERROR_CHARS: usize = 200;

/// A compiled rule.
#[derive(Debug)]
pub(super) struct Rule {
    expression: IdedExpr,
    text: String,
    message: String,
}

/// The variables that rules see, made once for a decision.
pub(super) struct Variables(Context<'static, 'static>);

/// The standard functions, without macros (they are expanded by the parser).
static ENVIRONMENT: LazyLock<Arc<Env>> = LazyLock::new(|| Arc::new(Env::stdlib()));

impl Rule {
    /// Compiles `expression` for a policy about `callers`; the error is a sentence for the policy's author.
    pub(super) fn compile(expression: &str, message: &str, callers: Callers) -> Result<Self, String> {
        if expression.len() > MAX_EXPRESSION_BYTES {
            return Err(format!("it has {} bytes, at most {MAX_EXPRESSION_BYTES} are allowed", expression.len()));
        }
        check_brackets(expression)?;
        let (expression, text) = (parse_apart(expression, callers)?, expression.to_owned());
        Ok(Self { expression, text, message: message.to_owned() })
    }

    /// What the policy's author says when it does not hold.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    pub(super) fn mentions(&self, name: &str) -> bool {
        self.text.contains(name)
    }

    /// Whether it holds; anything but `true` is a refusal in words.
    pub(super) fn check(&self, variables: &Variables) -> Result<(), String> {
        match Value::resolve(&self.expression, &variables.0) {
            Ok(Value::Bool(true)) => Ok(()),
            Ok(Value::Bool(false)) => Err(format!("rule not met: {}", self.message)),
            Ok(other) => Err(format!("rule {} is no yes or no but a {}", shown(&self.text), other.type_of())),
            Err(error) => {
                let error = clipped(error.to_string(), MAX_ERROR_CHARS);
                Err(format!("rule {} cannot be evaluated: {error}", shown(&self.text)))
            }
        }
    }
}

impl Variables {
    /// The facts and the request, with the policy's defaults filled in; the error is a refusal in words.
    pub(super) fn new(facts: &Facts, terms: &Terms) -> Result<Self, String> {
        let mut context = Context::with_env(Arc::clone(&ENVIRONMENT));
        let workload = match facts {
            Facts::Process(facts) => (Callers::Processes.section(), unix(facts)?),
            Facts::Pod(facts) => (Callers::Pods.section(), pod(facts)?),
        };
        context.add_variable_from_value("workload", map([workload]));
        context.add_variable_from_value("request", request(terms));
        Ok(Self(context))
    }
}

fn unix(facts: &UnixFacts) -> Result<Value, String> {
    let groups = &facts.supplementary_gids;
    if groups.len() > MAX_RULE_GROUPS {
        return Err(format!(
            "rules take at most {MAX_RULE_GROUPS} supplementary groups, the caller has {}",
            groups.len()
        ));
    }
    let texts = [
        ("user", &facts.user),
        ("group", &facts.group),
        ("executable", &facts.executable),
        ("executableSha256", &facts.executable_sha256),
        ("systemdUnit", &facts.systemd_unit),
        ("cgroup", &facts.cgroup),
    ];
    if let Some((name, _)) =
        texts.iter().find(|(_, text)| text.as_ref().is_some_and(|text| text.len() > MAX_FACT_BYTES))
    {
        return Err(format!("rules take at most {MAX_FACT_BYTES} bytes in unix.{name}"));
    }
    let gids = groups.iter().map(|gid| Value::Int(i64::from(*gid))).collect::<Vec<_>>();
    let numbers = [
        ("uid", Value::Int(i64::from(facts.uid))),
        ("gid", Value::Int(i64::from(facts.gid))),
        ("supplementaryGids", Value::List(gids.into())),
    ];
    // An absent fact has no key: has(workload.unix.user) tells, and using it regardless is an error, so a refusal.
    let texts = texts.into_iter().filter_map(|(name, text)| Some((name, Value::from(text.clone()?))));
    Ok(map(numbers.into_iter().chain(texts)))
}

fn pod(pod: &PodFacts) -> Result<Value, String> {
    let counts = [
        ("labels", pod.labels.len(), MAX_RULE_LABELS),
        ("namespaceLabels", pod.namespace_labels.len(), MAX_RULE_LABELS),
        ("podIPs", pod.ips.len(), MAX_POD_IPS),
        ("services", pod.services.len(), MAX_SERVICES),
    ];
    if let Some((name, count, max)) = counts.into_iter().find(|(_, count, max)| count > max) {
        return Err(format!("rules take at most {max} entries in kubernetes.{name}, the caller has {count}"));
    }
    let texts = [
        ("namespace", &pod.namespace),
        ("pod", &pod.name),
        ("podUid", &pod.uid),
        ("serviceAccount", &pod.service_account),
        ("node", &pod.node),
    ];
    let labels = || pod.labels.iter().chain(&pod.namespace_labels);
    let fits = texts.iter().all(|(_, text)| text.len() <= MAX_NAME_BYTES)
        && pod.services.iter().all(|name| name.len() <= MAX_NAME_BYTES)
        && labels().all(|(key, value)| key.len() <= MAX_LABEL_KEY_BYTES && value.len() <= MAX_LABEL_BYTES);
    if !fits {
        return Err("a name or label of the caller is longer than Kubernetes allows".to_owned());
    }
    let labels = |labels: &BTreeMap<String, String>| Value::from(labels.clone().into_iter().collect::<HashMap<_, _>>());
    let texts = texts.into_iter().map(|(name, text)| (name, Value::from(text.clone())));
    let rest = [
        ("labels", labels(&pod.labels)),
        ("namespaceLabels", labels(&pod.namespace_labels)),
        ("podIPs", list(pod.ips.iter().map(ToString::to_string))),
        ("services", list(pod.services.iter().cloned())),
    ];
    Ok(map(texts.chain(rest)))
}

fn list(texts: impl Iterator<Item = String>) -> Value {
    Value::List(texts.map(Value::from).collect::<Vec<_>>().into())
}

fn request(terms: &Terms) -> Value {
    let names = &terms.names;
    map([
        ("commonName", Value::from(names.common_name.clone().unwrap_or_default())),
        ("organizations", list(names.organizations.iter().cloned())),
        ("dnsNames", list(names.dns.iter().map(ToString::to_string))),
        ("ipAddresses", list(names.ips.iter().map(ToString::to_string))),
        ("uris", list(names.uris.iter().cloned())),
        ("usages", list(terms.usages.iter().map(|usage| usage.name().to_owned()))),
        ("key", Value::from(terms.key.name())),
        ("lifetimeSeconds", Value::Int(i64::try_from(terms.lifetime.as_secs()).unwrap_or(i64::MAX))),
        ("signer", Value::from(terms.signer.clone())),
    ])
}

fn map(entries: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    let entries = entries.into_iter().map(|(name, value)| (name.to_owned(), value));
    Value::from(entries.collect::<HashMap<_, _>>())
}

/// Parses and estimates on a thread of its own: the parser's descent takes about 150 KiB of stack for each open bracket in
/// a build without optimization, more than a worker thread has to give. A panic in the parser ends there, too.
fn parse_apart(expression: &str, callers: Callers) -> Result<IdedExpr, String> {
    std::thread::scope(|scope| {
        let parser = std::thread::Builder::new().stack_size(PARSER_STACK_BYTES);
        let parsed = parser
            .spawn_scoped(scope, || parse(expression, callers))
            .map_err(|error| format!("no thread for it: {error}"))?;
        parsed.join().unwrap_or_else(|_| Err("the CEL parser failed on it".to_owned()))
    })
}

fn parse(expression: &str, callers: Callers) -> Result<IdedExpr, String> {
    let parsed = Parser::default().max_recursion_depth(MAX_DEPTH as u16).parse(expression).map_err(|errors| {
        let first = errors.errors.first();
        let (message, at) = first.map_or(("no expression", 0), |error| (error.msg.as_str(), error.pos.1));
        format!("it is no CEL expression: at character {at}: {}", clipped(message.to_owned(), MAX_ERROR_CHARS))
    })?;
    estimate::check(&parsed, callers)?;
    Ok(parsed)
}

/// Counts brackets without regard to strings: a rule is never so full of them that this matters.
fn check_brackets(expression: &str) -> Result<(), String> {
    let (mut open, mut most) = (0_usize, 0_usize);
    for byte in expression.bytes() {
        match byte {
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        most = most.max(open);
    }
    match most > MAX_BRACKETS {
        true => Err(format!("{most} brackets are open at once, at most {MAX_BRACKETS} are allowed")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x509::{KeyAlgorithm, Names, Usages};

    fn facts() -> UnixFacts {
        UnixFacts {
            uid: 1000,
            owner: 1000,
            gid: 1000,
            supplementary_gids: vec![33, 1000],
            user: Some("web".to_owned()),
            group: Some("web".to_owned()),
            executable: Some("/usr/bin/web".to_owned()),
            executable_sha256: None,
            systemd_unit: Some("web.service".to_owned()),
            cgroup: None,
        }
    }

    fn pod() -> PodFacts {
        let labels = |key: &str, value: &str| [(key.to_owned(), value.to_owned())].into();
        PodFacts {
            namespace: "production".to_owned(),
            name: "web-0".to_owned(),
            uid: "7f5a4c3e".to_owned(),
            service_account: "web".to_owned(),
            node: "node1".to_owned(),
            labels: labels("app", "web"),
            namespace_labels: labels("example.org/team", "a"),
            ips: vec!["10.0.0.7".parse().unwrap()],
            services: ["web".to_owned(), "web-api".to_owned()].into(),
        }
    }

    fn terms() -> Terms {
        let dns = ["a.example.org", "b.example.org"].map(|name| crate::x509::DnsName::parse(name).unwrap()).to_vec();
        let uris = vec!["spiffe://example.org/web".to_owned()];
        Terms {
            names: Names { dns, uris, ips: vec!["10.0.0.1".parse().unwrap()], ..Names::default() },
            usages: Usages::DEFAULT,
            key: KeyAlgorithm::EcdsaP256,
            lifetime: std::time::Duration::from_secs(3600),
            signer: "embedded".to_owned(),
            policy: "web".to_owned(),
        }
    }

    fn check(expression: &str, expected: Result<(), &str>) {
        let rule = Rule::compile(expression, "the message", Callers::Processes)
            .unwrap_or_else(|error| panic!("{expression}: {error}"));
        let verdict = rule.check(&Variables::new(&Facts::Process(facts()), &terms()).unwrap());
        match expected {
            Ok(()) => assert_eq!(verdict, Ok(()), "{expression}"),
            Err(words) => assert!(verdict.as_ref().unwrap_err().contains(words), "{expression}: {verdict:?}"),
        }
    }

    fn refused(expression: &str, words: &str) {
        let error = Rule::compile(expression, "m", Callers::Processes).expect_err(expression);
        assert!(error.contains(words), "{expression}: {error}");
    }

    #[test]
    fn rules_see_the_facts_and_the_request() {
        for expression in [
            "workload.unix.uid == 1000 && workload.unix.gid == 1000",
            "33 in workload.unix.supplementaryGids",
            "workload.unix.user == 'web' && workload.unix.group == 'web'",
            "workload.unix.executable.startsWith('/usr/bin/')",
            "workload.unix.systemdUnit == 'web.service'",
            "has(workload.unix.user) && !has(workload.unix.cgroup)",
            "size(request.dnsNames) == 2 && request.dnsNames[0] == 'a.example.org'",
            "request.dnsNames.all(name, name.endsWith('.example.org'))",
            "request.dnsNames.exists(name, name.contains('b.'))",
            "request.dnsNames.exists_one(name, name == 'b.example.org')",
            "request.dnsNames.filter(name, name != 'a.example.org') == ['b.example.org']",
            "request.dnsNames.map(name, size(name)) == [13, 13]",
            "request.uris == ['spiffe://example.org/' + workload.unix.user]",
            "request.ipAddresses == ['10.0.0.1']",
            "request.commonName == '' && request.organizations == []",
            "'server auth' in request.usages && request.key == 'ecdsa-p256'",
            "request.lifetimeSeconds <= 2 * 60 * 60 && request.signer == 'embedded'",
            "string(workload.unix.uid) == '1000' && int('7') == 7",
            "(workload.unix.uid > 999 ? 'user' : 'system') == 'user'",
            "{'web': 1}[workload.unix.user] == 1",
        ] {
            check(expression, Ok(()));
        }
    }

    #[test]
    fn rules_see_the_facts_of_a_pod() {
        for (expression, expected) in [
            ("workload.kubernetes.namespace == 'production' && workload.kubernetes.pod == 'web-0'", Ok(())),
            ("workload.kubernetes.podUid == '7f5a4c3e' && workload.kubernetes.node == 'node1'", Ok(())),
            ("workload.kubernetes.serviceAccount == 'web'", Ok(())),
            ("workload.kubernetes.labels.app == 'web' && workload.kubernetes.labels['app'] == 'web'", Ok(())),
            ("has(workload.kubernetes.labels.app) && !has(workload.kubernetes.labels.team)", Ok(())),
            ("'app' in workload.kubernetes.labels", Ok(())),
            ("workload.kubernetes.labels.exists(key, key == 'app')", Ok(())),
            ("workload.kubernetes.namespaceLabels['example.org/team'] == 'a'", Ok(())),
            ("workload.kubernetes.podIPs == ['10.0.0.7'] && request.ipAddresses == ['10.0.0.1']", Ok(())),
            ("'web-api' in workload.kubernetes.services && size(workload.kubernetes.services) == 2", Ok(())),
            ("workload.kubernetes.services.all(s, s.startsWith('web'))", Ok(())),
            ("workload.kubernetes.labels.team == 'a'", Err("cannot be evaluated: No such key: team")),
        ] {
            let rule =
                Rule::compile(expression, "m", Callers::Pods).unwrap_or_else(|why| panic!("{expression}: {why}"));
            let verdict = rule.check(&Variables::new(&Facts::Pod(pod()), &terms()).unwrap());
            match expected {
                Ok(()) => assert_eq!(verdict, Ok(()), "{expression}"),
                Err(words) => assert!(verdict.as_ref().unwrap_err().contains(words), "{expression}: {verdict:?}"),
            }
        }
    }

    #[test]
    fn rules_about_pods_know_no_facts_of_processes_and_the_other_way_round() {
        let refused = |expression: &str, callers, words: &str| {
            let error = Rule::compile(expression, "m", callers).expect_err(expression);
            assert!(error.contains(words), "{error}");
        };
        refused("workload.unix.uid == 0", Callers::Pods, "workload has no field \"unix\"; it has kubernetes");
        refused(
            "workload.kubernetes.pod == ''",
            Callers::Processes,
            "workload has no field \"kubernetes\"; it has unix",
        );
        let words = "workload.kubernetes has no field \"name\"; it has namespace, pod, podUid";
        refused("workload.kubernetes.name == ''", Callers::Pods, words);
    }

    #[test]
    fn what_a_pod_has_counts_in_the_estimate() {
        let of = |expression: &str| Rule::compile(expression, "m", Callers::Pods).map(drop);
        let nested = |of: &str| format!("{of}.all(a, {of}.all(b, a == b))");
        assert_eq!(of("workload.kubernetes.labels.all(a, workload.kubernetes.podIPs.all(b, a != b))"), Ok(()));
        for field in ["labels", "namespaceLabels"] {
            let error = of(&nested(&format!("workload.kubernetes.{field}"))).unwrap_err();
            assert!(error.contains("steps on the largest request"), "{error}");
        }
        assert_eq!(of(&nested("workload.kubernetes.services")), Ok(()));
    }

    #[test]
    fn a_pod_outside_the_bounds_of_the_estimate_is_refused() {
        let many = |n: usize| (0..n).map(|i| (format!("l{i}"), String::new())).collect::<BTreeMap<_, _>>();
        let why = |pod: PodFacts| Variables::new(&Facts::Pod(pod), &terms()).err();
        let text = |n: usize| "a".repeat(n);
        assert_eq!(
            why(PodFacts { labels: many(MAX_RULE_LABELS), namespace_labels: many(MAX_RULE_LABELS), ..pod() }),
            None
        );
        assert_eq!(
            why(PodFacts { labels: many(MAX_RULE_LABELS + 1), ..pod() }).unwrap(),
            "rules take at most 128 entries in kubernetes.labels, the caller has 129"
        );
        assert!(why(PodFacts { namespace_labels: many(MAX_RULE_LABELS + 1), ..pod() }).is_some());
        let services = |n: usize| (0..n).map(|i| format!("s{i}")).collect();
        assert_eq!(why(PodFacts { services: services(MAX_SERVICES), ..pod() }), None);
        assert!(why(PodFacts { services: services(MAX_SERVICES + 1), ..pod() }).is_some());
        let ips = |n: usize| vec![std::net::IpAddr::from([10, 0, 0, 1]); n];
        assert_eq!(why(PodFacts { ips: ips(MAX_POD_IPS), ..pod() }), None);
        assert!(why(PodFacts { ips: ips(MAX_POD_IPS + 1), ..pod() }).is_some());
        assert_eq!(why(PodFacts { name: text(MAX_NAME_BYTES), ..pod() }), None);
        assert!(why(PodFacts { name: text(MAX_NAME_BYTES + 1), ..pod() }).is_some());
        let label = |key: usize, value: usize| [(text(key), text(value))].into();
        assert_eq!(why(PodFacts { labels: label(MAX_LABEL_KEY_BYTES, MAX_LABEL_BYTES), ..pod() }), None);
        assert!(why(PodFacts { labels: label(MAX_LABEL_KEY_BYTES + 1, 0), ..pod() }).is_some());
        assert!(why(PodFacts { labels: label(1, MAX_LABEL_BYTES + 1), ..pod() }).is_some());
    }

    #[test]
    fn whatever_is_not_true_is_a_refusal_in_words() {
        check("size(request.dnsNames) < 2", Err("rule not met: the message"));
        check("size(request.dnsNames)", Err("is no yes or no but a int"));
        check("workload.unix.cgroup == '/'", Err("cannot be evaluated: No such key: cgroup"));
        check("request.dnsNames[2] == ''", Err("cannot be evaluated: Index out of bounds"));
        check("1 / (workload.unix.uid - 1000) == 0", Err("cannot be evaluated: Division by zero"));
        check("-(-9223372036854775807 - 1) > 0", Err("cannot be evaluated: Overflow"));
        check("(-9223372036854775807 - 1) / -1 > 0", Err("cannot be evaluated: Overflow"));
        check("(-9223372036854775807 - 1) % -1 > 0", Err("cannot be evaluated: Overflow"));
        check("9223372036854775807 + 1 > 0", Err("cannot be evaluated: Overflow"));
        check("workload.unix.uid == 1000 && request.key", Err("cannot be evaluated"));
        check("{request.key: 1, request.key: 2} == {}", Err("cannot be evaluated"));
    }

    #[test]
    fn what_is_not_counted_is_refused_at_load() {
        for (expression, words) in [
            ("", "it is no CEL expression"),
            ("1 +", "it is no CEL expression: at character 4"),
            ("request.dnsName == []", "request has no field \"dnsName\"; it has commonName, organizations, dnsNames"),
            ("workload.uid == 1", "workload has no field \"uid\"; it has unix"),
            ("workload.unix.name == ''", "workload.unix has no field \"name\"; it has uid"),
            ("user == 'web'", "there is no variable \"user\"; there are workload and request"),
            ("request.key.matches('.*')", "there is no function \"matches\"; there are operators, size"),
            ("timestamp('2026-01-01T00:00:00Z') == null", "there is no function \"timestamp\""),
            ("type(1) == int", "there is no function \"type\""),
            ("google.protobuf.Duration{seconds: 1} == null", "there are no message types such as"),
            ("[1].all(@x, true)", "it is no CEL expression"),
            ("request.?key == ''", "it is no CEL expression"),
        ] {
            refused(expression, words);
        }
    }

    #[test]
    fn a_comprehension_variable_hides_a_global_of_its_name() {
        check("['x'].all(request, request == 'x')", Ok(()));
        check("[{'a': 1}].all(workload, workload.a == 1)", Ok(()));
        refused("[1].all(x, true) && x == 1", "there is no variable");
    }

    #[test]
    fn an_expression_has_bounds_in_bytes_brackets_and_depth() {
        let padded = |bytes: usize| format!("true{}", " ".repeat(bytes - 4));
        check(&padded(MAX_EXPRESSION_BYTES), Ok(()));
        refused(&padded(MAX_EXPRESSION_BYTES + 1), "it has 1025 bytes, at most 1024 are allowed");
        let nested = |n: usize| format!("{}true{}", "(".repeat(n), ")".repeat(n));
        check(&nested(MAX_BRACKETS), Ok(()));
        refused(&nested(MAX_BRACKETS + 1), "25 brackets are open at once, at most 24 are allowed");
        // Each sum lies in the next one, and all of them in the comparison.
        let sum = |n: usize| format!("{}1 == {}", "1+".repeat(n - 1), n);
        check(&sum(MAX_DEPTH), Ok(()));
        refused(&sum(MAX_DEPTH + 1), "it is nested deeper than 48");
    }

    #[test]
    fn an_expression_that_could_run_long_is_refused_at_load() {
        check("request.dnsNames.all(a, request.dnsNames.exists_one(b, a == b))", Ok(()));
        let deep =
            "request.dnsNames.all(a, request.dnsNames.all(b, request.dnsNames.all(c, a == b || b == c || a == c)))";
        refused(deep, "steps on the largest request, at most 5000000 are allowed");
        // A list of lists that doubles in every round of text, then is walked: exponential if it were run.
        let doubled = "[[1, 2]].map(a, a + a + a + a).map(b, b + b + b + b).map(c, c + c + c + c).map(d, d + d + d + d)\
                       .map(e, e + e + e + e).map(f, f + f + f + f).map(g, g + g + g + g).map(h, h + h + h + h)[0]\
                       .all(x, x > 0)";
        refused(doubled, "steps on the largest request");
        let text = "['aaaaaaaaaaaaaaaa'].map(a, a + a + a + a + a + a + a + a).map(b, b + b + b + b + b + b + b + b)\
                    .map(c, c + c + c + c + c + c + c + c).map(d, d + d + d + d + d + d + d + d)\
                    .map(e, e + e + e + e + e + e + e + e).map(f, f + f + f + f + f + f + f + f)[0] == ''";
        refused(text, "steps on the largest request");
        refused("workload.unix.supplementaryGids.all(a, workload.unix.supplementaryGids.all(b, a + b > 0))", "steps");
    }

    #[test]
    fn a_caller_outside_the_bounds_of_the_estimate_is_refused() {
        let groups = |n: u32| UnixFacts { supplementary_gids: (0..n).collect(), ..facts() };
        assert!(Variables::new(&Facts::Process(groups(1024)), &terms()).is_ok());
        let error = Variables::new(&Facts::Process(groups(1025)), &terms()).err().unwrap();
        assert_eq!(error, "rules take at most 1024 supplementary groups, the caller has 1025");
        let path = |n: usize| UnixFacts { executable: Some("x".repeat(n)), ..facts() };
        assert!(Variables::new(&Facts::Process(path(4096)), &terms()).is_ok());
        assert_eq!(
            Variables::new(&Facts::Process(path(4097)), &terms()).err().unwrap(),
            "rules take at most 4096 bytes in unix.executable"
        );
    }

    proptest::proptest! {
        #[test]
        fn no_text_breaks_the_compiler(text in "\\PC{0,64}") {
            let _ = Rule::compile(&text, "m", Callers::Processes);
        }

        #[test]
        fn no_expression_breaks_the_evaluation(
            tokens in proptest::collection::vec(
                proptest::sample::select(vec![
                    "workload", ".unix", ".uid", ".user", "request", ".dnsNames", ".key", "[", "]", "(", ")", "{", "}", ",",
                    ":", "?", "+", "-", "*", "/", "%", "==", "<", "!", "&&", "||", " in ", ".all(x,", ".map(x,", "x",
                    ".filter(x,", ".exists_one(x,", "size(", "string(", "int(", ".contains(", "has(", "1", "0", "'a'", "b'a'",
                    "1.5", "7u", "null", "true",
                ]),
                0..16,
            ),
        ) {
            if let Ok(rule) = Rule::compile(&tokens.concat(), "m", Callers::Processes) {
                let _ = rule.check(&Variables::new(&Facts::Process(facts()), &terms()).unwrap());
            }
        }
    }
}
