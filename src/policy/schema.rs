//! The CustomResourceDefinition of CertificatePolicy, as `csrd crd` prints it.
//!
//! Invariant: it has the fields that `document` reads and no others (a test compares them), and its bounds are the reader's
//! own constants; it refuses nothing that the reader accepts of a policy about pods. It cannot say everything: patterns,
//! templates and rules are examined by whoever loads the policy, and the status says what was found.

use serde_json::{Map, Value, json};

use super::{
    API_VERSION, KIND, MAX_ENTRIES, MAX_EXPRESSION_BYTES, MAX_HINT_BYTES, MAX_MESSAGE_CHARS, MAX_NAME_BYTES,
    MAX_OFFERS, MAX_PATTERN_BYTES, MAX_RULES, PLURAL,
    lifetime::{self, LIFETIMES},
    selector::{MAX_LABEL_BYTES, MAX_LABEL_KEY_BYTES},
    signers::{MAX_SIGNER_BYTES, REFUSED},
};
use crate::x509::{KeyAlgorithm, Usage};

/// Characters in a network, an address or the slot of the pod's own.
const MAX_NETWORK_CHARS: usize = 64;
/// Characters in a lifetime.
const MAX_LIFETIME_CHARS: usize = 32;

const OBJECT_NAME: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";
const NAMESPACE: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$";
const LABEL_VALUE: &str = "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$";
const LIFETIME: &str = "^([0-9]+h)?([0-9]+m)?([0-9]+s)?$";

/// The definition, ready for the API server.
pub fn custom_resource_definition() -> Value {
    let (group, version) = API_VERSION.split_once('/').expect("API_VERSION is group/version");
    let accepted = |field: &str| format!(".status.conditions[?(@.type==\"Accepted\")].{field}");
    let column = |name: &str, path: &str, kind: &str, priority: u8| json!({"name": name, "jsonPath": path, "type": kind, "priority": priority});
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{PLURAL}.{group}")},
        "spec": {
            "group": group,
            "scope": "Cluster",
            "names": {
                "kind": KIND,
                "listKind": format!("{KIND}List"),
                "plural": PLURAL,
                "singular": KIND.to_lowercase(),
                "shortNames": ["certpol"],
            },
            "versions": [{
                "name": version,
                "served": true,
                "storage": true,
                "subresources": {"status": {}},
                "additionalPrinterColumns": [
                    column("Accepted", &accepted("status"), "string", 0),
                    column("Signer", ".spec.signer", "string", 0),
                    column("Age", ".metadata.creationTimestamp", "date", 0),
                    column("Message", &accepted("message"), "string", 1),
                ],
                "schema": {"openAPIV3Schema": policy()},
            }],
        },
    })
}

fn policy() -> Value {
    let described = "Which workloads may have which certificates. Deny by default: a request is granted only if one policy \
                     allows all of it.";
    let standard = json!({
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
    });
    let mut policy = object(described, &["spec"], [("spec", spec()), ("status", status())]);
    policy["properties"]
        .as_object_mut()
        .expect("it is an object")
        .extend(standard.as_object().cloned().unwrap_or_default());
    policy
}

fn spec() -> Value {
    object(
        "What the policy says.",
        &["match"],
        [
            ("match", r#match()),
            ("signer", signer()),
            ("allow", allow()),
            (
                "rules",
                list(
                    "CEL expressions over `workload` and `request`; each must be true.",
                    MAX_RULES,
                    object(
                        "One rule.",
                        &["expression", "message"],
                        [
                            ("expression", text("An expression that is true or false.", 1, MAX_EXPRESSION_BYTES)),
                            ("message", text("What a caller is told when it is false.", 1, MAX_MESSAGE_CHARS)),
                        ],
                    ),
                ),
            ),
            ("offer", list("What is handed out unasked; the first one to who asks for no name.", MAX_OFFERS, offer())),
        ],
    )
}

/// What is said to a policy in a cluster that has a unix section.
pub(super) const PODS_ONLY: &str =
    "a policy in a cluster is about pods; put one about processes of a host into a file on that host";

fn r#match() -> Value {
    let unix = json!({
        "description": "For files on a host. A policy in a cluster is about pods.",
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": true,
    });
    let mut section = object("Whom the policy is about.", &[], [("kubernetes", kubernetes()), ("unix", unix)]);
    rule(&mut section, "has(self.kubernetes)", "it would match nobody; name a kubernetes section");
    rule(&mut section, "!has(self.unix)", PODS_ONLY);
    section
}

fn kubernetes() -> Value {
    let namespace = text_like("A namespace.", 1, MAX_LABEL_BYTES, NAMESPACE);
    let account = text_like("A ServiceAccount, without its namespace.", 1, MAX_NAME_BYTES, OBJECT_NAME);
    let mut pods = object(
        "Pods. All clauses that are present must hold; in each list one is enough.",
        &[],
        [
            ("namespaces", nonempty(list("Names of namespaces.", MAX_ENTRIES, namespace))),
            ("namespaceSelector", selector("Labels of the namespace; {} is every namespace.")),
            ("podSelector", selector("Labels of the pod.")),
            ("serviceAccounts", nonempty(list("Names of ServiceAccounts.", MAX_ENTRIES, account))),
        ],
    );
    let message = "it needs namespaces or a namespaceSelector ({} is every namespace); labels and ServiceAccounts alone prove \
                   nothing, because whoever may create pods somewhere chooses them";
    rule(&mut pods, "has(self.namespaces) || has(self.namespaceSelector)", message);
    pods
}

fn selector(description: &str) -> Value {
    let value = || text_like("A label's value.", 0, MAX_LABEL_BYTES, LABEL_VALUE);
    let labels = json!({
        "description": "Labels that must be there with these values.",
        "type": "object",
        "maxProperties": MAX_ENTRIES,
        "additionalProperties": value(),
    });
    let mut operator = text("How the label is compared.", 1, MAX_LABEL_BYTES);
    operator["enum"] = json!(["In", "NotIn", "Exists", "DoesNotExist"]);
    let mut requirement = object(
        "One requirement.",
        &["key", "operator"],
        [
            ("key", text("The label's key.", 1, MAX_LABEL_KEY_BYTES)),
            ("operator", operator),
            ("values", list("What In and NotIn compare with.", MAX_ENTRIES, value())),
        ],
    );
    let message = "In and NotIn need at least one value, Exists and DoesNotExist take none";
    rule(
        &mut requirement,
        "(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",
        message,
    );
    let expressions = list("Requirements, which must all hold.", MAX_ENTRIES, requirement);
    object(description, &[], [("matchLabels", labels), ("matchExpressions", expressions)])
}

fn signer() -> Value {
    let described = "Who signs: a signer of certificates.k8s.io, by default csrd.dev/workload.";
    let mut signer = text(described, 1, MAX_SIGNER_BYTES);
    for (name, reason) in REFUSED {
        rule(&mut signer, &format!("self != '{name}'"), &format!("{name} is refused: {reason}"));
    }
    signer
}

fn allow() -> Value {
    let patterns = |described: &str| list(described, MAX_ENTRIES, text("A name or a template.", 1, MAX_PATTERN_BYTES));
    let one_of = |described: &str, names: Vec<&str>| {
        let item = json!({"type": "string", "enum": names});
        list(described, MAX_ENTRIES, item)
    };
    let network = text("A network, an address or {kubernetes.podIP}.", 1, MAX_NETWORK_CHARS);
    object(
        "What may be asked for; what is absent is not allowed.",
        &[],
        [
            ("commonNames", patterns("Common names of the subject.")),
            ("organizations", patterns("Organizations of the subject.")),
            ("dnsNames", patterns("DNS names; `*` is exactly one label.")),
            ("wildcardDnsNames", patterns("DNS names that are wildcards themselves.")),
            ("ipAddresses", list("IP addresses.", MAX_ENTRIES, network)),
            ("uris", patterns("URIs; `*` is exactly one path segment.")),
            ("usages", one_of("Usages, by default those of TLS.", Usage::ALL.map(Usage::name).to_vec())),
            (
                "keys",
                one_of("Kinds of keys, by default all but RSA.", KeyAlgorithm::ALL.map(KeyAlgorithm::name).to_vec()),
            ),
            ("lifetime", lifetimes()),
        ],
    )
}

fn lifetimes() -> Value {
    let one = |described: &str| {
        let mut one = text_like(described, 2, MAX_LIFETIME_CHARS, LIFETIME);
        let [from, to] = [LIFETIMES.start(), LIFETIMES.end()].map(|end| lifetime::print(*end));
        let between = format!("duration(self) >= duration('{from}') && duration(self) <= duration('{to}')");
        rule(&mut one, &between, &format!("it must lie between {from} and {to}"));
        one
    };
    let mut lifetimes = object(
        "How long certificates live, for example 90s, 15m or 1h30m.",
        &[],
        [
            ("min", one("The shortest that may be asked for.")),
            ("default", one("What one gets unasked.")),
            ("max", one("The longest that may be asked for.")),
        ],
    );
    for (less, more) in [("min", "default"), ("default", "max"), ("min", "max")] {
        let ordered =
            format!("!has(self.{less}) || !has(self.{more}) || duration(self.{less}) <= duration(self.{more})");
        rule(&mut lifetimes, &ordered, &format!("{less} is more than {more}"));
    }
    lifetimes
}

fn offer() -> Value {
    let name = text("A whole name, or a template of one.", 1, MAX_PATTERN_BYTES);
    let mut offer = object(
        "One certificate.",
        &[],
        [
            ("spiffeId", text_like("The SPIFFE ID, or a template of it.", 1, MAX_PATTERN_BYTES, "^spiffe://")),
            ("dnsNames", list("DNS names beside it.", MAX_ENTRIES - 1, name)),
            ("hint", text("Tells a workload with several identities which one this is.", 0, MAX_HINT_BYTES)),
        ],
    );
    let names = "has(self.spiffeId) || (has(self.dnsNames) && size(self.dnsNames) > 0)";
    rule(&mut offer, names, "it names nothing; it needs spiffeId or dnsNames");
    offer
}

/// Written by the controller; see the conventions of the Kubernetes API for conditions.
fn status() -> Value {
    let words = |described: &str| json!({"description": described, "type": "string"});
    let generation =
        || json!({"description": "The generation that was examined.", "type": "integer", "format": "int64"});
    let condition = object(
        "One condition.",
        &["type", "status", "reason", "message", "lastTransitionTime"],
        [
            ("type", words("Accepted: whether this generation is in force.")),
            ("status", json!({"type": "string", "enum": ["True", "False", "Unknown"]})),
            ("reason", words("Why, in one word.")),
            ("message", words("Why, and which generation is in force instead.")),
            ("observedGeneration", generation()),
            ("lastTransitionTime", json!({"type": "string", "format": "date-time"})),
        ],
    );
    let conditions = json!({
        "description": "What was found when the policy was examined.",
        "type": "array",
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": condition,
    });
    object("What became of it.", &[], [("conditions", conditions), ("observedGeneration", generation())])
}

fn object<const N: usize>(description: &str, required: &[&str], properties: [(&str, Value); N]) -> Value {
    let properties: Map<_, _> = properties.into_iter().map(|(name, schema)| (name.to_owned(), schema)).collect();
    let mut object = json!({"description": description, "type": "object", "properties": properties});
    if !required.is_empty() {
        object["required"] = json!(required);
    }
    object
}

fn list(description: &str, max_items: usize, items: Value) -> Value {
    json!({
        "description": description,
        "type": "array",
        "maxItems": max_items,
        "x-kubernetes-list-type": "atomic",
        "items": items,
    })
}

fn nonempty(mut list: Value) -> Value {
    list["minItems"] = json!(1);
    list
}

/// Bounds of the reader are in bytes, those of a schema in characters, which are never more.
fn text(description: &str, min_length: usize, max_length: usize) -> Value {
    let mut text = json!({"description": description, "type": "string", "maxLength": max_length});
    if min_length > 0 {
        text["minLength"] = json!(min_length);
    }
    text
}

fn text_like(description: &str, min_length: usize, max_length: usize, pattern: &str) -> Value {
    let mut text = text(description, min_length, max_length);
    text["pattern"] = json!(pattern);
    text
}

/// Adds a validation in CEL.
fn rule(schema: &mut Value, rule: &str, message: &str) {
    let mut rules = schema["x-kubernetes-validations"].as_array().cloned().unwrap_or_default();
    rules.push(json!({"rule": rule, "message": message}));
    schema["x-kubernetes-validations"] = rules.into();
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::policy::{EMBEDDED, PolicySet, Source};

    /// The field names that the reader lists when it meets an unknown one beside these.
    fn read_fields(path: &[&str]) -> BTreeSet<String> {
        let mut document = json!({"oops": 1});
        for step in path.iter().rev() {
            document = if *step == "[]" { json!([document]) } else { json!({*step: document}) };
        }
        let source = Source { origin: "p.yaml".to_owned(), text: document.to_string() };
        let problem = PolicySet::parse(&[source], EMBEDDED).unwrap_err().remove(0).message;
        let expected =
            problem.strip_prefix("unknown field `oops`, expected ").unwrap_or_else(|| panic!("{path:?}: {problem}"));
        let names = expected.trim_start_matches("one of ").split([',', ' ']).map(|name| name.trim_matches('`'));
        names.filter(|name| !name.is_empty() && *name != "or").map(str::to_owned).collect()
    }

    /// Every object below `schema` that has fields of its own, with the path to it.
    fn objects(schema: &Value, path: Vec<&'static str>, found: &mut Vec<(Vec<&'static str>, BTreeSet<String>)>) {
        if let Some(items) = schema.get("items") {
            return objects(items, [path, vec!["[]"]].concat(), found);
        }
        let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return };
        found.push((path.clone(), properties.keys().cloned().collect()));
        for (name, schema) in properties {
            let name: &'static str = name.clone().leak();
            objects(schema, [path.clone(), vec![name]].concat(), found);
        }
    }

    #[test]
    fn the_schema_has_the_fields_that_the_reader_reads() {
        let definition = custom_resource_definition();
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let mut found = Vec::new();
        objects(schema, Vec::new(), &mut found);
        assert!(found.len() > 10, "{found:#?}");
        for (path, mut fields) in found {
            match path.as_slice() {
                // The API server's, and the controller's, which no file has.
                [] => assert!(fields.remove("status")),
                ["status", ..] => continue,
                _ => {}
            }
            assert_eq!(read_fields(&path), fields, "{path:?}");
        }
    }

    #[test]
    fn every_list_and_text_of_a_policy_has_a_bound() {
        fn check(path: &str, schema: &Value) {
            let bounded = match schema["type"].as_str() {
                Some("string") => schema.get("maxLength").is_some() || schema.get("enum").is_some(),
                Some("array") => schema.get("maxItems").is_some(),
                Some("object") => schema.get("additionalProperties").is_none() || schema.get("maxProperties").is_some(),
                other => panic!("{path}: {other:?}"),
            };
            assert!(bounded, "{path}: {schema}");
            assert!(schema.get("description").is_some() || schema.get("enum").is_some(), "{path}: no description");
            for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
                check(&format!("{path}.{name}"), schema);
            }
            for below in ["items", "additionalProperties"].iter().filter_map(|key| schema.get(key)) {
                check(path, below);
            }
        }
        check("spec", &spec());
    }
}
