//! Where the agent listens: an absolute path, as gRPC clients write it.

use std::{fmt, path::Path, str::FromStr};

use serde::Deserialize;

/// Bytes of a socket's path: `sun_path` holds 108 with the closing NUL (unix(7)).
pub const MAX_SOCKET_PATH_BYTES: usize = 107;
/// The agent's socket unless it is told otherwise.
pub const DEFAULT_SOCKET: &str = "unix:///run/csrd/csrd.sock";

/// The absolute path of the agent's socket.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct SocketPath(String);

impl SocketPath {
    /// The path.
    pub fn as_path(&self) -> &Path {
        Path::new(&self.0)
    }
}

/// [`DEFAULT_SOCKET`].
impl Default for SocketPath {
    fn default() -> Self {
        DEFAULT_SOCKET.parse().expect("the default is a socket's path")
    }
}

/// Reads `unix:///path`, `unix:/path` or a bare path.
impl FromStr for SocketPath {
    type Err = SocketPathError;

    fn from_str(text: &str) -> Result<Self, SocketPathError> {
        let path = text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:")).unwrap_or(text);
        if !path.starts_with('/') || path.contains('\0') {
            return Err(SocketPathError::NotAbsolute);
        }
        if path.len() > MAX_SOCKET_PATH_BYTES {
            return Err(SocketPathError::TooLong { bytes: path.len() });
        }
        Ok(Self(path.to_owned()))
    }
}

impl TryFrom<String> for SocketPath {
    type Error = SocketPathError;

    fn try_from(text: String) -> Result<Self, SocketPathError> {
        text.parse()
    }
}

/// The bare path.
impl fmt::Display for SocketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A path that the agent's socket cannot have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SocketPathError {
    /// Relative, or another scheme.
    #[error("the socket must be given as unix:///absolute/path or /absolute/path")]
    NotAbsolute,
    /// Over [`MAX_SOCKET_PATH_BYTES`].
    #[error("the socket's path has {bytes} bytes, at most {MAX_SOCKET_PATH_BYTES} are possible (unix(7))")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_an_absolute_path_within_its_bound() {
        fn check(text: &str, expected: Result<&str, SocketPathError>) {
            assert_eq!(text.parse::<SocketPath>().map(|path| path.0), expected.map(str::to_owned), "{text}");
        }
        check("unix:///run/csrd/csrd.sock", Ok("/run/csrd/csrd.sock"));
        check("unix:/run/csrd.sock", Ok("/run/csrd.sock"));
        check("/run/csrd.sock", Ok("/run/csrd.sock"));
        for text in ["csrd.sock", "unix:csrd.sock", "unix://csrd.sock", "https://example.org", "unix:", "", "/a\0b"] {
            check(text, Err(SocketPathError::NotAbsolute));
        }
        let longest = format!("/{}", "x".repeat(106));
        for scheme in ["", "unix:", "unix://"] {
            check(&format!("{scheme}{longest}"), Ok(&longest));
            check(&format!("{scheme}{longest}x"), Err(SocketPathError::TooLong { bytes: 108 }));
        }
    }

    #[test]
    fn the_default_is_a_path() {
        assert_eq!(SocketPath::default().as_path(), Path::new("/run/csrd/csrd.sock"));
    }
}
