//! What a policy may ask of its signer: rules that no policy can widen.
//!
//! Invariant: a policy in force asks nothing of a built-in signer of Kubernetes that it would fail, and nothing that would
//! make a workload a node or a part of the control plane. `kubernetes.io/kube-apiserver-client` signs any user and any
//! group but one, so names that Kubernetes keeps for itself are refused when a policy is loaded and again when it decides.

use std::time::Duration;

use super::{
    MAX_NAME_BYTES, is_object_name,
    lifetime::{self, LIFETIMES, MIN_LIFETIME},
    shown,
    template::Pattern,
};
use crate::x509::{Names, Usage, Usages, name::MAX_DNS_LABEL_BYTES};

/// The signer of a policy on a host that names none.
pub const EMBEDDED: &str = "embedded";
/// Bytes in a signer's name (certificates.k8s.io/v1): room for a DNS subdomain, a namespace and an object in it.
pub const MAX_SIGNER_BYTES: usize = MAX_NAME_BYTES + 1 + MAX_DNS_LABEL_BYTES + 1 + MAX_NAME_BYTES;
/// The shortest lifetime that certificates.k8s.io/v1 takes as `expirationSeconds`.
pub const MIN_REQUESTED_LIFETIME: Duration = Duration::from_secs(600);
/// Users and groups that belong to Kubernetes itself.
const RESERVED_PREFIX: &str = "system:";

/// Signs users of the API server.
const API_CLIENT: &str = "kubernetes.io/kube-apiserver-client";
/// All that it signs; the first is a must.
const API_CLIENT_USAGES: Usages =
    Usages::empty().with(Usage::ClientAuth).with(Usage::DigitalSignature).with(Usage::KeyEncipherment);

/// Signers that no workload certificate can come from, with the reason.
pub(super) const REFUSED: [(&str, &str); 3] = [
    (
        "kubernetes.io/kubelet-serving",
        "it signs only for kubelets: organization system:nodes, a common name that begins with system:node:, server auth \
         alone and no URI; a workload certificate from it would fail or claim to be a node. Use a signer of your own, for \
         example csrd.dev/workload",
    ),
    (
        "kubernetes.io/kube-apiserver-client-kubelet",
        "it signs only for kubelets: organization system:nodes, a common name that begins with system:node: and no other \
         name; whoever holds a certificate from it is a node to the API server. Use a signer of your own, for example \
         csrd.dev/workload",
    ),
    (
        "kubernetes.io/legacy-unknown",
        "certificates.k8s.io/v1 refuses every request addressed to it. Use a signer of your own, for example \
         csrd.dev/workload",
    ),
];

/// The signer of a policy, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Signer(String);

impl Signer {
    /// The error is a sentence for the policy's author.
    pub(super) fn parse(name: &str) -> Result<Self, String> {
        if let Some((_, reason)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
            return Err(format!("{name} is refused: {reason}"));
        }
        // As certificates.k8s.io/v1 checks signerName.
        let is_domain = |domain: &str| {
            is_object_name(domain)
                && domain.contains('.')
                && domain.split('.').all(|it| it.len() <= MAX_DNS_LABEL_BYTES)
        };
        let is_requested = name.len() <= MAX_SIGNER_BYTES
            && name
                .split_once('/')
                .is_some_and(|(domain, path)| is_domain(domain) && path.split('.').all(is_object_name));
        match name == EMBEDDED || is_requested {
            true => Ok(Self(name.to_owned())),
            false => Err(format!("it must be {EMBEDDED}, or a signer name such as csrd.dev/workload")),
        }
    }

    pub(super) fn embedded() -> Self {
        Self(EMBEDDED.to_owned())
    }

    pub(super) fn name(&self) -> &str {
        &self.0
    }

    /// The shortest lifetime that it can be asked for.
    pub(super) fn min_lifetime(&self) -> Duration {
        if self.0 == EMBEDDED { MIN_LIFETIME } else { MIN_REQUESTED_LIFETIME }
    }

    /// Reads a lifetime of a policy with this signer.
    pub(super) fn parse_lifetime(&self, text: &str) -> Result<Duration, String> {
        let parsed = lifetime::parse(text, LIFETIMES)?;
        match parsed < self.min_lifetime() {
            false => Ok(parsed),
            true => Err(format!(
                "it must be at least {}: the API server takes no shorter one for a signer other than {EMBEDDED}",
                lifetime::print(MIN_REQUESTED_LIFETIME)
            )),
        }
    }

    /// The usages of a policy that names none.
    pub(super) fn default_usages(&self) -> Usages {
        if self.0 == API_CLIENT {
            Usages::DEFAULT.minus(Usages::DEFAULT.minus(API_CLIENT_USAGES))
        } else {
            Usages::DEFAULT
        }
    }

    /// Whether a policy may allow these usages.
    pub(super) fn check_usages(&self, usages: Usages) -> Result<(), String> {
        let extra = usages.minus(API_CLIENT_USAGES);
        if self.0 == API_CLIENT && (!extra.is_empty() || !usages.contains(Usage::ClientAuth)) {
            return Err(format!(
                "{API_CLIENT} signs client auth, with digital signature and key encipherment beside it"
            ));
        }
        Ok(())
    }

    /// Whether a policy may allow a common name or organization like this.
    pub(super) fn check_subject(&self, pattern: &Pattern) -> Result<(), String> {
        match self.0 == API_CLIENT && pattern.could_begin_with(RESERVED_PREFIX) {
            true => Err(format!(
                "it could grant a name that begins with {RESERVED_PREFIX}; those belong to Kubernetes itself, and \
                 {API_CLIENT} would make the workload one of its parts"
            )),
            false => Ok(()),
        }
    }

    /// What this signer must not be asked for, whatever the policy says.
    pub(super) fn refuse_names(&self, names: &Names) -> Option<String> {
        let mut subject = names.common_name.iter().chain(&names.organizations);
        let reserved = subject.find(|name| name.starts_with(RESERVED_PREFIX)).filter(|_| self.0 == API_CLIENT)?;
        Some(format!(
            "{} is refused: names that begin with {RESERVED_PREFIX} belong to Kubernetes itself",
            shown(reserved)
        ))
    }

    /// What this signer would fail.
    pub(super) fn refuse_usages(&self, usages: Usages) -> Option<String> {
        let without = self.0 == API_CLIENT && !usages.contains(Usage::ClientAuth);
        without.then(|| format!("usages: {API_CLIENT} signs nothing without client auth"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{PolicySet, Problem, Source};

    /// What is wrong with a policy that has these lines, indented by two spaces from line 6 on.
    fn problems(spec: &str) -> Vec<String> {
        let text = format!(
            "apiVersion: csrd.dev/v1alpha1\nkind: CertificatePolicy\nmetadata: {{name: web}}\nspec:\n  \
             match: {{kubernetes: {{namespaces: [a]}}}}\n{spec}\n"
        );
        let lines = |problems: Vec<Problem>| problems.iter().map(ToString::to_string).collect();
        PolicySet::parse(&[Source { origin: "p.yaml".to_owned(), text }], EMBEDDED).map_or_else(lines, |_| Vec::new())
    }

    fn refused(spec: &str, problem: &str) {
        let found = problems(spec);
        assert!(found.len() == 1 && found[0].contains(problem), "{spec}: {found:#?}");
    }

    #[test]
    fn signers_that_refuse_workloads_are_refused_with_the_reason() {
        let refused = |signer: &str, words: &str| {
            refused(&format!("  signer: {signer}"), &format!("p.yaml:6: spec.signer: {words}"))
        };
        refused(
            "kubernetes.io/kubelet-serving",
            "kubernetes.io/kubelet-serving is refused: it signs only for kubelets",
        );
        let kubelet_client = "kubernetes.io/kube-apiserver-client-kubelet";
        refused(kubelet_client, &format!("{kubelet_client} is refused: it signs only for kubelets"));
        refused(
            "kubernetes.io/legacy-unknown",
            "kubernetes.io/legacy-unknown is refused: certificates.k8s.io/v1 refuses",
        );
        for name in ["''", "'a b'", "other", "a/b", "a.b", "a.b/", "/b", "a.b/c/d", "A.b/c", "a.b/c_d"] {
            refused(name, "it must be embedded, or a signer name such as csrd.dev/workload");
        }
        for name in
            ["embedded", "csrd.dev/workload", "kubernetes.io/kube-apiserver-client", "issuers.cert-manager.io/ns.name"]
        {
            assert_eq!(problems(&format!("  signer: {name}")), [""; 0]);
        }
    }

    #[test]
    fn the_name_of_a_signer_has_bounds() {
        let long = |n: usize| "a".repeat(n);
        let domain = |n: usize| [long(63), long(63), long(63), long(n - 192)].join(".");
        let path = |n: usize| format!("{}.{}", long(253), long(n - 254));
        let longest = |bytes: usize| format!("{}/{}", domain(MAX_NAME_BYTES), path(bytes - MAX_NAME_BYTES - 1));
        assert_eq!(problems(&format!("  signer: {}", longest(MAX_SIGNER_BYTES))), [""; 0]);
        for name in [
            longest(MAX_SIGNER_BYTES + 1),
            format!("{}/a", domain(MAX_NAME_BYTES + 1)),
            format!("a.{}/a", long(64)),
            format!("a.b/{}", long(MAX_NAME_BYTES + 1)),
        ] {
            refused(&format!("  signer: {name}"), "it must be embedded, or a signer name");
        }
    }

    #[test]
    fn a_requested_certificate_lives_as_long_as_the_api_server_demands() {
        let with = |lifetime: &str| format!("  signer: a.b/c\n  allow: {{lifetime: {{{lifetime}}}}}");
        for lifetime in ["min: 10m", "max: 10m", "default: 10m", "min: 10m, default: 10m, max: 10m"] {
            assert_eq!(problems(&with(lifetime)), [""; 0], "{lifetime}");
        }
        for field in ["min", "default", "max"] {
            let problem = format!(
                "p.yaml:7: spec.allow.lifetime.{field}: it must be at least 10m: the API server takes no shorter"
            );
            refused(&with(&format!("{field}: 9m59s")), &problem);
        }
        assert_eq!(problems("  allow: {lifetime: {min: 1s}}"), [""; 0], "of the embedded signer");
    }

    /// A policy for users of the API server.
    fn users(allow: &str) -> String {
        format!("  signer: {API_CLIENT}\n  allow: {{{allow}}}")
    }

    #[test]
    fn a_policy_for_users_of_the_api_server_allows_what_that_signer_signs() {
        for allow in [
            "",
            "commonNames: [developer], organizations: [dev-team]",
            "commonNames: ['ns:{kubernetes.namespace}'], usages: [client auth]",
            "usages: [client auth, digital signature, key encipherment], keys: [rsa-2048]",
        ] {
            assert_eq!(problems(&users(allow)), [""; 0], "{allow}");
        }
        let usages = "p.yaml:7: spec.allow.usages: kubernetes.io/kube-apiserver-client signs client auth, with digital";
        refused(&users("usages: [client auth, server auth]"), usages);
        refused(&users("usages: [digital signature]"), usages);
    }

    #[test]
    fn a_policy_cannot_grant_users_and_groups_of_kubernetes_itself() {
        for (field, entry) in [
            ("commonNames", "system:kube-controller-manager"),
            ("commonNames", "system:serviceaccount:a:b"),
            ("commonNames", "'system:node:{kubernetes.node}'"),
            ("organizations", "system:masters"),
            ("organizations", "'{kubernetes.namespace}:masters'"),
            ("organizations", "'sys{kubernetes.pod}:masters'"),
        ] {
            let problem = format!("p.yaml:7: spec.allow.{field}[0]: it could grant a name that begins with system:");
            refused(&users(&format!("{field}: [{entry}]")), &problem);
        }
        assert_eq!(problems("  allow: {organizations: [system:masters]}"), [""; 0], "of a signer that nobody believes");
    }

    #[test]
    fn what_belongs_to_kubernetes_is_refused_whatever_the_policy_says() {
        let names = |common_name: &str, organization: &str| Names {
            common_name: Some(common_name.to_owned()),
            organizations: vec![organization.to_owned()],
            ..Names::default()
        };
        let signer = Signer::parse(API_CLIENT).unwrap();
        assert_eq!(signer.refuse_names(&names("developer", "dev-team")), None);
        let why = signer.refuse_names(&names("system:admin", "dev-team")).unwrap();
        assert_eq!(why, "\"system:admin\" is refused: names that begin with system: belong to Kubernetes itself");
        assert!(signer.refuse_names(&names("developer", "system:masters")).is_some());
        assert_eq!(Signer::embedded().refuse_names(&names("system:admin", "system:masters")), None);
        let server = Usages::empty().with(Usage::DigitalSignature);
        assert!(signer.refuse_usages(server).is_some_and(|why| why.ends_with("signs nothing without client auth")));
        assert_eq!(signer.refuse_usages(server.with(Usage::ClientAuth)), None);
        assert_eq!(Signer::embedded().refuse_usages(server), None);
    }
}
