//! Whom a policy matches: the match section, checked at load, and compared with a caller.
//!
//! Invariant: a match section rests on something that its caller cannot choose. Every user can run any executable, and
//! whoever may create pods chooses their labels and ServiceAccount, so those narrow a match and never make one. All
//! clauses must hold. A process in a pod is that pod, and no process of the host.

use std::collections::BTreeMap;

use serde_saphyr::Spanned;

use super::{
    check::{Check, MAX_ENTRIES},
    document::{self, List},
    fact::Callers,
    is_object_name,
    selector::{MAX_LABEL_BYTES, Selector},
    shown,
    template::Glob,
};
use crate::attest::{Facts, PodFacts, UnixFacts};

/// A checked match section; every clause that is present must hold.
#[derive(Debug)]
pub(super) enum Whom {
    Processes(UnixMatch),
    Pods(KubernetesMatch),
}

#[derive(Debug)]
pub(super) struct UnixMatch {
    uids: Option<Vec<u32>>,
    users: Option<Vec<String>>,
    gids: Option<Vec<u32>>,
    executables: Option<Vec<Glob>>,
    pub(super) executable_sha256: Option<Vec<String>>,
    systemd_units: Option<Vec<Glob>>,
}

#[derive(Debug)]
pub(super) struct KubernetesMatch {
    namespaces: Option<Vec<String>>,
    namespace_selector: Option<Selector>,
    pub(super) pod_selector: Option<Selector>,
    service_accounts: Option<Vec<String>>,
}

impl Whom {
    /// The first clause that does not hold for the caller, in words; `None` when all hold.
    pub(super) fn mismatch(&self, facts: &Facts) -> Option<String> {
        match (self, facts) {
            (Self::Processes(unix), Facts::Process(facts)) => unix.mismatch(facts),
            (Self::Pods(pods), Facts::Pod(facts)) => pods.mismatch(facts),
            (Self::Processes(_), Facts::Pod(_)) => {
                Some("it matches processes of a host, and the caller is a pod".to_owned())
            }
            (Self::Pods(_), Facts::Process(_)) => {
                Some("it matches pods, and the caller is a process of this host".to_owned())
            }
        }
    }

    /// Whether the caller may know of the policy. One about pods is an affair of its namespaces; what it is called and asks
    /// for would tell the other tenants of a cluster about each other.
    pub(super) fn concerns(&self, facts: &Facts) -> bool {
        match (self, facts) {
            (Self::Processes(_), _) => true,
            (Self::Pods(pods), Facts::Pod(pod)) => pods.mismatch_of_namespace(pod).is_none(),
            (Self::Pods(_), Facts::Process(_)) => false,
        }
    }
}

impl UnixMatch {
    fn mismatch(&self, facts: &UnixFacts) -> Option<String> {
        let number = |list: &Option<Vec<u32>>, value: u32, name: &str, field: &str| {
            let out = list.as_ref().is_some_and(|list| !list.contains(&value));
            out.then(|| format!("{name} {value} is not among its {field}"))
        };
        let text = |value: &Option<String>, name: &str, field: &str| match value {
            Some(value) => format!("{name} {} is not among its {field}", shown(value)),
            None => format!("it asks for {field}, and the caller has no known {name}"),
        };
        let exact = |list: &Option<Vec<String>>, value: &Option<String>, name: &str, field: &str| {
            let out = list.as_ref().is_some_and(|list| !value.as_ref().is_some_and(|value| list.contains(value)));
            out.then(|| text(value, name, field))
        };
        let glob = |list: &Option<Vec<Glob>>, value: &Option<String>, name: &str, field: &str| {
            let any =
                |list: &Vec<Glob>| value.as_ref().is_some_and(|value| list.iter().any(|glob| glob.matches(value)));
            list.as_ref().is_some_and(|list| !any(list)).then(|| text(value, name, field))
        };
        let group = || {
            let member = |gid: &u32| *gid == facts.gid || facts.supplementary_gids.contains(gid);
            let out = self.gids.as_ref().is_some_and(|gids| !gids.iter().any(member));
            out.then(|| format!("neither gid {} nor a supplementary group is among its gids", facts.gid))
        };
        let hash = &facts.executable_sha256;
        number(&self.uids, facts.uid, "uid", "uids")
            .or_else(|| exact(&self.users, &facts.user, "user", "users"))
            .or_else(group)
            .or_else(|| glob(&self.executables, &facts.executable, "executable", "executables"))
            .or_else(|| exact(&self.executable_sha256, hash, "executable SHA-256", "executableSha256"))
            .or_else(|| glob(&self.systemd_units, &facts.systemd_unit, "systemd unit", "systemdUnits"))
    }
}

impl KubernetesMatch {
    fn mismatch(&self, pod: &PodFacts) -> Option<String> {
        self.mismatch_of_namespace(pod)
            .or_else(|| among(&self.service_accounts, &pod.service_account, "ServiceAccount", "serviceAccounts"))
            .or_else(|| selected(&self.pod_selector, &pod.labels, "pod", "podSelector"))
    }

    fn mismatch_of_namespace(&self, pod: &PodFacts) -> Option<String> {
        among(&self.namespaces, &pod.namespace, "namespace", "namespaces")
            .or_else(|| selected(&self.namespace_selector, &pod.namespace_labels, "namespace", "namespaceSelector"))
    }
}

fn among(list: &Option<Vec<String>>, value: &String, name: &str, field: &str) -> Option<String> {
    let out = list.as_ref().is_some_and(|list| !list.contains(value));
    out.then(|| format!("{name} {} is not among its {field}", shown(value)))
}

fn selected(
    selector: &Option<Selector>,
    labels: &BTreeMap<String, String>,
    whose: &str,
    field: &str,
) -> Option<String> {
    selector.as_ref().and_then(|selector| selector.mismatch(labels, whose, field))
}

impl document::Match {
    /// Whom it is about; a section that is missing or one too many is a problem of [`Check::whom`].
    pub(super) fn callers(&self) -> Callers {
        if self.kubernetes.is_some() { Callers::Pods } else { Callers::Processes }
    }
}

impl Check<'_> {
    pub(super) fn whom(&mut self, at: &Spanned<document::Match>) -> Option<Whom> {
        let message = match (&at.value.unix, &at.value.kubernetes) {
            (Some(unix), None) => return Some(Whom::Processes(self.processes(unix))),
            (None, Some(pods)) => return Some(Whom::Pods(self.pods(pods))),
            (None, None) => "it is empty and would match nobody; name a unix or a kubernetes section",
            (Some(_), Some(_)) => {
                "it has a unix and a kubernetes section, and no caller is both: a process in a pod is that pod. Write one \
                 policy for each"
            }
        };
        self.problem(at, "spec.match", message);
        None
    }

    fn processes(&mut self, unix: &Spanned<document::UnixMatch>) -> UnixMatch {
        let field = "spec.match.unix";
        let clauses = &unix.value;
        let lists = [
            ("uids", clauses.uids.as_ref().map(Vec::len)),
            ("users", clauses.users.as_ref().map(Vec::len)),
            ("gids", clauses.gids.as_ref().map(Vec::len)),
            ("systemdUnits", clauses.systemd_units.as_ref().map(Vec::len)),
            ("executables", clauses.executables.as_ref().map(Vec::len)),
            ("executableSha256", clauses.executable_sha256.as_ref().map(Vec::len)),
        ];
        self.refuse_empty(unix, field, &lists);
        // Any user can run any program that it may read, preload code into it, and give it any path in a mount namespace
        // of its own. So the executable narrows an identity and never is one.
        if lists[..4].iter().all(|(_, len)| len.is_none()) {
            let message = "it needs uids, users, gids or systemdUnits; an executable alone proves nothing, because every \
                           user can run it";
            self.problem(unix, field, message);
        }
        let numbers = |check: &mut Self, list: &List<u32>, name: &str| {
            list.as_ref()?;
            Some(check.list(list, &format!("{field}.{name}"), MAX_ENTRIES, |_, at, _| Some(at.value)))
        };
        UnixMatch {
            uids: numbers(self, &clauses.uids, "uids"),
            users: self.clause(&clauses.users, field, "users", check_user),
            gids: numbers(self, &clauses.gids, "gids"),
            executables: self.clause(&clauses.executables, field, "executables", parse_executable),
            executable_sha256: self.clause(&clauses.executable_sha256, field, "executableSha256", check_sha256),
            systemd_units: self.clause(&clauses.systemd_units, field, "systemdUnits", parse_unit),
        }
    }

    fn pods(&mut self, pods: &Spanned<document::KubernetesMatch>) -> KubernetesMatch {
        let field = "spec.match.kubernetes";
        let clauses = &pods.value;
        let lists = [
            ("namespaces", clauses.namespaces.as_ref().map(Vec::len)),
            ("serviceAccounts", clauses.service_accounts.as_ref().map(Vec::len)),
        ];
        self.refuse_empty(pods, field, &lists);
        if clauses.namespaces.is_none() && clauses.namespace_selector.is_none() {
            let message = "it needs namespaces or a namespaceSelector ({} is every namespace); labels and ServiceAccounts \
                           alone prove nothing, because whoever may create pods somewhere chooses them";
            self.problem(pods, field, message);
        }
        let selector = |check: &mut Self, selector: &Option<document::Selector>, name: &str| {
            selector.as_ref().map(|selector| check.selector(selector, &format!("{field}.{name}")))
        };
        KubernetesMatch {
            namespaces: self.clause(&clauses.namespaces, field, "namespaces", check_namespace),
            namespace_selector: selector(self, &clauses.namespace_selector, "namespaceSelector"),
            pod_selector: selector(self, &clauses.pod_selector, "podSelector"),
            service_accounts: self.clause(&clauses.service_accounts, field, "serviceAccounts", check_service_account),
        }
    }

    fn refuse_empty<T>(&mut self, at: &Spanned<T>, field: &str, lists: &[(&str, Option<usize>)]) {
        for (name, _) in lists.iter().filter(|(_, len)| *len == Some(0)) {
            self.problem(at, &format!("{field}.{name}"), "an empty list matches nobody; leave it out");
        }
    }

    fn clause<T>(
        &mut self,
        list: &List<String>,
        field: &str,
        name: &str,
        parse: fn(&str) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        list.as_ref()?;
        let field = format!("{field}.{name}");
        Some(self.list(list, &field, MAX_ENTRIES, |check, at, field| check.text(at, field, parse(&at.value))))
    }
}

/// The bounds of useradd(8): what a user database may hold is matched exactly, so only the size matters.
fn check_user(name: &str) -> Result<String, String> {
    const MAX_USER_BYTES: usize = 256;
    match !name.is_empty() && name.len() <= MAX_USER_BYTES && !name.contains(char::is_control) {
        true => Ok(name.to_owned()),
        false => Err(format!("it must have 1 to {MAX_USER_BYTES} bytes, all printable")),
    }
}

fn check_sha256(text: &str) -> Result<String, String> {
    match text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        true => Ok(text.to_owned()),
        false => Err("it must be 64 lower-case hexadecimal digits, as sha256sum prints them".to_owned()),
    }
}

fn parse_executable(text: &str) -> Result<Glob, String> {
    let odd = |segment: &str| segment.is_empty() || segment == "." || segment == "..";
    match text.strip_prefix('/').is_some_and(|path| !path.split('/').any(odd)) {
        true => Glob::parse(text),
        false => Err("it must be an absolute path without empty, '.' or '..' segments".to_owned()),
    }
}

fn parse_unit(text: &str) -> Result<Glob, String> {
    match text.contains('/') || text == "*" {
        true => Err("it must be a unit name such as web.service or web@*.service".to_owned()),
        false => Glob::parse(text),
    }
}

fn check_namespace(name: &str) -> Result<String, String> {
    match is_object_name(name) && !name.contains('.') && name.len() <= MAX_LABEL_BYTES {
        true => Ok(name.to_owned()),
        false => Err(format!("it must be a namespace: 1 to {MAX_LABEL_BYTES} bytes of a-z, 0-9 and '-'")),
    }
}

fn check_service_account(name: &str) -> Result<String, String> {
    match is_object_name(name) {
        true => Ok(name.to_owned()),
        false => Err("it must be the name of a ServiceAccount, without its namespace".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{EMBEDDED, PolicySet, Problem, Source};

    fn set(clauses: &str) -> Result<PolicySet, Vec<Problem>> {
        let text = format!(
            "apiVersion: csrd.dev/v1alpha1\nkind: CertificatePolicy\nmetadata: {{name: web}}\nspec:\n  match: {clauses}\n"
        );
        PolicySet::parse(&[Source { origin: "p.yaml".to_owned(), text }], EMBEDDED)
    }

    fn problems(clauses: &str) -> Vec<String> {
        set(clauses).map(drop).err().unwrap_or_default().iter().map(ToString::to_string).collect()
    }

    fn check(clauses: &str, expected: &[&str]) {
        assert_eq!(problems(clauses), expected, "{clauses}");
    }

    #[test]
    fn a_match_that_would_match_nobody_or_everybody_is_refused() {
        let field = "p.yaml:5: spec.match";
        check("{}", &[&format!("{field}: it is empty and would match nobody; name a unix or a kubernetes section")]);
        let anybody = format!(
            "{field}.unix: it needs uids, users, gids or systemdUnits; an executable alone proves nothing, because every \
             user can run it"
        );
        check("{unix: {}}", &[&anybody]);
        check("{unix: {executables: [/bin/web]}}", &[&anybody]);
        let empty = |name: &str| format!("{field}.unix.{name}: an empty list matches nobody; leave it out");
        check("{unix: {uids: []}}", &[&empty("uids")]);
        check("{unix: {uids: [1], executables: []}}", &[&empty("executables")]);
        check("{unix: {users: [a]}}", &[]);
        check("{unix: {gids: [1]}}", &[]);
        check("{unix: {systemdUnits: ['web@*.service']}}", &[]);
    }

    #[test]
    fn clauses_of_a_match_are_checked() {
        for (clause, words) in [
            ("users: ['']", "users[0]: it must have 1 to 256 bytes"),
            ("executables: [web]", "executables[0]: it must be an absolute path"),
            ("executables: [/a/../b]", "executables[0]: it must be an absolute path"),
            ("executables: [/a/]", "executables[0]: it must be an absolute path"),
            ("executables: ['/a/*b*']", "executables[0]: at most one '*' between two slashes"),
            ("executables: ['/a/{unix.user}']", "executables[0]: no {fact} slots here"),
            ("executableSha256: [abc]", "executableSha256[0]: it must be 64 lower-case hexadecimal digits"),
            ("systemdUnits: ['*']", "systemdUnits[0]: it must be a unit name"),
            ("systemdUnits: [a/b]", "systemdUnits[0]: it must be a unit name"),
        ] {
            let found = problems(&format!("{{unix: {{uids: [1], {clause}}}}}"));
            assert!(found.len() == 1 && found[0].contains(words), "{clause}: {found:?}");
        }
        assert_eq!(problems(&format!("{{unix: {{uids: [1], executableSha256: [{}]}}}}", "A".repeat(64))).len(), 1);
        let named = |bytes: usize| problems(&format!("{{unix: {{users: [{}]}}}}", "a".repeat(bytes))).len();
        assert_eq!((named(256), named(257)), (0, 1));
    }

    #[test]
    fn a_match_of_pods_rests_on_a_namespace() {
        let field = "p.yaml:5: spec.match.kubernetes";
        let anybody = format!(
            "{field}: it needs namespaces or a namespaceSelector ({{}} is every namespace); labels and ServiceAccounts alone \
             prove nothing, because whoever may create pods somewhere chooses them"
        );
        check("{kubernetes: {}}", &[&anybody]);
        check("{kubernetes: {serviceAccounts: [web], podSelector: {matchLabels: {app: web}}}}", &[&anybody]);
        check("{kubernetes: {namespaces: [production]}}", &[]);
        check("{kubernetes: {namespaceSelector: {}}}", &[]);
        check(
            "{kubernetes: {namespaces: [a], namespaceSelector: {}, podSelector: {}, serviceAccounts: [web.v1]}}",
            &[],
        );
        let empty = |name: &str| format!("{field}.{name}: an empty list matches nobody; leave it out");
        check("{kubernetes: {namespaces: []}}", &[&empty("namespaces")]);
        check("{kubernetes: {namespaces: [a], serviceAccounts: []}}", &[&empty("serviceAccounts")]);
        let both = problems("{unix: {uids: [1]}, kubernetes: {namespaces: [a]}}");
        assert!(both.len() == 1 && both[0].contains("spec.match: it has a unix and a kubernetes section"), "{both:?}");
    }

    #[test]
    fn names_of_namespaces_and_service_accounts_are_checked_and_bounded() {
        let namespace = |name: &str| problems(&format!("{{kubernetes: {{namespaces: ['{name}']}}}}"));
        assert_eq!(namespace(&"a".repeat(MAX_LABEL_BYTES)), [""; 0]);
        for name in ["", "A", "a.b", "*", "-a", &"a".repeat(MAX_LABEL_BYTES + 1)] {
            let found = namespace(name);
            assert!(found[0].contains("namespaces[0]: it must be a namespace: 1 to 63 bytes"), "{name}: {found:?}");
        }
        let account =
            |name: &str| problems(&format!("{{kubernetes: {{namespaces: [a], serviceAccounts: ['{name}']}}}}"));
        assert_eq!(account(&"a".repeat(253)), [""; 0]);
        for name in ["", "a/b", "system:serviceaccount:a:b", "*", &"a".repeat(254)] {
            let found = account(name);
            assert!(
                found[0].contains("serviceAccounts[0]: it must be the name of a ServiceAccount"),
                "{name}: {found:?}"
            );
        }
        let many = |n: usize| problems(&format!("{{kubernetes: {{namespaces: [{}]}}}}", "a, ".repeat(n)));
        assert_eq!(many(MAX_ENTRIES), [""; 0]);
        assert!(many(MAX_ENTRIES + 1)[0].ends_with("namespaces: 65 entries, at most 64 are allowed"));
    }

    fn pod() -> Facts {
        let labels = |key: &str, value: &str| [(key.to_owned(), value.to_owned())].into();
        Facts::Pod(PodFacts {
            namespace: "production".to_owned(),
            name: "web-0".to_owned(),
            uid: "7f5a4c3e".to_owned(),
            service_account: "web".to_owned(),
            node: "node1".to_owned(),
            labels: labels("app", "web"),
            namespace_labels: labels("team", "a"),
            ips: Vec::new(),
            services: [].into(),
        })
    }

    #[test]
    fn every_clause_of_a_match_of_pods_must_hold() {
        let mismatch = |clauses: &str| {
            let set = set(&format!("{{kubernetes: {{{clauses}}}}}")).unwrap();
            set.policies[0].whom.mismatch(&pod())
        };
        for clauses in [
            "namespaces: [test, production]",
            "namespaceSelector: {}",
            "namespaceSelector: {matchLabels: {team: a}}",
            "namespaces: [production], namespaceSelector: {matchLabels: {team: a}}, serviceAccounts: [db, web], \
             podSelector: {matchLabels: {app: web}}",
        ] {
            assert_eq!(mismatch(clauses), None, "{clauses}");
        }
        for (clauses, expected) in [
            ("namespaces: [test]", r#"namespace "production" is not among its namespaces"#),
            (
                "namespaces: [production], namespaceSelector: {matchLabels: {team: b}}",
                r#"namespace label "team" is "a", which its namespaceSelector does not ask for"#,
            ),
            // Labels of one kind are not those of the other.
            (
                "namespaceSelector: {matchLabels: {app: web}}",
                r#"its namespaceSelector asks for namespace label "app", which is not there"#,
            ),
            (
                "namespaceSelector: {}, serviceAccounts: [db]",
                r#"ServiceAccount "web" is not among its serviceAccounts"#,
            ),
            (
                "namespaceSelector: {}, podSelector: {matchLabels: {app: db}}",
                r#"pod label "app" is "web", which its podSelector does not ask for"#,
            ),
        ] {
            assert_eq!(mismatch(clauses).as_deref(), Some(expected), "{clauses}");
        }
    }

    #[test]
    fn a_process_of_a_host_and_a_pod_never_match_each_others_policies() {
        let root = crate::attest::Workload::of_uid(0);
        let pods = set("{kubernetes: {namespaceSelector: {}}}").unwrap();
        let why = pods.policies[0].whom.mismatch(root.facts());
        assert_eq!(why.as_deref(), Some("it matches pods, and the caller is a process of this host"));
        let processes = set("{unix: {uids: [0]}}").unwrap();
        let why = processes.policies[0].whom.mismatch(&pod());
        assert_eq!(why.as_deref(), Some("it matches processes of a host, and the caller is a pod"));
    }
}
