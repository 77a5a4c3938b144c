//! QEMU's option strings: `key=value,key=value` with `,,` for a comma, the JSON form, sizes and switches.

use serde_json::Value;

/// Most `key=value` pairs taken from one option.
const MAX_PAIRS: usize = 1024;

/// The parsed value of one option.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct Pairs(Vec<(String, String)>);

impl Pairs {
    /// Parses an option's value. `implied` is the key of a first item without `=` (`-m 512` is `size=512`).
    pub(crate) fn parse(text: &str, implied: Option<&str>) -> Self {
        if text.trim_start().starts_with('{') {
            return Self::parse_json(text);
        }
        let mut pairs = Vec::new();
        let mut rest = text;
        for index in 0..MAX_PAIRS {
            let (item, tail) = next_item(rest);
            match item.split_once('=') {
                Some((key, value)) => pairs.push((key.to_owned(), value.to_owned())),
                None if index == 0
                    && let Some(key) = implied =>
                {
                    pairs.push((key.to_owned(), item));
                }
                // A lone word switches itself on; "nofoo" switches foo off (QEMU's old short form).
                None if !item.is_empty() => match item.strip_prefix("no") {
                    Some(name) if matches!(name, "wait" | "delay") => {
                        pairs.push((name.to_owned(), "off".into()))
                    }
                    _ => pairs.push((item, "on".into())),
                },
                None => {}
            }
            match tail {
                Some(tail) => rest = tail,
                None => break,
            }
        }
        Self(pairs)
    }

    fn parse_json(text: &str) -> Self {
        let Ok(Value::Object(object)) = serde_json::from_str::<Value>(text) else {
            return Self::default();
        };
        let mut pairs = Vec::new();
        flatten(&mut pairs, "", &object, 0);
        Self(pairs)
    }

    /// From pairs already taken apart (a config file's section).
    pub(crate) fn from_pairs(pairs: Vec<(String, String)>) -> Self {
        Self(pairs)
    }

    /// The last value of a key: later ones win in QEMU.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .rev()
            .find(|(k, _)| k == key)
            .map(|(_, v)| v.as_str())
    }

    /// Sets a key as `-set` or a repeated option does.
    pub(crate) fn set(&mut self, key: &str, value: &str) {
        if self.0.len() < MAX_PAIRS {
            self.0.push((key.to_owned(), value.to_owned()));
        }
    }

    /// Adds the pairs of a later option of the same kind.
    pub(crate) fn merge(&mut self, other: Self) {
        for (key, value) in other.0 {
            self.set(&key, &value);
        }
    }

    /// A switch's state, `None` where it is not named or has another value.
    pub(crate) fn switch(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            "on" | "yes" | "true" | "y" => Some(true),
            "off" | "no" | "false" | "n" => Some(false),
            _ => None,
        }
    }
}

fn flatten(
    pairs: &mut Vec<(String, String)>,
    prefix: &str,
    object: &serde_json::Map<String, Value>,
    depth: usize,
) {
    for (key, value) in object.iter().take(MAX_PAIRS) {
        let key = if prefix.is_empty() {
            key.clone()
        } else {
            format!("{prefix}.{key}")
        };
        let value = match value {
            Value::String(s) => s.clone(),
            Value::Bool(b) => if *b { "on" } else { "off" }.to_owned(),
            Value::Number(n) => n.to_string(),
            Value::Object(o) if depth < 8 => {
                flatten(pairs, &key, o, depth + 1);
                continue;
            }
            _ => continue,
        };
        if pairs.len() < MAX_PAIRS {
            pairs.push((key, value));
        }
    }
}

/// The text up to the next single comma, `,,` turned into `,`; and what follows that comma.
fn next_item(text: &str) -> (String, Option<&str>) {
    let mut item = String::new();
    let mut rest = text;
    loop {
        let Some(comma) = rest.find(',') else {
            item.push_str(rest);
            return (item, None);
        };
        let (before, after) = rest.split_at(comma);
        item.push_str(before);
        let after = &after[1..];
        match after.strip_prefix(',') {
            Some(more) => {
                item.push(',');
                rest = more;
            }
            None => return (item, Some(after)),
        }
    }
}

/// A size as `-m` and `size=` take it: a number (decimal, hexadecimal, or with a fraction) and a suffix
/// `B K M G T P E`; without one it counts in units of `default_unit` bytes. `None` where it is none or does
/// not fit in 64 bits.
pub(crate) fn parse_size(text: &str, default_unit: u64) -> Option<u64> {
    let text = text.trim();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        // In hexadecimal QEMU takes no suffix that could be a digit; B and E are digits.
        let digits = hex.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(hex.len());
        let (number, suffix) = hex.split_at(digits);
        return u64::from_str_radix(number, 16)
            .ok()?
            .checked_mul(unit(suffix, default_unit)?);
    }
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let unit = unit(suffix, default_unit)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().ok()?;
    let mut size = whole.checked_mul(unit)?;
    if !fraction.is_empty() {
        let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok().filter(|n| *n <= 18)?)?;
        let part = fraction.parse::<u128>().ok()?.checked_mul(u128::from(unit))? / scale;
        size = size.checked_add(u64::try_from(part).ok()?)?;
    }
    Some(size)
}

fn unit(suffix: &str, default: u64) -> Option<u64> {
    Some(match suffix {
        "" => default,
        "B" | "b" => 1,
        "K" | "k" => 1 << 10,
        "M" | "m" => 1 << 20,
        "G" | "g" => 1 << 30,
        "T" | "t" => 1 << 40,
        "P" | "p" => 1 << 50,
        "E" | "e" => 1 << 60,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_and_implied_keys() {
        let p = Pairs::parse("guest=a,,b,,,,c,debug-threads=on", Some("guest"));
        assert_eq!(p.get("guest"), Some("a,b,,c"));
        assert_eq!(p.switch("debug-threads"), Some(true));
        let p = Pairs::parse("web,process=x", Some("guest"));
        assert_eq!((p.get("guest"), p.get("process")), (Some("web"), Some("x")));
        let p = Pairs::parse("socket,id=m,path=/run/a=b,server,nowait", Some("backend"));
        assert_eq!(p.get("path"), Some("/run/a=b"));
        assert_eq!((p.switch("server"), p.switch("wait")), (Some(true), Some(false)));
        assert_eq!(Pairs::parse("", None), Pairs::default());
        assert_eq!(Pairs::parse("a=1,a=2", None).get("a"), Some("2"));
    }

    #[test]
    fn json_objects() {
        let p = Pairs::parse(
            r#"{"qom-type":"memory-backend-memfd","id":"pc.ram","share":true,"size":1073741824,"addr":{"path":"/x"}}"#,
            Some("qom-type"),
        );
        assert_eq!(p.get("id"), Some("pc.ram"));
        assert_eq!(p.switch("share"), Some(true));
        assert_eq!(p.get("size"), Some("1073741824"));
        assert_eq!(p.get("addr.path"), Some("/x"));
        assert_eq!(Pairs::parse("{broken", None), Pairs::default());
    }

    #[test]
    fn sizes() {
        const M: u64 = 1 << 20;
        assert_eq!(parse_size("512", M), Some(512 * M));
        assert_eq!(parse_size("512M", M), Some(512 * M));
        assert_eq!(parse_size("1.5G", M), Some(1536 * M));
        assert_eq!(parse_size("2g", M), Some(2048 * M));
        assert_eq!(parse_size("0x200", M), Some(512 * M));
        assert_eq!(parse_size("1073741824", 1), Some(1024 * M));
        assert_eq!(parse_size("1048576k", M), Some(1024 * M));
        for bad in [
            "",
            "M",
            "12Q",
            "-1",
            "99999999999G",
            "1.9999999999999999999999G",
            "é",
        ] {
            assert_eq!(parse_size(bad, M), None, "{bad}");
        }
    }
}
