//! Flags that `issue` and `watch` share: where the agent is and what to ask it for.
//!
//! Only what must be translated is judged here; names and bounds are the agent's to judge, so that there is one judge.

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use super::UsageError;
use crate::{
    client::Client,
    policy::lifetime,
    proto::v1::{self, certificate_request::Key},
    socket::{DEFAULT_SOCKET, SocketPath},
    telemetry::with_causes,
    x509::{Csr, KeyAlgorithm, Usage, csr::MAX_PKCS10_BYTES},
};

/// Where the agent is.
#[derive(Debug, clap::Args)]
pub struct SocketArgs {
    /// The agent's socket
    #[arg(long, env = "CSRD_SOCKET", value_name = "ADDRESS", default_value = DEFAULT_SOCKET, hide_env_values = true)]
    socket: SocketPath,
}

impl SocketArgs {
    /// A client of that agent.
    pub fn client(self) -> Client {
        Client::new(self.socket)
    }
}

/// What to ask for.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Request (without any name: the policy's first offer)")]
pub struct RequestArgs {
    /// Subject common name
    #[arg(long, value_name = "NAME")]
    cn: Option<String>,
    /// Subject organization; may be repeated, as may every name below
    #[arg(long, value_name = "NAME")]
    org: Vec<String>,
    /// DNS name
    #[arg(long, value_name = "NAME")]
    dns: Vec<String>,
    /// IP address
    #[arg(long, value_name = "ADDRESS")]
    ip: Vec<String>,
    /// URI, for example a SPIFFE ID
    #[arg(long, value_name = "URI")]
    uri: Vec<String>,
    /// server-auth, client-auth, digital-signature or key-encipherment; may be repeated [default: the first three]
    #[arg(long, value_name = "USAGE", value_parser = usage)]
    usage: Vec<Usage>,
    /// Validity, for example 1h30m [default: the policy's]
    #[arg(long, value_name = "DURATION", value_parser = lifetime)]
    lifetime: Option<Duration>,
    /// Key to be made: ecdsa-p256, ecdsa-p384, ed25519, rsa-2048, rsa-3072 or rsa-4096 [default: ecdsa-p256]
    #[arg(long, value_name = "KIND", value_parser = key)]
    key: Option<KeyAlgorithm>,
    /// Signer [default: the policy's]
    #[arg(long, value_name = "NAME")]
    signer: Option<String>,
    /// Policy to be judged by [default: any that allows all of it]
    #[arg(long, value_name = "NAME")]
    policy: Option<String>,
    /// A PKCS#10 request of your own, PEM or DER: it brings the names, and its private key never leaves you
    #[arg(long, value_name = "FILE", conflicts_with_all = ["cn", "org", "dns", "ip", "uri", "key"])]
    csr: Option<PathBuf>,
}

impl RequestArgs {
    /// Whether the caller holds the key.
    pub fn holds_key(&self) -> bool {
        self.csr.is_some()
    }

    /// The request in the agent's words.
    pub fn into_request(self) -> Result<v1::CertificateRequest, UsageError> {
        let key = match &self.csr {
            Some(path) => Key::Held(v1::HeldKey { pkcs10: read_csr(path)?.into(), rotate_key: false }),
            None => Key::Generate(key_number(self.key.unwrap_or(KeyAlgorithm::EcdsaP256)).into()),
        };
        let seconds = |lifetime: Duration| i64::try_from(lifetime.as_secs()).expect("it is within the bound");
        Ok(v1::CertificateRequest {
            common_name: self.cn.unwrap_or_default(),
            organizations: self.org,
            dns_names: self.dns,
            ip_addresses: self.ip,
            uris: self.uri,
            usages: self.usage.into_iter().map(|usage| usage_number(usage).into()).collect(),
            lifetime: self.lifetime.map(|lifetime| prost_types::Duration { seconds: seconds(lifetime), nanos: 0 }),
            signer_name: self.signer.unwrap_or_default(),
            policy: self.policy.unwrap_or_default(),
            key: Some(key),
        })
    }
}

/// The request in the file, and nothing else that may be in it.
fn read_csr(path: &Path) -> Result<Vec<u8>, UsageError> {
    let refuse = |why: String| UsageError(format!("--csr {}: {why}", path.display()));
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_PKCS10_BYTES as u64 + 1).read_to_end(&mut bytes))
        .map_err(|error| refuse(format!("cannot be read: {error}")))?;
    let csr = Csr::parse(&bytes).map_err(|error| refuse(with_causes(&error)))?;
    Ok(csr.der().to_owned())
}

fn usage(text: &str) -> Result<Usage, &'static str> {
    let known = "must be server-auth, client-auth, digital-signature or key-encipherment";
    Usage::from_name(&text.replace('-', " ")).ok_or(known)
}

fn key(text: &str) -> Result<KeyAlgorithm, &'static str> {
    KeyAlgorithm::from_name(text).ok_or("must be ecdsa-p256, ecdsa-p384, ed25519, rsa-2048, rsa-3072 or rsa-4096")
}

fn lifetime(text: &str) -> Result<Duration, String> {
    lifetime::parse(text, lifetime::LIFETIMES)
}

fn key_number(algorithm: KeyAlgorithm) -> v1::KeyAlgorithm {
    match algorithm {
        KeyAlgorithm::EcdsaP256 => v1::KeyAlgorithm::EcdsaP256,
        KeyAlgorithm::EcdsaP384 => v1::KeyAlgorithm::EcdsaP384,
        KeyAlgorithm::Ed25519 => v1::KeyAlgorithm::Ed25519,
        KeyAlgorithm::Rsa2048 => v1::KeyAlgorithm::Rsa2048,
        KeyAlgorithm::Rsa3072 => v1::KeyAlgorithm::Rsa3072,
        KeyAlgorithm::Rsa4096 => v1::KeyAlgorithm::Rsa4096,
    }
}

fn usage_number(usage: Usage) -> v1::Usage {
    match usage {
        Usage::DigitalSignature => v1::Usage::DigitalSignature,
        Usage::KeyEncipherment => v1::Usage::KeyEncipherment,
        Usage::ServerAuth => v1::Usage::ServerAuth,
        Usage::ClientAuth => v1::Usage::ClientAuth,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn every_key_and_usage_has_a_name_on_the_command_line_and_a_number_in_the_api() {
        for algorithm in KeyAlgorithm::ALL {
            assert_eq!(key(algorithm.name()), Ok(algorithm));
            let number = key_number(algorithm).as_str_name();
            let name = algorithm.name().to_uppercase().replace('-', "_");
            assert_eq!(number, format!("KEY_ALGORITHM_{name}"));
        }
        for wanted in Usage::ALL {
            let name = wanted.name().replace(' ', "-");
            assert_eq!(usage(&name), Ok(wanted));
            assert_eq!(usage_number(wanted).as_str_name(), format!("USAGE_{}", name.to_uppercase().replace('-', "_")));
        }
        assert!(usage("code-signing").is_err());
        assert!(key("dsa-1024").is_err());
    }

    #[test]
    fn only_the_request_leaves_the_file() {
        fn check(content: &[u8], expected: Result<&[u8], &str>) {
            let file = tempfile::NamedTempFile::new().expect("a file");
            fs::write(file.path(), content).expect("written");
            match (read_csr(file.path()), expected) {
                (Ok(bytes), Ok(der)) => assert_eq!(bytes, der),
                (Err(error), Err(why)) => assert!(error.to_string().contains(why), "{error}"),
                (result, _) => panic!("{result:?}"),
            }
        }
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(["web.example.org".to_owned()]).expect("a name");
        let request = params.serialize_request(&key).expect("a request");
        let pem = request.pem().expect("text");
        check(request.der(), Ok(request.der()));
        check(pem.as_bytes(), Ok(request.der()));
        check(key.serialize_pem().as_bytes(), Err("--csr /"));
        check(key.serialized_der(), Err("--csr /"));
        check(b"", Err("--csr /"));
        check(&vec![b' '; MAX_PKCS10_BYTES + 1], Err("this one 16385"));
        let absent = read_csr(Path::new("/nonexistent")).expect_err("absent");
        assert_eq!(absent.to_string(), "--csr /nonexistent: cannot be read: No such file or directory (os error 2)");
    }
}
