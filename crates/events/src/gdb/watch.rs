//! Watchpoints: what was accessed, and who else accessed something at the same moment.

use std::time::{Duration, Instant};

use vmsight_arch::{Dtb, Gva, Registers};
use vmsight_hooks::{Access, Detail, HookId};
use vmsight_target::gdb::{Accelerator, Cause, GdbError, Point, WatchKind};

use super::instruction::{self, Accessed};
use super::occasion::{Occasion, Tell, Undo};
use super::of_stub;
use super::table::{Armed, Kept};
use super::worker::Worker;
use crate::EventError;

/// How long a vCPU may take to meet the breakpoint where it stands: longer only where an interrupt comes first.
const PROBE: Duration = Duration::from_millis(50);

/// A watchpoint that a vCPU met.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hit {
    pub(super) registers: Registers,
    pub(super) kind: WatchKind,
    pub(super) address: u64,
}

impl Worker {
    /// The vCPUs other than `told` that met a watchpoint of which QEMU did not tell.
    pub(super) fn pending(&mut self, told: Option<u32>) -> Result<Vec<Hit>, EventError> {
        let mut hits = Vec::new();
        // Under KVM the debug registers would have to be free for it.
        if !self.table.watches() || self.debug.accelerator() != Accelerator::Tcg {
            return Ok(hits);
        }
        for vcpu in 0..self.debug.vcpus() {
            if told != Some(vcpu) {
                hits.extend(self.probe(vcpu)?);
            }
        }
        Ok(hits)
    }

    /// Lets one vCPU go on against a breakpoint where it stands. It executes nothing, and QEMU tells what it owes.
    pub(super) fn probe(&mut self, vcpu: u32) -> Result<Option<Hit>, EventError> {
        // One that sleeps would not wake, and owes nothing: it has executed HLT since.
        if self.debug.is_halted(vcpu).map_err(of_stub)? {
            return Ok(None);
        }
        let registers = self.debug.registers(vcpu).map_err(of_stub)?;
        let rip = registers.rip;
        let ours = !self.table.breaks(rip);
        if ours {
            self.debug
                .insert(vcpu, Point::Software, rip, 1)
                .map_err(of_stub)?;
        }
        self.debug.resume_one(vcpu).map_err(of_stub)?;
        let stop = match self.debug.wait_stop(Instant::now() + PROBE).map_err(of_stub)? {
            Some(stop) => Some(stop),
            None => {
                let stops = self.debug.interrupt().map_err(of_stub)?;
                stops.into_iter().find(|stop| stop.cause != Cause::Paused)
            }
        };
        if ours {
            self.debug
                .remove(vcpu, Point::Software, rip, 1)
                .map_err(of_stub)?;
        }
        match stop.map(|stop| stop.cause) {
            Some(Cause::Watch { kind, address }) => {
                let registers = self.debug.registers(vcpu).map_err(of_stub)?;
                Ok(Some(Hit {
                    registers,
                    kind,
                    address,
                }))
            }
            // Its owner was quicker.
            Some(Cause::Paused) => {
                self.pause = true;
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    /// What these hits mean for the hooks. All of them are of one stop; each of its vCPU gets an occasion.
    pub(super) fn accesses(&mut self, hits: &[Hit]) -> Result<Vec<Occasion>, EventError> {
        let mut occasions: Vec<Occasion> = hits.iter().map(|hit| Occasion::new(hit.registers)).collect();
        let mut located = Vec::new();
        for hit in hits {
            located.push(self.locate(hit)?);
        }
        for (id, start, len, wanted) in self.table.memory() {
            let Some(armed) = self.table.hooks.get(&id) else {
                continue;
            };
            let (kept, scope) = (armed.keeps(), armed.hook.scope);
            // The same address is other memory in another address space: each has a turn of its own.
            let mut spaces: Vec<(Option<Dtb>, Vec<usize>)> = Vec::new();
            for (i, hit) in hits.iter().enumerate() {
                if !scope.covers(hit.registers.cr3) {
                    continue;
                }
                let space = Armed::space(start, hit.registers.cr3);
                match spaces.iter_mut().find(|(known, _)| *known == space) {
                    Some((_, those)) => those.push(i),
                    None => spaces.push((space, vec![i])),
                }
            }
            for (_, those) in spaces {
                let Some(first) = those.first().and_then(|i| hits.get(*i)) else {
                    continue;
                };
                let now = match kept {
                    true => self.bytes_now(&first.registers, start, len)?,
                    false => None,
                };
                let before = self.table.hooks.get(&id).and_then(|armed| armed.before.clone());
                // What another address space held says nothing of this one.
                let before = before.filter(|b| now.as_ref().is_some_and(|n| n.dtb == b.dtb));
                let changed = changes(before.as_ref(), now.as_ref());
                let mine: Vec<Mine> = those
                    .iter()
                    .filter_map(|&i| {
                        let located = *located.get(i)?;
                        let access = meets(hits.get(i)?, located, (start, len, wanted), changed)?;
                        Some((i, access, place(located, start, len)))
                    })
                    .collect();
                // Where nobody else was at it, it is what changed.
                let mine: Vec<Mine> = match mine[..] {
                    [(i, access, None)] => vec![(i, access, changed_place(start, len, changed))],
                    _ => mine,
                };
                for (order, (i, access, location)) in mine.iter().enumerate() {
                    let (before_it, behind_it) = mine.split_at(order);
                    let alone = Alone {
                        first: !before_it.iter().any(|(.., other)| overlap(*location, *other)),
                        last: !behind_it
                            .iter()
                            .skip(1)
                            .any(|(.., other)| overlap(*location, *other)),
                    };
                    let tell = tell(
                        id,
                        *access,
                        *location,
                        start,
                        before.as_ref(),
                        now.as_ref(),
                        alone,
                    );
                    if let Some(occasion) = occasions.get_mut(*i) {
                        occasion.tell.push_back(tell);
                    }
                }
                if let (Some(armed), Some(now)) = (self.table.hooks.get_mut(&id), now) {
                    armed.before = Some(now);
                }
            }
        }
        Ok(occasions)
    }

    /// The bytes of a hook's memory now, as a vCPU sees them; `None` where it does not.
    pub(super) fn bytes_now(
        &mut self,
        registers: &Registers,
        start: u64,
        len: u64,
    ) -> Result<Option<Kept>, EventError> {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        match self.debug.read(registers.vcpu, start, &mut bytes) {
            Ok(()) => Ok(Some(Kept {
                dtb: Armed::space(start, registers.cr3),
                bytes,
            })),
            Err(GdbError::Refused { .. }) => Ok(None),
            Err(error) => Err(of_stub(error)),
        }
    }

    /// The access itself, as the instruction behind the vCPU tells.
    fn locate(&mut self, hit: &Hit) -> Result<Option<Accessed>, EventError> {
        let range = self
            .table
            .places
            .keys()
            .find(|place| place.is_watch() && place.address == hit.address);
        let Some(len) = range.map(|place| place.len) else {
            return Ok(None);
        };
        let bits = self.bits(&hit.registers)?;
        let registers = &hit.registers;
        if let Some(behind) = self.code_before(registers, registers.rip)? {
            let ahead = self.code(registers)?;
            let code = (behind.as_slice(), ahead.as_slice());
            let found = |access| instruction::accessed(code, registers, bits, (hit.address, len), access);
            let found = match hit.kind {
                WatchKind::Write => found(Access::WRITE),
                WatchKind::Read => found(Access::READ),
                WatchKind::Access => found(Access::WRITE).or_else(|| found(Access::READ)),
            };
            if found.is_some() {
                return Ok(found);
            }
        }
        // A call has written where it returns to, and is not behind us.
        let rsp = registers.rsp();
        if bits != 64 || hit.kind == WatchKind::Read || rsp.wrapping_sub(hit.address) >= len {
            return Ok(None);
        }
        let Some(stack) = self.bytes_now(registers, rsp, 8)? else {
            return Ok(None);
        };
        let returns = stack.bytes.try_into().map(u64::from_le_bytes).unwrap_or_default();
        let code = self.code_before(registers, returns)?;
        let called = code.is_some_and(|code| instruction::ends_with_call(&code, bits));
        Ok(called.then_some(Accessed {
            address: rsp,
            len: 8,
            access: Access::WRITE,
        }))
    }

    /// The bytes in front of an instruction, as many as the longest one may have.
    fn code_before(&mut self, registers: &Registers, rip: u64) -> Result<Option<Vec<u8>>, EventError> {
        let len = instruction::MAX_LEN as u64;
        let kept = self.bytes_now(registers, rip.wrapping_sub(len), len)?;
        Ok(kept.map(|kept| kept.bytes))
    }
}

/// Which hit it is, what it did, and to which bytes.
type Mine = (usize, Access, Option<(u64, u64)>);

/// Whether two accesses may have touched the same bytes.
fn overlap(one: Option<(u64, u64)>, other: Option<(u64, u64)>) -> bool {
    match (one, other) {
        (Some((a, a_len)), Some((b, b_len))) => a.wrapping_sub(b) < b_len || b.wrapping_sub(a) < a_len,
        _ => true,
    }
}

/// Where the order of hits of one moment is not known, only the first can have found the old value and only the
/// last have left the new one.
#[derive(Clone, Copy)]
struct Alone {
    first: bool,
    last: bool,
}

/// First and last byte that changed, from the start of the range.
fn changes(before: Option<&Kept>, now: Option<&Kept>) -> Option<(u64, u64)> {
    let (before, now) = (before?, now?);
    let differs = |(a, b): (&u8, &u8)| a != b;
    let first = before.bytes.iter().zip(&now.bytes).position(differs)?;
    let last = before.bytes.iter().zip(&now.bytes).rposition(differs)?;
    Some((first as u64, last as u64))
}

/// Whether a hit is one of the hook's, and as what.
fn meets(
    hit: &Hit,
    located: Option<Accessed>,
    (start, len, wanted): (u64, u64, Access),
    changed: Option<(u64, u64)>,
) -> Option<Access> {
    let exact = hit.address == start;
    let touches = match located {
        Some(accessed) => {
            accessed.address.wrapping_sub(start) < len || start.wrapping_sub(accessed.address) < accessed.len
        }
        // QEMU names one of the watchpoints that were met.
        None => exact || changed.is_some(),
    };
    if !touches {
        return None;
    }
    let wrote = match hit.kind {
        WatchKind::Write => true,
        // An instruction that reads and then writes is told as a read.
        WatchKind::Read | WatchKind::Access => changed.is_some(),
    };
    match (
        wrote,
        wanted.contains(Access::WRITE),
        wanted.contains(Access::READ),
    ) {
        (true, true, _) => Some(Access::WRITE),
        (_, _, true) if hit.kind != WatchKind::Write => Some(Access::READ),
        _ => None,
    }
}

/// Which bytes the event names: a hook of up to 8 bytes as a whole; else what the instruction accessed.
fn place(located: Option<Accessed>, start: u64, len: u64) -> Option<(u64, u64)> {
    if len <= 8 {
        return Some((start, len));
    }
    let accessed = located.filter(|a| a.len <= 8 && a.address >= start)?;
    let room = len - accessed.address.wrapping_sub(start).min(len);
    Some((accessed.address, accessed.len.min(room)))
}

/// The aligned 8 bytes where the first change is.
fn changed_place(start: u64, len: u64, changed: Option<(u64, u64)>) -> Option<(u64, u64)> {
    let (first, _) = changed?;
    let at = (start.wrapping_add(first) & !7).max(start);
    let room = len - at.wrapping_sub(start).min(len);
    Some((at, room.min(8)))
}

fn tell(
    id: HookId,
    access: Access,
    location: Option<(u64, u64)>,
    start: u64,
    before: Option<&Kept>,
    now: Option<&Kept>,
    alone: Alone,
) -> Tell {
    let slice = |kept: &Kept| -> Option<Vec<u8>> {
        let (at, len) = location?;
        let from = usize::try_from(at.wrapping_sub(start)).ok()?;
        let to = from.checked_add(usize::try_from(len).ok()?)?;
        kept.bytes.get(from..to).map(<[u8]>::to_vec)
    };
    let value = |bytes: &Vec<u8>| {
        let mut all = [0; 8];
        all.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(u64::from_le_bytes(all))
    };
    let old = before.and_then(slice);
    let new = now.and_then(slice);
    let undo = match (access, location, alone.first && alone.last) {
        (Access::WRITE, Some((address, _)), true) => old.clone().map(|bytes| Undo { address, bytes }),
        _ => None,
    };
    Tell {
        hook: id,
        detail: Detail::Memory {
            gva: location.map(|(at, _)| Gva(at)),
            gpa: None,
            len: location.map_or(0, |(_, len)| u8::try_from(len).unwrap_or(0)),
            access,
            old: old.as_ref().filter(|_| alone.first).and_then(value),
            new: new.as_ref().filter(|_| alone.last).and_then(value),
            done: true,
        },
        undo,
        passed: false,
    }
}
