//! What is written to a guest's memory from outside while it stands still: what no module of ours does, and is as easy to do.

use vmsight_analysis::{Check, Context, Finding, Severity, checks, run};
use vmsight_arch::{Gpa, Gva, Registers};
use vmsight_lab::Work;
use vmsight_linux::ProcessFields;
use vmsight_target::{AttachOptions, Target, TargetSpec};

use super::{CR4_SMEP, Lab, MODULE, USER};

const CR0_WP: u64 = 1 << 16;
const EFER_NXE: u64 = 1 << 11;
/// The bit of a page-table entry that opens what lies below to user mode.
const USER_PAGE: u64 = 1 << 2;

/// A guest that can be written to.
struct Outside<'l> {
    lab: &'l Lab,
    target: Target,
    context: Context,
    registers: Vec<Registers>,
}

impl<'l> Outside<'l> {
    fn of(lab: &'l Lab) -> Outside<'l> {
        let options = AttachOptions {
            write: true,
            ..AttachOptions::default()
        };
        let target = TargetSpec::Qmp(lab.guest.qmp_path().unwrap());
        let target = vmsight_target::attach(&target, &options).unwrap_or_else(|e| panic!("{e}"));
        let kernel = vmsight_linux::Kernel::attach(target.memory.clone(), Default::default()).unwrap();
        let registers = target.registers(None).unwrap_or_else(|e| panic!("{e}"));
        Outside {
            lab,
            context: Context::new(kernel),
            target,
            registers,
        }
    }

    fn symbol(&self, name: &str) -> Gva {
        self.context.symbol(&[name]).unwrap_or_else(|e| panic!("{e}"))
    }

    fn word(&self, at: Gva) -> u64 {
        self.context.space().read_u64(at).unwrap()
    }

    fn gpa(&self, at: Gva) -> Gpa {
        self.context.space().translate(at).unwrap().gpa
    }

    fn member(&self, structure: &str, path: &str, at: Gva) -> Gva {
        self.context.object(structure, at).unwrap().member(path).unwrap()
    }

    fn task(&self, pid: u32) -> Gva {
        self.context.kernel().task(pid as i32).unwrap()
    }

    /// Writes, has one check look, and writes the old bytes again, all while the guest stands still.
    #[track_caller]
    fn physical(&self, check: &str, writes: &[(Gpa, &[u8])], registers: &[Registers]) -> Vec<Finding> {
        let memory = &self.target.memory;
        let check = [checks::named(check).unwrap()];
        self.lab
            .guest
            .paused(|_| {
                let mut old = Vec::new();
                for (at, bytes) in writes {
                    let mut before = vec![0; bytes.len()];
                    memory.read(*at, &mut before).unwrap();
                    memory.write(*at, bytes).unwrap();
                    old.push((*at, before));
                }
                let context = Context::new(self.context.kernel().clone())
                    .with_registers(Ok(registers.to_vec()))
                    .paused();
                let found = of(&context, &check);
                for (at, before) in old.iter().rev() {
                    memory.write(*at, before).unwrap();
                }
                Ok(found)
            })
            .unwrap()
    }

    #[track_caller]
    fn written(&self, check: &str, at: Gva, bytes: &[u8], subject: &str, severity: Severity) -> Finding {
        let found = self.physical(check, &[(self.gpa(at), bytes)], &self.registers);
        the(found, subject, severity)
    }

    #[track_caller]
    fn word_written(&self, check: &str, at: Gva, value: u64, subject: &str, severity: Severity) -> Finding {
        self.written(check, at, &value.to_le_bytes(), subject, severity)
    }
}

fn of(context: &Context, check: &[&Check]) -> Vec<Finding> {
    let outcomes = run(context, check, &|_| {});
    for outcome in &outcomes {
        assert!(!outcome.failed, "{}: {:?}", outcome.check, outcome.notes);
    }
    outcomes.into_iter().flat_map(|o| o.findings).collect()
}

/// The one finding with this in its subject.
#[track_caller]
fn the(found: Vec<Finding>, subject: &str, severity: Severity) -> Finding {
    let is = |f: &&Finding| f.subject.contains(subject) && f.severity == severity;
    let one = found.iter().find(is).cloned();
    one.unwrap_or_else(|| panic!("nothing of '{subject}', {severity}: {found:#?}"))
}

/// All of it.
pub(crate) fn check(lab: &Lab) {
    let outside = Outside::of(lab);
    kernel_state(&outside);
    processor(&outside);
    creds(&outside);
    processes(&outside);
    user_page(&outside);
    confinement(&outside);
    program(&outside);
}

/// A process whose filters are gone, and one that the kernel does not see to any more.
fn confinement(outside: &Outside<'_>) {
    let confined = outside.lab.guest.prepare(Work::Confine).unwrap();
    let task = outside.task(confined.pid());
    let subject = format!("of process {}", confined.pid());
    assert!(outside.physical("seccomp", &[], &outside.registers).is_empty());
    for member in ["seccomp.filter", "thread_info.syscall_work"] {
        let at = outside.member("task_struct", member, task);
        outside.word_written("seccomp", at, 0, &subject, Severity::Critical);
    }
}

/// A process whose program is a file of which it has nothing mapped.
fn program(outside: &Outside<'_>) {
    let standing = outside.lab.stand(USER);
    let exe = |pid: u32| {
        let mm = outside.member("task_struct", "mm", outside.task(pid));
        outside.member("mm_struct", "exe_file", Gva(outside.word(mm)))
    };
    assert!(
        outside
            .physical("process-code", &[], &outside.registers)
            .is_empty()
    );
    outside.word_written(
        "process-code",
        exe(standing.pid()),
        outside.word(exe(1)),
        &format!("program of process {} ", standing.pid()),
        Severity::Medium,
    );
}

fn kernel_state(outside: &Outside<'_>) {
    let mark = outside.symbol("tainted_mask");
    outside.word_written(
        "taint",
        mark,
        0,
        &format!("taint of module {MODULE}"),
        Severity::High,
    );
    let apparmor = outside.symbol("apparmor_enabled");
    outside.written("security-modules", apparmor, &[0; 4], "AppArmor", Severity::High);
    // As if it had been booted with it.
    let names = Gva(outside.word(outside.symbol("lsm_names")));
    let state = outside.symbol("selinux_state");
    let writes: [(Gpa, &[u8]); 3] = [
        (outside.gpa(names), b"selinux\0"),
        (
            outside.gpa(outside.member("selinux_state", "initialized", state)),
            &[1],
        ),
        (
            outside.gpa(outside.member("selinux_state", "enforcing", state)),
            &[0],
        ),
    ];
    let found = outside.physical("security-modules", &writes, &outside.registers);
    the(found, "SELinux", Severity::Info);
    // As if it had been booted so.
    let line = Gva(outside.word(outside.symbol("saved_command_line")));
    let locked = b"lockdown=integrity module.sig_enforce ";
    outside.written("security-modules", line, locked, "lockdown", Severity::High);
    outside.written(
        "kernel-settings",
        line,
        locked,
        "enforcement of module signatures",
        Severity::High,
    );
    let random = outside.symbol("randomize_va_space");
    let weak = outside.written(
        "kernel-settings",
        random,
        &[0; 4],
        "settings that harden the kernel",
        Severity::Info,
    );
    assert!(
        weak.evidence[0].to_string().starts_with("randomize_va_space: 0"),
        "{weak:#?}"
    );
    let next = outside.symbol("kexec_image");
    let image = outside.symbol("init_task").0;
    outside.word_written("kernel-settings", next, image, "kexec", Severity::Info);
    let off = outside.symbol("poweroff_cmd");
    outside.written(
        "kernel-helpers",
        off,
        b"/tmp/z\0",
        "poweroff_cmd",
        Severity::Critical,
    );
}

fn processor(outside: &Outside<'_>) {
    let with = |change: &dyn Fn(&mut Registers)| {
        let mut registers = outside.registers.clone();
        change(&mut registers[0]);
        outside.physical("processor", &[], &registers)
    };
    assert!(with(&|_| ()).is_empty());
    the(
        with(&|r| r.cr0 &= !CR0_WP),
        "CR0.WP of vCPU 0",
        Severity::Critical,
    );
    the(
        with(&|r| r.efer &= !EFER_NXE),
        "EFER.NXE of vCPU 0",
        Severity::Critical,
    );
    let kernel = outside.context.kernel();
    let state = kernel.per_cpu_symbol("cpu_tlbstate").unwrap();
    let state = kernel.per_cpu().unwrap().copy(state, 0).unwrap();
    let cr4 = outside.member("tlb_state", "cr4", state);
    let value = outside.word(cr4) & !CR4_SMEP;
    outside.word_written(
        "processor",
        cr4,
        value,
        "CR4.SMEP of CPU 0, as written",
        Severity::Critical,
    );
    // Page tables that are nobody's.
    let mut registers = outside.registers.clone();
    registers[0].cr3 = 0x5000;
    let found = outside.physical("hidden-processes", &[], &registers);
    the(found, "address space of vCPU 0", Severity::High);
    assert!(
        outside
            .physical("hidden-processes", &[], &outside.registers)
            .is_empty()
    );
}

fn creds(outside: &Outside<'_>) {
    let standing = outside.lab.stand(USER);
    let task = outside.task(standing.pid());
    let cred = Gva(outside.word(outside.member("task_struct", "real_cred", task)));
    let subject = format!("capabilities of process {} ", standing.pid());
    for set in ["cap_effective", "cap_ambient"] {
        let at = outside.member("cred", set, cred);
        outside.word_written("credentials", at, 1 << 21, &subject, Severity::High);
    }
    let own = outside.symbol("init_cred");
    let uid = outside.member("cred", "euid", own);
    outside.written("credentials", uid, &[1, 0, 0, 0], "init_cred", Severity::High);
    let first = outside.member("task_struct", "real_cred", outside.symbol("init_task"));
    outside.word_written("credentials", first, cred.0, "cred of init_task", Severity::High);
    // Root, with a parent that is not: what a program with a set-user-id bit leaves behind, too.
    let parent = outside.member("task_struct", "real_parent", outside.task(1));
    let found = outside.physical(
        "credentials",
        &[(outside.gpa(parent), &task.0.to_le_bytes())],
        &outside.registers,
    );
    the(found, "root below a user: process 1 ", Severity::Info);
}

fn processes(outside: &Outside<'_>) {
    // Memory with a function of its own, that gets the header of a program.
    let code = outside.lab.guest.prepare(Work::Call { count: 1 }).unwrap();
    let (pid, at) = (code.pid(), code.address());
    let subject = format!("process {pid} (orders): {at:#x}");
    let page = Gpa(code.frame() << 12);
    let plain = outside.physical("process-memory", &[], &outside.registers);
    let plain = the(plain, &subject, Severity::Info);
    assert!(
        plain
            .evidence
            .iter()
            .any(|e| e.to_string().contains("48 8d 47 01 c3")),
        "{plain:#?}"
    );
    let found = outside.physical("process-memory", &[(page, b"\x7fELF")], &outside.registers);
    the(found, &subject, Severity::Medium);
    let kernel = outside.context.kernel();
    let task = outside.task(pid);
    let traced = outside.member("task_struct", "ptrace", task);
    outside.written(
        "process-memory",
        traced,
        &[1, 0, 0, 0],
        &format!("process {pid} (orders) is traced"),
        Severity::Info,
    );
    let vma = kernel.maps(pid as i32).unwrap().rows[0].vma;
    let watched = outside.member("vm_area_struct", "vm_userfaultfd_ctx.ctx", vma);
    outside.word_written(
        "process-memory",
        watched,
        task.0,
        &format!("userfaultfd in process {pid}"),
        Severity::Info,
    );
    // As if it were in a namespace that does not know it.
    let thread = outside.member("task_struct", "thread_pid", task);
    let number = Gva(outside.word(thread));
    let row = kernel.process(pid as i32, ProcessFields::empty()).unwrap();
    assert_eq!(row.task, task);
    let level = outside.member("pid", "level", number);
    let initial = outside.symbol("init_pid_ns").0;
    let upid = outside.context.kernel().types().find_struct("upid").unwrap();
    let size = outside.context.kernel().types().size_of(upid).unwrap();
    let second = outside.member("pid", "numbers", number).wrapping_add(size);
    let space = outside.member("upid", "ns", second);
    let (first, after) = (4_000_000u32.to_le_bytes(), initial.to_le_bytes());
    let writes: [(Gpa, &[u8]); 3] = [
        (outside.gpa(level), &[1, 0, 0, 0]),
        (outside.gpa(second), &first),
        (outside.gpa(space), &after),
    ];
    let found = outside.physical("hidden-processes", &writes, &outside.registers);
    let finding = the(found, "pid 4000000 of a nested namespace", Severity::Critical);
    assert_eq!(finding.address, Some(number));
}

/// A page of the kernel's data that is opened to user mode, in the kernel's own tables.
fn user_page(outside: &Outside<'_>) {
    let at = outside.symbol("init_task");
    let found = outside.context.space().translate(at).unwrap();
    let opened: Vec<(Gpa, [u8; 8])> = found
        .steps
        .iter()
        .map(|step| (step.entry_gpa, (step.value | USER_PAGE).to_le_bytes()))
        .collect();
    let writes: Vec<(Gpa, &[u8])> = opened.iter().map(|(at, bytes)| (*at, bytes.as_slice())).collect();
    let found = outside.physical("kernel-pages", &writes, &outside.registers);
    let finding = the(found, "user pages in the kernel's half at ", Severity::Critical);
    let start = finding.address.unwrap();
    assert!(start <= at && at.0 - start.0 < 2 << 20, "{finding:#?}");
}
