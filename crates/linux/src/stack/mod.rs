//! Kernel stacks: through which functions each thread came to where it is in the kernel.
//!
//! A thread that is not on a CPU left its context on its stack when it was switched away (`struct inactive_task_frame`,
//! arch/x86/include/asm/switch_to.h); from there on the kernel's own ORC tables say where each frame ends, up to the registers that
//! entering the kernel saved. `/proc/PID/stack` shows the same, without the scheduler's own functions.

mod code;
mod frame;
mod hooked;
mod orc;
mod unwind;

use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use self::code::{Code, Name};
pub use self::frame::{How, StackFrame};
use self::hooked::Hooked;
use self::unwind::{Frame, PtRegs, Stack, State, Unwinder};
use crate::budget::{Budget, Own};
use crate::layout::{Buffer, Field, Place, Spans, layout};
use crate::listing::{Listing, Problem};
use crate::task::saved;
use crate::{Kernel, LinuxError, Thread};

/// How often the stack of a thread that runs meanwhile is read again.
const RETRIES: usize = 4;
/// Frames that are shown of every thread, however many others have.
const OWN: Own = Own { rows: 32, bytes: 0 };

layout! {
    /// What a task says of its stack.
    struct StackLayout = "task_struct" {
        sp: Field<u64> = "thread.sp",
        stack: Field<u64> = "stack",
        pid: Field<i32> = "pid",
        on_cpu: Option<Field<u32>> = "on_cpu",
        voluntary: Field<u64> = "nvcsw",
        involuntary: Field<u64> = "nivcsw",
        returns: Option<Field<Gva>> = "ret_stack",                                // CONFIG_FUNCTION_GRAPH_TRACER
        // Kretprobes: of each task since 5.11.
        probes: Option<Field<Gva>> = "rethooks.first" | "kretprobe_instances.first",
    }
}

layout! {
    /// What being switched away leaves on the stack.
    struct InactiveLayout = "inactive_task_frame" {
        bp: Field<u64> = "bp",
        address: Field<u64> = "ret_addr",
    }
}

layout! {
    /// `struct pt_regs`, as far as tables refer to it.
    struct RegsLayout = "pt_regs" {
        ip: Place = "ip",
        cs: Place = "cs",
        sp: Place = "sp",
        bp: Place = "bp",
        ax: Place = "ax",
        dx: Place = "dx",
        di: Place = "di",
        r10: Place = "r10",
        r13: Place = "r13",
    }
}

/// A task at the moment its stack was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Task {
    sp: u64,
    stack: u64,
    pid: i32,
    on_cpu: bool,
    switches: u64,
    returns: Gva,
    probes: Gva,
}

struct StackReader<'k> {
    kernel: &'k Kernel,
    layout: Arc<StackLayout>,
    inactive: Arc<InactiveLayout>,
    spans: Spans,
    buffer: Buffer,
    size: u64,
    unwinder: Unwinder<'k>,
}

impl Kernel {
    /// The kernel stacks of these threads, the innermost frame of each first. `generated` says whose an address is that lies in
    /// neither the kernel's nor a listed module's code, where it is known: BPF programs and trampolines are.
    ///
    /// Threads that were on a CPU have no frames: what they last left on their stacks is long overwritten. Of a running guest's
    /// sleeping ones each stack is that of one moment.
    ///
    /// # Errors
    /// If the kernel's symbols or types lack what is needed: x86-64, 5.10 and later.
    pub fn stacks(
        &self,
        threads: &[Thread],
        generated: &dyn Fn(Gva) -> Option<String>,
    ) -> Result<Listing<StackFrame>, LinuxError> {
        let mut listing = Listing::default();
        let mut reader = StackReader::new(self, &mut listing)?;
        let budget = Budget::shared_by(threads.len(), OWN);
        for thread in threads {
            let mut own = budget.own();
            let rows = reader.thread(thread, generated);
            let all = rows.len();
            let taken = rows.into_iter().take_while(|_| budget.row_of(&mut own, 0));
            let before = listing.rows.len();
            listing.rows.extend(taken);
            let shown = listing.rows.len() - before;
            if shown < all {
                listing.warn(format!(
                    "stacks: of thread {} only {shown} frames are shown",
                    thread.tid
                ));
            }
        }
        budget.warning("stacks").into_iter().for_each(|w| listing.warn(w));
        Ok(listing)
    }
}

impl<'k> StackReader<'k> {
    fn new(kernel: &'k Kernel, listing: &mut Listing<StackFrame>) -> Result<Self, LinuxError> {
        let layout: Arc<StackLayout> = kernel.layout()?;
        let mut extents = vec![
            layout.sp.extent(),
            layout.stack.extent(),
            layout.pid.extent(),
            layout.voluntary.extent(),
            layout.involuntary.extent(),
        ];
        extents.extend(layout.on_cpu.iter().map(Field::extent));
        extents.extend(
            [&layout.returns, &layout.probes]
                .into_iter()
                .flatten()
                .map(Field::extent),
        );
        let spans = Spans::covering("task_struct", kernel.release(), extents)?;
        let regs: Arc<RegsLayout> = kernel.layout()?;
        Ok(Self {
            kernel,
            inactive: kernel.layout()?,
            buffer: spans.buffer(),
            size: saved::stack_size(kernel),
            unwinder: Unwinder {
                space: kernel.space(),
                code: Code::read(kernel, listing)?,
                hooked: Hooked::new(kernel),
                regs: PtRegs {
                    size: regs.size,
                    ip: regs.ip.offset(),
                    cs: regs.cs.offset(),
                    sp: regs.sp.offset(),
                    bp: regs.bp.offset(),
                    ax: regs.ax.offset(),
                    dx: regs.dx.offset(),
                    di: regs.di.offset(),
                    r10: regs.r10.offset(),
                    r13: regs.r13.offset(),
                },
                paddings: &saved::PADDINGS,
            },
            layout,
            spans,
        })
    }

    /// The rows of one thread: its frames, or why there are none.
    fn thread(&mut self, thread: &Thread, generated: &dyn Fn(Gva) -> Option<String>) -> Vec<StackFrame> {
        let name: Arc<str> = thread.name.as_str().into();
        let row = |switches, depth: usize, how| StackFrame {
            pid: thread.pid,
            tid: thread.tid,
            name: name.clone(),
            state: thread.state,
            kernel_thread: thread.kernel_thread,
            switches,
            depth: depth as u32,
            address: None,
            symbol: None,
            module: None,
            how,
            slot: None,
            task: thread.task,
            problems: Vec::new(),
        };
        let without = |switches, how, problem: Option<Problem>| {
            let mut row = row(switches, 0, how);
            row.problems.extend(problem);
            vec![row]
        };
        let (task, stack) = match self.still(thread.task) {
            Ok(Some(both)) => both,
            Ok(None) => return without(None, How::Running, None),
            Err(error) => {
                return without(None, How::Unknown, Some(Problem::read("address", &error)));
            }
        };
        let switches = Some(task.switches);
        if task.pid != thread.tid {
            let problem = Problem::new("tid", "it has ended, and the memory of its task is another's");
            return without(None, How::Ended, Some(problem));
        }
        if task.on_cpu {
            return without(switches, How::Running, None);
        }
        if task.stack == 0 {
            return without(switches, How::Ended, None);
        }
        let frames = match self.frames(&task, &stack) {
            Some(frames) => frames,
            None => {
                let reason = format!("the saved stack pointer {:#x} does not lie on its stack", task.sp);
                return without(switches, How::Unknown, Some(Problem::new("address", reason)));
            }
        };
        let shown = frames.into_iter().enumerate().map(|(depth, frame)| {
            let mut row = row(switches, depth, frame.how);
            self.describe(frame, &mut row, generated);
            row
        });
        shown.collect()
    }

    /// A task and its stack of one moment; `None` where it runs at each look.
    fn still(&mut self, at: Gva) -> Result<Option<(Task, Stack)>, ReadError> {
        let mut task = self.task(at)?;
        for _ in 0..RETRIES {
            let stack = self.stack(&task)?;
            if !self.kernel.memory().is_live() {
                return Ok(Some((task, stack)));
            }
            // What it was switched away with says whether it ran meanwhile.
            let after = self.task(at)?;
            if after == task {
                return Ok(Some((task, stack)));
            }
            task = after;
        }
        Ok(None)
    }

    fn task(&mut self, at: Gva) -> Result<Task, ReadError> {
        self.spans.read(self.kernel.space(), at, &mut self.buffer)?;
        let (layout, task) = (&self.layout, &self.buffer);
        let pointer = |field: &Option<Field<Gva>>| field.map_or(Gva(0), |f| f.of(task));
        Ok(Task {
            sp: layout.sp.of(task),
            stack: layout.stack.of(task),
            pid: layout.pid.of(task),
            on_cpu: layout.on_cpu.is_some_and(|on| on.of(task) != 0),
            switches: layout
                .voluntary
                .of(task)
                .wrapping_add(layout.involuntary.of(task)),
            returns: pointer(&layout.returns),
            probes: pointer(&layout.probes),
        })
    }

    /// The part of its stack that is in use, in one read; nothing where it has none.
    fn stack(&self, task: &Task) -> Result<Stack, ReadError> {
        let used = task.stack.wrapping_add(self.size).wrapping_sub(task.sp);
        if task.stack == 0 || task.on_cpu || task.sp & 7 != 0 || used > self.size {
            return Ok(Stack::default());
        }
        let mut bytes = vec![0; used as usize];
        self.kernel.space().read(Gva(task.sp), &mut bytes)?;
        Ok(Stack { base: task.sp, bytes })
    }

    fn frames(&self, task: &Task, stack: &Stack) -> Option<Vec<Frame>> {
        let word = |field: &Field<u64>| {
            let from = usize::try_from(field.extent().offset).ok()?;
            Some(u64::from_le_bytes(*stack.bytes.get(from..)?.first_chunk::<8>()?))
        };
        let (ip, bp) = (word(&self.inactive.address)?, word(&self.inactive.bp)?);
        // A thread that never ran begins where new ones begin: at an instruction, not behind a call.
        let symbols = &self.kernel.profile().symbols;
        let linked = self.kernel.image().link_time(Gva(ip));
        let begins = symbols
            .nearest(linked)
            .is_some_and(|(s, offset)| offset == 0 && s.name.starts_with("ret_from_fork"));
        let state = State::new(ip, stack.base.wrapping_add(self.inactive.size), bp, begins);
        let slot = self.inactive.address.at(Gva(stack.base)).0;
        Some(self.unwinder.frames(task, stack, state, slot))
    }

    fn describe(&self, frame: Frame, row: &mut StackFrame, generated: &dyn Fn(Gva) -> Option<String>) {
        let code = &self.unwinder.code;
        let Name { symbol, module } = code.name(frame.address, frame.exact);
        (row.symbol, row.module) = (symbol, module);
        (row.address, row.slot) = (Some(Gva(frame.address)), Some(Gva(frame.slot)));
        row.problems
            .extend(frame.problem.map(|reason| Problem::new("depth", reason)));
        if code.owner(frame.address).is_none() {
            match generated(Gva(frame.address)) {
                Some(what) => row.symbol = Some(what.into()),
                None => {
                    let reason = "it lies in no code of the kernel or of a module in its list";
                    row.problems.push(Problem::new("address", reason));
                }
            }
        }
    }
}
