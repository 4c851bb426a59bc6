//! Generated messages and services of `proto/`, and the descriptors that reflection serves.

#![allow(missing_docs, unreachable_pub, clippy::all)]

/// `csrd.v1`.
pub mod v1 {
    tonic::include_proto!("csrd.v1");
}

/// The encoded `FileDescriptorSet` of everything in `proto/`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// `google.rpc.ErrorInfo.domain` of every reason that the agent gives.
pub const ERROR_DOMAIN: &str = "csrd.dev";
