//! A Pod as far as it is looked at. The whole type would be most of a megabyte of code, and every pod of a node would be
//! read into a few kilobytes that are dropped at once.

use k8s_openapi::{
    Metadata, NamespaceResourceScope, Resource, api::core::v1 as whole, apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::Deserialize;

/// `v1/Pod`; what is absent here is skipped.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Pod {
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    pub(super) spec: PodSpec,
    #[serde(default)]
    pub(super) status: PodStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct PodSpec {
    pub(super) node_name: Option<String>,
    pub(super) host_network: bool,
    pub(super) service_account_name: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct PodStatus {
    pub(super) phase: Option<String>,
    #[serde(rename = "podIPs")]
    pub(super) pod_ips: Vec<PodIp>,
    pub(super) container_statuses: Vec<ContainerStatus>,
    pub(super) init_container_statuses: Vec<ContainerStatus>,
    pub(super) ephemeral_container_statuses: Vec<ContainerStatus>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct PodIp {
    pub(super) ip: String,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct ContainerStatus {
    #[serde(rename = "containerID")]
    pub(super) container_id: Option<String>,
}

impl Resource for Pod {
    const API_VERSION: &'static str = whole::Pod::API_VERSION;
    const GROUP: &'static str = whole::Pod::GROUP;
    const KIND: &'static str = whole::Pod::KIND;
    const VERSION: &'static str = whole::Pod::VERSION;
    const URL_PATH_SEGMENT: &'static str = whole::Pod::URL_PATH_SEGMENT;
    type Scope = NamespaceResourceScope;
}

impl Metadata for Pod {
    type Ty = ObjectMeta;

    fn metadata(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
