//! ELF notes that hold what the vCPUs held: QEMU's, VirtualBox's, the kernel's.
//!
//! Sources: QEMU `target/i386/arch_dump.c` (QEMUCPUState, x86_64_elf_prstatus), VirtualBox `include/VBox/vmm/dbgfcorefmt.h`
//! (DBGFCORECPU), Linux `kernel/vmcore_info.c` (VMCOREINFO).

use super::bytes::{slice, u16_at, u32_at, u64_at};
use vmsight_arch::Gva;
use vmsight_arch::registers::control;
use vmsight_arch::{Registers, Segment, TableRegister};

/// vCPUs kept at most.
const MAX_VCPUS: usize = 4096;
/// Bytes of VMCOREINFO kept at most; a kernel's has 1 to 4 KiB.
const MAX_VMCOREINFO: u64 = 64 << 10;

const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;

const NT_PRSTATUS: u32 = 1;
const NT_VBOXCORE: u32 = 0xb00;
const NT_VBOXCPU: u32 = 0xb01;
/// First field of VirtualBox's core descriptor.
const VBOX_MAGIC: u32 = 0xc01a_c0de;

/// QEMUCPUState up to CR4; later versions of QEMU have kernel_gs_base behind it and say so in the size only.
const QEMU_STATE_LEN: u64 = 432;

/// What the notes of a file say.
#[derive(Debug)]
pub(super) struct Notes {
    machine: u16,
    qemu: Vec<Registers>,
    prstatus: Vec<Registers>,
    vbox: Vec<Registers>,
    vbox_version: Option<u32>,
    vbox_unknown: bool,
    pub(super) vmcoreinfo: Option<String>,
}

impl Notes {
    pub(super) fn new(machine: u16) -> Self {
        Self {
            machine,
            qemu: Vec::new(),
            prstatus: Vec::new(),
            vbox: Vec::new(),
            vbox_version: None,
            vbox_unknown: false,
            vmcoreinfo: None,
        }
    }

    pub(super) fn is_virtualbox(&self) -> bool {
        self.vbox_version.is_some()
    }

    /// The registers of the vCPUs in order, from the note that says most.
    pub(super) fn registers(self, remarks: &mut Vec<String>) -> Vec<Registers> {
        if self.vbox_unknown {
            remarks.push("the registers are in a VirtualBox format that is not known: left out".to_owned());
        }
        let mut registers = if !self.vbox.is_empty() {
            self.vbox
        } else if !self.qemu.is_empty() {
            self.qemu
        } else {
            if !self.prstatus.is_empty() {
                remarks.push("the file has no control registers, only general-purpose ones".to_owned());
            }
            self.prstatus
        };
        for (index, vcpu) in registers.iter_mut().enumerate() {
            vcpu.vcpu = u32::try_from(index).unwrap_or(u32::MAX);
        }
        registers
    }
}

/// Reads one PT_NOTE segment.
pub(super) fn parse(bytes: &[u8], notes: &mut Notes, remarks: &mut Vec<String>) {
    let len = bytes.len() as u64;
    let mut at = 0u64;
    // Each note takes at least its 12 bytes of header, so this ends.
    while at < len {
        let header = (u32_at(bytes, at), u32_at(bytes, at + 4), u32_at(bytes, at + 8));
        let (Some(name_len), Some(body_len), Some(kind)) = header else {
            return;
        };
        let name_at = at + 12;
        // Sizes are rounded up to 4 bytes by all these writers, p_align notwithstanding; 32-bit numbers cannot overflow.
        let body_at = name_at + u64::from(name_len).next_multiple_of(4);
        let next = body_at + u64::from(body_len).next_multiple_of(4);
        let name = slice(bytes, name_at, name_len.into());
        let body = slice(bytes, body_at, body_len.into());
        if (body.len() as u64) < u64::from(body_len) {
            remarks.push("the last ELF note is cut".to_owned());
            return;
        }
        // Some count the final NUL, some do not.
        one(name.strip_suffix(b"\0").unwrap_or(name), kind, body, notes);
        at = next;
    }
}

fn one(name: &[u8], kind: u32, body: &[u8], notes: &mut Notes) {
    let x86 = matches!(notes.machine, EM_386 | EM_X86_64);
    match (name, kind) {
        (b"QEMU", 0) if x86 => keep(&mut notes.qemu, qemu(body, notes.machine == EM_X86_64)),
        (b"CORE", NT_PRSTATUS) if notes.machine == EM_X86_64 => keep(&mut notes.prstatus, prstatus_64(body)),
        (b"CORE", NT_PRSTATUS) if notes.machine == EM_386 => keep(&mut notes.prstatus, prstatus_32(body)),
        (b"VBCORE", NT_VBOXCORE) if u32_at(body, 0) == Some(VBOX_MAGIC) => {
            notes.vbox_version = u32_at(body, 4)
        }
        (b"VBCPU", NT_VBOXCPU) => match virtualbox(body, notes.vbox_version) {
            Some(registers) => keep(&mut notes.vbox, Some(registers)),
            None => notes.vbox_unknown = true,
        },
        (b"VMCOREINFO", 0) if notes.vmcoreinfo.is_none() => {
            let text = slice(body, 0, MAX_VMCOREINFO);
            let text = text.split(|&b| b == 0).next().unwrap_or_default();
            notes.vmcoreinfo = Some(String::from_utf8_lossy(text).into_owned());
        }
        _ => {}
    }
}

fn keep(list: &mut Vec<Registers>, registers: Option<Registers>) {
    if let Some(registers) = registers.filter(|_| list.len() < MAX_VCPUS) {
        list.push(registers);
    }
}

/// QEMUCPUState, version 1.
fn qemu(body: &[u8], long_mode: bool) -> Option<Registers> {
    let (version, size) = (u32_at(body, 0)?, u64::from(u32_at(body, 4)?));
    if version != 1 || size < QEMU_STATE_LEN || (body.len() as u64) < QEMU_STATE_LEN {
        return None;
    }
    let word = |index: u64| u64_at(body, 8 + index * 8);
    // rax rbx rcx rdx rsi rdi rsp rbp r8…r15 in the file.
    let [rax, rbx, rcx, rdx] = [word(0)?, word(1)?, word(2)?, word(3)?];
    let [rsi, rdi, rsp, rbp] = [word(4)?, word(5)?, word(6)?, word(7)?];
    let mut gprs = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, 0, 0, 0, 0, 0, 0, 0, 0];
    for (index, gpr) in gprs.iter_mut().enumerate().skip(8) {
        *gpr = word(index as u64)?;
    }
    let segment = |index: u64| {
        let at = 152 + index * 24;
        Some(Segment {
            selector: u32_at(body, at)? as u16,
            limit: u32_at(body, at + 4)?,
            // The descriptor's second word: type and flags in bits 8 to 23, bits of the limit in between.
            attributes: (u32_at(body, at + 8)? >> 8) as u16 & 0xf0ff,
            base: u64_at(body, at + 16)?,
        })
    };
    let table = |index| {
        let segment: Segment = segment(index)?;
        Some(TableRegister {
            base: Gva(segment.base),
            limit: segment.limit as u16,
        })
    };
    let (cr0, cr4) = (u64_at(body, 392)?, u64_at(body, 424)?);
    Some(Registers {
        gprs,
        rip: word(16)?,
        rflags: word(17)?,
        cs: segment(0)?,
        ds: segment(1)?,
        es: segment(2)?,
        fs: segment(3)?,
        gs: segment(4)?,
        ss: segment(5)?,
        ldt: segment(6)?,
        tr: segment(7)?,
        gdt: table(8)?,
        idt: table(9)?,
        cr0,
        cr2: u64_at(body, 408)?,
        cr3: u64_at(body, 416)?,
        cr4,
        efer: derived_efer(cr0, cr4, long_mode),
        kernel_gs_base: u64_at(body, QEMU_STATE_LEN).filter(|_| size >= QEMU_STATE_LEN + 8),
        ..Registers::default()
    })
}

/// QEMU's note lacks EFER. It makes a 64-bit x86-64 core where the first vCPU is in long mode, and a vCPU with paging and
/// PAE on is then in long mode too; other bits of EFER are not known and stay 0.
fn derived_efer(cr0: u64, cr4: u64, long_mode: bool) -> u64 {
    if long_mode && cr0 & control::CR0_PG != 0 && cr4 & control::CR4_PAE != 0 {
        control::EFER_LMA | control::EFER_LME
    } else {
        0
    }
}

/// elf_prstatus of x86-64: user_regs_struct from byte 112.
fn prstatus_64(body: &[u8]) -> Option<Registers> {
    let word = |index: u64| u64_at(body, 112 + index * 8);
    let selector = |index| {
        Some(Segment {
            selector: word(index)? as u16,
            ..Segment::default()
        })
    };
    // r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds es fs gs
    let order = [10, 11, 12, 5, 19, 4, 13, 14, 9, 8, 7, 6, 3, 2, 1, 0];
    let mut gprs = [0; 16];
    for (gpr, index) in gprs.iter_mut().zip(order) {
        *gpr = word(index)?;
    }
    Some(Registers {
        gprs,
        rip: word(16)?,
        rflags: word(18)?,
        cs: selector(17)?,
        ss: selector(20)?,
        ds: selector(23)?,
        es: selector(24)?,
        fs: Segment {
            base: word(21)?,
            ..selector(25)?
        },
        gs: Segment {
            base: word(22)?,
            ..selector(26)?
        },
        ..Registers::default()
    })
}

/// elf_prstatus of i386: user_regs_struct from byte 72.
fn prstatus_32(body: &[u8]) -> Option<Registers> {
    let word = |index: u64| u32_at(body, 72 + index * 4).map(u64::from);
    let selector = |index| {
        Some(Segment {
            selector: word(index)? as u16,
            ..Segment::default()
        })
    };
    // ebx ecx edx esi edi ebp eax ds es fs gs orig_eax eip cs eflags esp ss
    let mut gprs = [0; 16];
    for (gpr, index) in gprs.iter_mut().zip([6, 1, 2, 0, 15, 5, 3, 4]) {
        *gpr = word(index)?;
    }
    Some(Registers {
        gprs,
        rip: word(12)?,
        rflags: word(14)?,
        cs: selector(13)?,
        ss: selector(16)?,
        ds: selector(7)?,
        es: selector(8)?,
        fs: selector(9)?,
        gs: selector(10)?,
        ..Registers::default()
    })
}

/// DBGFCORECPU. Format 1.0 held the hypervisor's inner structure instead (VirtualBox before 4.3) and is not read; in 1.4 to
/// 1.6 the part read here is the same. Another format counts only if its numbers can be those of a vCPU.
fn virtualbox(body: &[u8], version: Option<u32>) -> Option<Registers> {
    if version? >> 16 != 1 || version? & 0xffff == 0 {
        return None;
    }
    let word = |at| u64_at(body, at);
    let segment = |at| {
        Some(Segment {
            base: u64_at(body, at)?,
            limit: u32_at(body, at + 8)?,
            attributes: u32_at(body, at + 12)? as u16 & 0xf0ff,
            selector: u16_at(body, at + 16)?,
        })
    };
    let table = |at| {
        Some(TableRegister {
            base: Gva(u64_at(body, at)?),
            limit: u32_at(body, at + 8)? as u16,
        })
    };
    // rax rbx rcx rdx rsi rdi r8…r15 rip rsp rbp rflags in the file.
    let [rax, rbx, rcx, rdx] = [word(0)?, word(8)?, word(16)?, word(24)?];
    let [rsi, rdi, rsp, rbp] = [word(32)?, word(40)?, word(120)?, word(128)?];
    let mut gprs = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, 0, 0, 0, 0, 0, 0, 0, 0];
    for (gpr, index) in gprs.iter_mut().skip(8).zip(0..) {
        *gpr = word(48 + index * 8)?;
    }
    let registers = Registers {
        gprs,
        rip: word(112)?,
        rflags: word(136)?,
        cs: segment(144)?,
        ds: segment(168)?,
        es: segment(192)?,
        fs: segment(216)?,
        gs: segment(240)?,
        ss: segment(264)?,
        cr0: word(288)?,
        cr2: word(296)?,
        cr3: word(304)?,
        cr4: word(312)?,
        gdt: table(384)?,
        idt: table(400)?,
        ldt: segment(416)?,
        tr: segment(440)?,
        sysenter_cs: Some(word(464)?),
        sysenter_eip: Some(word(472)?),
        sysenter_esp: Some(word(480)?),
        efer: word(488)?,
        star: Some(word(496)?),
        lstar: Some(word(512)?),
        cstar: Some(word(520)?),
        sfmask: Some(word(528)?),
        kernel_gs_base: Some(word(536)?),
        ..Registers::default()
    };
    // CR0's upper half is reserved, bit 1 of RFLAGS is always set, EFER has no bits above 21.
    let plausible = registers.cr0 >> 32 == 0 && registers.rflags & 2 != 0 && registers.efer >> 22 == 0;
    plausible.then_some(registers)
}
