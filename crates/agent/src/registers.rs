//! KVM's registers as ours.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vmsight_arch::{Gva, Registers, Segment, TableRegister};
use vmsight_hooks::Register;

fn segment(s: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u32| u16::from(value & 1) << at;
    Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        attributes: u16::from(s.type_ & 15)
            | bit(s.s, 4)
            | u16::from(s.dpl & 3) << 5
            | bit(s.present, 7)
            | bit(s.avl, 12)
            | bit(s.l, 13)
            | bit(s.db, 14)
            | bit(s.g, 15),
    }
}

fn table(t: &kvm_dtable) -> TableRegister {
    TableRegister {
        base: Gva(t.base),
        limit: t.limit,
    }
}

/// The registers of vCPU `vcpu`.
pub(crate) fn from_kvm(vcpu: u32, r: &kvm_regs, s: &kvm_sregs) -> Registers {
    Registers {
        vcpu,
        gprs: [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
            r.r14, r.r15,
        ],
        rip: r.rip,
        rflags: r.rflags,
        cs: segment(&s.cs),
        ss: segment(&s.ss),
        ds: segment(&s.ds),
        es: segment(&s.es),
        fs: segment(&s.fs),
        gs: segment(&s.gs),
        ldt: segment(&s.ldt),
        tr: segment(&s.tr),
        gdt: table(&s.gdt),
        idt: table(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        efer: s.efer,
        ..Registers::default()
    }
}

/// Changes one register.
pub(crate) fn set(r: &mut kvm_regs, register: Register, value: u64) {
    let place = match register {
        Register::Rip => &mut r.rip,
        Register::Rflags => &mut r.rflags,
        Register::Gpr(0) => &mut r.rax,
        Register::Gpr(1) => &mut r.rcx,
        Register::Gpr(2) => &mut r.rdx,
        Register::Gpr(3) => &mut r.rbx,
        Register::Gpr(4) => &mut r.rsp,
        Register::Gpr(5) => &mut r.rbp,
        Register::Gpr(6) => &mut r.rsi,
        Register::Gpr(7) => &mut r.rdi,
        Register::Gpr(8) => &mut r.r8,
        Register::Gpr(9) => &mut r.r9,
        Register::Gpr(10) => &mut r.r10,
        Register::Gpr(11) => &mut r.r11,
        Register::Gpr(12) => &mut r.r12,
        Register::Gpr(13) => &mut r.r13,
        Register::Gpr(14) => &mut r.r14,
        Register::Gpr(15) => &mut r.r15,
        Register::Gpr(_) => return,
    };
    *place = value;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_has_its_place() {
        for n in 0..16 {
            let mut regs = kvm_regs::default();
            set(&mut regs, Register::Gpr(n), 7);
            let ours = from_kvm(0, &regs, &kvm_sregs::default());
            assert_eq!(ours.gprs.iter().position(|v| *v == 7), Some(usize::from(n)));
        }
        let long = kvm_segment {
            type_: 11,
            s: 1,
            present: 1,
            l: 1,
            g: 1,
            ..kvm_segment::default()
        };
        assert_eq!(segment(&long).attributes, 0xa09b);
    }
}
