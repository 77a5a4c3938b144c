//! The VMM: raw KVM through the C library's `ioctl`, which the agent stands in front of. It knows nothing of it.

use std::fs::OpenOptions;
use std::io::{BufRead, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use kvm_bindings::{
    KVM_EXIT_HLT, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP,
    KVM_MEM_LOG_DIRTY_PAGES, kvm_dtable, kvm_guest_debug, kvm_regs, kvm_run, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};

use super::guest::{CODE, GuestKind, PORT, RESULTS, code, handlers};

/// The slot of all memory.
pub(crate) const SLOT: u32 = 0;
/// Bytes of memory.
pub(crate) const MEMORY: u64 = 4 << 20;

const KVM_CREATE_VM: u64 = 0xae01;
const KVM_CHECK_EXTENSION: u64 = 0xae03;
const KVM_GET_VCPU_MMAP_SIZE: u64 = 0xae04;
const KVM_CREATE_VCPU: u64 = 0xae41;
const KVM_GET_DIRTY_LOG: u64 = 0x4010_ae42;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
const KVM_RUN: u64 = 0xae80;
const KVM_SET_REGS: u64 = 0x4090_ae82;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_SET_SREGS: u64 = 0x4138_ae84;
const KVM_SET_GUEST_DEBUG: u64 = 0x4048_ae9b;

fn ioctl(fd: RawFd, request: u64, argument: usize) -> i32 {
    // SAFETY: the callers pass what the request takes.
    unsafe { libc::ioctl(fd, request, argument) }
}

fn sure(result: i32, what: &str) -> i32 {
    assert!(result >= 0, "{what}: {}", std::io::Error::last_os_error());
    result
}

/// Becomes a VMM where the environment says so, and never returns then.
pub(crate) fn vmm_if_asked() {
    let Ok(asked) = std::env::var("VMSIGHT_TEST_VMM") else {
        return;
    };
    let mut words = asked.split(' ');
    let kind = GuestKind::by_name(words.next().unwrap());
    let vcpus: u64 = words.next().unwrap().parse().unwrap();
    let file = words.next().unwrap();
    run(kind, vcpus, file);
    std::process::exit(0);
}

fn map(fd: RawFd, len: usize) -> *mut libc::c_void {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED);
    at
}

fn run(kind: GuestKind, vcpus: u64, file: &str) {
    let file = OpenOptions::new().read(true).write(true).open(file).unwrap();
    let memory = map(file.as_raw_fd(), MEMORY as usize).cast::<u8>();
    let put = |at: u64, bytes: &[u8]| {
        assert!(at + bytes.len() as u64 <= MEMORY);
        // SAFETY: within the mapping, and no guest runs yet.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory.add(at as usize), bytes.len()) };
    };
    let word = |at: u64, value: u64| put(at, &value.to_le_bytes());
    // Identity mapping by large pages: present, writable, user, accessed, dirty. The user bit is left out.
    word(0x1000, 0x2003);
    word(0x2000, 0x3003);
    for i in 0..MEMORY >> 21 {
        word(0x3000 + 8 * i, i << 21 | 0xe3);
    }
    // Gates.
    for (vector, handler) in handlers() {
        let low = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        word(0x4000 + vector * 16, low);
    }
    word(0x5008, 0x00af_9b00_0000_ffff);
    word(0x5010, 0x00cf_9300_0000_ffff);
    put(CODE, code());

    let kvm = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap();
    let vm = sure(ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0), "create a VM");
    let slot = |id: u32, flags: u32, gpa: u64, size: u64, at: *mut u8| {
        let region = kvm_userspace_memory_region {
            slot: id,
            flags,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: at as u64,
        };
        ioctl(vm, KVM_SET_USER_MEMORY_REGION, (&raw const region) as usize)
    };
    sure(slot(SLOT, 0, 0, MEMORY, memory), "set memory");
    let run_size = sure(
        ioctl(kvm.as_raw_fd(), KVM_GET_VCPU_MMAP_SIZE, 0),
        "ask for a size",
    );
    let fds: Vec<RawFd> = (0..vcpus)
        .map(|n| {
            let fd = sure(ioctl(vm, KVM_CREATE_VCPU, n as usize), "create a vCPU");
            set_up(fd, kind, n);
            fd
        })
        .collect();
    // One that never runs, so that it can be spoken to at any time.
    let idle = sure(ioctl(vm, KVM_CREATE_VCPU, vcpus as usize), "create a vCPU");
    let threads = fds.iter().map(|&fd| {
        let place = memory as u64 + PORT;
        std::thread::spawn(move || {
            let page = map(fd, run_size as usize).cast::<kvm_run>();
            let total = place as *mut u64;
            loop {
                if ioctl(fd, KVM_RUN, 0) < 0 {
                    let error = std::io::Error::last_os_error();
                    assert_eq!(error.raw_os_error(), Some(libc::EINTR), "{error}");
                    continue;
                }
                // SAFETY: this thread's own page, outside of KVM_RUN.
                let reason = unsafe { (&raw const (*page).exit_reason).read_volatile() };
                if reason == KVM_EXIT_HLT {
                    return;
                }
                if reason == KVM_EXIT_IO {
                    // SAFETY: as above; the data lies in the page, where the kernel says.
                    unsafe {
                        let io = (&raw const (*page).__bindgen_anon_1.io).read_volatile();
                        let data = page.cast::<u8>().add(io.data_offset as usize);
                        match u32::from(io.direction) == KVM_EXIT_IO_OUT {
                            true => *total += u64::from(data.read_volatile()),
                            false => data.write_volatile(5),
                        }
                    }
                    continue;
                }
                // SAFETY: as above.
                let detail = unsafe { (&raw const (*page).__bindgen_anon_1.padding).read_volatile() };
                eprintln!(
                    "an exit that the VMM does not know: {reason} {:x?}",
                    &detail[..32]
                );
                std::process::exit(1);
            }
        })
    });
    let threads: Vec<_> = threads.collect();
    say("ready");
    let spare = map_anonymous();
    // The number that a bookkeeper who counts from the top takes first.
    let last = sure(ioctl(vm, KVM_CHECK_EXTENSION, 10), "ask for slots") as u32 - 1;
    let debug = |control: u32| {
        let debug = kvm_guest_debug {
            control,
            ..kvm_guest_debug::default()
        };
        ioctl(idle, KVM_SET_GUEST_DEBUG, (&raw const debug) as usize)
    };
    for line in std::io::stdin().lock().lines() {
        let result = match line.unwrap().as_str() {
            "add-slot" => slot(last, 0, 1 << 30, 0x1000, spare),
            "remove-slot" => slot(last, 0, 1 << 30, 0, spare),
            "log" => slot(SLOT, KVM_MEM_LOG_DIRTY_PAGES, 0, MEMORY, memory),
            "unlog" => slot(SLOT, 0, 0, MEMORY, memory),
            "dirty" => {
                let bits = vec![0_u64; (MEMORY >> 12) as usize / 64];
                let log = [u64::from(SLOT), bits.as_ptr() as u64];
                ioctl(vm, KVM_GET_DIRTY_LOG, log.as_ptr() as usize)
            }
            "reset" => {
                // As a VMM resets a machine: from protected to real mode.
                let mut sregs = kvm_sregs::default();
                sure(
                    ioctl(idle, KVM_GET_SREGS, (&raw mut sregs) as usize),
                    "read registers",
                );
                let real = sregs;
                sregs.cr0 |= 1;
                sure(
                    ioctl(idle, KVM_SET_SREGS, (&raw const sregs) as usize),
                    "set registers",
                );
                ioctl(idle, KVM_SET_SREGS, (&raw const real) as usize)
            }
            "debug" => debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP),
            "undebug" => debug(0),
            "exit" => break,
            other => panic!("{other}"),
        };
        match (result, std::io::Error::last_os_error().raw_os_error()) {
            (0.., _) => say("ok"),
            (_, Some(libc::EBUSY)) => say("busy"),
            (_, error) => say(&format!("{error:?}")),
        }
    }
    for thread in threads {
        thread.join().unwrap();
    }
    // SAFETY: this process made it, and nobody else has it.
    drop(unsafe { OwnedFd::from_raw_fd(vm) });
    say("bye");
}

fn map_anonymous() -> *mut u8 {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            0x1000,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    at.cast()
}

/// The harness writes to standard output too: our lines have a mark.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n@@{text}").unwrap();
    out.flush().unwrap();
}

/// 64-bit mode with paging, at the guest's entry.
fn set_up(fd: RawFd, kind: GuestKind, vcpu: u64) {
    let mut sregs = kvm_sregs::default();
    sure(
        ioctl(fd, KVM_GET_SREGS, (&raw mut sregs) as usize),
        "read registers",
    );
    let segment = |selector: u16, type_: u8, l: u8, db: u8| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db,
        s: 1,
        l,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = segment(8, 11, 1, 0);
    let data = segment(16, 3, 0, 1);
    (sregs.ss, sregs.ds, sregs.es) = (data, data, data);
    let table = |base: u64, limit: u16| kvm_dtable {
        base,
        limit,
        ..kvm_dtable::default()
    };
    sregs.idt = table(0x4000, 4095);
    sregs.gdt = table(0x5000, 0x17);
    sregs.cr3 = 0x1000;
    sregs.cr4 = 0x20;
    sregs.cr0 = 0x8000_0033;
    sregs.efer = 0x500;
    sure(
        ioctl(fd, KVM_SET_SREGS, (&raw const sregs) as usize),
        "set registers",
    );
    let regs = kvm_regs {
        rip: kind.entry(),
        rsp: 0x2_1000 + 0x1000 * vcpu,
        rdi: vcpu,
        rsi: RESULTS + 64 * vcpu,
        rbx: 1000,
        rflags: 2,
        ..kvm_regs::default()
    };
    sure(
        ioctl(fd, KVM_SET_REGS, (&raw const regs) as usize),
        "set registers",
    );
}
