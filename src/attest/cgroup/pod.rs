//! The pod and container of a process: pure functions of the text of `/proc/PID/cgroup`.
//!
//! The kubelet makes a pod's cgroup and the runtime the container's below it. Whoever is in a container may make cgroups
//! below its own, and users of the host below theirs, with whatever names. So a pod is only where pods are: below what
//! is an ancestor of the agent's own cgroup or one of the places that kubelets use by themselves; and the outermost pod
//! and container count. What looks like a pod's cgroup elsewhere is refused; it is neither that pod nor a process of
//! the host.
//!
//! From within a cgroup namespace, where most containers are (cgroup v2), paths are written from the agent's own cgroup:
//! `/../../kubepods-burstable-podU.slice/cri-containerd-C.scope`. What is above the first name is then an ancestor of
//! the agent's by construction.

use crate::attest::AttestError;

/// A process's pod and container, as its cgroup names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::attest) struct InPod {
    /// UID of the pod, as the kubelet knows it.
    pub(in crate::attest) uid: String,
    /// Id of the container.
    pub(in crate::attest) container: String,
}

/// Where a process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::attest) enum Place {
    /// In no pod.
    Host,
    /// In a pod.
    Pod(InPod),
    /// In the agent's own container, or beside it in its pod; which pod that is cannot be seen from inside.
    Own,
}

/// From where cgroup paths are seen: this process's own cgroups.
#[derive(Debug)]
pub(in crate::attest) struct View {
    /// Text of `/proc/self/cgroup`.
    own: String,
    /// Whether paths are written from the root of the host.
    host: bool,
}

/// What kubelets make pods below when nobody tells them otherwise, apart from the root.
const USUAL_PARENTS: [&[&str]; 3] = [&["kubelet"], &["kubelet.slice"], &["system.slice", "containerd.service"]];
/// What runtimes put before a container's id.
const RUNTIMES: [&str; 3] = ["cri-containerd", "crio", "docker"];
const QUALITIES: [&str; 2] = ["burstable", "besteffort"];

impl View {
    pub(in crate::attest) fn new(own: String, host: bool) -> Self {
        Self { own, host }
    }

    /// Where a process is by the text of its `/proc/PID/cgroup`. Runtimes place a container in the hierarchies that they
    /// use, so one that names a pod is enough, and none may name another. In one that they do not use, the agent itself
    /// is where everybody is, so only all of them together say that a process is in the agent's own pod.
    pub(in crate::attest) fn place(&self, text: &str) -> Result<Place, AttestError> {
        let (mut found, mut own): (Option<(InPod, &str)>, _) = (None, true);
        for (hierarchy, path) in lines(text) {
            match (self.place_in(hierarchy, path)?, &found) {
                (Place::Pod(pod), None) => found = Some((pod, path)),
                (Place::Pod(pod), Some((other, at))) if pod != *other => {
                    return Err(AttestError::CgroupsDisagree { one: (*at).to_owned(), other: path.to_owned() });
                }
                (Place::Host, _) => own = false,
                (Place::Pod(_) | Place::Own, _) => {}
            }
        }
        Ok(match found {
            Some((pod, _)) => Place::Pod(pod),
            None if own && lines(text).next().is_some() => Place::Own,
            None => Place::Host,
        })
    }

    fn place_in(&self, hierarchy: &str, path: &str) -> Result<Place, AttestError> {
        let own = lines(&self.own).find(|(it, _)| *it == hierarchy).map_or("/", |(_, path)| path);
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let ups = parts.iter().take_while(|part| **part == "..").count();
        let (from_own, below) = (!self.host && own == "/", &parts[ups..]);
        if from_own && (ups == 0 || (ups == 1 && below.first().is_some_and(|part| container(part).is_some()))) {
            return Ok(Place::Own);
        }
        let pod = if ups > 0 { in_pod(below) } else { below_usual_or(own, below).and_then(in_pod) };
        match pod {
            Some(pod) => Ok(Place::Pod(pod)),
            None if parts.iter().any(|part| part.contains("kubepods") || pod_uid(part).is_some()) => {
                Err(AttestError::PodCgroup { path: path.to_owned() })
            }
            None => Ok(Place::Host),
        }
    }
}

/// Controllers and path of each line. Only the path may contain a colon; the kernel allows no line break in it.
fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        Some((fields.next()?, fields.next()?))
    })
}

/// What is left of a path from the root when all above the pods is taken away, if pods may be there.
fn below_usual_or<'a>(own: &str, parts: &'a [&'a str]) -> Option<&'a [&'a str]> {
    let first = parts.iter().position(|part| is_root(part) || part.contains(':'))?;
    let (above, below) = parts.split_at(first);
    let mut own = own.split('/').filter(|part| !part.is_empty());
    let is_ours = above.iter().all(|part| own.next() == Some(part));
    (is_ours || USUAL_PARENTS.contains(&above)).then_some(below)
}

/// Pod and container at the beginning of a path: `[kubepods/] [burstable/] podU / C`.
fn in_pod(parts: &[&str]) -> Option<InPod> {
    let mut parts = parts.iter().copied().peekable();
    parts.next_if(|part| is_root(part));
    parts.next_if(|part| is_quality(part));
    let pod = parts.next()?;
    // A runtime without systemd that is given systemd's names makes one of three.
    if let Some((pod, inside)) = pod.split_once(':') {
        let (runtime, id) = inside.split_once(':')?;
        let known = RUNTIMES.contains(&runtime) && is_container_id(id);
        return known.then_some(InPod { uid: pod_uid(pod)?, container: id.to_owned() });
    }
    Some(InPod { uid: pod_uid(pod)?, container: container(parts.next()?)?.to_owned() })
}

/// `kubepods`, or a slice of it: `kubepods.slice`, `kubelet-kubepods.slice`.
fn is_root(part: &str) -> bool {
    part == "kubepods" || part.strip_suffix(".slice").is_some_and(is_root_slice)
}

fn is_root_slice(name: &str) -> bool {
    name.strip_suffix("kubepods").is_some_and(|parents| parents.is_empty() || parents.ends_with('-'))
}

/// A quality of service that has a cgroup of its own.
fn is_quality(part: &str) -> bool {
    QUALITIES.contains(&part) || part.strip_suffix(".slice").is_some_and(is_quality_slice)
}

fn is_quality_slice(name: &str) -> bool {
    name.rsplit_once('-').is_some_and(|(root, quality)| is_root_slice(root) && QUALITIES.contains(&quality))
}

/// The UID in `podU`, or in `kubepods-burstable-podU.slice` with `_` for `-`.
fn pod_uid(part: &str) -> Option<String> {
    let uid = match part.strip_suffix(".slice") {
        Some(name) => {
            let (above, uid) = name.rsplit_once("-pod")?;
            (is_root_slice(above) || is_quality_slice(above)).then(|| uid.replace('_', "-"))?
        }
        None => part.strip_prefix("pod")?.to_owned(),
    };
    is_pod_uid(&uid).then_some(uid)
}

/// A UUID as the API server writes it, or the hash that the kubelet knows a static pod by.
fn is_pod_uid(uid: &str) -> bool {
    let groups: Vec<&str> = uid.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    (lengths == [8, 4, 4, 4, 12] || lengths == [32]) && groups.iter().all(|group| is_hex(group))
}

/// The id in `C`, `crio-C` or `cri-containerd-C.scope`.
fn container(part: &str) -> Option<&str> {
    let name = part.strip_suffix(".scope").unwrap_or(part);
    let id = match name.rsplit_once('-') {
        Some((runtime, id)) => RUNTIMES.contains(&runtime).then_some(id)?,
        None if name.len() < part.len() => return None,
        None => name,
    };
    is_container_id(id).then_some(id)
}

fn is_container_id(id: &str) -> bool {
    id.len() == 64 && is_hex(id)
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UID: &str = "2c48913c-b29f-11e7-9350-020968147796";
    const UID_: &str = "2c48913c_b29f_11e7_9350_020968147796";
    const STATIC: &str = "0123456789abcdef0123456789abcdef";
    const OTHER: &str = "11111111-2222-3333-4444-555555555555";
    const ID: &str = "9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135961";
    const ID2: &str = "0bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135960";

    /// Of an agent that is a service of the host.
    fn service() -> View {
        View::new("1:name=systemd:/system.slice/csrd.service\n0::/system.slice/csrd.service\n".to_owned(), true)
    }

    /// Of an agent in a container with a cgroup namespace.
    fn container() -> View {
        View::new("0::/\n".to_owned(), false)
    }

    fn pod(uid: &str) -> Option<Place> {
        Some(Place::Pod(InPod { uid: uid.to_owned(), container: ID.to_owned() }))
    }

    /// `None` when it is refused.
    fn place(view: &View, text: &str) -> Option<Place> {
        match view.place(text) {
            Ok(place) => Some(place),
            Err(AttestError::PodCgroup { .. } | AttestError::CgroupsDisagree { .. }) => None,
            Err(error) => panic!("{text:?}: {error}"),
        }
    }

    #[test]
    fn every_driver_and_runtime_names_pod_and_container() {
        for (path, uid) in [
            (format!("/kubepods/burstable/pod{UID}/{ID}"), UID),
            (format!("/kubepods/besteffort/pod{UID}/{ID}"), UID),
            (format!("/kubepods/pod{UID}/{ID}"), UID),
            (format!("/kubepods/burstable/pod{STATIC}/{ID}"), STATIC),
            (format!("/kubepods/pod{UID}/crio-{ID}"), UID),
            (
                format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice/crio-{ID}.scope"),
                UID,
            ),
            (
                format!(
                    "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UID_}.slice/docker-{ID}.scope"
                ),
                UID,
            ),
            (format!("/kubepods.slice/kubepods-pod{UID_}.slice/cri-containerd-{ID}.scope"), UID),
            (
                format!(
                    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice/cri-containerd-{ID}.scope"
                ),
                STATIC,
            ),
            (format!("/kubepods.slice/kubepods-pod{UID_}.slice/crio-{ID}.scope/container"), UID),
            (format!("/kubelet/kubepods/besteffort/pod{UID}/{ID}"), UID),
            (
                format!(
                    "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{UID_}.slice/cri-containerd-{ID}.scope"
                ),
                UID,
            ),
            (format!("/system.slice/containerd.service/kubepods-besteffort-pod{UID_}.slice:cri-containerd:{ID}"), UID),
        ] {
            for line in [format!("0::{path}\n"), format!("8:pids:{path}\n1:name=systemd:/\n0::/\n")] {
                assert_eq!(place(&service(), &line), pod(uid), "{line}");
            }
        }
    }

    #[test]
    fn from_a_cgroup_namespace_pods_are_seen_beside_the_agents_own() {
        for (path, uid) in [
            (format!("/../../pod{UID}/{ID}"), UID),
            (format!("/../../../burstable/pod{UID}/{ID}"), UID),
            (format!("/../../burstable/pod{UID}/{ID}"), UID),
            (format!("/../../kubepods-besteffort-pod{UID_}.slice/cri-containerd-{ID}.scope"), UID),
            (format!("/../../../kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice/crio-{ID}.scope/sub"), UID),
            (format!("/../kubepods-burstable-pod{UID_}.slice:cri-containerd:{ID}"), UID),
            (format!("/../../kubepods.slice/kubepods-pod{STATIC}.slice/cri-containerd-{ID}.scope"), STATIC),
        ] {
            assert_eq!(place(&container(), &format!("0::{path}\n")), pod(uid), "{path}");
        }
        let unused = format!("4:misc:/\n0::/../../pod{UID}/{ID}\n");
        assert_eq!(place(&container(), &unused), pod(UID), "nobody is placed in the other hierarchy");
        assert_eq!(place(&container(), "4:misc:/\n0::/../../../../user.slice\n"), Some(Place::Host));
        for path in ["/", "/sub", &format!("/../{ID}"), &format!("/../cri-containerd-{ID}.scope/sub")] {
            assert_eq!(place(&container(), &format!("0::{path}\n")), Some(Place::Own), "{path}");
        }
        for path in ["/../../../..", "/../../../../system.slice/web.service", "/../../../../user.slice", "/.."] {
            assert_eq!(place(&container(), &format!("0::{path}\n")), Some(Place::Host), "{path}");
        }
    }

    #[test]
    fn a_node_that_is_itself_a_container_has_its_pods_beside_the_agents() {
        let node = format!("/docker/{ID2}/kubelet/kubepods");
        let view = View::new(format!("8:pids:{node}/besteffort/pod{OTHER}/{ID2}\n"), true);
        assert_eq!(place(&view, &format!("8:pids:{node}/burstable/pod{UID}/{ID}\n")), pod(UID));
        assert_eq!(place(&view, &format!("8:pids:/docker/{ID}/kubelet/kubepods/burstable/pod{UID}/{ID}\n")), None);
        assert_eq!(place(&view, &format!("8:pids:/docker/{ID}\n")), Some(Place::Host));
        let view = View::new("0::/kubelet.slice/kubelet-kubepods.slice/x\n".to_owned(), false);
        let path =
            format!("/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UID_}.slice/cri-containerd-{ID}.scope");
        assert_eq!(place(&view, &format!("0::{path}\n")), pod(UID), "in the node's namespace, and not at its root");
    }

    #[test]
    fn what_looks_like_a_pod_where_no_kubelet_makes_any_is_refused() {
        let user = "/user.slice/user-1000.slice/user@1000.service";
        for path in [
            format!("{user}/kubepods/burstable/pod{UID}/{ID}"),
            format!("{user}/kubepods.slice/kubepods-pod{UID_}.slice/cri-containerd-{ID}.scope"),
            format!("/system.slice/web.service/kubepods/burstable/pod{UID}/{ID}"),
            format!("/system.slice/web.service/kubepods-pod{UID_}.slice:cri-containerd:{ID}"),
            format!("/system.slice/web.service/pod{UID}/{ID}"),
            format!("/docker/{ID2}/kubepods/pod{UID}/{ID}"),
            format!("/pod{UID}/{ID}"),
            format!("/burstable/pod{UID}/{ID}"),
        ] {
            assert_eq!(place(&service(), &format!("0::{path}\n")), None, "{path}");
        }
        for path in [
            format!("/../../../..{user}/pod{UID}/{ID}"),
            format!("/../../../..{user}/burstable/pod{UID}/{ID}"),
            format!("/../../../../docker/{ID2}/kubepods/pod{UID}/{ID}"),
            format!("/../pod{UID}"),
        ] {
            assert_eq!(place(&container(), &format!("0::{path}\n")), None, "{path}");
        }
    }

    #[test]
    fn a_pods_cgroup_that_names_no_container_is_refused() {
        let uppercase = UID.to_uppercase();
        for path in [
            "/kubepods".to_owned(),
            "/kubepods/burstable".to_owned(),
            format!("/kubepods/pod{UID}"),
            format!("/kubepods/pod{UID}/crio-conmon-{ID}"),
            format!("/kubepods/pod{UID}/{ID} (deleted)"),
            format!("/kubepods/pod{UID}/{}", &ID[1..]),
            format!("/kubepods/pod{UID}/0{ID}"),
            format!("/kubepods/pod{UID}/{ID}.scope"),
            format!("/kubepods/pod{UID}/sub/{ID}"),
            format!("/kubepods/pod{uppercase}/{ID}"),
            format!("/kubepods/pod{}/{ID}", &UID[1..]),
            format!("/kubepods/sub/pod{UID}/{ID}"),
            format!("/kubepods/burstable/burstable/pod{UID}/{ID}"),
            format!("/kubepods.slice/kubepods-web-pod{UID_}.slice/crio-{ID}.scope"),
            format!("/system.slice/containerd.service/kubepods-pod{UID_}.slice:other:{ID}"),
            format!("/system.slice/containerd.service/kubepods-pod{UID_}.slice:cri-containerd"),
        ] {
            assert_eq!(place(&service(), &format!("0::{path}\n")), None, "{path}");
        }
    }

    #[test]
    fn hierarchies_may_be_silent_and_must_not_disagree() {
        let (own, other) = (format!("/kubepods/pod{UID}/{ID}"), format!("/kubepods/pod{OTHER}/{ID}"));
        let elsewhere = format!("/kubepods/pod{UID}/{ID2}");
        let shim = "/system.slice/containerd.service";
        assert_eq!(place(&service(), &format!("4:memory:{own}\n3:pids:{own}\n0::{shim}\n")), pod(UID));
        for text in [
            format!("4:memory:{own}\n3:pids:{other}\n"),
            format!("4:memory:{own}\n3:pids:{elsewhere}\n"),
            format!("4:memory:{own}\n0::/user.slice/pod{OTHER}/{ID}\n"),
        ] {
            assert_eq!(place(&service(), &text), None, "{text}");
        }
    }

    #[test]
    fn a_process_in_no_pod_is_the_hosts() {
        for text in
            ["", "0::/\n", "nonsense", "0::/system.slice/web.service\n", "0::/docker/0a1b\n", "1:cpu:/burstable\n"]
        {
            assert_eq!(place(&service(), text), Some(Place::Host), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_below_a_container_changes_what_it_is(below in "(/[a-z0-9.:-]{1,20}|/kubepods|/pod11111111-2222-3333-4444-555555555555|/[0-9a-f]{64}){0,6}") {
            prop_assert_eq!(place(&service(), &format!("0::/kubepods/burstable/pod{UID}/{ID}{below}\n")), pod(UID));
            prop_assert_eq!(place(&container(), &format!("0::/../../pod{UID}/{ID}{below}\n")), pod(UID));
        }

        #[test]
        fn below_a_cgroup_of_the_hosts_nothing_is_a_pod(below in "(/[a-z0-9.:-]{1,20}|/kubepods|/burstable|/pod11111111-2222-3333-4444-555555555555|/[0-9a-f]{64}){0,6}") {
            for (view, path) in [(service(), "/user.slice/a.service"), (container(), "/../../../user.slice/a.service")] {
                let place = place(&view, &format!("0::{path}{below}\n"));
                prop_assert!(!matches!(place, Some(Place::Pod(_))));
            }
        }

        #[test]
        fn any_text_is_read_without_panic(text in "[0-9]{0,2}[:a-z=/@._ (\n-]{0,80}") {
            let _ = (place(&service(), &text), place(&container(), &text));
        }
    }
}
