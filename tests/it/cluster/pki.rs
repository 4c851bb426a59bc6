//! The certificates of a control plane: one CA for servers, clients and the built-in signers, and the key of
//! ServiceAccount tokens.

use std::{fs, net::Ipv4Addr, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};

pub(super) struct Pki {
    ca: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate and its key, both PEM.
#[derive(Clone)]
pub(crate) struct Leaf {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Pki {
    /// Made anew, with the files that the API server and the controller manager read, in `folder`.
    pub(super) fn write(folder: &Path, address: Ipv4Addr) -> Self {
        let mut ca = CertificateParams::default();
        ca.distinguished_name = DistinguishedName::new();
        ca.distinguished_name.push(DnType::CommonName, "test cluster");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let pki = Self { ca: CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap() };
        let tokens = KeyPair::generate().unwrap();
        let server = pki.server(address);
        let kubelet_client = pki.client("kube-apiserver-kubelet-client", Some("system:masters"));
        for (name, text) in [
            ("ca.crt", pki.ca_certificate()),
            ("ca.key", pki.ca.key().serialize_pem()),
            ("tokens.key", tokens.serialize_pem()),
            ("tokens.pub", tokens.public_key_pem()),
            ("apiserver.crt", server.certificate),
            ("apiserver.key", server.key),
            ("kubelet-client.crt", kubelet_client.certificate),
            ("kubelet-client.key", kubelet_client.key),
        ] {
            fs::write(folder.join(name), text).unwrap();
        }
        pki
    }

    pub(super) fn ca_certificate(&self) -> String {
        self.ca.pem()
    }

    /// For an API server, or what stands before it, at `address`.
    pub(super) fn server(&self, address: Ipv4Addr) -> Leaf {
        let names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"];
        let mut params = CertificateParams::new(names.map(String::from)).unwrap();
        params.subject_alt_names.push(SanType::IpAddress(address.into()));
        self.leaf(params, "kube-apiserver", None, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// For whom the API server takes as `user` in `group`. One group, since rcgen writes one organization.
    pub(super) fn client(&self, user: &str, group: Option<&str>) -> Leaf {
        self.leaf(CertificateParams::default(), user, group, ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn leaf(
        &self,
        mut params: CertificateParams,
        name: &str,
        group: Option<&str>,
        usage: ExtendedKeyUsagePurpose,
    ) -> Leaf {
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.ca).unwrap();
        Leaf { certificate: certificate.pem(), key: key.serialize_pem() }
    }
}
