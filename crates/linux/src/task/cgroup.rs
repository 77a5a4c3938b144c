//! Control groups: the hierarchies, and where in them a process is (kernel/cgroup/cgroup.c).

use std::sync::Arc;

use rustc_hash::FxHashMap;
use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::container::{self, Container};
use crate::budget::{Budget, NO_ROOM, Share};
use crate::layout::{Field, Place, layout};
use crate::listing::{Listing, Problem, address, settled};
use crate::structures::list;
use crate::{Kernel, LinuxError};

layout! {
    /// `struct css_set`: the set of cgroups, one of each hierarchy, that tasks share.
    pub(crate) struct CssSetLayout = "css_set" {
        default: Field<Gva> = "dfl_cgrp",
        links: Place = "cgrp_links",
        nr_tasks: Field<i32> = "nr_tasks",
    }
}

layout! {
    /// `struct cgrp_cset_link`.
    struct LinkLayout = "cgrp_cset_link" {
        cgroup: Field<Gva> = "cgrp",
        css_set: Field<Gva> = "cset",
        of_css_set: Place = "cgrp_link",
        of_cgroup: Place = "cset_link",
    }
}

layout! {
    /// `struct cgroup`.
    struct CgroupLayout = "cgroup" {
        node: Field<Gva> = "kn",
        root: Field<Gva> = "root",
        flags: Field<u64> = "self.flags",
        css_sets: Place = "cset_links",
        children: Place = "self.children",
        sibling: Place = "self.sibling",
    }
}

layout! {
    /// `struct cgroup_root`: one hierarchy.
    struct RootLayout = "cgroup_root" {
        hierarchy: Field<i32> = "hierarchy_id",
        subsystems: Field<u32> = "subsys_mask",
        name: Place = "name",
        cgroup: Place = "cgrp",
        root_list: Place = "root_list",
    }
}

layout! {
    /// `struct kernfs_node`: the directory.
    struct NodeLayout = "kernfs_node" {
        // __parent since 6.15.
        parent: Field<Gva> = "__parent" | "parent",
        name: Field<Gva> = "name",
        id: Field<u64> = "id",
    }
}

layout! {
    /// `struct cgroup_subsys`.
    struct SubsystemLayout = "cgroup_subsys" {
        name: Field<Gva> = "legacy_name",
    }
}

/// Directories nest at most so deep in what we believe (the kernel's own paths end at PATH_MAX).
const MAX_DEPTH: usize = 256;
/// CSS_ONLINE (include/linux/cgroup-defs.h): unset once the directory was removed.
const CSS_ONLINE: u64 = 1 << 1;
/// More than are mounted anywhere: one for each controller, and a few that only have a name.
const MAX_HIERARCHIES: usize = 256;
/// CGROUP_SUBSYS_COUNT may not pass the bits of `subsys_mask`.
const MAX_SUBSYSTEMS: usize = 32;

/// One hierarchy.
#[derive(Clone, Debug)]
struct Hierarchy {
    id: i32,
    controllers: String,
    top: Gva,
    is_default: bool,
}

/// A process's place in every hierarchy.
#[derive(Clone, Debug, Default)]
pub(crate) struct Membership {
    /// The path in the unified (v2) hierarchy.
    pub(crate) unified: Option<Arc<str>>,
    /// As the lines of /proc/PID/cgroup: `id:controllers:path`.
    pub(crate) lines: Arc<[String]>,
    /// The container they tell of.
    pub(crate) container: Option<Container>,
    /// What is missing.
    pub(crate) problem: Option<String>,
}

/// Reads memberships, each `css_set` once.
#[derive(Debug)]
pub(crate) struct CgroupReader {
    kernel: Kernel,
    css_set: Arc<CssSetLayout>,
    link: Arc<LinkLayout>,
    cgroup: Arc<CgroupLayout>,
    root: Arc<RootLayout>,
    node: Arc<NodeLayout>,
    hierarchies: Vec<(Gva, Hierarchy)>,
    default_root: Option<Gva>,
    default_visible: bool,
    warnings: Vec<String>,
}

impl CgroupReader {
    pub(crate) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        let mut reader = Self {
            kernel: kernel.clone(),
            css_set: kernel.layout()?,
            link: kernel.layout()?,
            cgroup: kernel.layout()?,
            root: kernel.layout()?,
            node: kernel.layout()?,
            hierarchies: Vec::new(),
            default_root: kernel.find_symbol(&["cgrp_dfl_root"]),
            // /proc leaves the unified hierarchy out until it is mounted for the first time.
            default_visible: kernel
                .find_symbol(&["cgrp_dfl_visible"])
                .and_then(|at| kernel.space().read_u8(at).ok())
                .is_none_or(|visible| visible != 0),
            warnings: Vec::new(),
        };
        reader.find_hierarchies()?;
        Ok(reader)
    }

    /// Follows `cgroup_roots`.
    fn find_hierarchies(&mut self) -> Result<(), LinuxError> {
        let names = self.subsystem_names();
        let roots = self.kernel.symbol("cgroup_roots")?;
        let out = list::walk(self.kernel.space(), roots, MAX_HIERARCHIES);
        self.warnings
            .extend(out.walk.end.warning("list of cgroup hierarchies"));
        for at in out.walk.items {
            let root = self.root.root_list.container(at);
            match self.hierarchy(root, &names) {
                Ok(hierarchy) => self.hierarchies.push((root, hierarchy)),
                Err(error) => self
                    .warnings
                    .push(format!("cgroup hierarchy at {root} cannot be read: {error}")),
            }
        }
        Ok(())
    }

    fn hierarchy(&self, root: Gva, names: &[String]) -> Result<Hierarchy, ReadError> {
        let space = self.kernel.space();
        let is_default = Some(root) == self.default_root;
        let mask = self.root.subsystems.read(space, root)?;
        let mut controllers: Vec<String> = Vec::new();
        if !is_default {
            controllers.extend(
                names
                    .iter()
                    .enumerate()
                    .filter(|(i, _)| mask >> i & 1 == 1)
                    .map(|(_, n)| n.clone()),
            );
        }
        let mut name = vec![0u8; self.root.name.size().min(256) as usize];
        space.read(self.root.name.at(root), &mut name)?;
        let name = crate::text::guest_array_text(&name);
        if !name.is_empty() {
            controllers.push(format!("name={name}"));
        }
        Ok(Hierarchy {
            id: self.root.hierarchy.read(space, root)?,
            controllers: controllers.join(","),
            top: self.root.cgroup.at(root),
            is_default,
        })
    }

    /// The controllers' names by their bit: `struct cgroup_subsys *cgroup_subsys[]`.
    fn subsystem_names(&self) -> Vec<String> {
        let (Ok(layout), Some(table)) = (
            self.kernel.layout::<SubsystemLayout>(),
            self.kernel.find_symbol(&["cgroup_subsys"]),
        ) else {
            return Vec::new();
        };
        let count = self
            .kernel
            .enumerator("cgroup_subsys_id", "CGROUP_SUBSYS_COUNT")
            .unwrap_or(0);
        let count = usize::try_from(count).unwrap_or(0).min(MAX_SUBSYSTEMS);
        (0..count)
            .map(|index| {
                let name = self
                    .kernel
                    .pointer(table.wrapping_add(index as u64 * 8))
                    .and_then(|subsystem| layout.name.read(self.kernel.space(), subsystem))
                    .and_then(|name| self.kernel.text(name, 32));
                name.unwrap_or_else(|_| format!("controller{index}"))
            })
            .collect()
    }

    /// The path of a cgroup within its hierarchy.
    pub(crate) fn path(&self, cgroup: Gva, budget: &Budget) -> Result<String, ReadError> {
        let space = self.kernel.space();
        let mut node = self.cgroup.node.read(space, cgroup)?;
        let mut parts: Vec<String> = Vec::new();
        for _ in 0..MAX_DEPTH {
            let parent = self.node.parent.read(space, node)?;
            if parent.is_null() || !budget.step() {
                break;
            }
            parts.push(self.kernel.text(self.node.name.read(space, node)?, 256)?);
            node = parent;
        }
        let mut path = String::new();
        for part in parts.iter().rev() {
            path.push('/');
            path.push_str(part);
        }
        if path.is_empty() {
            path.push('/');
        }
        Ok(path)
    }

    /// Where the tasks of the `css_set` at `set` are. `exiting`: /proc shows "/" for them in version 1 hierarchies.
    pub(crate) fn membership(
        &self,
        set: Gva,
        cache: &mut FxHashMap<u64, Arc<Membership>>,
        budget: &Budget,
        share: &mut Share<'_>,
    ) -> Arc<Membership> {
        if let Some(known) = cache.get(&set.0) {
            return Arc::clone(known);
        }
        let mut made = self.read_membership(set, budget);
        let bytes = made.lines.iter().map(String::len).sum::<usize>()
            + made.unified.as_ref().map_or(0, |path| path.len());
        if !share.bytes(bytes) {
            made = Membership {
                problem: Some(NO_ROOM.to_owned()),
                ..Membership::default()
            };
        }
        let made = Arc::new(made);
        cache.insert(set.0, Arc::clone(&made));
        made
    }

    fn read_membership(&self, set: Gva, budget: &Budget) -> Membership {
        let space = self.kernel.space();
        let mut out = Membership::default();
        // One of each hierarchy, and some more that may have come since those were listed.
        let limit = self.hierarchies.len() + 16;
        let walk = list::walk(space, self.css_set.links.at(set), limit).walk;
        out.problem = walk.end.warning("list of cgroups");
        let mut places: Vec<(&Hierarchy, String)> = Vec::new();
        for at in walk.items {
            let link = self.link.of_css_set.container(at);
            let place = self.link.cgroup.read(space, link).and_then(|cgroup| {
                let root = self.cgroup.root.read(space, cgroup)?;
                let mut path = self.path(cgroup, budget)?;
                // Only a directory below the root can have been removed.
                if path != "/" && self.cgroup.flags.read(space, cgroup)? & CSS_ONLINE == 0 {
                    path.push_str(" (deleted)");
                }
                Ok((root, path))
            });
            match place {
                Ok((root, path)) => {
                    if let Some((_, hierarchy)) = self.hierarchies.iter().find(|(at, _)| *at == root) {
                        places.push((hierarchy, path));
                    }
                }
                Err(error) => out.problem = Some(error.to_string()),
            }
        }
        places.sort_by_key(|(hierarchy, _)| std::cmp::Reverse(hierarchy.id));
        let mut lines = Vec::new();
        for (hierarchy, path) in &places {
            if hierarchy.is_default {
                out.unified = Some(path.as_str().into());
                if !self.default_visible {
                    continue;
                }
            }
            lines.push(format!("{}:{}:{path}", hierarchy.id, hierarchy.controllers));
        }
        out.lines = lines.into();
        out.container = places.iter().find_map(|(_, path)| container::of_path(path));
        out
    }
}

/// A control group.
#[derive(Clone, Debug, Serialize)]
pub struct Cgroup {
    /// Its hierarchy: 0 is the unified one (version 2).
    pub hierarchy: i32,
    /// The controllers of a version 1 hierarchy, separated by commas; empty for version 2.
    pub controllers: String,
    /// Path within the hierarchy.
    pub path: String,
    /// Inode number of the directory.
    pub id: Option<u64>,
    /// Threads in this very group, not those below.
    pub tasks: Option<u64>,
    /// The container whose group this is.
    pub container: Option<String>,
    /// The runtime that made the container.
    pub container_runtime: Option<String>,
    /// Address of the `struct cgroup`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

/// More directories than a guest has: cgroups are limited by memory, about 10 KB each.
const MAX_CGROUPS: usize = 1 << 18;

impl Kernel {
    /// All control groups of all hierarchies, parents before their children.
    ///
    /// # Errors
    /// If the hierarchies cannot be listed or the kernel's types lack a member.
    pub fn cgroups(&self) -> Result<Listing<Cgroup>, LinuxError> {
        settled(
            self.memory().is_live(),
            |row: &Cgroup| row.problems.len(),
            || self.list_cgroups(),
        )
    }

    fn list_cgroups(&self) -> Result<Listing<Cgroup>, LinuxError> {
        let reader = CgroupReader::new(self)?;
        let budget = Budget::default();
        let mut out = Listing::new(Vec::new(), reader.warnings.clone());
        let mut seen = rustc_hash::FxHashSet::default();
        'all: for (_, hierarchy) in &reader.hierarchies {
            let mut stack = vec![hierarchy.top];
            while let Some(cgroup) = stack.pop() {
                if !seen.insert(cgroup.0) {
                    out.warn(format!(
                        "cgroups: the tree comes back to {cgroup} (a cycle), cut there"
                    ));
                    continue;
                }
                if out.rows.len() >= MAX_CGROUPS {
                    out.warn(format!("cgroups: cut after {MAX_CGROUPS}"));
                    break 'all;
                }
                let limit = budget.limit(MAX_CGROUPS);
                let children = list::walk(self.space(), reader.cgroup.children.at(cgroup), limit).walk;
                budget.walked(children.items.len());
                if let Some(warning) = children.end.warning("list of child cgroups") {
                    out.warn(warning);
                }
                stack.extend(
                    children
                        .items
                        .iter()
                        .rev()
                        .map(|&at| reader.cgroup.sibling.container(at)),
                );
                let row = reader.row(hierarchy, cgroup, &budget);
                if !budget.row(row.path.len() + row.controllers.len()) {
                    break 'all;
                }
                out.rows.push(row);
            }
        }
        budget.warning("cgroups").into_iter().for_each(|w| out.warn(w));
        Ok(out)
    }
}

impl CgroupReader {
    fn row(&self, hierarchy: &Hierarchy, cgroup: Gva, budget: &Budget) -> Cgroup {
        let space = self.kernel.space();
        let mut problems = Vec::new();
        let path = self.path(cgroup, budget).unwrap_or_else(|error| {
            problems.push(Problem::read("path", &error));
            String::new()
        });
        let id = self
            .cgroup
            .node
            .read(space, cgroup)
            .and_then(|node| self.node.id.read(space, node));
        let id = id
            .map_err(|error| problems.push(Problem::read("id", &error)))
            .ok();
        let tasks = self
            .count_tasks(cgroup, budget)
            .map_err(|error| problems.push(Problem::read("tasks", &error)))
            .ok();
        let container = container::of_path(&path);
        Cgroup {
            hierarchy: hierarchy.id,
            controllers: hierarchy.controllers.clone(),
            path,
            id,
            tasks,
            container_runtime: container.as_ref().map(|c| c.runtime.to_owned()),
            container: container.map(|c| c.id),
            address: cgroup,
            problems,
        }
    }

    /// The tasks of all `css_set`s that have this cgroup.
    fn count_tasks(&self, cgroup: Gva, budget: &Budget) -> Result<u64, ReadError> {
        let space = self.kernel.space();
        let limit = budget.limit(MAX_CGROUPS);
        let sets = list::walk(space, self.cgroup.css_sets.at(cgroup), limit);
        budget.walked(sets.walk.items.len());
        let mut tasks = 0u64;
        for at in sets.walk.items {
            let set = self.link.css_set.read(space, self.link.of_cgroup.container(at))?;
            tasks = tasks.saturating_add(self.css_set.nr_tasks.read(space, set)?.max(0) as u64);
        }
        Ok(tasks)
    }
}
