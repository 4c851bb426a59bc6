//! Generated messages and services of `proto/`, and the descriptors that reflection serves.

#![allow(missing_docs, unreachable_pub, clippy::all)]

/// `csrd.v1`.
pub mod v1 {
    tonic::include_proto!("csrd.v1");
}

/// The SPIFFE Workload API, which has no package.
pub mod spiffe {
    tonic::include_proto!("_");
}

/// Envoy's secret discovery service.
pub mod envoy {
    pub mod config {
        pub mod core {
            pub mod v3 {
                tonic::include_proto!("envoy.config.core.v3");
            }
        }
    }
    pub mod extensions {
        pub mod transport_sockets {
            pub mod tls {
                pub mod v3 {
                    tonic::include_proto!("envoy.extensions.transport_sockets.tls.v3");
                }
            }
        }
    }
    pub mod service {
        pub mod discovery {
            pub mod v3 {
                tonic::include_proto!("envoy.service.discovery.v3");
            }
        }
        pub mod secret {
            pub mod v3 {
                tonic::include_proto!("envoy.service.secret.v3");
            }
        }
    }
}

/// What Envoy's messages use of Google's.
pub mod google {
    pub mod rpc {
        tonic::include_proto!("google.rpc");
    }
}

/// The encoded `FileDescriptorSet` of everything in `proto/`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// `google.rpc.ErrorInfo.domain` of every reason that the agent gives.
pub const ERROR_DOMAIN: &str = "csrd.dev";

/// Metadata of an answer of grpc.health.v1 that is not SERVING: in UTF-8, why not.
pub const WHY_NOT: &str = "csrd-why-not-bin";

/// The codec of our services: prost's, with buffers of the size of our messages, since each open stream keeps one.
#[derive(Clone, Copy, Debug)]
pub struct SmallBuffers<T, U>(std::marker::PhantomData<(T, U)>);

/// Bytes of a stream's buffer; a longer message grows it while it is written.
const BUFFER_BYTES: usize = 512;
/// Bytes of encoded messages after which they are sent.
const YIELD_BYTES: usize = 32 * 1024;

impl<T, U> Default for SmallBuffers<T, U> {
    fn default() -> Self {
        Self(std::marker::PhantomData)
    }
}

impl<T, U> tonic::codec::Codec for SmallBuffers<T, U>
where
    T: prost::Message + Send + 'static,
    U: prost::Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = <tonic_prost::ProstCodec<T, U> as tonic::codec::Codec>::Encoder;
    type Decoder = <tonic_prost::ProstCodec<T, U> as tonic::codec::Codec>::Decoder;

    fn encoder(&mut self) -> Self::Encoder {
        tonic_prost::ProstCodec::<T, U>::raw_encoder(tonic::codec::BufferSettings::new(BUFFER_BYTES, YIELD_BYTES))
    }

    fn decoder(&mut self) -> Self::Decoder {
        tonic_prost::ProstCodec::<T, U>::raw_decoder(tonic::codec::BufferSettings::new(BUFFER_BYTES, YIELD_BYTES))
    }
}
