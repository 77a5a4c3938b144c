//! `vmsight-lab`: boots guests of the lab for people, scripts and demos.

use std::io::Read;
use std::path::PathBuf;
use std::sync::mpsc;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use serde_json::json;
use vmsight_lab::{Format, Guest, Kernel, Machine, Memory, Order, Orders, Paging, Spec, full_matrix, matrix};

/// Real Debian guests under QEMU, with a workload that says what it is.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Boot a guest and leave it running until standard input closes or Ctrl-C.
    Boot {
        #[command(flatten)]
        guest: GuestArgs,
        /// Leave it running after this command has ended; end it by its pid.
        #[arg(long)]
        keep: bool,
        /// Print one JSON object instead of lines.
        #[arg(long)]
        json: bool,
    },
    /// Boot a guest, write its memory and its account of itself into a folder, and end it.
    Dump {
        #[command(flatten)]
        guest: GuestArgs,
        /// Form of the dump; several are made of the same moment.
        #[arg(long, value_enum, default_value = "elf")]
        format: Vec<FormatArg>,
        /// The folder; it is made if need be.
        folder: PathBuf,
    },
    /// Have a guest that takes orders carry some out, one after the other, and print what it says of each.
    Order {
        /// Where it takes orders.
        socket: PathBuf,
        /// Orders, such as '{"do":"getpid","count":10000,"cpu":0}'.
        #[arg(required = true)]
        orders: Vec<String>,
    },
    /// List the guests that the tests are run on.
    Matrix {
        /// Every combination instead of the choice.
        #[arg(long)]
        full: bool,
        /// Only those with this kernel.
        #[arg(long)]
        kernel: Option<Kernel>,
        /// Boot each in turn and say how it went.
        #[arg(long)]
        boot: bool,
    },
}

#[derive(clap::Args)]
struct GuestArgs {
    /// 5.10, 6.1, 6.1-cloud, 6.1-rt, 6.12 or sid.
    #[arg(long, default_value = "6.1")]
    kernel: Kernel,
    /// Memory, MiB.
    #[arg(long, default_value_t = 512, value_name = "MIB")]
    memory: u32,
    /// Where its memory is.
    #[arg(long, value_enum, default_value = "file")]
    backing: MemoryArg,
    /// 5-level paging.
    #[arg(long)]
    five_level: bool,
    /// Machine q35 instead of pc.
    #[arg(long)]
    q35: bool,
    /// Processors.
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// No QMP socket.
    #[arg(long)]
    no_qmp: bool,
    /// This many sleeping processes more.
    #[arg(long, value_name = "N")]
    procs: Option<u32>,
    /// No workload.
    #[arg(long)]
    idle: bool,
    /// Take orders: lines of JSON on a socket.
    #[arg(long)]
    orders: bool,
    /// With the lab's own modules, to be loaded by order.
    #[arg(long)]
    modules: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum MemoryArg {
    File,
    Memfd,
    Private,
}

#[derive(Clone, Copy, ValueEnum)]
enum FormatArg {
    Elf,
    Raw,
}

impl GuestArgs {
    fn spec(&self) -> Spec {
        let mut spec = Spec {
            paging: if self.five_level {
                Paging::Five
            } else {
                Paging::Four
            },
            machine: if self.q35 { Machine::Q35 } else { Machine::Pc },
            memory_mib: self.memory,
            memory: match self.backing {
                MemoryArg::File => Memory::File,
                MemoryArg::Memfd => Memory::Memfd,
                MemoryArg::Private => Memory::Private,
            },
            vcpus: self.vcpus,
            qmp: !self.no_qmp,
            orders: self.orders,
            modules: self.modules,
            ..Spec::new(self.kernel)
        };
        if let Some(count) = self.procs {
            spec = spec.sleepers(count);
        }
        if self.idle {
            spec = spec.idle();
        }
        spec
    }
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Verb::Boot { guest, keep, json } => boot(&guest.spec(), keep, json),
        Verb::Dump {
            guest,
            format,
            folder,
        } => dump(&guest.spec(), &format, &folder),
        Verb::Order { socket, orders } => {
            let line = Orders::connect(&socket)?;
            for text in orders {
                let order: Order =
                    serde_json::from_str(&text).with_context(|| format!("'{text}' is no order"))?;
                println!("{}", serde_json::to_string(&line.order(order)?)?);
            }
            Ok(())
        }
        Verb::Matrix { full, kernel, boot } => {
            let specs = if full { full_matrix() } else { matrix() };
            for spec in specs
                .into_iter()
                .filter(|spec| kernel.is_none_or(|k| k == spec.kernel))
            {
                if boot {
                    let guest = Guest::boot(&spec)?;
                    println!("{spec}: up after {:.1} s", guest.boot_time().as_secs_f64());
                } else {
                    println!("{spec}");
                }
            }
            Ok(())
        }
    }
}

fn boot(spec: &Spec, keep: bool, as_json: bool) -> Result<()> {
    // Before the guest, so that it is never left behind.
    let mut signals =
        signal_hook::iterator::Signals::new([signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM])?;
    let (tell, told) = mpsc::channel();
    let tell_end = tell.clone();
    let guest = if keep {
        Guest::boot_to_keep(spec)?
    } else {
        Guest::boot(spec)?
    };
    let truth = guest.folder().join("truth.json");
    std::fs::write(&truth, serde_json::to_vec_pretty(guest.truth())?)?;
    let facts = json!({
        "name": format!("vmsight-lab-{spec}"),
        "kernel": guest.truth().system.release,
        "pid": guest.pid(),
        "qmp": guest.qmp_path(),
        "orders": guest.orders_path(),
        "memory": guest.memory_path(),
        "truth": truth,
        "console": guest.folder().join("console.log"),
        "seconds": guest.boot_time().as_secs_f64(),
    });
    if as_json {
        println!("{facts}");
    } else if let Some(facts) = facts.as_object() {
        for (name, value) in facts.iter().filter(|(_, value)| !value.is_null()) {
            println!(
                "{name:8} {}",
                value.as_str().map_or_else(|| value.to_string(), str::to_owned)
            );
        }
    }
    if keep {
        return Ok(());
    }
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = tell_end.send(());
    });
    std::thread::spawn(move || {
        let _ = signals.forever().next();
        let _ = tell.send(());
    });
    told.recv()?;
    guest.stop()
}

fn dump(spec: &Spec, formats: &[FormatArg], folder: &std::path::Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let folder = folder.canonicalize()?;
    let guest = Guest::boot(spec)?;
    guest.paused(|qmp| {
        std::fs::write(folder.join("registers.txt"), qmp.human("info registers -a")?)?;
        for format in formats {
            let (format, name) = match format {
                FormatArg::Elf => (Format::Elf, "memory.elf"),
                FormatArg::Raw => (Format::Raw, "memory.raw"),
            };
            let file = folder.join(name);
            // QEMU makes ELF dumps that only their owner can read, and does not replace them.
            let _ = std::fs::remove_file(&file);
            guest.dump_paused(qmp, format, &file)?;
            println!("{}", file.display());
        }
        Ok(())
    })?;
    std::fs::write(
        folder.join("truth.json"),
        serde_json::to_vec_pretty(guest.truth())?,
    )?;
    std::fs::write(folder.join("console.log"), guest.console())?;
    guest.stop()
}
