//! The kernels of the matrix, as `lab/setup` puts them into the cache.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use crate::cache;

/// What of a kernel's package is in the cache, by `lab/setup`'s number for it.
const LAYOUT: &str = "2";

/// A kernel of the matrix: a Debian package that is found by the suite it is in, not by its version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kernel {
    /// 5.10 of bullseye.
    V5_10,
    /// 6.1 of bookworm.
    V6_1,
    /// The same, built for clouds.
    V6_1Cloud,
    /// The same with PREEMPT_RT.
    V6_1Rt,
    /// 6.12 of trixie.
    V6_12,
    /// The newest: of sid.
    Sid,
}

impl Kernel {
    /// All of them, oldest first.
    pub const ALL: [Kernel; 6] = [
        Kernel::V5_10,
        Kernel::V6_1,
        Kernel::V6_1Cloud,
        Kernel::V6_1Rt,
        Kernel::V6_12,
        Kernel::Sid,
    ];

    /// Its id, which `lab/setup` and the command line know it by.
    pub fn id(self) -> &'static str {
        match self {
            Kernel::V5_10 => "5.10",
            Kernel::V6_1 => "6.1",
            Kernel::V6_1Cloud => "6.1-cloud",
            Kernel::V6_1Rt => "6.1-rt",
            Kernel::V6_12 => "6.12",
            Kernel::Sid => "sid",
        }
    }

    /// Whether it can use 5-level page tables. Debian's 5.10 was built without (CONFIG_X86_5LEVEL); a test holds this
    /// against the configuration of each kernel.
    pub fn has_five_levels(self) -> bool {
        self != Kernel::V5_10
    }

    /// Sees to it that the cache has it: fetches it where it is missing, or where less of it was kept.
    pub fn fetch(self) -> Result<Fetched> {
        let folder = cache::folder()?.join("kernels").join(self.id());
        let kept = fs::read_to_string(folder.join("layout"));
        if kept.is_ok_and(|kept| kept.trim() == LAYOUT) {
            return self.fetched(folder);
        }
        self.set_up(&[])?;
        self.fetched(folder)
    }

    /// Runs `lab/setup` for it.
    fn set_up(self, options: &[&str]) -> Result<()> {
        let script = cache::workspace().join("lab/setup");
        let output = Command::new(&script)
            .args(options)
            .arg(self.id())
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("run {}", script.display()))?;
        if !output.status.success() {
            bail!(
                "{} {self}: {}",
                script.display(),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }

    fn fetched(self, folder: PathBuf) -> Result<Fetched> {
        let read = |name: &str| -> Result<String> {
            let path = folder.join(name);
            Ok(fs::read_to_string(&path)
                .with_context(|| format!("read {}", path.display()))?
                .trim()
                .to_owned())
        };
        Ok(Fetched {
            release: read("release")?,
            package: read("package")?,
            kernel: self,
            folder,
        })
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id())
    }
}

impl FromStr for Kernel {
    type Err = anyhow::Error;

    fn from_str(id: &str) -> Result<Kernel> {
        let known = || Kernel::ALL.map(Kernel::id).join(", ");
        Kernel::ALL
            .into_iter()
            .find(|k| k.id() == id)
            .with_context(|| format!("no kernel '{id}' in the lab; there are: {}", known()))
    }
}

/// A kernel in the cache.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// `uname -r`.
    pub release: String,
    /// Debian package and version.
    pub package: String,
    kernel: Kernel,
    folder: PathBuf,
}

impl Fetched {
    /// The compressed image.
    pub fn vmlinuz(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// Its build configuration.
    pub fn config(&self) -> Result<String> {
        let path = self.folder.join("config");
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }

    /// The folder with what modules for it are built against (in `build`); fetched where it is missing. Fails where the kernel in
    /// the cache is so old that its headers are no longer to be had: `lab/setup --headers` then fetches newer ones of both.
    pub fn headers(&self) -> Result<PathBuf> {
        let folder = cache::folder()?.join("headers").join(self.kernel.id());
        let version = self.package.split(' ').next_back().unwrap_or_default();
        let wanted = format!("linux-headers-{} {version}", self.release);
        let there = || fs::read_to_string(folder.join("package")).is_ok_and(|text| text.trim() == wanted);
        if !there() {
            self.kernel.set_up(&["--headers"])?;
        }
        if !there() {
            bail!(
                "{} was replaced in the cache by a newer kernel: start anew",
                self.package
            );
        }
        Ok(folder)
    }

    /// The folder that would be `/lib/modules/RELEASE`.
    pub fn modules_folder(&self) -> PathBuf {
        self.folder.join("modules/lib/modules").join(&self.release)
    }

    /// The modules needed for `wanted`, in loading order, each with its file and the parameters given with it. Modules
    /// that are built into this kernel are left out; one that it does not have at all is an error, unless its name
    /// ends in a question mark.
    pub fn modules(&self, wanted: &[(&str, &str)]) -> Result<Vec<ModuleFile>> {
        let folder = self.modules_folder();
        let read = |name: &str| -> Result<String> {
            let path = folder.join(name);
            fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
        };
        let dependencies = Dependencies::parse(&read("modules.dep")?);
        let built_in = read("modules.builtin")?;
        let built_in: Vec<String> = built_in.lines().map(module_name).collect();
        let mut order = Vec::new();
        for (name, _) in wanted {
            let (name, must) = name.strip_suffix('?').map_or((*name, true), |name| (name, false));
            match dependencies.paths.get(name) {
                Some(path) => dependencies.visit(path, &mut order),
                None if !must || built_in.iter().any(|b| b == name) => {}
                None => bail!("{} has no module '{name}'", self.package),
            }
        }
        Ok(order
            .into_iter()
            .map(|path| {
                let name = module_name(&path);
                let parameters = wanted.iter().find(|(n, _)| **n == name).map_or("", |(_, p)| p);
                ModuleFile {
                    path: folder.join(&path),
                    parameters: parameters.to_owned(),
                    name,
                }
            })
            .collect())
    }
}

/// A module to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleFile {
    /// Its name.
    pub name: String,
    /// Its file, maybe compressed with xz.
    pub path: PathBuf,
    /// Its parameters.
    pub parameters: String,
}

impl ModuleFile {
    /// The ELF file.
    pub fn read(&self) -> Result<Vec<u8>> {
        let raw = fs::read(&self.path).with_context(|| format!("read {}", self.path.display()))?;
        if self.path.extension().is_none_or(|e| e != "xz") {
            return Ok(raw);
        }
        let mut out = Vec::new();
        std::io::copy(&mut liblzma::read::XzDecoder::new(raw.as_slice()), &mut out)
            .with_context(|| format!("decompress {}", self.path.display()))?;
        Ok(out)
    }
}

/// `kernel/net/802/8021q.ko.xz` is `8021q`; the kernel has no dashes in names.
fn module_name(path: &str) -> String {
    let file = Path::new(path)
        .file_name()
        .and_then(|f| f.to_str())
        .unwrap_or_default();
    file.split(".ko").next().unwrap_or_default().replace('-', "_")
}

/// What depmod found.
struct Dependencies {
    paths: BTreeMap<String, String>,
    needs: BTreeMap<String, Vec<String>>,
}

impl Dependencies {
    fn parse(text: &str) -> Dependencies {
        let (mut paths, mut needs) = (BTreeMap::new(), BTreeMap::new());
        for (path, rest) in text.lines().filter_map(|line| line.split_once(':')) {
            paths.insert(module_name(path), path.to_owned());
            needs.insert(
                path.to_owned(),
                rest.split_ascii_whitespace().map(str::to_owned).collect(),
            );
        }
        Dependencies { paths, needs }
    }

    /// What `path` needs, deepest first (depmod lists all of it, nearest first), and then itself.
    fn visit(&self, path: &str, order: &mut Vec<String>) {
        let needed = self.needs.get(path).map(Vec::as_slice).unwrap_or_default();
        for path in needed.iter().rev().map(String::as_str).chain([path]) {
            if !order.iter().any(|seen| seen == path) {
                order.push(path.to_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_kernels_go_both_ways() {
        for kernel in Kernel::ALL {
            assert_eq!(kernel.id().parse::<Kernel>().unwrap(), kernel);
        }
        assert!(
            "6.2"
                .parse::<Kernel>()
                .unwrap_err()
                .to_string()
                .contains("6.1-cloud")
        );
    }

    #[test]
    fn modules_load_after_what_they_need() {
        let dependencies = Dependencies::parse(
            "kernel/a-b.ko.xz: kernel/c.ko.xz kernel/d.ko.xz\nkernel/c.ko.xz: kernel/d.ko.xz\nkernel/d.ko.xz:\n",
        );
        let mut order = Vec::new();
        dependencies.visit(&dependencies.paths["a_b"], &mut order);
        dependencies.visit(&dependencies.paths["c"], &mut order);
        assert_eq!(order, ["kernel/d.ko.xz", "kernel/c.ko.xz", "kernel/a-b.ko.xz"]);
    }
}
