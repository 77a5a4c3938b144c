//! See the library.
#![no_std]
#![no_main]

mod both;
mod call;
mod shared;
mod text;
mod workload;

use core::arch::{global_asm, x86_64::__cpuid};
use core::ffi::CStr;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU32, Ordering};

use vmsight_sim_witness::{
    MODULE, NAME, PROGRAM, REFUSED, SETUID, TOLD, TOLD_ARGUMENT, UNKNOWN_MODULE, WORKLOAD,
};

use call::{call, number};
use shared::{Entry, Kind, record};
use text::Text;

// The stack holds the count of arguments, then pointers to them.
global_asm!(
    r#"
    .globl _start
_start:
    mov rdi, rsp
    and rsp, -16
    call start
    ud2

    # new_thread(flags, stack, tid): clone, in which the new thread makes one system call and ends, without a stack.
    .globl new_thread
new_thread:
    mov r10, rdx
    mov eax, 56
    syscall
    test rax, rax
    jnz 2f
    mov eax, 39
    syscall
    mov eax, 60
    xor edi, edi
    syscall
    ud2
2:  ret
"#
);
global_asm!(include_str!("../../memory.s"));

unsafe extern "C" {
    /// See above. The parent's memory is the thread's.
    fn new_thread(flags: u64, stack: u64, tid: *mut u32) -> i64;
}

pub(crate) const PR_SET_NAME: u64 = 15;
const PR_SET_KEEPCAPS: u64 = 8;
pub(crate) const O_RDWR_CREAT: u64 = 0o102;
const USER: u64 = 1000;

/// # Safety
/// Called once, by the entry code, with where the kernel has put the arguments.
#[unsafe(no_mangle)]
unsafe extern "C" fn start(arguments: *const u64) -> ! {
    // SAFETY: the kernel's: the count, then that many addresses of text.
    let (count, first) = unsafe { (arguments.read(), arguments.add(2).read()) };
    let is = |word: &CStr| {
        let bytes = word.to_bytes_with_nul().iter().zip(first..);
        // SAFETY: a text and the zero at its end, of which nothing is read after the first byte that differs.
        count > 1
            && bytes
                .into_iter()
                .all(|(&byte, at)| unsafe { *(at as *const u8) } == byte)
    };
    let mut text = Text::new();
    if is(workload::PART) {
        workload::part();
    } else if is(WORKLOAD) {
        shared::map();
        workload::measure(&mut text);
        finish(text);
    }
    // Leaves the guest in user mode, by which a hypervisor knows that the kernel is up.
    __cpuid(0);
    shared::map();
    if count > 1 {
        executed();
    }
    call(number::PRCTL, [PR_SET_NAME, NAME.as_ptr() as u64, 0, 0, 0, 0]);
    files();
    for _ in 0..7 {
        call(number::GETPID, [0; 6]);
    }
    call(TOLD, [TOLD_ARGUMENT, 0, 0, 0, 0, 0]);
    text.result(
        "mkdir",
        call(REFUSED, [c"/made".as_ptr() as u64, 0o755, 0, 0, 0, 0]),
    );
    processes();
    thread();
    both::work();
    modules(&mut text);
    finish(text)
}

/// Says all that is to be said, and switches the machine off.
fn finish(mut text: Text) -> ! {
    shared::report(&mut text);
    // What is to come is in the counts already: one write, one wait until it is on the line, and the end.
    for number in [number::WRITE, number::IOCTL, number::REBOOT] {
        shared::count(number);
    }
    shared::calls(&mut text);
    let bytes = text.line("done", &[]);
    call::uncounted(
        number::WRITE,
        [1, bytes.as_ptr() as u64, bytes.len() as u64, 0, 0, 0],
    );
    const TCSBRK: u64 = 0x5409;
    call::uncounted(number::IOCTL, [1, TCSBRK, 1, 0, 0, 0]);
    call::uncounted(number::REBOOT, [0xfee1_dead, 672_274_793, 0x4321_fedc, 0, 0, 0]);
    end(1)
}

fn end(code: u64) -> ! {
    loop {
        call(number::EXIT_GROUP, [code, 0, 0, 0, 0, 0]);
    }
}

fn files() {
    let path = c"/file".as_ptr() as u64;
    let mut bytes = [7u8; 64];
    for _ in 0..25 {
        let file = call(number::OPEN, [path, O_RDWR_CREAT, 0o644, 0, 0, 0]) as u64;
        let at = bytes.as_mut_ptr() as u64;
        call(number::WRITE, [file, at, 64, 0, 0, 0]);
        call(number::PREAD64, [file, at, 64, 0, 0, 0]);
        call(number::CLOSE, [file, 0, 0, 0, 0, 0]);
    }
    call(number::UNLINK, [path, 0, 0, 0, 0, 0]);
}

/// Makes a process that does something and ends; waits for it.
fn process(act: impl FnOnce()) {
    wait(begin(act));
}

/// Makes one, and goes on: its id.
fn begin(act: impl FnOnce()) -> u64 {
    let parent = call(number::GETPID, [0; 6]);
    match call(number::FORK, [0; 6]) {
        0 => {
            act();
            end(0)
        }
        child => {
            record(Entry {
                kind: Kind::Created,
                who: parent as u64,
                what: child as u64,
            });
            child as u64
        }
    }
}

fn wait(child: u64) {
    call(number::WAIT4, [child, 0, 0, 0, 0, 0]);
}

/// Becomes another program, which is this one again.
fn execute(path: &CStr) {
    let arguments = [path.as_ptr() as u64, c"again".as_ptr() as u64, 0];
    let kind = if path == SETUID {
        Kind::ExecutedSetuid
    } else {
        Kind::Executed
    };
    let who = call(number::GETPID, [0; 6]) as u64;
    record(Entry { kind, who, what: 0 });
    let nothing = [0u64];
    call(
        number::EXECVE,
        [
            path.as_ptr() as u64,
            arguments.as_ptr() as u64,
            nothing.as_ptr() as u64,
            0,
            0,
            0,
        ],
    );
}

/// What the program that was executed does.
fn executed() -> ! {
    files();
    end(0)
}

fn processes() {
    for _ in 0..3 {
        process(|| {});
    }
    // A grandchild.
    process(|| process(|| {}));
    for _ in 0..2 {
        process(execute_again);
    }
    process(become_setuid);
    process(become_root);
}

fn execute_again() {
    execute(PROGRAM);
}

/// Root by executing a file that is root's and setuid.
fn become_setuid() {
    give_up_root(false);
    execute(SETUID);
}

/// Root without executing anything: by a capability that was kept.
fn become_root() {
    give_up_root(true);
    let result = call(number::SETUID, [0; 6]);
    record(Entry {
        kind: Kind::Root,
        who: call(number::GETPID, [0; 6]) as u64,
        what: result as u64,
    });
}

fn give_up_root(keep: bool) {
    const CAP_SETUID: u32 = 1 << 7;
    if keep {
        call(number::PRCTL, [PR_SET_KEEPCAPS, 1, 0, 0, 0, 0]);
    }
    call(number::SETRESUID, [USER, USER, USER, 0, 0, 0]);
    if keep {
        // Version 3 of the interface, this process; effective, permitted, inheritable, and their upper halves.
        let header = [0x2008_0522u32, 0];
        let data = [CAP_SETUID, CAP_SETUID, 0, 0, 0, 0];
        call(
            number::CAPSET,
            [header.as_ptr() as u64, data.as_ptr() as u64, 0, 0, 0, 0],
        );
    }
}

fn thread() {
    // VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, and the kernel clears its id where it says when it has ended.
    const FLAGS: u64 = 0x100 | 0x200 | 0x400 | 0x800 | 0x1_0000 | 0x4_0000 | 0x20_0000;
    static TID: AtomicU32 = AtomicU32::new(1);
    // What it does is counted for it: it has nothing but its registers.
    for number in [number::CLONE, number::GETPID, number::EXIT] {
        shared::count(number);
    }
    let parent = call(number::GETPID, [0; 6]) as u64;
    // SAFETY: the thread uses no stack, and ends by itself; its id is in a static.
    let child = unsafe { new_thread(FLAGS, 0, TID.as_ptr()) };
    record(Entry {
        kind: Kind::Thread,
        who: parent,
        what: child as u64,
    });
    // FUTEX_WAIT: until the kernel has cleared it, which wakes.
    while TID.load(Ordering::Acquire) != 0 {
        call(number::FUTEX, [TID.as_ptr() as u64, 0, 1, 0, 0, 0]);
    }
}

fn modules(text: &mut Text) {
    let empty = c"".as_ptr() as u64;
    let open = |path: &CStr| call(number::OPEN, [path.as_ptr() as u64, 0, 0, 0, 0, 0]) as u64;
    let file = open(MODULE);
    text.result(
        "finit_module",
        call(number::FINIT_MODULE, [file, empty, 0, 0, 0, 0]),
    );
    text.result(
        "delete_module",
        call(
            number::DELETE_MODULE,
            [c"dummy".as_ptr() as u64, 0o4000, 0, 0, 0, 0],
        ),
    );
    let length = call(number::LSEEK, [file, 0, 2, 0, 0, 0]) as u64;
    // Readable, private.
    let at = call(number::MMAP, [0, length, 1, 2, file, 0]) as u64;
    text.result(
        "init_module",
        call(number::INIT_MODULE, [at, length, empty, 0, 0, 0]),
    );
    let unknown = open(UNKNOWN_MODULE);
    text.result(
        "unknown_module",
        call(number::FINIT_MODULE, [unknown, empty, 0, 0, 0, 0]),
    );
    let length = call(number::LSEEK, [unknown, 0, 2, 0, 0, 0]) as u64;
    let at = call(number::MMAP, [0, length, 1, 2, unknown, 0]) as u64;
    text.result(
        "unknown_bytes",
        call(number::INIT_MODULE, [at, length, empty, 0, 0, 0]),
    );
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    end(2)
}
