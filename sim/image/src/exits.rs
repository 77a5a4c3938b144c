//! The hypervisor's table of exits, as it says it on the console.

use vmsight_sim_hypervisor::exit;

/// How often the guest was left for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exits {
    /// The basic exit reason (SDM vol. 3, appendix C).
    pub reason: u16,
    /// What it is called.
    pub name: &'static str,
    /// How often.
    pub count: u64,
}

impl Exits {
    /// By what the reason is called; `None` where nothing is called so.
    pub fn named(name: &str, count: u64) -> Option<Self> {
        let known = (0..)
            .take(exit::COUNT)
            .find(|&reason| exit::name(reason) == name)?;
        Some(Self {
            reason: known,
            name: exit::name(known),
            count,
        })
    }
}

/// The last table in a console's output, by reason. Empty where there is none.
pub fn parse(console: &str) -> Vec<Exits> {
    let mut all: Vec<Exits> = Vec::new();
    for line in console.lines() {
        let Some(rest) = line.trim_end().strip_prefix("vmsight-hypervisor: exits ") else {
            continue;
        };
        let (reason, count) = match (rest.split_whitespace().next(), rest.split_whitespace().last()) {
            (Some(reason), Some(count)) => (reason.parse(), count.parse()),
            _ => continue,
        };
        // The title begins like this, too.
        let (Ok(reason), Ok(count)) = (reason, count) else {
            continue;
        };
        // A later table counts on.
        all.retain(|exits| exits.reason != reason);
        all.push(Exits {
            reason,
            name: exit::name(reason),
            count,
        });
    }
    all.sort_by_key(|exits| exits.reason);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_table_is_read() {
        let console = "\
            vmsight-hypervisor 0.1.0\r\n\
            vmsight-hypervisor: exits by reason\r\n\
            vmsight-hypervisor: exits  10 CPUID                        12\r\n\
            guest: vmsight-hypervisor: exits 1 none 5\r\n\
            vmsight-hypervisor: exits by reason\r\n\
            vmsight-hypervisor: exits  48 EPT violation                 3\r\n\
            vmsight-hypervisor: exits  10 CPUID                        14\r\n";
        let of = |reason, name, count| Exits { reason, name, count };
        assert_eq!(parse(console), [of(10, "CPUID", 14), of(48, "EPT violation", 3)]);
        assert!(parse("no hypervisor").is_empty());
    }
}
