//! `csrd crd`: the definition of CertificatePolicy on stdout.

use std::process::ExitCode;

use crate::policy::schema;

/// Print the CustomResourceDefinition of CertificatePolicy
///
/// csrd crd | kubectl apply -f -
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Prints it as YAML.
pub fn run(_: Args) -> anyhow::Result<ExitCode> {
    let options = serde_saphyr::ser_options! { prefer_block_scalars: false };
    let yaml = serde_saphyr::to_string_with_options(&schema::custom_resource_definition(), options)?;
    super::print(yaml.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
