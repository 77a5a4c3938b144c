//! How a target is named on a command line.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use vmsight_memory::dump::DumpFormat;

use crate::TargetError;

/// What a user called a target.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum TargetSpec {
    /// A word: the name or UUID of a running VM, or else a file.
    Name(String),
    /// `pid:N`: the VM that process runs.
    Pid(u32),
    /// `qmp:PATH`: the VM behind a QMP socket.
    Qmp(PathBuf),
    /// `gdb:HOST:PORT` or `gdb:PATH`: the VM behind a gdb stub.
    Gdb(GdbAddress),
    /// A dump. `format` is what a prefix (`raw:`, `kdump:`, …) forces.
    File {
        /// The file.
        path: PathBuf,
        /// The format's prefix; `None` to find out.
        format: Option<String>,
    },
}

/// Where a gdb stub listens.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum GdbAddress {
    /// TCP. An empty host is this one.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// A unix socket.
    Unix(PathBuf),
}

/// Whether a prefix forces a dump's format.
fn is_format(prefix: &str) -> bool {
    DumpFormat::NAMED.iter().any(|(name, _)| *name == prefix)
}

impl FromStr for TargetSpec {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let bad = |reason: &str| TargetError::BadSpec {
            spec: text.to_owned(),
            reason: reason.to_owned(),
        };
        if text.is_empty() {
            return Err(bad(
                "a name, pid:N, qmp:PATH, gdb:HOST:PORT, gdb:PATH or a file is needed",
            ));
        }
        if let Some((prefix, rest)) = text.split_once(':') {
            let known = ["pid", "qmp", "gdb"].contains(&prefix) || is_format(prefix);
            if known && rest.is_empty() {
                return Err(bad("something is missing after the colon"));
            }
            match prefix {
                "pid" => {
                    let pid = rest.parse().ok().filter(|pid| *pid > 0);
                    return pid
                        .map(Self::Pid)
                        .ok_or_else(|| bad("pid: takes the number of a process"));
                }
                "qmp" => return Ok(Self::Qmp(rest.strip_prefix("unix:").unwrap_or(rest).into())),
                "gdb" => {
                    return GdbAddress::parse(rest)
                        .map(Self::Gdb)
                        .ok_or_else(|| bad("gdb: takes HOST:PORT or the path of a unix socket"));
                }
                _ if known => {
                    return Ok(Self::File {
                        path: rest.into(),
                        format: Some(prefix.to_owned()),
                    });
                }
                _ => {}
            }
        }
        // A path is meant where it looks like one; a bare word is looked for among the VMs first.
        if text.contains('/') {
            return Ok(Self::File {
                path: text.into(),
                format: None,
            });
        }
        Ok(Self::Name(text.to_owned()))
    }
}

impl GdbAddress {
    fn parse(text: &str) -> Option<Self> {
        if let Some(path) = text.strip_prefix("unix:") {
            return (!path.is_empty()).then(|| Self::Unix(path.into()));
        }
        let tcp = text.strip_prefix("tcp:").unwrap_or(text);
        if !text.contains('/')
            && let Some((host, port)) = tcp.rsplit_once(':')
        {
            let host = host.trim_start_matches('[').trim_end_matches(']');
            let host = if host.is_empty() { "127.0.0.1" } else { host };
            return Some(Self::Tcp {
                host: host.to_owned(),
                port: port.parse().ok().filter(|p| *p > 0)?,
            });
        }
        if let Some(port) = tcp.parse().ok().filter(|p| *p > 0) {
            return Some(Self::Tcp {
                host: "127.0.0.1".into(),
                port,
            });
        }
        Some(Self::Unix(text.into()))
    }
}

impl fmt::Display for GdbAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl fmt::Display for TargetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Pid(pid) => write!(f, "pid:{pid}"),
            Self::Qmp(path) => write!(f, "qmp:{}", path.display()),
            Self::Gdb(address) => write!(f, "gdb:{address}"),
            Self::File { path, format: None } => write!(f, "{}", path.display()),
            Self::File {
                path,
                format: Some(format),
            } => write!(f, "{format}:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> TargetSpec {
        text.parse().unwrap()
    }

    #[test]
    fn every_form() {
        assert_eq!(parse("web-1"), TargetSpec::Name("web-1".into()));
        assert_eq!(
            parse("a:b"),
            TargetSpec::Name("a:b".into()),
            "names may have colons"
        );
        assert_eq!(parse("pid:42"), TargetSpec::Pid(42));
        assert_eq!(parse("qmp:/run/x.qmp"), TargetSpec::Qmp("/run/x.qmp".into()));
        assert_eq!(parse("qmp:unix:/run/x"), TargetSpec::Qmp("/run/x".into()));
        let tcp = |host: &str, port| {
            TargetSpec::Gdb(GdbAddress::Tcp {
                host: host.into(),
                port,
            })
        };
        assert_eq!(parse("gdb:localhost:1234"), tcp("localhost", 1234));
        assert_eq!(parse("gdb::1234"), tcp("127.0.0.1", 1234));
        assert_eq!(parse("gdb:1234"), tcp("127.0.0.1", 1234));
        assert_eq!(parse("gdb:tcp::1234"), tcp("127.0.0.1", 1234));
        assert_eq!(parse("gdb:[::1]:1234"), tcp("::1", 1234));
        assert_eq!(
            parse("gdb:/run/g"),
            TargetSpec::Gdb(GdbAddress::Unix("/run/g".into()))
        );
        assert_eq!(parse("gdb:unix:g"), TargetSpec::Gdb(GdbAddress::Unix("g".into())));
        assert_eq!(
            parse("./dump"),
            TargetSpec::File {
                path: "./dump".into(),
                format: None
            }
        );
        assert_eq!(
            parse("raw:dump"),
            TargetSpec::File {
                path: "dump".into(),
                format: Some("raw".into())
            }
        );
    }

    #[test]
    fn forms_that_mean_nothing() {
        for bad in [
            "",
            "pid:",
            "pid:x",
            "pid:0",
            "pid:-1",
            "qmp:",
            "gdb:",
            "gdb:host:99999",
            "gdb:host:0",
            "raw:",
        ] {
            assert!(bad.parse::<TargetSpec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_shown_can_be_parsed() {
        for text in [
            "web",
            "pid:7",
            "qmp:/run/q",
            "gdb:127.0.0.1:1",
            "gdb:[::1]:9",
            "gdb:/run/g",
            "/d",
            "lime:/d",
            "kdump:/d",
            "migration:/d",
        ] {
            assert_eq!(parse(text).to_string(), text);
        }
    }
}
