//! What is loaded with bpf(2), as `BPF_OBJ_GET_INFO_BY_FD` tells of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// All of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Bpf {
    /// Programs by id.
    pub programs: BTreeMap<u32, BpfProgram>,
    /// Maps by id.
    pub maps: BTreeMap<u32, BpfMap>,
    /// Links by id.
    pub links: BTreeMap<u32, BpfLink>,
}

/// `struct bpf_prog_info`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct BpfProgram {
    /// `BPF_PROG_TYPE_*`.
    pub kind: u32,
    /// Digest of its instructions.
    pub tag: [u8; 8],
    /// Name.
    pub name: String,
    /// Bytes of machine code.
    pub jited_size: u32,
    /// Bytes of instructions.
    pub size: u32,
    /// When it was loaded, nanoseconds since boot.
    pub load_time: u64,
    /// Who loaded it.
    pub uid: u32,
    /// The maps that it uses.
    pub maps: Vec<u32>,
    /// Where the machine code of each of its functions begins.
    pub functions: Vec<u64>,
    /// Instructions that the verifier went through, since 5.16.
    pub verified: Option<u32>,
}

/// `struct bpf_map_info`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct BpfMap {
    /// `BPF_MAP_TYPE_*`.
    pub kind: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Entries that there may be.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
    /// Name.
    pub name: String,
}

/// `struct bpf_link_info`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct BpfLink {
    /// `BPF_LINK_TYPE_*`.
    pub kind: u32,
    /// Id of its program.
    pub program: u32,
    /// Attached as (`enum bpf_attach_type`), where that is told: of control groups and namespaces.
    pub attach: Option<u32>,
    /// Number of what it is attached to: a control group's id, the inode of a network namespace, the index of an interface.
    pub target: Option<u64>,
    /// The tracepoint that it is attached to.
    pub tracepoint: Option<String>,
}
