//! Instructions: as evidence, and where they lead.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Formatter, Instruction, OpKind};
use vmsight_arch::Gva;
use vmsight_linux::LinuxError;

use crate::{Context, Evidence, Owner, assembly};

/// The longest instruction.
const MAX_INSTRUCTION: usize = 15;

/// The first `count` instructions at `at`.
pub(crate) fn evidence(context: &Context, what: &str, at: Gva, count: usize) -> Evidence {
    let mut bytes = vec![0; count * MAX_INSTRUCTION];
    // What lies at the end of a page may be followed by nothing.
    while let Err(error) = context.space().read(at, &mut bytes) {
        if bytes.len() <= MAX_INSTRUCTION {
            return Evidence::value(format!("{what} at {at}"), error);
        }
        bytes.truncate(bytes.len() - MAX_INSTRUCTION);
    }
    let decoded: Vec<_> = Decoder::with_ip(64, &bytes, at.0, DecoderOptions::NONE)
        .into_iter()
        .take(count)
        .collect();
    let mut names = Vec::new();
    for address in decoded.iter().flat_map(assembly::addresses) {
        let owner = context.owner(Gva(address));
        let name = match owner {
            // Small negative numbers are offsets, and large ones are not always addresses.
            Owner::Null | Owner::User | Owner::Memory => continue,
            Owner::ModuleArea => owner.to_string(),
            _ => context.name(Gva(address)).unwrap_or_else(|| owner.to_string()),
        };
        names.push((address, name));
    }
    let mut formatter = assembly::formatter(names);
    formatter.options_mut().set_show_symbol_address(true);
    listed(what, at, decoded, formatter)
}

/// The instructions of `bytes`, which lie or lay at `at`, as evidence: at most 8.
pub(crate) fn of_bytes(what: &str, at: Gva, bytes: &[u8]) -> Evidence {
    listed(
        what,
        at,
        instructions(bytes, at).take(8),
        assembly::formatter(Vec::new()),
    )
}

fn listed(
    what: &str,
    at: Gva,
    instructions: impl IntoIterator<Item = Instruction>,
    mut formatter: impl Formatter,
) -> Evidence {
    let as_text = |instruction| {
        let mut text = String::new();
        formatter.format(&instruction, &mut text);
        text
    };
    Evidence::Code {
        what: what.to_owned(),
        at,
        instructions: instructions.into_iter().map(as_text).collect(),
    }
}

/// The longest function that is decoded: system calls' switches have some 12 KiB.
const MAX_FUNCTION: u64 = 64 << 10;

/// The bytes of the kernel's function that begins at `at`: up to the next symbol that is of code.
pub(crate) fn function(context: &Context, at: Gva) -> Result<Vec<u8>, LinuxError> {
    let kernel = context.kernel();
    let linked = kernel.image().link_time(at);
    let next = kernel.profile().symbols.after(linked);
    let length = next
        .map(|s| s.address.wrapping_sub(linked))
        .filter(|length| *length < MAX_FUNCTION)
        .unwrap_or(256);
    read(context, at, length as usize)
}

/// Bytes of code.
pub(crate) fn read(context: &Context, at: Gva, length: usize) -> Result<Vec<u8>, LinuxError> {
    let mut bytes = vec![0; length];
    let read = context.space().read(at, &mut bytes);
    read.map_err(|source| LinuxError::Read {
        what: "code".to_owned(),
        at,
        source,
    })?;
    Ok(bytes)
}

/// The instructions of `bytes`, which lie at `at`.
pub(crate) fn instructions(bytes: &[u8], at: Gva) -> impl Iterator<Item = Instruction> {
    Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE).into_iter()
}

/// Where a direct call or jump leads.
pub(crate) fn branch(instruction: &Instruction) -> Option<Gva> {
    let direct = matches!(
        instruction.flow_control(),
        FlowControl::Call | FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
    );
    (direct && instruction.op0_kind() == OpKind::NearBranch64).then(|| Gva(instruction.near_branch_target()))
}
