//! What a client can make slow must not be slow for others: descriptors whose closing lingers, a log that nobody reads.
//!
//! The server has a thread to itself, as in the agent: whatever blocks it keeps its other client waiting, and that client
//! is what is looked at.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::net::{UnixDatagram, UnixStream as StdStream},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::mpsc::{SyncSender, sync_channel},
    thread,
    time::Duration,
};

use csrd::{
    account::{Limits, Principal},
    attest::{AttestError, Attestor, Capabilities, prepare_listener},
    metrics::Metrics,
    proto::v1::{WhoAmIRequest, certificate_service_client::CertificateServiceClient},
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{UnixListener, UnixStream},
    time::timeout,
};
use tonic::transport::{Channel, Endpoint};

use crate::{
    agent::{Agent, policy},
    attest::Actor,
    hostile_h2::Host,
};

/// Calls of the other client while a closing lingers.
const CALLS: usize = 20;
/// Far above what anything here takes, for a machine under load.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server on a thread of its own, on a listener as Linux 5.10 has it; it ends when this is dropped.
struct Server {
    _folder: tempfile::TempDir,
    path: PathBuf,
    listener: Option<std::os::unix::net::UnixListener>,
    serving: Option<SyncSender<()>>,
}

impl Server {
    /// Whoever connects now is accepted once it serves.
    fn listening() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        prepare_listener(&listener, Capabilities::of_linux_5_10()).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { _folder: folder, path, listener: Some(listener), serving: None }
    }

    fn serve(&mut self, limits: Limits) {
        let listener = self.listener.take().unwrap();
        let (serving, ended) = sync_channel(0);
        self.serving = Some(serving);
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let host = Host::with(limits, Metrics::new());
                let listener = UnixListener::from_std(listener).unwrap();
                let ended = tokio::task::spawn_blocking(move || ended.recv());
                tokio::select! {
                    () = host.server.clone().serve(listener) => {}
                    _ = ended => {}
                }
            });
        });
    }

    fn attacker(&self) -> Actor {
        attacker(&self.path)
    }
}

fn attacker(path: &Path) -> Actor {
    let mut actor = Actor::start();
    actor.tell(&format!("connect {}", path.display()));
    actor
}

async fn client(stream: StdStream) -> CertificateServiceClient<Channel> {
    stream.set_nonblocking(true).unwrap();
    let mut io = Some(TokioIo::new(UnixStream::from_std(stream).unwrap()));
    let connector = tower::service_fn(move |_| {
        std::future::ready(io.take().ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected)))
    });
    let channel = Endpoint::from_static("http://csrd").connect_with_connector(connector).await.unwrap();
    CertificateServiceClient::new(channel)
}

async fn calls(client: &mut CertificateServiceClient<Channel>) {
    for _ in 0..CALLS {
        client.who_am_i(WhoAmIRequest {}).await.expect("it is served");
    }
}

/// Checks that the other client is served while the attacker's descriptors are being closed.
async fn served_meanwhile(client: &mut CertificateServiceClient<Channel>, attacker: &mut Actor) {
    calls(client).await;
    assert_eq!(attacker.tell("await-linger"), "lingers", "it had to wait for the closing of another's descriptors");
    calls(client).await;
}

#[tokio::test]
async fn descriptors_that_linger_delay_nobody_on_a_kernel_that_lets_them_through() {
    for attack in ["send-lingering 1 plain", "send-lingering 1 urgent", "send-lingering 8 plain"] {
        let mut server = Server::listening();
        let first = StdStream::connect(&server.path).unwrap();
        let mut attacker = server.attacker();
        // Before it serves, so that the attacker has closed its own descriptors, and is not the last one to close them.
        assert_eq!(attacker.tell(attack), "sent", "{attack}");
        server.serve(Limits::default());
        let mut client = client(first).await;
        served_meanwhile(&mut client, &mut attacker).await;
        assert!(["end", "reset"].contains(&attacker.tell("read-end").as_str()), "its connection has ended");
    }
}

#[tokio::test]
async fn descriptors_on_a_connection_that_is_refused_delay_nobody() {
    let mut server = Server::listening();
    let first = StdStream::connect(&server.path).unwrap();
    let mut attacker = server.attacker();
    assert_eq!(attacker.tell("send-lingering 2 plain"), "sent");
    server.serve(Limits { connections_per_principal: 1, ..Limits::default() });
    let mut client = client(first).await;
    served_meanwhile(&mut client, &mut attacker).await;
}

#[tokio::test]
async fn descriptors_that_nobody_has_read_delay_neither_a_drop_nor_the_stop() {
    let attestor = Attestor::with_capabilities(Capabilities::of_linux_5_10());
    let mut server = Server::listening();
    let listener = UnixListener::from_std(server.listener.take().unwrap()).unwrap();
    let (mut dropped, mut waiting) = (server.attacker(), server.attacker());
    dropped.tell("write before");
    for attacker in [&mut dropped, &mut waiting] {
        assert_eq!(attacker.tell("send-lingering 2 plain"), "sent");
    }
    drop(attestor.accepted(listener.accept().await.unwrap().0));
    assert_eq!(dropped.tell("await-linger"), "lingers", "of a connection");
    attestor.close_listener(listener.into_std().unwrap().into());
    assert_eq!(waiting.tell("await-linger"), "lingers", "of a connection that was never accepted");
}

#[tokio::test]
async fn a_caller_that_cannot_be_attested_can_send_no_descriptors_either() {
    let attestor = Attestor::with_capabilities(Capabilities::of_linux_5_10());
    let mut server = Server::listening();
    let listener = UnixListener::from_std(server.listener.take().unwrap()).unwrap();
    let mut attacker = server.attacker();
    assert_eq!(attacker.tell("send-lingering 1 plain"), "sent");
    let stream = attestor.accepted(listener.accept().await.unwrap().0);
    let server = Host::with(Limits::default(), Metrics::new()).server;
    let seat = server.seat(Principal::UNKNOWN).unwrap();
    server.connection(stream, seat, Err(AttestError::Exited)).await;
    assert_eq!(attacker.tell("await-linger"), "lingers");
}

#[tokio::test]
async fn the_place_of_a_connection_is_kept_until_it_is_closed() {
    let attestor = Attestor::with_capabilities(Capabilities::of_linux_5_10());
    let mut server = Server::listening();
    let listener = UnixListener::from_std(server.listener.take().unwrap()).unwrap();
    for loaded in [false, true] {
        let mut attacker = server.attacker();
        if loaded {
            assert_eq!(attacker.tell("send-lingering 1 plain"), "sent");
        }
        let (place, given_up) = sync_channel::<()>(0);
        let mut stream = attestor.accepted(listener.accept().await.unwrap().0);
        stream.keep(place);
        drop(stream);
        match loaded {
            false => assert!(given_up.recv().is_err(), "given up"),
            true => {
                assert_eq!(attacker.tell("await-linger"), "lingers");
                assert_eq!(given_up.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty));
            }
        }
    }
}

#[tokio::test]
async fn a_kernel_that_can_refuse_descriptors_lets_nobody_send_the_agent_any() {
    if !Capabilities::probe().refuses_descriptors {
        eprintln!("SKIPPED: this kernel has no SO_PASSRIGHTS");
        return;
    }
    let agent = Agent::start(&policy()).await;
    let mut client = agent.client().await;
    for attack in ["send-lingering 1 plain", "send-lingering 1 urgent"] {
        let mut attacker = attacker(&agent.socket());
        assert_eq!(attacker.tell(attack), "EPERM");
        calls(&mut client).await;
    }
}

/// A process that is killed with its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_log_that_nobody_reads_delays_nobody_and_says_later_what_it_lost() {
    let agent = Agent::prepare(&policy());
    fs::write(agent.path("config.yaml"), "log: {level: trace}\n").unwrap();
    let mut command = agent.serve();
    command.arg("--config").arg(agent.path("config.yaml")).stderr(Stdio::piped());
    let mut process = Killed(command.spawn().unwrap());
    let log = BufReader::new(process.0.stderr.take().unwrap());
    let connected = async {
        while StdStream::connect(agent.socket()).is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, connected).await.expect("the agent starts");
    let mut client = client(StdStream::connect(agent.socket()).unwrap()).await;
    // Each call logs kilobytes: far more than the pipe and the agent's memory for it hold.
    for _ in 0..50 {
        timeout(PATIENCE, calls(&mut client)).await.expect("the agent serves");
    }
    let lost = tokio::task::spawn_blocking(move || {
        log.lines().map(Result::unwrap).find(|line| line.contains("log lines were dropped"))
    });
    let lost = timeout(PATIENCE, lost).await.expect("the log goes on when it is read").unwrap();
    assert!(lost.expect("it says so").contains("lines="));
}

#[tokio::test]
async fn an_agent_with_a_log_that_nobody_reads_stops() {
    let agent = Agent::prepare(&policy());
    let (unread, log) = StdStream::pair().unwrap();
    let mut full = log.try_clone().unwrap();
    full.set_nonblocking(true).unwrap();
    while std::io::Write::write(&mut full, &[b'x'; 4096]).is_ok() {}
    full.set_nonblocking(false).unwrap();
    let mut process = Killed(agent.serve().stderr(std::os::fd::OwnedFd::from(log)).spawn().unwrap());
    let connected = async {
        while StdStream::connect(agent.socket()).is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, connected).await.expect("the agent starts");
    let pid = rustix::process::Pid::from_child(&process.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let ended = tokio::task::spawn_blocking(move || process.0.wait().unwrap());
    let ended = timeout(PATIENCE, ended).await.expect("it stops").unwrap();
    assert!(ended.success(), "{ended}");
    drop(unread);
}

#[tokio::test]
async fn systemds_watchdog_is_fed_while_the_agent_serves_if_it_is_asked_for() {
    let agent = Agent::prepare(&policy());
    let heard = UnixDatagram::bind(agent.path("notify")).unwrap();
    heard.set_read_timeout(Some(PATIENCE)).unwrap();
    let next = || {
        let mut text = [0; 64];
        let length = heard.recv(&mut text).expect("systemd is told");
        String::from_utf8_lossy(&text[..length]).trim().to_owned()
    };
    for (watchdog, fed) in [(Some("100000"), true), (None, false)] {
        let mut command = agent.serve();
        command.env("NOTIFY_SOCKET", agent.path("notify")).stderr(Stdio::null());
        if let Some(microseconds) = watchdog {
            command.env("WATCHDOG_USEC", microseconds);
        }
        let process = Killed(command.spawn().unwrap());
        let told: Vec<_> = (0..if fed { 5 } else { 1 }).map(|_| next()).collect();
        assert_eq!(told.iter().filter(|it| *it == "READY=1").count(), 1, "{told:?}");
        assert_eq!(told.iter().filter(|it| *it == "WATCHDOG=1").count(), told.len() - 1, "{told:?}");
        drop(process);
        heard.set_nonblocking(true).unwrap();
        while heard.recv(&mut [0; 64]).is_ok() {}
        heard.set_nonblocking(false).unwrap();
    }
}
