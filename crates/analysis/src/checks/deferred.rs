//! What the kernel will call later: timers of both kinds, and queued work.

use vmsight_arch::Gva;
use vmsight_linux::LinuxError;
use vmsight_linux::structures::{Walk, hlist, list, rbtree, xarray};

use super::pointers::Pointers;
use crate::{Check, Context, Findings, Object, Owner, Technique};

/// Timers of one wheel's slot, or one queue's works, that are looked at.
const MAX_QUEUED: usize = 1 << 14;

pub(super) const TIMERS: Check = Check {
    name: "timers",
    summary: "Functions that timers will call",
    compares: "the function of every pending timer on every CPU with the code that the kernel knows",
    why: "A timer is how code that is in no list and no process comes to run again and again.",
    techniques: &[Technique::ROOTKIT],
    blind_spots: &["A timer that is running or is set anew at the moment."],
    run: timers,
};

/// BASE_STD, BASE_DEF, and since 6.9 BASE_LOCAL and BASE_GLOBAL.
const MAX_BASES: u64 = 4;

fn timers(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let mut pointers = Pointers::new(context);
    each_timer(context, findings, |findings, cpu, timer| {
        let slot = timer.member("function")?;
        if context.space().read_u64(slot).is_ok() {
            pointers.hook(findings, &format!("timer of CPU {cpu}"), "function", slot);
        }
        Ok(())
    })
}

/// All pending timers (`struct timer_list`), with their CPU's number.
fn each_timer<'c>(
    context: &'c Context,
    findings: &mut Findings,
    mut look: impl FnMut(&mut Findings, u32, Object<'c>) -> Result<(), LinuxError>,
) -> Result<(), LinuxError> {
    let bases = context.kernel().per_cpu_symbol("timer_bases")?;
    let base = context.object("timer_base", Gva(0))?;
    let node = context.kernel().offset("timer_list", "entry")?;
    let timer = context.object("timer_list", Gva(0))?;
    let vectors = base.size_of("vectors")? / 8;
    // As many as there is room for before the next variable.
    let room = context.room("timer_bases").checked_div(base.size()).unwrap_or(0);
    for (cpu, at) in context.kernel().per_cpu()?.copies(bases) {
        for number in 0..room.clamp(1, MAX_BASES) {
            if !findings.go_on() {
                return Ok(());
            }
            let base = base.moved(at.wrapping_add(number * base.size()));
            let vector = base.member("vectors")?;
            let mut heads = vec![0; vectors.min(1024) as usize * 8];
            if let Err(error) = context.space().read(vector, &mut heads) {
                findings.note(format!("timers of CPU {cpu}: {error}"));
                break;
            }
            findings.looked_at(heads.len() / 8);
            for (index, head) in heads.chunks_exact(8).enumerate() {
                if head.iter().all(|b| *b == 0) {
                    continue;
                }
                let walk = hlist::walk(
                    context.space(),
                    vector.wrapping_add(index as u64 * 8),
                    MAX_QUEUED.min(findings.left()),
                );
                // Timers come and go while they are read; a chain that ends oddly is one that did.
                for entry in walk.items {
                    if !findings.go_on() {
                        return Ok(());
                    }
                    look(findings, cpu, timer.moved(entry.wrapping_sub(node)))?;
                }
            }
        }
    }
    Ok(())
}

pub(super) const HRTIMERS: Check = Check {
    name: "hrtimers",
    summary: "Functions that high-resolution timers will call",
    compares: "the function of every queued high-resolution timer, of each clock on every CPU, with the code that the kernel knows",
    why: "It is called in the middle of an interrupt, as often as its owner likes, and is in no list that a tool shows.",
    techniques: &[Technique::ROOTKIT],
    blind_spots: &["A timer that is running or is set anew at the moment."],
    run: hrtimers,
};

fn hrtimers(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let mut pointers = Pointers::new(context);
    let kernel = context.kernel();
    let bases = kernel.per_cpu_symbol("hrtimer_bases")?;
    let base = context.object("hrtimer_cpu_base", Gva(0))?;
    let clock = context.object("hrtimer_clock_base", Gva(0))?;
    let clocks = base.size_of("clock_base")?.checked_div(clock.size()).unwrap_or(0);
    let node = kernel.offset("hrtimer", "node")?;
    let timer = context.object("hrtimer", Gva(0))?;
    for (cpu, at) in kernel.per_cpu()?.copies(bases) {
        let first = base.moved(at).member("clock_base")?;
        for number in 0..clocks.min(16) {
            let clock = clock.moved(first.wrapping_add(number * clock.size()));
            let limit = MAX_QUEUED.min(findings.left());
            let queued = rbtree::walk(context.space(), clock.member("active")?, limit);
            let what = format!("high-resolution timers of CPU {cpu}");
            for entry in settled(context, findings, &what, queued) {
                if !findings.go_on() {
                    return Ok(());
                }
                let slot = timer.moved(entry.wrapping_sub(node)).member("function")?;
                if context.space().read_u64(slot).is_ok() {
                    let subject = format!("high-resolution timer of CPU {cpu}");
                    pointers.hook(findings, &subject, "function", slot);
                }
            }
        }
    }
    Ok(())
}

/// A walk's elements. In a guest that runs, queues change as they are read, and one that ends oddly is one that did.
fn settled(context: &Context, findings: &mut Findings, what: &str, walk: Walk) -> Vec<Gva> {
    if context.is_changing() {
        findings.looked_at(1);
        return walk.items;
    }
    findings.complete(what, walk)
}

pub(super) const WORKQUEUES: Check = Check {
    name: "workqueues",
    summary: "Functions that queued work will call",
    compares: "the function of everything that is queued to the kernel's workers, that they do at the moment, that waits for its turn, \
               and that is queued once its delay is over, with the code that the kernel knows",
    why: "Work runs in a thread of the kernel's own: who queues some again and again has no thread and no timer to be found by.",
    techniques: &[Technique::ROOTKIT],
    blind_spots: &[
        "Work that queues itself only now and then, and is not queued at the moment.",
        "Work that waits for the end of an RCU grace period.",
    ],
    run: workqueues,
};

fn workqueues(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let mut pointers = Pointers::new(context);
    let pools = xarray::walk_idr(context.kernel(), context.symbol(&["worker_pool_idr"])?)?;
    let worker_of = context.kernel().offset("worker", "node")?;
    for entry in findings.complete("table of worker pools", pools) {
        let Some(at) = entry.pointer() else { continue };
        let pool = context.object("worker_pool", at)?;
        let subject = format!("work in worker pool {}", entry.index);
        works(
            context,
            findings,
            &mut pointers,
            &subject,
            pool.member("worklist")?,
        )?;
        let limit = MAX_QUEUED.min(findings.left());
        let workers = list::walk(context.space(), pool.member("workers")?, limit).walk;
        for node in settled(context, findings, "list of workers", workers) {
            let worker = context.object("worker", node.wrapping_sub(worker_of))?;
            let slot = worker.member("current_func")?;
            if context.space().read_u64(slot).is_ok() {
                let subject = format!("work being done in worker pool {}", entry.index);
                pointers.hook(findings, &subject, "func", slot);
            }
        }
    }
    waiting(context, findings, &mut pointers)?;
    delayed(context, findings, &mut pointers)
}

/// The works of the list whose head lies at `head`.
fn works(
    context: &Context,
    findings: &mut Findings,
    pointers: &mut Pointers<'_>,
    subject: &str,
    head: Gva,
) -> Result<(), LinuxError> {
    let entry = context.kernel().offset("work_struct", "entry")?;
    let work = context.object("work_struct", Gva(0))?;
    let limit = MAX_QUEUED.min(findings.left());
    let queued = list::walk(context.space(), head, limit).walk;
    for node in settled(context, findings, subject, queued) {
        let slot = work.moved(node.wrapping_sub(entry)).member("func")?;
        if context.space().read_u64(slot).is_ok() {
            pointers.hook(findings, subject, "func", slot);
        }
    }
    Ok(())
}

/// What each queue holds back, for as much of its work is being done as it allows at once.
fn waiting(
    context: &Context,
    findings: &mut Findings,
    pointers: &mut Pointers<'_>,
) -> Result<(), LinuxError> {
    let kernel = context.kernel();
    let of_queue = kernel.offset("workqueue_struct", "list")?;
    let of_pool = kernel.offset("pool_workqueue", "pwqs_node")?;
    let queues = list::walk(context.space(), context.symbol(&["workqueues"])?, MAX_QUEUED).walk;
    for node in findings.complete("list of work queues", queues) {
        let queue = context.object("workqueue_struct", node.wrapping_sub(of_queue))?;
        // Up to 6.9 a text inside; a longer one since, still inside.
        let name = queue.array_text("name").unwrap_or_default();
        let subject = format!("work held back in queue {name}");
        let pools = list::walk(
            context.space(),
            queue.member("pwqs")?,
            MAX_QUEUED.min(findings.left()),
        );
        for node in settled(context, findings, "pools of a work queue", pools.walk) {
            if !findings.go_on() {
                return Ok(());
            }
            let pool = context.object("pool_workqueue", node.wrapping_sub(of_pool))?;
            // Renamed in 5.15.
            let head = pool.member("inactive_works|delayed_works")?;
            works(context, findings, pointers, &subject, head)?;
        }
    }
    Ok(())
}

/// What timers will queue.
fn delayed(
    context: &Context,
    findings: &mut Findings,
    pointers: &mut Pointers<'_>,
) -> Result<(), LinuxError> {
    let Some(queues) = context.kernel().find_symbol(&["delayed_work_timer_fn"]) else {
        findings.note("delayed work is not looked at: the kernel hides what queues it");
        return Ok(());
    };
    let timer_of = context.kernel().offset("delayed_work", "timer")?;
    let work = context.object("delayed_work", Gva(0))?;
    each_timer(context, findings, |findings, _, timer| {
        if timer.pointer("function").ok() != Some(queues) {
            return Ok(());
        }
        let slot = work
            .moved(timer.address().wrapping_sub(timer_of))
            .member("work.func")?;
        let Ok(function) = context.pointer("work.func", slot) else {
            return Ok(());
        };
        // What is queued on this very moment has left the wheel, and its memory may be something else's.
        if !matches!(context.owner(function), Owner::Null) {
            pointers.hook(findings, "delayed work", "func", slot);
        }
        Ok(())
    })
}
