//! What QEMU calls while the guest is translated and executed.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::atomic::Ordering;

use vmsight_arch::{Gpa, Gva};
use vmsight_hooks::{Access, Detail, HookKind, StepEnd};

use super::api::{Block, Instruction, NO_REGISTERS, READS, READS_REGISTERS, WRITES};
use super::front::{self, Front};
use super::guarded;
use super::instruction::{Act, LONGEST, act, is_hooked};
use super::interrupt;
use super::table::{Site, Table, Watch};
use super::tell::Moment;
use crate::guest::UPPER_HALF;

/// A block is being translated.
pub(super) extern "C" fn on_translation(_id: u64, block: Block) {
    guarded(|| {
        if let Some(front) = front::get() {
            let table = front.table();
            if !table.is_empty() {
                translate(front, table, block);
            }
        }
    });
}

fn translate(front: &Front, table: &Table, block: Block) {
    let plugin = &front.plugin;
    let flags: c_int = match front.registers {
        Some(_) => READS_REGISTERS,
        None => NO_REGISTERS,
    };
    // SAFETY: QEMU's block, during its translation; so are all instructions below.
    let count = unsafe { (plugin.instructions)(block) };
    for n in 0..count {
        // SAFETY: as above.
        let instruction = unsafe { (plugin.instruction)(block, n) };
        if instruction.is_null() {
            continue;
        }
        // SAFETY: as above.
        let address = unsafe { (plugin.address)(instruction) };
        let here = address as usize as *mut c_void;
        let executed = |callback| {
            // SAFETY: as above; the function lives as long as the process, and the data is a number.
            unsafe { (plugin.on_execution)(instruction, callback, flags, here) };
        };
        if !table.steps.is_empty() {
            executed(on_step);
        }
        if table.may_be_hooked(address) {
            executed(on_execution);
        }
        if table.decodes()
            && let Some(act) = bytes(front, instruction).and_then(|(bytes, len)| act(bytes.get(..len)?))
        {
            let site = table.site(Site {
                translated: address,
                act,
            });
            // SAFETY: as above; the data lives until the code is thrown away.
            unsafe { (plugin.on_execution)(instruction, on_instruction, flags, site.cast_mut().cast()) };
        }
        if table.accesses.reads {
            // SAFETY: as above; the data is a number.
            unsafe { (plugin.on_access)(instruction, on_read, flags, READS, here) };
        }
        if table.accesses.writes {
            // SAFETY: as above; the data is a number.
            unsafe { (plugin.on_access)(instruction, on_write, flags, WRITES, here) };
        }
    }
}

/// The bytes of an instruction.
fn bytes(front: &Front, instruction: Instruction) -> Option<([u8; LONGEST], usize)> {
    let mut bytes = [0; LONGEST];
    // SAFETY: QEMU's instruction, during its translation. Before version 3 a pointer to the bytes is given,
    // later they are copied.
    unsafe {
        let len = (front.plugin.size)(instruction);
        if len == 0 || len > LONGEST {
            return None;
        }
        let given = (front.plugin.data)(instruction, bytes.as_mut_ptr().cast(), len);
        if front.version < 3 {
            let data = given as *const u8;
            if data.is_null() {
                return None;
            }
            data.copy_to_nonoverlapping(bytes.as_mut_ptr(), len);
        }
        Some((bytes, len))
    }
}

/// The agent, for a callback of a vCPU.
fn with(what: impl FnOnce(&'static Front, &'static Table)) {
    guarded(|| {
        if let Some(front) = front::get() {
            what(front, front.table());
        }
    });
}

/// Where the instruction is that was translated at `translated`. The kernel's is where it was: its code has one
/// address.
fn rip(front: &Front, translated: u64) -> u64 {
    match &front.registers {
        Some(reader) if translated < UPPER_HALF => reader.rip(translated),
        _ => translated,
    }
}

extern "C" fn on_execution(vcpu: c_uint, translated: *mut c_void) {
    with(|front, table| {
        let translated = translated as u64;
        let rip = rip(front, translated);
        let hooks = table.execute.get(&rip).map(Vec::as_slice).unwrap_or_default();
        let ranges = || table.ranges.iter().filter(|r| r.covers(rip, rip));
        let handled = table.interrupts.get(&rip).map(Vec::as_slice).unwrap_or_default();
        if hooks.is_empty() && handled.is_empty() && ranges().next().is_none() {
            return;
        }
        let vcpu = front.vcpu(vcpu);
        let moment = Moment::new(front, vcpu, translated);
        if !handled.is_empty()
            && let Some(registers) = moment.registers()
        {
            for (vector, armed) in handled.iter().filter(|(_, a)| moment.is_in_scope(a)) {
                let detail = interrupt::detail(*vector, registers, |at| front.read_virtual_u64(vcpu, at));
                moment.occur(armed, detail);
            }
        }
        for armed in hooks.iter().filter(|a| moment.is_in_scope(a)) {
            moment.occur(armed, Detail::Execute { rip: Gva(rip) });
        }
        for watch in ranges().filter(|r| moment.is_in_scope(&r.hooked.armed)) {
            let detail = Detail::Memory {
                gva: Some(Gva(rip)),
                gpa: None,
                len: 0,
                access: Access::EXECUTE,
                old: None,
                new: None,
                done: false,
            };
            moment.occur(&watch.hooked.armed, detail);
        }
    });
}

extern "C" fn on_step(vcpu: c_uint, translated: *mut c_void) {
    with(|front, table| {
        let vcpu = front.vcpu(vcpu);
        for (_, hooked) in table.steps.iter().filter(|(index, _)| *index == vcpu) {
            // Only this vCPU's thread counts here.
            let left = hooked.left.load(Ordering::Relaxed);
            if left == 0 {
                continue;
            }
            hooked.left.store(left - 1, Ordering::Relaxed);
            let armed = &hooked.armed;
            let (until, count) = match armed.hook.kind {
                HookKind::Step { count, .. } => (false, count),
                HookKind::StepUntil { most, .. } => (true, most),
                _ => continue,
            };
            // This instruction is still to be executed: at the first call none is.
            let made = count.saturating_sub(left - 1);
            let last = left == 1;
            if !last && (!until || made == 0) {
                continue;
            }
            let translated = translated as u64;
            let moment = Moment::new(front, vcpu, translated);
            let step = |end| Detail::Step {
                rip: Gva(rip(front, translated)),
                made,
                end,
            };
            if !until {
                moment.occur(armed, step(StepEnd::Count));
            } else if moment.is_in_scope(armed) && moment.is_wanted(armed, &step(StepEnd::Condition)) {
                hooked.left.store(0, Ordering::Relaxed);
                moment.tell(armed, step(StepEnd::Condition));
            } else if last {
                moment.tell(armed, step(StepEnd::Count));
            } else {
                continue;
            }
            front.change();
        }
    });
}

extern "C" fn on_instruction(vcpu: c_uint, site: *mut c_void) {
    with(|front, table| {
        // SAFETY: a site of this code, which goes when the code goes, while no vCPU is in it.
        let site = unsafe { *site.cast::<Site>() };
        let vcpu = front.vcpu(vcpu);
        let moment = Moment::new(front, vcpu, site.translated);
        if table.has_interrupts && site.act == Act::DescriptorTable {
            // There may be other gates in a moment: by the time all vCPUs are out of the guest it is done.
            front.change();
        }
        let known = moment.with(site.act.wants(), |r| site.act.detail(r.rip, Some(r)));
        let Some(detail) = known.unwrap_or_else(|| site.act.detail(site.translated, None)) else {
            return;
        };
        for armed in &table.instructions {
            if is_hooked(&armed.hook.kind, &detail) && moment.is_in_scope(armed) {
                moment.occur(armed, detail);
            }
        }
    });
}

extern "C" fn on_read(vcpu: c_uint, info: u32, address: u64, translated: *mut c_void) {
    with(|front, table| accessed(front, table, vcpu, info, address, translated as u64, Access::READ));
}

extern "C" fn on_write(vcpu: c_uint, info: u32, address: u64, translated: *mut c_void) {
    with(|front, table| {
        accessed(
            front,
            table,
            vcpu,
            info,
            address,
            translated as u64,
            Access::WRITE,
        )
    });
}

/// A vCPU has read or written `address`.
fn accessed(
    front: &Front,
    table: &Table,
    vcpu: u32,
    info: u32,
    address: u64,
    translated: u64,
    access: Access,
) {
    // SAFETY: the access that this is the callback of; so are all calls below.
    let len = 1_u64 << unsafe { (front.plugin.size_shift)(info) }.min(6);
    let physical = || {
        // SAFETY: as above.
        unsafe {
            let handle = (front.plugin.hardware_address)(info, address);
            (!handle.is_null()).then(|| (front.plugin.physical)(handle))
        }
    };
    let mut gpa = None;
    let mut at = None;
    for watch in table.memory.iter().filter(|w| w.access.contains(access)) {
        let first = match watch.physical {
            true => match *gpa.get_or_insert_with(physical) {
                Some(gpa) => gpa,
                None => continue,
            },
            false => address,
        };
        if !watch.covers(first, first.saturating_add(len - 1)) {
            continue;
        }
        let moment = at.get_or_insert_with(|| Moment::new(front, front.vcpu(vcpu), translated));
        if !moment.is_in_scope(&watch.hooked.armed) {
            continue;
        }
        let new = value(front, info, len);
        let detail = Detail::Memory {
            gva: Some(Gva(address)),
            // Where QEMU counts in its own memory, it is the guest's address only where a hook is that can be.
            gpa: match watch.physical || front.values.is_some() {
                true => gpa.get_or_insert_with(physical).map(Gpa),
                false => None,
            },
            len: u8::try_from(len).unwrap_or(0),
            access,
            old: match access {
                Access::WRITE => new.and_then(|new| before(watch, first, len, new)),
                _ => new,
            },
            new,
            done: true,
        };
        moment.occur(&watch.hooked.armed, detail);
    }
}

/// What was read or written, where QEMU gives it, of up to 8 bytes.
fn value(front: &Front, info: u32, len: u64) -> Option<u64> {
    let values = front.values?;
    if len > 8 {
        return None;
    }
    // SAFETY: the access whose callback this is.
    let value = unsafe { (values.get)(info) };
    Some(value.low & (u64::MAX >> (64 - 8 * len)))
}

/// What was there before a write.
fn before(watch: &Watch, first: u64, len: u64, new: u64) -> Option<u64> {
    let shadow = watch.hooked.shadow.as_ref()?;
    shadow.replace(first, u8::try_from(len).ok()?, new)
}
