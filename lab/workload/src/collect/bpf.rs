//! What is loaded with bpf(2), by the kernel's own account.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;

use anyhow::Result;
use vmsight_workload::bpf::{Bpf, BpfLink, BpfMap, BpfProgram};

use crate::watch::{Words, bpf as call, owned};

// Of include/uapi/linux/bpf.h: next id and descriptor by id, of each kind.
const PROGRAM: (u64, u64) = (11, 13);
const MAP: (u64, u64) = (12, 14);
const LINK: (u64, u64) = (31, 30);
const OBJ_GET_INFO_BY_FD: u64 = 15;
/// Of programs, the longest: up to 6.x it has 232.
const INFO: usize = 256;
/// Maps and functions of one program that there is room for.
const MANY: usize = 64;
const RAW_TRACEPOINT: u32 = 1;
const CGROUP: u32 = 3;
const NETNS: u32 = 5;
const XDP: u32 = 6;

/// All programs, maps and links.
pub(super) fn bpf() -> Result<Bpf> {
    let mut out = Bpf::default();
    for id in ids(PROGRAM.0)? {
        out.programs.insert(id, program(id)?);
    }
    for id in ids(MAP.0)? {
        out.maps.insert(id, map(id)?);
    }
    for id in ids(LINK.0)? {
        out.links.insert(id, link(id)?);
    }
    Ok(out)
}

fn ids(next: u64) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    loop {
        let mut words = Words::default().four(0, ids.last().copied().unwrap_or(0));
        match call(next, &mut words, "the next id") {
            Ok(_) => ids.push((words.0[0] >> 32) as u32),
            Err(error) => match error.downcast_ref::<std::io::Error>() {
                Some(error) if error.kind() == ErrorKind::NotFound => return Ok(ids),
                _ => return Err(error),
            },
        }
    }
}

/// An information structure, by offsets of its members.
struct Info {
    bytes: [u8; INFO],
    /// What the kernel knows of.
    known: usize,
}

impl Info {
    /// Of the object that a command gives a descriptor of. `asked` has words of the structure that the kernel reads.
    fn of(by_id: u64, id: u32, asked: &[(usize, u64)]) -> Result<Info> {
        let mut words = Words::default().four(0, id);
        let fd = owned(call(by_id, &mut words, "a descriptor")?, "a descriptor")?;
        let mut info = Info {
            bytes: [0; INFO],
            known: 0,
        };
        for (at, value) in asked {
            info.bytes[*at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let mut words = Words::default()
            .four(0, fd.as_raw_fd() as u32)
            .four(4, INFO as u32)
            .eight(8, info.bytes.as_mut_ptr() as u64);
        call(OBJ_GET_INFO_BY_FD, &mut words, "information")?;
        info.known = (words.0[0] >> 32) as usize;
        Ok(info)
    }

    fn four(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap_or_default())
    }

    fn eight(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap_or_default())
    }

    fn name(&self, at: usize) -> String {
        text(&self.bytes[at..at + 16])
    }
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn program(id: u32) -> Result<BpfProgram> {
    let (mut maps, mut functions) = ([0u32; MANY], [0u64; MANY]);
    let asked = [
        (48, (MANY as u64) << 32),
        (56, maps.as_mut_ptr() as u64),
        (104, MANY as u64),
        (112, functions.as_mut_ptr() as u64),
    ];
    let info = Info::of(PROGRAM.1, id, &asked)?;
    let (map_count, function_count) = (info.four(52) as usize, info.four(104) as usize);
    Ok(BpfProgram {
        kind: info.four(0),
        tag: info.eight(8).to_le_bytes(),
        jited_size: info.four(16),
        size: info.four(20),
        load_time: info.eight(40),
        uid: info.four(48),
        name: info.name(64),
        maps: maps.into_iter().take(map_count).collect(),
        functions: functions.into_iter().take(function_count).collect(),
        verified: (info.known >= 220).then(|| info.four(216)),
    })
}

fn map(id: u32) -> Result<BpfMap> {
    let info = Info::of(MAP.1, id, &[])?;
    Ok(BpfMap {
        kind: info.four(0),
        key_size: info.four(8),
        value_size: info.four(12),
        max_entries: info.four(16),
        flags: info.four(20),
        name: info.name(24),
    })
}

fn link(id: u32) -> Result<BpfLink> {
    let mut name = [0u8; 128];
    let kind = Info::of(LINK.1, id, &[])?.four(0);
    let asked: &[(usize, u64)] = match kind {
        RAW_TRACEPOINT => &[(16, name.as_mut_ptr() as u64), (24, name.len() as u64)],
        _ => &[],
    };
    let info = Info::of(LINK.1, id, asked)?;
    Ok(BpfLink {
        kind,
        program: info.four(8),
        attach: match kind {
            CGROUP => Some(info.four(24)),
            NETNS => Some(info.four(20)),
            _ => None,
        },
        target: match kind {
            CGROUP => Some(info.eight(16)),
            NETNS | XDP => Some(u64::from(info.four(16))),
            _ => None,
        },
        tracepoint: (kind == RAW_TRACEPOINT).then(|| text(&name)),
    })
}
