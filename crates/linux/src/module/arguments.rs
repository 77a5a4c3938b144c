//! What a module was loaded with, out of what the kernel leaves of it.

use super::Parameter;

/// Puts arguments together again.
///
/// The kernel takes them apart where they lie: it writes a NUL over each `=` and over the blank behind each value (`next_arg` in
/// lib/cmdline.c), and keeps no length. So `left` begins with names and values, a NUL after each, and goes on with whatever was there
/// before. A name counts as long as the module has a parameter of that name; a value can be missing with `bool` only.
pub(super) fn rejoin(left: &[u8], parameters: &[Parameter]) -> String {
    let mut words = left
        .split(|&byte| byte == 0)
        .map(|word| crate::text::guest_text(word.trim_ascii_start()))
        .peekable();
    let mut arguments: Vec<String> = Vec::new();
    while let Some(name) = words.next() {
        let same = |p: &&Parameter| p.name.replace('-', "_") == name.replace('-', "_");
        let Some(parameter) = parameters.iter().find(same) else {
            break;
        };
        let has_value = |word: &String| parameter.kind != "bool" || is_truth_value(word);
        match words.next_if(has_value) {
            // The closing quote was overwritten too; the blank behind it left a word of nothing.
            Some(value) if value.starts_with('"') => {
                words.next_if(String::is_empty);
                arguments.push(format!("{name}={value}\""));
            }
            Some(value) => arguments.push(format!("{name}={value}")),
            None => arguments.push(name),
        }
    }
    arguments.join(" ")
}

/// What `kstrtobool` understands.
fn is_truth_value(word: &str) -> bool {
    matches!(word, "y" | "Y" | "n" | "N" | "t" | "T" | "f" | "F" | "1" | "0")
        || word.eq_ignore_ascii_case("on")
        || word.eq_ignore_ascii_case("off")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters() -> Vec<Parameter> {
        [
            ("max_loop", "int"),
            ("max_part", "int"),
            ("quiet", "bool"),
            ("label", "charp"),
        ]
        .map(|(name, kind)| Parameter {
            name: name.to_owned(),
            value: None,
            kind: kind.to_owned(),
            mode: 0o444,
        })
        .to_vec()
    }

    #[test]
    fn arguments_come_back_as_they_were_given() {
        for (left, given) in [
            (
                &b"max_loop\x004\0max_part\x002\0\0\0\0"[..],
                "max_loop=4 max_part=2",
            ),
            (b"max_loop\x004\0rubbish\0max_part\x002\0", "max_loop=4"),
            (b"quiet\0max-part\x002\0\xff\xfe", "quiet max-part=2"),
            (b"quiet\0rubbish", "quiet"),
            (b"quiet\0off\0", "quiet=off"),
            (b"label\0\"two words\0\0quiet\0", "label=\"two words\" quiet"),
            (b"label\0\0\0\0", "label="),
            (b"\0max_loop\x004\0", ""),
            (b"", ""),
        ] {
            assert_eq!(rejoin(left, &parameters()), given, "{left:?}");
        }
    }
}
