//! Control groups.

use std::sync::Arc;

use vmsight_linux::ProcessFields;

use crate::guest::{Guest, offset};
use crate::timed;

/// The unified hierarchy with one group below its root, and two processes in that.
fn one() -> (Guest, u64) {
    let mut guest = Guest::new();
    let roots = guest.space(16);
    let root = guest.make("cgroup_root", &[("hierarchy_id", 0)]);
    guest.list(roots, &[root + offset("cgroup_root", "root_list")]);
    guest.symbol("cgroup_roots", roots);
    guest.symbol("cgrp_dfl_root", root);
    let top_node = guest.make("kernfs_node", &[("id", 1)]);
    let name = guest.text(b"web.service");
    let node = guest.make(
        "kernfs_node",
        &[("id", 7), ("__parent", top_node), ("name", name)],
    );
    let top = root + offset("cgroup_root", "cgrp");
    guest.set(top, "cgroup", "kn", top_node);
    guest.set(top, "cgroup", "root", root);
    let group = guest.make("cgroup", &[("kn", node), ("root", root), ("self.flags", 2)]);
    for at in [top, group] {
        guest.list(at + offset("cgroup", "cset_links"), &[]);
        guest.list(at + offset("cgroup", "self.children"), &[]);
    }
    let children = top + offset("cgroup", "self.children");
    guest.list(children, &[group + offset("cgroup", "self.sibling")]);
    let set = guest.make("css_set", &[("nr_tasks", 2)]);
    let link = guest.make("cgrp_cset_link", &[("cgrp", group), ("cset", set)]);
    let (of_set, of_group) = (
        set + offset("css_set", "cgrp_links"),
        group + offset("cgroup", "cset_links"),
    );
    guest.list(of_set, &[link + offset("cgrp_cset_link", "cgrp_link")]);
    guest.list(of_group, &[link + offset("cgrp_cset_link", "cset_link")]);
    for pid in 1..3 {
        let task = guest.process(pid, "web");
        guest.set(task, "task_struct", "cgroups", set);
    }
    (guest, node)
}

#[test]
fn processes_of_one_group_share_its_name() {
    let (guest, _) = one();
    let kernel = guest.kernel();
    let listing = timed(|| kernel.processes(ProcessFields::CGROUP).unwrap());
    assert!(listing.warnings.is_empty(), "{:?}", listing.warnings);
    let [a, b] = listing.rows.as_slice() else {
        panic!("{:?}", listing.rows)
    };
    let lines = |row: &vmsight_linux::Process| row.details().cgroups.clone().unwrap();
    assert_eq!(a.details().cgroup.as_deref(), Some("/web.service"));
    assert_eq!(*lines(a), ["0::/web.service".to_owned()]);
    // A guest can make a million processes of a group whose lines are megabytes.
    assert!(Arc::ptr_eq(&lines(a), &lines(b)));
    assert!(Arc::ptr_eq(
        a.details().cgroup.as_ref().unwrap(),
        b.details().cgroup.as_ref().unwrap()
    ));
}

#[test]
fn groups_that_came_out_marked_are_read_again() {
    let (guest, node) = one();
    let groups = |kernel: &vmsight_linux::Kernel| timed(|| kernel.cgroups().unwrap());
    let listing = groups(&guest.kernel());
    let paths: Vec<_> = listing
        .rows
        .iter()
        .map(|row| (row.path.as_str(), row.tasks))
        .collect();
    assert_eq!(paths, [("/", Some(0)), ("/web.service", Some(2))]);
    let name = node + offset("kernfs_node", "name");
    let listing = groups(&guest.flickering(name, 0xdead_0000_0000_0100));
    assert!(listing.rows.iter().all(|row| row.problems.is_empty()));
    assert_eq!(listing.rows[1].path, "/web.service");
}
