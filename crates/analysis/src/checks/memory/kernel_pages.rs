//! The kernel's own page tables.

use vmsight_arch::paging::{Mapping, PagingMode};
use vmsight_arch::{Gpa, Gva};
use vmsight_linux::LinuxError;

use crate::checks::sites;
use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// See [`Check`].
pub(crate) const KERNEL_PAGES: Check = Check {
    name: "kernel-pages",
    summary: "No kernel page is writable and executable, and the kernel's code is writable nowhere",
    compares: "every page that the kernel's page tables map with what such pages may be: not writable and \
               executable at once, not writable where the kernel's code lies, also by another address, and not \
               open to user mode",
    why: "Code that is to be changed as it runs, and the kernel's code where it is to be changed, must be \
          writable.",
    techniques: &[Technique::ROOTKIT, Technique::PRIVILEGE_ESCALATION],
    blind_spots: &[
        "A page that is writable only while somebody writes to it.",
        "A page that only the page tables of one process map, in the kernel's half.",
        "Pages of BPF's trampolines and dispatchers, which the kernel itself leaves writable before 6.8.",
    ],
    run,
};

/// Page tables that are visited: those of 512 GiB in pages of 4 KiB.
const MAX_TABLES: u64 = 1 << 18;
/// Stretches of pages that are told of.
const MAX_TOLD: usize = 256;
/// The page that old programs call for the time: user mode may use it (Documentation/arch/x86/x86_64/mm.rst).
const VSYSCALL: u64 = 0xffff_ffff_ff60_0000;

/// What is wrong with a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wrong {
    WritableCode,
    WritableText,
    User,
}

/// Pages after one another that are wrong in the same way.
struct Run {
    wrong: Wrong,
    start: Gva,
    end: Gva,
    gpa: Gpa,
}

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let start = match context.space().mode() {
        PagingMode::X86Level4 => 0xffff_8000_0000_0000,
        PagingMode::X86Level5 => 0xff00_0000_0000_0000,
        mode => {
            findings.note(format!("the pages of {mode} paging are not looked at"));
            return Ok(());
        }
    };
    let text = text(context)?;
    let mut open: Option<Run> = None;
    let mut pages = 0;
    for page in context.space().mappings(Gva(start)..=Gva(u64::MAX), MAX_TABLES) {
        let page = match page {
            Ok(page) => page,
            Err(limit) => {
                findings.note(limit.to_string());
                break;
            }
        };
        pages += 1;
        let size = 1u64 << page.translation.page_shift;
        let Some(wrong) = wrong(&page, &text) else {
            continue;
        };
        if wrong == Wrong::WritableCode && size == 1 << 12 && sites::is_bpf_image(context, page.gva) {
            continue;
        }
        if findings.found().len() >= MAX_TOLD {
            findings.note(format!("no more pages told of after {MAX_TOLD} stretches"));
            break;
        }
        match &mut open {
            Some(run) if run.wrong == wrong && run.end == page.gva => run.end = page.gva.wrapping_add(size),
            _ => {
                if let Some(run) = open.take() {
                    report(context, findings, &run);
                }
                open = Some(Run {
                    wrong,
                    start: page.gva,
                    end: page.gva.wrapping_add(size),
                    gpa: page.translation.gpa,
                });
            }
        }
    }
    if let Some(run) = open {
        report(context, findings, &run);
    }
    findings.looked_at(pages);
    Ok(())
}

/// Where the kernel's code lies in physical memory. Its image is in one piece there.
fn text(context: &Context) -> Result<std::ops::Range<u64>, LinuxError> {
    let image = context.kernel().image();
    let start = context.symbol(&["_stext", "_text"])?;
    let end = context.symbol(&["_etext"])?;
    let physical = |at: Gva| image.phys.0.wrapping_add(at.0.wrapping_sub(image.text.0));
    // The last page has something else at its end, and may be writable.
    Ok(physical(start)..physical(end) & !0xfff)
}

fn wrong(page: &Mapping, text: &std::ops::Range<u64>) -> Option<Wrong> {
    let access = page.translation.access;
    let start = page.translation.gpa.0 & !0xfff;
    let end = start.saturating_add(1 << page.translation.page_shift);
    if access.user && page.gva.0 != VSYSCALL {
        Some(Wrong::User)
    } else if access.write && start < text.end && end > text.start {
        Some(Wrong::WritableText)
    } else if access.write && access.execute {
        Some(Wrong::WritableCode)
    } else {
        None
    }
}

fn report(context: &Context, findings: &mut Findings, run: &Run) {
    let pages = run.end.0.wrapping_sub(run.start.0) >> 12;
    let (severity, subject, explanation) = match run.wrong {
        Wrong::WritableCode => (
            Severity::High,
            format!("writable code at {}", run.start),
            "the pages are writable and executable: the kernel makes none such",
        ),
        Wrong::WritableText => (
            Severity::Critical,
            format!("kernel text writable at {}", run.start),
            "the pages are of the kernel's code and writable: it can be changed there",
        ),
        Wrong::User => (
            Severity::Critical,
            format!("user pages in the kernel's half at {}", run.start),
            "user mode may access pages of the kernel's half",
        ),
    };
    let mut finding = Finding::new(severity, subject, explanation)
        .at(run.start)
        .by(context.owner(run.start).module().map(str::to_owned))
        .with(Evidence::value("pages", pages))
        .with(Evidence::value("physical address", run.gpa))
        .with(Evidence::value("belongs to", context.describe(run.start)));
    if run.wrong == Wrong::WritableText {
        let image = context.kernel().image();
        let offset = (run.gpa.0 & !0xfff).wrapping_sub(image.phys.0);
        finding = finding.with(context.evidence("text", image.text.wrapping_add(offset)));
    }
    findings.report(finding.with(context.bytes("first bytes", run.start, 32)));
}
