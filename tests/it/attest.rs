//! Attestation against real processes: each actor is this test binary, run again to do what it is told on its input.

use std::{
    fs,
    io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            net::{UnixListener as StdListener, UnixStream as StdStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use base64::Engine as _;
use csrd::{
    account::Principal,
    attest::{Accepted, AttestError, Attestor, Caller, Capabilities, MAX_GROUPS, Peer, PeerStream, prepare_listener},
    metrics::Metrics,
    proto::envoy::service::discovery::v3::DiscoveryRequest,
};
use prost::Message as _;
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    time::timeout,
};

use crate::{
    agent::{Agent, ask, follow, lasting, policy},
    raw_h2::{DATA, END_HEADERS, END_STREAM, HEADERS, RawClient, field, frame, hello, indexed},
};

use crate::hostile_h2::Host;

/// A user that owns nothing here, and is not the one that stands for the unknown.
const STRANGER: u32 = 54321;
/// How long the closing of what "send-lingering" sends takes.
const LINGER: Duration = Duration::from_secs(20);
/// How long is waited for what never comes if the thing under test is broken.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_peer_is_the_process_that_connected() {
    for mut scene in scenes() {
        if rustix::process::geteuid().is_root() {
            scene.actor.tell("groups 7 5 7");
        }
        let (mut stream, peer) = scene.connect().await;
        assert_eq!((peer.pid(), peer.uid()), (scene.actor.process.id(), rustix::process::geteuid().as_raw()));
        scene.actor.tell("write hello");
        assert_eq!(read(&mut stream).await.unwrap(), "hello");
        stream.write_all(b"answer\n").await.unwrap();
        assert_eq!(scene.actor.tell("read"), "answer");

        scene.attestor.set_hash_executables(true);
        let workload = scene.attestor.attest(&peer).await.unwrap();
        let unix = workload.unix().unwrap();
        assert_eq!(unix.uid, rustix::process::geteuid().as_raw());
        assert_eq!(unix.gid, rustix::process::getegid().as_raw());
        assert_eq!(unix.user.clone().unwrap_or(unix.uid.to_string()), output(Command::new("id").arg("-un")));
        assert_eq!(unix.group.clone().unwrap_or(unix.gid.to_string()), output(Command::new("id").arg("-gn")));
        if rustix::process::geteuid().is_root() {
            assert_eq!(unix.supplementary_gids, [5, 7]);
        }
        let program = std::env::current_exe().unwrap().canonicalize().unwrap();
        assert_eq!(unix.executable.as_deref(), program.to_str());
        let sum = output(Command::new("sha256sum").arg(&program));
        assert_eq!(unix.executable_sha256.as_deref(), sum.split(' ').next());
    }
}

#[tokio::test]
async fn a_caller_that_exits_is_noticed_and_refused() {
    for mut scene in scenes() {
        let (_stream, peer) = scene.connect().await;
        scene.actor.tell(&format!("connect {}", scene.path.display()));
        let late = scene.accept().await;
        let caller = Caller::Peer(peer);
        assert!(caller.attest(&scene.attestor).await.is_ok());
        scene.actor.process.kill().unwrap();
        caller.exited().await;
        assert_eq!(reason(caller.attest(&scene.attestor).await), "PEER_EXITED");
        scene.actor.process.wait().unwrap();
        assert_eq!(reason(caller.attest(&scene.attestor).await), "PEER_EXITED");
        assert_eq!(reason(Peer::of(&late, &scene.attestor)), "PEER_EXITED");
    }
}

#[tokio::test]
async fn a_caller_that_execs_is_another_workload_on_the_same_connection() {
    for mut scene in scenes() {
        let (mut stream, peer) = scene.connect().await;
        let before = scene.attestor.attest(&peer).await.unwrap();
        scene.actor.exec("cat");
        scene.actor.echo();
        let after = scene.attestor.attest(&peer).await.unwrap();
        assert_eq!(
            after.unix().unwrap().executable,
            Some(output(Command::new("sh").arg("-c").arg("readlink -f $(command -v cat)")))
        );
        assert_ne!(before, after);
        stream.write_all(b"still open").await.unwrap();
    }
}

#[tokio::test]
async fn a_caller_that_execs_gets_nothing_more_on_the_stream_it_opened() {
    nothing_more_after_exec("exec", SUBSCRIBE, subscribe(10)).await;
    nothing_more_after_exec("exec", "/SpiffeWorkloadAPI/FetchX509SVID", Vec::new()).await;
    let default = DiscoveryRequest { resource_names: vec!["default".into()], ..Default::default() };
    let secrets = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets";
    nothing_more_after_exec("exec", secrets, default.encode_to_vec()).await;
}

#[tokio::test]
async fn a_caller_that_execs_a_file_without_a_path_gets_nothing_more_on_the_stream_it_opened() {
    nothing_more_after_exec("exec-memfd", SUBSCRIBE, subscribe(10)).await;
    nothing_more_after_exec("exec-deleted", SUBSCRIBE, subscribe(10)).await;
}

#[tokio::test]
async fn a_caller_whose_program_is_replaced_on_disk_is_still_that_program() {
    let build = std::env::current_exe().unwrap().canonicalize().unwrap();
    // A link on the same file system, instead of a copy of so large a file.
    let folder = tempfile::tempdir_in(build.parent().unwrap()).unwrap();
    let program = folder.path().join("program");
    fs::hard_link(&build, &program).unwrap();
    let executables = format!("executables: ['{}'], uids:", program.display());
    let agent = Agent::start(&policy().replace("uids:", &executables)).await;
    let mut actor = Actor::start_as(&program);
    let mut client = call(&agent, &mut actor, SUBSCRIBE, subscribe(4)).await;
    for pushed in 0..3 {
        // Data, and not the end: no program but this one may have a certificate.
        while client.frame().await.expect("the stream goes on").kind != DATA {}
        if pushed == 0 {
            fs::write(folder.path().join("new"), "of the next version").unwrap();
            fs::rename(folder.path().join("new"), &program).unwrap();
        }
    }
}

const SUBSCRIBE: &str = "/csrd.v1.CertificateService/Subscribe";

fn subscribe(seconds: i64) -> Vec<u8> {
    follow(lasting(seconds, ask("a.example.org"))).encode_to_vec()
}

/// Lets the actor make a call; what comes of it can only be read here, since bytes that we wrote would be refused.
async fn call(agent: &Agent, actor: &mut Actor, path: &str, message: Vec<u8>) -> RawClient<UnixStream> {
    let meeting = agent.path("meeting");
    let listener = StdListener::bind(&meeting).unwrap();
    actor.tell(&format!("connect {}", agent.socket().display()));
    actor.tell(&format!("pass {}", meeting.display()));
    let stream = receive(&listener.accept().unwrap().0);
    stream.set_nonblocking(true).unwrap();

    let block = [
        indexed(3),
        indexed(6),
        field(":path", path),
        field(":authority", "localhost"),
        field("te", "trailers"),
        field("content-type", "application/grpc"),
        field("workload.spiffe.io", "true"),
    ];
    let prefix = [&[0][..], &(message.len() as u32).to_be_bytes()].concat();
    let body = frame(DATA, END_STREAM, 1, &[prefix, message].concat());
    let call = [hello(), frame(HEADERS, END_HEADERS, 1, &block.concat()), body].concat();
    actor.tell(&format!("write-bytes {}", call.iter().map(u8::to_string).collect::<Vec<_>>().join(" ")));
    RawClient::new(UnixStream::from_std(stream).unwrap())
}

async fn nothing_more_after_exec(exec: &str, path: &str, message: Vec<u8>) {
    let agent = Agent::start(&policy().replace("default: 1h", "default: 10s")).await;
    let mut actor = Actor::start();
    let mut client = call(&agent, &mut actor, path, message).await;
    let mut blocks = fluke_hpack::Decoder::new();
    let mut pushed = 0;
    let trailers = loop {
        let frame = client.frame().await.expect("the stream ends before the connection does");
        match frame.kind {
            DATA => {
                if pushed == 0 {
                    actor.say(&format!("{exec} cat"));
                    actor.echo();
                }
                pushed += 1;
                // One may have been on its way during the exec.
                assert!(pushed <= 2, "another program got a certificate");
            }
            HEADERS => {
                let fields = blocks.decode(&frame.payload).unwrap();
                if frame.flags & END_STREAM != 0 {
                    break fields;
                }
            }
            _ => {}
        }
    };
    assert!(pushed > 0, "it got a certificate while it was itself");
    let value = |name: &str| {
        let field = trailers.iter().find(|(known, _)| known == name.as_bytes());
        String::from_utf8(field.unwrap_or_else(|| panic!("no {name} in {trailers:?}")).1.clone()).unwrap()
    };
    // UNAVAILABLE is 14: whoever is there now may come back, to be judged as what it is.
    assert_eq!(value("grpc-status"), "14");
    let details = base64::prelude::BASE64_STANDARD_NO_PAD.decode(value("grpc-status-details-bin")).unwrap();
    let said = String::from_utf8_lossy(&details);
    assert!(said.contains("PEER_CHANGED"), "{said}");
}

#[tokio::test]
async fn a_caller_that_changes_its_user_is_refused() {
    if !is_root("a_caller_that_changes_its_user_is_refused") {
        return;
    }
    for mut scene in scenes() {
        let (_stream, peer) = scene.connect().await;
        assert!(scene.attestor.attest(&peer).await.is_ok());
        scene.actor.tell(&format!("become {STRANGER} {STRANGER}"));
        assert_eq!(reason(scene.attestor.attest(&peer).await), "PEER_IDS_CHANGED");
    }
}

#[tokio::test]
async fn a_caller_in_one_group_more_than_are_examined_is_refused() {
    if !is_root("a_caller_in_one_group_more_than_are_examined_is_refused") {
        return;
    }
    for (count, expected) in [(MAX_GROUPS, "attested"), (MAX_GROUPS + 1, "PEER_TOO_MANY_GROUPS")] {
        let mut scene = Scene::new(Attestor::new());
        let groups: Vec<_> = (0..count).map(|group| group.to_string()).collect();
        scene.actor.tell(&format!("groups {}", groups.join(" ")));
        let (_stream, peer) = scene.connect().await;
        assert_eq!(reason(scene.attestor.attest(&peer).await), expected, "{count}");
    }
}

#[tokio::test]
async fn a_set_user_id_program_is_its_effective_user() {
    if !is_root("a_set_user_id_program_is_its_effective_user") {
        return;
    }
    for mut scene in scenes() {
        scene.actor.tell(&format!("become 0 {STRANGER}"));
        let (mut stream, peer) = scene.connect().await;
        scene.actor.tell("write hello");
        assert_eq!(read(&mut stream).await.unwrap(), "hello");
        assert_eq!(scene.attestor.attest(&peer).await.unwrap().unix().unwrap().uid, STRANGER);
    }
}

#[tokio::test]
async fn bytes_written_through_an_inherited_socket_are_refused() {
    for mut scene in scenes() {
        let (mut stream, _peer) = scene.connect().await;
        scene.actor.tell("write first");
        assert_eq!(read(&mut stream).await.unwrap(), "first");
        scene.actor.tell("write own");
        scene.actor.tell("inherit foreign");
        assert_eq!(read(&mut stream).await.unwrap(), "own", "never joined with another writer's");
        // The kernel tells of both at once, so nothing more would wake whoever took the stream to be empty.
        let foreign = timeout(PATIENCE, read(&mut stream)).await;
        refused(foreign.expect("what is behind is read too"));
    }
}

#[tokio::test]
async fn bytes_written_through_a_passed_socket_are_refused() {
    for mut scene in scenes() {
        let (mut stream, _peer) = scene.connect().await;
        let (mut other, meeting) = (Actor::start(), scene.folder.path().join("meeting"));
        other.tell(&format!("listen {}", meeting.display()));
        scene.actor.tell(&format!("pass {}", meeting.display()));
        other.tell("take");
        other.tell("write foreign");
        refused(read(&mut stream).await);
    }
}

#[tokio::test]
async fn a_passed_socket_ends_its_connection_and_is_counted() {
    for mut scene in scenes() {
        let (stream, peer) = scene.connect().await;
        let metrics = Metrics::new();
        let host = Host::with_metrics(metrics.clone());
        scene.actor.tell("inherit foreign");
        let seat = host.server.seat(Principal::user(peer.uid())).unwrap();
        host.server.connection(stream, seat, Ok(Caller::Peer(peer))).await;
        let counted = "csrd_attest_total{result=\"refused\",reason=\"PEER_SOCKET_PASSED\"} 1";
        assert!(metrics.encode().contains(counted), "{}", metrics.encode());
    }
}

#[tokio::test]
async fn bytes_are_named_from_the_first_one_on_if_the_listener_was_prepared() {
    for prepared in [true, false] {
        let mut scene = Scene::new(Attestor::new());
        if !prepared {
            let path = scene.folder.path().join("unprepared");
            (scene.listener, scene.path) = (UnixListener::bind(&path).unwrap(), path);
        }
        scene.actor.tell(&format!("connect {}", scene.path.display()));
        let stream = scene.accept().await;
        scene.actor.tell("write early");
        let peer = Arc::new(Peer::of(&stream, &scene.attestor).unwrap());
        let early = read(&mut PeerStream::new(stream, &peer)).await;
        match prepared {
            true => assert_eq!(early.unwrap(), "early"),
            false => refused(early),
        }
    }
}

#[tokio::test]
async fn descriptors_that_a_client_sends_are_refused_by_the_kernel_or_end_its_connection() {
    for mut scene in scenes() {
        let (mut stream, peer) = scene.connect().await;
        scene.actor.tell("write before");
        let sent = scene.actor.tell("send-pipes");
        if scene.attestor.capabilities().refuses_descriptors {
            assert_eq!(sent, "EPERM");
            assert_eq!(read(&mut stream).await.unwrap(), "before");
            continue;
        }
        assert_eq!(sent, "sent");
        let error = read(&mut stream).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        let caller = Caller::Peer(peer);
        assert_eq!(caller.passed().map(AttestError::reason), Some("PEER_SENT_DESCRIPTORS"));
        drop(stream);
        assert_eq!(scene.actor.tell("await-pipes"), "closed");
    }
}

#[tokio::test]
async fn a_stream_carries_whatever_is_written_until_its_end() {
    const BYTES: usize = 3 << 20;
    let mut scene = Scene::new(Attestor::new());
    let (mut stream, _peer) = scene.connect().await;
    scene.actor.say(&format!("flood {BYTES}"));
    let mut received = Vec::new();
    stream.read_to_end(&mut received).await.unwrap();
    scene.actor.answer();
    assert_eq!(received.len(), BYTES);
    assert!(received.iter().enumerate().all(|(at, byte)| *byte == at as u8));
}

#[tokio::test]
async fn an_executable_at_a_path_of_its_own_mounts_has_no_path() {
    if !is_root("an_executable_at_a_path_of_its_own_mounts_has_no_path") {
        return;
    }
    let mut scene = Scene::new(Attestor::new());
    let (_stream, peer) = scene.connect().await;
    let cat = output(Command::new("sh").arg("-c").arg("command -v cat"));
    let (trusted, fake) = (scene.folder.path().join("trusted"), scene.folder.path().join("fake"));
    for copy in [&trusted, &fake] {
        output(Command::new("cp").arg(&cat).arg(copy));
    }
    let script = format!("mount --bind {} {trusted} && exec {trusted}", fake.display(), trusted = trusted.display());
    fs::write(scene.folder.path().join("script"), script).unwrap();
    scene.actor.exec(&format!("unshare --mount sh {}", scene.folder.path().join("script").display()));
    scene.actor.echo();
    let trusted = trusted.canonicalize().unwrap();
    assert_eq!(fs::read_link(format!("/proc/{}/exe", peer.pid())).unwrap(), trusted, "what the kernel says");
    assert_eq!(scene.attestor.attest(&peer).await.unwrap().unix().unwrap().executable, None);
}

#[tokio::test]
async fn a_caller_outside_our_pid_namespace_is_refused() {
    if !is_root("a_caller_outside_our_pid_namespace_is_refused") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut agent = Actor::run(Command::new("unshare").args(["--pid", "--fork", "--mount-proc", "--kill-child"]));
    agent.tell(&format!("serve {}", folder.path().join("socket").display()));
    let _connection = StdStream::connect(folder.path().join("socket")).unwrap();
    assert_eq!(agent.tell("attest"), "PEER_FOREIGN_PID_NAMESPACE");
}

#[tokio::test]
async fn a_caller_whose_user_is_unknown_to_our_user_namespace_is_refused() {
    if !is_root("a_caller_whose_user_is_unknown_to_our_user_namespace_is_refused") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let mut agent = Actor::run(Command::new("unshare").args(["--user", "--map-root-user"]));
    agent.tell(&format!("serve {}", socket.display()));
    let mut known = Actor::start();
    known.tell(&format!("connect {}", socket.display()));
    assert_eq!(agent.tell("attest"), "uid 0");
    let mut stranger = Actor::start();
    stranger.tell(&format!("open-to-all {}", socket.display()));
    stranger.tell(&format!("become {STRANGER} {STRANGER}"));
    stranger.tell(&format!("connect {}", socket.display()));
    assert_eq!(agent.tell("attest"), "PEER_FOREIGN_USER_NAMESPACE");
}

/// A listener, who attests on it, and who calls.
struct Scene {
    attestor: Attestor,
    listener: UnixListener,
    path: PathBuf,
    actor: Actor,
    folder: tempfile::TempDir,
}

/// One for what this kernel offers and one for what the oldest supported kernel does.
fn scenes() -> [Scene; 2] {
    [Attestor::new(), Attestor::with_capabilities(Capabilities::of_linux_5_10())].map(Scene::new)
}

impl Scene {
    fn new(attestor: Attestor) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        open_to_all(&path);
        prepare_listener(&listener, attestor.capabilities()).unwrap();
        Self { attestor, listener, path, actor: Actor::start(), folder }
    }

    async fn accept(&self) -> Accepted {
        self.attestor.accepted(self.listener.accept().await.unwrap().0)
    }

    async fn connect(&mut self) -> (PeerStream, Arc<Peer>) {
        self.actor.tell(&format!("connect {}", self.path.display()));
        let stream = self.accept().await;
        let peer = Arc::new(Peer::of(&stream, &self.attestor).unwrap());
        (PeerStream::new(stream, &peer), peer)
    }
}

/// A process that does what it is told; see [`act`].
pub(crate) struct Actor {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Actor {
    pub(crate) fn start() -> Self {
        Self::run(&mut Command::new("env"))
    }

    /// Whose program is at `path`.
    fn start_as(path: &Path) -> Self {
        Self::run_as(&mut Command::new("env"), path)
    }

    /// Run by `command`, which takes another command as its arguments.
    fn run(command: &mut Command) -> Self {
        Self::run_as(command, &std::env::current_exe().unwrap())
    }

    fn run_as(command: &mut Command, program: &Path) -> Self {
        let arguments = ["--exact", "attest::actor", "--ignored", "--nocapture"];
        let command = command.arg(program).args(arguments);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()));
        Self { process, input, output }
    }

    /// The answer to `order`, when it has been carried out.
    pub(crate) fn tell(&mut self, order: &str) -> String {
        self.say(order);
        self.answer()
    }

    fn say(&mut self, order: &str) {
        writeln!(self.input, "{order}").unwrap();
    }

    fn answer(&mut self) -> String {
        // libtest says things of its own before, on the same line or others.
        self.line_with("done:")
    }

    /// Becomes another program, with its connection open. [`Actor::echo`] tells when.
    fn exec(&mut self, program: &str) {
        self.say(&format!("exec {program}"));
    }

    /// Waits until the actor has become `cat`.
    fn echo(&mut self) {
        self.say("echo:");
        self.line_with("echo:");
    }

    fn line_with(&mut self, mark: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the actor has ended");
            if let Some((_, answer)) = line.split_once(mark) {
                return answer.trim().to_owned();
            }
        }
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
#[ignore = "run by the other tests here, as a process of its own"]
async fn actor() {
    let mut props = Props::default();
    // Not a byte more than the order is read, because the rest is for the program that an actor becomes.
    let mut input = fs::File::from(io::stdin().as_fd().try_clone_to_owned().unwrap());
    let mut order = Vec::new();
    let mut byte = [0];
    while input.read(&mut byte).unwrap() == 1 {
        if byte != *b"\n" {
            order.push(byte[0]);
            continue;
        }
        let answer = act(&mut props, &String::from_utf8(std::mem::take(&mut order)).unwrap()).await;
        println!("done:{answer}");
    }
}

/// What an actor holds.
#[derive(Default)]
struct Props {
    stream: Option<StdStream>,
    listener: Option<StdListener>,
    server: Option<(UnixListener, Attestor)>,
    pipes: Vec<OwnedFd>,
    readers: Vec<TcpStream>,
}

async fn act(props: &mut Props, order: &str) -> String {
    let (order, rest) = order.split_once(' ').unwrap_or((order, ""));
    let words: Vec<&str> = rest.split(' ').collect();
    let number = |word: &str| word.parse::<u32>().unwrap();
    match order {
        "connect" => props.stream = Some(StdStream::connect(rest).unwrap()),
        "write" => stream(props).write_all(rest.as_bytes()).unwrap(),
        "write-bytes" => {
            let bytes: Vec<u8> = words.iter().map(|word| word.parse().unwrap()).collect();
            stream(props).write_all(&bytes).unwrap();
        }
        "read" => return BufReader::new(stream(props)).lines().next().unwrap().unwrap(),
        "flood" => {
            let bytes: Vec<u8> = (0..words[0].parse::<usize>().unwrap()).map(|at| at as u8).collect();
            stream(props).write_all(&bytes).unwrap();
            props.stream = None;
        }
        "groups" => set_groups(&words.iter().map(|word| number(word)).collect::<Vec<_>>()),
        "become" => set_user(number(words[0]), number(words[1])),
        "inherit" => {
            let output = OwnedFd::from(stream(props).try_clone().unwrap());
            let mut child = Command::new("printf").arg(rest).stdout(output).spawn().unwrap();
            assert!(child.wait().unwrap().success());
        }
        "listen" => props.listener = Some(StdListener::bind(rest).unwrap()),
        "pass" => send(&StdStream::connect(rest).unwrap(), &[stream(props).as_fd()]),
        "take" => {
            let (meeting, _) = props.listener.as_ref().unwrap().accept().unwrap();
            props.stream = Some(receive(&meeting));
        }
        "send-pipes" => {
            let (readers, writers): (Vec<_>, Vec<_>) = (0..8).map(|_| rustix::pipe::pipe().unwrap()).unzip();
            let sent: Vec<_> = writers.iter().map(AsFd::as_fd).collect();
            let sent = try_send(stream(props), &sent, SendFlags::empty());
            props.pipes = readers;
            return said(sent);
        }
        "send-lingering" => {
            let flags = if words[1] == "urgent" { SendFlags::OOB } else { SendFlags::empty() };
            let sent = (0..number(words[0])).try_for_each(|_| send_lingering(props, flags));
            return said(sent);
        }
        "read-end" => return stream(props).read_to_end(&mut Vec::new()).map_or("reset", |_| "end").to_owned(),
        "await-linger" => return await_linger(&props.pipes).to_owned(),
        "await-pipes" => return if props.pipes.iter().all(is_closed) { "closed" } else { "open" }.to_owned(),
        "open-to-all" => open_to_all(Path::new(rest)),
        "exec" => {
            rustix::io::fcntl_setfd(stream(props), rustix::io::FdFlags::empty()).unwrap();
            panic!("{}", Command::new(words[0]).args(&words[1..]).exec());
        }
        "exec-memfd" | "exec-deleted" => {
            rustix::io::fcntl_setfd(stream(props), rustix::io::FdFlags::empty()).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("program");
            let program = output(Command::new("sh").args(["-c", "readlink -f $(command -v \"$1\")", "sh", rest]));
            // Written by a process of its own: this one may not have it open for writing when it runs it.
            assert!(Command::new("cp").arg(program).arg(&path).status().unwrap().success());
            let file = if order == "exec-memfd" {
                let memory = rustix::fs::memfd_create("program", rustix::fs::MemfdFlags::empty()).unwrap();
                fs::File::from(memory.try_clone().unwrap()).write_all(&fs::read(&path).unwrap()).unwrap();
                memory
            } else {
                fs::File::open(&path).unwrap().into()
            };
            drop(folder);
            let at = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
            panic!("{}", Command::new(at).arg0(rest).exec());
        }
        "serve" => props.server = Some((UnixListener::bind(rest).unwrap(), Attestor::new())),
        "attest" => {
            let (listener, attestor) = props.server.as_ref().unwrap();
            let (stream, _) = listener.accept().await.unwrap();
            let stream = attestor.accepted(stream);
            let attested = async { attestor.attest(&Peer::of(&stream, attestor)?).await };
            return match attested.await {
                Ok(workload) => format!("uid {}", workload.unix().unwrap().uid),
                Err(error) => error.reason().to_owned(),
            };
        }
        _ => panic!("no such order: {order}"),
    }
    String::new()
}

/// Of the whole process, unlike rustix's, which are of one thread.
#[allow(unsafe_code)]
fn set_groups(groups: &[u32]) {
    // SAFETY: the pointer is to as many groups as the length says.
    assert_eq!(unsafe { libc::setgroups(groups.len(), groups.as_ptr()) }, 0);
}

/// Likewise; the saved user id is the real one.
#[allow(unsafe_code)]
fn set_user(real: u32, effective: u32) {
    // SAFETY: there is no memory involved.
    assert_eq!(unsafe { libc::setresuid(real, effective, real) }, 0);
}

fn stream(props: &Props) -> &StdStream {
    props.stream.as_ref().unwrap()
}

/// Sends descriptors with one byte.
fn send(stream: &StdStream, descriptors: &[BorrowedFd<'_>]) {
    try_send(stream, descriptors, SendFlags::empty()).unwrap();
}

fn try_send(stream: &StdStream, descriptors: &[BorrowedFd<'_>], flags: SendFlags) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    rustix::net::sendmsg(stream, &[IoSlice::new(b"x")], &mut control, flags).map(drop)
}

fn said(sent: Result<(), Errno>) -> String {
    sent.map_or_else(
        |error| if error == Errno::PERM { "EPERM".to_owned() } else { error.to_string() },
        |()| "sent".to_owned(),
    )
}

/// Sends the last descriptor of a TCP socket that lingers, between those of two pipes: whoever closes all three closes one
/// pipe before it, and the other one [`LINGER`] later.
fn send_lingering(props: &mut Props, flags: SendFlags) -> Result<(), Errno> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut writer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    props.readers.push(listener.accept().unwrap().0);
    writer.set_nonblocking(true).unwrap();
    // More than fits on the way to a reader that does not read, bounded for a kernel that would take it all.
    let full = (0..1024).any(|_| writer.write(&[0; 64 << 10]).is_err());
    assert!(full, "the connection takes everything");
    rustix::net::sockopt::set_socket_linger(&writer, Some(LINGER)).unwrap();
    let (first, first_writer) = rustix::pipe::pipe().unwrap();
    let (last, last_writer) = rustix::pipe::pipe().unwrap();
    props.pipes.extend([first, last]);
    let sent = try_send(stream(props), &[first_writer.as_fd(), writer.as_fd(), last_writer.as_fd()], flags);
    if sent.is_err() {
        // This is the last one, which is about to be closed here.
        rustix::net::sockopt::set_socket_linger(&writer, None).unwrap();
    }
    sent
}

/// Waits until one of the pipes is closed; says whether all are.
fn await_linger(readers: &[OwnedFd]) -> &'static str {
    let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    let mut polled: Vec<_> = readers.iter().map(|reader| PollFd::new(reader, PollFlags::IN)).collect();
    match rustix::event::poll(&mut polled, Some(&patience)).unwrap() {
        0 => "nothing is closed",
        closed if closed == readers.len() => "over",
        _ => "lingers",
    }
}

/// Receives one descriptor, of a stream.
fn receive(stream: &StdStream) -> StdStream {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let descriptors = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptors.unwrap().into()
}

/// Whether nobody holds the other end of a pipe any more.
fn is_closed(reader: &OwnedFd) -> bool {
    let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    let mut polled = [PollFd::new(reader, PollFlags::IN)];
    rustix::event::poll(&mut polled, Some(&patience)).unwrap() == 1
        && fs::File::from(reader.try_clone().unwrap()).read(&mut [0]).unwrap() == 0
}

/// What one read gives.
async fn read(stream: &mut PeerStream) -> io::Result<String> {
    let mut buffer = [0; 64];
    let length = stream.read(&mut buffer).await?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// Checks that a read failed because of its writer.
fn refused(result: io::Result<String>) {
    let error = result.expect_err("these are another process's bytes");
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<AttestError>());
    assert_eq!(inner.expect("says why").reason(), "PEER_SOCKET_PASSED");
}

fn reason<T>(result: Result<T, AttestError>) -> &'static str {
    result.err().map_or("attested", |error| error.reason())
}

/// Whether the test can be run; says so if not.
pub(crate) fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        // Past libtest's capture, so that it is seen when the test passes.
        let _ = writeln!(io::stderr(), "{test}: SKIPPED, it needs root");
    }
    root
}

/// Lets any user reach and connect to a socket.
fn open_to_all(socket: &Path) {
    for (path, mode) in [(socket.parent().unwrap(), 0o755), (socket, 0o666)] {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    }
}

fn output(command: &mut Command) -> String {
    String::from_utf8(command.output().unwrap().stdout).unwrap().trim().to_owned()
}
