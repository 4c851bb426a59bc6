//! A real `csrd agent` on a deployment's first node, and commands as processes of that node's pods. Needs root.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
};

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use super::deployment::{Deployment, NEVER};
use crate::{
    cluster::{Identity, eventually},
    pods::cgroup::Cgroup,
};

/// Killed when dropped.
pub(crate) struct Agent {
    process: Child,
    folder: tempfile::TempDir,
    admin: SocketAddr,
}

impl Agent {
    /// With these variables in its environment.
    pub(crate) async fn start(deployment: &Deployment<'_>, variables: &[(&str, &str)]) -> Self {
        let Deployment { cluster, home, signer, .. } = deployment;
        let follows = json!([
            {"apiGroups": [""], "resources": ["pods", "namespaces"], "verbs": ["list", "watch"]},
            {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["csrd-trust-bundle"], "verbs": ["get", "list", "watch"]},
            {"apiGroups": ["csrd.dev"], "resources": ["certificatepolicies"], "verbs": ["list", "watch"]},
        ]);
        deployment.allow("csrd-agent", follows).await;
        let token = Identity::Token(cluster.token(&deployment.agents[0], &[]).await);
        let bundle = json!({"configMap": {"namespace": home, "name": "csrd-trust-bundle", "key": "ca.crt"}});
        let config = json!({
            "admin": "127.0.0.1:0",
            "log": {"format": "json"},
            "kubernetes": {
                "kubeconfig": cluster.access.kubeconfig(&token),
                "signers": [{"name": signer, "bundle": bundle}],
            },
        });
        let folder = tempfile::tempdir().unwrap();
        let path = |name| folder.path().join(name);
        fs::write(path("config"), config.to_string()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_csrd"));
        command.arg("agent").arg("--config").arg(path("config")).arg("--socket").arg(path("s"));
        command.env_remove("NODE_NAME").envs(variables.iter().copied());
        let process = command.stderr(fs::File::create(path("log")).unwrap()).spawn().unwrap();
        let mut agent = Self { process, folder, admin: ([0, 0, 0, 0], 0).into() };
        let admin = eventually("the agent is ready", async || {
            let said = agent.said();
            let mut lines = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            lines.find_map(|line| line["admin"].as_str()?.parse().ok())
        });
        agent.admin = admin.await;
        agent
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// All that it has logged.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// The status and the words of `/readyz`.
    pub(crate) async fn readiness(&self) -> (u16, String) {
        let mut stream = tokio::net::TcpStream::connect(self.admin).await.unwrap();
        let mut answer = String::new();
        stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: agent\r\n\r\n").await.unwrap();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// A command of ours, to be run as a process of a pod, in its cgroup.
    pub(crate) fn command(&self, cgroup: &Cgroup, arguments: &[&str]) -> tokio::process::Command {
        let mut command = cgroup.command(&[env!("CARGO_BIN_EXE_csrd")]);
        command.args(arguments).env("CSRD_SOCKET", self.path("s")).current_dir(self.folder.path());
        let mut command = tokio::process::Command::from(command);
        command.stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    /// Runs a command of ours as `pod`.
    pub(crate) async fn run(&self, pod: &Pod, arguments: &[&str]) -> Output {
        let cgroup = Cgroup::of(pod);
        let ended = timeout(NEVER, self.command(&cgroup, arguments).output()).await;
        ended.unwrap_or_else(|_| panic!("{arguments:?} does not end")).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
