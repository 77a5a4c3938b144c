//! The plugin interface of QEMU, as far as it is used: its functions are looked up when the plugin is loaded,
//! so that one library fits every version.
//!
//! The facts are those of QEMU's `include/qemu/qemu-plugin.h`: version 1 of the interface from QEMU 7.2,
//! version 4 from QEMU 10.0. What differs: version 2 (QEMU 9.0) brings registers, version 3 (9.1) has
//! instructions copied out, version 4 (9.2) brings the values of memory accesses.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// Handles that only QEMU looks into.
pub(super) type Block = *mut c_void;
pub(super) type Instruction = *mut c_void;
pub(super) type HardwareAddress = *mut c_void;
pub(super) type RegisterHandle = *mut c_void;

/// `enum qemu_plugin_cb_flags`: whether a callback reads registers.
pub(super) const NO_REGISTERS: c_int = 0;
pub(super) const READS_REGISTERS: c_int = 1;
/// `enum qemu_plugin_mem_rw`: which accesses a callback is called for.
pub(super) const READS: c_int = 1;
pub(super) const WRITES: c_int = 2;

/// `qemu_info_t`, as far as it is the same in all versions.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Info {
    pub(super) target: *const c_char,
    pub(super) oldest: c_int,
    pub(super) current: c_int,
    pub(super) system: bool,
    pub(super) vcpus: c_int,
    pub(super) most_vcpus: c_int,
}

/// `qemu_plugin_mem_value`: its kind is the logarithm of its size.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct MemoryValue {
    pub(super) kind: c_int,
    pub(super) low: u64,
    pub(super) high: u64,
}

/// `qemu_plugin_reg_descriptor`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct RegisterDescriptor {
    pub(super) handle: RegisterHandle,
    pub(super) name: *const c_char,
    pub(super) feature: *const c_char,
}

/// `GArray` and `GByteArray` of GLib.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Array {
    pub(super) data: *mut c_void,
    pub(super) len: c_uint,
}

pub(super) type OnVcpu = extern "C" fn(u64, c_uint);
pub(super) type OnTranslation = extern "C" fn(u64, Block);
pub(super) type OnFlush = extern "C" fn(u64);
pub(super) type OnExecution = extern "C" fn(c_uint, *mut c_void);
pub(super) type OnAccess = extern "C" fn(c_uint, u32, u64, *mut c_void);
/// What runs while no vCPU is in the guest.
pub(super) type Alone = extern "C" fn(*mut c_void, *mut c_void);

/// A symbol of the process as a function.
///
/// # Safety
/// `F` must be the function's type.
unsafe fn function<F: Copy>(name: &CStr) -> Option<F> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: a name that ends in zero; what is found is checked for.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    // SAFETY: of the same size; what the caller says it is.
    (!found.is_null()).then(|| unsafe { std::mem::transmute_copy::<*mut c_void, F>(&found) })
}

/// QEMU's own variable that says which vCPU this thread runs (`current_cpu`, one for each thread), null where it has none.
pub(super) fn current() -> *const *mut c_void {
    // SAFETY: a name that ends in zero. Of such a variable the loader gives the calling thread's.
    unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"current_cpu".as_ptr()) }.cast()
}

/// Whether the process has a symbol.
fn has(name: &CStr) -> bool {
    // SAFETY: a name that ends in zero.
    !unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) }.is_null()
}

/// The version of the interface to ask this QEMU for: the newest that both know. QEMU reads it before it says
/// its own.
pub(super) fn version() -> c_int {
    if has(c"qemu_plugin_mem_get_value") {
        4
    } else if has(c"qemu_plugin_scoreboard_new") {
        2
    } else {
        1
    }
}

macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $($(#[$about:meta])* $name:ident: $type:ty = $symbol:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub(super) struct $table {
            $($(#[$about])* pub(super) $name: $type,)*
        }

        impl $table {
            /// Looks them up; `None` where one is missing.
            pub(super) fn find() -> Option<Self> {
                // SAFETY: these are the functions' types, as said where the table is.
                unsafe { Some(Self { $($name: function::<$type>($symbol)?,)* }) }
            }
        }
    };
}

functions! {
    /// What every version has.
    Plugin {
        on_vcpu: unsafe extern "C" fn(u64, OnVcpu) = c"qemu_plugin_register_vcpu_init_cb",
        on_translation: unsafe extern "C" fn(u64, OnTranslation) = c"qemu_plugin_register_vcpu_tb_trans_cb",
        on_flush: unsafe extern "C" fn(u64, OnFlush) = c"qemu_plugin_register_flush_cb",
        on_execution: unsafe extern "C" fn(Instruction, OnExecution, c_int, *mut c_void)
            = c"qemu_plugin_register_vcpu_insn_exec_cb",
        on_access: unsafe extern "C" fn(Instruction, OnAccess, c_int, c_int, *mut c_void)
            = c"qemu_plugin_register_vcpu_mem_cb",
        instructions: unsafe extern "C" fn(Block) -> usize = c"qemu_plugin_tb_n_insns",
        instruction: unsafe extern "C" fn(Block, usize) -> Instruction = c"qemu_plugin_tb_get_insn",
        /// Before version 3 it takes the first argument alone and gives a pointer; what it is not asked for it
        /// does not look at.
        data: unsafe extern "C" fn(Instruction, *mut c_void, usize) -> usize = c"qemu_plugin_insn_data",
        size: unsafe extern "C" fn(Instruction) -> usize = c"qemu_plugin_insn_size",
        address: unsafe extern "C" fn(Instruction) -> u64 = c"qemu_plugin_insn_vaddr",
        size_shift: unsafe extern "C" fn(u32) -> c_uint = c"qemu_plugin_mem_size_shift",
        hardware_address: unsafe extern "C" fn(u32, u64) -> HardwareAddress = c"qemu_plugin_get_hwaddr",
        physical: unsafe extern "C" fn(HardwareAddress) -> u64 = c"qemu_plugin_hwaddr_phys_addr",
    }
}

functions! {
    /// Registers, from version 2 on, and what GLib gives and takes them in.
    Registers {
        list: unsafe extern "C" fn() -> *mut Array = c"qemu_plugin_get_registers",
        read: unsafe extern "C" fn(RegisterHandle, *mut Array) -> c_int = c"qemu_plugin_read_register",
        new_bytes: unsafe extern "C" fn() -> *mut Array = c"g_byte_array_new",
        set_size: unsafe extern "C" fn(*mut Array, c_uint) -> *mut Array = c"g_byte_array_set_size",
        free_list: unsafe extern "C" fn(*mut Array, c_int) -> *mut c_char = c"g_array_free",
    }
}

functions! {
    /// The values of memory accesses, from version 4 on.
    Values {
        get: unsafe extern "C" fn(u32) -> MemoryValue = c"qemu_plugin_mem_get_value",
    }
}

functions! {
    /// What the plugin interface has no word for. These are QEMU's own functions, which a QEMU that has modules
    /// (Debian's, Ubuntu's and Fedora's have) exports to them: `include/hw/core/cpu.h`,
    /// `include/exec/cpu-common.h` and `include/exec/exec-all.h` of 7.2 and 10.0.
    Inside {
        cpu: unsafe extern "C" fn(c_int) -> *mut c_void = c"qemu_get_cpu",
        alone: unsafe extern "C" fn(*mut c_void, Alone, *mut c_void) = c"async_safe_run_on_cpu",
        kick: unsafe extern "C" fn(*mut c_void) = c"qemu_cpu_kick",
        flush: unsafe extern "C" fn(*mut c_void) = c"tb_flush",
        read_virtual: unsafe extern "C" fn(*mut c_void, u64, *mut c_void, usize, bool) -> c_int
            = c"cpu_memory_rw_debug",
        physical: unsafe extern "C" fn(u64, *mut c_void, u64, bool) = c"cpu_physical_memory_rw",
        runs: unsafe extern "C" fn() -> bool = c"runstate_is_running",
    }
}

functions! {
    /// What QEMU's monitor prints of a vCPU.
    Dump {
        print: unsafe extern "C" fn(*mut c_void, *mut c_void, c_int) = c"cpu_dump_state",
    }
}
