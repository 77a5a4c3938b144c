//! What filters ask about Linux: they run where the kernel's types are not known, so the way there is worked out
//! here.

use vmsight_hooks::{Condition, Field, Filter, Value};
use vmsight_linux::CurrentReader;

/// The pid of the process that runs on the vCPU of an event, in the root namespace. Not at the kernel's first
/// instructions behind an entry from user mode, before its SWAPGS: there the program's own GS base would be
/// followed, which it may choose.
pub fn current_pid(reader: &CurrentReader) -> Value {
    let chain = reader.pid_chain();
    let task = Value::from(Field::PerCpu).plus(chain.variable).load(8);
    task.plus(chain.tgid).load(4)
}

/// All of these conditions, as far as a filter can hold them. What it cannot is judged by the monitor, as without
/// one.
pub(super) fn all(conditions: impl IntoIterator<Item = Condition>) -> Filter {
    let conditions: Vec<Condition> = conditions.into_iter().filter(|c| c.compile().is_ok()).collect();
    if conditions.is_empty() {
        return Filter::none();
    }
    Filter::only(&Condition::All(conditions)).unwrap_or_default()
}
