//! What a process that is in the kernel, or not on a CPU at all, left of its user mode: the registers that
//! entering the kernel saved on its kernel stack (`task_pt_regs`, arch/x86/include/asm/processor.h).

use std::sync::Arc;

use vmsight_arch::registers::Segment;
use vmsight_arch::{Gva, Registers};

use super::layouts::TaskLayout;
use crate::layout::{Field, layout};
use crate::{Kernel, LinuxError};

layout! {
    /// `struct pt_regs`, in the order in which it is pushed.
    struct PtRegsLayout = "pt_regs" {
        r15: Field<u64> = "r15",
        r14: Field<u64> = "r14",
        r13: Field<u64> = "r13",
        r12: Field<u64> = "r12",
        bp: Field<u64> = "bp",
        bx: Field<u64> = "bx",
        r11: Field<u64> = "r11",
        r10: Field<u64> = "r10",
        r9: Field<u64> = "r9",
        r8: Field<u64> = "r8",
        ax: Field<u64> = "ax",
        cx: Field<u64> = "cx",
        dx: Field<u64> = "dx",
        si: Field<u64> = "si",
        di: Field<u64> = "di",
        ip: Field<u64> = "ip",
        // With other things in the same 64 bits since 6.9.
        cs: Field<u16> = "cs",
        flags: Field<u64> = "flags",
        sp: Field<u64> = "sp",
        ss: Field<u16> = "ss",
    }
}

layout! {
    /// Bases of FS and GS, of a task that is not on a CPU (`struct thread_struct`).
    struct ThreadLayout = "task_struct" {
        fs: Option<Field<u64>> = "thread.fsbase",
        gs: Option<Field<u64>> = "thread.gsbase",
    }
}

/// `THREAD_SIZE` where the types do not say: 4 pages, unless KASAN is built in.
const STACK: u64 = 16 << 10;
/// The largest that is believed.
const MAX_STACK: u64 = 1 << 20;
/// `TOP_OF_KERNEL_STACK_PADDING`: none, or since 6.9 with FRED two words.
pub(crate) const PADDINGS: [u64; 2] = [0, 16];

/// `THREAD_SIZE`: bytes of a kernel stack.
pub(crate) fn stack_size(kernel: &Kernel) -> u64 {
    let types = kernel.types();
    let size = types.find_struct("thread_union").and_then(|id| types.size_of(id));
    size.filter(|size| size.is_power_of_two() && *size <= MAX_STACK)
        .unwrap_or(STACK)
}

impl Kernel {
    /// The user-mode registers with which a thread will go on when it returns from the kernel; `None` where
    /// it has none (a kernel thread) or they are not recognisable. Of a thread that is in user mode at this
    /// moment they are those with which it last entered the kernel. CR3 and the other control registers are
    /// zero.
    ///
    /// # Errors
    /// If the task cannot be read, or the kernel's types lack a member.
    pub fn user_registers(&self, task: Gva) -> Result<Option<Registers>, LinuxError> {
        let layout: Arc<TaskLayout> = self.layout()?;
        let saved: Arc<PtRegsLayout> = self.layout()?;
        let thread: Arc<ThreadLayout> = self.layout()?;
        let types = self.types();
        let size = types.find_struct("pt_regs").and_then(|id| types.size_of(id));
        let Some(frame) = size.filter(|size| *size <= 512) else {
            return Ok(None);
        };
        let space = self.space();
        let stack = layout.stack.read(space, task);
        let stack = stack.map_err(LinuxError::read("task_struct.stack", task))?;
        let top = stack.wrapping_add(stack_size(self));
        for padding in PADDINGS {
            let at = Gva(top.0.wrapping_sub(padding).wrapping_sub(frame));
            let read = |field: &Field<u64>| field.read(space, at).map_err(LinuxError::read("pt_regs", at));
            let selector =
                |field: &Field<u16>| field.read(space, at).map_err(LinuxError::read("pt_regs", at));
            let segment = |selector| Segment {
                selector,
                ..Segment::default()
            };
            let (cs, ss) = (segment(selector(&saved.cs)?), segment(selector(&saved.ss)?));
            // Both are of user mode, and IF is on there: anything else is not such a frame.
            let rflags = read(&saved.flags)?;
            if cs.rpl() != 3 || ss.rpl() != 3 || rflags & (1 << 9) == 0 {
                continue;
            }
            let base = |field: &Option<Field<u64>>| {
                let read = field.as_ref().map(|f| f.read(space, task).ok());
                read.flatten().unwrap_or_default()
            };
            return Ok(Some(Registers {
                gprs: [
                    read(&saved.ax)?,
                    read(&saved.cx)?,
                    read(&saved.dx)?,
                    read(&saved.bx)?,
                    read(&saved.sp)?,
                    read(&saved.bp)?,
                    read(&saved.si)?,
                    read(&saved.di)?,
                    read(&saved.r8)?,
                    read(&saved.r9)?,
                    read(&saved.r10)?,
                    read(&saved.r11)?,
                    read(&saved.r12)?,
                    read(&saved.r13)?,
                    read(&saved.r14)?,
                    read(&saved.r15)?,
                ],
                rip: read(&saved.ip)?,
                rflags,
                cs,
                ss,
                fs: Segment {
                    base: base(&thread.fs),
                    ..Segment::default()
                },
                gs: Segment {
                    base: base(&thread.gs),
                    ..Segment::default()
                },
                ..Registers::default()
            }));
        }
        Ok(None)
    }
}
