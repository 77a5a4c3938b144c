//! The hypervisor's image: what touches the machine. GRUB loads it by multiboot2 with the kernel, and what goes along with
//! it, as modules.
#![no_std]
#![no_main]

mod apic;
mod boot;
mod calls;
mod channel;
mod exits;
mod guest;
mod hooks;
mod host;
mod io;
mod kept;
mod machine;
mod msrs;
mod outside;
mod park;
mod processor;
mod serial;
mod stepping;
mod tell;
mod timer;
mod vmcs;

use core::fmt::Write;
use core::panic::PanicInfo;

use serial::Console;

/// Where [`boot`]'s code goes on: in long mode, with the first 4 GiB mapped to themselves.
///
/// # Safety
/// Called once, by the boot code, with what the loader left in EAX and EBX.
#[unsafe(no_mangle)]
unsafe extern "C" fn start(magic: u32, information: u32) -> ! {
    serial::initialise();
    let mut console = Console;
    let _ = writeln!(console, "vmsight-hypervisor {}", env!("CARGO_PKG_VERSION"));
    if magic != vmsight_sim_hypervisor::multiboot::MAGIC {
        stop(format_args!("not started by a multiboot2 loader"));
    }
    // SAFETY: the loader says that its information lies there; once, at the begin.
    match unsafe { guest::boot(information) } {
        Ok(never) => match never {},
        Err(error) => stop(format_args!("{error}")),
    }
}

/// Says why and halts.
fn stop(why: core::fmt::Arguments<'_>) -> ! {
    let _ = writeln!(Console, "vmsight-hypervisor: {why}\nvmsight-hypervisor: halted");
    machine::halt()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    stop(format_args!("{info}"))
}
