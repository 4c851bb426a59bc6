//! `DeltaSecrets`: each response holds what has changed for its Envoy, and names what is not there.

use std::collections::BTreeMap;

use super::secrets::{Found, Secrets, TYPE_URL};
use crate::{
    proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource},
    server::refusal::Refusal,
};

/// Asks for everything.
const WILDCARD: &str = "*";

/// Where one stream stands.
#[derive(Debug, Default)]
pub(super) struct Delta {
    /// Responses so far.
    sent: u64,
    /// Whether there has been a request.
    asked: bool,
    /// Whether one waits for its answer.
    due: bool,
    /// What the Envoy has been told of: a version, or that the name finds nothing. An update that it refuses is not sent
    /// again; the next one is.
    told: BTreeMap<String, Option<String>>,
}

impl Delta {
    /// Takes in a request: names that come and go, or word of a response, which need not be of the last one.
    pub(super) fn take(&mut self, secrets: &mut Secrets, request: DeltaDiscoveryRequest) -> Result<(), Refusal> {
        secrets.introduce(request.node, &request.type_url)?;
        if let Some(error) = &request.error_detail {
            secrets.update_refused(error)?;
        }
        let (come, go) = (request.resource_names_subscribe, request.resource_names_unsubscribe);
        if self.asked && come.is_empty() && go.is_empty() {
            return Ok(());
        }
        let mut wanted = secrets.wanted().clone();
        if !self.asked {
            wanted.all = come.is_empty();
        }
        for name in come {
            if name == WILDCARD {
                wanted.all = true;
            } else {
                // A name that is asked for again is told again.
                self.told.remove(&name);
                wanted.names.insert(name);
            }
        }
        for name in go {
            if name == WILDCARD {
                wanted.all = false;
            } else {
                wanted.names.remove(&name);
            }
        }
        secrets.want(wanted)?;
        let names = secrets.names();
        if !self.asked {
            let kept = request.initial_resource_versions.into_iter().filter(|(name, _)| names.contains(name));
            self.told = kept.map(|(name, version)| (name, Some(version))).collect();
        } else {
            let all = secrets.wanted().all;
            self.told.retain(|name, version| names.contains(name) || (all && version.is_some()));
        }
        (self.asked, self.due) = (true, true);
        Ok(())
    }

    /// The response to be sent now, if any.
    pub(super) fn answer(&mut self, secrets: &Secrets) -> Option<DeltaDiscoveryResponse> {
        if self.due && !secrets.identities.settled() {
            return None;
        }
        self.due = false;
        let (mut resources, mut removed) = (Vec::new(), Vec::new());
        let asked_for = secrets.names();
        let told_of = self.told.keys().cloned().collect();
        for name in asked_for.union(&told_of) {
            let told = self.told.get(name);
            match secrets.find(name) {
                Found::Secret(found) if told.is_none_or(|told| told.as_ref() != Some(&found.version)) => {
                    self.told.insert(name.clone(), Some(found.version.clone()));
                    let (name, version) = (name.clone(), found.version);
                    resources.push(Resource { name, version, resource: Some(found.secret) });
                }
                Found::Nothing if told.is_none_or(Option::is_some) => {
                    match asked_for.contains(name) {
                        true => self.told.insert(name.clone(), None),
                        // One of all there were.
                        false => self.told.remove(name),
                    };
                    removed.push(name.clone());
                }
                Found::Secret(_) | Found::Nothing | Found::Later => {}
            }
        }
        if resources.is_empty() && removed.is_empty() {
            return None;
        }
        self.sent += 1;
        let number = self.sent.to_string();
        Some(DeltaDiscoveryResponse {
            system_version_info: number.clone(),
            resources,
            type_url: TYPE_URL.to_owned(),
            removed_resources: removed,
            nonce: number,
        })
    }
}
