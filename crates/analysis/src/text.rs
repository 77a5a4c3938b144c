//! The code of the kernel and its modules, read in one piece each.

use vmsight_arch::Gva;
use vmsight_linux::LinuxError;
use vmsight_linux::module::{Module, ModuleRange};

use crate::code;
use crate::{Context, Owner};

/// Text that is read of the kernel at most, and of all modules together.
const MAX_TEXT: u64 = 256 << 20;

/// A stretch of code of one owner.
#[derive(Debug)]
pub(crate) struct Region {
    /// Whose it is.
    pub(crate) owner: Owner,
    /// Its first byte.
    pub(crate) start: u64,
    /// Its bytes.
    pub(crate) bytes: Vec<u8>,
    /// Where functions begin, ascending, the end last.
    pub(crate) functions: Vec<u64>,
}

impl Region {
    /// The byte behind its last.
    pub(crate) fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes.len() as u64)
    }

    /// The bytes between two addresses.
    pub(crate) fn slice(&self, from: u64, to: u64) -> &[u8] {
        let from = from.saturating_sub(self.start) as usize;
        let to = (to.saturating_sub(self.start) as usize).min(self.bytes.len());
        self.bytes.get(from..to).unwrap_or(&[])
    }
}

/// The text of every module, one stretch or more of each, or why it cannot be read. Modules that all claim the same memory cost no
/// more than honest ones.
pub(crate) fn modules(context: &Context) -> impl Iterator<Item = (&Module, Result<Region, LinuxError>)> {
    let mut left = MAX_TEXT;
    let ranges = context.modules().iter().flat_map(|module| {
        code_of(context, &module.name, &module.ranges)
            .into_iter()
            .map(move |range| (module, range))
    });
    ranges.map(move |(module, range)| {
        let region = match left.checked_sub(range.1) {
            Some(rest) => {
                left = rest;
                module_region(context, &module.name, range)
            }
            None => Err(LinuxError::Implausible {
                what: "modules".to_owned(),
                reason: "they claim more code than there can be".to_owned(),
            }),
        };
        (module, region)
    })
}

/// The ranges of a module's code: base and length.
fn code_of(context: &Context, name: &str, ranges: &[ModuleRange]) -> Vec<(u64, u64)> {
    let is_code =
        |at: u64| matches!(context.owner(Gva(at)), Owner::Module { name: n, code: true } if *n == *name);
    ranges
        .iter()
        .filter(|r| r.kind != "percpu" && is_code(r.base.0))
        .map(|r| {
            // Before 6.4 code and data are one range, the code first; pages are whole.
            let mut length = r.size.min(MAX_TEXT);
            while length > 4096 && !is_code(r.base.0.saturating_add(length - 1)) {
                length = (length - 1) / 4096 * 4096;
            }
            (r.base.0, length)
        })
        .collect()
}

/// The kernel's text.
pub(crate) fn kernel(context: &Context) -> Result<Region, LinuxError> {
    let start = context.symbol(&["_stext", "_text"])?.0;
    let end = context.symbol(&["_etext"])?.0;
    let length = end.saturating_sub(start).min(MAX_TEXT);
    let bytes = code::read(context, Gva(start), length as usize)?;
    let image = context.kernel().image();
    let linked = image.link_time(Gva(start));
    let mut functions: Vec<u64> = context
        .kernel()
        .profile()
        .symbols
        .range(linked..linked.saturating_add(length))
        .filter(|s| matches!(s.kind, b't' | b'T' | b'w' | b'W'))
        .map(|s| image.runtime(s.address).0)
        .collect();
    functions.dedup();
    functions.push(start.saturating_add(length));
    Ok(Region {
        owner: Owner::Kernel,
        start,
        bytes,
        functions,
    })
}

fn module_region(context: &Context, name: &str, (start, length): (u64, u64)) -> Result<Region, LinuxError> {
    let bytes = code::read(context, Gva(start), length as usize)?;
    let end = start.saturating_add(length);
    let symbols = context.module_symbols();
    let from = symbols.partition_point(|s| s.address.0 < start);
    let mut functions: Vec<u64> = symbols
        .get(from..)
        .unwrap_or(&[])
        .iter()
        .take_while(|s| s.address.0 < end)
        .filter(|s| matches!(s.kind, 't' | 'T' | 'w' | 'W'))
        .map(|s| s.address.0)
        .collect();
    functions.dedup();
    functions.push(end);
    Ok(Region {
        owner: Owner::Module {
            name: name.into(),
            code: true,
        },
        start,
        bytes,
        functions,
    })
}
