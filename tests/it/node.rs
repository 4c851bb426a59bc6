//! Pods on a real node. Run by `tests/cluster/run`, as root.

mod deployed;
mod recipe;

use std::fs;

use kube::ResourceExt as _;
use serde_json::json;

use crate::cluster::{CSRD_IMAGE, RealNode, SHELL_IMAGE, eventually};

#[tokio::test]
#[ignore = "needs root and a node: tests/cluster/run"]
async fn the_cgroup_of_a_pods_process_names_the_pod() {
    let node = RealNode::shared().await;
    let namespace = node.cluster.namespace(&[]).await;
    let pod = node
        .run(json!({
            "metadata": {"namespace": namespace, "name": "sleeper"},
            "spec": {"containers": [{"name": "main", "image": SHELL_IMAGE, "command": ["sleep", "infinity", "here"]}]},
        }))
        .await;
    // A pod is called running while its process still is runc.
    let cgroups = eventually("its process", async || cgroups_of("sleep\0infinity\0here\0")).await;
    let uid = pod.uid().unwrap();
    let container = pod.status.unwrap().container_statuses.unwrap()[0].container_id.clone().unwrap();
    let path = format!("/pod{uid}/{}", container.strip_prefix("containerd://").unwrap());
    assert!(cgroups.lines().any(|line| line.contains("/kubepods/") && line.ends_with(&path)), "{path} in {cgroups}");
}

#[tokio::test]
#[ignore = "needs root and a node: tests/cluster/run"]
async fn the_image_runs_and_what_it_says_can_be_read() {
    let node = RealNode::shared().await;
    let namespace = node.cluster.namespace(&[]).await;
    node.run(json!({
        "metadata": {"namespace": namespace, "name": "demo"},
        "spec": {"containers": [{"name": "main", "image": CSRD_IMAGE, "args": ["demo"]}]},
    }))
    .await;
    let log = async || {
        let log = node.cluster.kubectl(&["-n", &namespace, "logs", "demo"]).await;
        String::from_utf8_lossy(&log.stdout).contains("granted").then_some(())
    };
    eventually("a grant in the log", log).await;
    let version = node.cluster.kubectl(&["-n", &namespace, "exec", "demo", "--", "/csrd", "--version"]).await;
    assert!(String::from_utf8_lossy(&version.stdout).starts_with("csrd "), "{version:?}");
}

/// The cgroups of the process with this command line, as the host sees them.
fn cgroups_of(command_line: &str) -> Option<String> {
    let processes = fs::read_dir("/proc").unwrap().map(|it| it.unwrap().path());
    let mut found =
        processes.filter(|it| fs::read_to_string(it.join("cmdline")).is_ok_and(|line| line == command_line));
    fs::read_to_string(found.next()?.join("cgroup")).ok()
}
