//! Compiles `proto/` with protox, so that building needs no system `protoc`.

use prost::Message as _;

#[allow(clippy::disallowed_methods, reason = "cargo hands OUT_DIR over in the environment")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_source_info(true).include_imports(true);
    compiler.open_files([
        "csrd/v1/certificate.proto",
        "spiffe/workload.proto",
        "envoy/service/secret/v3/sds.proto",
        "envoy/extensions/transport_sockets/tls/v3/secret.proto",
        "envoy/extensions/transport_sockets/tls/v3/tls_spiffe_validator_config.proto",
    ])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    // What gRPC reflection serves.
    std::fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    let files = prost_types::FileDescriptorSet::decode(compiler.encode_file_descriptor_set().as_slice())?;
    // `bytes::Bytes` fields: a certificate is encoded once and shared by every subscriber.
    tonic_prost_build::configure().codec_path("crate::proto::SmallBuffers").bytes(".").compile_fds(files)?;
    println!("cargo:rerun-if-changed=proto");
    Ok(())
}
