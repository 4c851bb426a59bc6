//! How long a rule could take, proven from the expression alone.
//!
//! Invariant: no expression that passes [`check`] needs more than [`MAX_COST`] steps for any input within its bounds. CEL
//! has no loops but comprehensions over lists and maps, so every part of an expression gets a size and a cost, and a
//! comprehension multiplies the cost of its body by the most elements its range can have. What is not known here
//! (functions, fields, variables) is refused, so nothing runs that was not counted.

use cel::{
    IdedExpr,
    common::ast::{CallExpr, ComprehensionExpr, EntryExpr, Expr, LiteralValue, SelectExpr},
};

use super::{MAX_FACT_BYTES, MAX_POD_IPS, MAX_RULE_GROUPS, MAX_RULE_LABELS};
use crate::{
    policy::{
        MAX_NAME_BYTES,
        fact::{Callers, MAX_SERVICES},
        selector::{MAX_LABEL_BYTES, MAX_LABEL_KEY_BYTES},
        shown,
    },
    x509::name::{MAX_DNS_NAME_BYTES, MAX_NAMES, MAX_ORGANIZATIONS, MAX_SUBJECT_CHARS, MAX_URI_BYTES},
};

/// Calls, selections and literals inside each other in one expression, after macros are expanded.
pub const MAX_DEPTH: usize = 48;
/// Steps that one expression may need at most: a visited node counts 16, a byte looked at or copied 1.
pub const MAX_COST: u64 = 5_000_000;

const NODE_COST: u64 = 16;
/// Bytes in the text of an IP address.
const MAX_IP_BYTES: usize = 45;

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

const POD_FIELDS: [(&str, Size); 9] = [
    ("namespace", Size::text(MAX_NAME_BYTES)),
    ("pod", Size::text(MAX_NAME_BYTES)),
    ("podUid", Size::text(MAX_NAME_BYTES)),
    ("serviceAccount", Size::text(MAX_NAME_BYTES)),
    ("node", Size::text(MAX_NAME_BYTES)),
    ("labels", LABELS),
    ("namespaceLabels", LABELS),
    ("podIPs", Size::list(MAX_POD_IPS, MAX_IP_BYTES)),
    ("services", Size::list(MAX_SERVICES, MAX_NAME_BYTES)),
];

const LABELS: Size = Size::list(MAX_RULE_LABELS, MAX_LABEL_KEY_BYTES + MAX_LABEL_BYTES);

/// What callers have in rules.
fn fields(callers: Callers) -> &'static [(&'static str, Size)] {
    match callers {
        Callers::Processes => &UNIX_FIELDS,
        Callers::Pods => &POD_FIELDS,
    }
}

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

/// Whether `expression` knows its variables and functions, and stays below [`MAX_COST`]; the error is a sentence.
pub(super) fn check(expression: &IdedExpr, callers: Callers) -> Result<(), String> {
    match (Estimate { callers, scope: Vec::new() }).visit(expression, 0)?.cost {
        cost if cost > MAX_COST => Err(format!(
            "it could take {cost} steps on the largest request, at most {MAX_COST} are allowed; use fewer or less deeply \
             nested comprehensions"
        )),
        _ => Ok(()),
    }
}

/// Walks an expression with the comprehension variables in scope, innermost last.
struct Estimate {
    callers: Callers,
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
            (None, "workload") => Ok(sum(fields(self.callers)).wrapped()),
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
                known(&[(self.callers.section(), self.variable("workload")?.element())], "workload")?
            }
            Expr::Select(outer) if matches!(&outer.operand.expr, Expr::Ident(name) if self.is_global(name, "workload")) =>
            {
                self.visit(&select.operand, depth)?;
                known(fields(self.callers), &format!("workload.{}", self.callers.section()))?
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
