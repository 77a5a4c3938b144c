//! Accesses to I/O ports that leave the guest: its switch, which is pressed only once all is told, and the hypervisor's own
//! serial port, which the guest does not have.

use vmsight_sim_hypervisor::ept::Table;
use vmsight_sim_hypervisor::ports::{self, Access, SLEEP_ENABLE};

use crate::boot::Registers;
use crate::exits::{Outcome, PROTECTION};
use crate::guest::Hypervisor;
use crate::machine::{port_in, port_out};
use crate::vmcs;

/// Has the ports leave the guest. That which resets the machine by the chipset does not: it lies among those by which PCI
/// is configured, each access to which would leave, too.
pub(crate) fn intercept(bitmaps: &mut [Table; 2], sleep: [u16; 2]) {
    ports::intercept(bitmaps, ports::CHANNEL);
    for port in sleep.into_iter().filter(|&port| port != 0) {
        ports::intercept(bitmaps, port..port.saturating_add(2));
    }
}

pub(crate) fn access(hypervisor: &mut Hypervisor, registers: &mut Registers) -> Outcome {
    let access = Access::new(vmcs::read(vmcs::QUALIFICATION));
    if access.is_string {
        return Outcome::Exception(PROTECTION);
    }
    if access.touches(&ports::CHANNEL) {
        // As where there is no port.
        if access.is_in {
            registers.rax = access.result(registers.rax, u32::MAX);
        }
        return Outcome::Done;
    }
    if access.is_in {
        // SAFETY: the guest's own access, done for it.
        let value = unsafe { port_in(access.port, access.size) };
        registers.rax = access.result(registers.rax, value);
        return Outcome::Done;
    }
    let value = registers.rax as u32;
    // A register of two bytes: the bit is in the second.
    let sleeps = match access.size {
        1 => value << 8 & SLEEP_ENABLE != 0,
        _ => value & SLEEP_ENABLE != 0,
    };
    if sleeps {
        hypervisor.say_last();
    }
    // SAFETY: as above.
    unsafe { port_out(access.port, access.size, value) };
    Outcome::Done
}
