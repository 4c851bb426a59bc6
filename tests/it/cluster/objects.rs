//! Objects that tests need, made by the admin.

use std::{collections::BTreeMap, net::Ipv4Addr, sync::atomic::AtomicU16, sync::atomic::Ordering};

use k8s_openapi::api::{
    authentication::v1::TokenRequest,
    authorization::v1::SubjectAccessReview,
    core::v1::{Namespace, Node, Pod, Service, ServiceAccount},
    rbac::v1::{ClusterRole, ClusterRoleBinding},
};
use kube::{
    Api, Resource, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{ControlPlane, eventually, unique};

type Labels<'a> = &'a [(&'a str, &'a str)];

impl ControlPlane {
    /// A namespace of the test's own, with its default ServiceAccount and its copy of the cluster's CA certificate.
    pub(crate) async fn namespace(&self, labels: Labels<'_>) -> String {
        let name = unique("test");
        let namespace = json!({"metadata": {"name": name, "labels": map(labels)}});
        create::<Namespace>(&Api::all(self.admin().await), namespace).await;
        self.default_account(&name).await;
        name
    }

    /// Waits for what the controller manager puts into every namespace.
    pub(super) async fn default_account(&self, namespace: &str) {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.admin().await, namespace);
        eventually("a default ServiceAccount", async || accounts.get_opt("default").await.unwrap()).await;
    }

    pub(crate) async fn service_account(&self, namespace: &str, name: &str) -> ServiceAccount {
        create(&Api::namespaced(self.admin().await, namespace), json!({"metadata": {"name": name}})).await
    }

    /// A ready node, with [`unique`] of this name.
    pub(crate) async fn node(&self, name: &str) -> Node {
        let nodes: Api<Node> = Api::all(self.admin().await);
        let node: Node = create(&nodes, json!({"metadata": {"name": unique(name)}})).await;
        let resources = json!({"cpu": "64", "memory": "256Gi", "pods": "1000"});
        let status = json!({"status": {
            "capacity": resources,
            "allocatable": resources,
            "conditions": [{"type": "Ready", "status": "True", "reason": "Test", "message": "no kubelet"}],
        }});
        nodes.patch_status(&node.name_any(), &PatchParams::default(), &Patch::Strategic(status)).await.unwrap();
        // Admission taints a new node until a controller sees it ready; that controller does not run here.
        let untaint = Patch::Merge(json!({"spec": {"taints": null}}));
        nodes.patch(&node.name_any(), &PatchParams::default(), &untaint).await.unwrap()
    }

    /// A running pod with one container, on `node`.
    pub(crate) async fn pod(
        &self,
        namespace: &str,
        name: &str,
        node: &str,
        service_account: &str,
        labels: Labels<'_>,
    ) -> Pod {
        self.run(json!({
            "metadata": {"namespace": namespace, "name": name, "labels": map(labels)},
            "spec": {
                "nodeName": node,
                "serviceAccountName": service_account,
                "containers": [{"name": "main", "image": "test.invalid/app:1"}],
            },
        }))
        .await
    }

    /// Makes this pod and gives it the status that a kubelet would: running, with an address and, for every container,
    /// an ID.
    pub(crate) async fn run(&self, pod: Value) -> Pod {
        let namespace = pod["metadata"]["namespace"].as_str().expect("a pod has a namespace").to_owned();
        let pods: Api<Pod> = Api::namespaced(self.admin().await, &namespace);
        let pod: Pod = create(&pods, pod).await;
        let spec = pod.spec.as_ref().expect("a pod has a spec");
        let started = |containers: &[k8s_openapi::api::core::v1::Container]| -> Value {
            containers.iter().map(|it| running(&it.name)).collect()
        };
        let address = pod_address();
        let status = json!({"status": {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": started(&spec.containers),
            "initContainerStatuses": started(spec.init_containers.as_deref().unwrap_or_default()),
        }});
        pods.patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Strategic(status)).await.unwrap()
    }

    /// Deletes a pod at once; there is no kubelet to wait for.
    pub(crate) async fn delete_pod(&self, pod: &Pod) {
        let pods: Api<Pod> = Api::namespaced(self.admin().await, &pod.namespace().expect("a pod has a namespace"));
        let at_once = DeleteParams::default().grace_period(0);
        pods.delete(&pod.name_any(), &at_once).await.unwrap();
    }

    /// A Service for the pods with these labels.
    pub(crate) async fn service(&self, namespace: &str, name: &str, selector: Labels<'_>) -> Service {
        let spec = json!({"selector": map(selector), "ports": [{"port": 443}]});
        create(&Api::namespaced(self.admin().await, namespace), json!({"metadata": {"name": name}, "spec": spec})).await
    }

    /// A token of the pod's ServiceAccount, bound to it as the ones are that the kubelet projects. No audience is the
    /// API server itself.
    pub(crate) async fn token(&self, pod: &Pod, audiences: &[&str]) -> String {
        let account = pod.spec.as_ref().and_then(|it| it.service_account_name.clone()).expect("admission sets one");
        let bound = json!({"kind": "Pod", "apiVersion": "v1", "name": pod.name_any(), "uid": pod.uid()});
        self.request_token(&pod.namespace().expect("a pod has a namespace"), &account, audiences, bound).await
    }

    /// A token that no pod is bound to, as `kubectl create token` makes them.
    pub(crate) async fn unbound_token(&self, namespace: &str, service_account: &str, audiences: &[&str]) -> String {
        self.request_token(namespace, service_account, audiences, Value::Null).await
    }

    async fn request_token(&self, namespace: &str, account: &str, audiences: &[&str], bound: Value) -> String {
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"audiences": audiences, "expirationSeconds": 3600, "boundObjectRef": bound}});
        let accounts: Api<ServiceAccount> = Api::namespaced(self.admin().await, namespace);
        let made: TokenRequest =
            accounts.create_subresource("token", account, &PostParams::default(), &request).await.unwrap();
        made.status.and_then(|it| it.token).expect("a token was made")
    }

    /// Gives `subject` a role with these rules; returns its name when the first of them is in force.
    pub(crate) async fn allow(&self, subject: Value, rules: Value) -> String {
        let name = unique("role");
        let _: ClusterRole = self.create(json!({"metadata": {"name": name}, "rules": rules})).await;
        let role = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name});
        let _: ClusterRoleBinding =
            self.create(json!({"metadata": {"name": name}, "roleRef": role, "subjects": [subject]})).await;
        let (account, rule) = (subject["name"].as_str().expect("a subject has a name"), &rules[0]);
        let user = match subject["namespace"].as_str() {
            Some(namespace) => format!("system:serviceaccount:{namespace}:{account}"),
            None => account.to_owned(),
        };
        let mut resource = rule["resources"][0].as_str().expect("a rule is for a resource").split('/');
        let review = json!({"metadata": {}, "spec": {"user": user, "resourceAttributes": {
            "group": rule["apiGroups"][0], "resource": resource.next(), "subresource": resource.next(),
            "verb": rule["verbs"][0], "name": rule["resourceNames"][0]}}});
        eventually("its rights", async || {
            let reviewed: SubjectAccessReview = self.create(review.clone()).await;
            reviewed.status.filter(|it| it.allowed)
        })
        .await;
        name
    }

    /// Makes an object of any kind from its JSON, as the admin.
    pub(crate) async fn create<K>(&self, object: Value) -> K
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::ClusterResourceScope> + Clone + DeserializeOwned,
        K: Serialize + std::fmt::Debug,
    {
        create(&Api::all(self.admin().await), object).await
    }
}

async fn create<K>(api: &Api<K>, object: Value) -> K
where
    K: Clone + DeserializeOwned + Serialize + std::fmt::Debug,
{
    api.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap()
}

fn map<'a>(labels: Labels<'a>) -> BTreeMap<&'a str, &'a str> {
    labels.iter().copied().collect()
}

fn running(container: &str) -> Value {
    let id: String = (0..32).map(|_| format!("{:02x}", rand::random::<u8>())).collect();
    json!({
        "name": container,
        "containerID": format!("containerd://{id}"),
        "image": "test.invalid/app:1",
        "imageID": "",
        "ready": true,
        "started": true,
        "restartCount": 0,
        "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
    })
}

/// One that no other pod of this run has.
fn pod_address() -> Ipv4Addr {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    Ipv4Addr::new(10, 244, high, low)
}
