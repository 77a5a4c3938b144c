use std::time::Instant;

use vmsight_arch::paging::TableMemory;
use vmsight_arch::{Dtb, Gpa, Gva, Registers, Segment};

use super::*;
use crate::event::{Counts, Detail};
use crate::hook::Access;
use crate::verdict::Register;

/// Four pages at physical 0; the page tables map virtual pages 0x10 to 0x12 to 1, 2 and 3, and nothing else: the
/// kernel's root in both halves of the address space, the user's only in the lower one.
struct Memory(Vec<u8>);

const TABLES: u64 = 0x10_0000;

impl Memory {
    fn new() -> Self {
        Self(vec![0; 4 << 12])
    }

    fn put(&mut self, gva: u64, bytes: &[u8]) {
        let at = (gva - 0xf000) as usize;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

impl TableMemory for Memory {
    fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
        let entry = match gpa.0.checked_sub(TABLES)? {
            0 | 0xff8 | 0x1000 => (TABLES + 0x2000) | 7,
            0x2000 => (TABLES + 0x3000) | 7,
            0x3000 => (TABLES + 0x4000) | 7,
            at @ 0x4080..0x4098 => ((at - 0x4080) / 8 + 1) << 12 | 7,
            _ => 0,
        };
        Some(entry)
    }

    fn entry_u32(&self, _: Gpa) -> Option<u32> {
        None
    }
}

impl FilterMemory for Memory {
    fn read_physical(&self, gpa: Gpa, out: &mut [u8]) -> bool {
        let from = gpa.0 as usize;
        let there = self.0.get(from..from + out.len());
        there.is_some_and(|bytes| {
            out.copy_from_slice(bytes);
            true
        })
    }

    fn kernel_gs_base(&self) -> Option<u64> {
        Some(0x1_0100)
    }
}

fn registers() -> Registers {
    let mut registers = Registers {
        vcpu: 3,
        rip: 0x1234,
        cr0: 0x8000_0001,
        cr3: TABLES,
        cr4: 0x20,
        efer: 0x500,
        ..Registers::default()
    };
    registers.gs = Segment {
        base: 0x1_0000,
        ..Segment::default()
    };
    for (i, gpr) in registers.gprs.iter_mut().enumerate() {
        *gpr = 100 + i as u64;
    }
    registers
}

const DETAIL: Detail = Detail::Memory {
    gva: Some(Gva(0x5000)),
    gpa: None,
    len: 4,
    access: Access::WRITE,
    old: Some(1),
    new: Some(2),
    done: false,
};

fn truth_of(condition: &Condition, registers: &Registers, memory: &Memory) -> Truth {
    let program = condition.compile().unwrap();
    // Whatever crosses is the same afterwards.
    let again = Program::from_bytes(&program.to_bytes()).unwrap();
    assert_eq!(again, program);
    let moment = Moment {
        registers,
        detail: &DETAIL,
    };
    let truth = again.truth(moment, memory);
    assert_eq!(
        (!condition.clone()).compile().unwrap().truth(moment, memory),
        !truth
    );
    truth
}

fn truth(condition: &Condition) -> Truth {
    truth_of(condition, &registers(), &Memory::new())
}

fn rax() -> Value {
    Register::RAX.into()
}

#[test]
fn numbers_are_compared_without_a_sign() {
    assert_eq!(truth(&rax().is(100)), Truth::True);
    assert_eq!(truth(&rax().is_not(100)), Truth::False);
    assert_eq!(truth(&rax().is_below(100)), Truth::False);
    assert_eq!(truth(&rax().is_at_most(100)), Truth::True);
    assert_eq!(truth(&rax().is_below(u64::MAX)), Truth::True);
    assert_eq!(truth(&Value::from(Register::Gpr(15)).is(115)), Truth::True);
    assert_eq!(truth(&rax().is_one_of([1, 100, 5])), Truth::True);
    assert_eq!(truth(&rax().is_one_of([1, 5])), Truth::False);
    assert_eq!(truth(&rax().is_one_of([])), Truth::False);
    assert_eq!(truth(&Value::from(Field::Gpa).is_one_of([0])), Truth::Unknown);
    assert!(rax().is_one_of(0..256).compile().is_err());
    // 100 is 0x64.
    assert_eq!(truth(&rax().masked(0xf).plus(u64::MAX).is(3)), Truth::True);
    let combined = |what, b: u64| Value::Combined(Box::new(rax()), what, Box::new(b.into()));
    assert_eq!(truth(&combined(Arithmetic::ShiftLeft, 64).is(0)), Truth::True);
    assert_eq!(truth(&combined(Arithmetic::ShiftRight, 2).is(25)), Truth::True);
    assert_eq!(
        truth(&combined(Arithmetic::ShiftRight, u64::MAX).is(0)),
        Truth::True
    );
    assert_eq!(
        truth(&combined(Arithmetic::Subtract, 101).is(u64::MAX)),
        Truth::True
    );
    assert_eq!(truth(&combined(Arithmetic::Xor, 100).is(0)), Truth::True);
    assert_eq!(truth(&combined(Arithmetic::Or, 1).is(101)), Truth::True);
}

#[test]
fn fields_are_the_vcpus_and_the_events() {
    let is = |field, n: u64| truth(&Value::from(field).is(n));
    for (field, n) in [
        (Field::Register(Register::Rip), 0x1234),
        (Field::Vcpu, 3),
        (Field::GsBase, 0x1_0000),
        (Field::New, 2),
        (Field::Old, 1),
        (Field::Gva, 0x5000),
        (Field::Length, 4),
        (Field::Cpl, 0),
        (Field::PerCpu, 0x1_0000),
    ] {
        assert_eq!(is(field, n), Truth::True, "{field:?}");
        assert_eq!(is(field, n + 1), Truth::False, "{field:?}");
    }
    for absent in [Field::Gpa, Field::ErrorCode, Field::Index] {
        assert_eq!(is(absent, 0), Truth::Unknown, "{absent:?}");
    }
    let mut user = registers();
    user.cs.selector = 0x33;
    user.ss.selector = 0x2b;
    user.ss.attributes = 3 << 5;
    user.cs.attributes = 3 << 5;
    let per_cpu = Value::from(Field::PerCpu).is(0x1_0100);
    assert_eq!(
        truth_of(&per_cpu, &user, &Memory::new()),
        Truth::True,
        "what SWAPGS brings"
    );
}

#[test]
fn both_roots_of_a_process_are_its_own() {
    assert_eq!(truth(&Condition::dtb(Dtb(TABLES))), Truth::True);
    assert_eq!(truth(&Condition::dtb(Dtb(TABLES | 0x1000))), Truth::True);
    assert_eq!(truth(&Condition::dtb(Dtb(TABLES | 0x2000))), Truth::False);
    let mut with_pcid = registers();
    with_pcid.cr3 |= 0x8000_0000_0000_0803;
    assert_eq!(
        truth_of(&Condition::dtb(Dtb(TABLES)), &with_pcid, &Memory::new()),
        Truth::True
    );
}

#[test]
fn a_chain_of_pointers_leads_to_the_pid() {
    let mut memory = Memory::new();
    memory.put(0x1_0020, &0x1_1ffc_u64.to_le_bytes());
    memory.put(0x1_1ffc + 0x10, &812_u32.to_le_bytes());
    memory.put(0x1_1ffc + 0x14, &[0xff; 4]);
    let pid = Value::from(Field::PerCpu).plus(0x20).load(8).plus(0x10).load(4);
    assert_eq!(truth_of(&pid.clone().is(812), &registers(), &memory), Truth::True);
    assert_eq!(
        truth_of(&pid.clone().is(813), &registers(), &memory),
        Truth::False
    );
    // A number that crosses a page, and one that is not there.
    memory.put(0x1_0ffe, &[1, 2, 3, 4]);
    let at = |gva: u64| Value::from(gva).load(4);
    assert_eq!(
        truth_of(&at(0x1_0ffe).is(0x0403_0201), &registers(), &memory),
        Truth::True
    );
    assert_eq!(
        truth_of(&at(0x1_2ffe).is(0), &registers(), &memory),
        Truth::Unknown
    );
    assert_eq!(
        truth_of(&at(u64::MAX).is(0), &registers(), &memory),
        Truth::Unknown
    );
    // In user mode the kernel's half is found by the kernel's root.
    let mut user = registers();
    user.cr3 |= 0x1000;
    let upper = Value::from(0xffff_ff80_0001_0ffe_u64).load(4);
    assert_eq!(truth_of(&upper.is(0x0403_0201), &user, &memory), Truth::True);
    // Through a chain that breaks.
    memory.put(0x1_0020, &0x9_0000_u64.to_le_bytes());
    assert_eq!(truth_of(&pid.is(812), &registers(), &memory), Truth::Unknown);
}

#[test]
fn texts_are_compared_as_far_as_they_are_there() {
    let mut memory = Memory::new();
    memory.put(0x1_0ffa, b"/usr/bin/sh\0x");
    memory.put(0x1_2ffc, b"/tmp");
    let truth = |condition: Condition| truth_of(&condition, &registers(), &memory);
    let at = |gva: u64| Value::from(gva);
    assert_eq!(truth(at(0x1_0ffa).begins_with("/usr/")), Truth::True);
    assert_eq!(truth(at(0x1_0ffa).begins_with("/usr/sbin")), Truth::False);
    assert_eq!(truth(at(0x1_0ffa).reads("/usr/bin/sh")), Truth::True);
    assert_eq!(truth(at(0x1_0ffa).reads("/usr/bin")), Truth::False);
    // The end of what is there.
    assert_eq!(truth(at(0x1_2ffc).begins_with("/tmp")), Truth::True);
    assert_eq!(truth(at(0x1_2ffc).begins_with("/tmp/x")), Truth::Unknown);
    assert_eq!(truth(at(0x1_2ffc).reads("/tmp")), Truth::Unknown);
    assert_eq!(truth(at(0x1_2ffc).reads("/etc")), Truth::False);
    assert_eq!(truth(at(0x9_0000).reads("/etc")), Truth::Unknown);
}

#[test]
fn what_is_unknown_decides_nothing() {
    let (yes, no) = (rax().is(100), rax().is(0));
    let unknown = Value::from(Field::Gpa).is(0);
    let all = |list: [&Condition; 2]| truth(&Condition::All(list.map(Clone::clone).to_vec()));
    let any = |list: [&Condition; 2]| truth(&Condition::Any(list.map(Clone::clone).to_vec()));
    for (a, b) in [(&unknown, &no), (&no, &unknown)] {
        assert_eq!(all([a, b]), Truth::False);
        assert_eq!(any([a, b]), Truth::Unknown);
    }
    for (a, b) in [(&unknown, &yes), (&yes, &unknown)] {
        assert_eq!(all([a, b]), Truth::Unknown);
        assert_eq!(any([a, b]), Truth::True);
    }
    assert_eq!(truth(&Condition::All(vec![])), Truth::True);
    assert_eq!(truth(&Condition::Any(vec![])), Truth::False);
    assert_eq!(truth(&yes.clone().and(no.clone()).or(yes.clone())), Truth::True);
}

#[test]
fn what_is_too_much_is_refused() {
    let one = || rax().is(1);
    let long = Condition::All((0..100).map(|_| one()).collect());
    assert_eq!(long.compile(), Err(FilterError::TooLong));
    let mut deep = one();
    for _ in 0..40 {
        deep = !deep;
    }
    assert_eq!(deep.compile(), Err(FilterError::TooDeep));
    let mut chain = rax();
    for _ in 0..17 {
        chain = chain.load(8);
    }
    assert_eq!(chain.compile(), Err(FilterError::TooManyReads));
    // Many values at a time: each waits for the next.
    let mut sum = rax();
    for _ in 0..17 {
        sum = rax().plus(sum);
    }
    assert!(matches!(sum.compile(), Err(FilterError::Malformed { .. })));
    let texts = Condition::Any((0..16).map(|_| rax().reads(vec![b'x'; 255])).collect());
    assert_eq!(texts.compile(), Err(FilterError::TooLong), "in bytes");
    let wrong = [
        rax().load(3).is(0),
        rax().reads(""),
        rax().reads(vec![0; 256]),
        Value::from(Register::Gpr(16)).is(0),
    ];
    for condition in wrong {
        assert!(
            matches!(condition.compile(), Err(FilterError::Malformed { .. })),
            "{condition:?}"
        );
    }
}

#[test]
fn programs_that_may_not_run_are_refused() {
    let refused = |bytes: &[u8]| Program::from_bytes(bytes).unwrap_err();
    // Always true.
    assert!(Program::from_bytes(&[7, 1]).is_ok());
    // Nothing, no such instruction, cut short, two values left, none to take.
    for bytes in [
        &[][..],
        &[0],
        &[13],
        &[1, 0, 0],
        &[7, 1, 7, 1],
        &[7, 2],
        &[10],
        &[5, 0],
        &[2, 200],
    ] {
        assert!(
            matches!(refused(bytes), FilterError::Malformed { .. }),
            "{bytes:?}"
        );
    }
    // A number where a truth is wanted, and the contrary.
    assert!(matches!(
        refused(&[2, 0, 10]),
        FilterError::Malformed { at: 1, .. }
    ));
    assert!(matches!(
        refused(&[7, 1, 3, 8]),
        FilterError::Malformed { at: 1, .. }
    ));
    assert!(matches!(
        refused(&[2, 0, 11, 0, 0]),
        FilterError::Malformed { at: 1, .. }
    ));
    // Out of the program; to a place where another number of values is.
    assert!(matches!(
        refused(&[7, 1, 11, 1, 0]),
        FilterError::Malformed { at: 1, .. }
    ));
    assert!(matches!(
        refused(&[7, 1, 11, 0xff, 0xff]),
        FilterError::Malformed { at: 1, .. }
    ));
    assert!(matches!(
        refused(&[7, 1, 11, 1, 0, 7, 1, 8]),
        FilterError::Malformed { at: 3, .. }
    ));
    // To the end, past what would have left one value more.
    assert!(matches!(
        refused(&[7, 1, 11, 1, 0, 7, 1]),
        FilterError::Malformed { at: 3, .. }
    ));
    assert!(Program::from_bytes(&[7, 1, 11, 2, 0, 7, 1, 8]).is_ok());
    // Numbers that are not in order would not be found.
    let mut one_of = vec![2, 0, 13, 2];
    one_of.extend([2_u64, 1].iter().flat_map(|n| n.to_le_bytes()));
    assert!(matches!(refused(&one_of), FilterError::Malformed { at: 1, .. }));
    assert_eq!(refused(&[10; MOST_BYTES + 1]), FilterError::TooLong);
    assert_eq!(refused(&[10; MOST_INSTRUCTIONS + 1]), FilterError::TooLong);
}

#[test]
fn a_filter_survives_its_json_and_is_verified_there() {
    let filter = Filter::only(&rax().is(1))
        .unwrap()
        .at_most(5, Duration::from_secs(1))
        .counting(&rax(), Buckets::Log2)
        .unwrap();
    let text = serde_json::to_string(&filter).unwrap();
    assert_eq!(serde_json::from_str::<Filter>(&text).unwrap(), filter);
    assert!(serde_json::from_str::<Filter>(r#"{"condition":[10]}"#).is_err());
    // A program of the other kind.
    let number: Filter = serde_json::from_str(r#"{"condition":[2,0]}"#).unwrap();
    assert_eq!(number.validate(), Err(FilterError::NoCondition));
    let truth: Filter = serde_json::from_str(r#"{"tally":{"key":[7,1],"buckets":"each"}}"#).unwrap();
    assert_eq!(truth.validate(), Err(FilterError::NoNumber));
    assert_eq!(
        Filter::none().at_most(0, Duration::from_secs(1)).validate(),
        Err(FilterError::NoRate)
    );
    assert_eq!(
        Filter::none().at_most(1, Duration::ZERO).validate(),
        Err(FilterError::NoRate)
    );
}

#[test]
fn a_sieve_counts_what_becomes_of_events() {
    let filter = Filter::only(&rax().is_below(10))
        .unwrap()
        .counting(&rax(), Buckets::Each)
        .unwrap()
        .at_most(3, Duration::from_secs(1));
    let sieve = Sieve::new(filter);
    let memory = Memory::new();
    let start = Instant::now();
    let pass = |rax: u64, after: u64| {
        let mut registers = registers();
        registers.gprs[0] = rax;
        let moment = Moment {
            registers: &registers,
            detail: &DETAIL,
        };
        sieve.pass(moment, &memory, || start + Duration::from_millis(after))
    };
    assert_eq!(pass(10, 0), Passage::Filtered);
    let firsts = [pass(1, 100), pass(2, 200), pass(1, 300)];
    assert_eq!(firsts, [Passage::Wanted; 3]);
    assert_eq!(pass(1, 1099), Passage::Limited);
    assert_eq!(pass(1, 1100), Passage::Wanted, "the next second begins");
    let mut counts = Counts {
        occurred: 6,
        ..Counts::default()
    };
    sieve.count(&mut counts);
    assert_eq!((counts.filtered, counts.limited, counts.undecided), (1, 1, 0));
    assert_eq!(counts.matched(), 5);
    let bucket = |key, count| Bucket { key, count };
    assert_eq!(sieve.tallied().buckets, [bucket(1, 4), bucket(2, 1)]);
}

#[test]
fn buckets_are_bounded() {
    let mut counting = tally::Counting::default();
    for key in (0..MOST_BUCKETS as u64 + 10).chain([5, 5]) {
        counting.add(Some(key));
    }
    counting.add(None);
    let tallied = counting.tallied();
    assert_eq!(tallied.buckets.len(), MOST_BUCKETS);
    assert_eq!((tallied.others, tallied.unknown), (10, 1));
    assert_eq!(tallied.buckets[5].count, 3);
    let log2 = Tally::new(rax().compile().unwrap(), Buckets::Log2).unwrap();
    let buckets = [0, 1, 2, 3, 4, 7, u64::MAX].map(|n| log2.bucket(n));
    assert_eq!(buckets, [0, 1, 2, 2, 4, 4, 1 << 63]);
}

#[test]
fn the_fuzz_seeds_are_programs() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/filter");
    let mut seeds = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let program = Program::from_bytes(&bytes[3..3 + usize::from(bytes[0])]);
        assert!(program.is_ok(), "{}: {program:?}", path.display());
        seeds += 1;
    }
    assert!(seeds >= 6);
}

#[test]
fn a_filter_says_all_that_it_looks_at() {
    let looks = |filter: &Filter, fields: &[Field]| fields.iter().all(|field| filter.looks().at(*field));
    let translation = [Field::Cr0, Field::Cr3, Field::Cr4, Field::Efer];
    let nothing = Filter::none();
    assert_eq!(nothing.looks(), Looks::default());
    let rbx = Filter::only(&Value::register(Register::Gpr(3)).is(Value::from(Field::New))).unwrap();
    assert!(looks(&rbx, &[Field::Register(Register::Gpr(3)), Field::New]));
    for other in translation
        .into_iter()
        .chain([Field::Old, Field::Register(Register::RAX), Field::PerCpu])
    {
        assert!(!looks(&rbx, &[other]), "{other:?}");
    }
    // What is counted is looked at as well, and what is read in virtual memory has to be found there.
    let counts = rbx
        .clone()
        .counting(&rax().plus(8).load(4), Buckets::Each)
        .unwrap();
    assert!(looks(&counts, &translation) && looks(&counts, &[Field::Register(Register::RAX), Field::New]));
    let text = Condition::Text(Value::from(Field::PerCpu), TextMatch::Prefix, b"/srv".to_vec());
    let text = Filter::only(&!text).unwrap();
    assert!(looks(&text, &translation) && looks(&text, &[Field::PerCpu]));
    assert_eq!(Sieve::new(text.clone()).looks(), text.looks());
}

#[test]
fn registers_that_a_filter_does_not_look_at_do_not_matter() {
    let mut memory = Memory::new();
    memory.put(0x1_0008, &7_u64.to_le_bytes());
    let all = registers();
    let value = Value::from(Field::GsBase).plus(8).load(8);
    let program = value.compile().unwrap();
    let number = |registers: &Registers| {
        program.number(
            Moment {
                registers,
                detail: &DETAIL,
            },
            &memory,
        )
    };
    assert_eq!(number(&all), Some(7));
    let mut few = Registers::default();
    few.gs.base = all.gs.base;
    for (field, to, from) in [
        (Field::Cr0, &mut few.cr0, all.cr0),
        (Field::Cr3, &mut few.cr3, all.cr3),
        (Field::Cr4, &mut few.cr4, all.cr4),
        (Field::Efer, &mut few.efer, all.efer),
    ] {
        assert!(program.looks().at(field));
        *to = from;
    }
    assert_eq!(number(&few), Some(7));
}
