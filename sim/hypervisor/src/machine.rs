//! The processor's instructions. Whoever calls these owns the machine: there is nobody else.

use core::arch::asm;

/// Reads an MSR, which must exist.
pub(crate) fn rdmsr(number: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading an MSR changes nothing; one that does not exist ends in our own exception handler.
    unsafe { asm!("rdmsr", in("ecx") number, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
///
/// # Safety
/// The value must be one that the register takes, and what it does to the hypervisor must be wanted.
pub(crate) unsafe fn wrmsr(number: u32, value: u64) {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: the caller's promise.
    unsafe { asm!("wrmsr", in("ecx") number, in("eax") low, in("edx") high, options(nostack)) };
}

macro_rules! register {
    ($read:ident, $write:ident, $name:literal) => {
        #[doc = concat!("Reads ", $name, ".")]
        pub(crate) fn $read() -> u64 {
            let value;
            // SAFETY: reading it changes nothing.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nomem, nostack)) };
            value
        }

        #[doc = concat!("Writes ", $name, ".")]
        ///
        /// # Safety
        /// The value must be a valid one, under which the hypervisor goes on.
        pub(crate) unsafe fn $write(value: u64) {
            // SAFETY: the caller's promise.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack)) };
        }
    };
}

register!(cr0, set_cr0, "cr0");
register!(cr4, set_cr4, "cr4");
register!(dr6, set_dr6, "dr6");

/// Sets CR2, which is the guest's: nothing of the hypervisor's faults.
pub(crate) fn set_cr2(address: u64) {
    // SAFETY: no more than a place where page faults leave their address.
    unsafe { asm!("mov cr2, {}", in(reg) address, options(nomem, nostack)) };
}

/// Writes a byte to a port.
///
/// # Safety
/// What the device does then must be wanted.
pub(crate) unsafe fn outb(port: u16, value: u8) {
    // SAFETY: the caller's promise.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

/// Reads a byte from a port.
///
/// # Safety
/// As for [`outb`].
pub(crate) unsafe fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: the caller's promise.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

/// Writes 1, 2 or 4 bytes to a port.
///
/// # Safety
/// As for [`outb`].
pub(crate) unsafe fn port_out(port: u16, size: u8, value: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        match size {
            1 => outb(port, value as u8),
            2 => asm!("out dx, ax", in("dx") port, in("ax") value as u16, options(nomem, nostack)),
            _ => asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)),
        }
    }
}

/// Reads 1, 2 or 4 bytes from a port.
///
/// # Safety
/// As for [`outb`].
pub(crate) unsafe fn port_in(port: u16, size: u8) -> u32 {
    // SAFETY: the caller's promise.
    unsafe {
        match size {
            1 => inb(port).into(),
            2 => {
                let value: u16;
                asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack));
                value.into()
            }
            _ => {
                let value: u32;
                asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack));
                value
            }
        }
    }
}

/// Sets XCR0.
///
/// # Safety
/// The value must be one that the processor takes, and CR4.OSXSAVE set.
pub(crate) unsafe fn xsetbv(value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nomem, nostack));
    }
}

/// Writes all caches back.
pub(crate) fn wbinvd() {
    // SAFETY: costs time and changes nothing else.
    unsafe { asm!("wbinvd", options(nostack)) };
}

/// Lets NMIs come that an exit has blocked, as the return from an interrupt does. The entry into the guest should; in Bochs
/// 2.7 it does not, nor does it after a SIPI.
pub(crate) fn unblock_nmis() {
    // SAFETY: returns to the next instruction, with the stack as it was.
    unsafe {
        asm!(
            "mov {0}, rsp",
            "push 0x10",
            "push {0}",
            "pushfq",
            "push 8",
            "lea {0}, [rip + 2f]",
            "push {0}",
            "iretq",
            "2:",
            out(reg) _,
        );
    }
}

/// Stops for good.
pub(crate) fn halt() -> ! {
    loop {
        // SAFETY: interrupts are masked; after an NMI it halts again.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Resets the machine: by the chipset, or else by the keyboard controller.
pub(crate) fn reset() -> ! {
    // SAFETY: a reset is what is wanted.
    unsafe {
        outb(0xcf9, 2);
        outb(0xcf9, 6);
        outb(0x64, 0xfe);
    }
    halt()
}
