//! What can be asked of the VMM if it is a QEMU: to pause the VM as its owner would, so that its owner can resume it.

use std::ffi::{CStr, c_int, c_void};
use std::mem::transmute;

/// `RUN_STATE_PAUSED` (QEMU, qapi/run-state.json: the fifth; new ones are added at the end).
const PAUSED: c_int = 4;

type Prepare = unsafe extern "C" fn();
type Request = unsafe extern "C" fn(c_int);
type Handler = unsafe extern "C" fn(*mut c_void, bool, c_int);
type AddHandler = unsafe extern "C" fn(Handler, *mut c_void) -> *mut c_void;

fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: a name that ends in zero; what is found is checked for.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

/// QEMU's functions, which its modules use too (system/runstate.c).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Qemu {
    prepare: Prepare,
    request: Request,
}

impl Qemu {
    /// Looks for them, and has `runs` called whenever the VM begins to run. `None` where this is no QEMU. Called by the thread
    /// that makes the VM, as QEMU wants it.
    pub(crate) fn find(runs: fn()) -> Option<Self> {
        let prepare = symbol(c"qemu_system_vmstop_request_prepare")?;
        let request = symbol(c"qemu_system_vmstop_request")?;
        let add = symbol(c"qemu_add_vm_change_state_handler")?;
        // SAFETY: these are the functions' types from QEMU 6.0 on (include/sysemu/runstate.h, later include/system/runstate.h).
        let (prepare, request, add) = unsafe {
            (
                transmute::<*mut c_void, Prepare>(prepare),
                transmute::<*mut c_void, Request>(request),
                transmute::<*mut c_void, AddHandler>(add),
            )
        };
        // SAFETY: QEMU keeps both, and gives the second back; it is a plain function.
        unsafe { add(changed, runs as *mut c_void) };
        Some(Self { prepare, request })
    }

    /// Asks for the VM to be paused. It happens a little later, on QEMU's main thread.
    pub(crate) fn pause(&self) {
        // SAFETY: both may be called from any thread: they take a lock of their own and wake the main thread.
        unsafe {
            (self.prepare)();
            (self.request)(PAUSED);
        }
    }
}

unsafe extern "C" fn changed(runs: *mut c_void, running: bool, _state: c_int) {
    if running {
        // SAFETY: what `find` gave.
        let runs = unsafe { transmute::<*mut c_void, fn()>(runs) };
        runs();
    }
}
