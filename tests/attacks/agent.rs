//! The agent under attack: the shipped way of running it, in a folder of its own.

use std::{
    fmt::Write as _,
    fs::{self, File},
    net::{SocketAddr, TcpListener},
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::Context as _;
use rustix::process::{Resource, getrlimit};
use tempfile::TempDir;
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    time::sleep,
};

use crate::{
    cgroup::{self, Cgroup},
    log::Log,
};

/// The agent's user, as csrd is of the shipped unit.
const USER: u32 = 3900;
/// Groups that have a policy each: the quiet neighbour's, that of attackers who are granted something, and that of
/// others who come while an attack goes on.
pub(crate) const NEIGHBOUR: u32 = 3999;
pub(crate) const MEMBER: u32 = 5000;
pub(crate) const NEWCOMER: u32 = 4500;
/// The group of those to whom no policy grants anything.
pub(crate) const OUTSIDER: u32 = 6000;

/// What differs between rows.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Certificates a second: of all, and of each user, with the burst of each.
    pub(crate) all: (u32, u32),
    pub(crate) per_workload: (u32, u32),
    pub(crate) descriptors: u64,
    /// Policies for attackers, beside the usual one, and names in each.
    pub(crate) policies: (usize, usize),
}

/// The shipped configuration of a host, and the unit's descriptors.
impl Default for Settings {
    fn default() -> Self {
        Self { all: (500, 1000), per_workload: (50, 500), descriptors: 65_536, policies: (0, 0) }
    }
}

/// Where others find the agent, and programs that every user may execute.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The agent's program, and this one.
    pub(crate) program: PathBuf,
    pub(crate) attacker: PathBuf,
    pub(crate) socket: PathBuf,
    pub(crate) admin: SocketAddr,
}

/// A running agent, killed when dropped.
pub(crate) struct Agent {
    child: Child,
    // The process is in it until it has been waited for.
    cgroup: Option<Cgroup>,
    folder: TempDir,
    pub(crate) place: Place,
    pub(crate) log: Log,
    peak_kib: u64,
}

impl Agent {
    /// Starts it and waits until it listens.
    pub(crate) async fn start(settings: &Settings) -> anyhow::Result<Self> {
        let folder = stage()?;
        let path = |name: &str| folder.path().join(name);
        for name in ["run", "state"] {
            fs::create_dir(path(name))?;
            std::os::unix::fs::chown(path(name), Some(USER), Some(USER))?;
        }
        fs::set_permissions(path("run"), fs::Permissions::from_mode(0o755))?;
        fs::set_permissions(path("state"), fs::Permissions::from_mode(0o700))?;
        fs::create_dir(path("policies"))?;
        fs::write(path("policies/policies.yaml"), policies(settings))?;
        let rate = |(per_second, burst)| format!("{{perSecond: {per_second}, burst: {burst}}}");
        let (all, each) = (rate(settings.all), rate(settings.per_workload));
        fs::write(path("config.yaml"), format!("limits: {{all: {all}, perWorkload: {each}}}\n"))?;
        let admin = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let log = File::create(path("log"))?;
        let cgroup = Cgroup::make();
        let mut command = Command::new("sh");
        let procs = cgroup.as_ref().map_or(PathBuf::from("/dev/null"), Cgroup::procs);
        command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(procs);
        // What this process may have bounds what the agent may be given.
        let descriptors =
            getrlimit(Resource::Nofile).maximum.map_or(settings.descriptors, |hard| settings.descriptors.min(hard));
        command.arg("prlimit").arg(format!("--nofile={descriptors}:{descriptors}"));
        command.arg("setpriv").arg(format!("--reuid={USER}")).arg(format!("--regid={USER}"));
        command.args(["--clear-groups", "--inh-caps=+sys_ptrace", "--ambient-caps=+sys_ptrace", "--no-new-privs"]);
        // Whatever ends this process ends the agent.
        command.arg("--pdeathsig=KILL");
        command.arg(path("csrd")).args(["agent", "--config"]).arg(path("config.yaml"));
        command.arg("--socket").arg(path("run/s")).arg("--state-dir").arg(path("state"));
        command.arg("--policy").arg(path("policies")).arg("--admin").arg(admin.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).kill_on_drop(true);
        let child = command.spawn().context("starting the agent")?;
        // Of cgroup v2 it has one already, with the memory limit.
        if Path::new("/sys/fs/cgroup/cpu").exists() {
            cgroup::share(cgroup::AGENT, child.id());
        }
        let log = Log::follow(&path("log"))?;
        let place = Place { program: path("csrd"), attacker: path("attacks"), socket: path("run/s"), admin };
        let mut agent = Self { child, cgroup, folder, place, log, peak_kib: 0 };
        agent.listens().await?;
        Ok(agent)
    }

    async fn listens(&mut self) -> anyhow::Result<()> {
        for _ in 0..600 {
            if UnixStream::connect(&self.place.socket).await.is_ok() {
                return Ok(());
            }
            if self.child.try_wait()?.is_some() {
                break;
            }
            sleep(Duration::from_millis(50)).await;
        }
        anyhow::bail!("the agent does not listen: {}", fs::read_to_string(self.folder.path().join("log"))?)
    }

    pub(crate) fn is_limited(&self) -> bool {
        self.cgroup.is_some()
    }

    /// Reads the peak of its resident memory so far, and its log.
    pub(crate) fn look(&mut self) {
        self.log.look();
        let Some(process) = self.child.id() else { return };
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let peak = peak.and_then(|text| text.split_whitespace().next()?.parse().ok());
        self.peak_kib = self.peak_kib.max(peak.unwrap_or(0));
    }

    pub(crate) fn peak_mib(&self) -> f64 {
        self.peak_kib as f64 / 1024.0
    }

    /// How it ended, if it did.
    pub(crate) fn fate(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok()??;
        Some(match status.signal() {
            Some(9) => "KILLED".to_owned(),
            _ => status.to_string(),
        })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.start_kill();
        for _ in 0..500 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A folder with both programs that every user may enter.
fn stage() -> anyhow::Result<TempDir> {
    let folder = tempfile::Builder::new().prefix("csrd-attacks-").tempdir()?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let this = std::env::current_exe().context("this program")?;
    for (program, name) in [(Path::new(env!("CARGO_BIN_EXE_csrd")), "csrd"), (&this, "attacks")] {
        let copy = folder.path().join(name);
        fs::copy(program, &copy).with_context(|| program.display().to_string())?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    }
    Ok(folder)
}

fn policies(settings: &Settings) -> String {
    let mut text = String::new();
    let mut policy = |name: &str, gid: u32, names: &[String], offer: &str| {
        let names: Vec<_> = names.iter().map(|name| format!("'{name}'")).collect();
        let _ = write!(
            text,
            "---\napiVersion: csrd.dev/v1alpha1\nkind: CertificatePolicy\nmetadata: {{name: {name}}}\nspec:\n  match: {{unix: \
             {{gids: [{gid}]}}}}\n  allow:\n    dnsNames: [{}]\n    lifetime: {{min: 5s, default: 1h, max: 24h}}\n{offer}",
            names.join(", ")
        );
    };
    for (name, gid) in [("neighbour", NEIGHBOUR), ("newcomer", NEWCOMER), ("member", MEMBER)] {
        let offer = format!("  offer: [{{spiffeId: 'spiffe://attacks.test/{name}/{{unix.uid}}'}}]\n");
        policy(name, gid, &[format!("*.{name}.test")], &offer);
    }
    for number in 0..settings.policies.0 {
        let names: Vec<_> =
            (0..settings.policies.1).map(|name| format!("name-{name}.policy-{number}.{{unix.uid}}.test")).collect();
        policy(&format!("many-{number}"), MEMBER, &names, "");
    }
    text
}
