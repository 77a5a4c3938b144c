//! A mapped file can be cut by somebody else, or its disk can fail: touching the page then raises SIGBUS, which
//! kills the process. Here it becomes an error of the one read instead.
//!
//! Every mapping registers its range. The handler puts a page of zeros in place of the one that is gone, notes the
//! range as lost and returns; the copy goes on with zeros, and whoever made it checks afterwards ([`all_is_well`], and
//! where that says no [`Watch::lost`]) and throws the result away. Signals for other addresses go to the handler that was there
//! before.
//!
//! The handler only does atomic loads and stores and raw system calls, and entries are never freed (but used
//! again), so it can run at any moment.

use std::io;
use std::ptr;
use std::sync::Once;
use std::sync::OnceLock;
#[cfg(not(target_arch = "x86_64"))]
use std::sync::atomic::fence;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// One watched range. All fields are addresses in this process.
#[derive(Debug)]
struct Entry {
    start: AtomicUsize,
    end: AtomicUsize,
    /// Lowest address known to be gone, `usize::MAX` while all is well.
    lost_start: AtomicUsize,
    /// End of the highest page known to be gone.
    lost_end: AtomicUsize,
    /// How often a page of this range was lost: its share of [`LOST`].
    faults: AtomicUsize,
    used: AtomicBool,
    next: *const Entry,
}

// SAFETY: all fields are atomics but `next`, which is set before the entry is published and never changes.
unsafe impl Sync for Entry {}
// SAFETY: as above; an entry is owned by nobody.
unsafe impl Send for Entry {}

static ENTRIES: AtomicPtr<Entry> = AtomicPtr::new(ptr::null_mut());
/// Pages lost in the ranges that are watched now; 0 nearly always.
static LOST: AtomicUsize = AtomicUsize::new(0);
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();
static PAGE_SIZE: AtomicUsize = AtomicUsize::new(4096);

/// After an access to any mapping: whether no page of any was ever lost. One load for the hot path; where the answer is
/// no, [`Watch::lost`] of the mapping knows more.
#[inline(always)]
pub(crate) fn all_is_well() -> bool {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: compares a word of this library's. Named like this, it is found without asking a table where it is, as code that
    // became part of another crate would. The access before is volatile or `asm!` itself, and not moved behind it.
    unsafe {
        std::arch::asm!(
            "cmp qword ptr [rip + {lost}], 0",
            "jne {gone}",
            lost = sym LOST,
            gone = label { return false },
            options(nostack, readonly)
        );
        true
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        // The access before must not be moved behind the load.
        fence(Ordering::Acquire);
        LOST.load(Ordering::Relaxed) == 0
    }
}

/// Keeps a mapped range under watch until dropped, which must be before the range is unmapped.
#[derive(Debug)]
pub(crate) struct Watch {
    entry: &'static Entry,
}

impl Watch {
    /// Watches `[start, start + len)`.
    pub(crate) fn new(start: *const u8, len: usize) -> io::Result<Self> {
        install()?;
        let entry = claim();
        entry.lost_start.store(usize::MAX, Ordering::SeqCst);
        entry.lost_end.store(0, Ordering::SeqCst);
        entry
            .end
            .store((start as usize).saturating_add(len), Ordering::SeqCst);
        entry.start.store(start as usize, Ordering::SeqCst);
        Ok(Self { entry })
    }

    /// The range of addresses that is gone, if any is. Between two lost pages everything counts as lost.
    pub(crate) fn lost(&self) -> Option<std::ops::Range<usize>> {
        let start = self.entry.lost_start.load(Ordering::Acquire);
        (start != usize::MAX).then(|| start..self.entry.lost_end.load(Ordering::Acquire))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.entry.start.store(usize::MAX, Ordering::SeqCst);
        self.entry.end.store(0, Ordering::SeqCst);
        LOST.fetch_sub(self.entry.faults.swap(0, Ordering::SeqCst), Ordering::SeqCst);
        self.entry.used.store(false, Ordering::SeqCst);
    }
}

/// Takes an entry nobody uses, or adds one.
fn claim() -> &'static Entry {
    let mut at = ENTRIES.load(Ordering::Acquire).cast_const();
    // SAFETY: entries are leaked boxes, valid for ever once they are in the list.
    while let Some(entry) = unsafe { at.as_ref() } {
        if !entry.used.swap(true, Ordering::SeqCst) {
            return entry;
        }
        at = entry.next;
    }
    let entry = Box::leak(Box::new(Entry {
        start: AtomicUsize::new(usize::MAX),
        end: AtomicUsize::new(0),
        lost_start: AtomicUsize::new(usize::MAX),
        lost_end: AtomicUsize::new(0),
        faults: AtomicUsize::new(0),
        used: AtomicBool::new(true),
        next: ptr::null(),
    }));
    let mut head = ENTRIES.load(Ordering::Acquire);
    loop {
        entry.next = head;
        match ENTRIES.compare_exchange(head, entry, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return entry,
            Err(now) => head = now,
        }
    }
}

/// Installs the handler, once.
fn install() -> io::Result<()> {
    static INSTALL: Once = Once::new();
    static FAILED: AtomicBool = AtomicBool::new(false);
    INSTALL.call_once(|| {
        // SAFETY: plain system calls with valid pointers; the handler is async-signal-safe (see the module's text).
        unsafe {
            let page = libc::sysconf(libc::_SC_PAGESIZE);
            PAGE_SIZE.store(usize::try_from(page).unwrap_or(4096).max(4096), Ordering::SeqCst);
            let mut old: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, ptr::null(), &mut old) != 0 {
                FAILED.store(true, Ordering::SeqCst);
                return;
            }
            // Known before the handler can run.
            let _ = PREVIOUS.set(old);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut action.sa_mask);
            if libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) != 0 {
                FAILED.store(true, Ordering::SeqCst);
            }
        }
    });
    if FAILED.load(Ordering::SeqCst) {
        return Err(io::Error::other("cannot install a SIGBUS handler"));
    }
    Ok(())
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo; si_addr is only looked at where si_code says that it is set.
    let address = unsafe {
        let info = &*info;
        // Codes above zero come from the kernel for a fault; kill() and friends carry no address.
        if info.si_code > 0 {
            Some(info.si_addr() as usize)
        } else {
            None
        }
    };
    if let Some(address) = address
        && heal(address)
    {
        return;
    }
    pass_on(signal, info, context);
}

/// Replaces the page at `address` by zeros where it belongs to a watched range.
fn heal(address: usize) -> bool {
    let mut at = ENTRIES.load(Ordering::Acquire).cast_const();
    // SAFETY: entries are never freed.
    while let Some(entry) = unsafe { at.as_ref() } {
        at = entry.next;
        let (start, end) = (
            entry.start.load(Ordering::SeqCst),
            entry.end.load(Ordering::SeqCst),
        );
        if start <= address && address < end {
            let page = PAGE_SIZE.load(Ordering::Relaxed);
            let first = address & !(page - 1);
            return lose(entry, first, first + page)
                // Huge pages cannot be replaced one small page at a time.
                || lose(entry, start & !(page - 1), end.next_multiple_of(page));
        }
    }
    false
}

/// Notes `[start, end)` as lost, then puts zeros there: in this order, so that nobody reads the zeros without being
/// able to see that they are not real.
fn lose(entry: &Entry, start: usize, end: usize) -> bool {
    entry.faults.fetch_add(1, Ordering::SeqCst);
    LOST.fetch_add(1, Ordering::SeqCst);
    entry.lost_end.fetch_max(end, Ordering::SeqCst);
    entry.lost_start.fetch_min(start, Ordering::SeqCst);
    // SAFETY: the range is part of a mapping that `Watch` was told of and that lives as long as it is watched;
    // replacing its pages takes away nothing but the pages that cannot be read anyway. errno is put back.
    unsafe {
        let errno = libc::__errno_location();
        let saved = *errno;
        let new = libc::mmap(
            start as *mut libc::c_void,
            end - start,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        );
        *errno = saved;
        new != libc::MAP_FAILED
    }
}

/// Not ours: what would have happened without us.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS.get();
    // SAFETY: the handler found at installation is called as its flags say; or the default action is restored, and
    // the instruction that faulted runs again and ends the process as it would have.
    unsafe {
        match previous {
            Some(old) if old.sa_sigaction != libc::SIG_DFL && old.sa_sigaction != libc::SIG_IGN => {
                if old.sa_flags & libc::SA_SIGINFO != 0 {
                    let call: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(old.sa_sigaction);
                    call(signal, info, context);
                } else {
                    let call: extern "C" fn(libc::c_int) = std::mem::transmute(old.sa_sigaction);
                    call(signal);
                }
            }
            _ => {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &default, ptr::null_mut());
                if (*info).si_code <= 0 {
                    libc::raise(signal);
                }
            }
        }
    }
}
