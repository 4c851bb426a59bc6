//! Every way to forge a request, each a row: the good one with one thing changed.

use super::*;

#[test]
fn who_made_the_request_is_told_by_name_and_groups_together() {
    let no_agent: &[fn(&mut Case)] = &[
        |case| case.object.spec.username = Some("developer".into()),
        |case| case.object.spec.username = Some("system:serviceaccount:production:csrd-agent".into()),
        |case| case.object.spec.username = Some("system:serviceaccount:csrd-system:csrd-agent2".into()),
        |case| case.object.spec.username = None,
        |case| case.object.spec.groups = None,
        |case| case.object.spec.groups = Some(strings(&["system:serviceaccounts"])),
        |case| case.object.spec.groups = Some(strings(&["system:serviceaccounts:csrd-system"])),
    ];
    for change in no_agent {
        let said = refused("NOT_AN_AGENT", change);
        assert!(said.contains("ServiceAccount csrd-system/csrd-agent"), "{said}");
        // Whose signer it is has the say on a request without an agent.
        ignored(|case| {
            *case = Case::api_client("developer", &[]);
            change(case);
        });
    }
}

#[test]
fn a_token_that_is_not_bound_to_one_pod_on_one_node_is_refused() {
    for key in [extra::NODE_NAME, extra::POD_NAME, extra::POD_UID] {
        for values in [&[][..], &[""], &["n1", "n2"]] {
            let said = refused("TOKEN_NOT_BOUND", |case| case.bind(key, values));
            assert!(said.contains(key), "{said}");
        }
    }
    refused("TOKEN_NOT_BOUND", |case| case.object.spec.extra = None);
    refused("TOKEN_NOT_BOUND", |case| case.bind(extra::NODE_NAME, &[&"n".repeat(MAX_ANNOTATION_BYTES + 1)]));
}

#[test]
fn the_agents_pod_is_the_one_its_token_names_on_that_node() {
    let others: &[fn(&mut PodFacts)] = &[
        |agent| agent.node = "n2".into(),
        |agent| agent.namespace = "production".into(),
        |agent| agent.name = "agent-1".into(),
        |agent| agent.uid = "another".into(),
        |agent| agent.service_account = "default".into(),
    ];
    for change in others {
        refused("AGENT_DIFFERS", |case| change(&mut case.agent));
    }
}

#[test]
fn a_pod_without_a_service_account_is_refused_even_if_it_is_there() {
    let said = refused("NO_SERVICE_ACCOUNT", |case| {
        case.pod.service_account.clear();
        case.annotate(annotation::SERVICE_ACCOUNT, "");
    });
    assert!(said.starts_with("a pod without a ServiceAccount, as static pods are"), "{said}");
}

#[test]
fn annotations_are_a_claim_that_must_be_whole_and_true() {
    use annotation::*;
    for key in [POD_NAMESPACE, POD_NAME, POD_UID, SERVICE_ACCOUNT, NODE] {
        let said =
            refused("ANNOTATION_MISSING", |case| drop(case.object.metadata.annotations.as_mut().unwrap().remove(key)));
        assert!(said.contains(key), "{said}");
        refused("ANNOTATION_MISSING", |case| case.annotate(key, &"x".repeat(MAX_ANNOTATION_BYTES + 1)));
        // They become parts of a path to the API server.
        for path in ["csrd-system/secrets/csrd-ca?x=", "a/b", "..", "a?b", "a%2fb", "A b"] {
            refused("ANNOTATION_MISSING", |case| case.annotate(key, path));
        }
    }
    refused("ANNOTATION_MISSING", |case| case.object.metadata.annotations = None);
    for key in [POD_NAMESPACE, POD_NAME, POD_UID, SERVICE_ACCOUNT] {
        refused("POD_DIFFERS", |case| case.annotate(key, &"x".repeat(MAX_ANNOTATION_BYTES)));
    }
}

#[test]
fn a_pod_of_another_node_is_refused_whichever_node_is_claimed() {
    let said = refused("POD_ON_OTHER_NODE", |case| case.pod.node = "n2".into());
    assert_eq!(
        said,
        "pod production/web-0 (UID pod-uid) is on node \"n2\", and an agent asks only for pods of its own node, here \"n1\""
    );
    let said = refused("OTHER_NODE_CLAIMED", |case| {
        case.pod.node = "n2".into();
        case.annotate(annotation::NODE, "n2");
    });
    assert_eq!(said, "annotation csrd.dev/node says node \"n2\", and the requester's token is bound to node \"n1\"");
}

#[test]
fn a_lifetime_is_asked_for_and_within_policy() {
    for seconds in [None, Some(0), Some(-1), Some(MIN_EXPIRATION_SECONDS - 1), Some(i32::MIN)] {
        refused("EXPIRATION_MISSING", |case| case.object.spec.expiration_seconds = seconds);
    }
    approved(|case| case.object.spec.expiration_seconds = Some(MIN_EXPIRATION_SECONDS));
    for seconds in [24 * 3600 + 1, i32::MAX] {
        refused("LIFETIME_NOT_ALLOWED", |case| case.object.spec.expiration_seconds = Some(seconds));
    }
}

#[test]
fn usages_are_exactly_what_spec_says_and_within_policy() {
    for name in ["cert sign", "any", "signing", "Digital Signature", ""] {
        let said = refused("USAGE_NOT_ALLOWED", |case| case.object.spec.usages = Some(strings(&[name])));
        assert!(said.contains(&format!("{name:?}")), "{said}");
    }
    let (_, approval) = approved(|case| case.object.spec.usages = Some(strings(&["digital signature", "client auth"])));
    assert_eq!(approval.grant.usages().to_string(), "digital signature, client auth");
    refused("CSR_USAGE", |case| {
        case.object.spec.usages = Some(strings(&["digital signature", "client auth"]));
        case.object.spec.request = pkcs10(vec![uri(SPIFFE_ID)], |params| {
            params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        });
    });
}

#[test]
fn names_of_others_are_refused() {
    let names = [
        uri("spiffe://example.org/ns/production/sa/api"),
        uri("spiffe://example.org/ns/default/sa/web"),
        dns("api.production.svc"),
        dns("kubernetes.default.svc"),
        dns("*.production.svc"),
        SanType::IpAddress("10.1.0.8".parse::<IpAddr>().unwrap()),
    ];
    for name in names {
        let said = refused("NAME_NOT_ALLOWED", |case| case.object.spec.request = pkcs10(vec![name.clone()], |_| ()));
        assert!(said.contains("policy web"), "{said}");
    }
    let said = refused("NO_POLICY_MATCHES", |case| {
        case.pod.namespace = "default".into();
        case.annotate(annotation::POD_NAMESPACE, "default");
    });
    assert!(said.contains("no policy matches"), "{said}");
}

#[test]
fn a_hostile_pkcs10_request_is_refused_for_what_is_wrong_with_it() {
    let request = |change: fn(&mut CertificateParams)| {
        move |case: &mut Case| case.object.spec.request = pkcs10(vec![uri(SPIFFE_ID)], change)
    };
    refused("CSR_MALFORMED", |case| case.object.spec.request = ByteString(b"garbage".to_vec()));
    refused("CSR_MALFORMED", |case| case.object.spec.request.0.extend_from_within(..));
    refused("CSR_TOO_LONG", |case| case.object.spec.request.0.resize(2 * MAX_PKCS10_BYTES, b'\n'));
    refused("CSR_TOO_LONG", |case| case.object.spec.request.0.resize(2 * MAX_PKCS10_BYTES + 1, b'\n'));
    refused("CSR_CERTIFICATE_AUTHORITY", request(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)));
    refused(
        "CSR_EXTENSION",
        request(|params| {
            let mut extension = CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]);
            extension.set_criticality(true);
            params.custom_extensions.push(extension);
        }),
    );
    refused(
        "CSR_NAME",
        request(|params| params.subject_alt_names = vec![dns("web.production.svc"); crate::x509::name::MAX_NAMES + 1]),
    );
}
