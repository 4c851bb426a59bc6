//! Rules: CEL expressions over `workload` and `request`, compiled and proven short at load.
//!
//! Invariant: a [`Rule`] that exists needs at most [`MAX_COST`] steps for any input within the bounds of an ask. CEL has
//! no loops but comprehensions over lists, so an upper bound follows from the expression alone: every part of it gets a
//! size and a cost, a comprehension multiplies the cost of its body by the most elements its range can have.
//! What the estimate does not know (functions, fields, variables) is refused, so nothing runs that was not counted.
//!
//! Left out: `matches` (`allow` has patterns, and a regular expression's cost is not visible in its size), timestamps and
//! durations (`request.lifetimeSeconds` is a number).

use std::sync::{Arc, LazyLock};

use cel::{
    Context, Env, IdedExpr, Value,
    common::ast::{CallExpr, ComprehensionExpr, EntryExpr, Expr, LiteralValue, SelectExpr},
    parser::Parser,
};

use super::{Terms, clipped, shown};
use crate::{
    attest::{Facts, UnixFacts},
    x509::name::{MAX_DNS_NAME_BYTES, MAX_NAMES, MAX_ORGANIZATIONS, MAX_SUBJECT_CHARS, MAX_URI_BYTES},
};

/// Bytes in one expression.
pub const MAX_EXPRESSION_BYTES: usize = 1024;
/// Calls, selections and literals inside each other in one expression, after macros are expanded.
pub const MAX_DEPTH: usize = 48;
/// Steps that one expression may need at most: a visited node counts 16, a byte looked at or copied 1.
pub const MAX_COST: u64 = 5_000_000;
/// Supplementary groups of a caller that rules can see; a caller with more is refused by every rule.
pub const MAX_RULE_GROUPS: usize = 1024;

const NODE_COST: u64 = 16;
/// Brackets inside each other, counted before parsing because the parser descends once for each.
const MAX_BRACKETS: usize = 24;
/// Stack of the thread that parses one expression; virtual memory, given back when it ends.
const PARSER_STACK_BYTES: usize = 16 << 20;
/// Bytes in any one text among the facts (PATH_MAX, limits.h).
const MAX_FACT_BYTES: usize = 4096;
/// Bytes in the text of an IP address.
const MAX_IP_BYTES: usize = 45;
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
    /// Compiles `expression`; the error is a sentence for the policy's author.
    pub(super) fn compile(expression: &str, message: &str) -> Result<Self, String> {
        if expression.len() > MAX_EXPRESSION_BYTES {
            return Err(format!("it has {} bytes, at most {MAX_EXPRESSION_BYTES} are allowed", expression.len()));
        }
        check_brackets(expression)?;
        let (expression, text) = (parse_apart(expression)?, expression.to_owned());
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
            Facts::Process(facts) => ("unix", unix(facts)?),
            Facts::Pod(_) => return Err("rules know nothing of pods".to_owned()),
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

fn request(terms: &Terms) -> Value {
    let list = |texts: &mut dyn Iterator<Item = String>| Value::List(texts.map(Value::from).collect::<Vec<_>>().into());
    let names = &terms.names;
    map([
        ("commonName", Value::from(names.common_name.clone().unwrap_or_default())),
        ("organizations", list(&mut names.organizations.iter().cloned())),
        ("dnsNames", list(&mut names.dns.iter().map(ToString::to_string))),
        ("ipAddresses", list(&mut names.ips.iter().map(ToString::to_string))),
        ("uris", list(&mut names.uris.iter().cloned())),
        ("usages", list(&mut terms.usages.iter().map(|usage| usage.name().to_owned()))),
        ("key", Value::from(terms.key.name())),
        ("lifetimeSeconds", Value::Int(i64::try_from(terms.lifetime.as_secs()).unwrap_or(i64::MAX))),
        ("signer", Value::from(terms.signer.clone())),
    ])
}

fn map(entries: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    let entries = entries.into_iter().map(|(name, value)| (name.to_owned(), value));
    Value::from(entries.collect::<std::collections::HashMap<_, _>>())
}

/// An upper bound of what a value can be.
#[derive(Clone, Copy, Debug)]
struct Size {
    /// All of it.
    bytes: u64,
    /// Elements, when it is a list or a map.
    count: u64,
    /// The largest element.
    item: u64,
}

impl Size {
    const SCALAR: Self = Self::text(0);

    const fn text(bytes: usize) -> Self {
        Self::list(1, bytes)
    }

    const fn list(count: usize, item: usize) -> Self {
        let item = item as u64 + 16;
        Self { bytes: item.saturating_mul(count as u64), count: count as u64, item }
    }

    /// Any element; its own elements are not known, so each of its bytes may be one.
    fn element(self) -> Self {
        Self { bytes: self.item, count: self.item, item: self.item }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_add(other.bytes),
            count: self.count.saturating_add(other.count),
            item: self.item.max(other.item),
        }
    }

    fn max(self, other: Self) -> Self {
        Self { bytes: self.bytes.max(other.bytes), count: self.count.max(other.count), item: self.item.max(other.item) }
    }

    fn times(self, n: u64) -> Self {
        Self { bytes: self.bytes.saturating_mul(n), count: self.count.saturating_mul(n), item: self.item }
    }

    /// As one element of a list or map.
    fn wrapped(self) -> Self {
        Self { bytes: self.bytes.saturating_add(16), count: 1, item: self.bytes }
    }
}

/// An upper bound of an expression's value and of the steps to it.
#[derive(Clone, Copy)]
struct Bound {
    size: Size,
    cost: u64,
}

const UNIX_FIELDS: [(&str, Size); 9] = [
    ("uid", Size::SCALAR),
    ("gid", Size::SCALAR),
    ("supplementaryGids", Size::list(MAX_RULE_GROUPS, 8)),
    ("user", Size::text(MAX_FACT_BYTES)),
    ("group", Size::text(MAX_FACT_BYTES)),
    ("executable", Size::text(MAX_FACT_BYTES)),
    ("executableSha256", Size::text(MAX_FACT_BYTES)),
    ("systemdUnit", Size::text(MAX_FACT_BYTES)),
    ("cgroup", Size::text(MAX_FACT_BYTES)),
];

const REQUEST_FIELDS: [(&str, Size); 9] = [
    ("commonName", Size::text(4 * MAX_SUBJECT_CHARS)),
    ("organizations", Size::list(MAX_ORGANIZATIONS, 4 * MAX_SUBJECT_CHARS)),
    ("dnsNames", Size::list(MAX_NAMES, MAX_DNS_NAME_BYTES)),
    ("ipAddresses", Size::list(MAX_NAMES, MAX_IP_BYTES)),
    ("uris", Size::list(MAX_NAMES, MAX_URI_BYTES)),
    ("usages", Size::list(4, 32)),
    ("key", Size::text(32)),
    ("lifetimeSeconds", Size::SCALAR),
    ("signer", Size::text(MAX_FACT_BYTES)),
];

/// What operators and functions cost and return; all of them look at each byte of their arguments at most once.
enum Returns {
    Scalar,
    Sum,
    Either,
    Element,
    /// As `Scalar`, without looking at the bytes.
    Count,
}

fn returns(function: &str) -> Option<Returns> {
    Some(match function {
        "_&&_" | "_||_" | "!_" | "@not_strictly_false" | "-_" | "_-_" | "_*_" | "_/_" | "_%_" => Returns::Scalar,
        "_==_" | "_!=_" | "_<_" | "_<=_" | "_>_" | "_>=_" | "@in" => Returns::Scalar,
        "contains" | "startsWith" | "endsWith" | "int" => Returns::Scalar,
        "_+_" | "string" => Returns::Sum,
        "_?_:_" => Returns::Either,
        "_[_]" => Returns::Element,
        "size" => Returns::Count,
        _ => return None,
    })
}

/// Walks an expression with the comprehension variables in scope, innermost last.
#[derive(Default)]
struct Estimate {
    scope: Vec<(String, Size)>,
}

impl Estimate {
    fn visit(&mut self, expression: &IdedExpr, depth: usize) -> Result<Bound, String> {
        if depth > MAX_DEPTH {
            return Err(format!("it is nested deeper than {MAX_DEPTH}"));
        }
        let depth = depth + 1;
        let leaf = |size| Ok(Bound { size, cost: NODE_COST });
        match &expression.expr {
            Expr::Literal(LiteralValue::String(text)) => leaf(Size::text(text.inner().len())),
            Expr::Literal(LiteralValue::Bytes(bytes)) => leaf(Size::text(bytes.inner().len())),
            Expr::Literal(_) => leaf(Size::SCALAR),
            Expr::Ident(name) => leaf(self.variable(name)?),
            Expr::Select(select) => self.select(select, depth),
            Expr::Call(call) => self.call(call, depth),
            Expr::Comprehension(comprehension) => self.comprehension(comprehension, depth),
            Expr::List(list) => self.literal(list.elements.iter().map(|element| (None, element)), depth),
            Expr::Map(map) => {
                let entries = map.entries.iter().map(|entry| match &entry.expr {
                    EntryExpr::MapEntry(entry) => Ok((Some(&entry.key), &entry.value)),
                    EntryExpr::StructField(_) => Err("a map literal holds key: value".to_owned()),
                });
                let entries = entries.collect::<Result<Vec<_>, _>>()?;
                self.literal(entries.into_iter(), depth)
            }
            Expr::Struct(message) => Err(format!("there are no message types such as {}", shown(&message.type_name))),
            Expr::Unspecified => Err("it is incomplete".to_owned()),
        }
    }

    fn variable(&self, name: &str) -> Result<Size, String> {
        let sum = |fields: &[(&str, Size)]| fields.iter().fold(Size::SCALAR, |sum, (_, size)| sum.plus(size.wrapped()));
        match (self.scope.iter().rev().find(|(variable, _)| variable == name), name) {
            (Some((_, size)), _) => Ok(*size),
            (None, "request") => Ok(sum(&REQUEST_FIELDS)),
            (None, "workload") => Ok(sum(&UNIX_FIELDS).wrapped()),
            (None, _) => Err(format!("there is no variable {}; there are workload and request", shown(name))),
        }
    }

    /// Selections of known fields are checked and exact, so that a misspelt one is found at load.
    fn select(&mut self, select: &SelectExpr, depth: usize) -> Result<Bound, String> {
        let known =
            |fields: &[(&'static str, Size)], of: &str| match fields.iter().find(|(name, _)| *name == select.field) {
                Some((_, size)) => Ok(Bound { size: *size, cost: NODE_COST }),
                None => {
                    let names: Vec<_> = fields.iter().map(|(name, _)| *name).collect();
                    Err(format!("{of} has no field {}; it has {}", shown(&select.field), names.join(", ")))
                }
            };
        let bound = match &select.operand.expr {
            Expr::Ident(name) if self.is_global(name, "request") => known(&REQUEST_FIELDS, "request")?,
            Expr::Ident(name) if self.is_global(name, "workload") => {
                known(&[("unix", self.variable("workload")?.element())], "workload")?
            }
            Expr::Select(outer) if matches!(&outer.operand.expr, Expr::Ident(name) if self.is_global(name, "workload")) =>
            {
                self.visit(&select.operand, depth)?;
                known(&UNIX_FIELDS, "workload.unix")?
            }
            _ => {
                let operand = self.visit(&select.operand, depth)?;
                Bound { size: operand.size.element(), cost: operand.cost.saturating_add(NODE_COST) }
            }
        };
        Ok(if select.test { Bound { size: Size::SCALAR, ..bound } } else { bound })
    }

    fn is_global(&self, name: &str, global: &str) -> bool {
        name == global && self.scope.iter().all(|(variable, _)| variable != name)
    }

    fn call(&mut self, call: &CallExpr, depth: usize) -> Result<Bound, String> {
        let Some(returns) = returns(&call.func_name) else {
            return Err(format!(
                "there is no function {}; there are operators, size, contains, startsWith, endsWith, string, int, has, \
                 all, exists, exists_one, filter and map",
                shown(&call.func_name)
            ));
        };
        let mut cost = NODE_COST;
        let mut sizes = Vec::with_capacity(3);
        for argument in call.target.as_deref().into_iter().chain(&call.args) {
            let bound = self.visit(argument, depth)?;
            cost = cost.saturating_add(bound.cost);
            sizes.push(bound.size);
        }
        let looked_at = sizes.iter().fold(0_u64, |sum, size| sum.saturating_add(size.bytes));
        let first = sizes.first().copied().unwrap_or(Size::SCALAR);
        let (size, touched) = match returns {
            Returns::Scalar => (Size::SCALAR, looked_at),
            Returns::Count => (Size::SCALAR, 0),
            Returns::Sum => (sizes.iter().fold(Size::text(32), |sum, size| sum.plus(*size)), looked_at),
            Returns::Either => (sizes.iter().skip(1).fold(Size::SCALAR, |most, size| most.max(*size)), 0),
            Returns::Element => (first.element(), first.item),
        };
        Ok(Bound { size, cost: cost.saturating_add(touched) })
    }

    fn literal<'e>(
        &mut self,
        entries: impl Iterator<Item = (Option<&'e IdedExpr>, &'e IdedExpr)>,
        depth: usize,
    ) -> Result<Bound, String> {
        let mut sum = Bound { size: Size { bytes: 16, count: 0, item: 0 }, cost: NODE_COST };
        for (key, value) in entries {
            let mut entry = self.visit(value, depth)?;
            if let Some(key) = key {
                let key = self.visit(key, depth)?;
                entry = Bound { size: entry.size.plus(key.size), cost: entry.cost.saturating_add(key.cost) };
            }
            sum.size = sum.size.plus(entry.size.wrapped());
            sum.cost = sum.cost.saturating_add(entry.cost).saturating_add(entry.size.bytes);
        }
        Ok(sum)
    }

    /// The accumulator of a macro only ever has something added to it, so it grows by at most the size of one step, taken
    /// with its initial value, in each round.
    fn comprehension(&mut self, comprehension: &ComprehensionExpr, depth: usize) -> Result<Bound, String> {
        let range = self.visit(&comprehension.iter_range, depth)?;
        let init = self.visit(&comprehension.accu_init, depth)?;
        let rounds = range.size.count;
        self.scope.push((comprehension.accu_var.clone(), init.size));
        self.scope.push((comprehension.iter_var.clone(), range.size.element()));
        let condition = self.visit(&comprehension.loop_cond, depth);
        let step = self.visit(&comprehension.loop_step, depth);
        self.scope.pop();
        let (condition, step) = (condition?, step?);
        let grown = init.size.plus(step.size.times(rounds));
        if let Some((_, accumulator)) = self.scope.last_mut() {
            *accumulator = grown;
        }
        let result = self.visit(&comprehension.result, depth);
        self.scope.pop();
        let result = result?;
        let round = condition.cost.saturating_add(step.cost).saturating_add(range.size.item).saturating_add(NODE_COST);
        let costs = [range.cost, init.cost, round.saturating_mul(rounds), grown.bytes, result.cost];
        Ok(Bound { size: result.size, cost: costs.iter().fold(0, |sum, cost| sum.saturating_add(*cost)) })
    }
}

/// Parses and estimates on a thread of its own: the parser's descent takes about 150 KiB of stack for each open bracket in
/// a build without optimization, more than a worker thread has to give. A panic in the parser ends there, too.
fn parse_apart(expression: &str) -> Result<IdedExpr, String> {
    std::thread::scope(|scope| {
        let parser = std::thread::Builder::new().stack_size(PARSER_STACK_BYTES);
        let parsed =
            parser.spawn_scoped(scope, || parse(expression)).map_err(|error| format!("no thread for it: {error}"))?;
        parsed.join().unwrap_or_else(|_| Err("the CEL parser failed on it".to_owned()))
    })
}

fn parse(expression: &str) -> Result<IdedExpr, String> {
    let parsed = Parser::default().max_recursion_depth(MAX_DEPTH as u16).parse(expression).map_err(|errors| {
        let first = errors.errors.first();
        let (message, at) = first.map_or(("no expression", 0), |error| (error.msg.as_str(), error.pos.1));
        format!("it is no CEL expression: at character {at}: {}", clipped(message.to_owned(), MAX_ERROR_CHARS))
    })?;
    match Estimate::default().visit(&parsed, 0)?.cost {
        cost if cost > MAX_COST => Err(format!(
            "it could take {cost} steps on the largest request, at most {MAX_COST} are allowed; use fewer or less deeply \
             nested comprehensions"
        )),
        _ => Ok(parsed),
    }
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
        let rule = Rule::compile(expression, "the message").unwrap_or_else(|error| panic!("{expression}: {error}"));
        let verdict = rule.check(&Variables::new(&Facts::Process(facts()), &terms()).unwrap());
        match expected {
            Ok(()) => assert_eq!(verdict, Ok(()), "{expression}"),
            Err(words) => assert!(verdict.as_ref().unwrap_err().contains(words), "{expression}: {verdict:?}"),
        }
    }

    fn refused(expression: &str, words: &str) {
        let error = Rule::compile(expression, "m").expect_err(expression);
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
            let _ = Rule::compile(&text, "m");
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
            if let Ok(rule) = Rule::compile(&tokens.concat(), "m") {
                let _ = rule.check(&Variables::new(&Facts::Process(facts()), &terms()).unwrap());
            }
        }
    }
}
