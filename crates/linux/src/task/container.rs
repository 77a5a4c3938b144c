//! Which container a control group belongs to, told from its path.

/// A container runtime's mark in a cgroup path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Container {
    /// docker, podman, containerd, cri-o, kubernetes, lxc, systemd-nspawn.
    pub(crate) runtime: &'static str,
    /// The id (64 hex digits, or what a runtime uses for one) or the name.
    pub(crate) id: String,
}

/// Prefixes of systemd scopes: `docker-<id>.scope`.
const SCOPES: [(&str, &str); 5] = [
    ("docker-", "docker"),
    ("libpod-conmon-", "podman"),
    ("libpod-", "podman"),
    ("cri-containerd-", "containerd"),
    ("crio-", "cri-o"),
];

/// Looks for the innermost container that `path` lies in.
///
/// The patterns are those that the runtimes' own documentation gives for the cgroupfs and systemd drivers; a path that only looks like
/// one (any 64 hex digits below a runtime's directory) counts, because a process cannot name its own cgroup without privileges.
pub(crate) fn of_path(path: &str) -> Option<Container> {
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
    (0..parts.len()).rev().find_map(|index| {
        let part = parts.get(index)?;
        let above = parts.get(..index)?;
        of_part(part, above)
    })
}

fn of_part(part: &str, above: &[&str]) -> Option<Container> {
    let container = |runtime, id: &str| {
        Some(Container {
            runtime,
            id: id.to_owned(),
        })
    };
    let scope = part.strip_suffix(".scope");
    for (prefix, runtime) in SCOPES {
        if let Some(id) = scope.unwrap_or(part).strip_prefix(prefix)
            && is_id(id)
        {
            return container(runtime, id);
        }
    }
    if let Some(machine) = scope.and_then(|s| s.strip_prefix("machine-"))
        && above.last() == Some(&"machine.slice")
    {
        return container("systemd-nspawn", &unescape(machine));
    }
    // lxc.payload.NAME since LXC 4, lxc/NAME before.
    if let Some(name) = part.strip_prefix("lxc.payload.").filter(|n| !n.is_empty()) {
        return container("lxc", name);
    }
    if above.last() == Some(&"lxc") && !part.starts_with("lxc.monitor") {
        return container("lxc", part);
    }
    // cgroupfs drivers: docker/<id>, kubepods/…/pod<uid>/<id>, libpod_parent/libpod-<id> (above), default/<id> of containerd's ctr.
    if is_id(part) {
        if above.iter().any(|p| p.starts_with("kubepods")) {
            return container("kubernetes", part);
        }
        return match above.last() {
            Some(&"docker") => container("docker", part),
            Some(&"libpod_parent") => container("podman", part),
            _ => container("unknown", part),
        };
    }
    None
}

/// A container id in full: 64 hex digits (32 for some older containerd and LXC tools).
fn is_id(text: &str) -> bool {
    matches!(text.len(), 64 | 32) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// systemd writes `-` in a unit's name as `\x2d`.
fn unescape(name: &str) -> String {
    name.replace("\\x2d", "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "3f4e5d6c7b8a99887766554433221100ffeeddccbbaa00112233445566778899";

    fn found(path: &str) -> Option<(&'static str, String)> {
        of_path(path).map(|c| (c.runtime, c.id))
    }

    #[test]
    fn every_runtime_is_known() {
        let id = Some(ID.to_owned());
        for (path, runtime) in [
            (format!("/docker/{ID}"), "docker"),
            (format!("/system.slice/docker-{ID}.scope"), "docker"),
            (format!("/system.slice/docker-{ID}.scope/init"), "docker"),
            (format!("/machine.slice/libpod-{ID}.scope/container"), "podman"),
            (format!("/libpod_parent/libpod-{ID}"), "podman"),
            (
                format!(
                    "/kubepods.slice/kubepods-burstable.slice/kubepods-pod1_2.slice/cri-containerd-{ID}.scope"
                ),
                "containerd",
            ),
            (
                format!("/kubepods.slice/kubepods-pod1.slice/crio-{ID}.scope"),
                "cri-o",
            ),
            (format!("/kubepods/burstable/pod8a0e/{ID}"), "kubernetes"),
            (format!("/default/{ID}"), "unknown"),
        ] {
            assert_eq!(
                found(&path).map(|(r, i)| (r, Some(i))),
                Some((runtime, id.clone())),
                "{path}"
            );
        }
        assert_eq!(
            found("/lxc.payload.web/system.slice/cron.service"),
            Some(("lxc", "web".to_owned()))
        );
        assert_eq!(found("/lxc/web"), Some(("lxc", "web".to_owned())));
        assert_eq!(
            found("/machine.slice/machine-deb\\x2d12.scope/payload"),
            Some(("systemd-nspawn", "deb-12".to_owned()))
        );
    }

    #[test]
    fn ordinary_groups_are_no_containers() {
        for path in [
            "/",
            "",
            "/system.slice/docker.service",
            "/user.slice/user-0.slice/session-1.scope",
            "/init.scope",
            "/lxc.monitor.web",
        ] {
            assert_eq!(found(path), None, "{path}");
        }
    }

    #[test]
    fn the_innermost_container_counts() {
        let other = ID.replace('3', "4");
        assert_eq!(
            found(&format!("/docker/{other}/docker/{ID}")),
            Some(("docker", ID.to_owned()))
        );
    }
}
