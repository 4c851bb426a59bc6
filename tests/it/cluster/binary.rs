//! The Go programs of the tests: built on first use, kept outside the tree.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

/// The folder with the Kubernetes binary, or the error as one sentence that says what to do.
pub(super) fn kube() -> Result<PathBuf, String> {
    let built = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cluster/build"))
        .arg("kube")
        .args(super::variable(super::MINOR))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("tests/cluster/build: {error}"))?;
    if !built.status.success() {
        return Err(format!(
            "no Kubernetes control plane for this test, as tests/cluster/build says above; {}=off leaves such tests out",
            super::SWITCH
        ));
    }
    let folder = String::from_utf8(built.stdout).map_err(|_| "tests/cluster/build prints a path in UTF-8")?;
    Ok(PathBuf::from(folder.trim_end()).join("kube"))
}
