//! One run's view of one target: attached, and the kernel found where the command needs it.

pub(crate) mod symbol;
pub(crate) mod typed;

use std::cell::RefCell;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use vmsight_arch::{Gpa, Gva, Registers};
use vmsight_linux::{AttachOptions as KernelOptions, Kernel, module::ModuleSymbol};
use vmsight_memory::{AddressSpace, GuestMemory, ScanOptions};
use vmsight_symbols::cache::Cache;
use vmsight_symbols::kernel::Hints;
use vmsight_target::{AttachOptions, PauseGuard, Target, TargetKind, TargetSpec};

use crate::{
    args::Global,
    output::{Progress, Record, Sheet, Style, warn},
    place::{Base, Place},
};

/// What was asked for is not in the guest: exit code 1, not 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Missing(pub(crate) String);

/// A target, and the kernel in it.
pub(crate) struct Session {
    kernel: Option<Kernel>,
    modules: OnceLock<Vec<ModuleSymbol>>,
    // Fields drop in order: the VM resumes before its connection goes.
    pause: RefCell<Option<PauseGuard>>,
    target: Target,
    style: Style,
    /// What it finds will be written to: where a name is not clear, nothing is guessed.
    writing: bool,
    /// Another session follows when this one is over.
    repeats: bool,
    /// Names whose doubt was told.
    told: RefCell<Vec<String>>,
}

impl Session {
    /// Attaches and finds the kernel.
    pub(crate) fn open(global: &Global, target: &str) -> Result<Session> {
        Self::attach(global, target, false, true)
    }

    /// Attaches only: for what needs no kernel.
    pub(crate) fn without_kernel(global: &Global, target: &str) -> Result<Session> {
        Self::attach(global, target, false, false)
    }

    /// Attaches to a live target with leave to change it.
    pub(crate) fn for_writing(global: &Global, target: &str, kernel: bool) -> Result<Session> {
        Self::attach(global, target, true, kernel)
    }

    fn attach(global: &Global, text: &str, write: bool, want_kernel: bool) -> Result<Session> {
        let spec = TargetSpec::from_str(text).map_err(|e| anyhow!(e))?;
        anyhow::ensure!(
            global.timeout.is_finite() && (0.0..=3600.0).contains(&global.timeout),
            "--timeout takes 0 to 3600 seconds"
        );
        // A memory layout that had to be proven has had its kernel found already: it is not looked for twice.
        let proven = RefCell::new(None);
        let prove = |memory: &GuestMemory| {
            let (kernel, how) = prove(global, memory)?;
            proven.replace(Some(kernel));
            Ok(how)
        };
        // What a monitor takes milliseconds to tell, nearly always what could have been guessed, is not waited for idly. Not
        // where the VM is to stand still first, or more than the usual is to be looked at.
        let foreseen = RefCell::new(None);
        let foresee = |memory: &GuestMemory| {
            foreseen.replace(Kernel::foresee(memory, &cache(global)));
        };
        let usual = want_kernel && !global.pause && !global.thorough && global.symbols.is_none();
        let options = AttachOptions {
            write,
            timeout: Duration::from_secs_f64(global.timeout),
            prove: Some(&prove),
            ahead: if usual { Some(&foresee) } else { None },
        };
        let target =
            vmsight_target::attach(&spec, &options).with_context(|| format!("attaching to {text}"))?;
        let quiet = global.quiet;
        if global.watch.is_some() && matches!(target.kind, TargetKind::Dump(_)) {
            bail!("--watch repeats what a running VM shows; {text} is a dump and does not change");
        }
        for note in &target.notes {
            tracing::info!("{note}");
        }
        if !quiet {
            target.memory.notes().iter().for_each(|n| warn(n));
        }
        let pause = match global.pause {
            true if target.memory.is_live() => Some(target.pause().context("pausing the VM")?),
            _ => None,
        };
        let foreseen = foreseen
            .into_inner()
            .filter(|_| target.ahead)
            .map(|foreseen| Kernel::foreseen(target.memory.clone(), foreseen));
        let kernel = match want_kernel {
            false => None,
            true if foreseen.is_some() => foreseen,
            // What proved the layout are the guest's own symbols and whatever kernel comes first; a file that was asked for,
            // and doubts, are taken up after that.
            true => Some(
                match proven
                    .into_inner()
                    .filter(|_| global.symbols.is_none() && !global.thorough)
                {
                    Some(kernel) => kernel,
                    None => find_kernel(
                        global,
                        &target.memory,
                        hints(global, &target),
                        global.symbols.as_deref(),
                    )
                    .with_context(|| format!("looking for the kernel in {text}"))?,
                },
            ),
        };
        if let Some(kernel) = &kernel {
            announce(global, kernel);
        }
        Ok(Session {
            kernel,
            modules: OnceLock::new(),
            pause: RefCell::new(pause),
            target,
            style: global.style(),
            writing: write,
            repeats: global.watch.is_some(),
            told: RefCell::default(),
        })
    }

    /// Prints what was found, and says so where the VM ended meanwhile.
    pub(crate) fn print<R: Record>(&self, sheet: &Sheet<R>) -> Result<()> {
        self.print_as(&self.style, sheet)
    }

    /// The same in another style than the command line's.
    pub(crate) fn print_as<R: Record>(&self, style: &Style, sheet: &Sheet<R>) -> Result<()> {
        // All has been read: the guest need not stand still while somebody reads what is printed.
        self.pause.take();
        // Asked before it is printed: a VM that ends while its rows are written has done them no harm.
        let ended = self.has_ended();
        style.print(sheet)?;
        self.tell(ended, ended && sheet.is_doubtful()?)
    }

    /// Lets a VM that was paused for this go on: all has been read.
    pub(crate) fn resume(&self) {
        self.pause.take();
    }

    /// Is done with rows that were printed. The program ends soon, and with it all its memory: only where it goes on
    /// (`--watch`) is what they hold given back, piece by piece.
    pub(crate) fn let_go<T>(&self, rows: Vec<T>) {
        if !self.repeats {
            std::mem::forget(rows);
        }
    }

    /// For results that were printed by other means: what is to be said where the VM is gone by now, an error where
    /// what was read of it is not whole.
    pub(crate) fn finish(&self, doubtful: bool) -> Result<()> {
        self.tell(self.has_ended(), doubtful)
    }

    fn has_ended(&self) -> bool {
        self.target.has_exited()
    }

    fn tell(&self, ended: bool, doubtful: bool) -> Result<()> {
        if let Some(warning) = verdict(ended, doubtful)? {
            self.style.warn(warning);
        }
        Ok(())
    }

    /// How results are printed.
    pub(crate) fn style(&self) -> &Style {
        &self.style
    }

    /// The target itself.
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// What the target is called.
    pub(crate) fn name(&self) -> &str {
        &self.target.name
    }

    /// The kernel, where this session was opened with one.
    pub(crate) fn kernel(&self) -> Result<&Kernel> {
        self.kernel.as_ref().ok_or_else(|| {
            anyhow!("this command attached without looking for a kernel; this is a bug in vmsight")
        })
    }

    /// Guest-physical memory.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.target.memory
    }

    /// The vCPUs' registers, all or one's.
    pub(crate) fn registers(&self, vcpu: Option<u32>) -> Result<Vec<Registers>> {
        Ok(self.target.registers(vcpu)?)
    }

    /// The virtual address an expression names; of a per-CPU variable, the copy of `cpu`.
    pub(crate) fn gva(&self, place: &Place, cpu: Option<u32>) -> Result<Gva> {
        if place.physical {
            bail!("{place} is a physical address; this needs a virtual one");
        }
        let base = match &place.base {
            Base::Number(n) => match cpu {
                // What a `__percpu` pointer out of a structure holds.
                Some(cpu) => self.copy_of(Gva(*n), cpu)?,
                None => Gva(*n),
            },
            Base::Symbol(name) => self.symbol(name, cpu)?,
        };
        Ok(base.wrapping_add(place.offset))
    }

    /// The physical address an expression names.
    pub(crate) fn gpa(&self, place: &Place) -> Result<Gpa> {
        match &place.base {
            Base::Number(n) => Ok(Gpa(*n).wrapping_add(place.offset)),
            Base::Symbol(_) => bail!("a symbol has a virtual address; leave phys: out"),
        }
    }

    /// A symbol of the kernel, or of a module as `module:symbol`.
    fn symbol(&self, name: &str, cpu: Option<u32>) -> Result<Gva> {
        let kernel = self.kernel()?;
        let symbols = &kernel.profile().symbols;
        let found = symbol::named(symbols, name);
        let Some(first) = found.first() else {
            let at = self.module_symbol(name)?;
            return match cpu {
                Some(cpu) => self.copy_of(at, cpu),
                None => Ok(at),
            };
        };
        let addresses = || {
            found.iter().map(|s| match symbol::is_in_image(s) {
                true => format!("{:#x}", kernel.image().runtime(s.address)),
                false => format!("{:#x}", s.address),
            })
        };
        self.only_one(name, addresses().collect())?;
        let base = match symbol::is_in_image(first) {
            true => kernel.image().runtime(first.address),
            false => Gva(first.address),
        };
        match (symbol::PerCpuSymbols::of(symbols).has(first), cpu) {
            (true, Some(cpu)) => self.copy_of(base, cpu),
            (true, None) => bail!(
                "{name} is a per-CPU variable: say whose copy with --cpu N{}",
                self.cpus()
            ),
            (false, Some(_)) => bail!("{name} is no per-CPU variable; leave --cpu out"),
            (false, None) => Ok(base),
        }
    }

    /// A symbol of a module, as `module:symbol` or by its name alone.
    fn module_symbol(&self, text: &str) -> Result<Gva> {
        let (module, name) = match text.split_once(':') {
            Some((module, name)) => (Some(module), name),
            None => (None, text),
        };
        let found: Vec<_> = self
            .modules()?
            .iter()
            .filter(|s| s.name == name && module.is_none_or(|m| *s.module == *m))
            .collect();
        let Some(first) = found.first() else {
            if let Some(module) = module {
                bail!("module {module:?} has no symbol {name:?}, or is not loaded");
            }
            let hint = closest(name, self.kernel()?.profile().symbols.iter().map(|s| s.name));
            bail!("this kernel has no symbol {name:?}{hint}")
        };
        let mut addresses: Vec<_> = found
            .iter()
            .map(|s| format!("{:#x} in {}", s.address, s.module))
            .collect();
        addresses.dedup();
        self.only_one(text, addresses)?;
        Ok(first.address)
    }

    /// Says so where a name stands for several addresses; an error where the first cannot just be taken.
    fn only_one(&self, name: &str, addresses: Vec<String>) -> Result<()> {
        if addresses.len() < 2 {
            return Ok(());
        }
        let text = symbol::ambiguous(name, &addresses);
        if self.writing {
            bail!("{text}: give the address of the one that is meant");
        }
        let mut told = self.told.borrow_mut();
        if !told.iter().any(|t| t == name) {
            self.style.warn(&format!("{text}; the first is taken"));
            told.push(name.to_owned());
        }
        Ok(())
    }

    /// A CPU's copy of what lies at a per-CPU address.
    fn copy_of(&self, base: Gva, cpu: u32) -> Result<Gva> {
        let per_cpu = self
            .kernel()?
            .per_cpu()
            .context("reading where each CPU has its variables")?;
        per_cpu
            .copy(base, cpu)
            .with_context(|| format!("the guest has no CPU {cpu}{}", self.cpus()))
    }

    /// ` (0 to 3)`: the CPUs there are.
    fn cpus(&self) -> String {
        let cpus = || Some(self.kernel().ok()?.per_cpu().ok()?.cpus());
        match (cpus().and_then(|mut c| c.next()), cpus().and_then(Iterator::last)) {
            (Some(first), Some(last)) if first != last => format!(" ({first} to {last})"),
            (Some(only), _) => format!(" ({only})"),
            _ => String::new(),
        }
    }

    /// The modules' symbols, read once.
    pub(crate) fn modules(&self) -> Result<&[ModuleSymbol]> {
        if let Some(known) = self.modules.get() {
            return Ok(known);
        }
        let listing = self
            .kernel()?
            .module_symbols()
            .context("reading the modules' symbols")?;
        listing.warnings.iter().for_each(|w| self.style.warn(w));
        let mut symbols = listing.rows;
        symbols.sort_by_key(|s| s.address);
        Ok(self.modules.get_or_init(|| symbols))
    }

    /// `symbol+0x10` or `module:symbol+0x10`.
    pub(crate) fn name_of(&self, at: Gva) -> Option<String> {
        let kernel = self.kernel.as_ref()?;
        let (name, offset) = if kernel.image().contains(at) {
            let (symbol, offset) = kernel.profile().symbols.nearest(kernel.image().link_time(at))?;
            (symbol.name.to_owned(), offset)
        } else {
            let modules = self.modules().ok()?;
            let before = modules.partition_point(|s| s.address <= at).checked_sub(1)?;
            let symbol = modules.get(before)?;
            let offset = at.0.wrapping_sub(symbol.address.0);
            // Past the end of the module there is no telling what it is.
            if offset > symbol.size.max(1 << 16) {
                return None;
            }
            (format!("{}:{}", symbol.module, symbol.name), offset)
        };
        Some(if offset == 0 {
            name
        } else {
            format!("{name}+{offset:#x}")
        })
    }

    /// Where the symbol after this address begins.
    pub(crate) fn next_symbol(&self, at: Gva) -> Option<Gva> {
        let kernel = self.kernel.as_ref()?;
        if !kernel.image().contains(at) {
            let modules = self.modules().ok()?;
            return modules
                .get(modules.partition_point(|s| s.address <= at))
                .map(|s| s.address);
        }
        let linked = kernel.image().link_time(at);
        let next = kernel.profile().symbols.after(linked)?;
        Some(kernel.image().runtime(next.address))
    }

    /// The address space of a process.
    pub(crate) fn process_space(&self, pid: u32) -> Result<AddressSpace> {
        let pid = i32::try_from(pid).context("no pid is that large")?;
        let kernel = self.kernel()?;
        let space = kernel
            .process_space(pid)
            .with_context(|| format!("finding process {pid}"))?;
        space.with_context(|| format!("process {pid} has no user memory: it is a kernel thread or has ended"))
    }

    /// Reads as much from the beginning of a range as can be read; how much that is.
    pub(crate) fn read_up_to(&self, space: &AddressSpace, at: Gva, buf: &mut [u8]) -> Result<usize> {
        match space.read_partial(at, buf).into_iter().next() {
            None => Ok(0),
            Some((range, Ok(()))) => Ok(range.end),
            Some((_, Err(error))) => Err(error.into()),
        }
    }

    /// Results that scroll by are sign of life enough, and would be torn by a progress line.
    fn is_quiet(&self) -> bool {
        self.style.quiet || io::stdout().is_terminal()
    }

    /// All of physical memory in pieces, in order.
    pub(crate) fn each_physical_chunk(&self, visit: &mut dyn FnMut(Gpa, &[u8]) -> Result<()>) -> Result<()> {
        let memory = self.memory();
        let progress = Progress::bytes(self.is_quiet(), "searching memory", memory.size());
        let mut scratch = Vec::new();
        for chunk in memory.chunks(&ScanOptions::default()) {
            let bytes = memory
                .chunk_bytes(&chunk, &mut scratch)
                .with_context(|| format!("reading memory at {}", chunk.gpa))?;
            visit(chunk.gpa, bytes)?;
            progress.advance(bytes.len() as u64);
            memory.release(&chunk);
        }
        Ok(())
    }

    /// What a process has mapped, page by page where it can be read.
    pub(crate) fn each_process_chunk(
        &self,
        pid: u32,
        visit: &mut dyn FnMut(Gva, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let kernel = self.kernel()?;
        let space = self.process_space(pid)?;
        let listing = kernel
            .maps(i32::try_from(pid)?)
            .with_context(|| format!("reading the maps of process {pid}"))?;
        // The guest says what is mapped and its tables where: either may lie and make little memory look endless.
        let mut left = self.memory().size().saturating_mul(4);
        let mut page = [0; 0x1000];
        let mut absent = 0u64;
        let mapped = listing.rows.iter().map(|m| m.end.0.saturating_sub(m.start.0));
        let total = mapped.fold(0, u64::saturating_add);
        let progress = Progress::bytes(self.is_quiet(), "searching the process", total);
        for map in &listing.rows {
            let Some(last) = map.end.0.checked_sub(1).filter(|last| *last >= map.start.0) else {
                continue;
            };
            let mut missing = (last - map.start.page_start().0) / 0x1000 + 1;
            for leaf in space.mappings(map.start..=Gva(last), MAX_TABLES) {
                let leaf = leaf.with_context(|| format!("reading the memory of process {pid}"))?;
                let end = leaf
                    .gva
                    .0
                    .saturating_add(leaf.translation.page_size() - 1)
                    .min(last);
                let mut at = leaf.gva.max(map.start).page_start();
                while at.0 <= end {
                    if left == 0 {
                        bail!(
                            "process {pid} has more mapped than four times the guest's memory; that cannot be true"
                        );
                    }
                    left = left.saturating_sub(0x1000);
                    if space.read(at, &mut page).is_ok() {
                        missing = missing.saturating_sub(1);
                        visit(at, &page)?;
                    }
                    let Some(next) = at.checked_add(0x1000) else { break };
                    at = next;
                }
            }
            absent = absent.saturating_add(missing);
            progress.advance(map.end.0 - map.start.0);
        }
        drop(progress);
        if absent > 0 {
            self.style.warn(&format!(
                "{absent} mapped pages are not in memory (never touched, or in swap)"
            ));
        }
        Ok(())
    }
}

/// What is to be said where a VM has ended: a warning if all that was wanted of it had been read, else an error.
fn verdict(ended: bool, doubtful: bool) -> Result<Option<&'static str>> {
    match (ended, doubtful) {
        (false, _) => Ok(None),
        (true, false) => Ok(Some(
            "the VM ended while it was read; what is shown was whole by then",
        )),
        (true, true) => bail!("the VM ended while it was read: what is shown of it is not whole"),
    }
}

/// Page tables that are visited for one mapping: as many as 4 TiB need.
const MAX_TABLES: u64 = 1 << 21;

/// Proves a memory layout that was only deduced: a kernel's own page tables hold in it, and the kernel believes that
/// memory ends where this layout ends.
fn prove(global: &Global, memory: &GuestMemory) -> Result<(Kernel, String), String> {
    let find = |symbols| find_kernel(global, memory, Hints::default(), symbols);
    let kernel = find(None).or_else(|error| match global.symbols.as_deref() {
        Some(file) => find(Some(file)),
        None => Err(error),
    });
    let kernel = kernel.map_err(|e| format!("{e:#}"))?;
    let how = kernel.confirm_memory_end().map_err(|e| e.to_string())?;
    Ok((kernel, how))
}

/// Registers, for when nothing cheaper shows the kernel or `--thorough` wants them: a live VM pays for them.
fn hints(global: &Global, target: &Target) -> Hints {
    let target = target.clone();
    Hints {
        registers: Some(Box::new(move || {
            target.registers(None).unwrap_or_else(|error| {
                tracing::warn!("no registers, so what runs is told from memory alone: {error}");
                Vec::new()
            })
        })),
        thorough: global.thorough,
    }
}

/// Finds the kernel in memory and its profile: from a file, the cache, or the guest itself.
fn find_kernel(
    global: &Global,
    memory: &GuestMemory,
    hints: Hints,
    symbols: Option<&Path>,
) -> Result<Kernel> {
    let options = KernelOptions {
        hints,
        cache: cache(global),
        symbols: symbols.map(Path::to_owned),
    };
    let progress = Progress::spinner(global.quiet, "looking for the kernel");
    let kernel = Kernel::attach(memory.clone(), options);
    // Gone before anything else is said.
    drop(progress);
    Ok(kernel?)
}

/// Says what is not as it should be with a kernel that will be looked into, and, to who asks, how it was found.
fn announce(global: &Global, kernel: &Kernel) {
    if !global.quiet {
        kernel.profile().warnings.iter().for_each(|w| warn(w));
    }
    for line in &kernel.image().evidence {
        tracing::info!("{line}");
    }
    if let Some(found) = kernel.found() {
        tracing::info!(
            "of {} kernels found this one, for {}",
            found.candidates.len(),
            found.why
        );
        for line in &found.rejected {
            tracing::info!("not a kernel: {line}");
        }
    }
}

/// The profile cache; without one everything works, only slower, so that is said and no more.
fn cache(global: &Global) -> Cache {
    if global.no_cache {
        return Cache::disabled();
    }
    let opened = match &global.cache_dir {
        Some(dir) => Cache::open(dir),
        None => Cache::open_default(),
    };
    opened.unwrap_or_else(|error| {
        tracing::info!("{error}");
        Cache::disabled()
    })
}

/// `; did you mean …?` with the names most like one that is not there, or nothing.
pub(crate) fn closest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> String {
    let lower = name.to_lowercase();
    let mut scored: Vec<(usize, &str)> = names
        .filter_map(|candidate| {
            if candidate.len().abs_diff(name.len()) > 3 {
                return None;
            }
            let distance = edit_distance(&lower, &candidate.to_lowercase(), 3)?;
            Some((distance, candidate))
        })
        .collect();
    scored.sort_unstable();
    scored.dedup_by(|a, b| a.1 == b.1);
    let best: Vec<_> = scored.iter().take(3).map(|(_, n)| *n).collect();
    if best.is_empty() {
        String::new()
    } else {
        format!("; did you mean {}?", best.join(", "))
    }
}

/// Levenshtein distance, `None` above `limit`.
fn edit_distance(a: &str, b: &str, limit: usize) -> Option<usize> {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        let mut least = row[0];
        for (j, y) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
            least = least.min(row[j + 1]);
        }
        if least > limit {
            return None;
        }
    }
    row.last().copied().filter(|d| *d <= limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_ends_makes_doubtful_rows_an_error() {
        assert_eq!(verdict(false, true).unwrap(), None);
        assert!(verdict(true, false).unwrap().is_some());
        assert!(verdict(true, true).is_err());
    }

    #[test]
    fn hints_for_typing_errors() {
        assert_eq!(
            closest("task_strct", ["task_struct", "cred", "mm_struct"].into_iter()),
            "; did you mean task_struct?"
        );
        assert_eq!(closest("zzz", ["task_struct"].into_iter()), "");
        assert_eq!(edit_distance("kitten", "sitting", 3), Some(3));
        assert_eq!(edit_distance("kitten", "sitting", 2), None);
    }
}
