//! Instructions that store 32 bits: as much of the encoding as stores to a device's registers are compiled to.

use crate::bytes::u32_at;

/// What is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The low half of the general register of this number.
    Register(u8),
    /// This value.
    Value(u32),
}

/// A store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Store {
    /// What is stored.
    pub source: Source,
    /// Bytes of the instruction.
    pub length: u64,
}

/// Reads one in 64-bit code: MOV of a register or a constant. `None` for all else. Where it stores to is not asked: who
/// was stopped by it knows.
pub fn decode(bytes: &[u8]) -> Option<Store> {
    let (prefix, at) = match *bytes.first()? {
        rex @ 0x40..=0x47 => (rex, 1),
        _ => (0x40, 0),
    };
    let opcode = *bytes.get(at)?;
    if opcode == 0xa3 && at == 0 {
        // To an address of 64 bits that follows.
        return Some(Store {
            source: Source::Register(0),
            length: 9,
        });
    }
    let modrm = *bytes.get(at + 1)?;
    let register = modrm >> 3 & 7 | (prefix & 4) << 1;
    let end = at + 2 + displacement(modrm, bytes.get(at + 2).copied())?;
    match opcode {
        0x89 => Some(Store {
            source: Source::Register(register),
            length: end as u64,
        }),
        0xc7 if modrm >> 3 & 7 == 0 => Some(Store {
            source: Source::Value(u32_at(bytes, end)?),
            length: end as u64 + 4,
        }),
        _ => None,
    }
}

/// Bytes of the address after the ModRM byte. `next` is the one after it.
fn displacement(modrm: u8, next: Option<u8>) -> Option<usize> {
    let scaled = modrm & 7 == 4;
    let base = if scaled { next? & 7 } else { modrm & 7 };
    let sib = usize::from(scaled);
    match modrm >> 6 {
        0 if base == 5 => Some(sib + 4),
        0 => Some(sib),
        1 => Some(sib + 1),
        2 => Some(sib + 4),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Code, Decoder, DecoderOptions, OpKind};

    use super::*;

    /// All that begins with a possible prefix, opcode, ModRM and SIB, against a decoder of all instructions.
    #[test]
    fn it_is_what_a_whole_decoder_says() {
        let mut found = 0;
        for (rex, opcode) in [None, Some(0x40), Some(0x44), Some(0x45), Some(0x48), Some(0x66)]
            .into_iter()
            .flat_map(|rex| [0x87, 0x89, 0x8b, 0xa3, 0xc7].map(|opcode| (rex, opcode)))
        {
            for (modrm, sib) in (0..=255u8).flat_map(|m| [0x25u8, 0x18, 0x9d].map(|s| (m, s))) {
                let mut bytes: std::vec::Vec<u8> = rex.into_iter().chain([opcode, modrm, sib]).collect();
                bytes.extend([0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa]);
                let instruction = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE).decode();
                let memory = instruction.op0_kind() == OpKind::Memory;
                let source = match instruction.code() {
                    Code::Mov_rm32_r32 if memory => {
                        Some(Source::Register(instruction.op1_register().number() as u8))
                    }
                    Code::Mov_moffs32_EAX if rex.is_none() => Some(Source::Register(0)),
                    Code::Mov_rm32_imm32 if memory => Some(Source::Value(instruction.immediate32())),
                    _ => None,
                };
                let length = instruction.len() as u64;
                let expected = source.map(|source| Store { source, length });
                assert_eq!(decode(&bytes), expected, "{bytes:02x?}: {instruction}");
                found += u32::from(expected.is_some());
                for cut in 0..length as usize {
                    assert!(decode(&bytes[..cut]).is_none_or(|s| s.length > cut as u64));
                }
            }
        }
        assert!(found > 2000, "only {found} stores");
    }
}
