//! `csrd agent` on a cluster's node, as a process: what it asks of the API server before it serves, and what it says.

use std::{fs, path::Path, process::ExitStatus};

use http::Method;
use kube::ResourceExt as _;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{
    process::{Child, Command},
    time::{sleep, timeout},
};

use super::PATIENCE;
use crate::cluster::{ControlPlane, Fault, FaultProxy, Identity};

/// An agent that has been started, and may not have come far.
struct Joining {
    child: Child,
    folder: TempDir,
}

impl Joining {
    fn start(kubeconfig: &Path, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (config, socket) = (folder.path().join("config.yaml"), folder.path().join("s"));
        fs::write(&config, format!("kubernetes: {{kubeconfig: {}}}", kubeconfig.display())).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_csrd"));
        command.arg("agent").arg("--config").arg(config).arg("--socket").arg(socket).args(flags);
        command.env_remove("NODE_NAME").stderr(fs::File::create(folder.path().join("log")).unwrap());
        Self { child: command.kill_on_drop(true).spawn().unwrap(), folder }
    }

    fn said(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    async fn says(&self, words: &str) {
        let said = async {
            while !self.said().contains(words) {
                sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, said).await.unwrap_or_else(|_| panic!("{:.2000} does not say {words:?}", self.said()));
    }

    async fn ends(&mut self) -> ExitStatus {
        timeout(PATIENCE, self.child.wait()).await.expect("it ends").unwrap()
    }

    /// Checks that it does not come up.
    async fn expect_refusal(mut self, code: i32, words: &str) {
        let ended = self.ends().await;
        assert!(self.said().contains(words), "{:?} does not say {words:?}", self.said());
        assert_eq!(ended.code(), Some(code));
        assert!(!self.folder.path().join("s").exists());
    }
}

#[tokio::test]
async fn the_node_is_the_one_of_the_agents_token_and_a_conflict_refuses_to_start() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let (namespace, node) = (cluster.namespace(&[]).await, cluster.node("n").await.name_any());
    let pod = cluster.pod(&namespace, "agent", &node, "default", &[]).await;
    let bound = cluster.access.kubeconfig(&Identity::Token(cluster.token(&pod, &[]).await));
    let conflict = format!("the agent's token is of node {node:?}, and \"elsewhere\" is configured");
    Joining::start(&bound, &["--node", "elsewhere"]).expect_refusal(64, &conflict).await;
    let unbound = cluster.unbound_token(&namespace, "default", &[]).await;
    let unbound = cluster.access.kubeconfig(&Identity::Token(unbound));
    Joining::start(&unbound, &[]).expect_refusal(64, "the agent's token names no node; name it with --node").await;
    let nobody = cluster.access.kubeconfig(&Identity::Token("made.up".to_owned()));
    Joining::start(&nobody, &[]).expect_refusal(1, "the API server does not say who the agent is: Unauthorized").await;
    let (nowhere, folder) = ("kubeconfig", tempfile::tempdir().unwrap());
    Joining::start(&folder.path().join(nowhere), &[]).expect_refusal(64, nowhere).await;
}

#[tokio::test]
async fn an_agent_waits_for_the_api_server_and_says_what_it_may_not_read() {
    let Some(cluster) = ControlPlane::shared().await else { return };
    let (namespace, node) = (cluster.namespace(&[]).await, cluster.node("n").await.name_any());
    let pod = cluster.pod(&namespace, "agent", &node, "default", &[]).await;
    let identity = Identity::Token(cluster.token(&pod, &[]).await);
    let proxy = FaultProxy::start(cluster, &identity).await;
    proxy.fail(Method::POST, "selfsubjectreviews", usize::MAX, Fault::status(503, "ServiceUnavailable", "not yet"));
    let mut agent = Joining::start(&proxy.access.kubeconfig(&identity), &[]);
    agent.says("waits for the API server, to be told who the agent is").await;
    proxy.heal();
    agent.says("the API server knows the agent").await;
    agent.says("attests the pods of this node, and processes outside of pods by their user").await;
    agent.says("the ClusterRole needs {apiGroups: [\\\"\\\"], resources: [pods], verbs: [list, watch]}").await;
    agent.says(&node).await;
    let said = agent.said();
    assert!(!said.contains("kube_") && said.matches("resources: [pods]").count() == 1, "once: {said}");
    kill_process(Pid::from_raw(agent.child.id().unwrap() as i32).unwrap(), Signal::TERM).unwrap();
    assert!(agent.ends().await.success(), "{}", agent.said());
}
