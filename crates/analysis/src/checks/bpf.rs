//! BPF: programs, maps, and what attaches programs.

use vmsight_arch::Gva;
use vmsight_linux::LinuxError;
use vmsight_linux::bpf::BpfKind;

use super::pointers::Pointers;
use crate::{Check, Context, Evidence, Finding, Findings, Object, Severity, Technique};

pub(super) const BPF: Check = Check {
    name: "bpf",
    summary: "BPF programs run as what the kernel compiled them to, and may not do what rootkits do with them",
    compares: "the code of every loaded BPF program with the kernel's list of BPF code and its interpreters; the operations of every map \
               and link with the code that the kernel knows; which programs may make functions of the kernel return what they like, or \
               write to the memory of processes",
    why: "BPF reaches as deep as a module and is in no list of modules: rootkits hide processes and answer packets with it.",
    techniques: &[Technique::ROOTKIT, Technique::TRAFFIC_SIGNALING],
    blind_spots: &[
        "What a program does, but for overriding results of functions and writing to processes.",
        "Classic filters of sockets and of seccomp.",
    ],
    run,
};

/// Instructions of a program that are looked at: BPF_COMPLEXITY_LIMIT_INSNS (include/linux/bpf.h).
const MAX_INSTRUCTIONS: u64 = 1 << 20;
/// Bytes of one.
const INSTRUCTION: u64 = 8;
/// `BPF_JMP | BPF_CALL` (include/uapi/linux/bpf.h).
const CALL: u8 = 0x85;

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let mut pointers = Pointers::new(context);
    let Some(programs) = table(context, findings, BpfKind::Program)? else {
        findings.note("the kernel has no BPF, or hides its programs");
        return Ok(());
    };
    // There may be none: the table was looked at.
    findings.looked_at(1);
    for (index, at) in programs {
        if !findings.go_on() {
            break;
        }
        let program = context.object("bpf_prog", at)?;
        let name = context
            .object("bpf_prog_aux", program.pointer("aux")?)?
            .array_text("name")?;
        let subject = format!("BPF program {index} ({name})");
        let slot = program.member("bpf_func")?;
        pointers.slot(findings, &subject, "bpf_func", slot);
        rights(context, findings, &subject, &program)?;
    }
    for (index, at) in table(context, findings, BpfKind::Map)?.unwrap_or_default() {
        let map = context.object("bpf_map", at)?;
        let subject = format!("BPF map {index} ({})", map.array_text("name")?);
        pointers.table(findings, &subject, "bpf_map_ops", map.pointer("ops")?);
    }
    // Since 5.8.
    for (index, at) in table(context, findings, BpfKind::Link)?.unwrap_or_default() {
        let link = context.object("bpf_link", at)?;
        pointers.table(
            findings,
            &format!("BPF link {index}"),
            "bpf_link_ops",
            link.pointer("ops")?,
        );
    }
    Ok(())
}

/// What the kernel's table of this kind leads to, by number.
fn table(
    context: &Context,
    findings: &mut Findings,
    kind: BpfKind,
) -> Result<Option<Vec<(u64, Gva)>>, LinuxError> {
    let walk = context.kernel().bpf_table(kind)?;
    let what = format!("table of BPF {}s", kind.as_str());
    Ok(walk.map(|walk| findings.complete(&what, walk)))
}

/// What few programs have a reason for, and rootkits do.
fn rights(
    context: &Context,
    findings: &mut Findings,
    subject: &str,
    program: &Object<'_>,
) -> Result<(), LinuxError> {
    let overrides = program.number("kprobe_override").unwrap_or(0) != 0;
    let writes = context.kernel().find_symbol(&["bpf_probe_write_user"]);
    let writes = writes.is_some_and(|function| calls(context, findings, program, function).unwrap_or(false));
    let explanation = match (overrides, writes) {
        (false, false) => return Ok(()),
        (true, false) => "the program may make functions of the kernel return what it likes",
        (false, true) => "the program writes to the memory of processes (bpf_probe_write_user)",
        (true, true) => {
            "the program may make functions of the kernel return what it likes, and writes to the memory of processes"
        }
    };
    let finding = Finding::new(Severity::Medium, subject, explanation)
        .at(program.address())
        .with(context.evidence("bpf_func", program.pointer("bpf_func")?))
        .with(Evidence::value("type", program.number("type")?));
    findings.report(finding);
    Ok(())
}

/// Whether the program calls this function of the kernel's: the verifier puts the distance from `__bpf_call_base` into a call.
fn calls(
    context: &Context,
    findings: &mut Findings,
    program: &Object<'_>,
    function: Gva,
) -> Result<bool, LinuxError> {
    let base = context.symbol(&["__bpf_call_base"])?;
    let distance = function.0.wrapping_sub(base.0) as u32;
    let first = program.member("insnsi|insns")?;
    let count = program.number("len")?.min(MAX_INSTRUCTIONS);
    let mut page = [0; 4096];
    let mut done = 0;
    // Programs may share what they claim to be made of: a page of it is an object of the check's.
    while done < count && findings.go_on() {
        let now = (count - done).min(page.len() as u64 / INSTRUCTION);
        let bytes = page.get_mut(..(now * INSTRUCTION) as usize).unwrap_or_default();
        let at = first.wrapping_add(done * INSTRUCTION);
        context
            .space()
            .read(at, bytes)
            .map_err(|source| LinuxError::Read {
                what: "a BPF program's instructions".to_owned(),
                at,
                source,
            })?;
        let found = bytes.as_chunks::<{ INSTRUCTION as usize }>().0.iter().any(
            |&[code, registers, _, _, immediate @ ..]| {
                // The source register tells calls of other kinds.
                code == CALL && registers >> 4 == 0 && u32::from_le_bytes(immediate) == distance
            },
        );
        if found {
            return Ok(true);
        }
        done += now;
    }
    Ok(false)
}
