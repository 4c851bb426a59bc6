//! A mutual-TLS handshake of a certificate with itself: a client and a server that both hold it and trust its roots.

use std::{fmt, sync::Arc};

use anyhow::Context as _;
use rustls::{
    ClientConfig, ProtocolVersion, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::client::Certificate;

/// Bytes in flight between the two ends.
const PIPE_BYTES: usize = 16 * 1024;
/// What the client sends and the server answers with.
const GREETING: &[u8] = b"hello";

/// What was agreed.
pub(super) struct Session {
    version: Option<ProtocolVersion>,
    cipher_suite: String,
}

/// Shakes hands as client and as server, sends a greeting there and back.
pub(super) async fn with(certificate: &Certificate, server_name: &str) -> anyhow::Result<Session> {
    let chain =
        CertificateDer::pem_slice_iter(certificate.certificate_chain.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    let key = certificate.private_key.as_ref().context("the agent made the key")?;
    let key = || PrivateKeyDer::from_pem_slice(key.as_bytes());
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(certificate.trust_bundle.as_bytes()) {
        roots.add(root?)?;
    }
    let roots = Arc::new(roots);
    let verifier = WebPkiClientVerifier::builder(roots.clone()).build()?;
    let server = ServerConfig::builder().with_client_cert_verifier(verifier).with_single_cert(chain.clone(), key()?)?;
    let client = ClientConfig::builder().with_root_certificates(roots).with_client_auth_cert(chain, key()?)?;

    let (near, far) = tokio::io::duplex(PIPE_BYTES);
    let serve = async {
        let mut stream = TlsAcceptor::from(Arc::new(server)).accept(far).await?;
        anyhow::ensure!(stream.get_ref().1.peer_certificates().is_some(), "the client showed no certificate");
        let mut heard = [0; GREETING.len()];
        stream.read_exact(&mut heard).await?;
        stream.write_all(&heard).await?;
        stream.shutdown().await?;
        Ok(())
    };
    let call = async {
        let name = ServerName::try_from(server_name.to_owned())?;
        let mut stream = TlsConnector::from(Arc::new(client)).connect(name, near).await?;
        stream.write_all(GREETING).await?;
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await?;
        anyhow::ensure!(heard == GREETING, "the server's answer is not the client's greeting");
        let (_, connection) = stream.get_ref();
        let suite = connection.negotiated_cipher_suite().map(|suite| format!("{:?}", suite.suite()));
        Ok(Session { version: connection.protocol_version(), cipher_suite: suite.unwrap_or_default() })
    };
    let (_, session) = tokio::try_join!(serve, call)?;
    Ok(session)
}

/// For example `TLS 1.3, AES-256-GCM`.
impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = match self.version {
            Some(ProtocolVersion::TLSv1_3) => "1.3",
            _ => "1.2",
        };
        write!(f, "mutual TLS {version} ({})", self.cipher_suite)
    }
}
