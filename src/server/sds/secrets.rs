//! Secrets by name: what a workload's identities are to an Envoy.
//!
//! A name is no claim: it finds nothing but what policies offer to the workload that asks.

use std::{collections::BTreeSet, sync::Arc};

use aws_lc_rs::digest::{SHA256, digest};
use bytes::Bytes;
use prost::Message as _;
use prost_types::{Any, value::Kind};
use tonic::Code;

use crate::{
    account::{Account, Line, Pace, Principal},
    hub::Live,
    proto::{
        envoy::{
            config::core::v3::{DataSource, Node, TypedExtensionConfig, data_source::Specifier},
            extensions::transport_sockets::tls::v3::{
                CertificateValidationContext, Secret, SpiffeCertValidatorConfig, TlsCertificate, secret,
                spiffe_cert_validator_config::TrustDomain,
            },
        },
        google::rpc,
    },
    server::{
        call::Call,
        identities::{Identities, Identity},
        refusal::Refusal,
    },
    spiffe::MAX_SPIFFE_ID_BYTES,
    x509::Bundle,
};

/// The only type of resource that is served.
pub(super) const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
/// Names that one stream may ask for.
pub const MAX_SECRETS: usize = 256;
/// Bytes of one name: those of a SPIFFE ID.
pub const MAX_SECRET_NAME_BYTES: usize = MAX_SPIFFE_ID_BYTES;

/// Characters of an Envoy's reason that are logged.
const MAX_LOGGED_CHARS: usize = 200;

/// The first identity's certificate.
const DEFAULT: &str = "default";
/// The roots of the first identity's trust domain.
const ROOT_CA: &str = "ROOTCA";
/// The roots of all trust domains.
const ALL: &str = "ALL";
const SPIFFE_VALIDATOR: &str = "envoy.tls.cert_validator.spiffe";
const SPIFFE_VALIDATOR_TYPE_URL: &str =
    "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig";
/// Node metadata by which an Envoy asks for plain roots; the name is SPIRE's.
const PLAIN_ROOTS: &str = "disable_spiffe_cert_validation";

/// What one stream asks for, and where it is found.
pub(super) struct Secrets {
    pub(super) identities: Identities,
    wanted: Wanted,
    /// Whether the Envoy verifies by roots alone, and not by SPIFFE IDs.
    plain_roots: bool,
    account: Account,
    principal: Principal,
}

/// Names that are asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Everything there is.
    pub(super) all: bool,
    pub(super) names: BTreeSet<String>,
}

/// What a name finds.
pub(super) enum Found {
    Secret(Resource),
    /// A certificate that cannot be had yet, or not just now.
    Later,
    /// Nothing that the workload may have.
    Nothing,
}

/// A secret in the form in which it is sent.
pub(super) struct Resource {
    /// Changes with the content, and tells nothing of it.
    pub(super) version: String,
    pub(super) secret: Any,
}

impl Secrets {
    pub(super) fn of(call: &Call) -> Result<Self, Refusal> {
        let identities = Identities::of(call, |_| true, |_, _| false)?;
        let (account, principal) = (call.engine.account.clone(), call.workload.principal());
        Ok(Self { identities, wanted: Wanted::default(), plain_roots: false, account, principal })
    }

    /// The Envoy refuses an update, and says why in words of its own. It is counted as a refusal of ours is.
    pub(super) fn update_refused(&self, error: &rpc::Status) -> Result<(), Refusal> {
        self.account.check(Pace::Refusals, self.principal, 1).map_err(Refusal::too_many_refusals)?;
        if let Some(Line { left_out }) = self.account.line(self.principal) {
            let reason: String = error.message.chars().take(MAX_LOGGED_CHARS).collect();
            tracing::warn!(
                code = error.code,
                ?reason,
                left_out,
                "an Envoy does not take an update; it is sent the next one"
            );
        }
        Ok(())
    }

    /// Takes in who asks, and of what type; a later request need not repeat it.
    pub(super) fn introduce(&mut self, node: Option<Node>, type_url: &str) -> Result<(), Refusal> {
        if let Some(node) = node {
            self.plain_roots = asks_for_plain_roots(&node);
        }
        match type_url.is_empty() || type_url == TYPE_URL {
            true => Ok(()),
            false => Err(invalid(format!("type_url: only {TYPE_URL} is served"))),
        }
    }

    /// What is asked for.
    pub(super) fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// Asks for `wanted` from now on.
    pub(super) fn want(&mut self, wanted: Wanted) -> Result<(), Refusal> {
        if wanted.names.len() > MAX_SECRETS {
            let count = wanted.names.len();
            return Err(invalid(format!("resource_names: {count} are asked for, at most {MAX_SECRETS} allowed")));
        }
        if let Some(name) = wanted.names.iter().find(|name| name.len() > MAX_SECRET_NAME_BYTES) {
            let bytes = name.len();
            return Err(invalid(format!(
                "resource_names: {bytes} bytes in one, at most {MAX_SECRET_NAME_BYTES} allowed"
            )));
        }
        self.wanted = wanted.clone();
        self.identities.want(move |place, name| {
            wanted.all || wanted.names.contains(name) || (place == 0 && wanted.names.contains(DEFAULT))
        });
        Ok(())
    }

    /// The names that are asked for, and all others there are if everything is.
    pub(super) fn names(&self) -> BTreeSet<String> {
        let mut names = self.wanted.names.clone();
        if self.wanted.all {
            names.extend(self.identities.list().iter().map(|identity| identity.name.clone()));
            names.extend(self.identities.bundles().into_keys().map(str::to_owned));
        }
        names
    }

    /// What `name` finds now.
    pub(super) fn find(&self, name: &str) -> Found {
        let list = self.identities.list();
        let identity = match name {
            DEFAULT => list.first(),
            _ => list.iter().find(|identity| identity.name == name),
        };
        if let Some(identity) = identity {
            return certificate(name, self.identities.live(identity));
        }
        match self.validation_context(name, list.first()) {
            Some(context) => roots(name, context),
            None => Found::Nothing,
        }
    }

    fn validation_context(&self, name: &str, first: Option<&Identity>) -> Option<CertificateValidationContext> {
        let bundles = self.identities.bundles();
        let name = match (name, first) {
            (ALL, _) => {
                // Roots without their trust domains would let each speak for all.
                let domains = bundles.iter().map(|(id, bundles)| domain(id, bundles)).collect::<Vec<_>>();
                return (!self.plain_roots && !domains.is_empty()).then(|| by_spiffe_id(domains));
            }
            // Nobody has a SPIFFE ID: the roots are all there is to verify by.
            (ROOT_CA, Some(Identity { trust_domain: None, .. })) => {
                return first.and_then(Identity::roots).map(|roots| by_roots(roots.pem()));
            }
            (ROOT_CA, first) => first?.trust_domain.as_deref()?,
            (name, _) => name,
        };
        let bundles = bundles.get(name)?;
        Some(match self.plain_roots {
            true => by_roots(pem(bundles)),
            false => by_spiffe_id(vec![domain(name, bundles)]),
        })
    }
}

/// A refusal of a request that breaks a bound.
pub(super) fn invalid(message: String) -> Refusal {
    Refusal::new(Code::InvalidArgument, "REQUEST_INVALID", message)
}

fn asks_for_plain_roots(node: &Node) -> bool {
    let value = node.metadata.as_ref().and_then(|metadata| metadata.fields.get(PLAIN_ROOTS)?.kind.as_ref());
    match value {
        Some(Kind::BoolValue(plain)) => *plain,
        Some(Kind::StringValue(text)) => text.eq_ignore_ascii_case("true"),
        _ => false,
    }
}

fn certificate(name: &str, live: Option<&Live>) -> Found {
    let Some(credential) = live.map(|live| &live.credential) else { return Found::Later };
    let Some(key) = credential.key_pem() else { return Found::Later };
    let certificate = TlsCertificate { certificate_chain: inline(credential.chain_pem()), private_key: inline(key) };
    let secret = Secret { name: name.to_owned(), r#type: Some(secret::Type::TlsCertificate(certificate)) };
    let secret = Any { type_url: TYPE_URL.to_owned(), value: secret.encode_to_vec() };
    Found::Secret(Resource { version: credential.chain().serial_hex(), secret })
}

fn roots(name: &str, context: CertificateValidationContext) -> Found {
    let secret = Secret { name: name.to_owned(), r#type: Some(secret::Type::ValidationContext(context)) };
    let value = secret.encode_to_vec();
    let version = digest(&SHA256, &value).as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    Found::Secret(Resource { version, secret: Any { type_url: TYPE_URL.to_owned(), value } })
}

fn by_roots(pem: Bytes) -> CertificateValidationContext {
    CertificateValidationContext { trusted_ca: inline(pem), custom_validator_config: None }
}

/// Each peer is verified by the roots of the trust domain in its SPIFFE ID.
fn by_spiffe_id(trust_domains: Vec<TrustDomain>) -> CertificateValidationContext {
    let config = SpiffeCertValidatorConfig { trust_domains };
    let typed_config = Any { type_url: SPIFFE_VALIDATOR_TYPE_URL.to_owned(), value: config.encode_to_vec() };
    let validator = TypedExtensionConfig { name: SPIFFE_VALIDATOR.to_owned(), typed_config: Some(typed_config) };
    CertificateValidationContext { trusted_ca: None, custom_validator_config: Some(validator) }
}

fn domain(id: &str, bundles: &[Arc<Bundle>]) -> TrustDomain {
    let name = id.strip_prefix("spiffe://").unwrap_or(id).to_owned();
    TrustDomain { name, trust_bundle: inline(pem(bundles)) }
}

fn pem(bundles: &[Arc<Bundle>]) -> Bytes {
    match bundles {
        [one] => one.pem(),
        several => several.iter().flat_map(|bundle| bundle.pem()).collect(),
    }
}

fn inline(bytes: Bytes) -> Option<DataSource> {
    Some(DataSource { specifier: Some(Specifier::InlineBytes(bytes)) })
}
