//! What a guest is not allowed to do.

use std::fmt;
use std::str::FromStr;

/// Something that is denied.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Rule {
    /// Writes to the kernel's code, but for the kernel's own patching of itself.
    KernelText,
    /// Writes to the kernel's read-only data.
    Rodata,
    /// Writes to the table of 64-bit system calls.
    SyscallTable,
    /// Writes to the interrupt descriptor table.
    Idt,
    /// Clearing CR0.WP, which lets the kernel write to pages that are read-only.
    Cr0Wp,
    /// Clearing CR4.SMEP, which lets the kernel execute user memory.
    Cr4Smep,
    /// Clearing CR4.SMAP, which lets the kernel access user memory at any time.
    Cr4Smap,
    /// Giving LSTAR, the entry point of system calls, another value.
    Lstar,
    /// Loading modules.
    Modules,
    /// Executing the file with this path; a `*` at the end stands for anything.
    Exec(String),
}

/// All rules but those about paths, with their names.
const NAMED: [(&str, Rule); 9] = [
    ("kernel-text", Rule::KernelText),
    ("rodata", Rule::Rodata),
    ("syscall-table", Rule::SyscallTable),
    ("idt", Rule::Idt),
    ("cr0.wp", Rule::Cr0Wp),
    ("cr4.smep", Rule::Cr4Smep),
    ("cr4.smap", Rule::Cr4Smap),
    ("lstar", Rule::Lstar),
    ("modules", Rule::Modules),
];

/// A rule that is not known.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "no rule {text:?}; there are: kernel-text, rodata, syscall-table, idt, cr0.wp, cr4.smep, cr4.smap, lstar, modules, exec=PATH"
)]
pub struct RuleError {
    text: String,
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let error = || RuleError {
            text: text.to_owned(),
        };
        if let Some(path) = text.strip_prefix("exec=") {
            return match path.starts_with('/') {
                true => Ok(Self::Exec(path.to_owned())),
                false => Err(error()),
            };
        }
        let found = NAMED.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
        found.map(|(_, rule)| rule.clone()).ok_or_else(error)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exec(path) => write!(f, "exec={path}"),
            other => {
                let found = NAMED.iter().find(|(_, rule)| rule == other);
                f.write_str(found.map_or("?", |(name, _)| name))
            }
        }
    }
}

/// Whether a path is meant by a pattern.
pub(super) fn matches(pattern: &str, path: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => path.starts_with(prefix),
        None => path == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_is_known_by_its_name() {
        for (name, rule) in NAMED {
            assert_eq!(name.parse::<Rule>().unwrap(), rule);
            assert_eq!(rule.to_string(), name);
        }
        let exec: Rule = "exec=/bin/nc".parse().unwrap();
        assert_eq!(exec, Rule::Exec("/bin/nc".into()));
        assert_eq!(exec.to_string(), "exec=/bin/nc");
        assert!("exec=nc".parse::<Rule>().is_err());
        assert!("nothing".parse::<Rule>().is_err());
    }

    #[test]
    fn patterns_end_with_a_star_or_not() {
        assert!(matches("/tmp/*", "/tmp/x"));
        assert!(!matches("/tmp/*", "/tmpx"));
        assert!(matches("/bin/nc", "/bin/nc"));
        assert!(!matches("/bin/nc", "/bin/ncat"));
    }
}
