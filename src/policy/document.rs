//! The `CertificatePolicy` document as it is written: YAML text in, plain values with their line numbers out.
//!
//! Invariant: an unknown or repeated key anywhere is an error, and reading costs no more than a small multiple of the
//! text: size, nesting, aliases and documents are bounded. Says nothing about meaning; `compile` judges that. The shape
//! is a structural one (no untyped values), so that it can become a Kubernetes CRD as it is.

use std::{collections::BTreeMap, fmt};

use serde::Deserialize;
use serde_saphyr::{Options, Spanned, options::MergeKeyPolicy};

use super::clipped;
use crate::text::Printable;

/// Bytes in one policy file: 1 MiB.
pub const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Documents in one policy file.
pub const MAX_DOCUMENTS: usize = 256;
/// Mappings and lists inside each other; the document's own shape needs 8.
const MAX_DEPTH: usize = 16;
/// YAML events that aliases may replay in one file.
const MAX_REPLAYED_EVENTS: usize = 10_000;
/// Characters of a YAML error that are kept.
const MAX_SYNTAX_CHARS: usize = 300;

/// The `apiVersion` this build reads.
pub const API_VERSION: &str = "csrd.dev/v1alpha1";
/// The `kind` of a policy.
pub const KIND: &str = "CertificatePolicy";
/// The name of policies in paths of the Kubernetes API.
pub const PLURAL: &str = "certificatepolicies";

/// Policy text with the name by which problems in it are reported, usually a file path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Where the text comes from.
    pub origin: String,
    /// One or more YAML documents.
    pub text: String,
}

/// Something wrong with a policy file, for its author.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// [`Source::origin`].
    pub file: String,
    /// Line from 1; 0 when the problem is the file as a whole.
    pub line: u64,
    /// Path of the field, for example `spec.allow.dnsNames[2]`; empty when the problem is the document as a whole. For
    /// YAML that does not fit the shape, the nearest enclosing keys.
    pub field: String,
    /// What is wrong, and where it helps what to write instead.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Printable(&self.file))?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        if !self.field.is_empty() {
            write!(f, ": {}", Printable(&self.field))?;
        }
        write!(f, ": {}", Printable(&self.message))
    }
}

/// A list that may be absent; absent and empty differ.
pub(super) type List<T> = Option<Vec<Spanned<T>>>;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Document {
    pub(super) api_version: Spanned<String>,
    pub(super) kind: Spanned<String>,
    pub(super) metadata: Metadata,
    pub(super) spec: Spec,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Metadata {
    pub(super) name: Spanned<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Spec {
    pub(super) r#match: Spanned<Match>,
    pub(super) signer: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) allow: Allow,
    pub(super) rules: List<Rule>,
    pub(super) offer: List<Offer>,
}

/// One section for each kind of workload, of which a policy has exactly one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Match {
    pub(super) unix: Option<Spanned<UnixMatch>>,
    pub(super) kubernetes: Option<Spanned<KubernetesMatch>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct UnixMatch {
    pub(super) uids: List<u32>,
    pub(super) users: List<String>,
    pub(super) gids: List<u32>,
    pub(super) executables: List<String>,
    pub(super) executable_sha256: List<String>,
    pub(super) systemd_units: List<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct KubernetesMatch {
    pub(super) namespaces: List<String>,
    pub(super) namespace_selector: Option<Selector>,
    pub(super) pod_selector: Option<Selector>,
    pub(super) service_accounts: List<String>,
}

/// A Kubernetes `LabelSelector`; an empty one selects everything.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Selector {
    pub(super) match_labels: Option<Spanned<BTreeMap<String, Spanned<String>>>>,
    pub(super) match_expressions: List<Requirement>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Requirement {
    pub(super) key: Spanned<String>,
    pub(super) operator: Spanned<String>,
    pub(super) values: List<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Allow {
    pub(super) common_names: List<String>,
    pub(super) organizations: List<String>,
    pub(super) dns_names: List<String>,
    pub(super) wildcard_dns_names: List<String>,
    pub(super) ip_addresses: List<String>,
    pub(super) uris: List<String>,
    pub(super) usages: List<String>,
    pub(super) keys: List<String>,
    pub(super) lifetime: Option<Lifetime>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Lifetime {
    pub(super) min: Option<Spanned<String>>,
    pub(super) default: Option<Spanned<String>>,
    pub(super) max: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Rule {
    pub(super) expression: Spanned<String>,
    pub(super) message: Spanned<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Offer {
    pub(super) spiffe_id: Option<Spanned<String>>,
    pub(super) dns_names: List<String>,
    pub(super) hint: Option<Spanned<String>>,
}

/// Reads the documents of one source; a document that does not parse is a problem and the next one is still read.
pub(super) fn read(source: &Source) -> (Vec<Document>, Vec<Problem>) {
    let problem = |line, field, message| Problem { file: source.origin.clone(), line, field, message };
    if source.text.len() > MAX_SOURCE_BYTES {
        let message = format!("it has {} bytes, at most {MAX_SOURCE_BYTES} are allowed", source.text.len());
        return (Vec::new(), vec![problem(0, String::new(), message)]);
    }
    let (mut documents, mut problems) = (Vec::new(), Vec::new());
    let mut bytes = source.text.as_bytes();
    for (i, document) in serde_saphyr::read_with_options::<_, Document>(&mut bytes, options()).enumerate() {
        if i == MAX_DOCUMENTS {
            let message = format!("it has more than {MAX_DOCUMENTS} documents");
            problems.push(problem(0, String::new(), message));
            break;
        }
        match document {
            Ok(document) => documents.push(document),
            Err(error) => {
                let (line, column) = error.location().map_or((0, 0), |at| (at.line(), at.column()));
                let message = error.without_snippet().to_string();
                let message = message.strip_suffix(&format!(" at line {line}, column {column}")).unwrap_or(&message);
                let message = clipped(message.to_owned(), MAX_SYNTAX_CHARS);
                problems.push(problem(line, enclosing_keys(&source.text, line), message));
            }
        }
    }
    (documents, problems)
}

fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_reader_input_bytes: Some(MAX_SOURCE_BYTES),
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MAX_REPLAYED_EVENTS,
        },
        merge_keys: MergeKeyPolicy::Error,
        with_snippet: false,
    }
}

/// The keys that enclose `line` in block style, outermost first: each line above it with less indentation than the last.
fn enclosing_keys(text: &str, line: u64) -> String {
    let Ok(count) = usize::try_from(line) else {
        return String::new();
    };
    let lines: Vec<&str> = text.lines().take(count).collect();
    let (mut keys, mut indentation) = (Vec::new(), usize::MAX);
    for line in lines.into_iter().rev() {
        if line.starts_with("---") || indentation == 0 {
            break;
        }
        let content = line.trim_start_matches([' ', '-']);
        let at = line.len() - content.len();
        if at < indentation
            && let Some((key, _)) = content.split_once(':')
            && key.bytes().all(|b| b.is_ascii_alphanumeric())
        {
            keys.push(key);
            indentation = at;
        }
    }
    keys.reverse();
    clipped(keys.join("."), MAX_SYNTAX_CHARS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
apiVersion: csrd.dev/v1alpha1
kind: CertificatePolicy
metadata: {name: web}
spec:
  match:
    unix:
      uids: [1000]
";

    fn read_text(text: &str) -> (Vec<Document>, Vec<Problem>) {
        read(&Source { origin: "p.yaml".to_owned(), text: text.to_owned() })
    }

    fn refused(text: &str, expected: &str) {
        let (_, problems) = read_text(text);
        let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
        assert!(problems.iter().any(|problem| problem.contains(expected)), "{text}\n{problems:#?}");
    }

    #[test]
    fn documents_are_read_one_after_another() {
        let (documents, problems) = read_text(&format!("# a comment\n{GOOD}---\n---\n{GOOD}...\n"));
        assert_eq!((documents.len(), problems), (2, Vec::new()));
        assert_eq!(documents[1].metadata.name.referenced.line(), 13);
        for empty in ["", "---\n", "# nothing\n"] {
            let (documents, problems) = read_text(empty);
            assert_eq!((documents.len(), problems), (0, Vec::new()), "{empty:?}");
        }
    }

    #[test]
    fn what_does_not_fit_the_shape_is_reported_with_its_line_and_keys() {
        let with = |line: &str| format!("{GOOD}{line}\n");
        refused(&with("  alow: {}"), "p.yaml:8: spec.alow: unknown field `alow`");
        refused(&with("status: {}"), "p.yaml:8: status: unknown field `status`");
        refused(&with("      uid: [1]"), "p.yaml:8: spec.match.unix.uid: unknown field `uid`");
        refused(&with("      gids: [web]"), "p.yaml:8: spec.match.unix.gids: ");
        refused(&with("      gids: [-1]"), "p.yaml:8: spec.match.unix.gids: ");
        refused(&with("      gids: [4294967296]"), "p.yaml:8: spec.match.unix.gids: ");
        refused(&with("      gids: 33"), "p.yaml:8: spec.match.unix.gids: ");
        refused(&with("  signer: a\n  signer: b"), "p.yaml:9: spec.signer: ");
        refused(&with("  rules: [{expression: 'true'}]"), "missing field `message`");
        refused(&with("  offer: [{hint: 7, spiffe: x}]"), "unknown field `spiffe`");
        refused("apiVersion: csrd.dev/v1alpha1\n", "missing field `kind`");
        refused("- 1\n", "p.yaml:1");
        refused("a: [\n", "p.yaml:");
        refused("\tx", "p.yaml:1");
        let (_, problems) = read_text("oops: 1");
        assert_eq!(problems[0].message, "unknown field `oops`, expected one of apiVersion, kind, metadata, spec");
    }

    #[test]
    fn a_bad_document_does_not_hide_the_next() {
        let (documents, problems) = read_text(&format!("{GOOD}  alow: {{}}\n---\n{GOOD}---\n{GOOD}  alow: {{}}\n"));
        assert_eq!(documents.len(), 1);
        assert_eq!(problems.iter().map(|problem| problem.line).collect::<Vec<_>>(), [8, 25]);
    }

    #[test]
    fn a_file_has_a_bound_in_bytes() {
        let padded = |bytes: usize| format!("{GOOD}#{}", "x".repeat(bytes - GOOD.len() - 1));
        assert_eq!(read_text(&padded(MAX_SOURCE_BYTES)).1, Vec::new());
        refused(&padded(MAX_SOURCE_BYTES + 1), "p.yaml: it has 1048577 bytes, at most 1048576 are allowed");
    }

    #[test]
    fn a_file_has_a_bound_in_documents() {
        let many = |n: usize| vec![GOOD; n].join("---\n");
        let (documents, problems) = read_text(&many(MAX_DOCUMENTS));
        assert_eq!((documents.len(), problems), (MAX_DOCUMENTS, Vec::new()));
        refused(&many(MAX_DOCUMENTS + 1), "p.yaml: it has more than 256 documents");
    }

    #[test]
    fn what_is_repeated_of_a_file_is_cut_one_past_its_bound() {
        let message = |chars: usize| {
            let (_, problems) = read_text(&format!("{}: 1", "k".repeat(chars)));
            problems[0].message.clone()
        };
        let around = message(1).chars().count() - 1;
        assert_eq!(message(MAX_SYNTAX_CHARS - around).chars().count(), MAX_SYNTAX_CHARS);
        let cut = message(MAX_SYNTAX_CHARS - around + 1);
        assert_eq!((cut.chars().count(), cut.chars().last()), (MAX_SYNTAX_CHARS + 1, Some('…')));
    }

    #[test]
    fn yaml_that_grows_is_refused() {
        let lists = (1..9).map(|i| format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); 10].join(", ")));
        refused(&format!("a0: &a0 [x]\n{}", lists.collect::<String>()), "p.yaml:");
        let flat = format!("{GOOD}  allow:\n    dnsNames: &x [{}]\n    uris: *x\n", "a, ".repeat(6000));
        assert_eq!(read_text(&flat).1, Vec::new());
        let replayed =
            format!("{GOOD}  allow:\n    dnsNames: &x [{}]\n    uris: *x\n", "a, ".repeat(MAX_REPLAYED_EVENTS));
        refused(&replayed, "alias");
        refused(&format!("{GOOD}  <<: {{signer: a}}\n"), "merge");
        refused(&format!("a: {}", "[".repeat(100_000)), "p.yaml:1");
        refused(&"[".repeat(MAX_DEPTH + 1), "p.yaml:1");
        refused(&"a:\n ".repeat(10), "p.yaml:");
    }

    proptest::proptest! {
        #[test]
        fn no_text_breaks_the_reader(text in "\\PC{0,200}", at in 0..GOOD.len()) {
            read_text(&text);
            read_text(&format!("{}{text}{}", &GOOD[..at], &GOOD[at..]));
        }
    }
}
