//! The methods that the socket serves, by path, so that no caller puts a name of its own making into a span.

use std::collections::HashSet;

use prost::Message as _;
use prost_types::FileDescriptorSet;

/// What OpenTelemetry's semantic conventions call a method that is not served.
const OTHER: &str = "_OTHER";

/// Paths of the methods of some services, each as `/package.Service/Method`.
#[derive(Debug)]
pub(super) struct Methods(HashSet<String>);

impl Methods {
    /// The methods of every service in `descriptors`, encoded `FileDescriptorSet`s.
    pub(super) fn of(descriptors: &[&[u8]]) -> Self {
        let sets = descriptors.iter().map(|set| FileDescriptorSet::decode(*set).expect("descriptors are compiled in"));
        let mut paths = HashSet::new();
        for file in sets.flat_map(|set| set.file) {
            for service in &file.service {
                let methods = service.method.iter();
                let package = file.package.iter().map(|package| format!("{package}.")).collect::<String>();
                paths.extend(methods.map(|it| format!("/{package}{}/{}", service.name(), it.name())));
            }
        }
        Self(paths)
    }

    /// `path`, if it is that of a method; otherwise a name that stands for all others.
    pub(super) fn known<'a>(&self, path: &'a str) -> &'a str {
        if self.0.contains(path) { path } else { OTHER }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto;

    #[test]
    fn a_method_that_is_served_has_its_name_and_every_other_none() {
        let methods = Methods::of(&[proto::DESCRIPTORS, tonic_health::pb::FILE_DESCRIPTOR_SET]);
        for served in [
            "/csrd.v1.CertificateService/WhoAmI",
            "/csrd.v1.StatusService/ListCredentials",
            "/SpiffeWorkloadAPI/FetchX509SVID",
            "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets",
        ] {
            assert_eq!(methods.known(served), served);
        }
        assert_eq!(methods.known("/grpc.health.v1.Health/Watch"), "/grpc.health.v1.Health/Watch");
        for other in ["", "/", "/csrd.v1.CertificateService", "csrd.v1.CertificateService/WhoAmI", "/a/secret"] {
            assert_eq!(methods.known(other), OTHER, "{other:?}");
        }
    }
}
