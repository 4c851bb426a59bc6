//! The Kubernetes binary: built from the Go module beside the tests, once for every state of that module.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use aws_lc_rs::digest::{Context, SHA256};

/// A Kubernetes release, and the folder of the module that builds it.
const VERSION: &str = "1.37.2";
const MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cluster/kube");

/// Where the binary is; built first if nobody has. The error is one sentence that says what to do.
pub(super) fn kube() -> Result<PathBuf, String> {
    let folder = cache()?.join(fingerprint()?);
    let binary = folder.join("kube");
    if binary.exists() {
        return Ok(binary);
    }
    fs::create_dir_all(&folder).map_err(|error| format!("no folder {}: {error}", folder.display()))?;
    // Another test binary may be at it: cargo runs one, a person in another terminal a second one.
    let lock = File::create(folder.join("lock")).map_err(|error| error.to_string())?;
    lock.lock().map_err(|error| error.to_string())?;
    if !binary.exists() {
        build(&folder, &binary)?;
    }
    Ok(binary)
}

fn cache() -> Result<PathBuf, String> {
    let home = super::variable("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| super::variable("HOME").map(|home| Path::new(&home).join(".cache")))
        .ok_or("neither XDG_CACHE_HOME nor HOME says where the Kubernetes binary of the tests may be kept")?;
    Ok(home.join("csrd/cluster"))
}

/// Of all that the binary is made from, so that a change builds another and a return to the old state builds nothing.
fn fingerprint() -> Result<String, String> {
    let go = Command::new("go").args(["env", "GOVERSION"]).current_dir(MODULE).output();
    let go = go.ok().filter(|go| go.status.success()).ok_or(
        "the tests with a real Kubernetes control plane build it with Go 1.26: install Go (https://go.dev/dl), or set \
         CSRD_TEST_CLUSTER=off to leave these tests out",
    )?;
    let mut hash = Context::new(&SHA256);
    hash.update(&go.stdout);
    hash.update(VERSION.as_bytes());
    for name in ["go.mod", "go.sum", "main.go"] {
        hash.update(&fs::read(Path::new(MODULE).join(name)).map_err(|error| format!("{MODULE}/{name}: {error}"))?);
    }
    Ok(hash.finish().as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect())
}

fn build(folder: &Path, binary: &Path) -> Result<(), String> {
    super::say(&format!(
        "building Kubernetes {VERSION} for the tests: 5 to 10 minutes the first time, kept as {}",
        binary.display()
    ));
    let (major, minor) = VERSION.split_once('.').expect("a version has dots");
    let minor = minor.split('.').next().expect("a version has dots");
    let variable = "k8s.io/component-base/version.git";
    let flags = format!("-s -w -X {variable}Version=v{VERSION} -X {variable}Major={major} -X {variable}Minor={minor}");
    let unfinished = folder.join("unfinished");
    let go = Command::new("go")
        .args(["build", "-trimpath", "-buildvcs=false", "-ldflags", &flags, "-o"])
        .arg(&unfinished)
        .arg(".")
        .current_dir(MODULE)
        .env("CGO_ENABLED", "0")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("go build: {error}"))?;
    if !go.status.success() {
        return Err(format!("go build in {MODULE} failed: {}", String::from_utf8_lossy(&go.stderr).trim()));
    }
    fs::rename(unfinished, binary).map_err(|error| format!("{}: {error}", binary.display()))
}
