//! What goes to the host: events of the guest, how things are, and what the host orders.

use core::fmt::{self, Display, Formatter, Write};
use core::mem::offset_of;
use core::sync::atomic::{Ordering, fence};

use vmsight_sim_abi::{CALLS, EVENT_WORDS, EVENTS, Event, Ring, State, Watch};
use vmsight_sim_hypervisor::attempt::Changes;
use vmsight_sim_hypervisor::command::Command;
use vmsight_sim_hypervisor::exit;
use vmsight_sim_hypervisor::json::Line;

use crate::guest::Hypervisor;
use crate::hooks::Refused;
use crate::processor::Processor;

/// The ring in the monitor's state.
const RING: usize = offset_of!(State, watch) + offset_of!(Watch, ring);
/// Counts of system calls there.
const COUNTS: usize = offset_of!(State, watch) + offset_of!(Watch, calls);
/// So many writes to hooks are told; more are counted only: who writes again and again would fill the line.
const TOLD: u64 = 16;

impl Hypervisor {
    /// Tells what there is to tell, and does what the host has ordered: at each exit.
    pub(crate) fn talk(&mut self, processor: &Processor) {
        if !self.hooks.is_wanted() {
            return;
        }
        if !self.hooks.hold_back() {
            self.drain();
        }
        match self.hooks.channel.command() {
            Some(Command::Stats) => self.say_stats("stats"),
            Some(Command::Hook) => self.switch(true, processor),
            Some(Command::Unhook) => self.switch(false, processor),
            None => {}
        }
    }

    fn switch(&mut self, active: bool, processor: &Processor) {
        if self.hooks.patches().next().is_some() {
            self.alone(processor, |hypervisor| hypervisor.exchange(active));
        }
        self.say_stats(if active { "hooked" } else { "unhooked" });
    }

    /// Empties the rings, of which each processor has one.
    pub(crate) fn drain(&mut self) {
        for number in 0..Processor::all().count() {
            // No more than it holds: who fills it again meanwhile waits for the next exit.
            for _ in 0..EVENTS {
                let Some(event) = self.event(number) else { break };
                let _ = writeln!(self.hooks.channel, "{}", Line(&event, number));
            }
        }
    }

    fn event(&mut self, number: usize) -> Option<Event> {
        if self.hooks.out_of_guest() {
            return self.hooks.watch.ring.take();
        }
        let views = self.views.as_ref()?;
        let pool = &mut self.pool;
        // Another processor's monitor may be putting events in meanwhile: what is before this number is whole.
        let next = *views.state(pool, number, RING + offset_of!(Ring, next))?;
        fence(Ordering::Acquire);
        let taken = *views.state(pool, number, RING + offset_of!(Ring, taken))?;
        let waiting = next.wrapping_sub(taken);
        if waiting == 0 {
            return None;
        }
        let gone = waiting.saturating_sub(EVENTS as u64);
        let lost = views.state(pool, number, RING + offset_of!(Ring, lost))?;
        *lost = lost.wrapping_add(gone);
        let sequence = taken.wrapping_add(gone);
        let mut words = [0; EVENT_WORDS];
        let at = RING + Ring::place(sequence);
        for (word, offset) in words.iter_mut().zip((at..).step_by(8)) {
            *word = *views.state(pool, number, offset)?;
        }
        *views.state(pool, number, RING + offset_of!(Ring, taken))? = sequence.wrapping_add(1);
        Some(Event::from_words(&words))
    }

    pub(crate) fn say_installed(&mut self) {
        let (hooks, slide) = (self.hooks.patches().count(), self.hooks.slide());
        let stub = self.views.as_ref().map_or(0, |views| views.address);
        let _ = writeln!(
            self.hooks.channel,
            "{{\"state\":\"installed\",\"hooks\":{hooks},\"slide\":\"{slide:#x}\",\"stub\":\"{stub:#x}\"}}"
        );
    }

    pub(crate) fn say_refused(&mut self, why: Refused) {
        let _ = writeln!(self.hooks.channel, "{{\"state\":\"refused\",\"why\":\"{why}\"}}");
        let _ = writeln!(
            crate::serial::Console,
            "vmsight-hypervisor: the policy does not fit, there are no hooks: {why}"
        );
    }

    pub(crate) fn say_tampered(&mut self, rip: u64, changes: Changes) {
        if self.hooks.tampered > TOLD {
            return;
        }
        let _ = writeln!(
            self.hooks.channel,
            "{{\"state\":\"tampered\",\"rip\":\"{rip:#x}\",\"bytes\":{}}}",
            changes.refused
        );
    }

    /// The guest is about to switch the machine off, or has it reset.
    pub(crate) fn say_last(&mut self) {
        if self.hooks.is_wanted() {
            self.drain();
            self.say_stats("off");
            self.hooks.channel.flush();
        }
    }

    pub(crate) fn say_stats(&mut self, state: &str) {
        let mut counts = [0u64; CALLS];
        let (mut handled, mut lost) = (self.hooks.handled, self.hooks.watch.ring.lost);
        if self.hooks.out_of_guest() {
            counts = self.hooks.watch.calls;
        } else if let Some(views) = &self.views {
            for (count, offset) in counts.iter_mut().zip((COUNTS..).step_by(8)) {
                *count = views.sum(&mut self.pool, offset).unwrap_or(0);
            }
            let mut read = |offset| views.sum(&mut self.pool, offset).unwrap_or(0);
            handled = read(offset_of!(State, handled));
            lost = read(RING + offset_of!(Ring, lost));
        }
        let exits = Counts(|f: &mut Formatter<'_>| {
            let named = self.counts.iter().zip(0..).filter(|&(&count, _)| count != 0);
            for (n, (count, reason)) in named.enumerate() {
                let comma = if n == 0 { "" } else { "," };
                write!(f, "{comma}\"{}\":{count}", exit::name(reason))?;
            }
            Ok(())
        });
        let calls = Counts(|f: &mut Formatter<'_>| {
            let made = counts.iter().enumerate().filter(|&(_, &count)| count != 0);
            for (n, (number, count)) in made.enumerate() {
                let comma = if n == 0 { "" } else { "," };
                write!(f, "{comma}\"{number}\":{count}")?;
            }
            Ok(())
        });
        let (active, tampered) = (self.hooks.active, self.hooks.tampered);
        let _ = writeln!(
            self.hooks.channel,
            "{{\"state\":\"{state}\",\"active\":{active},\"handled\":{handled},\"lost\":{lost},\
             \"tampered\":{tampered},\"exits\":{{{exits}}},\"calls\":{{{calls}}}}}"
        );
    }
}

/// Numbers by name.
struct Counts<F>(F);

impl<F: Fn(&mut Formatter<'_>) -> fmt::Result> Display for Counts<F> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        (self.0)(f)
    }
}
