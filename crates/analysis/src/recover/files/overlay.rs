//! Files of an overlay: each has its contents in a file of a layer (fs/overlayfs/ovl_entry.h).

use vmsight_arch::Gva;
use vmsight_linux::Kernel;

use crate::recover::member::{Member, Structure};

/// How an overlay's inode leads to the inode that has the contents.
pub(super) struct Overlay {
    vfs_inode: Member,
    upper: Member,
    /// 5.10 to 5.19: the lower inode.
    lower_inode: Option<Member>,
    /// Since 6.0: a dentry of the lower layer.
    lower_dentry: Option<Member>,
    /// Since 6.5: the stack of layers, and in it the first one's dentry.
    entry: Option<(Member, Member, Member)>,
    dentry_inode: Member,
}

impl Overlay {
    /// From the kernel's own types or those of the module. `None` where neither has them, as before 5.11.
    pub(super) fn find(kernel: &Kernel) -> Option<Self> {
        let module = kernel.module_types("overlay").ok();
        let types = [Some(kernel.types()), module.as_ref()];
        types.into_iter().flatten().find_map(|types| {
            let structure = |name| Structure::within(types, kernel.release(), name).ok();
            let inode = structure("ovl_inode")?;
            let entry = || {
                let (stack, path) = (structure("ovl_entry")?, structure("ovl_path")?);
                Some((
                    inode.find("oe")?,
                    stack.find("__lowerstack")?,
                    path.find("dentry")?,
                ))
            };
            Some(Self {
                vfs_inode: inode.find("vfs_inode")?,
                upper: inode.find("__upperdentry")?,
                lower_inode: inode.find("lower"),
                lower_dentry: inode.find("lowerpath.dentry"),
                entry: entry(),
                dentry_inode: structure("dentry")?.find("d_inode")?,
            })
        })
    }

    /// The inode with the contents of the overlay's inode at `inode`: in the upper layer if it was ever changed.
    pub(super) fn real(&self, kernel: &Kernel, inode: Gva) -> Option<Gva> {
        let space = kernel.space();
        let own = self.vfs_inode.container(inode);
        let known = |at: Gva| (!at.is_null()).then_some(at);
        let of_dentry = |dentry: Gva| known(self.dentry_inode.pointer(space, dentry).ok()?);
        if let Some(upper) = known(self.upper.pointer(space, own).ok()?) {
            return of_dentry(upper);
        }
        if let Some(lower) = &self.lower_inode {
            return known(lower.pointer(space, own).ok()?);
        }
        if let Some(lower) = &self.lower_dentry {
            return of_dentry(known(lower.pointer(space, own).ok()?)?);
        }
        let (entry, stack, dentry) = self.entry.as_ref()?;
        let entry = known(entry.pointer(space, own).ok()?)?;
        of_dentry(known(dentry.pointer(space, stack.at(entry)).ok()?)?)
    }
}
