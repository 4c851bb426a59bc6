//! What any part of csrd looks at of the objects that others write, and how much of it there may be.
//!
//! A field that is read anywhere must be in here; `whole_types_are_read_from_excerpts` and the tests of each reader notice
//! one that is not.

use Keep::{All, Map, Only};

use super::BEYOND;
use crate::kubernetes::{TRUST_BUNDLE_KEY, annotation, extra, label};

/// Labels of a pod or of a namespace; as many as a rule of a policy can look at.
pub const MAX_LABELS: usize = 128;
/// Labels in a Service's selector.
pub const MAX_SELECTOR_LABELS: usize = 16;
/// Bytes of what is read of a pod, as JSON: names, labels, addresses, ids of containers.
pub const MAX_POD_BYTES: usize = 32 * 1024;
/// Bytes of what is read of a namespace, as JSON: its name and labels.
pub const MAX_NAMESPACE_BYTES: usize = 32 * 1024;
/// Bytes of what is read of a Service, as JSON: its name, selector and addresses.
pub const MAX_SERVICE_BYTES: usize = 2 * 1024;
/// Bytes of what is read of an EndpointSlice, as JSON: 1000 endpoints, which the API server takes at most, with the UID of
/// a pod each.
pub const MAX_SLICE_BYTES: usize = 128 * 1024;
/// Bytes of what is read of a Node, as JSON: its name and addresses.
pub const MAX_NODE_BYTES: usize = 32 * 1024;
/// Bytes of what is read of a CertificateSigningRequest, as JSON: what is asked, by whom, for whom, and the answer.
pub const MAX_REQUEST_BYTES: usize = 256 * 1024;
/// Bytes of what is read of the ConfigMap with the roots, in each namespace, as JSON.
pub const MAX_TRUST_BUNDLE_BYTES: usize = 64 * 1024;
/// Bytes of the excerpts in one page of a list; it is held twice while it is read.
pub(super) const PAGE_BYTES: usize = 4 * 1024 * 1024;
/// Objects in one page, as client-go has them.
const MAX_PAGE: usize = 500;

/// What is read of a value.
#[derive(Debug)]
pub(super) enum Keep {
    All,
    /// All of a map with at most so many entries.
    Map(usize),
    /// These fields, of an object or of each object of an array.
    Only(&'static [(&'static str, Keep)]),
}

#[derive(Debug)]
pub(super) struct Kind {
    pub(super) resource: &'static str,
    /// Whether it is read in a namespace, or of all; `None` means both.
    pub(super) namespaced: Option<bool>,
    pub(super) keep: Keep,
    pub(super) max: usize,
}

const CONTAINERS: Keep = Only(&[("containerID", All)]);

pub(super) static KINDS: &[Kind] = &[
    Kind {
        resource: "pods",
        namespaced: None,
        keep: Only(&[
            (
                "metadata",
                Only(&[
                    ("labels", Map(MAX_LABELS)),
                    ("annotations", Only(&[("kubernetes.io/config.mirror", All), (BEYOND, All)])),
                    ("deletionTimestamp", All),
                ]),
            ),
            ("spec", Only(&[("nodeName", All), ("hostNetwork", All), ("serviceAccountName", All)])),
            (
                "status",
                Only(&[
                    ("phase", All),
                    ("podIPs", All),
                    ("containerStatuses", CONTAINERS),
                    ("initContainerStatuses", CONTAINERS),
                    ("ephemeralContainerStatuses", CONTAINERS),
                ]),
            ),
        ]),
        max: MAX_POD_BYTES,
    },
    Kind {
        resource: "namespaces",
        namespaced: Some(false),
        keep: Only(&[("metadata", Only(&[("labels", Map(MAX_LABELS))]))]),
        max: MAX_NAMESPACE_BYTES,
    },
    Kind {
        resource: "services",
        namespaced: None,
        keep: Only(&[("spec", Only(&[("selector", Map(MAX_SELECTOR_LABELS)), ("type", All), ("clusterIPs", All)]))]),
        max: MAX_SERVICE_BYTES,
    },
    Kind {
        resource: "endpointslices",
        namespaced: Some(false),
        keep: Only(&[
            ("metadata", Only(&[("labels", Only(&[("kubernetes.io/service-name", All)]))])),
            ("endpoints", Only(&[("targetRef", Only(&[("kind", All), ("uid", All)]))])),
        ]),
        max: MAX_SLICE_BYTES,
    },
    Kind {
        resource: "endpointslices",
        namespaced: Some(true),
        keep: Only(&[("endpoints", Only(&[("addresses", All)]))]),
        max: MAX_SLICE_BYTES,
    },
    Kind {
        resource: "nodes",
        namespaced: None,
        keep: Only(&[("status", Only(&[("addresses", All)]))]),
        max: MAX_NODE_BYTES,
    },
    Kind {
        resource: "certificatesigningrequests",
        namespaced: None,
        keep: Only(&[
            (
                "metadata",
                Only(&[
                    ("creationTimestamp", All),
                    ("labels", Only(&[(label::MANAGED_BY, All), (label::NODE, All)])),
                    (
                        "annotations",
                        Only(&[
                            (annotation::POD_NAMESPACE, All),
                            (annotation::POD_NAME, All),
                            (annotation::POD_UID, All),
                            (annotation::SERVICE_ACCOUNT, All),
                            (annotation::NODE, All),
                            (annotation::TRACEPARENT, All),
                            (BEYOND, All),
                        ]),
                    ),
                ]),
            ),
            (
                "spec",
                Only(&[
                    ("request", All),
                    ("signerName", All),
                    ("expirationSeconds", All),
                    ("usages", All),
                    ("username", All),
                    ("groups", All),
                    ("extra", Only(&[(extra::NODE_NAME, All), (extra::POD_NAME, All), (extra::POD_UID, All)])),
                ]),
            ),
            ("status", Only(&[("conditions", All), ("certificate", All)])),
        ]),
        max: MAX_REQUEST_BYTES,
    },
    // Of one namespace it is the operator's.
    Kind {
        resource: "configmaps",
        namespaced: Some(false),
        keep: Only(&[("data", Only(&[(TRUST_BUNDLE_KEY, All)]))]),
        max: MAX_TRUST_BUNDLE_BYTES,
    },
];

/// Objects to ask for at a time when an excerpt of each has at most this many bytes.
pub const fn page(max_bytes: usize) -> u32 {
    let objects = PAGE_BYTES / max_bytes;
    #[allow(clippy::cast_possible_truncation, reason = "MAX_PAGE at most")]
    if objects < MAX_PAGE { objects as u32 } else { MAX_PAGE as u32 }
}

impl Kind {
    /// What its map is called.
    pub(super) fn map(&self) -> &'static str {
        if self.resource == "services" { "selector's labels" } else { "labels" }
    }
}
