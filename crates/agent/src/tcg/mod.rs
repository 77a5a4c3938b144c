//! The agent in a QEMU that emulates its guest's processors (TCG): the same library, loaded as a plugin.
//!
//! QEMU translates the guest's code block by block and asks the plugin, for each, where it wants to be called.
//! So a hook is a call in the translated code, on the vCPU's own thread; without hooks there is none. When
//! hooks change, all vCPUs are brought out of the guest, the table is replaced, and all translated code is
//! thrown away: what runs from then on was translated with the new table.
//!
//! A plugin cannot change registers, nor keep an instruction from happening. What it is told of memory it is
//! told when it is done. What it can see depends on QEMU's version ([`api`]), and is never made up.

mod api;
mod capability;
mod change;
mod front;
mod instruction;
mod interrupt;
mod look;
mod registers;
mod run;
mod shadow;
mod table;
mod tell;

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicI32, Ordering};

use api::{Info, Plugin};
use front::Front;
pub(crate) use registers::Wanted;

/// The version of the plugin interface that is asked for. QEMU takes one in a range of its own, which has
/// nothing in common between 7.2 and 9.0, so it is set when the library is loaded, before QEMU reads it.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)] // QEMU's name for it
pub(crate) static qemu_plugin_version: AtomicI32 = AtomicI32::new(1);

#[used]
#[unsafe(link_section = ".init_array")]
static ASK: extern "C" fn() = ask;

extern "C" fn ask() {
    qemu_plugin_version.store(api::version(), Ordering::Relaxed);
}

/// QEMU loads the plugin. It runs on without one that says that it failed to: an agent that cannot work must
/// not keep a VM from starting.
///
/// # Safety
/// `info` must be QEMU's, or null.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn qemu_plugin_install(
    id: u64,
    info: *const Info,
    _arguments: c_int,
    _vector: *const *const c_char,
) -> c_int {
    guarded(|| {
        // SAFETY: QEMU's, valid for the call; or null, which is none.
        let Some(info) = (unsafe { info.as_ref() }) else {
            return;
        };
        if let Err(why) = install(id, info) {
            complain(&why);
        }
    });
    0
}

fn install(id: u64, info: &Info) -> Result<(), String> {
    // SAFETY: QEMU's own name of its target, or null.
    let target = (!info.target.is_null()).then(|| unsafe { CStr::from_ptr(info.target) });
    let target = target.unwrap_or_default().to_string_lossy();
    if !info.system || target != "x86_64" {
        return Err(format!("it knows no guests of {target}"));
    }
    let Some(socket) = std::env::var_os("VMSIGHT_AGENT") else {
        return Err("VMSIGHT_AGENT does not say where to listen: use `vmsight launch`".to_owned());
    };
    let Some(plugin) = Plugin::find() else {
        return Err("this QEMU lacks functions of the plugin interface".to_owned());
    };
    if front::begin(Front::new(info, plugin, socket.into())?) {
        // SAFETY: the id is ours; the functions live as long as the process, from which a plugin is never
        // unloaded but on its own wish.
        unsafe {
            (plugin.on_vcpu)(id, on_vcpu);
            (plugin.on_translation)(id, run::on_translation);
            (plugin.on_flush)(id, on_flush);
        }
    }
    Ok(())
}

/// The VMM's standard error is the only place where somebody who started it may look.
fn complain(why: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "vmsight agent: {why}; the VM runs without it");
}

/// QEMU made a vCPU. It has forked into the background by now, if it was to.
extern "C" fn on_vcpu(_id: u64, vcpu: c_uint) {
    guarded(|| {
        if let Some(front) = front::get() {
            front.add_vcpu(vcpu);
        }
    });
}

/// All translated code was thrown away.
extern "C" fn on_flush(_id: u64) {
    guarded(|| {
        if let Some(front) = front::get() {
            front.flushed();
        }
    });
}

/// Does something for QEMU, into whose frames nothing must unwind. A panic is a mistake of ours, for which no
/// VM must end.
fn guarded(what: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(what));
}
