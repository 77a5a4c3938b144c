//! The debuggee in the words of `gdbstub`.

use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use vmsight_arch::Gva;

use super::debuggee::{Action, Debuggee, readable};
use super::points::Point;
use super::registers::{Number, Values, Vcpu};
use crate::EventError;

/// EFAULT, which debuggers understand as "no such memory".
const EFAULT: u8 = 14;

/// What ends the session, and what only the one request.
fn fault(error: EventError) -> TargetError<EventError> {
    match error {
        error @ (EventError::Gone | EventError::Protocol { .. }) => TargetError::Fatal(error),
        error => {
            tracing::debug!(%error, "the debugger asked for what cannot be");
            TargetError::NonFatal
        }
    }
}

impl Target for Debuggee {
    type Arch = Vcpu;
    type Error = EventError;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Debuggee {
    fn read_registers(&mut self, values: &mut Values, tid: Tid) -> TargetResult<(), Self> {
        *values = Values {
            registers: self.registers(tid).map_err(fault)?,
            refused: false,
        };
        Ok(())
    }

    fn write_registers(&mut self, values: &Values, tid: Tid) -> TargetResult<(), Self> {
        let changes = values.changes(&self.registers(tid).map_err(fault)?);
        if values.refused || !self.change(tid, changes) {
            return Err(TargetError::NonFatal);
        }
        Ok(())
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let space = self.space(tid, start).map_err(fault)?;
        match readable(&space, start, data) {
            0 if !data.is_empty() => Err(TargetError::Errno(EFAULT)),
            len => Ok(len),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let space = self.space(tid, start).map_err(fault)?;
        space.write(Gva(start), data).map_err(|error| {
            tracing::debug!(%error, "the debugger wrote where it cannot");
            TargetError::Errno(EFAULT)
        })
    }

    fn list_active_threads(&mut self, thread_is_active: &mut dyn FnMut(Tid)) -> Result<(), Self::Error> {
        self.threads().for_each(thread_is_active);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl ThreadExtraInfo for Debuggee {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Self::Error> {
        let text = self.describe(tid);
        let len = text.len().min(buf.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..len), text.as_bytes().get(..len)) {
            to.copy_from_slice(from);
        }
        Ok(len)
    }
}

impl SingleRegisterAccess<Tid> for Debuggee {
    fn read_register(&mut self, tid: Tid, number: Number, buf: &mut [u8]) -> TargetResult<usize, Self> {
        Ok(number.read(&self.registers(tid).map_err(fault)?, buf))
    }

    fn write_register(&mut self, tid: Tid, number: Number, value: &[u8]) -> TargetResult<(), Self> {
        match number.change(value) {
            Some(change) if self.change(tid, vec![change]) => Ok(()),
            _ => Err(TargetError::NonFatal),
        }
    }
}

impl MultiThreadResume for Debuggee {
    fn resume(&mut self) -> Result<(), Self::Error> {
        Self::resume(self)
    }

    fn clear_resume_actions(&mut self) -> Result<(), Self::Error> {
        self.action = Action::Continue;
        Ok(())
    }

    // Every thread that is not stepped goes on; signals mean nothing to a machine.
    fn set_resume_action_continue(&mut self, _tid: Tid, _signal: Option<Signal>) -> Result<(), Self::Error> {
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSchedulerLocking for Debuggee {
    // gdb locks whenever it steps over a breakpoint. A step moves nobody else anyhow; where a vCPU is to go
    // on alone the others go on too, for a machine cannot wait for half of itself.
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }
}

impl MultiThreadSingleStep for Debuggee {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Self::Error> {
        self.action = Action::Step(tid);
        Ok(())
    }
}

impl Breakpoints for Debuggee {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl Debuggee {
    fn add(&mut self, point: Point) -> TargetResult<bool, Self> {
        let monitor = self.monitor().clone();
        match self.points.add(&monitor, point) {
            Ok(()) => Ok(true),
            Err(error) => match fault(error) {
                TargetError::NonFatal => Ok(false),
                error => Err(error),
            },
        }
    }
}

impl SwBreakpoint for Debuggee {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.add(Point::Execute(address))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.points.remove(Point::Execute(address)))
    }
}

impl HwBreakpoint for Debuggee {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.add(Point::Execute(address))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.points.remove(Point::Execute(address)))
    }
}

impl HwWatchpoint for Debuggee {
    fn add_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        let watch = kind.into();
        self.add(Point::Memory { address, len, watch })
    }

    fn remove_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        let watch = kind.into();
        Ok(self.points.remove(Point::Memory { address, len, watch }))
    }
}
