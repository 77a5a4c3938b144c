//! One vCPU: its page of `struct kvm_run`, the thread that runs it, and what is between it and its hooks.

use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU32, Ordering};

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MMIO, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR, KVM_INTERNAL_ERROR_EMULATION, KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, kvm_regs,
    kvm_run, kvm_sregs, kvm_vcpu_events,
};
use vmsight_arch::Registers;
use vmsight_channel::{Producer, Spin};

use crate::debug::Applied;
use crate::instruction::Decoded;
use crate::pending::{Pending, Stepping};
use crate::{kvm, signal};

/// Why the guest stopped, as far as it concerns hooks. Copied out of the page once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Exit {
    Debug {
        exception: u32,
        dr6: u64,
    },
    Mmio {
        gpa: u64,
        data: u64,
        len: u8,
        write: bool,
    },
    ReadMsr {
        index: u32,
        reason: u32,
    },
    WriteMsr {
        index: u32,
        data: u64,
        reason: u32,
    },
    Io {
        out: bool,
        size: u8,
        port: u16,
        count: u32,
        offset: u64,
    },
    /// KVM's own emulator met an instruction that it does not know.
    Unknown,
    Other,
}

/// What only the vCPU's own thread touches.
#[derive(Debug, Default)]
pub(crate) struct Own {
    /// An event that is being told, or waits for its verdict.
    pub(crate) pending: Option<Box<Pending>>,
    /// A breakpoint that must still be stepped over, at this address.
    pub(crate) over: Option<u64>,
    /// A hardware breakpoint that is being stepped over, with all of them off for this vCPU.
    pub(crate) past: Option<u64>,
    /// Steps that are counted.
    pub(crate) stepping: Option<Stepping>,
    /// The instruction that is being stepped, and the registers before it.
    pub(crate) stepped: Option<(Registers, Option<Decoded>)>,
    /// What KVM was told last.
    pub(crate) debug: Applied,
    /// Its ends of the rings, by the number of the monitor.
    pub(crate) rings: Vec<(u64, Producer)>,
    pub(crate) spin: Spin,
    /// The last step hook that was begun.
    pub(crate) last_step: u32,
    /// Whether the registers in the vCPU's page are its registers: since the last exit nobody else can have changed them.
    pub(crate) known: bool,
    /// Whether some of them were changed there, to be taken by KVM with the next entry.
    pub(crate) staged: bool,
    /// What KVM was asked to put into the page with each exit (KVM_SYNC_X86_*), beyond what the VMM asked for.
    pub(crate) synced: u64,
    /// Whether KVM was seen to emulate the guest's code: its emulator knows no INT3 and leaves an exception instead, and it does not
    /// look at RFLAGS.RF.
    pub(crate) emulated: bool,
}

/// A vCPU. It lives as long as the process.
#[derive(Debug)]
pub(crate) struct Vcpu {
    /// Its number, in the order in which the VMM made them.
    pub(crate) index: u32,
    pub(crate) fd: RawFd,
    run: NonNull<kvm_run>,
    run_size: usize,
    thread: AtomicI32,
    /// 1 while its thread is, or is about to be, in KVM_RUN.
    pub(crate) inside: AtomicU32,
    kicked: AtomicBool,
    /// Whether the VMM debugs the guest (a gdb of its own).
    pub(crate) vmm_debug: AtomicBool,
    pub(crate) own: Mutex<Own>,
}

// SAFETY: the page behind `run` is shared memory that is accessed through volatile copies and atomics; what is in it is
// believed no more than the kernel's word is.
unsafe impl Send for Vcpu {}
// SAFETY: as above.
unsafe impl Sync for Vcpu {}

impl Vcpu {
    /// The vCPU with this descriptor; `None` where its page cannot be mapped.
    pub(crate) fn new(index: u32, fd: RawFd, run_size: usize) -> Option<Self> {
        if run_size < size_of::<kvm_run>() {
            return None;
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page = unsafe { libc::mmap(ptr::null_mut(), run_size, protection, libc::MAP_SHARED, fd, 0) };
        if page == libc::MAP_FAILED {
            return None;
        }
        Some(Self {
            index,
            fd,
            run: NonNull::new(page.cast())?,
            run_size,
            thread: AtomicI32::new(0),
            inside: AtomicU32::new(0),
            kicked: AtomicBool::new(false),
            vmm_debug: AtomicBool::new(false),
            own: Mutex::default(),
        })
    }

    /// Said by the vCPU's own thread, once.
    pub(crate) fn is_run_by(&self, thread: i32) {
        if self.thread.swap(thread, Ordering::Relaxed) != thread {
            signal::let_through();
        }
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the mapping lives as long as the process; this byte is set by signal handlers and other threads, and read by
        // the kernel.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.run.as_ptr()).immediate_exit) }
    }

    /// Makes KVM_RUN return, now or as soon as it begins.
    pub(crate) fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::Relaxed);
        if thread != 0 {
            signal::send(thread);
        }
    }

    /// Whether its thread should go back to the VMM.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.immediate_exit().load(Ordering::SeqCst) != 0
    }

    /// Said on the way back to the VMM with EINTR: what our own kick left is taken away.
    pub(crate) fn settle(&self) {
        if self.kicked.swap(false, Ordering::SeqCst) {
            self.immediate_exit().store(0, Ordering::SeqCst);
        }
    }

    /// KVM_RUN itself.
    pub(crate) fn enter_guest(&self) -> i32 {
        // SAFETY: the request takes no argument; what the guest does is the VMM's own.
        unsafe { kvm::ioctl(self.fd, kvm::RUN, 0) }
    }

    /// Has KVM put registers into the page with each exit: in `wanted` and in `old` are their bits, before and from now on. Those that the
    /// VMM asked for itself stay. What was added for it.
    pub(crate) fn sync_registers(&self, old: u64, wanted: u64) -> u64 {
        // SAFETY: this thread's own page, outside of KVM_RUN.
        unsafe {
            let field = &raw mut (*self.run.as_ptr()).kvm_valid_regs;
            let now = field.read_volatile();
            let others = now & !old;
            if now != others | wanted {
                field.write_volatile(others | wanted);
            }
            wanted & !others
        }
    }

    /// The registers that came with the exit.
    pub(crate) fn synced(&self) -> (kvm_regs, kvm_sregs) {
        // SAFETY: this thread's own page, outside of KVM_RUN; every bit pattern is a value of these types.
        unsafe {
            let both = &raw const (*self.run.as_ptr()).s.regs;
            (
                (&raw const (*both).regs).read_volatile(),
                (&raw const (*both).sregs).read_volatile(),
            )
        }
    }

    /// Changes registers in the page: KVM takes them when the guest is entered (Linux, Documentation/virt/kvm/api.rst,
    /// KVM_CAP_SYNC_REGS).
    pub(crate) fn stage_registers(&self, registers: &kvm_regs) {
        // SAFETY: this thread's own page, outside of KVM_RUN.
        unsafe {
            let both = &raw mut (*self.run.as_ptr()).s.regs;
            (&raw mut (*both).regs).write_volatile(*registers);
        }
        self.set_dirty(KVM_SYNC_X86_REGS, true);
    }

    /// The pending exceptions that came with the exit.
    pub(crate) fn synced_events(&self) -> kvm_vcpu_events {
        // SAFETY: this thread's own page, outside of KVM_RUN; every bit pattern is a value of this type.
        unsafe { (&raw const (*self.run.as_ptr()).s.regs.events).read_volatile() }
    }

    /// Changes them, as [`stage_registers`](Self::stage_registers) does registers.
    pub(crate) fn stage_events(&self, events: &kvm_vcpu_events) {
        // SAFETY: this thread's own page, outside of KVM_RUN.
        unsafe { (&raw mut (*self.run.as_ptr()).s.regs.events).write_volatile(*events) };
        self.set_dirty(KVM_SYNC_X86_EVENTS, true);
    }

    /// Takes back what is staged and KVM has not taken.
    pub(crate) fn unstage(&self) -> (Option<kvm_regs>, Option<kvm_vcpu_events>) {
        let regs = self.set_dirty(KVM_SYNC_X86_REGS, false).then(|| self.synced().0);
        let events = self
            .set_dirty(KVM_SYNC_X86_EVENTS, false)
            .then(|| self.synced_events());
        (regs, events)
    }

    /// Whether KVM is to take these registers out of the page with the next entry; whether it was to until now. It takes the bit away
    /// when it has taken them.
    fn set_dirty(&self, registers: u32, dirty: bool) -> bool {
        let bit = u64::from(registers);
        // SAFETY: this thread's own page, outside of KVM_RUN.
        unsafe {
            let field = &raw mut (*self.run.as_ptr()).kvm_dirty_regs;
            let old = field.read_volatile();
            field.write_volatile(if dirty { old | bit } else { old & !bit });
            old & bit != 0
        }
    }

    /// Why the guest stopped.
    pub(crate) fn exit(&self) -> Exit {
        let run = self.run.as_ptr();
        // SAFETY: this thread's own page, outside of KVM_RUN. The member of the union that is read is the one that the reason
        // names, and all of them are plain numbers.
        unsafe {
            let detail = &raw const (*run).__bindgen_anon_1;
            match (&raw const (*run).exit_reason).read_volatile() {
                KVM_EXIT_DEBUG => {
                    let d = (&raw const (*detail).debug).read_volatile().arch;
                    Exit::Debug {
                        exception: d.exception,
                        dr6: d.dr6,
                    }
                }
                KVM_EXIT_MMIO => {
                    let m = (&raw const (*detail).mmio).read_volatile();
                    Exit::Mmio {
                        gpa: m.phys_addr,
                        data: u64::from_le_bytes(m.data),
                        len: u8::try_from(m.len).unwrap_or(0).min(8),
                        write: m.is_write != 0,
                    }
                }
                KVM_EXIT_X86_RDMSR => {
                    let m = (&raw const (*detail).msr).read_volatile();
                    Exit::ReadMsr {
                        index: m.index,
                        reason: m.reason,
                    }
                }
                KVM_EXIT_X86_WRMSR => {
                    let m = (&raw const (*detail).msr).read_volatile();
                    Exit::WriteMsr {
                        index: m.index,
                        data: m.data,
                        reason: m.reason,
                    }
                }
                KVM_EXIT_IO => {
                    let io = (&raw const (*detail).io).read_volatile();
                    Exit::Io {
                        out: u32::from(io.direction) == KVM_EXIT_IO_OUT,
                        size: io.size,
                        port: io.port,
                        count: io.count,
                        offset: io.data_offset,
                    }
                }
                KVM_EXIT_INTERNAL_ERROR => {
                    let error = (&raw const (*detail).internal).read_volatile();
                    match error.suberror {
                        KVM_INTERNAL_ERROR_EMULATION => Exit::Unknown,
                        _ => Exit::Other,
                    }
                }
                _ => Exit::Other,
            }
        }
    }

    /// What a read of memory gives.
    pub(crate) fn give_mmio(&self, value: u64) {
        // SAFETY: this thread's own page, after an exit whose detail this is.
        unsafe {
            let mmio = &raw mut (*self.run.as_ptr()).__bindgen_anon_1.mmio;
            (&raw mut (*mmio).data).write_volatile(value.to_le_bytes());
        }
    }

    /// How an MSR access ends: with #GP, or done; what a read gives.
    pub(crate) fn give_msr(&self, fault: bool, data: Option<u64>) {
        // SAFETY: this thread's own page, after an exit whose detail this is.
        unsafe {
            let msr = &raw mut (*self.run.as_ptr()).__bindgen_anon_1.msr;
            (&raw mut (*msr).error).write_volatile(u8::from(fault));
            if let Some(data) = data {
                (&raw mut (*msr).data).write_volatile(data);
            }
        }
    }

    /// The data of a port access: a place in the page, `None` where it is outside.
    fn io_bytes(&self, offset: u64, len: usize) -> Option<*mut u8> {
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(len)?;
        // SAFETY: within the mapping.
        (end <= self.run_size).then(|| unsafe { self.run.as_ptr().cast::<u8>().add(offset) })
    }

    /// The first value of a port access.
    pub(crate) fn io_value(&self, offset: u64, size: u8) -> Option<u32> {
        let place = self.io_bytes(offset, size.into())?;
        let mut value = 0;
        for i in 0..usize::from(size.min(4)) {
            // SAFETY: within the mapping, as `io_bytes` saw to; this thread's own page.
            value |= u32::from(unsafe { place.add(i).read_volatile() }) << (8 * i);
        }
        Some(value)
    }

    /// Sets all `count` values of a port access.
    pub(crate) fn give_io(&self, offset: u64, size: u8, count: u32, value: u32) {
        let Some(len) = usize::from(size).checked_mul(count as usize) else {
            return;
        };
        let Some(place) = self.io_bytes(offset, len) else {
            return;
        };
        for i in 0..len {
            let byte = value >> (8 * (i % usize::from(size.clamp(1, 4))));
            // SAFETY: as in `io_value`.
            unsafe { place.add(i).write_volatile(byte as u8) };
        }
    }
}
