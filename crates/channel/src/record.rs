//! An event with its registers as a fixed number of words.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmsight_arch::{Gpa, Gva, Registers, Segment, TableRegister};
use vmsight_hooks::{Access, ControlRegister, Detail, Event, HookId, StepEnd};

use crate::ChannelError;

/// Words of 8 bytes of a record.
pub const RECORD_WORDS: usize = 64;

/// Where things lie in a record.
mod at {
    pub(super) const SEQUENCE: usize = 0;
    /// Nanoseconds since 1970.
    pub(super) const TIME: usize = 1;
    /// vCPU 31:0, hook 63:32.
    pub(super) const WHO: usize = 2;
    /// Kind of detail 7:0, access 15:8, which values there are 23:16, held 24, done 25, length 47:40, register 55:48.
    pub(super) const KIND: usize = 3;
    /// Four values, by kind.
    pub(super) const VALUES: usize = 4;
    /// General-purpose registers, RIP, RFLAGS.
    pub(super) const GPRS: usize = 8;
    pub(super) const RIP: usize = 24;
    pub(super) const RFLAGS: usize = 25;
    /// Eight segments, two words each: the base; selector 15:0, attributes 31:16, limit 63:32.
    pub(super) const SEGMENTS: usize = 26;
    pub(super) const GDT: usize = 42;
    pub(super) const IDT: usize = 43;
    /// GDT's limit 15:0, IDT's 31:16.
    pub(super) const LIMITS: usize = 44;
    /// CR0, CR2, CR3, CR4, EFER.
    pub(super) const CONTROL: usize = 45;
}

/// Kinds of details.
mod kind {
    pub(super) const EXECUTE: u8 = 1;
    pub(super) const MEMORY: u8 = 2;
    pub(super) const CONTROL_REGISTER: u8 = 3;
    pub(super) const MSR: u8 = 4;
    pub(super) const INTERRUPT: u8 = 5;
    pub(super) const STEP: u8 = 6;
    pub(super) const PORT: u8 = 7;
    pub(super) const CPUID: u8 = 8;
    pub(super) const HYPERCALL: u8 = 9;
    pub(super) const DESCRIPTOR_TABLE: u8 = 10;
}

/// An event and its registers, in the form in which they cross.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    words: [u64; RECORD_WORDS],
}

/// Writes words by index; an index out of range is none of ours.
struct Words([u64; RECORD_WORDS]);

impl Words {
    fn set(&mut self, index: usize, value: u64) {
        if let Some(word) = self.0.get_mut(index) {
            *word = value;
        }
    }

    fn get(&self, index: usize) -> u64 {
        self.0.get(index).copied().unwrap_or(0)
    }
}

/// A detail taken apart.
#[derive(Default)]
struct Parts {
    kind: u8,
    access: u8,
    /// Which of the values are there.
    there: u8,
    done: bool,
    len: u8,
    register: u8,
    values: [u64; 4],
}

impl Parts {
    fn value(mut self, index: u8, value: Option<u64>) -> Self {
        if let (Some(value), Some(slot)) = (value, self.values.get_mut(usize::from(index))) {
            *slot = value;
            self.there |= 1 << index;
        }
        self
    }

    fn optional(&self, index: u8) -> Option<u64> {
        (self.there >> index & 1 != 0).then(|| self.some(index))
    }

    fn some(&self, index: u8) -> u64 {
        self.values.get(usize::from(index)).copied().unwrap_or(0)
    }

    fn of(detail: &Detail) -> Option<Self> {
        let kind = |kind| Self {
            kind,
            ..Self::default()
        };
        Some(match *detail {
            Detail::Execute { rip } => kind(kind::EXECUTE).value(0, Some(rip.0)),
            Detail::Memory {
                gva,
                gpa,
                len,
                access,
                old,
                new,
                done,
            } => Self {
                access: access.bits(),
                done,
                len,
                ..kind(kind::MEMORY)
            }
            .value(0, gva.map(|a| a.0))
            .value(1, gpa.map(|a| a.0))
            .value(2, old)
            .value(3, new),
            Detail::ControlRegister {
                register,
                access,
                old,
                new,
            } => Self {
                access: access.bits(),
                register: number_of(register),
                ..kind(kind::CONTROL_REGISTER)
            }
            .value(2, old)
            .value(3, new),
            Detail::Msr {
                index,
                access,
                old,
                new,
            } => Self {
                access: access.bits(),
                ..kind(kind::MSR)
            }
            .value(0, Some(index.into()))
            .value(2, old)
            .value(3, new),
            Detail::Interrupt {
                vector,
                error_code,
                cr2,
                rip,
            } => Self {
                register: vector,
                ..kind(kind::INTERRUPT)
            }
            .value(0, Some(rip.0))
            .value(1, error_code.map(u64::from))
            .value(2, cr2),
            Detail::Step { rip, made, end } => Self {
                register: number_of_end(end),
                ..kind(kind::STEP)
            }
            .value(0, Some(rip.0))
            .value(1, Some(made)),
            Detail::Port {
                port,
                access,
                len,
                value,
            } => Self {
                access: access.bits(),
                len,
                ..kind(kind::PORT)
            }
            .value(0, Some(port.into()))
            .value(3, value.map(u64::from)),
            Detail::Cpuid { leaf, subleaf } => kind(kind::CPUID)
                .value(0, Some(leaf.into()))
                .value(1, Some(subleaf.into())),
            Detail::Hypercall { number } => kind(kind::HYPERCALL).value(0, Some(number)),
            Detail::DescriptorTable { rip } => kind(kind::DESCRIPTOR_TABLE).value(0, Some(rip.0)),
            // A kind that this side does not know yet is none that it makes.
            _ => return None,
        })
    }

    fn detail(&self) -> Option<Detail> {
        let access = Access::from_bits(self.access)?;
        let rip = Gva(self.some(0));
        Some(match self.kind {
            kind::EXECUTE => Detail::Execute { rip },
            kind::MEMORY => Detail::Memory {
                gva: self.optional(0).map(Gva),
                gpa: self.optional(1).map(Gpa),
                len: self.len,
                access,
                old: self.optional(2),
                new: self.optional(3),
                done: self.done,
            },
            kind::CONTROL_REGISTER => Detail::ControlRegister {
                register: register_of(self.register)?,
                access,
                old: self.optional(2),
                new: self.optional(3),
            },
            kind::MSR => Detail::Msr {
                index: u32::try_from(self.some(0)).ok()?,
                access,
                old: self.optional(2),
                new: self.optional(3),
            },
            kind::INTERRUPT => Detail::Interrupt {
                vector: self.register,
                error_code: match self.optional(1) {
                    Some(code) => Some(u32::try_from(code).ok()?),
                    None => None,
                },
                cr2: self.optional(2),
                rip,
            },
            kind::STEP => Detail::Step {
                rip,
                made: self.some(1),
                end: end_of(self.register)?,
            },
            kind::PORT => Detail::Port {
                port: u16::try_from(self.some(0)).ok()?,
                access,
                len: self.len,
                value: match self.optional(3) {
                    Some(value) => Some(u32::try_from(value).ok()?),
                    None => None,
                },
            },
            kind::CPUID => Detail::Cpuid {
                leaf: u32::try_from(self.some(0)).ok()?,
                subleaf: u32::try_from(self.some(1)).ok()?,
            },
            kind::HYPERCALL => Detail::Hypercall { number: self.some(0) },
            kind::DESCRIPTOR_TABLE => Detail::DescriptorTable { rip },
            _ => return None,
        })
    }
}

/// CR0 CR3 CR4 CR8 XCR0 DR6 DR7, and DR0 to DR3 from 16 on.
fn number_of(register: ControlRegister) -> u8 {
    match register {
        ControlRegister::Cr0 => 0,
        ControlRegister::Cr3 => 3,
        ControlRegister::Cr4 => 4,
        ControlRegister::Cr8 => 8,
        ControlRegister::Xcr0 => 9,
        ControlRegister::Dr(n) => 16 + (n & 3),
        ControlRegister::Dr6 => 22,
        ControlRegister::Dr7 => 23,
    }
}

fn register_of(number: u8) -> Option<ControlRegister> {
    Some(match number {
        0 => ControlRegister::Cr0,
        3 => ControlRegister::Cr3,
        4 => ControlRegister::Cr4,
        8 => ControlRegister::Cr8,
        9 => ControlRegister::Xcr0,
        16..=19 => ControlRegister::Dr(number - 16),
        22 => ControlRegister::Dr6,
        23 => ControlRegister::Dr7,
        _ => return None,
    })
}

fn number_of_end(end: StepEnd) -> u8 {
    match end {
        StepEnd::Count => 0,
        StepEnd::Condition => 1,
        StepEnd::Sleep => 2,
    }
}

fn end_of(number: u8) -> Option<StepEnd> {
    let all = [StepEnd::Count, StepEnd::Condition, StepEnd::Sleep];
    all.into_iter().find(|end| number_of_end(*end) == number)
}

impl Record {
    /// An event with its registers; `None` for a kind of event that has no form here.
    pub fn new(event: &Event, registers: &Registers) -> Option<Self> {
        let parts = Parts::of(&event.detail)?;
        let mut words = Words([0; RECORD_WORDS]);
        let time = event.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        words.set(at::SEQUENCE, event.sequence);
        words.set(at::TIME, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        words.set(at::WHO, u64::from(event.vcpu) | u64::from(event.hook.0) << 32);
        words.set(
            at::KIND,
            u64::from(parts.kind)
                | u64::from(parts.access) << 8
                | u64::from(parts.there) << 16
                | u64::from(event.held) << 24
                | u64::from(parts.done) << 25
                | u64::from(parts.len) << 40
                | u64::from(parts.register) << 48,
        );
        for (i, value) in parts.values.into_iter().enumerate() {
            words.set(at::VALUES + i, value);
        }
        let r = registers;
        for (i, value) in r.gprs.into_iter().enumerate() {
            words.set(at::GPRS + i, value);
        }
        words.set(at::RIP, r.rip);
        words.set(at::RFLAGS, r.rflags);
        let segments = [r.cs, r.ss, r.ds, r.es, r.fs, r.gs, r.ldt, r.tr];
        for (i, segment) in segments.into_iter().enumerate() {
            let rest = u64::from(segment.selector)
                | u64::from(segment.attributes) << 16
                | u64::from(segment.limit) << 32;
            words.set(at::SEGMENTS + 2 * i, segment.base);
            words.set(at::SEGMENTS + 2 * i + 1, rest);
        }
        words.set(at::GDT, r.gdt.base.0);
        words.set(at::IDT, r.idt.base.0);
        words.set(at::LIMITS, u64::from(r.gdt.limit) | u64::from(r.idt.limit) << 16);
        for (i, value) in [r.cr0, r.cr2, event.cr3, r.cr4, r.efer].into_iter().enumerate() {
            words.set(at::CONTROL + i, value);
        }
        Some(Self { words: words.0 })
    }

    /// A record as it came.
    pub fn from_words(words: [u64; RECORD_WORDS]) -> Self {
        Self { words }
    }

    /// Its words.
    pub fn words(&self) -> &[u64; RECORD_WORDS] {
        &self.words
    }

    /// The number of its event.
    pub fn sequence(&self) -> u64 {
        Words(self.words).get(at::SEQUENCE)
    }

    /// The event and the registers in it. `vcpu` is the one whose ring it came from.
    ///
    /// # Errors
    /// Where it makes no sense.
    pub fn read(&self, vcpu: u32) -> Result<(Event, Registers), ChannelError> {
        let words = Words(self.words);
        let get = |index| words.get(index);
        let who = get(at::WHO);
        if who as u32 != vcpu {
            return Err(ChannelError::Shared("an event in another vCPU's ring"));
        }
        let flags = get(at::KIND);
        let parts = Parts {
            kind: flags as u8,
            access: (flags >> 8) as u8,
            there: (flags >> 16) as u8,
            done: flags >> 25 & 1 != 0,
            len: (flags >> 40) as u8,
            register: (flags >> 48) as u8,
            values: [0, 1, 2, 3].map(|i| get(at::VALUES + i)),
        };
        let detail = parts
            .detail()
            .ok_or(ChannelError::Shared("an event of no known kind"))?;
        let segment = |i: usize| {
            let rest = get(at::SEGMENTS + 2 * i + 1);
            Segment {
                base: get(at::SEGMENTS + 2 * i),
                selector: rest as u16,
                attributes: (rest >> 16) as u16,
                limit: (rest >> 32) as u32,
            }
        };
        let limits = get(at::LIMITS);
        let mut gprs = [0; 16];
        for (i, value) in gprs.iter_mut().enumerate() {
            *value = get(at::GPRS + i);
        }
        let registers = Registers {
            vcpu,
            gprs,
            rip: get(at::RIP),
            rflags: get(at::RFLAGS),
            cs: segment(0),
            ss: segment(1),
            ds: segment(2),
            es: segment(3),
            fs: segment(4),
            gs: segment(5),
            ldt: segment(6),
            tr: segment(7),
            gdt: TableRegister {
                base: Gva(get(at::GDT)),
                limit: limits as u16,
            },
            idt: TableRegister {
                base: Gva(get(at::IDT)),
                limit: (limits >> 16) as u16,
            },
            cr0: get(at::CONTROL),
            cr2: get(at::CONTROL + 1),
            cr3: get(at::CONTROL + 2),
            cr4: get(at::CONTROL + 3),
            efer: get(at::CONTROL + 4),
            ..Registers::default()
        };
        let event = Event {
            sequence: get(at::SEQUENCE),
            time: UNIX_EPOCH
                .checked_add(Duration::from_nanos(get(at::TIME)))
                .unwrap_or(SystemTime::UNIX_EPOCH),
            vcpu,
            hook: HookId((who >> 32) as u32),
            cr3: registers.cr3,
            detail,
            held: flags >> 24 & 1 != 0,
        };
        Ok((event, registers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> Registers {
        let mut gprs = [0; 16];
        for (i, gpr) in gprs.iter_mut().enumerate() {
            *gpr = 0x1000 + i as u64;
        }
        let segment = |n: u16| Segment {
            selector: n,
            base: 0xffff_0000_0000_0000 | u64::from(n),
            limit: 0xffff_ffff,
            attributes: 0xa09b + n,
        };
        Registers {
            vcpu: 3,
            gprs,
            rip: 0xffff_ffff_8100_0000,
            rflags: 0x246,
            cs: segment(1),
            ss: segment(2),
            ds: segment(3),
            es: segment(4),
            fs: segment(5),
            gs: segment(6),
            ldt: segment(7),
            tr: segment(8),
            gdt: TableRegister {
                base: Gva(0xfffe_0000),
                limit: 127,
            },
            idt: TableRegister {
                base: Gva(0xfffe_1000),
                limit: 4095,
            },
            cr0: 0x8005_0033,
            cr2: 0x1234,
            cr3: 0x5678_9000,
            cr4: 0x3506f0,
            efer: 0xd01,
            ..Registers::default()
        }
    }

    fn details() -> Vec<Detail> {
        let write = Access::WRITE;
        vec![
            Detail::Execute { rip: Gva(u64::MAX) },
            Detail::Memory {
                gva: None,
                gpa: Some(Gpa(0x1000)),
                len: 8,
                access: write,
                old: Some(0),
                new: Some(u64::MAX),
                done: true,
            },
            Detail::Memory {
                gva: Some(Gva(0)),
                gpa: None,
                len: 1,
                access: Access::READ,
                old: None,
                new: None,
                done: false,
            },
            Detail::ControlRegister {
                register: ControlRegister::Dr(3),
                access: write,
                old: None,
                new: Some(1),
            },
            Detail::Msr {
                index: 0xc000_0082,
                access: write,
                old: Some(1),
                new: Some(2),
            },
            Detail::Interrupt {
                vector: 14,
                error_code: Some(0),
                cr2: Some(0xdead),
                rip: Gva(5),
            },
            Detail::Step {
                rip: Gva(7),
                made: 3,
                end: StepEnd::Count,
            },
            Detail::Step {
                rip: Gva(u64::MAX),
                made: u64::MAX,
                end: StepEnd::Condition,
            },
            Detail::Port {
                port: 0xffff,
                access: write,
                len: 4,
                value: Some(u32::MAX),
            },
            Detail::Cpuid {
                leaf: 0x8000_0000,
                subleaf: 1,
            },
            Detail::Hypercall { number: 9 },
            Detail::DescriptorTable { rip: Gva(8) },
        ]
    }

    #[test]
    fn every_event_survives_the_way() {
        for (n, detail) in details().into_iter().enumerate() {
            let event = Event {
                sequence: n as u64,
                time: UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789),
                vcpu: 3,
                hook: HookId(u32::MAX),
                cr3: registers().cr3,
                detail,
                held: n % 2 == 0,
            };
            let record = Record::new(&event, &registers()).unwrap();
            let (read, read_registers) = record.read(3).unwrap();
            assert_eq!(format!("{read:?}"), format!("{event:?}"));
            assert_eq!(read_registers, registers());
            assert!(record.read(2).is_err(), "another vCPU's");
        }
    }

    #[test]
    fn hostile_records_are_errors_or_events() {
        let mut x = 0x9e37_79b9_7f4a_7c15_u64;
        let (mut errors, mut events) = (0, 0);
        for _ in 0..20_000 {
            let mut words = [0; RECORD_WORDS];
            for word in &mut words {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                *word = x;
            }
            if x & 1 == 0 {
                words[at::WHO] &= !0xffff_ffff;
                words[at::KIND] = words[at::KIND] & !0xffff | x >> 8 & 0x70f;
            }
            match Record::from_words(words).read(0) {
                Ok(_) => events += 1,
                Err(_) => errors += 1,
            }
        }
        assert!(errors > 1000 && events > 1000, "{errors} {events}");
    }
}
