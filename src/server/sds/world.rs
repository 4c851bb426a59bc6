//! `StreamSecrets` and `FetchSecrets`, the state of the world: each response holds all that is asked for and at hand.

use std::collections::{BTreeMap, BTreeSet};

use super::secrets::{Found, Secrets, TYPE_URL, Wanted};
use crate::{
    proto::envoy::service::discovery::v3::{DiscoveryRequest, DiscoveryResponse},
    server::refusal::Refusal,
};

/// Where one stream stands.
#[derive(Debug, Default)]
pub(super) struct World {
    /// Responses so far, which is the version and the nonce of the last one.
    sent: u64,
    /// The versions of the secrets in the last one.
    versions: BTreeMap<String, String>,
    /// Whether there has been a request.
    asked: bool,
    /// Whether one waits for its answer.
    due: bool,
}

impl World {
    /// Takes in a request: the first one, a change of names, or word of a response.
    pub(super) fn take(&mut self, secrets: &mut Secrets, request: DiscoveryRequest) -> Result<(), Refusal> {
        secrets.introduce(request.node, &request.type_url)?;
        let nonce = request.response_nonce;
        if self.sent > 0 && !nonce.is_empty() && nonce != self.sent.to_string() {
            // Of a response before the last one, whose own answer is on its way.
            return Ok(());
        }
        if let Some(error) = &request.error_detail {
            secrets.update_refused(error)?;
        }
        let names: BTreeSet<_> = request.resource_names.into_iter().collect();
        // No names at the start are all names; later they are none, unless it was all until now.
        let all = names.is_empty() && (!self.asked || secrets.wanted().all);
        let wanted = Wanted { all, names };
        if !self.asked || wanted != *secrets.wanted() {
            secrets.want(wanted)?;
            (self.asked, self.due) = (true, true);
        }
        Ok(())
    }

    /// The response to be sent now, if any. It leaves out what a name does not find, and is not sent with nothing in it:
    /// an Envoy refuses that.
    pub(super) fn answer(&mut self, secrets: &Secrets) -> Option<DiscoveryResponse> {
        if self.due && !secrets.identities.settled() {
            return None;
        }
        let (versions, response) = at_hand(secrets);
        if versions.is_empty() || (!self.due && versions == self.versions) {
            return None;
        }
        (self.versions, self.due) = (versions, false);
        self.sent += 1;
        let number = self.sent.to_string();
        Some(DiscoveryResponse { version_info: number.clone(), nonce: number, ..response })
    }
}

/// What is asked for and at hand, as a first response, with the version of each by its name.
pub(super) fn at_hand(secrets: &Secrets) -> (BTreeMap<String, String>, DiscoveryResponse) {
    let (mut versions, mut resources) = (BTreeMap::new(), Vec::new());
    for name in secrets.names() {
        if let Found::Secret(found) = secrets.find(&name) {
            versions.insert(name, found.version);
            resources.push(found.secret);
        }
    }
    let (version_info, nonce) = ("1".to_owned(), "1".to_owned());
    (versions, DiscoveryResponse { version_info, resources, type_url: TYPE_URL.to_owned(), nonce })
}
