//! Files that exist and are not found where programs look for them.

mod held;
mod inodes;
mod names;

use rustc_hash::{FxHashMap, FxHashSet};
use vmsight_arch::Gva;
use vmsight_linux::path::PathResolver;
use vmsight_linux::{LinuxError, Listing};

use super::cross_view::CrossView;
use crate::recover::files::inode::REMOVED;
use crate::recover::files::mounts;
use crate::recover::files::superblock::{self, SuperBlock};
use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

use held::Held;
use inodes::{File, Files, Listed};
use names::{Name, Names};

/// See [`Check`].
pub(crate) const FILES: Check = Check {
    name: "hidden-files",
    summary: "Every file in memory is in its directory, and is found by its name",
    compares: "what directories have in memory (which ls shows of tmpfs and other filesystems that are nowhere else), the table of names \
               (by which a file is opened), the names that each file says it has, the lists of files of filesystems, and what processes \
               have open or mapped",
    why: "A file whose name is taken out of its directory is shown by no listing, and whoever knows the name opens it; one whose name is \
          taken out of the table is there for nobody but who has it open.",
    techniques: &[Technique::ROOTKIT, Technique::HIDE_ARTIFACTS],
    blind_spots: &[
        "A file on a disk that what lists its directory leaves out, or whose entry in the directory's blocks was changed: see the checks of \
         function pointers, of system calls and of kernel text. Blocks of directories are not read.",
        "A file that is left out of the order only in which tmpfs lists a directory (fs/libfs.c, simple_offset, since 6.6): that is not read.",
        "A file of which neither a name nor an inode is in memory.",
        "What lies under a directory on which something else is mounted: mounting does that, and `vmsight mounts` shows it.",
        "That a file on a disk is not in the table of names: names of such files leave it when memory is short.",
    ],
    run,
};

/// Files that are told of.
const MAX_TOLD: usize = 1 << 10;
const DIRECTORY: &str = "in its directory";
const TABLE: &str = "in the table of names";
const INODE: &str = "a name that its file has";
const FILESYSTEM: &str = "its file in the filesystem's list";
const HELD: &str = "open or mapped";

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let kernel = context.kernel();
    let mut names = Names::new(kernel)?;
    let files = Files::new(kernel)?;
    names.read_table(findings)?;
    let mut said = Listing::<()>::default();
    let blocks = superblock::all(kernel, &mut said)?;
    let mut reader = Reader {
        names,
        files,
        listed: FxHashMap::default(),
        held: Held::read(context, findings)?,
        blocks,
    };
    let (mut doubtful, nameless) = reader.inodes(findings);
    for name in reader.held.names() {
        // Read, it is looked at like those of the table.
        reader.names.get(name);
    }
    reader.names.read_directories(findings);
    doubtful.extend(reader.missing());
    findings.looked_at(reader.names.known().count());
    if !(doubtful.is_empty() && nameless.is_empty()) {
        superblock::find_mounts(kernel, &mut reader.blocks, &mut said);
    }
    said.warnings
        .into_iter()
        .for_each(|warning| findings.note(warning));
    let paths = PathResolver::new(kernel)?;
    let mut doubtful: Vec<Gva> = doubtful.into_iter().collect();
    doubtful.sort_unstable();
    if doubtful.len().max(nameless.len()) > MAX_TOLD {
        findings.note(format!(
            "more than {MAX_TOLD} names are in doubt: not all are told"
        ));
    }
    for name in doubtful.into_iter().take(MAX_TOLD) {
        reader.judge(findings, &paths, name);
    }
    for (inode, block) in nameless.into_iter().take(MAX_TOLD) {
        reader.report_nameless(findings, inode, block);
    }
    if reader.names.is_exhausted() {
        findings.note("lists of names: no more looked at, they are too many");
    }
    Ok(())
}

struct Reader<'c> {
    names: Names<'c>,
    files: Files<'c>,
    /// The files of each filesystem, by its `struct super_block`.
    listed: FxHashMap<Gva, Listed>,
    held: Held,
    blocks: Vec<SuperBlock>,
}

/// What each view says of a name, asked anew.
struct Answers {
    name: Name,
    file: File,
    in_directory: bool,
    in_table: bool,
    of_inode: bool,
    /// `None` where not all files of its filesystem are known.
    in_filesystem: Option<bool>,
    /// Names that its file has in the table.
    names_in_table: u64,
}

impl Reader<'_> {
    /// Goes through the filesystems' lists of files. Of those that are in memory only, the names that are not in the table and have to be,
    /// and the files with pages and without a name, with their filesystems' numbers.
    fn inodes(&mut self, findings: &mut Findings) -> (FxHashSet<Gva>, Vec<(Gva, usize)>) {
        let (mut doubtful, mut nameless) = (FxHashSet::default(), Vec::new());
        for (number, block) in self.blocks.iter().enumerate() {
            let (inodes, complete) = self.files.listed(block, findings);
            let names = &mut self.names;
            self.files.read_many(&inodes, |at, file| {
                let found = names.aliases_from(file.first_name);
                findings.end("names of a file", &found.end);
                let (mut in_table, mut others) = (0, Vec::new());
                for dentry in &found.items {
                    let Some(name) = names.get(*dentry) else { continue };
                    name.of_inode |= name.inode == at;
                    match name.in_table {
                        true => in_table += 1,
                        false if name.is_in_use(*dentry) => others.push(*dentry),
                        false => {}
                    }
                }
                if !block.memory_only {
                    return;
                }
                if in_table < file.names() {
                    doubtful.extend(others);
                }
                if found.items.is_empty() && file.is_regular() && file.links > 0 && file.pages > 0 {
                    nameless.push((at, number));
                }
            });
            let inodes = inodes.into_iter().collect();
            self.listed.insert(block.address, Listed { inodes, complete });
        }
        (doubtful, nameless)
    }

    /// The names that a view lacks in which they must be.
    fn missing(&self) -> impl Iterator<Item = Gva> + '_ {
        let lacks = |(at, name): (Gva, &Name)| {
            let in_filesystem = self.in_filesystem(name);
            let lacks = !name.in_directory || in_filesystem.is_some_and(|listed| !listed || !name.of_inode);
            (lacks && name.is_in_use(at)).then_some(at)
        };
        self.names.known().filter_map(lacks)
    }

    /// Whether its filesystem lists a name's file; `None` where not all of them are known.
    fn in_filesystem(&self, name: &Name) -> Option<bool> {
        let listed = self.listed.get(&name.block).filter(|listed| listed.complete)?;
        Some(listed.inodes.contains(&name.inode))
    }

    /// Asks each view anew about one name. `None` where it is no file's, or changes.
    fn ask(&self, findings: &mut Findings, at: Gva) -> Option<Answers> {
        let name = self.names.read(at).filter(|name| name.is_in_use(at))?;
        if name.is_changing() {
            findings.note(format!("the name at {at}: it was being changed"));
            return None;
        }
        let file = self.files.read(name.inode)?;
        let all = self.names.of_inode(name.inode);
        let in_table = |dentry: &Gva| {
            let name = self.names.read(*dentry)?;
            self.names.is_in_table(*dentry, &name)
        };
        let answers = Answers {
            file,
            in_directory: self.names.is_in_directory(at, &name)?,
            in_table: self.names.is_in_table(at, &name)?,
            of_inode: self.names.is_of_inode(at, &name)?,
            in_filesystem: self.in_filesystem(&name),
            names_in_table: all.items.iter().filter(|d| in_table(d) == Some(true)).count() as u64,
            name,
        };
        let after = self.names.read(at)?;
        after.is_same(&name).then_some(answers)
    }

    fn judge(&self, findings: &mut Findings, paths: &PathResolver, at: Gva) {
        let Some(answers) = self.ask(findings, at) else {
            return;
        };
        let Answers { name, file, .. } = &answers;
        let block = self.blocks.iter().find(|block| block.address == name.block);
        let memory_only = block.is_some_and(|block| block.memory_only);
        let seen = |yes: bool| yes.then_some(at);
        let mut views = CrossView::default();
        views.whole(DIRECTORY, seen(answers.in_directory));
        match memory_only && answers.names_in_table < file.names() {
            true => views.whole(TABLE, seen(answers.in_table)),
            false => views.part(TABLE, seen(answers.in_table)),
        }
        if let Some(in_filesystem) = answers.in_filesystem {
            views.whole(INODE, seen(answers.of_inode));
            views.whole(FILESYSTEM, seen(in_filesystem));
        }
        let holders = self.held.holders(at);
        views.part(HELD, seen(!holders.is_empty()));
        let lacking = views.lacking(at);
        if lacking.is_empty() {
            return;
        }
        // What lists a directory of such a filesystem goes through what the directory has in memory.
        let unseen = memory_only && !answers.in_directory;
        let explanation = format!(
            "it exists, and yet is not {}{}",
            lacking.join(", not "),
            match (unseen, answers.in_table) {
                (true, true) =>
                    ": no listing of the directory shows it, and whoever knows its name can open it",
                (true, false) => ": no listing of the directory shows it",
                (false, false) if lacking.contains(&TABLE) =>
                    ": nobody can open it by its name, and no listing shows it",
                _ => "",
            }
        );
        let severity = match unseen || lacking.contains(&TABLE) {
            true => Severity::Critical,
            false => Severity::High,
        };
        let path = path(block, paths, at);
        let mut finding = Finding::new(severity, format!("{} {path}", file.kind()), explanation).at(at);
        for answer in views.evidence(at) {
            finding = finding.with(answer);
        }
        if !holders.is_empty() {
            finding = finding.with(Evidence::value("held by", holders.join(", ")));
        }
        finding = of_file(finding, name.inode, file, block);
        findings.report(finding.with(Evidence::value("directory", name.parent)));
    }

    /// A file in memory that has contents and a link, and that no name leads to.
    fn report_nameless(&self, findings: &mut Findings, inode: Gva, block: usize) {
        let (Some(file), Some(block)) = (self.files.read(inode), self.blocks.get(block)) else {
            return;
        };
        if !file.first_name.is_null() || file.links == 0 {
            return;
        }
        let subject = format!("file {} of {} {}", file.number, block.fs_type, block.device);
        let explanation =
            "the file has a link and contents, and no name: nobody can open it, and no listing shows it";
        let finding = Finding::new(Severity::High, subject, explanation).at(inode);
        findings.report(of_file(finding, inode, &file, Some(block)));
    }
}

/// The path of a name, where its filesystem is mounted.
fn path(block: Option<&SuperBlock>, paths: &PathResolver, at: Gva) -> String {
    let Ok(within) = paths.within_filesystem(at) else {
        return "?".to_owned();
    };
    let within = within.path.strip_suffix(REMOVED).unwrap_or(&within.path);
    let mounts = block.map_or(&[][..], |block| &block.mounts);
    mounts::path(mounts, within).map_or(within.to_owned(), |(path, _)| path)
}

fn of_file(finding: Finding, inode: Gva, file: &File, block: Option<&SuperBlock>) -> Finding {
    let filesystem = match block {
        Some(block) => format!(" of {} {}", block.fs_type, block.device),
        None => String::new(),
    };
    finding
        .with(Evidence::value(
            "file",
            format_args!("inode {}{filesystem} at {inode}", file.number),
        ))
        .with(Evidence::value("links", file.links))
        .with(Evidence::value("size", file.size))
        .with(Evidence::value("pages in the page cache", file.pages))
}
