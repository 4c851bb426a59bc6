//! A signer of the test's own: it approves and signs every request for its name, well or badly.

use std::time::{Duration, SystemTime};

use k8s_openapi::{ByteString, api::certificates::v1::CertificateSigningRequest};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::CertificateSigningRequestDer;
use serde_json::json;

/// A root, and an intermediate that signs.
pub(super) struct Authority {
    pub(super) root: String,
    pub(super) intermediate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(super) fn new() -> Self {
        let (root_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let (root, params) = (ca("test root"), ca("test intermediate"));
        let by_root = Issuer::from_params(&root, &root_key);
        let intermediate = params.signed_by(&key, &by_root).unwrap().pem();
        Self { root: root.self_signed(&root_key).unwrap().pem(), intermediate, issuer: Issuer::new(params, key) }
    }

    /// The leaf for what `csr` asks for, good for so long.
    pub(super) fn sign(&self, csr: &CertificateSigningRequest, lifetime: Duration) -> String {
        let der = pem::parse(&csr.spec.request.0).unwrap().into_contents();
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der)).unwrap();
        let CertificateSigningRequestParams { mut params, public_key } = request;
        let usages = csr.spec.usages.as_deref().unwrap_or_default();
        let has = |usage: &str| usages.iter().any(|it| it == usage);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let purposes = [
            ("server auth", ExtendedKeyUsagePurpose::ServerAuth),
            ("client auth", ExtendedKeyUsagePurpose::ClientAuth),
        ];
        params.extended_key_usages =
            purposes.into_iter().filter(|(name, _)| has(name)).map(|(_, purpose)| purpose).collect();
        let now = SystemTime::now();
        (params.not_before, params.not_after) = (now.into(), (now + lifetime).into());
        params.signed_by(&public_key, &self.issuer).unwrap().pem()
    }
}

/// Puts `pem` into the request's status, as a signer does.
pub(super) async fn write(requests: &Api<CertificateSigningRequest>, name: &str, pem: String) {
    let patch = Patch::Merge(json!({"status": {"certificate": ByteString(pem.into_bytes())}}));
    requests.patch_status(name, &PatchParams::default(), &patch).await.unwrap();
}

fn ca(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let now = SystemTime::now();
    let day = Duration::from_secs(24 * 60 * 60);
    (params.not_before, params.not_after) = ((now - day).into(), (now + 10 * day).into());
    params
}
