//! The symbol table: too long for a serial line, so counted, hashed and sampled.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use vmsight_workload::{Kallsyms, ModuleSymbols, Symbol};

use super::files;

/// Sampled beside the evenly spread ones: what readers of kernel memory start from.
const KNOWN: [&str; 32] = [
    "_stext",
    "_text",
    "_etext",
    "_end",
    "__start_BTF",
    "__stop_BTF",
    "__start_rodata",
    "__end_rodata",
    "__per_cpu_offset",
    "__per_cpu_start",
    "current_task",
    "entry_SYSCALL_64",
    "idt_table",
    "init_net",
    "init_nsproxy",
    "init_pid_ns",
    "init_task",
    "init_top_pgt",
    "init_user_ns",
    "init_uts_ns",
    "jiffies_64",
    "linux_banner",
    "modules",
    "net_namespace_list",
    "page_offset_base",
    "pcpu_hot",
    "phys_base",
    "prb",
    "sys_call_table",
    "tcp_hashinfo",
    "vmalloc_base",
    "vmemmap_base",
];
const SPREAD: usize = 300;

pub(super) fn kallsyms() -> Result<Kallsyms> {
    let raw = files::bytes("/proc/kallsyms")?;
    digest(&raw)
}

fn digest(raw: &[u8]) -> Result<Kallsyms> {
    let mut core = Vec::new();
    let mut modules: BTreeMap<String, Vec<Vec<u8>>> = BTreeMap::new();
    for line in raw.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
        match line.iter().position(|b| *b == b'\t') {
            None => core.push(line),
            Some(tab) => {
                let module = String::from_utf8_lossy(&line[tab + 1..]);
                let module = module.trim_matches(['[', ']']).to_owned();
                // `address type name`: the type is the one byte after the first blank.
                let mut line = line[..tab].to_vec();
                if let Some(blank) = line.iter().position(|b| *b == b' ')
                    && let Some(kind) = line.get_mut(blank + 1)
                {
                    kind.make_ascii_lowercase();
                }
                modules.entry(module).or_default().push(line);
            }
        }
    }
    let mut samples = BTreeSet::new();
    let step = core.len().div_ceil(SPREAD).max(1);
    for (at, line) in core.iter().enumerate() {
        let name = line.rsplit(|b| *b == b' ').next().unwrap_or_default();
        if at % step == 0 || KNOWN.iter().any(|known| known.as_bytes() == name) {
            samples.insert(symbol(line).with_context(|| format!("'{}'", String::from_utf8_lossy(line)))?);
        }
    }
    Ok(Kallsyms {
        count: core.len() as u64,
        sha256: hash(&mut core),
        modules: modules
            .into_iter()
            .map(|(name, mut lines)| {
                (
                    name,
                    ModuleSymbols {
                        count: lines.len() as u64,
                        sha256: hash(&mut lines),
                    },
                )
            })
            .collect(),
        samples: samples.into_iter().collect(),
    })
}

fn hash<T: AsRef<[u8]> + Ord>(lines: &mut [T]) -> String {
    lines.sort_unstable();
    let mut hasher = Sha256::new();
    for line in lines {
        hasher.update(line.as_ref());
        hasher.update(b"\n");
    }
    hasher.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

fn symbol(line: &[u8]) -> Option<Symbol> {
    let text = std::str::from_utf8(line).ok()?;
    let mut words = text.splitn(3, ' ');
    Some(Symbol {
        address: u64::from_str_radix(words.next()?, 16).ok()?,
        kind: words.next()?.chars().next()?,
        name: words.next()?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_and_the_kernel_are_counted_apart_whatever_the_order() {
        let one = digest(b"ffffffff81000000 T _text\nffffffffc0000000 t f\t[loop]\nffffffff81000010 T g\n")
            .unwrap();
        let two = digest(b"ffffffff81000010 T g\nffffffff81000000 T _text\nffffffffc0000000 t f\t[loop]\n")
            .unwrap();
        assert_eq!((one.count, one.modules["loop"].count), (2, 1));
        assert_eq!(one.sha256, two.sha256);
        assert_eq!(
            one.samples[0],
            Symbol {
                address: 0xffff_ffff_8100_0000,
                kind: 'T',
                name: "_text".into()
            }
        );
        let other = digest(b"ffffffff81000011 T g\nffffffff81000000 T _text\n").unwrap();
        assert_ne!(one.sha256, other.sha256);
        let exported = digest(b"ffffffffc0000000 T f\t[loop]\n").unwrap();
        assert_eq!(exported.modules["loop"], one.modules["loop"]);
        let elsewhere = digest(b"ffffffffc0000001 t f\t[loop]\n").unwrap();
        assert_ne!(elsewhere.modules["loop"], one.modules["loop"]);
    }
}
