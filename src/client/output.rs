//! What is shown: pure functions from answers to text and JSON.
//!
//! JSON names are the proto's field names and stay stable; tables are for people and do not. A private key is rendered
//! only by [`json()`], [`pem()`], [`secret`] and [`kubeconfig`], which are asked for by name, into buffers that are wiped; no other function
//! here sees one. Deliberately not here: writing it anywhere.

use std::fmt;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use comfy_table::{ContentArrangement, Table, presets};
use jiff::Timestamp;
use serde::{Serialize, Serializer};
use serde_json::json;
use zeroize::Zeroizing;

use super::{Certificate, ClientError, Event};
use crate::{
    proto::v1,
    text::{self, printable},
};

/// Characters in the name of a Kubernetes Secret (RFC 1123 subdomain).
pub const MAX_SECRET_NAME_BYTES: usize = 253;
/// Characters in a Kubernetes namespace (RFC 1123 label).
pub const MAX_NAMESPACE_BYTES: usize = 63;

/// JSON's own share of a certificate: names, quotes, times, and room for every text that is no PEM.
const JSON_OVERHEAD_BYTES: usize = 8 * 1024;

/// The certificate with its key as one JSON object and a line end.
pub fn json(certificate: &Certificate) -> Zeroizing<Vec<u8>> {
    #[derive(Serialize)]
    struct Json<'a> {
        certificate_id: &'a str,
        sequence: u64,
        certificate_chain: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        private_key: Option<&'a str>,
        trust_bundle: &'a str,
        serial_number: &'a str,
        #[serde(serialize_with = "shown")]
        not_before: Timestamp,
        #[serde(serialize_with = "shown")]
        not_after: Timestamp,
        #[serde(serialize_with = "shown")]
        renew_at: Timestamp,
        policy: &'a str,
        signer_name: &'a str,
    }
    let private_key = certificate.private_key.as_ref().map(|key| key.as_str());
    let pem_bytes = certificate.certificate_chain.len() + certificate.trust_bundle.len();
    // Escaping at most doubles PEM. Enough room from the start: a buffer that grows leaves unwiped copies behind.
    let capacity = 2 * (pem_bytes + private_key.map_or(0, str::len)) + JSON_OVERHEAD_BYTES;
    let mut buffer = Zeroizing::new(Vec::with_capacity(capacity));
    let value = Json {
        certificate_id: &certificate.certificate_id,
        sequence: certificate.sequence,
        certificate_chain: &certificate.certificate_chain,
        private_key,
        trust_bundle: &certificate.trust_bundle,
        serial_number: &certificate.serial_number,
        not_before: certificate.not_before,
        not_after: certificate.not_after,
        renew_at: certificate.renew_at,
        policy: &certificate.policy,
        signer_name: &certificate.signer_name,
    };
    serde_json::to_writer_pretty(&mut *buffer, &value).expect("strings and numbers into memory");
    buffer.push(b'\n');
    buffer
}

/// The key, when the agent made it, and then the chain.
pub fn pem(certificate: &Certificate) -> Zeroizing<Vec<u8>> {
    let key = certificate.private_key.as_ref().map_or("", |key| key.as_str());
    Zeroizing::new([key.as_bytes(), certificate.certificate_chain.as_bytes()].concat())
}

/// A `kubernetes.io/tls` Secret for `kubectl apply`; `None` when the caller holds the key.
///
/// `name` and `namespace` must have passed [`check_secret_name`] and [`check_namespace`].
pub fn secret(certificate: &Certificate, name: &str, namespace: Option<&str>) -> Option<Zeroizing<String>> {
    let key = certificate.private_key.as_ref()?;
    let encoded = |text: &str| Zeroizing::new(BASE64_STANDARD.encode(text));
    let (chain, key, roots) =
        (encoded(&certificate.certificate_chain), encoded(key), encoded(&certificate.trust_bundle));
    let namespace = namespace.map(|namespace| format!("  namespace: \"{namespace}\"\n")).unwrap_or_default();
    let head =
        format!("apiVersion: v1\nkind: Secret\nmetadata:\n  name: \"{name}\"\n{namespace}type: kubernetes.io/tls\n");
    let parts = [&head, "data:\n  tls.crt: ", &chain, "\n  tls.key: ", &key, "\n  ca.crt: ", &roots, "\n"];
    Some(Zeroizing::new(parts.concat()))
}

/// A kubeconfig whose only user is this certificate; `None` when the caller holds the key.
///
/// `server` must have passed [`check_server`], and `roots` (PEM) verify it: they are the cluster's own and not the signer's, which
/// need not be the same.
pub fn kubeconfig(certificate: &Certificate, server: &str, roots: &str) -> Option<Zeroizing<String>> {
    let key = certificate.private_key.as_ref()?;
    let encoded = |text: &str| Zeroizing::new(BASE64_STANDARD.encode(text));
    let (chain, key, roots) = (encoded(&certificate.certificate_chain), encoded(key), encoded(roots));
    let parts = [
        "apiVersion: v1\nkind: Config\ncurrent-context: csrd\ncontexts:\n- name: csrd\n  context: {cluster: csrd, user: csrd}\n",
        "clusters:\n- name: csrd\n  cluster:\n    server: \"",
        server,
        "\"\n    certificate-authority-data: ",
        &roots,
        "\nusers:\n- name: csrd\n  user:\n    client-certificate-data: ",
        &chain,
        "\n    client-key-data: ",
        &key,
        "\n",
    ];
    Some(Zeroizing::new(parts.concat()))
}

/// Whether `server` is an address that kubectl can use and that a quoted YAML text can hold.
pub fn check_server(server: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '"' | '\\');
    let known = server.parse::<http::Uri>().ok().filter(|uri| uri.scheme_str() == Some("https"));
    match known.is_some_and(|uri| uri.query().is_none()) && server.chars().all(plain) {
        true => Ok(()),
        false => Err("must be the API server's address, for example https://10.0.0.1:6443".to_owned()),
    }
}

/// Whether a Secret can have this name: labels of `a-z`, `0-9` and inner `-`, joined by dots.
pub fn check_secret_name(name: &str) -> Result<(), String> {
    let fits = name.len() <= MAX_SECRET_NAME_BYTES && name.split('.').all(is_label);
    if fits {
        Ok(())
    } else {
        let max = MAX_SECRET_NAME_BYTES;
        Err(format!(
            "must be 1 to {max} of a-z, 0-9, '-' and '.', each part beginning and ending with a letter or digit"
        ))
    }
}

/// Whether a namespace can have this name: one label of at most [`MAX_NAMESPACE_BYTES`].
pub fn check_namespace(name: &str) -> Result<(), String> {
    let fits = name.len() <= MAX_NAMESPACE_BYTES && is_label(name);
    if fits {
        Ok(())
    } else {
        let max = MAX_NAMESPACE_BYTES;
        Err(format!("must be 1 to {max} of a-z, 0-9 and '-', beginning and ending with a letter or digit"))
    }
}

fn is_label(label: &str) -> bool {
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    label.starts_with(alphanumeric)
        && label.ends_with(alphanumeric)
        && label.chars().all(|c| alphanumeric(c) || c == '-')
}

/// How a table is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// With lines, cells wrapped to the width of the terminal.
    Terminal,
    /// Aligned columns only, nothing cut.
    Plain,
}

/// The caller as the agent sees it.
pub fn who_am_i(answer: &v1::WhoAmIResponse, style: Style) -> String {
    let mut facts: Vec<_> = answer.facts.iter().map(|(name, value)| vec![printable(name), printable(value)]).collect();
    facts.sort();
    let policies = answer.policies.iter().map(|policy| {
        let lines = match policy.matches {
            true => policy.grants.iter().cloned().chain(policy.offers.iter().map(|o| format!("offers {o}"))).collect(),
            false => vec![policy.mismatch.clone()],
        };
        let lines: Vec<_> = lines.iter().map(|line| printable(line)).collect();
        vec![printable(&policy.name), if policy.matches { "yes" } else { "no" }.into(), lines.join("\n")]
    });
    let facts = table(["FACT", "VALUE"], facts, style);
    format!("{facts}\n{}", table(["POLICY", "MATCHES", "GRANTS, OR WHY NOT"], policies, style))
}

/// The same as JSON.
pub fn who_am_i_json(answer: &v1::WhoAmIResponse) -> String {
    let policies = answer.policies.iter().map(|policy| {
        json!({
            "name": policy.name, "matches": policy.matches, "mismatch": policy.mismatch,
            "grants": policy.grants, "offers": policy.offers,
        })
    });
    let facts: std::collections::BTreeMap<_, _> = answer.facts.iter().collect();
    text::json(format!("{:#}\n", json!({ "facts": facts, "policies": policies.collect::<Vec<_>>() })))
}

/// Live credentials, in the agent's order.
pub fn credentials(credentials: &[v1::CredentialStatus], style: Style) -> String {
    let rows = credentials.iter().map(|credential| {
        let names: Vec<_> = credential.names.iter().map(|name| printable(name)).collect();
        vec![
            printable(&credential.workload),
            // A line of a table of plain text is one credential.
            names.join(if style == Style::Plain { "," } else { "\n" }),
            printable(&credential.policy),
            printable(&credential.signer_name),
            moment(credential.not_after).unwrap_or_else(|| "-".into()),
            moment(credential.renew_at).unwrap_or_else(|| "-".into()),
            credential.subscribers.to_string(),
            printable(&credential.last_error),
        ]
    });
    table(["WORKLOAD", "NAMES", "POLICY", "SIGNER", "EXPIRES", "RENEWS", "STREAMS", "LAST ERROR"], rows, style)
}

/// The same as JSON.
pub fn credentials_json(credentials: &[v1::CredentialStatus]) -> String {
    let credentials = credentials.iter().map(|credential| {
        json!({
            "certificate_id": credential.certificate_id, "workload": credential.workload, "names": credential.names,
            "signer_name": credential.signer_name, "policy": credential.policy,
            "not_after": moment(credential.not_after), "renew_at": moment(credential.renew_at),
            "last_error": credential.last_error, "subscribers": credential.subscribers,
            "serial_number": credential.serial_number,
        })
    });
    text::json(format!("{:#}\n", json!({ "credentials": credentials.collect::<Vec<_>>() })))
}

fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = Vec<String>>, style: Style) -> String {
    let mut table = Table::new();
    table.set_header(header).add_rows(rows);
    match style {
        Style::Terminal => {
            table.load_style(presets::UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic)
        }
        Style::Plain => table.load_style(presets::NOTHING).force_no_tty(),
    };
    if style == Style::Plain {
        table.column_iter_mut().for_each(|column| {
            column.set_padding((0, 2));
        });
    }
    table.trim_fmt() + "\n"
}

/// RFC 3339 in UTC, whole seconds.
fn moment(at: Option<prost_types::Timestamp>) -> Option<String> {
    Some(Timestamp::new(at?.seconds, 0).ok()?.to_string())
}

/// One line for one happening of a watch.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Line<'a> {
    /// The certificate in force at the start.
    Current(Summary<'a>),
    /// A new certificate.
    Renewed(Summary<'a>),
    /// A renewal failed and will be tried again.
    RenewalDelayed {
        /// The agent's stable reason.
        reason: &'a str,
        /// One sentence.
        message: &'a str,
        /// When the agent tries again.
        #[serde(serialize_with = "shown")]
        retry_at: Timestamp,
        /// When the certificate ends.
        #[serde(serialize_with = "shown")]
        expires_at: Timestamp,
    },
    /// The holder of the key is asked for a new request.
    RenewalDue {
        /// When the certificate ends.
        #[serde(serialize_with = "shown")]
        expires_at: Timestamp,
    },
    /// New roots.
    TrustBundleUpdated,
    /// The agent is away.
    Disconnected {
        /// Stable.
        reason: &'a str,
        /// One sentence.
        message: &'a str,
        /// Until it is tried again.
        retry_in_ms: u128,
    },
    /// The agent refuses; nothing will be renewed.
    Refused {
        /// The agent's stable reason.
        reason: &'a str,
        /// One sentence.
        message: &'a str,
    },
    /// The files are on disk.
    Written {
        /// The folder or file.
        path: &'a str,
    },
    /// They are not, and the old ones are still there.
    WriteFailed {
        /// Which step and why.
        message: &'a str,
        /// Until it is tried again.
        retry_in_ms: u128,
    },
    /// The reader of the files was told.
    Notified {
        /// Whom and how.
        how: &'a str,
    },
    /// The reader of the files could not be told.
    NotifyFailed {
        /// Why.
        message: &'a str,
    },
}

/// A certificate without anything secret.
#[derive(Debug, Serialize)]
pub struct Summary<'a> {
    certificate_id: &'a str,
    sequence: u64,
    serial_number: &'a str,
    #[serde(serialize_with = "shown")]
    not_after: Timestamp,
    #[serde(serialize_with = "shown")]
    renew_at: Timestamp,
    policy: &'a str,
    signer_name: &'a str,
}

impl<'a> From<&'a Certificate> for Summary<'a> {
    fn from(certificate: &'a Certificate) -> Self {
        Self {
            certificate_id: &certificate.certificate_id,
            sequence: certificate.sequence,
            serial_number: &certificate.serial_number,
            not_after: certificate.not_after,
            renew_at: certificate.renew_at,
            policy: &certificate.policy,
            signer_name: &certificate.signer_name,
        }
    }
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { serial_number, not_after, renew_at, policy, signer_name, .. } = self;
        write!(
            f,
            "serial {serial_number}, expires {not_after:.0}, renews {renew_at:.0}, policy {policy}, signer {signer_name}"
        )
    }
}

impl<'a> From<&'a Event> for Line<'a> {
    fn from(event: &'a Event) -> Self {
        match event {
            Event::Current(certificate) => Self::Current(certificate.into()),
            Event::Renewed(certificate) => Self::Renewed(certificate.into()),
            Event::RenewalDelayed { reason, message, retry_at, expires_at } => {
                Self::RenewalDelayed { reason, message, retry_at: *retry_at, expires_at: *expires_at }
            }
            Event::RenewalDue { expires_at } => Self::RenewalDue { expires_at: *expires_at },
            Event::TrustBundleUpdated(_) => Self::TrustBundleUpdated,
            Event::Disconnected { error, retry_in } => {
                Self::Disconnected { reason: &error.reason, message: &error.message, retry_in_ms: retry_in.as_millis() }
            }
        }
    }
}

impl<'a> From<&'a ClientError> for Line<'a> {
    fn from(error: &'a ClientError) -> Self {
        Self::Refused { reason: &error.reason, message: &error.message }
    }
}

impl Line<'_> {
    /// The line for people: one line, whatever the paths and words in it.
    pub fn text(&self) -> String {
        printable(&self.to_string())
    }

    /// The line as a JSON object, without a line end.
    pub fn json(&self) -> String {
        text::json(serde_json::to_string(self).expect("strings and numbers into memory"))
    }
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Current(summary) => write!(f, "current: {summary}"),
            Self::Renewed(summary) => write!(f, "renewed: {summary}"),
            Self::RenewalDelayed { reason, message, retry_at, expires_at } => {
                write!(f, "renewal delayed: {message} ({reason}); next try {retry_at:.0}, expires {expires_at:.0}")
            }
            Self::RenewalDue { expires_at } => write!(f, "renewal due: send a new request before {expires_at:.0}"),
            Self::TrustBundleUpdated => f.write_str("trust bundle updated"),
            Self::Disconnected { reason, message, retry_in_ms } => {
                write!(f, "disconnected: {message} ({reason}); next try in {retry_in_ms} ms")
            }
            Self::Refused { reason, message } => write!(f, "refused: {message} ({reason})"),
            Self::Written { path } => write!(f, "written: {path}"),
            Self::WriteFailed { message, retry_in_ms } => {
                write!(f, "write failed: {message}; the old files stay; next try in {retry_in_ms} ms")
            }
            Self::Notified { how } => write!(f, "notified: {how}"),
            Self::NotifyFailed { message } => write!(f, "notify failed: {message}"),
        }
    }
}

fn shown<S: Serializer>(value: &impl fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{Code, certificate::tagged};

    fn text(bytes: &[u8]) -> &str {
        std::str::from_utf8(bytes).expect("text")
    }

    #[test]
    fn json_is_the_whole_certificate_with_proto_names() {
        insta::assert_snapshot!(text(&json(&tagged("1"))), @r#"
        {
          "certificate_id": "c1",
          "sequence": 7,
          "certificate_chain": "chain 1\n",
          "private_key": "key 1\n",
          "trust_bundle": "roots 1\n",
          "serial_number": "0a",
          "not_before": "1970-01-01T00:00:00Z",
          "not_after": "1970-01-01T01:00:00Z",
          "renew_at": "1970-01-01T00:33:20Z",
          "policy": "web",
          "signer_name": "embedded"
        }
        "#);
        let mut held = tagged("1");
        held.private_key = None;
        assert!(!text(&json(&held)).contains("private_key"));
    }

    #[test]
    fn a_buffer_with_a_key_never_grows() {
        let mut large = tagged("1");
        large.private_key = Some(Zeroizing::new("\n".repeat(64 * 1024)));
        let buffer = json(&large);
        let room = 2 * (64 * 1024 + large.certificate_chain.len() + large.trust_bundle.len()) + JSON_OVERHEAD_BYTES;
        assert_eq!(buffer.capacity(), room);
    }

    #[test]
    fn pem_is_the_key_and_then_the_chain() {
        assert_eq!(text(&pem(&tagged("1"))), "key 1\nchain 1\n");
    }

    #[test]
    fn a_secret_is_a_whole_manifest() {
        let manifest = secret(&tagged("1"), "web", Some("production")).expect("with a key");
        insta::assert_snapshot!(manifest.as_str(), @r#"
        apiVersion: v1
        kind: Secret
        metadata:
          name: "web"
          namespace: "production"
        type: kubernetes.io/tls
        data:
          tls.crt: Y2hhaW4gMQo=
          tls.key: a2V5IDEK
          ca.crt: cm9vdHMgMQo=
        "#);
        assert!(!secret(&tagged("1"), "web", None).expect("with a key").contains("namespace"));
        let mut held = tagged("1");
        held.private_key = None;
        assert!(secret(&held, "web", None).is_none());
        assert!(kubeconfig(&held, "https://a", "roots").is_none());
    }

    #[test]
    fn a_kubeconfig_holds_the_certificate_its_key_and_the_clusters_own_roots() {
        let config = kubeconfig(&tagged("1"), "https://10.0.0.1:6443", "cluster").expect("with a key");
        let data = |name: &str| {
            let line = config.lines().find_map(|line| line.trim().strip_prefix(name)).expect("the line is there");
            String::from_utf8(BASE64_STANDARD.decode(line).expect("base64")).expect("text")
        };
        assert_eq!(data("client-certificate-data: "), tagged("1").certificate_chain);
        assert_eq!(data("client-key-data: "), **tagged("1").private_key.as_ref().expect("a key"));
        assert_eq!(data("certificate-authority-data: "), "cluster");
    }

    #[test]
    fn a_server_is_an_https_address_that_a_quoted_text_can_hold() {
        for good in ["https://10.0.0.1:6443", "https://[::1]:443", "https://api.example.org/path"] {
            assert_eq!(check_server(good), Ok(()), "{good}");
        }
        for bad in
            ["", "10.0.0.1", "http://a", "https://", "https://a\"b", "https://a\nb", "https://a?x=1", "https://a\\b"]
        {
            assert!(check_server(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_of_secrets_and_namespaces_obey_kubernetes() {
        fn check(name: &str, secret: bool, namespace: bool) {
            assert_eq!(check_secret_name(name).is_ok(), secret, "{name}");
            assert_eq!(check_namespace(name).is_ok(), namespace, "{name}");
        }
        check("web-1", true, true);
        check("web.tls", true, false);
        check("", false, false);
        check("-web", false, false);
        check("web-", false, false);
        check("web..tls", false, false);
        check("Web", false, false);
        check("a\"\nb: c", false, false);
        check(&"a".repeat(MAX_NAMESPACE_BYTES), true, true);
        check(&"a".repeat(MAX_NAMESPACE_BYTES + 1), true, false);
        check(&"a".repeat(MAX_SECRET_NAME_BYTES), true, false);
        check(&"a".repeat(MAX_SECRET_NAME_BYTES + 1), false, false);
    }

    fn caller() -> v1::WhoAmIResponse {
        let policy = |name: &str, mismatch: &str, grants: &[&str], offers: &[&str]| v1::PolicyView {
            name: name.into(),
            matches: mismatch.is_empty(),
            mismatch: mismatch.into(),
            grants: grants.iter().map(ToString::to_string).collect(),
            offers: offers.iter().map(ToString::to_string).collect(),
        };
        v1::WhoAmIResponse {
            facts: [("unix.uid", "1000"), ("unix.path", "/usr/bin/w\x1b[2Jeb")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            policies: vec![
                policy("db", "unix.uid is 1000, not 70", &[], &[]),
                policy("web", "", &["DNS web.example.org", "lifetime at most 1h"], &["web.example.org"]),
            ],
        }
    }

    fn live() -> [v1::CredentialStatus; 1] {
        [v1::CredentialStatus {
            certificate_id: "c1".into(),
            workload: "uid 1000 /usr/bin/web".into(),
            names: vec!["web".into(), "web.example.org".into()],
            signer_name: "embedded".into(),
            policy: "web".into(),
            not_after: Some(prost_types::Timestamp { seconds: 3600, nanos: 5 }),
            renew_at: None,
            last_error: "SIGNER_\x1bBUSY".into(),
            subscribers: 2,
            serial_number: "0a".into(),
        }]
    }

    #[test]
    fn a_caller_is_shown_with_its_policies() {
        insta::assert_snapshot!(who_am_i(&caller(), Style::Plain), @r#"
        FACT       VALUE
        unix.path  /usr/bin/w\u{1b}[2Jeb
        unix.uid   1000

        POLICY  MATCHES  GRANTS, OR WHY NOT
        db      no       unix.uid is 1000, not 70
        web     yes      DNS web.example.org
                         lifetime at most 1h
                         offers web.example.org
        "#);
        insta::assert_snapshot!(who_am_i(&caller(), Style::Terminal), @r#"
        ┌───────────┬───────────────────────┐
        │ FACT      ┆ VALUE                 │
        ╞═══════════╪═══════════════════════╡
        │ unix.path ┆ /usr/bin/w\u{1b}[2Jeb │
        │ unix.uid  ┆ 1000                  │
        └───────────┴───────────────────────┘

        ┌────────┬─────────┬──────────────────────────┐
        │ POLICY ┆ MATCHES ┆ GRANTS, OR WHY NOT       │
        ╞════════╪═════════╪══════════════════════════╡
        │ db     ┆ no      ┆ unix.uid is 1000, not 70 │
        │ web    ┆ yes     ┆ DNS web.example.org      │
        │        ┆         ┆ lifetime at most 1h      │
        │        ┆         ┆ offers web.example.org   │
        └────────┴─────────┴──────────────────────────┘
        "#);
        insta::assert_snapshot!(who_am_i_json(&caller()), @r#"
        {
          "facts": {
            "unix.path": "/usr/bin/w\u001b[2Jeb",
            "unix.uid": "1000"
          },
          "policies": [
            {
              "grants": [],
              "matches": false,
              "mismatch": "unix.uid is 1000, not 70",
              "name": "db",
              "offers": []
            },
            {
              "grants": [
                "DNS web.example.org",
                "lifetime at most 1h"
              ],
              "matches": true,
              "mismatch": "",
              "name": "web",
              "offers": [
                "web.example.org"
              ]
            }
          ]
        }
        "#);
    }

    #[test]
    fn credentials_are_shown_one_a_line() {
        insta::assert_snapshot!(credentials(&live(), Style::Plain), @r#"
        WORKLOAD               NAMES                POLICY  SIGNER    EXPIRES               RENEWS  STREAMS  LAST ERROR
        uid 1000 /usr/bin/web  web,web.example.org  web     embedded  1970-01-01T01:00:00Z  -       2        SIGNER_\u{1b}BUSY
        "#);
        insta::assert_snapshot!(credentials_json(&live()), @r#"
        {
          "credentials": [
            {
              "certificate_id": "c1",
              "last_error": "SIGNER_\u001bBUSY",
              "names": [
                "web",
                "web.example.org"
              ],
              "not_after": "1970-01-01T01:00:00Z",
              "policy": "web",
              "renew_at": null,
              "serial_number": "0a",
              "signer_name": "embedded",
              "subscribers": 2,
              "workload": "uid 1000 /usr/bin/web"
            }
          ]
        }
        "#);
    }

    #[test]
    fn every_happening_is_one_line_without_a_key() {
        let at = Timestamp::UNIX_EPOCH;
        let error =
            ClientError { code: Code::Unavailable, reason: "STOPPING".into(), message: "the agent stops".into() };
        let events = [
            Event::Current(tagged("1")),
            Event::Renewed(tagged("1")),
            Event::RenewalDelayed { reason: "R".into(), message: "busy".into(), retry_at: at, expires_at: at },
            Event::RenewalDue { expires_at: at },
            Event::TrustBundleUpdated("roots".into()),
            Event::Disconnected { error: error.clone(), retry_in: std::time::Duration::from_millis(150) },
        ];
        let lines = events.iter().map(Line::from).chain([
            Line::from(&error),
            Line::Written { path: "/tls" },
            Line::WriteFailed { message: "cannot write", retry_in_ms: 200 },
            Line::Notified { how: "SIGHUP to 12" },
            Line::NotifyFailed { message: "exit status: 1" },
        ]);
        let lines: Vec<_> = lines.map(|line| format!("{line}\n{}\n", line.json())).collect();
        assert!(lines.iter().all(|line| line.lines().count() == 2 && !line.contains("key 1")));
        insta::assert_snapshot!(lines.concat(), @r#"
        current: serial 0a, expires 1970-01-01T01:00:00Z, renews 1970-01-01T00:33:20Z, policy web, signer embedded
        {"event":"current","certificate_id":"c1","sequence":7,"serial_number":"0a","not_after":"1970-01-01T01:00:00Z","renew_at":"1970-01-01T00:33:20Z","policy":"web","signer_name":"embedded"}
        renewed: serial 0a, expires 1970-01-01T01:00:00Z, renews 1970-01-01T00:33:20Z, policy web, signer embedded
        {"event":"renewed","certificate_id":"c1","sequence":7,"serial_number":"0a","not_after":"1970-01-01T01:00:00Z","renew_at":"1970-01-01T00:33:20Z","policy":"web","signer_name":"embedded"}
        renewal delayed: busy (R); next try 1970-01-01T00:00:00Z, expires 1970-01-01T00:00:00Z
        {"event":"renewal_delayed","reason":"R","message":"busy","retry_at":"1970-01-01T00:00:00Z","expires_at":"1970-01-01T00:00:00Z"}
        renewal due: send a new request before 1970-01-01T00:00:00Z
        {"event":"renewal_due","expires_at":"1970-01-01T00:00:00Z"}
        trust bundle updated
        {"event":"trust_bundle_updated"}
        disconnected: the agent stops (STOPPING); next try in 150 ms
        {"event":"disconnected","reason":"STOPPING","message":"the agent stops","retry_in_ms":150}
        refused: the agent stops (STOPPING)
        {"event":"refused","reason":"STOPPING","message":"the agent stops"}
        written: /tls
        {"event":"written","path":"/tls"}
        write failed: cannot write; the old files stay; next try in 200 ms
        {"event":"write_failed","message":"cannot write","retry_in_ms":200}
        notified: SIGHUP to 12
        {"event":"notified","how":"SIGHUP to 12"}
        notify failed: exit status: 1
        {"event":"notify_failed","message":"exit status: 1"}
        "#);
    }
}
