//! Orders to the hypervisor while its guest runs, from standard input.

use std::io::{BufRead, stdin};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};

use vmsight_sim_image::channel::Orders;

use crate::output::{Style, escape};

/// What the hypervisor can be told.
const ORDERS: [&str; 3] = ["stats", "hook", "unhook"];
/// Lines that wait; whoever writes more of them at once waits himself.
const WAITING: usize = 16;

/// Lines of standard input, and where they go.
pub(super) struct Control {
    lines: Receiver<std::io::Result<String>>,
    orders: Orders,
}

impl Control {
    /// Reads standard input from now on, in a thread of its own, which ends with it or with this program.
    pub(super) fn begin(orders: Orders) -> Self {
        let (send, lines) = sync_channel(WAITING);
        std::thread::spawn(move || {
            for line in stdin().lock().lines() {
                let is_last = line.is_err();
                if send.send(line).is_err() || is_last {
                    break;
                }
            }
        });
        Self { lines, orders }
    }

    /// Passes on what has come, without waiting, and complains of what is no order.
    pub(super) fn pass(&self, style: &Style) {
        loop {
            let line = match self.lines.try_recv() {
                Ok(Ok(line)) => line,
                Ok(Err(error)) => {
                    return style.warn(&format!("standard input: {error}; no orders are taken any more"));
                }
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            };
            let Some(order) = order(&line) else { continue };
            match order.map(|order| (order, self.orders.give(order))) {
                Ok((_, Ok(true))) => {}
                Ok((order, Ok(false))) => style.warn(&format!("{order}: the machine has not started yet")),
                Ok((order, Err(error))) => style.warn(&format!("{order}: {error}")),
                Err(word) => style.warn(&format!(
                    "{}: no order; there are {}",
                    escape(word),
                    ORDERS.join(", ")
                )),
            }
        }
    }
}

/// What a line says: nothing, an order, or a word that is none.
fn order(line: &str) -> Option<Result<&'static str, &str>> {
    let word = line.trim();
    let known = ORDERS.iter().find(|order| **order == word);
    (!word.is_empty()).then(|| known.copied().ok_or(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_orders_or_not() {
        assert_eq!(order(" unhook \r"), Some(Ok("unhook")));
        assert_eq!(order("unhook all"), Some(Err("unhook all")));
        assert_eq!(order("  "), None);
    }
}
