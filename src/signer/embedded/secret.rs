//! CAs in a Kubernetes Secret, for replicas that take turns: every write names the resourceVersion it was decided on.
//!
//! So of two writers one fails, reads again and follows, and never do both make or activate a CA. It waits for the API
//! server on the thread it is called on, as the state folder does for its disk. Answers that hold keys pass through
//! buffers of libraries, which are not wiped; what is kept here is.

use std::{collections::BTreeMap, path::PathBuf};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use k8s_openapi::{ByteString, api::core::v1::Secret as Object};
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::{runtime::Handle, time::timeout};
use zeroize::Zeroizing;

use super::{EmbeddedError, store::Found};
use crate::kubernetes::{ANSWER_WITHIN, label};

/// One Secret; its keys are named as files of the state folder.
pub(super) struct Secret {
    api: Api<Object>,
    namespace: String,
    name: String,
    runtime: Handle,
    /// The version that was last read or written.
    version: Option<String>,
}

impl Secret {
    /// The Secret `name`, whether or not it is there; call from within the runtime.
    pub(super) fn new(client: Client, namespace: &str, name: &str) -> Self {
        let api = Api::namespaced(client, namespace);
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        Self { api, namespace, name, runtime: Handle::current(), version: None }
    }

    /// What is in it, if that is another version than the one known.
    pub(super) fn changed(&mut self) -> Result<Option<Found>, EmbeddedError> {
        let there = self.wait("read", async |api, name| api.get_metadata_opt(name).await)?;
        let version = there.and_then(|there| there.resource_version());
        match (&version, &self.version) {
            (None, Some(_)) => return Err(EmbeddedError::SecretGone { secret: self.path() }),
            _ if version == self.version => return Ok(None),
            _ => {}
        }
        let object = self.wait("read", async |api, name| api.get(name).await)?;
        let version = object.resource_version();
        let kept = object.data.unwrap_or_default().into_iter().map(|(key, ByteString(pem))| {
            let path = self.path().join(&key);
            (key, path, Zeroizing::new(pem))
        });
        let found = Found::new(kept);
        self.version = version;
        Ok(Some(found))
    }

    /// Sets and removes keys, all at once, unless the Secret is another than it was.
    pub(super) fn write<const N: usize>(&mut self, keys: [(String, Option<&str>); N]) -> Result<(), EmbeddedError> {
        let written = match &self.version {
            None => {
                let data: BTreeMap<_, _> = keys
                    .into_iter()
                    .filter_map(|(key, pem)| Some((key, ByteString(pem?.as_bytes().to_vec()))))
                    .collect();
                let mut object = Object { data: Some(data), ..Object::default() };
                object.metadata.name = Some(self.name.clone());
                object.labels_mut().insert(label::MANAGED_BY.to_owned(), label::MANAGER.to_owned());
                self.wait("create", async |api, _| api.create(&PostParams::default(), &object).await)?
                    .resource_version()
            }
            Some(version) => {
                let data: BTreeMap<_, _> =
                    keys.into_iter().map(|(key, pem)| (key, pem.map(|pem| BASE64_STANDARD.encode(pem)))).collect();
                let patch = json!({"metadata": {"resourceVersion": version}, "data": data});
                // The answer has no keys in it.
                let patched = self.wait("write", async |api, name| {
                    api.patch_metadata(name, &PatchParams::default(), &Patch::Merge(&patch)).await
                });
                patched?.resource_version()
            }
        };
        self.version = written;
        Ok(())
    }

    fn wait<T>(
        &self,
        action: &'static str,
        request: impl AsyncFnOnce(&Api<Object>, &str) -> Result<T, kube::Error>,
    ) -> Result<T, EmbeddedError> {
        let answer = self.runtime.block_on(async { timeout(ANSWER_WITHIN, request(&self.api, &self.name)).await });
        let secret = self.path();
        match answer {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(kube::Error::Api(status))) if status.is_conflict() || status.is_already_exists() => {
                Err(EmbeddedError::SecretChanged { secret })
            }
            Ok(Err(source)) => Err(EmbeddedError::Secret { action, secret, source: Box::new(source) }),
            Err(_) => Err(EmbeddedError::SecretTimeout { action, secret, within: ANSWER_WITHIN }),
        }
    }

    /// For errors.
    fn path(&self) -> PathBuf {
        PathBuf::from(&self.namespace).join(&self.name)
    }
}

/// Its name: what is in it is no text for a log.
impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secret").field("path", &self.path()).field("version", &self.version).finish_non_exhaustive()
    }
}
