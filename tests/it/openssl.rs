//! Files that `csrd watch` keeps, judged by a TLS library that is none of ours.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use tokio::time::{sleep, timeout};

use crate::{
    agent::{Agent, policy_for},
    attest::is_root,
};

/// Far above what a renewal takes, for a machine under load.
const PATIENCE: Duration = Duration::from_secs(60);

/// `csrd watch` as a user of its own.
struct Watched {
    process: Child,
    folder: PathBuf,
    /// The set of files that was seen last.
    seen: Option<PathBuf>,
}

impl Watched {
    fn start(agent: &Agent, uid: u32, name: &str) -> Self {
        let folder = agent.path(name);
        fs::create_dir(&folder).unwrap();
        std::os::unix::fs::chown(&folder, Some(uid), Some(uid)).unwrap();
        let mut command = agent.as_user(Some(uid));
        command.args(["watch", "--lifetime", "20s", "--dns", &format!("{name}.example.org"), "--dir"]).arg(&folder);
        let process = command.stdout(Stdio::null()).spawn().unwrap();
        Self { process, folder, seen: None }
    }

    /// Waits for another set of files than the last.
    async fn renewed(&mut self) {
        let change = async {
            loop {
                let set = fs::read_link(self.folder.join("..data")).ok();
                if set.is_some() && set != self.seen {
                    break set;
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        self.seen = timeout(PATIENCE, change).await.expect("a renewal in time");
    }

    fn file(&self, name: &str) -> String {
        self.folder.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn openssl_verifies_the_files_and_shakes_hands_with_them_across_two_renewals() {
    if !is_root("openssl_verifies_the_files_and_shakes_hands_with_them_across_two_renewals") {
        return;
    }
    let agent = Agent::start(&policy_for(&[60_001, 60_002])).await;
    let mut server = Watched::start(&agent, 60_001, "server");
    let mut client = Watched::start(&agent, 60_002, "client");
    for _renewal in 0..=2 {
        server.renewed().await;
        client.renewed().await;
        for side in [&server, &client] {
            let verified = openssl(&["verify", "-x509_strict", "-CAfile", &side.file("ca.crt"), &side.file("tls.crt")]);
            assert!(verified.trim_end().ends_with(": OK"), "{verified}");
        }
        let session = handshake(&server, &client);
        assert!(session.contains("Verify return code: 0 (ok)"), "{session}");
        assert!(session.contains("New, TLSv1.3"), "{session}");
    }
}

/// `openssl s_client` with the one side's files against `openssl s_server` with the other's; each demands the other's.
fn handshake(server: &Watched, client: &Watched) -> String {
    // Of the set that was seen: another may take its place between the certificate and the key.
    let files = |side: &Watched| {
        let set = side.folder.join(side.seen.as_ref().unwrap());
        let file = |name| set.join(name).to_str().unwrap().to_owned();
        ["-cert".into(), file("tls.crt"), "-key".into(), file("tls.key"), "-CAfile".into(), file("ca.crt")]
    };
    let mut serving = Command::new("openssl");
    serving.args(["s_server", "-accept", "127.0.0.1:0", "-Verify", "2", "-verify_return_error"]);
    // It ends when its stdin does, so that stays open.
    serving.args(files(server)).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut serving = serving.spawn().unwrap();
    let mut said = BufReader::new(serving.stdout.take().unwrap()).lines().map(Result::unwrap);
    let address = said.find_map(|line| line.strip_prefix("ACCEPT ").map(str::to_owned)).expect("it listens");
    let mut arguments: Vec<String> = ["s_client", "-connect", &address].map(str::to_owned).into();
    arguments.extend(files(client));
    arguments.extend(["-verify_return_error", "-verify_hostname", "server.example.org"].map(str::to_owned));
    let session = openssl(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let _ = serving.kill();
    let _ = serving.wait();
    session
}

/// Runs openssl with nothing on its stdin; returns all it says.
fn openssl(arguments: &[&str]) -> String {
    let output = Command::new("openssl").args(arguments).stdin(Stdio::null()).output().expect("openssl is installed");
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
