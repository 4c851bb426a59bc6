//! A certificate as the agent delivered it: complete, with its key redacted from every print and wiped on drop.
//!
//! The wiping covers this copy. The buffers in which the gRPC library received the message are out of reach.

use std::fmt;

use jiff::Timestamp;
use zeroize::Zeroizing;

use crate::{client::ClientError, proto::v1, text::printable};

/// A certificate with all that is needed to use it.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Names the credential at the agent.
    pub certificate_id: String,
    /// Grows with every event of the credential.
    pub sequence: u64,
    /// PEM, leaf first, no root.
    pub certificate_chain: String,
    /// PEM PKCS#8; `None` when the caller holds the key.
    pub private_key: Option<Zeroizing<String>>,
    /// PEM roots.
    pub trust_bundle: String,
    /// Lower-case hexadecimal.
    pub serial_number: String,
    /// Start of validity.
    pub not_before: Timestamp,
    /// End of validity.
    pub not_after: Timestamp,
    /// When the agent will renew it.
    pub renew_at: Timestamp,
    /// The policy that granted it.
    pub policy: String,
    /// The signer that signed it.
    pub signer_name: String,
}

impl Certificate {
    /// Whether both would be written as the same files.
    pub fn same_files_as(&self, other: &Self) -> bool {
        self.certificate_chain == other.certificate_chain
            && self.private_key == other.private_key
            && self.trust_bundle == other.trust_bundle
    }
}

impl TryFrom<v1::Certificate> for Certificate {
    type Error = ClientError;

    fn try_from(answer: v1::Certificate) -> Result<Self, ClientError> {
        let key = Zeroizing::new(pem("private_key", &answer.private_key)?);
        let certificate = Self {
            certificate_id: printable(&answer.certificate_id),
            sequence: answer.sequence,
            certificate_chain: pem("certificate_chain", &answer.certificate_chain)?,
            private_key: Some(key).filter(|key| !key.is_empty()),
            trust_bundle: pem("trust_bundle", &answer.trust_bundle)?,
            serial_number: printable(&answer.serial_number),
            not_before: timestamp("not_before", answer.not_before)?,
            not_after: timestamp("not_after", answer.not_after)?,
            renew_at: timestamp("renew_at", answer.renew_at)?,
            policy: printable(&answer.policy),
            signer_name: printable(&answer.signer_name),
        };
        if certificate.certificate_chain.is_empty() || certificate.trust_bundle.is_empty() {
            return Err(ClientError::bad_answer("has a certificate without its chain or its roots"));
        }
        Ok(certificate)
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("certificate_id", &self.certificate_id)
            .field("sequence", &self.sequence)
            .field("serial_number", &self.serial_number)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// PEM as text (RFC 7468 is ASCII).
pub(super) fn pem(field: &str, bytes: &[u8]) -> Result<String, ClientError> {
    match std::str::from_utf8(bytes) {
        Ok(text) if text.is_ascii() => Ok(text.to_owned()),
        _ => Err(ClientError::bad_answer(&format!("has a {field} that is no PEM"))),
    }
}

/// A moment that must be set and within years -9999 to 9999.
pub(super) fn timestamp(field: &str, value: Option<prost_types::Timestamp>) -> Result<Timestamp, ClientError> {
    value
        .and_then(|at| Timestamp::new(at.seconds, at.nanos).ok())
        .ok_or_else(|| ClientError::bad_answer(&format!("has no valid {field}")))
}

/// A certificate whose every part says `tag`, for tests of what is done with certificates.
#[cfg(test)]
pub(super) fn tagged(tag: &str) -> Certificate {
    Certificate {
        certificate_id: "c1".into(),
        sequence: 7,
        certificate_chain: format!("chain {tag}\n"),
        private_key: Some(Zeroizing::new(format!("key {tag}\n"))),
        trust_bundle: format!("roots {tag}\n"),
        serial_number: "0a".into(),
        not_before: Timestamp::UNIX_EPOCH,
        not_after: Timestamp::constant(3600, 0),
        renew_at: Timestamp::constant(2000, 0),
        policy: "web".into(),
        signer_name: "embedded".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> v1::Certificate {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        v1::Certificate {
            certificate_id: "c1".into(),
            sequence: 7,
            certificate_chain: "CHAIN".into(),
            private_key: "SECRET".into(),
            trust_bundle: "ROOTS".into(),
            serial_number: "0a".into(),
            not_before: at(0),
            not_after: at(3600),
            renew_at: at(2000),
            policy: "web".into(),
            signer_name: "embedded".into(),
        }
    }

    #[test]
    fn a_debug_print_has_neither_key_nor_chain() {
        let certificate = Certificate::try_from(answer()).expect("complete");
        assert_eq!(certificate.private_key.as_ref().map(|key| key.as_str()), Some("SECRET"));
        let shown = format!("{certificate:?}");
        assert!(!shown.contains("SECRET") && !shown.contains("CHAIN"), "{shown}");
    }

    #[test]
    fn an_answer_that_lacks_something_is_refused_by_name() {
        fn check(spoil: impl FnOnce(&mut v1::Certificate), expected: &str) {
            let mut answer = answer();
            spoil(&mut answer);
            let error = Certificate::try_from(answer).expect_err(expected);
            assert_eq!(error.reason, ClientError::BAD_ANSWER);
            assert!(error.message.contains(expected), "{error}");
        }
        check(|a| a.certificate_chain = "".into(), "without its chain");
        check(|a| a.trust_bundle = "".into(), "without its chain or its roots");
        check(|a| a.certificate_chain = "ä".into(), "certificate_chain that is no PEM");
        check(|a| a.private_key = vec![0xff].into(), "private_key that is no PEM");
        check(|a| a.not_after = None, "no valid not_after");
        check(|a| a.renew_at = Some(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }), "no valid renew_at");
    }
}
