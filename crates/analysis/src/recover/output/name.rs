//! Names that a guest gave, as names that are harmless here.

use std::fmt::Write;
use std::path::PathBuf;

/// The longest name of one component that common filesystems take.
const MAX_COMPONENT: usize = 255;
/// What is kept of a longer one.
const KEPT: usize = 200;

/// A guest's path as a relative path that leads only downwards, whatever the guest wrote. `None` where nothing is left of it.
///
/// Different paths stay different, but for what is longer than a name can be.
pub(crate) fn relative(path: &str) -> Option<PathBuf> {
    let out: PathBuf = path
        .split('/')
        .filter(|part| !part.is_empty())
        .map(component)
        .collect();
    (!out.as_os_str().is_empty()).then_some(out)
}

/// One component. What steers a terminal, `%`, NUL, `/` and the names `.` and `..` are written as `%XX`.
pub(crate) fn component(name: &str) -> String {
    let dots = name == "." || name == "..";
    let mut out = String::with_capacity(name.len());
    for c in name.chars() {
        let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if dots || turns || c.is_control() || matches!(c, '%' | '/') {
            for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                let _ = write!(out, "%{byte:02X}");
            }
        } else {
            out.push(c);
        }
    }
    if out.len() > MAX_COMPONENT {
        let end = (0..=KEPT)
            .rev()
            .find(|&end| out.is_char_boundary(end))
            .unwrap_or(0);
        out.truncate(end);
        out.push('~');
    }
    if out.is_empty() { "%".to_owned() } else { out }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Component;

    #[test]
    fn plain_names_stay_as_they_are() {
        assert_eq!(
            relative("/tmp/Gr\u{fc}\u{df}e \u{2603}.txt").unwrap(),
            PathBuf::from("tmp/Gr\u{fc}\u{df}e \u{2603}.txt")
        );
        assert_eq!(relative("/...").unwrap(), PathBuf::from("..."));
    }

    #[test]
    fn no_name_leads_out_or_steers_a_terminal() {
        for hostile in [
            "/../../etc/passwd",
            "..",
            "/a/./../..//../b",
            "/nul\0byte/\u{1b}[31m\n\r\t",
            "//..//..",
            "/\u{202e}gpj.exe",
            "/%2E%2E/x",
        ] {
            let out = relative(hostile).unwrap();
            assert!(
                out.components().all(|c| matches!(c, Component::Normal(_))),
                "{hostile:?} gives {out:?}"
            );
            let text = out.to_str().unwrap();
            assert!(
                !text.chars().any(|c| c.is_control() || c == '\u{202e}'),
                "{text:?}"
            );
        }
        assert_eq!(relative("/../x").unwrap(), PathBuf::from("%2E%2E/x"));
        assert_ne!(relative("/%2E%2E/x"), relative("/../x"));
        assert_eq!(relative("/"), None);
        assert_eq!(relative("///"), None);
    }

    #[test]
    fn long_names_are_cut_where_a_character_ends() {
        let name = component(&"\u{2603}".repeat(400));
        assert!(
            name.len() <= MAX_COMPONENT && name.ends_with("\u{2603}~"),
            "{name}"
        );
        assert!(component(&"\x01".repeat(1000)).len() <= MAX_COMPONENT);
        assert_eq!(component(&"a".repeat(255)).len(), 255);
    }
}
