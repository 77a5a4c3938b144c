//! Writes kallsyms tables.

use std::collections::HashMap;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sym {
    pub address: u64,
    pub kind: u8,
    pub name: String,
}

pub fn sym(address: u64, kind: char, name: &str) -> Sym {
    Sym {
        address,
        kind: kind as u8,
        name: name.to_owned(),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addresses {
    Absolute,
    BaseRelative,
    AbsolutePercpu,
    PlaceRelative,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seqs {
    None,
    /// Behind the markers, so many bytes each (6.2, 6.3).
    Middle(usize),
    /// At the end, three bytes each (6.4 and later).
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub addresses: Addresses,
    /// Addresses behind the tokens (6.4), not before the count.
    pub late: bool,
    pub align: usize,
    pub seqs: Seqs,
}

/// Every layout that a kernel from 5.10 to 7.2 has had, and those that its options allow.
pub const LAYOUTS: [(&str, Layout); 9] = [
    ("5.10", layout(Addresses::AbsolutePercpu, false, 8, Seqs::None)),
    (
        "5.10 without percpu",
        layout(Addresses::BaseRelative, false, 8, Seqs::None),
    ),
    (
        "5.10 not relative",
        layout(Addresses::Absolute, false, 8, Seqs::None),
    ),
    (
        "6.2",
        layout(Addresses::AbsolutePercpu, false, 8, Seqs::Middle(3)),
    ),
    (
        "6.2-rc1",
        layout(Addresses::AbsolutePercpu, false, 8, Seqs::Middle(4)),
    ),
    ("6.4", layout(Addresses::AbsolutePercpu, true, 8, Seqs::End)),
    (
        "6.4 not relative",
        layout(Addresses::Absolute, true, 8, Seqs::End),
    ),
    ("6.15", layout(Addresses::BaseRelative, true, 8, Seqs::End)),
    ("7.2", layout(Addresses::PlaceRelative, true, 4, Seqs::End)),
];

const fn layout(addresses: Addresses, late: bool, align: usize, seqs: Seqs) -> Layout {
    Layout {
        addresses,
        late,
        align,
        seqs,
    }
}

/// Writes at the end of `out`, whose first byte the guest sees at `address`. Symbols must be sorted by address.
pub fn encode(out: &mut Vec<u8>, address: u64, symbols: &[Sym], layout: Layout) {
    let (tokens, codes) = tokens(symbols);
    let base = symbols
        .iter()
        .map(|s| s.address)
        .find(|&a| a >= 1 << 47)
        .unwrap_or(0);
    let pad = |out: &mut Vec<u8>| out.resize(out.len().next_multiple_of(layout.align), 0);
    let addresses = |out: &mut Vec<u8>| {
        pad(out);
        for s in symbols {
            let here = address + out.len() as u64;
            match layout.addresses {
                Addresses::Absolute => out.extend(s.address.to_le_bytes()),
                Addresses::BaseRelative => out.extend(((s.address - base) as u32).to_le_bytes()),
                Addresses::AbsolutePercpu if s.address < 1 << 31 => {
                    out.extend((s.address as u32).to_le_bytes())
                }
                Addresses::AbsolutePercpu => {
                    out.extend((base.wrapping_sub(s.address).wrapping_sub(1) as u32).to_le_bytes())
                }
                Addresses::PlaceRelative => out.extend((s.address.wrapping_sub(here) as u32).to_le_bytes()),
            }
        }
        pad(out);
        if matches!(
            layout.addresses,
            Addresses::BaseRelative | Addresses::AbsolutePercpu
        ) {
            out.extend(base.to_le_bytes());
        }
    };

    if !layout.late {
        addresses(out);
    }
    pad(out);
    out.extend((symbols.len() as u32).to_le_bytes());
    pad(out);

    let names = out.len();
    let mut markers = Vec::new();
    for (i, s) in symbols.iter().enumerate() {
        if i % 256 == 0 {
            markers.push((out.len() - names) as u32);
        }
        let text = [&[s.kind], s.name.as_bytes()].concat();
        let coded = compress(&text, &codes);
        if coded.len() > 0x7f {
            out.extend([(coded.len() & 0x7f) as u8 | 0x80, (coded.len() >> 7) as u8]);
        } else {
            out.push(coded.len() as u8);
        }
        out.extend(coded);
    }
    pad(out);
    markers.iter().for_each(|m| out.extend(m.to_le_bytes()));

    let seqs = |out: &mut Vec<u8>, each: usize| {
        pad(out);
        let mut order: Vec<usize> = (0..symbols.len()).collect();
        order.sort_by(|&a, &b| symbols[a].name.cmp(&symbols[b].name));
        for i in order {
            // Three bytes are big-endian, four are a .long.
            let bytes = if each == 3 {
                (i as u32).to_be_bytes()[1..].to_vec()
            } else {
                (i as u32).to_le_bytes().to_vec()
            };
            out.extend(bytes);
        }
    };
    if let Seqs::Middle(each) = layout.seqs {
        seqs(out, each);
    }
    pad(out);
    let mut index = Vec::new();
    let table = out.len();
    for token in &tokens {
        index.push((out.len() - table) as u16);
        out.extend(token.as_slice());
        out.push(0);
    }
    pad(out);
    index.iter().for_each(|i| out.extend(i.to_le_bytes()));
    if layout.late {
        addresses(out);
    }
    if layout.seqs == Seqs::End {
        seqs(out, 3);
    }
}

/// 256 tokens: each character that occurs stands for itself, the other places go to frequent strings of two to five.
fn tokens(symbols: &[Sym]) -> (Vec<Vec<u8>>, HashMap<Vec<u8>, u8>) {
    let texts: Vec<Vec<u8>> = symbols
        .iter()
        .map(|s| [&[s.kind], s.name.as_bytes()].concat())
        .collect();
    let mut tokens: Vec<Vec<u8>> = vec![Vec::new(); 256];
    for &b in texts.iter().flatten() {
        tokens[usize::from(b)] = vec![b];
    }
    let mut counts: HashMap<&[u8], usize> = HashMap::new();
    for text in &texts {
        for len in 2..=5 {
            text.windows(len)
                .for_each(|w| *counts.entry(w).or_default() += len);
        }
    }
    let mut best: Vec<(&[u8], usize)> = counts.into_iter().collect();
    best.sort_by_key(|&(w, n)| (std::cmp::Reverse(n), w));
    let mut best = best.into_iter().map(|(w, _)| w.to_vec());
    for token in tokens.iter_mut().filter(|t| t.is_empty()) {
        *token = best.next().unwrap_or_default();
    }
    let codes = tokens
        .iter()
        .enumerate()
        .filter(|(_, t)| !t.is_empty())
        .map(|(i, t)| (t.clone(), i as u8))
        .collect();
    (tokens, codes)
}

fn compress(text: &[u8], codes: &HashMap<Vec<u8>, u8>) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < text.len() {
        let len = (1..=5.min(text.len() - at))
            .rev()
            .find(|&len| codes.contains_key(&text[at..at + len]))
            .unwrap();
        out.push(codes[&text[at..at + len]]);
        at += len;
    }
    out
}

/// Symbols such as a kernel has: per-CPU offsets, `_text` at `text`, then functions and data up to `end`.
pub fn kernel_symbols(text: u64, end: u64, count: usize, percpu: bool) -> Vec<Sym> {
    let mut all = Vec::new();
    if percpu {
        all.extend([
            sym(0, 'A', "__per_cpu_start"),
            sym(0x1fbc0, 'A', "current_task"),
            sym(0x30000, 'A', "this_cpu_off"),
        ]);
    }
    all.extend([
        sym(text, 'T', "_stext"),
        sym(text, 'T', "_text"),
        sym(text, 'T', "startup_64"),
    ]);
    let step = (end - text) / (count as u64 + 2);
    for i in 0..count as u64 {
        // Digits and letters as in real names; some names twice, one longer than 127 tokens.
        let name = match i % 7 {
            0 => format!("__pfx_sys_call{i}"),
            1 => format!("tcp_v{}_rcv_{i:x}", i % 10),
            2 => "dup.constprop.0".to_owned(),
            3 => format!("Bq9JkzXw7Y{:08}", i * 7919),
            4 => format!("cgroup_subsys_{i}_write"),
            5 if i == 5 => (0..190)
                .map(|k| char::from(b'a' + ((k * k + 3 * k) % 26) as u8))
                .collect(),
            _ => format!("x86_{i:o}"),
        };
        all.push(Sym {
            address: text + (i + 1) * step,
            kind: b"tTdDbBrR"[i as usize % 8],
            name,
        });
    }
    all.push(sym(end, 'B', "_end"));
    all
}
