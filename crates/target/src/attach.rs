//! From a target's name to a [`Target`].

mod ahead;
mod by_stub;
mod devices;
mod dumps;

use std::fmt;
use std::path::Path;
use std::time::Duration;

use vmsight_memory::GuestMemory;

use crate::control::{QmpControl, VirshControl};
use crate::discover::{self, ControlKind, Named};
use crate::host::maps::{self, Mapping};
use crate::host::process::Process;
use crate::layout::backing::{self, Opened};
use crate::layout::from_monitor::{self, Blocks, MonitorFailure};
use crate::layout::{HostRange, deduce};
use crate::monitor;
use crate::qmp::{Qmp, QmpError};
use crate::target::{Control, Target, TargetKind};
use crate::{TargetError, TargetSpec, VmInfo, Vmm};

pub use ahead::Ahead;
use ahead::Guess;

/// Looks for a guest in a memory whose layout was deduced: `Ok` with what was found (for the notes), `Err` with
/// why this layout is not believed.
///
/// A kernel found at a low address does not yet prove where other memory lies: a good proof also compares
/// [`GuestMemory::regions`] with what the guest itself holds for its memory (Linux: `max_pfn`, the e820 table), and finds
/// in each of [`GuestMemory::pieces`] something that can only be at its address.
pub type Prove<'a> = dyn Fn(&GuestMemory) -> Result<String, String> + 'a;

/// How to attach.
#[derive(Clone, Copy)]
pub struct AttachOptions<'a> {
    /// Open the memory for writing too. Without it nothing is opened in a way that could change the guest.
    pub write: bool,
    /// The longest wait for a monitor or stub: to connect, and for each answer.
    pub timeout: Duration,
    /// Proof of a layout that no monitor told. Without it such targets are refused.
    pub prove: Option<&'a Prove<'a>>,
    /// Has something to look at while a monitor is being asked.
    pub ahead: Option<&'a Ahead<'a>>,
}

impl Default for AttachOptions<'_> {
    fn default() -> Self {
        Self {
            write: false,
            timeout: Duration::from_secs(2),
            prove: None,
            ahead: None,
        }
    }
}

impl fmt::Debug for AttachOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttachOptions")
            .field("write", &self.write)
            .field("timeout", &self.timeout)
            .field("prove", &self.prove.is_some())
            .field("ahead", &self.ahead.is_some())
            .finish()
    }
}

/// Attaches to a target.
///
/// # Errors
/// See [`TargetError`]; its messages say what to try.
pub fn attach(spec: &TargetSpec, options: &AttachOptions<'_>) -> Result<Target, TargetError> {
    match spec {
        TargetSpec::Pid(pid) => attach_vm(of_pid(*pid)?, options),
        TargetSpec::Qmp(path) => attach_qmp(path, options),
        TargetSpec::Name(name) => attach_name(name, options),
        TargetSpec::Gdb(address) => by_stub::attach(address, options),
        TargetSpec::File { path, format } => dumps::attach(path, format.as_deref(), options),
    }
}

fn of_pid(pid: u32) -> Result<VmInfo, TargetError> {
    if let Some(info) = discover::describe_to_attach(pid) {
        return Ok(info);
    }
    let process = Process { pid };
    if process.is_gone() {
        return Err(TargetError::NoProcess { pid });
    }
    let comm = process.comm().unwrap_or_default().escape_debug().to_string();
    Err(TargetError::NotAVm { pid, comm })
}

fn attach_name(name: &str, options: &AttachOptions<'_>) -> Result<Target, TargetError> {
    match discover::named(name).map_err(TargetError::List)? {
        Named::Machines(matching) => match &matching[..] {
            [one] => attach_vm(one.clone(), options),
            several => Err(TargetError::Ambiguous {
                name: name.to_owned(),
                pids: several.iter().map(|vm| vm.pid).collect(),
            }),
        },
        // A file of the current folder may be called by its bare name.
        Named::Nothing(_) if Path::new(name).is_file() => dumps::attach(Path::new(name), None, options),
        Named::Nothing(known) => {
            let known = known.iter().take(20).map(|(pid, name)| {
                let name = name.as_deref().unwrap_or("no name");
                format!(
                    "pid:{pid} ({})",
                    name.chars().take(64).collect::<String>().escape_debug()
                )
            });
            Err(TargetError::NotFound {
                name: name.to_owned(),
                known: known.collect(),
            })
        }
    }
}

fn attach_qmp(path: &Path, options: &AttachOptions<'_>) -> Result<Target, TargetError> {
    // Whoever connects first makes it make its machine. That is for its owner to do.
    if let Some(pid) = discover::waiting_at(path) {
        return Err(TargetError::NoLayout {
            pid,
            reason: NO_MACHINE_YET.to_owned(),
            monitor: None,
        });
    }
    let mut qmp = Qmp::greeted(path, options.timeout)?;
    // What it is asked can be answered while we look at the process.
    qmp.ask_ahead(&from_monitor::first_questions(Blocks::of_version(qmp.version())))?;
    let maker = qmp.server_pid();
    let info = match maker.map(of_pid) {
        Some(Ok(info)) => info,
        // Another process made the socket and passed it to the VM, as libvirt does.
        _ => match discover::find(|pid| qmp.is_of(pid)) {
            Some(info) => info,
            None => of_pid(maker.ok_or_else(|| TargetError::NoProcessOfSocket {
                path: path.to_owned(),
            })?)?,
        },
    };
    attach_with(info, Ok(qmp), options)
}

const NO_MACHINE_YET: &str =
    "it waits for its first QMP client (server=on without wait=off) and has no machine yet";

/// Attaches to a VM by its process: asks its monitor for the layout, and deduces it where there is none to ask.
pub(crate) fn attach_vm(info: VmInfo, options: &AttachOptions<'_>) -> Result<Target, TargetError> {
    // Before anything is asked: without this right no monitor helps.
    let process = Process { pid: info.pid };
    process
        .memory_readable()
        .map_err(|e| TargetError::of_process(info.pid, "read the memory", &e))?;
    let monitor = connect_any(&info, options.timeout);
    attach_with(info, monitor, options)
}

/// A connection to the first of its QMP sockets that answers, or why there is none.
pub(crate) fn connect_any(info: &VmInfo, timeout: Duration) -> Result<Qmp, String> {
    // It makes the machine when somebody connects. That is for its owner to do.
    if info.qemu.as_ref().is_some_and(|q| q.waits_for_qmp)
        && discover::has_no_machine_yet(Process { pid: info.pid })
    {
        return Err(NO_MACHINE_YET.to_owned());
    }
    let mut failures = Vec::new();
    for path in info.qmp_sockets() {
        // Another process may listen at that path by now, or in another mount namespace.
        match Qmp::connect(&path, timeout).and_then(|qmp| qmp.refuse_another(info.identity())) {
            Ok(mut qmp) => {
                // A failure comes up again where the answer is wanted.
                let _ = qmp.ask_ahead(&from_monitor::first_questions(Blocks::of_version(qmp.version())));
                return Ok(qmp);
            }
            Err(error) => failures.push(error.to_string()),
        }
    }
    if !failures.is_empty() {
        return Err(failures.join("; "));
    }
    let human = info.control.iter().any(|c| c.kind == ControlKind::Hmp);
    Err(match info.vmm {
        Vmm::Qemu if human => "it has a human monitor and no QMP socket".to_owned(),
        Vmm::Qemu => "it has no QMP socket that can be connected to".to_owned(),
        other => format!("{other} has no monitor that tells registers or layout"),
    })
}

fn attach_with(
    info: VmInfo,
    monitor: Result<Qmp, String>,
    options: &AttachOptions<'_>,
) -> Result<Target, TargetError> {
    let why = match monitor {
        Err(why) => why,
        Ok(mut qmp) => {
            let path = qmp.path().to_owned();
            let begun = qmp.begin().map_err(|error| error.to_string());
            let guess = begun.is_ok().then(|| Guess::show(&info, options)).flatten();
            let layout = begun.and_then(|()| ask_monitor(&mut qmp, &info));
            drop(qmp); // the socket is its owner's again
            let control = QmpControl::new(path, info.identity(), options.timeout);
            return attach_guessed(info, layout, Control::Qmp(control), options, guess);
        }
    };
    let Some(virsh) = VirshControl::of(&info, options.timeout) else {
        return attach_process(info, Err(why.clone()), Control::None(why), options);
    };
    let again = info.clone();
    match attach_process(info, Err(why), Control::Virsh(virsh.clone()), options) {
        // What cannot be deduced (memory plugged in, say) libvirt can be asked for. Not before: it notes in its log that
        // somebody used the monitor.
        Err(error @ (TargetError::NoLayout { .. } | TargetError::Unproven { .. })) => {
            match ask_virsh(&virsh, &again) {
                Ok(ranges) => attach_process(again, Ok(ranges), Control::Virsh(virsh), options),
                Err(why) => {
                    tracing::debug!(why, "libvirt does not tell the layout either");
                    Err(error)
                }
            }
        }
        attached => attached,
    }
}

/// Attaches to the memory of a process, where `layout` says it is, or else where it can be proven to be.
pub(crate) fn attach_process(
    info: VmInfo,
    layout: Result<Vec<HostRange>, String>,
    control: Control,
    options: &AttachOptions<'_>,
) -> Result<Target, TargetError> {
    attach_guessed(info, layout, control, options, None)
}

/// The same, where the layout has been guessed before it was told.
fn attach_guessed(
    mut info: VmInfo,
    layout: Result<Vec<HostRange>, String>,
    control: Control,
    options: &AttachOptions<'_>,
    guess: Option<Guess>,
) -> Result<Target, TargetError> {
    let pid = info.pid;
    let process = Process { pid };
    let identity = info.identity();
    let exited = || identity.start_ticks.is_none() || !identity.runs();
    if exited() {
        return Err(TargetError::Exited { pid });
    }
    process
        .memory_readable()
        .map_err(|e| TargetError::of_process(pid, "read the memory", &e))?;
    let now = || maps::of(process).map_err(|e| TargetError::of_process(pid, "read the mappings", &e));
    // The kernel takes as long to print them as QEMU to answer a question, so they are not read again for nothing.
    let (mut maps, fresh) = match info.maps.take() {
        Some(maps) => (maps, false),
        None => (now()?, true),
    };
    let mut notes = Vec::new();
    let mut fits = layout.as_ref().map(|ranges| from_monitor::check(ranges, &maps));
    if !fresh && matches!(fits, Ok(Err(_))) {
        // Something may have been mapped since.
        maps = now()?;
        fits = layout.as_ref().map(|ranges| from_monitor::check(ranges, &maps));
    }
    let fits = fits.ok().and_then(Result::err);
    let checked = layout.and_then(|ranges| match fits {
        None => Ok(ranges),
        Some(reason) => Err(format!(
            "what its monitor says does not fit the process: {reason}"
        )),
    });
    let mut ahead = false;
    let built = match checked {
        Ok(ranges) => {
            ahead = guess.as_ref().is_some_and(|guess| guess.is_part_of(&ranges));
            let mut opened = guess.map(|guess| guess.opened).unwrap_or_default();
            let built = backing::build(process, &maps, &ranges, options.write, &mut opened)?;
            notes.push("its monitor told where its memory lies, and the process has it there".to_owned());
            built
        }
        Err(why) => {
            let (built, proof) = prove_layout(&info, &maps, why, options)?;
            notes.push(format!(
                "where its memory lies was deduced and then proven: {proof}"
            ));
            built
        }
    };
    if exited() {
        return Err(TargetError::Exited { pid });
    }
    notes.extend(built.notes);
    match &control {
        Control::None(why) => notes.push(format!("no registers and no pausing: {why}")),
        Control::Gdb { .. } => {
            notes.push("registers come from its gdb stub, which pauses it for the moment".to_owned())
        }
        Control::Virsh(_) => {
            notes.push("registers and pausing go through libvirt, which holds its monitor".to_owned());
        }
        Control::Qmp(_) | Control::Dump(_) => {}
    }
    Ok(Target {
        memory: built.memory,
        name: info.name.clone().unwrap_or_else(|| format!("pid:{pid}")),
        kind: TargetKind::Vm(info.vmm),
        notes,
        info: Some(info),
        vmcoreinfo: None,
        ahead,
        control,
    })
}

/// The layout from a monitor; an error is the reason in words.
fn ask_monitor(qmp: &mut Qmp, info: &VmInfo) -> Result<Vec<HostRange>, String> {
    let mut backends = match qmp.memory_backends() {
        Ok(backends) => backends,
        // QEMU before 2.1 has no such command; the machine's own memory is known without.
        Err(QmpError::Command { .. }) => Vec::new(),
        Err(error) => return Err(error.to_string()),
    };
    leave_out_devices(&mut backends, info);
    let blocks = Blocks::of_version(qmp.version());
    layout_of(from_monitor::ask(&backends, blocks, |lines| qmp.hmp_all(lines)))
}

/// The layout from the monitor that libvirt holds.
fn ask_virsh(virsh: &VirshControl, info: &VmInfo) -> Result<Vec<HostRange>, String> {
    let mut backends = monitor::parse_memdev(&virsh.hmp("info memdev").map_err(|e| e.to_string())?);
    leave_out_devices(&mut backends, info);
    layout_of(from_monitor::ask(&backends, Blocks::Unknown, |lines| {
        lines.iter().map(|line| virsh.hmp(line)).collect()
    }))
}

/// Takes out the backends that are some device's memory (ivshmem's), as far as the command line tells.
pub(crate) fn leave_out_devices(backends: &mut Vec<String>, info: &VmInfo) {
    if let Some(config) = &info.qemu {
        let is_devices = |id: &String| config.device_backends.contains(id);
        backends.retain(|id| !is_devices(id));
    }
}

/// What a monitor answered, its failures in words.
pub(crate) fn layout_of<E: fmt::Display>(
    answer: Result<Vec<HostRange>, MonitorFailure<E>>,
) -> Result<Vec<HostRange>, String> {
    answer.map_err(|failure| match failure {
        MonitorFailure::Monitor(error) => error.to_string(),
        MonitorFailure::Inconsistent(reason) => reason,
    })
}

/// Tries the layouts that the process allows until one is proven.
fn prove_layout(
    info: &VmInfo,
    maps: &[Mapping],
    monitor: String,
    options: &AttachOptions<'_>,
) -> Result<(backing::Built, String), TargetError> {
    let pid = info.pid;
    // Where these lie only QEMU knows; without them the layout is right where the guest does not use them.
    let dimms = info.qemu.as_ref().map(|q| q.dimms.as_slice()).unwrap_or_default();
    let monitor = if dimms.is_empty() {
        monitor
    } else {
        format!(
            "{monitor}; it has memory that was plugged in ({}), and only its monitor tells where",
            dimms.join(", ").escape_debug()
        )
    };
    let candidates = deduce::candidates(info, maps).map_err(|reason| TargetError::NoLayout {
        pid,
        reason,
        monitor: Some(monitor.clone()),
    })?;
    let unproven = |tried| TargetError::Unproven {
        pid,
        tried,
        monitor: Some(monitor.clone()),
    };
    let mut tried = Vec::new();
    let mut opened = Opened::default();
    for candidate in &candidates {
        let built = match backing::build(
            Process { pid },
            maps,
            &candidate.ranges,
            options.write,
            &mut opened,
        ) {
            Ok(built) => built,
            Err(error) => {
                tried.push(format!("{}: {error}", candidate.what));
                continue;
            }
        };
        let verdict = match options.prove {
            Some(prove) => prove(&built.memory),
            None => Err("nobody was there to look for a guest in it".to_owned()),
        };
        match verdict {
            Ok(proof) => {
                let proof = format!("{}: {proof}", candidate.what);
                // A proof that holds for the same memory with its pieces exchanged as well is none.
                let rivals = candidates.iter().filter(|c| c.is_rival_of(candidate));
                for rival in rivals.take(MAX_RIVALS) {
                    let built =
                        backing::build(Process { pid }, maps, &rival.ranges, options.write, &mut opened);
                    if let (Ok(built), Some(prove)) = (built, options.prove)
                        && let Ok(other) = prove(&built.memory)
                    {
                        tried.push(format!("{proof}; but as much speaks for {}: {other}", rival.what));
                        return Err(unproven(tried));
                    }
                }
                return Ok((built, proof));
            }
            Err(reason) => tried.push(format!("{}: {reason}", candidate.what)),
        }
        if (Process { pid }).is_gone() {
            return Err(TargetError::Exited { pid });
        }
    }
    Err(unproven(tried))
}

/// Most layouts that are tried beside one that was proven: all those of three backends of one size.
const MAX_RIVALS: usize = 5;
