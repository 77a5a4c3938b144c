//! Rules as they are written, made ready to be judged.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use boreal::compiler::{AddRuleError, CompilerParams, generate_description};
use boreal::{Compiler, MetadataValue, Scanner};
use rustc_hash::FxHashMap;

/// Rules that are taken at once: some ten times the largest public collections.
const MAX_RULES: usize = 200_000;
/// Characters of all sources together.
const MAX_SOURCE: usize = 256 << 20;
/// Patterns of one rule.
const MAX_PATTERNS: usize = 10_000;
/// Warnings that are kept.
const MAX_WARNINGS: usize = 20;

/// A text with rules, and where it is from.
#[derive(Clone, Copy, Debug)]
pub struct Source<'s> {
    /// The file's name. Rules of one name in different sources are different rules.
    pub origin: &'s str,
    /// The rules.
    pub text: &'s str,
}

/// What a rule says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// Its name.
    pub name: String,
    /// Where it is from.
    pub origin: String,
    /// Its tags.
    pub tags: Vec<String>,
    /// Its metadata, as text.
    pub meta: Vec<(String, String)>,
}

impl Ord for Rule {
    fn cmp(&self, other: &Self) -> Ordering {
        (&self.origin, &self.name).cmp(&(&other.origin, &other.name))
    }
}

impl PartialOrd for Rule {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Compiled rules.
#[derive(Debug)]
pub struct Rules {
    pub(super) scanner: Scanner,
    by_name: FxHashMap<(String, String), Arc<Rule>>,
    /// What the compiler remarked, the first 20.
    pub warnings: Vec<String>,
}

/// Why rules could not be compiled: `FILE:LINE:COLUMN: error: …`.
#[derive(Debug)]
pub struct BadRules(String);

impl fmt::Display for BadRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadRules {}

impl Rules {
    /// Compiles rules. Other files are not read: `include` is an error.
    ///
    /// # Errors
    /// What is wrong with the first source that is, with its line; or that there are too many rules.
    pub fn compile<'s>(sources: impl IntoIterator<Item = Source<'s>>) -> Result<Self, BadRules> {
        let mut compiler = Compiler::new();
        compiler.set_params(
            CompilerParams::default()
                .disable_includes(true)
                .max_strings_per_rule(MAX_PATTERNS)
                .disable_unknown_escape_warning(true),
        );
        let (mut warnings, mut left) = (Vec::new(), MAX_SOURCE);
        for source in sources {
            left = left.checked_sub(source.text.len()).ok_or_else(|| {
                BadRules(format!(
                    "{}: more than {MAX_SOURCE} bytes of rules",
                    source.origin
                ))
            })?;
            let say = |error: &AddRuleError| {
                generate_description(&error.to_diagnostic(), source.origin, source.text)
            };
            let added = compiler
                .add_rules_str_in_namespace(source.text, source.origin)
                .map_err(|error| BadRules(say(&error)))?;
            let room = MAX_WARNINGS.saturating_sub(warnings.len());
            warnings.extend(added.warnings().take(room).map(say));
        }
        let scanner = compiler.finalize();
        let by_name: FxHashMap<_, _> = scanner
            .rules()
            .take(MAX_RULES + 1)
            .map(|rule| {
                let text = |symbol| scanner.get_string_symbol(symbol).to_owned();
                let facts = Rule {
                    name: rule.name.to_owned(),
                    origin: rule.namespace.to_owned(),
                    tags: rule.tags.iter().map(|tag| text(*tag)).collect(),
                    meta: rule
                        .metadatas
                        .iter()
                        .map(|meta| (text(meta.name), value(&scanner, &meta.value)))
                        .collect(),
                };
                ((facts.origin.clone(), facts.name.clone()), Arc::new(facts))
            })
            .collect();
        if by_name.len() > MAX_RULES {
            return Err(BadRules(format!("more than {MAX_RULES} rules")));
        }
        Ok(Self {
            scanner,
            by_name,
            warnings,
        })
    }

    /// How many rules there are.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// The rule of this name in that source.
    pub(super) fn named(&self, origin: &str, name: &str) -> Option<&Arc<Rule>> {
        self.by_name.get(&(origin.to_owned(), name.to_owned()))
    }
}

fn value(scanner: &Scanner, value: &MetadataValue) -> String {
    match value {
        MetadataValue::Bytes(symbol) => {
            String::from_utf8_lossy(scanner.get_bytes_symbol(*symbol)).into_owned()
        }
        MetadataValue::Integer(number) => number.to_string(),
        MetadataValue::Boolean(truth) => truth.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compile(text: &str) -> Result<Rules, BadRules> {
        Rules::compile([Source {
            origin: "rules/test.yar",
            text,
        }])
    }

    fn error(text: &str) -> String {
        compile(text).expect_err("wrong rules").to_string()
    }

    #[test]
    fn what_is_wrong_is_said_with_file_and_line() {
        let wrong = error("rule a { condition: true }\nrule r {\n  condition: $x\n}");
        assert!(wrong.starts_with("rules/test.yar:3:14: error: "), "{wrong}");
        assert!(wrong.contains("$x"), "{wrong}");
        let unclosed = error("\n\nrule r {");
        assert!(unclosed.starts_with("rules/test.yar:3:"), "{unclosed}");
        let unknown = error("import \"cuckoo\" rule r { condition: true }");
        assert!(unknown.contains("cuckoo"), "{unknown}");
    }

    #[test]
    fn no_other_file_is_read() {
        let include = error("include \"/etc/passwd\"\nrule r { condition: true }");
        assert!(include.contains("includes are not allowed"), "{include}");
    }

    #[test]
    fn rules_that_are_too_deep_or_too_many_are_refused() {
        let deep = "(".repeat(100_000) + "true" + &")".repeat(100_000);
        error(&format!("rule r {{ condition: {deep} }}"));
        let patterns: String = (0..=MAX_PATTERNS).map(|n| format!("$a{n} = \"abcd\" ")).collect();
        error(&format!(
            "rule r {{ strings: {patterns} condition: any of them }}"
        ));
    }

    #[test]
    fn a_rule_keeps_its_tags_and_metadata() {
        let rules = compile("rule r : one two { meta: a = \"b\" n = 3 t = true condition: true }");
        let rules = rules.expect("rules");
        let rule = rules.named("rules/test.yar", "r").expect("the rule");
        assert_eq!(rule.tags, ["one", "two"]);
        let meta: Vec<_> = rule.meta.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(meta, ["a=b", "n=3", "t=true"]);
    }
}
