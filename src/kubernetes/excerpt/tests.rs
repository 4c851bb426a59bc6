use std::{collections::BTreeMap, convert::Infallible};

use http_body_util::{BodyExt as _, Full};
use k8s_openapi::api::{certificates::v1::CertificateSigningRequest, core::v1::Pod};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{kinds::PAGE_BYTES, *};

const POD: &str = "/api/v1/namespaces/shop/pods/web";
const PODS: &str = "/api/v1/pods";

/// What is kept of an answer that arrives in pieces of this length.
fn read(path: &str, query: Option<&str>, answer: &str, piece: usize) -> String {
    let mut excerpt = Excerpt::of(path, query).unwrap();
    let mut kept = Vec::new();
    for bytes in answer.as_bytes().chunks(piece.max(1)) {
        excerpt.feed(bytes);
        kept.extend(excerpt.take());
    }
    String::from_utf8(kept).unwrap()
}

fn labels(many: usize, bytes: usize) -> BTreeMap<String, String> {
    (0..many).map(|n| (format!("l{n}"), "x".repeat(bytes))).collect()
}

fn pod(labels: &BTreeMap<String, String>) -> Value {
    json!({
        "kind": "Pod", "apiVersion": "v1",
        "metadata": {"name": "web", "generateName": "w", "namespace": "shop", "uid": "u1", "resourceVersion": "7",
            "labels": labels, "annotations": {"huge": "x".repeat(MAX_POD_BYTES), "a\"{[b": "}"},
            "managedFields": [{"fieldsV1": {"f:metadata": {}}}, 3, null, "]}\\"]},
        "spec": {"nodeName": "n1", "containers": [{"env": [{"value": "\\\"}]"}]}], "hostNetwork": true},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.7"}],
            "containerStatuses": [{"name": "a", "containerID": "containerd://1"}, {"containerID": null}]},
    })
}

fn expected(labels: &BTreeMap<String, String>) -> Value {
    json!({
        "kind": "Pod", "apiVersion": "v1",
        "metadata": {"name": "web", "namespace": "shop", "uid": "u1", "resourceVersion": "7", "labels": labels,
            "annotations": {}},
        "spec": {"nodeName": "n1", "hostNetwork": true},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.7"}],
            "containerStatuses": [{"containerID": "containerd://1"}, {"containerID": null}]},
    })
}

fn is_beyond_in(object: &Value) -> bool {
    is_beyond(&serde_json::from_value(object["metadata"].clone()).unwrap())
}

#[test]
fn of_an_object_in_any_answer_and_in_any_pieces_what_is_looked_at_is_read_and_nothing_else() {
    let few = labels(2, 3);
    let (whole, expected) = (pod(&few), expected(&few));
    let list =
        json!({"kind": "PodList", "metadata": {"continue": "c", "resourceVersion": "9"}, "items": [whole, whole]});
    let event = json!({"type": "ADDED", "object": whole});
    let end = json!({"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "m"}});
    for piece in [1, 2, 3, 7, 64, usize::MAX] {
        let parse = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(parse(&read(POD, None, &whole.to_string(), piece)), expected);
        let pretty = serde_json::to_string_pretty(&whole).unwrap();
        assert_eq!(parse(&read(POD, None, &pretty, piece)), expected);
        let kept = parse(&read(PODS, Some("limit=5"), &list.to_string(), piece));
        assert_eq!(kept, json!({"kind": "PodList", "metadata": list["metadata"], "items": [expected, expected]}));
        let kept = read(PODS, Some("&watch=true&allowWatchBookmarks=true"), &format!("{event}\n{end}\n"), piece);
        let lines: Vec<_> = kept.lines().map(parse).collect();
        assert_eq!(lines, [json!({"type": "ADDED", "object": expected}), end.clone()]);
    }
}

#[test]
fn labels_are_read_up_to_their_bound_and_with_one_more_the_object_is_only_named() {
    let kept = excerpt(POD, &pod(&labels(MAX_LABELS, 3)));
    assert_eq!(kept, expected(&labels(MAX_LABELS, 3)));
    let kept = excerpt(POD, &pod(&labels(MAX_LABELS + 1, 3)));
    let bound = format!("of its labels at most {MAX_LABELS} are read");
    let names = json!({"name": "web", "namespace": "shop", "uid": "u1", "resourceVersion": "7",
        "annotations": {BEYOND: bound}});
    assert_eq!(kept, json!({"metadata": names}));
    let service = |many| json!({"metadata": {"name": "s"}, "spec": {"selector": labels(many, 3)}});
    let path = "/api/v1/services/s";
    assert_eq!(excerpt(path, &service(MAX_SELECTOR_LABELS)), service(MAX_SELECTOR_LABELS));
    assert!(is_beyond_in(&excerpt(path, &service(MAX_SELECTOR_LABELS + 1))));
}

#[test]
fn every_kind_is_read_up_to_its_bytes_and_with_one_more_is_only_named() {
    let metadata = |more: Value| {
        let mut metadata = json!({"name": "n", "uid": "u"});
        metadata.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        metadata
    };
    type Filled<'a> = &'a dyn Fn(&str) -> Value;
    let filled: [(&str, usize, Filled<'_>); 8] = [
        (POD, MAX_POD_BYTES, &|fill| json!({"metadata": metadata(json!({})), "spec": {"nodeName": fill}})),
        (
            "/api/v1/namespaces/n",
            MAX_NAMESPACE_BYTES,
            &|fill| json!({"metadata": metadata(json!({"labels": {"a": fill}}))}),
        ),
        (
            "/api/v1/services/n",
            MAX_SERVICE_BYTES,
            &|fill| json!({"metadata": metadata(json!({})), "spec": {"selector": {"a": fill}}}),
        ),
        (
            "/apis/discovery.k8s.io/v1/endpointslices/n",
            MAX_SLICE_BYTES,
            &|fill| json!({"metadata": metadata(json!({})), "endpoints": [{"targetRef": {"uid": fill}}]}),
        ),
        (
            "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/n",
            MAX_SLICE_BYTES,
            &|fill| json!({"metadata": metadata(json!({})), "endpoints": [{"addresses": [fill]}]}),
        ),
        (
            "/api/v1/nodes/n",
            MAX_NODE_BYTES,
            &|fill| json!({"metadata": metadata(json!({})), "status": {"addresses": [fill]}}),
        ),
        (
            "/apis/certificates.k8s.io/v1/certificatesigningrequests/n",
            MAX_REQUEST_BYTES,
            &|fill| json!({"metadata": metadata(json!({})), "spec": {"request": fill}}),
        ),
        (
            "/api/v1/configmaps/n",
            MAX_TRUST_BUNDLE_BYTES,
            &|fill| json!({"metadata": metadata(json!({})), "data": {"ca.crt": fill}}),
        ),
    ];
    assert_eq!(filled.len(), KINDS.len());
    for (path, max, object) in filled {
        let fits = object(&"x".repeat(max - object("").to_string().len()));
        assert_eq!(excerpt(path, &fits), fits, "{path}");
        let beyond = excerpt(path, &object(&"x".repeat(max + 1 - object("").to_string().len())));
        assert!(is_beyond_in(&beyond) && beyond["metadata"]["uid"] == "u", "{path}: {beyond}");
    }
}

#[test]
fn no_more_than_an_excerpt_is_held_of_whatever_comes() {
    let endless = "x".repeat(1 << 20);
    for (before, after) in [
        (format!("{{\"metadata\":{{\"uid\":\"u1\",\"labels\":{{\"a\":\"{endless}"), "\"}}}"),
        (format!("{{\"metadata\":{{\"uid\":\"u1\",\"labels\":{{\"{endless}"), "\":\"\"}}}"),
        (format!("{{\"metadata\":{{\"uid\":\"u1\"}},\"{endless}"), "\":1}"),
        (format!("{{\"metadata\":{{\"uid\":\"u1\"}},\"spec\":{{\"containers\":{}", "[".repeat(1 << 20)), ""),
        (format!("{{\"metadata\":{{\"uid\":\"u1\",\"labels\":{{\"a\":{}", "[".repeat(1 << 20)), ""),
    ] {
        let mut excerpt = Excerpt::of(POD, None).unwrap();
        excerpt.feed(before.as_bytes());
        let held = excerpt.kept.capacity() + excerpt.key.capacity() + excerpt.stack.len();
        assert!(held <= 4 * MAX_POD_BYTES, "{held} bytes of {:.40}", before);
        if !after.is_empty() {
            excerpt.feed(after.as_bytes());
            let kept: Value = serde_json::from_slice(&excerpt.take()).unwrap();
            assert_eq!(kept["metadata"]["uid"], "u1");
        }
    }
}

#[test]
fn an_object_beyond_its_bound_does_not_touch_its_neighbours() {
    let (few, many) = (pod(&labels(1, 1)), pod(&labels(MAX_LABELS + 1, 1)));
    let list = json!({"metadata": {"continue": "c"}, "items": [few, many, few]}).to_string();
    let kept: Value = serde_json::from_str(&read(PODS, None, &list, 100)).unwrap();
    let beyond: Vec<_> = kept["items"].as_array().unwrap().iter().map(is_beyond_in).collect();
    assert_eq!(beyond, [false, true, false]);
    assert_eq!((&kept["items"][0], &kept["items"][2]), (&expected(&labels(1, 1)), &expected(&labels(1, 1))));
}

#[test]
fn what_is_not_others_to_write_is_read_whole() {
    for path in [
        "/apis/csrd.dev/v1alpha1/certificatepolicies",
        "/api/v1/namespaces/csrd-system/secrets/csrd-ca",
        "/version",
        "/api/v1/namespaces/kube-system/configmaps",
        "/apis/certificates.k8s.io/v1",
    ] {
        assert!(Excerpt::of(path, None).is_none(), "{path}");
    }
}

#[test]
fn a_page_of_excerpts_has_a_bound_of_its_own() {
    assert_eq!(page(MAX_SERVICE_BYTES), 500);
    for max in [MAX_POD_BYTES, MAX_SLICE_BYTES, MAX_REQUEST_BYTES, MAX_NODE_BYTES, MAX_TRUST_BUNDLE_BYTES] {
        assert!((16..=128).contains(&page(max)) && page(max) as usize * max <= PAGE_BYTES, "{max}");
    }
}

/// One answer through the layer that a client has.
async fn through(status: u16, method: &str, uri: &str, answer: String) -> Value {
    let server = tower::service_fn(move |_: Request<()>| {
        let body = Full::from(answer.clone());
        async move { Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap()) }
    });
    let request = Request::builder().method(method).uri(uri).body(()).unwrap();
    let answer = Excerpts(server).call(request).await.unwrap();
    serde_json::from_slice(&answer.into_body().collect().await.unwrap().to_bytes()).unwrap()
}

#[tokio::test]
async fn answers_of_a_client_are_excerpts_and_its_errors_are_whole() {
    let few = labels(1, 1);
    assert_eq!(through(200, "GET", POD, pod(&few).to_string()).await, expected(&few));
    let created = through(201, "POST", "/api/v1/namespaces/shop/pods", pod(&few).to_string()).await;
    assert_eq!(created, expected(&few), "a collection's path, and one object");
    let status = json!({"kind": "Status", "details": {"retryAfterSeconds": 3}, "code": 429});
    assert_eq!(through(429, "GET", POD, status.to_string()).await, status);
}

#[test]
fn whole_types_are_read_from_excerpts_and_from_what_stands_in_their_place() {
    let kept: Pod = serde_json::from_value(excerpt(POD, &pod(&labels(1, 1)))).unwrap();
    assert_eq!(kept.spec.unwrap().node_name.as_deref(), Some("n1"));
    let path = "/apis/certificates.k8s.io/v1/certificatesigningrequests/n";
    let request =
        json!({"metadata": {"name": "n"}, "spec": {"request": "", "username": "x".repeat(MAX_REQUEST_BYTES)}});
    let kept: CertificateSigningRequest = serde_json::from_value(excerpt(path, &request)).unwrap();
    assert!(is_beyond(&kept.metadata) && kept.metadata.name.as_deref() == Some("n"));
}

/// Any JSON; keys are often those that are read.
fn any_json() -> impl Strategy<Value = Value> {
    let key = prop_oneof![
        Just("metadata".to_owned()),
        Just("labels".to_owned()),
        Just("spec".to_owned()),
        Just("status".to_owned()),
        Just("name".to_owned()),
        Just("podIPs".to_owned()),
        Just("nodeName".to_owned()),
        ".{0,4}"
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        ".{0,6}".prop_map(Value::from)
    ];
    leaf.prop_recursive(5, 64, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map(key.clone(), inner, 0..5)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Whether all of `part` is in `whole`.
fn is_part(part: &Value, whole: &Value) -> bool {
    match (part, whole) {
        (Value::Object(part), Value::Object(whole)) => {
            part.iter().all(|(key, value)| whole.get(key).is_some_and(|whole| is_part(value, whole)))
        }
        (Value::Array(part), Value::Array(whole)) => {
            part.len() <= whole.len() && part.iter().all(|value| whole.iter().any(|whole| is_part(value, whole)))
        }
        (part, whole) => part == whole,
    }
}

proptest! {
    #[test]
    fn whatever_an_object_is_its_excerpt_is_json_and_part_of_it(mut object in any_json(), piece in 1usize..9) {
        if !object.is_object() {
            object = json!({"metadata": object.clone(), "spec": object});
        }
        let kept: Value = serde_json::from_str(&read(POD, None, &object.to_string(), piece)).unwrap();
        prop_assert!(is_part(&kept, &object), "{kept} of {object}");
        for field in ["name", "labels"] {
            if let Some(map) = object["metadata"].as_object().filter(|map| map.contains_key(field)) {
                prop_assert_eq!(&kept["metadata"][field], &map[field]);
            }
        }
    }
}
