//! The least VMM: one vCPU, one slot of memory, and nothing that listens at any port.

use std::fs::File;
use std::io;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memmap2::MmapMut;

use crate::image::{BASE, CODE, GDT, Image, MEMORY, ROOT, STACK};

/// Why the guest could not be run.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// KVM said no.
    #[error("KVM: {doing}: {source}")]
    Kvm {
        /// What it was asked for.
        doing: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// The guest's memory.
    #[error("the guest's memory: {0}")]
    Memory(#[from] io::Error),
    /// Its code could not be made.
    #[error("the guest's code: {0}")]
    Code(#[from] iced_x86::IcedError),
    /// The guest did what it does not do.
    #[error("the guest left KVM unexpectedly: {0}")]
    Exit(String),
}

fn kvm(doing: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmmError {
    move |source| VmmError::Kvm { doing, source }
}

/// How the guest is privileged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// As a kernel is.
    Kernel,
    /// As a program is, but that it may use ports. A KVM without processors that virtualize runs programs as they are, and has to
    /// emulate what a kernel does. MSRs cannot be written then: [`Operation::Msr`](crate::Operation::Msr) ends the guest.
    Program,
}

/// Runs the guest in `memory`, which is made as large as it must be, and returns only when that fails. The guest begins in
/// 64-bit mode, as it does after its own first instructions: not every KVM runs code in real mode.
///
/// # Errors
/// Where there is no KVM, or it does not run the guest.
pub fn run(memory: &File, privilege: Privilege) -> Result<std::convert::Infallible, VmmError> {
    memory.set_len(MEMORY)?;
    let mut mapping = map(memory)?;
    let image = Image::assemble()?;
    let base = BASE as usize;
    mapping
        .get_mut(base..base + image.bytes.len())
        .ok_or_else(|| io::Error::other("smaller than it was made"))?
        .copy_from_slice(&image.bytes);
    let system = Kvm::new().map_err(kvm("open /dev/kvm"))?;
    let vm = system.create_vm().map_err(kvm("make a VM"))?;
    give(&vm, &mut mapping)?;
    let mut vcpu = vm.create_vcpu(0).map_err(kvm("make a vCPU"))?;
    set_up(&vcpu, privilege)?;
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(..) | VcpuExit::IoIn(..)) => {}
            Ok(other) => return Err(VmmError::Exit(format!("{other:?}"))),
            Err(error) if error.errno() == 4 => {}
            Err(error) => return Err(kvm("run the vCPU")(error)),
        }
    }
}

#[allow(unsafe_code)]
fn map(memory: &File) -> Result<MmapMut, VmmError> {
    // SAFETY: the file is the guest's memory and nothing else; what other processes and the guest write to it is never
    // looked at through a reference once the guest runs.
    Ok(unsafe { MmapMut::map_mut(memory) }?)
}

#[allow(unsafe_code)]
fn give(vm: &VmFd, mapping: &mut MmapMut) -> Result<(), VmmError> {
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: mapping.len() as u64,
        userspace_addr: mapping.as_mut_ptr() as u64,
    };
    // SAFETY: the mapping is as long as it is said to be, and outlives the VM: both end with `run`, it last.
    unsafe { vm.set_user_memory_region(region) }.map_err(kvm("give it memory"))
}

/// 64-bit mode with paging, at the guest's rounds.
fn set_up(vcpu: &VcpuFd, privilege: Privilege) -> Result<(), VmmError> {
    let level: u8 = match privilege {
        Privilege::Kernel => 0,
        Privilege::Program => 3,
    };
    let mut sregs = vcpu.get_sregs().map_err(kvm("read registers"))?;
    let segment = |selector: u16, type_: u8, l: u8, db: u8| kvm_segment {
        limit: u32::MAX,
        selector: selector | u16::from(level),
        type_,
        present: 1,
        dpl: level,
        db,
        s: 1,
        l,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = segment(0x18, 11, 1, 0);
    let data = segment(0x10, 3, 0, 1);
    (sregs.ss, sregs.ds, sregs.es) = (data, data, data);
    sregs.gdt = kvm_dtable {
        base: GDT,
        limit: 0x1f,
        ..kvm_dtable::default()
    };
    sregs.cr3 = ROOT;
    // PAE; then PG, ET, MP, PE, NE; then LMA and LME.
    sregs.cr4 = 0x20;
    sregs.cr0 = 0x8000_0033;
    sregs.efer = 0x500;
    vcpu.set_sregs(&sregs).map_err(kvm("set registers"))?;
    let regs = kvm_regs {
        rip: CODE,
        rsp: STACK,
        // IOPL, and the bit that is always set.
        rflags: u64::from(level) << 12 | 2,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&regs).map_err(kvm("set registers"))
}
