//! How much memory this process may use, as the kernel enforces it at the start.

use std::{fs, path::Path};

/// The share of the machine's memory that a process without a limit takes for its own: a sixteenth.
const SHARE_OF_MACHINE: u64 = 16;
/// Where cgroups are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Bytes that this process may use, and what says so: the least `memory.max` (cgroup v2) or `memory.limit_in_bytes` (v1)
/// of its cgroup and those above it, or else a sixteenth of the machine's memory.
pub fn memory_limit() -> (usize, &'static str) {
    let machine = rustix::system::sysinfo();
    let machine = machine.totalram as u64 * u64::from(machine.mem_unit);
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let (bytes, from) = match limit_of(&own, Path::new(CGROUPS)) {
        Some(limit) if limit < machine => (limit, "the cgroup's memory limit"),
        _ => (machine / SHARE_OF_MACHINE, "a sixteenth of this machine's memory"),
    };
    (usize::try_from(bytes).unwrap_or(usize::MAX), from)
}

/// The least limit of the cgroups in `text` (`/proc/PID/cgroup`), and of those above them, in hierarchies under `mounted`.
fn limit_of(text: &str, mounted: &Path) -> Option<u64> {
    let hierarchies = text.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        match controllers {
            "" => Some((mounted.to_owned(), "memory.max", path)),
            _ if controllers.split(',').any(|it| it == "memory") => {
                Some((mounted.join("memory"), "memory.limit_in_bytes", path))
            }
            _ => None,
        }
    });
    let limits = hierarchies.flat_map(|(mounted, file, path)| {
        let folders: Vec<_> = Path::new(path.trim_start_matches('/')).ancestors().map(|it| mounted.join(it)).collect();
        folders.into_iter().filter_map(move |folder| fs::read_to_string(folder.join(file)).ok()?.trim().parse().ok())
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_from_the_own_cgroup_upwards_counts() {
        let mounted = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = mounted.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("a/b/memory.max", "max\n");
        write("a/memory.max", "1000\n");
        write("other/memory.max", "1\n");
        write("memory/v1/memory.limit_in_bytes", "2000\n");
        write("memory/memory.limit_in_bytes", "9223372036854771712\n");
        for (text, expected) in [
            ("0::/a/b\n", Some(1000)),
            ("0::/a\n", Some(1000)),
            ("0::/\n", None),
            ("0::/none/of/these\n", None),
            ("4:cpu,memory:/v1\n0::/\n", Some(2000)),
            ("4:memory:/v1\n0::/a/b\n", Some(1000)),
            ("4:memory:/\n", Some(9_223_372_036_854_771_712)),
            ("4:cpu:/v1\n", None),
            ("garbage\n\n", None),
        ] {
            assert_eq!(limit_of(text, mounted.path()), expected, "{text:?}");
        }
    }

    #[test]
    fn there_is_always_some() {
        assert!(memory_limit().0 > 1 << 20);
    }
}
