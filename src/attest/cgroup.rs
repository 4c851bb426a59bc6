//! The cgroup of a process, and the systemd unit it belongs to: pure functions of the text of `/proc/PID/cgroup`.
//!
//! What is not certain is not a fact: a text in which the hierarchies disagree is refused, and a path that is not
//! written from the host's root, or that has been deleted, names no unit. Resource hierarchies of cgroup v1 are not
//! read, because anything may place processes there; systemd places them in its own.

pub(super) use self::pod::{InPod, Place, View};
use super::AttestError;

mod pod;

/// Longest unit name of systemd (`UNIT_NAME_MAX`), in bytes.
const UNIT_NAME_BYTES_MAX: usize = 255;
/// Kinds of unit whose processes have a cgroup, except slices (systemd.unit(5)).
const UNIT_TYPES: [&str; 5] = ["service", "scope", "socket", "mount", "swap"];

/// The path of the process's cgroup in the hierarchy that systemd manages, out of the text of `/proc/PID/cgroup`.
///
/// That is the line `0::` (cgroup v2), the line of `name=systemd` (v1), or with both mounted (hybrid) the one that is
/// not the root; two that are not the root must agree. `None` when there is no such line or the cgroup was deleted
/// (cgroups(7), "/proc files").
pub(super) fn path(text: &str) -> Result<Option<&str>, AttestError> {
    let mut found = "";
    for line in text.lines() {
        // Only the path may contain a colon or a space; the kernel allows no line break in it.
        let mut fields = line.splitn(3, ':');
        let path = match (fields.next(), fields.next(), fields.next()) {
            (Some("0"), Some(""), Some(path)) | (Some(_), Some("name=systemd"), Some(path)) => path,
            _ => continue,
        };
        if matches!(found, "" | "/") {
            found = path;
        } else if path != found && path != "/" {
            return Err(AttestError::CgroupsDisagree { one: found.to_owned(), other: path.to_owned() });
        }
    }
    Ok((found.starts_with('/') && !found.ends_with(" (deleted)")).then_some(found))
}

/// The system unit of a cgroup path written from the host's root: the first part below the slices
/// (systemd's `cg_path_get_unit`).
///
/// What lies below a unit is at the mercy of whoever it was delegated to, so it names nothing: a user's own
/// `web.service` lies below `user@1000.service` and is that unit.
pub(super) fn unit(path: &str) -> Option<&str> {
    let part = path.split('/').skip(1).map(unescape).find(|part| !is_slice(part))?;
    is_unit(part, &UNIT_TYPES).then_some(part)
}

/// systemd puts `_` before a name that could be mistaken for a file of the kernel's (`cg_escape`).
fn unescape(part: &str) -> &str {
    part.strip_prefix('_').unwrap_or(part)
}

/// systemd's `valid_slice_name`: a slice is never an instance.
fn is_slice(part: &str) -> bool {
    is_unit(part, &["slice"]) && !part.contains('@')
}

/// systemd's `unit_name_is_valid` for names that are plain or instances, which is what runs.
fn is_unit(name: &str, types: &[&str]) -> bool {
    let Some((prefix, kind)) = name.rsplit_once('.') else { return false };
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    name.len() <= UNIT_NAME_BYTES_MAX
        && types.contains(&kind)
        && !prefix.is_empty()
        && prefix.bytes().all(allowed)
        && !prefix.starts_with('@')
        && !prefix.ends_with('@')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Checks that `text` gives this path and this unit.
    fn check(text: &str, path_wanted: Option<&str>, unit_wanted: Option<&str>) {
        let found = path(text).unwrap_or_else(|conflict| panic!("{text:?} is refused: {conflict:?}"));
        assert_eq!(found, path_wanted, "path of {text:?}");
        assert_eq!(found.and_then(unit), unit_wanted, "unit of {text:?}");
    }

    /// Checks that `path` alone gives this unit.
    fn check_path(path: &str, unit_wanted: Option<&str>) {
        check(&format!("0::{path}\n"), Some(path), unit_wanted);
    }

    #[test]
    fn a_system_unit_is_the_first_part_below_the_slices() {
        check_path("/system.slice/web.service", Some("web.service"));
        check_path("/system.slice/system-getty.slice/getty@tty1.service", Some("getty@tty1.service"));
        check_path("/system.slice/web.service/worker", Some("web.service"));
        check_path("/init.scope", Some("init.scope"));
        check_path("/machine.slice/machine-a\\x2db.scope/payload", Some("machine-a\\x2db.scope"));
        check_path("/system.slice/_cpu.service", Some("cpu.service"));
        check_path("/_system.slice/web.service", Some("web.service"));
        check_path("/system.slice/docker.socket", Some("docker.socket"));
        check_path("/user.slice/user-1000.slice/session-3.scope", Some("session-3.scope"));
    }

    #[test]
    fn a_unit_of_a_users_own_manager_is_never_a_system_unit() {
        let user = "/user.slice/user-1000.slice/user@1000.service";
        check_path(&format!("{user}/app.slice/web.service"), Some("user@1000.service"));
        check_path(&format!("{user}/web.service"), Some("user@1000.service"));
        check_path(&format!("{user}/system.slice/web.service"), Some("user@1000.service"));
    }

    #[test]
    fn a_unit_inside_a_container_is_never_a_system_unit() {
        check_path("/system.slice/docker-0a1b.scope/system.slice/web.service", Some("docker-0a1b.scope"));
        check_path("/docker/0a1b/system.slice/web.service", None);
        check_path("/../system.slice/web.service", None);
        check_path("/a@b.slice/web.service", None);
    }

    #[test]
    fn a_path_that_names_no_unit_gives_none() {
        for path in [
            "/",
            "/system.slice",
            "/web",
            "/.service",
            "/@a.service",
            "/a@.service",
            "/a b.service",
            "/web.service2",
            "//a",
        ] {
            check_path(path, None);
        }
    }

    #[test]
    fn a_unit_name_is_at_most_255_bytes() {
        let longest = format!("{}.service", "a".repeat(UNIT_NAME_BYTES_MAX - ".service".len()));
        check_path(&format!("/{longest}"), Some(&longest));
        check_path(&format!("/a{longest}"), None);
    }

    #[test]
    fn every_layout_of_hierarchies_is_read() {
        let web = "/system.slice/web.service";
        let found = Some("web.service");
        check(&format!("0::{web}\n"), Some(web), found);
        check(&format!("4:memory:/elsewhere\n1:name=systemd:{web}\n"), Some(web), found);
        check(&format!("4:memory:/elsewhere\n1:name=systemd:{web}\n0::{web}\n"), Some(web), found);
        check(&format!("1:name=systemd:{web}\n0::/\n"), Some(web), found);
        check(&format!("1:name=systemd:/\n0::{web}\n"), Some(web), found);
        check("1:name=systemd:/\n0::/\n", Some("/"), None);
        check("4:memory:/system.slice/web.service\n", None, None);
        check("0::/a:b/c d\n", Some("/a:b/c d"), None);
        check("", None, None);
        check("0::relative\n", None, None);
        check("nonsense", None, None);
    }

    #[test]
    fn a_deleted_cgroup_is_no_fact() {
        check("0::/system.slice/web.service (deleted)\n", None, None);
    }

    #[test]
    fn hierarchies_that_disagree_are_refused() {
        for text in ["1:name=systemd:/docker/0a\n0::/system.slice/docker.service\n", "0::/a\n0::/b\n"] {
            assert_eq!(path(text).unwrap_err().reason(), "PEER_CGROUPS_DISAGREE", "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic_and_a_unit_is_a_part_of_its_path(text in "[0-9]{0,1}[:a-z=/@._ (\n]{0,60}") {
            if let Ok(Some(path)) = path(&text) && let Some(unit) = unit(path) {
                prop_assert!(path.contains(unit));
            }
        }

        #[test]
        fn nothing_below_a_unit_changes_the_unit(below in "[^\n]{0,80}") {
            let path = format!("/user.slice/user@1.service/{below}");
            prop_assert_eq!(unit(&path), Some("user@1.service"));
        }
    }
}
