//! `csrd policy check`: what policy files say to a described workload and request, without an agent.
//!
//! The verdicts are those of the agent: files are read, requests parsed and policies judged by the same code. What is
//! described is attested by nobody, so the answer is words and never a grant.

use std::{fmt::Write as _, net::IpAddr, path::PathBuf, process::ExitCode};

use serde_json::json;

use super::{Exit, TableFormat, UsageError, request::RequestArgs};
use crate::{
    attest::{Facts, PodFacts, UnixFacts},
    kubernetes,
    policy::{
        self, Ask, EMBEDDED, Explanation, PolicySet, Problem,
        watch::{LoadError, read_set},
    },
    server,
    text::{self, printable},
};

/// Work with policy files
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Check(Box<Check>),
}

/// Evaluate policy files against a described workload and request, offline, and explain the decision
///
/// The workload is a process, described from --uid on, or a pod, described from --namespace on. Exits with 0 when the request is granted, 77 when it is denied, 64 when a file or the request is not valid.
#[derive(Debug, clap::Args)]
struct Check {
    /// Policy files, or folders of them
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    #[command(flatten)]
    process: ProcessArgs,
    #[command(flatten)]
    pod: PodArgs,
    #[command(flatten)]
    request: RequestArgs,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: TableFormat,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Process of a host, as the kernel would describe it")]
#[group(conflicts_with = "PodArgs", requires = "uid")]
struct ProcessArgs {
    /// User id
    #[arg(long, value_name = "NUMBER", required_unless_present = "namespace")]
    uid: Option<u32>,
    /// Group id; the first is the primary one [default: the user id]
    #[arg(long, value_name = "NUMBER")]
    gid: Vec<u32>,
    /// User name
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Group name
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// Path of the executable
    #[arg(long, value_name = "PATH")]
    executable: Option<String>,
    /// SHA-256 of the executable, in lower-case hexadecimal
    #[arg(long, value_name = "HEX")]
    sha256: Option<String>,
    /// systemd unit
    #[arg(long, value_name = "NAME")]
    unit: Option<String>,
    /// Control group, for example /system.slice/web.service
    #[arg(long, value_name = "PATH")]
    cgroup: Option<String>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Pod, as the API server would describe it; policies are read as a cluster's")]
#[group(requires = "namespace")]
struct PodArgs {
    /// Namespace
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// Name of the pod
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pod: String,
    /// Name of its ServiceAccount
    #[arg(long, value_name = "NAME", default_value = "default")]
    service_account: String,
    /// Label; may be repeated, as may every flag below but --node
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    label: Vec<(String, String)>,
    /// Label of its namespace
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    namespace_label: Vec<(String, String)>,
    /// Address
    #[arg(long, value_name = "ADDRESS")]
    pod_ip: Vec<IpAddr>,
    /// Name of a Service that selects it
    #[arg(long, value_name = "NAME")]
    service: Vec<String>,
    /// Name of its node
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    node: String,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("a label is KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

impl ProcessArgs {
    fn facts(self, uid: u32) -> Facts {
        let gid = self.gid.first().copied().unwrap_or(uid);
        let mut supplementary_gids = self.gid;
        supplementary_gids.sort_unstable();
        supplementary_gids.dedup();
        Facts::Process(UnixFacts {
            uid,
            owner: uid,
            gid,
            supplementary_gids,
            user: self.user,
            group: self.group,
            executable: self.executable,
            executable_sha256: self.sha256,
            systemd_unit: self.unit,
            cgroup: self.cgroup,
        })
    }
}

impl PodArgs {
    fn facts(self) -> Facts {
        Facts::Pod(PodFacts {
            namespace: self.namespace.unwrap_or_default(),
            name: self.pod,
            // There is no flag for it: nobody knows the UID of a pod beforehand.
            uid: String::new(),
            service_account: self.service_account,
            node: self.node,
            labels: self.label.into_iter().collect(),
            namespace_labels: self.namespace_label.into_iter().collect(),
            ips: self.pod_ip,
            services: self.service.into_iter().collect(),
        })
    }
}

impl Check {
    /// The set as an agent would read it, the described workload, and the request.
    fn read(self) -> anyhow::Result<(Result<PolicySet, LoadError>, Facts, Ask)> {
        // Of a process or, as clap has seen to, of a pod in a cluster.
        let (default_signer, facts) = match self.process.uid {
            Some(uid) => (EMBEDDED, self.process.facts(uid)),
            None => (kubernetes::SIGNER, self.pod.facts()),
        };
        let ask = server::ask(self.request.into_request()?).map_err(UsageError)?;
        Ok((read_set(&self.paths, default_signer), facts, ask))
    }
}

/// Reads, judges and explains.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Command::Check(check) = args.command;
    let output = check.output;
    let (policies, facts, ask) = check.read()?;
    let policies = match policies {
        Ok(policies) => policies,
        Err(error) => return invalid(error, output),
    };
    let explanation = policy::explain(&policies, &facts, &ask);
    let text = match output {
        TableFormat::Table => in_words(&explanation),
        TableFormat::Json => in_json(&explanation),
    };
    super::print(text.as_bytes())?;
    Ok(if explanation.granted.is_some() { ExitCode::SUCCESS } else { Exit::Denied.into() })
}

fn invalid(error: LoadError, output: TableFormat) -> anyhow::Result<ExitCode> {
    if output == TableFormat::Table {
        return Err(UsageError::of(error).into());
    }
    let problems = error.0.iter().map(|Problem { file, line, field, message }| {
        json!({ "file": file, "line": line, "field": field, "message": message })
    });
    super::print(text::json(format!("{:#}\n", json!({ "problems": problems.collect::<Vec<_>>() }))).as_bytes())?;
    Ok(Exit::Usage.into())
}

fn in_words(explanation: &Explanation) -> String {
    let mut text = String::new();
    let mut line = |args: std::fmt::Arguments<'_>| {
        writeln!(text, "{}", printable(&args.to_string())).expect("writing to a string does not fail")
    };
    for verdict in &explanation.verdicts {
        let says = match (verdict.matches, verdict.against.is_empty()) {
            (false, _) => "does not match",
            (true, false) => "refuses",
            (true, true) => "grants",
        };
        line(format_args!("policy {} {says}", verdict.policy));
        verdict.against.iter().for_each(|why| line(format_args!("  {why}")));
    }
    match (&explanation.granted, explanation.reason) {
        (Some((_, terms)), _) => terms.iter().for_each(|term| line(format_args!("  {term}"))),
        (None, Some(reason)) => line(format_args!("denied: {reason}")),
        (None, None) => {}
    }
    text
}

fn in_json(explanation: &Explanation) -> String {
    let policies = explanation
        .verdicts
        .iter()
        .map(|verdict| json!({ "name": verdict.policy, "matches": verdict.matches, "against": verdict.against }));
    let granted = explanation.granted.as_ref().map(|(policy, terms)| json!({ "policy": policy, "terms": terms }));
    let policies = policies.collect::<Vec<_>>();
    text::json(format!("{:#}\n", json!({ "granted": granted, "reason": explanation.reason, "policies": policies })))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    const POLICIES: &str = "
apiVersion: csrd.dev/v1alpha1
kind: CertificatePolicy
metadata: {name: db}
spec: {match: {unix: {uids: [1001]}}}
---
apiVersion: csrd.dev/v1alpha1
kind: CertificatePolicy
metadata: {name: web}
spec:
  match: {unix: {uids: [1000], gids: [33], executables: [/usr/bin/web]}}
  allow: {dnsNames: [web.example.org]}
";

    fn check(policies: &str, flags: &str) -> anyhow::Result<Explanation> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), policies).expect("written");
        let command = format!("policy check {} {flags}", file.path().display());
        let cli = Cli::try_parse_from(command.split_whitespace())?;
        let Command::Check(check) = cli.args.command;
        let (policies, facts, ask) = check.read()?;
        Ok(policy::explain(&policies?, &facts, &ask))
    }

    const WEB: &str = "--uid 1000 --gid 100 --gid 33 --executable /usr/bin/web";

    #[test]
    fn a_grant_is_explained() {
        let explanation = check(POLICIES, &format!("{WEB} --dns web.example.org --lifetime 2h")).unwrap();
        insta::assert_snapshot!(in_words(&explanation), @r"
        policy db does not match
          uid 1000 is not among its uids
        policy web grants
          DNS names: web.example.org
          usages: digital signature, server auth, client auth
          key: ecdsa-p256
          lifetime: 2h
          signer: embedded
        ");
        let json: serde_json::Value = serde_json::from_str(&in_json(&explanation)).unwrap();
        assert_eq!(json["granted"]["policy"], "web");
        assert_eq!(json["reason"], serde_json::Value::Null);
    }

    #[test]
    fn a_denial_is_explained() {
        let explanation = check(POLICIES, &format!("{WEB} --dns db.example.org --key rsa-2048")).unwrap();
        insta::assert_snapshot!(in_words(&explanation), @r#"
        policy db does not match
          uid 1000 is not among its uids
        policy web refuses
          dnsNames: "db.example.org" is refused, it matches none of its entries
          key rsa-2048 is not among its keys
        denied: POLICY_DENIED
        "#);
        let json: serde_json::Value = serde_json::from_str(&in_json(&explanation)).unwrap();
        assert_eq!(json["granted"], serde_json::Value::Null);
        assert_eq!(json["policies"][1]["matches"], true);
        assert_eq!(json["reason"], "POLICY_DENIED");
    }

    #[test]
    fn every_flag_of_the_workload_counts() {
        let policies = "
apiVersion: csrd.dev/v1alpha1
kind: CertificatePolicy
metadata: {name: all}
spec:
  match:
    unix:
      uids: [7]
      users: [web]
      gids: [7]
      executables: [/bin/web]
      executableSha256: [0000000000000000000000000000000000000000000000000000000000000000]
      systemdUnits: [web.service]
  rules: [{expression: workload.unix.cgroup == '/web', message: in its own cgroup}]
  offer: [{dnsNames: ['{unix.group}.example.org']}]
";
        let zeros = "0".repeat(64);
        let flags = format!(
            "--uid 7 --user web --group g --executable /bin/web --sha256 {zeros} --unit web.service --cgroup /web"
        );
        assert!(check(policies, &flags).unwrap().granted.is_some());
        for (flag, other) in
            [("--uid 7", "--uid 8"), ("--user web", ""), ("--group g", ""), (&zeros, "11"), ("--cgroup /web", "")]
        {
            assert!(check(policies, &flags.replace(flag, other)).unwrap().granted.is_none(), "{flag}");
        }
        for (flag, other) in [("--unit web.service", ""), ("/bin/web", "/bin/other"), ("--uid 7", "--uid 7 --gid 8")] {
            assert!(check(policies, &flags.replace(flag, other)).unwrap().granted.is_none(), "{flag}");
        }
    }

    #[test]
    fn every_flag_of_a_pod_counts() {
        let policies = "
apiVersion: csrd.dev/v1alpha1
kind: CertificatePolicy
metadata: {name: all}
spec:
  match:
    kubernetes:
      namespaces: [production]
      namespaceSelector: {matchLabels: {team: a}}
      podSelector: {matchLabels: {app: web, tier: ''}}
      serviceAccounts: [web]
  allow:
    dnsNames: ['{kubernetes.service}.{kubernetes.namespace}.svc', '{kubernetes.pod}.example.org', '{kubernetes.node}']
    ipAddresses: ['{kubernetes.podIP}']
";
        let flags = "--namespace production --pod web-0 --service-account web --label app=web --label tier= --namespace-label \
                     team=a --pod-ip 10.0.0.7 --service web --service api --node node1 --dns web.production.svc --dns \
                     api.production.svc --dns web-0.example.org --dns node1 --ip 10.0.0.7";
        let granted = check(policies, flags).unwrap();
        insta::assert_snapshot!(in_words(&granted), @r"
        policy all grants
          DNS names: web.production.svc, api.production.svc, web-0.example.org, node1
          IP addresses: 10.0.0.7
          usages: digital signature, server auth, client auth
          key: ecdsa-p256
          lifetime: 1h
          signer: csrd.dev/workload
        ");
        for flag in [
            "--pod web-0",
            "--service-account web",
            "--label app=web",
            "--label tier=",
            "--namespace-label team=a",
            "--pod-ip 10.0.0.7",
            "--service web",
            "--service api",
            "--node node1",
        ] {
            assert!(check(policies, &flags.replacen(flag, "", 1)).unwrap().granted.is_none(), "{flag}");
        }
    }

    #[test]
    fn a_workload_is_a_process_or_a_pod() {
        for (flags, words) in [
            ("", "--uid"),
            ("--user web", "--uid"),
            ("--label a=b", "--namespace"),
            ("--uid 1 --namespace a", "cannot be used with"),
            ("--uid 1 --label a=b", "cannot be used with"),
            ("--namespace a --gid 1", "cannot be used with"),
            ("--namespace a --label b", "a label is KEY=VALUE"),
        ] {
            let error = check(POLICIES, flags).unwrap_err().to_string();
            assert!(error.contains(words), "{flags}: {error}");
        }
    }

    #[test]
    fn what_is_not_valid_is_refused_before_it_is_judged() {
        let error = check("oops: 1", WEB).unwrap_err().to_string();
        assert!(error.contains(":1: oops: unknown field `oops`"), "{error}");
        let error = check(POLICIES, &format!("{WEB} --dns UPPER")).unwrap_err();
        assert!(error.is::<UsageError>(), "{error}");
        assert!(check(POLICIES, "").unwrap_err().to_string().contains("--uid"));
    }
}
