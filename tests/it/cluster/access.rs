//! Where the API server is, and as whom to talk to it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use kube::{
    Client,
    config::{Config, KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};

use super::{pki::Leaf, unique};

/// Who somebody is to the API server.
#[derive(Clone)]
pub(crate) enum Identity {
    Certificate(Leaf),
    Token(String),
    Anonymous,
}

/// A way to the API server: straight, or through a proxy.
#[derive(Clone)]
pub(crate) struct Access {
    pub(crate) url: String,
    pub(crate) ca_certificate: String,
    pub(super) folder: PathBuf,
}

impl Access {
    /// Belongs to the runtime it is first used on, as every client does.
    pub(crate) async fn client(&self, identity: &Identity) -> Client {
        Client::try_from(self.config(identity).await).unwrap()
    }

    pub(crate) async fn config(&self, identity: &Identity) -> Config {
        let kubeconfig: Kubeconfig = serde_json::from_value(self.document(identity)).unwrap();
        Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap()
    }

    /// A file for kubectl and for what we start; it is there as long as the control plane.
    pub(crate) fn kubeconfig(&self, identity: &Identity) -> PathBuf {
        let path = self.folder.join(unique("kubeconfig"));
        self.write_kubeconfig(identity, &path);
        path
    }

    pub(super) fn write_kubeconfig(&self, identity: &Identity, path: &Path) {
        fs::write(path, self.document(identity).to_string()).unwrap();
    }

    fn document(&self, identity: &Identity) -> Value {
        let user = match identity {
            Identity::Certificate(Leaf { certificate, key }) => json!({
                "client-certificate-data": STANDARD.encode(certificate),
                "client-key-data": STANDARD.encode(key),
            }),
            Identity::Token(token) => json!({"token": token}),
            Identity::Anonymous => json!({}),
        };
        let cluster = json!({"server": self.url, "certificate-authority-data": STANDARD.encode(&self.ca_certificate)});
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        })
    }
}
