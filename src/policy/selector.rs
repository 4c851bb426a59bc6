//! Kubernetes label selectors: `matchLabels` and `matchExpressions`, with the meaning that Kubernetes gives them.
//!
//! Invariant: all requirements must hold; a selector without any selects everything. `NotIn` and `DoesNotExist` also hold
//! for an object that has no such label. Keys and values are checked as the API server checks them, so that no
//! requirement waits for a label that cannot be.

use std::collections::BTreeMap;

use serde_saphyr::Spanned;

use super::{
    check::{Check, MAX_ENTRIES},
    document, is_object_name, shown,
};

/// Bytes in a label's value, and in the part of its key after the slash (Kubernetes, "Labels and Selectors").
pub(super) const MAX_LABEL_BYTES: usize = 63;
/// Bytes in a label's key: a DNS subdomain, a slash and a name.
pub(super) const MAX_LABEL_KEY_BYTES: usize = super::MAX_NAME_BYTES + 1 + MAX_LABEL_BYTES;

/// A checked selector.
#[derive(Debug)]
pub(super) struct Selector(Vec<Requirement>);

#[derive(Debug)]
struct Requirement {
    key: String,
    operator: Operator,
}

#[derive(Debug)]
enum Operator {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
}

impl Selector {
    /// The first requirement that `labels` do not meet, in words. `whose` and `field` name the labels and the selector;
    /// what is told of the selector is the key, never the values it asks for.
    pub(super) fn mismatch(&self, labels: &BTreeMap<String, String>, whose: &str, field: &str) -> Option<String> {
        self.0.iter().find_map(|Requirement { key, operator }| {
            let (value, key) = (labels.get(key), shown(key));
            match (operator, value) {
                (Operator::In(values), Some(value)) if !values.contains(value) => {
                    Some(format!("{whose} label {key} is {}, which its {field} does not ask for", shown(value)))
                }
                (Operator::In(_) | Operator::Exists, None) => {
                    Some(format!("its {field} asks for {whose} label {key}, which is not there"))
                }
                (Operator::NotIn(values), Some(value)) if values.contains(value) => {
                    Some(format!("{whose} label {key} is {}, which its {field} excludes", shown(value)))
                }
                (Operator::DoesNotExist, Some(_)) => {
                    Some(format!("{whose} label {key} is there, which its {field} excludes"))
                }
                _ => None,
            }
        })
    }
}

impl Check<'_> {
    pub(super) fn selector(&mut self, selector: &document::Selector, field: &str) -> Selector {
        let mut requirements = Vec::new();
        if let Some(labels) = &selector.match_labels {
            let field = format!("{field}.matchLabels");
            let count = labels.value.len();
            if count > MAX_ENTRIES {
                self.problem(labels, &field, format!("{count} entries, at most {MAX_ENTRIES} are allowed"));
            }
            for (key, value) in labels.value.iter().take(MAX_ENTRIES) {
                self.text(value, &field, check_key(key));
                self.text(value, &field, check_value(&value.value).map_err(|why| format!("{key}: {why}")));
                let operator = Operator::In(vec![value.value.clone()]);
                requirements.push(Requirement { key: key.clone(), operator });
            }
        }
        let field = format!("{field}.matchExpressions");
        requirements.extend(self.list(&selector.match_expressions, &field, MAX_ENTRIES, Self::requirement));
        Selector(requirements)
    }

    fn requirement(&mut self, at: &Spanned<document::Requirement>, field: &str) -> Option<Requirement> {
        let document::Requirement { key, operator, values } = &at.value;
        self.text(key, &format!("{field}.key"), check_key(&key.value));
        let values_field = format!("{field}.values");
        let listed = self.list(values, &values_field, MAX_ENTRIES, |check, at, field| {
            check.text(at, field, check_value(&at.value).map(|()| at.value.clone()))
        });
        let some = values.as_ref().is_some_and(|values| !values.is_empty());
        let operator = match (operator.value.as_str(), some) {
            ("In", true) => Operator::In(listed),
            ("NotIn", true) => Operator::NotIn(listed),
            ("Exists", false) => Operator::Exists,
            ("DoesNotExist", false) => Operator::DoesNotExist,
            ("In" | "NotIn", false) => {
                self.problem(at, &values_field, format!("{} needs at least one value", operator.value));
                return None;
            }
            ("Exists" | "DoesNotExist", true) => {
                self.problem(at, &values_field, format!("{} takes no values", operator.value));
                return None;
            }
            _ => {
                let message = "it must be one of In, NotIn, Exists, DoesNotExist";
                self.problem(operator, &format!("{field}.operator"), message);
                return None;
            }
        };
        Some(Requirement { key: key.value.clone(), operator })
    }
}

/// A qualified name: an optional DNS subdomain and a slash, then a label's value that is not empty.
fn check_key(key: &str) -> Result<(), String> {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    match prefix.is_none_or(is_object_name) && !name.is_empty() && is_value(name) {
        true => Ok(()),
        false => Err(format!("{} is no label key such as app or example.org/team", shown(key))),
    }
}

fn check_value(value: &str) -> Result<(), String> {
    match is_value(value) {
        true => Ok(()),
        false => Err(format!(
            "a label's value has at most {MAX_LABEL_BYTES} letters, digits, '-', '_' and '.', and begins and ends with a \
             letter or digit"
        )),
    }
}

fn is_value(text: &str) -> bool {
    let at_end = |c: Option<char>| c.is_none_or(|c| c.is_ascii_alphanumeric());
    text.len() <= MAX_LABEL_BYTES
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        && at_end(text.chars().next())
        && at_end(text.chars().next_back())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{PolicySet, Problem, Source, signers::EMBEDDED};

    /// The selector's problems, or the mismatch of these labels.
    fn select(selector: &str, labels: &[(&str, &str)]) -> Result<Option<String>, String> {
        let text = format!(
            "apiVersion: csrd.dev/v1alpha1\nkind: CertificatePolicy\nmetadata: {{name: a}}\nspec:\n  match: \
             {{kubernetes: {{namespaces: [a], podSelector: {selector}}}}}\n"
        );
        let set = PolicySet::parse(&[Source { origin: "p.yaml".to_owned(), text }], EMBEDDED);
        let lines = |problems: Vec<Problem>| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        let set = set.map_err(lines)?;
        let crate::policy::whom::Whom::Pods(pods) = &set.policies[0].whom else { panic!("it matches pods") };
        let labels = labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        Ok(pods.pod_selector.as_ref().unwrap().mismatch(&labels, "pod", "podSelector"))
    }

    #[test]
    fn requirements_mean_what_they_mean_to_kubernetes() {
        const WEB: &[(&str, &str)] = &[("app", "web"), ("example.org/tier", "")];
        for (selector, selects) in [
            ("{}", true),
            ("{matchLabels: {}, matchExpressions: []}", true),
            ("{matchLabels: {app: web}}", true),
            ("{matchLabels: {app: web, example.org/tier: ''}}", true),
            ("{matchLabels: {app: db}}", false),
            ("{matchLabels: {app: web, team: a}}", false),
            ("{matchExpressions: [{key: app, operator: In, values: [db, web]}]}", true),
            ("{matchExpressions: [{key: app, operator: In, values: [db]}]}", false),
            ("{matchExpressions: [{key: team, operator: In, values: ['']}]}", false),
            ("{matchExpressions: [{key: app, operator: NotIn, values: [db]}]}", true),
            ("{matchExpressions: [{key: app, operator: NotIn, values: [db, web]}]}", false),
            ("{matchExpressions: [{key: team, operator: NotIn, values: [a]}]}", true),
            ("{matchExpressions: [{key: app, operator: Exists}]}", true),
            ("{matchExpressions: [{key: team, operator: Exists, values: []}]}", false),
            ("{matchExpressions: [{key: team, operator: DoesNotExist}]}", true),
            ("{matchExpressions: [{key: app, operator: DoesNotExist}]}", false),
            ("{matchLabels: {app: web}, matchExpressions: [{key: app, operator: DoesNotExist}]}", false),
        ] {
            assert_eq!(select(selector, WEB).unwrap().is_none(), selects, "{selector}");
        }
    }

    #[test]
    fn a_mismatch_tells_the_key_and_the_pods_own_value() {
        let why = |selector: &str| select(selector, &[("app", "web")]).unwrap().unwrap();
        let expression = |operator: &str| format!("{{matchExpressions: [{{key: app, operator: {operator}}}]}}");
        assert_eq!(
            why("{matchLabels: {app: db}}"),
            r#"pod label "app" is "web", which its podSelector does not ask for"#
        );
        assert_eq!(why("{matchLabels: {team: a}}"), r#"its podSelector asks for pod label "team", which is not there"#);
        let excluded = why(&expression("NotIn, values: [web]"));
        assert_eq!(excluded, r#"pod label "app" is "web", which its podSelector excludes"#);
        assert_eq!(why(&expression("DoesNotExist")), r#"pod label "app" is there, which its podSelector excludes"#);
    }

    #[test]
    fn what_no_label_can_be_is_refused() {
        let long = |n: usize| "a".repeat(n);
        let prefix = [long(63), long(63), long(63), long(61)].join(".");
        let field = "p.yaml:5: spec.match.kubernetes.podSelector";
        for (selector, problem) in [
            (format!("{{matchLabels: {{{prefix}/{}: {}}}}}", long(63), long(63)), None),
            (
                format!("{{matchLabels: {{app: {}}}}}", long(64)),
                Some("matchLabels: app: a label's value has at most 63"),
            ),
            (format!("{{matchLabels: {{{}: a}}}}", long(64)), Some("matchLabels: \"aaaa")),
            (format!("{{matchLabels: {{a{prefix}/a: a}}}}"), Some("is no label key")),
            ("{matchLabels: {a/b/c: a}}".to_owned(), Some("matchLabels: \"a/b/c\" is no label key such as app")),
            ("{matchLabels: {'': a}}".to_owned(), Some("matchLabels: \"\" is no label key")),
            ("{matchLabels: {/a: a}}".to_owned(), Some("is no label key")),
            ("{matchLabels: {app: -a}}".to_owned(), Some("a label's value")),
            ("{matchLabels: {app: 'a b'}}".to_owned(), Some("a label's value")),
            ("{matchExpressions: [{key: A/b, operator: Exists}]}".to_owned(), Some("matchExpressions[0].key: \"A/b\"")),
            ("{matchExpressions: [{key: a, operator: In}]}".to_owned(), Some("values: In needs at least one value")),
            (
                "{matchExpressions: [{key: a, operator: NotIn, values: []}]}".to_owned(),
                Some("values: NotIn needs at least one value"),
            ),
            (
                "{matchExpressions: [{key: a, operator: Exists, values: [a]}]}".to_owned(),
                Some("matchExpressions[0].values: Exists takes no values"),
            ),
            (
                "{matchExpressions: [{key: a, operator: in, values: [a]}]}".to_owned(),
                Some("operator: it must be one of In, NotIn, Exists, DoesNotExist"),
            ),
            (
                "{matchExpressions: [{key: a, operator: In, values: [a_]}]}".to_owned(),
                Some("matchExpressions[0].values[0]: a label's value"),
            ),
        ] {
            match (select(&selector, &[]), problem) {
                (Ok(_), None) => {}
                (Err(found), Some(words)) => {
                    assert!(found.starts_with(field) && found.contains(words), "{selector}: {found}");
                }
                (found, _) => panic!("{selector}: {found:?}"),
            }
        }
    }

    #[test]
    fn a_selector_has_bounds() {
        let labels = |n: usize| {
            let entries: Vec<_> = (0..n).map(|i| format!("a{i}: b")).collect();
            format!("{{matchLabels: {{{}}}}}", entries.join(", "))
        };
        let expressions = |n: usize| format!("{{matchExpressions: [{}]}}", "{key: a, operator: Exists}, ".repeat(n));
        let values =
            |n: usize| format!("{{matchExpressions: [{{key: a, operator: In, values: [{}]}}]}}", "a, ".repeat(n));
        for of in [&labels as &dyn Fn(usize) -> String, &expressions, &values] {
            assert!(select(&of(MAX_ENTRIES), &[]).is_ok());
            let problem = select(&of(MAX_ENTRIES + 1), &[]).unwrap_err();
            assert!(problem.ends_with("65 entries, at most 64 are allowed"), "{problem}");
        }
    }
}
