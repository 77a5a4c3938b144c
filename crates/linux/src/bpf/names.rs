//! What numbers of BPF are called, out of the kernel's own enumerations.

use crate::Kernel;

/// Names of one enumeration that are kept; the longest (bpf_attach_type) has some sixty.
const MAX_NAMES: usize = 1024;

/// The enumerations.
pub(super) struct Names {
    program: Vec<(i64, String)>,
    map: Vec<(i64, String)>,
    link: Vec<(i64, String)>,
    attach: Vec<(i64, String)>,
}

impl Names {
    pub(super) fn new(kernel: &Kernel) -> Self {
        let of = |enumeration, prefix| names(kernel, enumeration, prefix);
        Self {
            program: of("bpf_prog_type", "BPF_PROG_TYPE_"),
            map: of("bpf_map_type", "BPF_MAP_TYPE_"),
            link: of("bpf_link_type", "BPF_LINK_TYPE_"),
            attach: of("bpf_attach_type", "BPF_"),
        }
    }

    pub(super) fn program(&self, number: u32) -> String {
        name(&self.program, number)
    }

    pub(super) fn map(&self, number: u32) -> String {
        name(&self.map, number)
    }

    pub(super) fn link(&self, number: u32) -> String {
        name(&self.link, number)
    }

    pub(super) fn attach(&self, number: u32) -> String {
        name(&self.attach, number)
    }
}

fn names(kernel: &Kernel, enumeration: &str, prefix: &str) -> Vec<(i64, String)> {
    let types = kernel.types();
    let Some(id) = types.find_enum(enumeration) else {
        return Vec::new();
    };
    types
        .enumerators(id)
        .take(MAX_NAMES)
        .filter_map(|e| Some((e.value, e.name.strip_prefix(prefix)?.to_ascii_lowercase())))
        .collect()
}

/// The name of a number. Where two names have it, one is the old and ends so (`cgroup_storage_deprecated`).
fn name(names: &[(i64, String)], number: u32) -> String {
    let mut known = names.iter().filter(|(value, _)| *value == i64::from(number));
    let first = known.clone().find(|(_, name)| !name.ends_with("_deprecated"));
    match first.or_else(|| known.next()) {
        Some((_, name)) => name.clone(),
        None => format!("type-{number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::name;

    #[test]
    fn the_name_in_use_is_taken_and_numbers_without_one_stay_numbers() {
        let names = [
            (19, "cgroup_storage_deprecated".to_owned()),
            (19, "cgroup_storage".to_owned()),
            (20, "gone_deprecated".to_owned()),
        ];
        assert_eq!(name(&names, 19), "cgroup_storage");
        assert_eq!(name(&names, 20), "gone_deprecated");
        assert_eq!(name(&names, 21), "type-21");
    }
}
