//! What the kernel was booted with.

use crate::Context;

/// `COMMAND_LINE_SIZE` on x86 (arch/x86/include/uapi/asm/setup.h).
const MAX_LINE: usize = 2048;

/// The words of the kernel's command line (`saved_command_line`, init/main.c); none where it cannot be read.
pub(super) fn words(context: &Context) -> Vec<String> {
    let line = context
        .symbol(&["saved_command_line"])
        .and_then(|at| context.pointer("saved_command_line", at))
        .and_then(|at| context.text("saved_command_line", at, MAX_LINE));
    let line = line.unwrap_or_default();
    line.split_ascii_whitespace().map(str::to_owned).collect()
}

/// What a parameter was given, of several the last: `Some("")` where it stands alone.
pub(super) fn parameter<'w>(words: &'w [String], name: &str) -> Option<&'w str> {
    words.iter().rev().find_map(|word| match word.split_once('=') {
        Some((key, value)) => (key == name).then_some(value),
        None => (word == name).then_some(""),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_one_counts() {
        let words: Vec<String> = ["quiet", "lockdown=none", "lockdown=integrity"]
            .map(str::to_owned)
            .to_vec();
        assert_eq!(parameter(&words, "lockdown"), Some("integrity"));
        assert_eq!(parameter(&words, "quiet"), Some(""));
        assert_eq!(parameter(&words, "lock"), None);
    }
}
