//! What processes have open or mapped, by the names through which they opened it.

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;
use vmsight_linux::LinuxError;
use vmsight_linux::file::FileFilter;

use crate::recover::member::{Member, Structure};
use crate::{Context, Findings};

/// Holders of one file that are named.
const MAX_HOLDERS: usize = 8;
/// What has an inode and lies in no directory.
const WITHOUT_DIRECTORY: [&str; 3] = ["sock", "FIFO", "a_inode"];

/// Who has which name's file.
pub(super) struct Held {
    holders: FxHashMap<Gva, Vec<String>>,
}

/// How a `struct file` leads to its name.
struct Opened<'c> {
    context: &'c Context,
    dentry: Member,
    known: FxHashMap<Gva, Option<Gva>>,
}

impl Opened<'_> {
    /// The dentry that a file was opened by.
    fn name(&mut self, file: Gva) -> Option<Gva> {
        let (context, dentry) = (self.context, self.dentry);
        let read = || dentry.pointer(context.space(), file).ok();
        let name = self.known.entry(file).or_insert_with(read);
        name.filter(|name| !name.is_null())
    }
}

impl Held {
    /// Of all processes that are listed. What cannot be looked at is noted.
    pub(super) fn read(context: &Context, findings: &mut Findings) -> Result<Self, LinuxError> {
        let kernel = context.kernel();
        let mut opened = Opened {
            context,
            dentry: Structure::of(kernel, "file")?.member("f_path.dentry")?,
            known: FxHashMap::default(),
        };
        let mut held = Self {
            holders: FxHashMap::default(),
        };
        let open = kernel.open_files(FileFilter {
            directories: false,
            peers: false,
            ..FileFilter::default()
        });
        if let Some(open) = findings.or_note("open files", open) {
            open.warnings
                .into_iter()
                .for_each(|warning| findings.note(warning));
            for row in &open.rows {
                if !WITHOUT_DIRECTORY.contains(&row.kind)
                    && let Some(name) = row.address.and_then(|file| opened.name(file))
                {
                    held.add(name, || {
                        format!("{} ({}) descriptor {}", row.pid, row.name, row.fd)
                    });
                }
            }
        }
        let file = Structure::of(kernel, "vm_area_struct")?.member("vm_file")?;
        if let Some(maps) = findings.or_note("mapped files", context.maps()) {
            for process in &maps.rows {
                let mut last = None;
                for mapping in process.maps.rows.iter().filter(|m| m.inode != 0) {
                    let at = file.pointer(context.space(), mapping.vma).ok();
                    let name = at.filter(|at| !at.is_null()).and_then(|at| opened.name(at));
                    // A program's mappings follow one another.
                    if name == last {
                        continue;
                    }
                    last = name;
                    if let Some(name) = name {
                        held.add(name, || format!("{} ({}) mapped", process.pid, process.name));
                    }
                }
            }
        }
        Ok(held)
    }

    fn add(&mut self, name: Gva, who: impl FnOnce() -> String) {
        let holders = self.holders.entry(name).or_default();
        if holders.len() < MAX_HOLDERS {
            holders.push(who());
        }
    }

    /// The names.
    pub(super) fn names(&self) -> impl Iterator<Item = Gva> + '_ {
        self.holders.keys().copied()
    }

    /// Who has a name's file: some of them.
    pub(super) fn holders(&self, name: Gva) -> &[String] {
        self.holders.get(&name).map_or(&[], Vec::as_slice)
    }
}
