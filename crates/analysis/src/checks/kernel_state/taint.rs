//! What the kernel has marked itself with.

use vmsight_linux::LinuxError;

use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// See [`Check`].
pub(crate) const TAINT: Check = Check {
    name: "taint",
    summary: "The kernel's marks of what has been done to it, and whether somebody has taken them away",
    compares: "tainted_mask with the marks of the modules in the list, which the kernel sets together and never \
               takes away",
    why: "A module from outside marks the kernel for good. Whoever does not want to be asked about it clears the \
          mark.",
    techniques: &[Technique::KERNEL_MODULE, Technique::HIDE_ARTIFACTS],
    blind_spots: &["A mark that was cleared, of a module that is not in the list any more."],
    run,
};

/// The letter and the meaning of each bit (Documentation/admin-guide/tainted-kernels.rst).
const FLAGS: [(char, &str); 20] = [
    ('P', "a proprietary module was loaded"),
    ('F', "a module was loaded by force"),
    ('S', "the processor is out of specification"),
    ('R', "a module was unloaded by force"),
    ('M', "the processor reported a machine check"),
    ('B', "a bad page was met"),
    ('U', "user space asked for the mark"),
    ('D', "the kernel died: an oops or a BUG"),
    ('A', "an ACPI table was replaced by a user"),
    ('W', "the kernel warned"),
    ('C', "a staging driver was loaded"),
    ('I', "a bug of the firmware was worked around"),
    ('O', "a module from outside the kernel's tree was loaded"),
    ('E', "an unsigned module was loaded"),
    ('L', "a CPU was locked up"),
    ('K', "the kernel was patched live"),
    ('X', "the distribution's own mark"),
    ('T', "structures were laid out at random"),
    ('N', "a test was run in the kernel"),
    ('J', "user space used a mutating debug operation of fwctl"),
];
/// Those that come of modules.
const OF_MODULES: &str = "PFCOEKXN";

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let at = context.symbol(&["tainted_mask"])?;
    let mask = context.pointer("tainted_mask", at)?.0;
    findings.looked_at(1);
    let bits = || FLAGS.iter().enumerate();
    let has = |letter: char| bits().any(|(bit, flag)| flag.0 == letter && mask >> bit & 1 == 1);
    for module in context.modules() {
        findings.looked_at(1);
        let letters = module
            .taints
            .chars()
            .filter(|letter| OF_MODULES.contains(*letter));
        let gone: String = letters.filter(|letter| !has(*letter)).collect();
        if gone.is_empty() {
            continue;
        }
        let finding = Finding::new(
            Severity::High,
            format!("taint of module {}", module.name),
            "the module has a mark that the kernel must have too, and has not: somebody has taken it away",
        );
        findings.report(
            finding
                .at(at)
                .by(Some(module.name.clone()))
                .with(Evidence::value("the module's marks", &module.taints))
                .with(Evidence::value("missing", gone))
                .with(Evidence::value("tainted_mask", format_args!("{mask:#x}"))),
        );
    }
    if mask == 0 {
        return Ok(());
    }
    let letters: String = bits()
        .filter(|(bit, _)| mask >> bit & 1 == 1)
        .map(|(_, flag)| flag.0)
        .collect();
    let mut finding = Finding::new(
        Severity::Info,
        format!("kernel tainted: {letters}"),
        "the kernel has marked itself",
    )
    .at(at)
    .with(Evidence::value("tainted_mask", format_args!("{mask:#x}")));
    for (_, (letter, meaning)) in bits().filter(|(bit, _)| mask >> bit & 1 == 1) {
        let by: Vec<&str> = context
            .modules()
            .iter()
            .filter(|m| m.taints.contains(*letter))
            .map(|m| m.name.as_str())
            .collect();
        let by = match by.is_empty() {
            true if OF_MODULES.contains(*letter) => " (no module in the list has it)".to_owned(),
            true => String::new(),
            false => format!(" ({})", by.join(", ")),
        };
        finding = finding.with(Evidence::value(letter.to_string(), format_args!("{meaning}{by}")));
    }
    findings.report(finding);
    Ok(())
}
