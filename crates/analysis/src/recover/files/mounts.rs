//! Where filesystems are mounted: what puts a file's path within its filesystem into the tree that the guest sees.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use vmsight_linux::{Kernel, Listing};

/// Mounts of one filesystem that are looked at for a path.
const MAX_MOUNTS: usize = 64;

/// One mount of a filesystem.
#[derive(Debug)]
pub(crate) struct Mounted {
    /// The directory of the filesystem that is mounted: not `/` for a bind mount.
    root: String,
    /// Where.
    pub(super) at: Arc<str>,
    /// In this mount namespace.
    pub(super) namespace: u32,
}

/// All mounts by the device of their filesystem, those of the first process first. Where they cannot be listed, paths are those
/// within the filesystem, and a warning says so.
pub(super) fn mounted<T>(kernel: &Kernel, listing: &mut Listing<T>) -> FxHashMap<String, Vec<Mounted>> {
    let mut out: FxHashMap<String, Vec<Mounted>> = FxHashMap::default();
    match kernel.mounts() {
        Ok(mounts) => {
            mounts.warnings.into_iter().for_each(|w| listing.warn(w));
            for mount in mounts.rows {
                let (Some(device), Some(root), Some(at)) = (mount.device, mount.root, mount.mount_point)
                else {
                    continue;
                };
                let of_device = out.entry(device).or_default();
                if of_device.len() < MAX_MOUNTS && !mount.unreachable {
                    of_device.push(Mounted {
                        root,
                        at: at.into(),
                        namespace: mount.namespace,
                    });
                }
            }
        }
        Err(error) => listing.warn(format!("paths are those within each filesystem: mounts: {error}")),
    }
    out
}

/// The path of what lies at `within` in a filesystem, and the mount that gives it that: by a mount of all of it, if there is one.
pub(crate) fn path<'m>(mounts: &'m [Mounted], within: &str) -> Option<(String, &'m Mounted)> {
    let whole = mounts.iter().find(|m| m.root == "/");
    let mount = whole.or_else(|| mounts.iter().find(|m| below(within, &m.root).is_some()))?;
    let rest = below(within, &mount.root)?;
    let at = if &*mount.at == "/" { "" } else { &*mount.at };
    let path = match (at, rest) {
        ("", "") => "/".to_owned(),
        _ => format!("{at}{rest}"),
    };
    Some((path, mount))
}

/// What of a path follows a directory: empty, or beginning with `/`.
fn below<'p>(path: &'p str, directory: &str) -> Option<&'p str> {
    if directory == "/" {
        return Some(if path == "/" { "" } else { path });
    }
    let rest = path.strip_prefix(directory)?;
    (rest.is_empty() || rest.starts_with('/')).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(root: &str, at: &str) -> Mounted {
        Mounted {
            root: root.to_owned(),
            at: at.into(),
            namespace: 1,
        }
    }

    #[test]
    fn a_path_is_that_of_the_mount_of_the_whole() {
        let mounts = [
            mount("/srv/data", "/mnt/bind"),
            mount("/", "/"),
            mount("/", "/again"),
        ];
        let of = |within| path(&mounts, within).map(|(path, mount)| (path, mount.at.to_string()));
        let both = |path: &str, at: &str| Some((path.to_owned(), at.to_owned()));
        assert_eq!(of("/srv/data/x"), both("/srv/data/x", "/"));
        assert_eq!(of("/"), both("/", "/"));
        assert_eq!(path(&mounts[2..], "/").unwrap().0, "/again");
        assert_eq!(path(&mounts[2..], "/x").unwrap().0, "/again/x");
    }

    #[test]
    fn what_only_a_bind_mount_shows_is_found_below_it() {
        let mounts = [mount("/other", "/mnt/other"), mount("/srv/data", "/mnt/bind")];
        let of = |within| path(&mounts, within).map(|(path, _)| path);
        assert_eq!(of("/srv/data/x").as_deref(), Some("/mnt/bind/x"));
        assert_eq!(of("/srv/data").as_deref(), Some("/mnt/bind"));
        assert_eq!(of("/srv/database"), None);
        assert_eq!(of("/"), None);
        assert!(path(&[], "/x").is_none());
    }
}
