//! The command line: what every command shares, and the list of commands.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::commands::{
    bench, check, debug, disas, dump, guard, hooks, info, kmsg, launch, list, listing, raw, recover, regs,
    report, scan, shell, sim, strings, symbols, timeline, trace, translate, types, write,
};
use crate::output::{Color, Format, Style};

/// Virtual machine monitoring for security: see into a guest from outside, with nothing configured.
#[derive(Parser, Debug)]
#[command(
    name = "vmsight",
    version,
    about,
    propagate_version = true,
    max_term_width = 110
)]
#[command(after_help = "\
TARGET is what to look into:
  NAME                 a running VM by its name (see `vmsight list`)
  pid:N                a running VM by the process id of its VMM
  qmp:PATH             a QEMU by its QMP socket
  gdb:HOST:PORT|PATH   anything that speaks QEMU's gdb protocol
  FILE                 a memory dump; raw, LiME, AVML, ELF core, kdump, QEMU migration streams and
                       VMware states are told apart by content; raw:FILE, lime:, avml:, elf:,
                       kdump:, migration:, vmware: force it

Exit codes: 0 fine; 1 nothing found where something was asked for, such as a process; 2 error.")]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command understands.
#[derive(Args, Clone, Debug)]
pub(crate) struct Global {
    /// How to print results
    #[arg(
        short,
        long,
        value_name = "FORMAT",
        default_value = "table",
        global = true,
        help_heading = "Output"
    )]
    pub(crate) output: Format,
    /// Columns to show, by name and in this order; `all` for every one
    #[arg(
        long,
        value_name = "NAME,…",
        value_delimiter = ',',
        global = true,
        help_heading = "Output"
    )]
    pub(crate) columns: Option<Vec<String>>,
    /// Leave the header line out of tables and CSV
    #[arg(long, global = true, help_heading = "Output")]
    pub(crate) no_headers: bool,
    /// Never shorten cells to the width of the terminal
    #[arg(short = 'w', long, global = true, help_heading = "Output")]
    pub(crate) wide: bool,
    /// When to use colours; NO_COLOR is honoured
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "auto",
        global = true,
        help_heading = "Output"
    )]
    pub(crate) color: Color,
    /// Repeat every N seconds until interrupted or the VM ends (live targets)
    #[arg(long, value_name = "N", global = true, help_heading = "Output")]
    pub(crate) watch: Option<f64>,

    /// Take symbols and types from FILE (ISF .json/.xz, vmlinux, BTF, System.map), not from the guest's memory
    #[arg(long, value_name = "FILE", global = true, help_heading = "Target")]
    pub(crate) symbols: Option<PathBuf>,
    /// Neither use nor write cached profiles
    #[arg(long, global = true, help_heading = "Target")]
    pub(crate) no_cache: bool,
    /// Where profiles are cached [default: $XDG_CACHE_HOME/vmsight/profiles]
    #[arg(
        long,
        value_name = "DIR",
        env = "VMSIGHT_PROFILES",
        global = true,
        help_heading = "Target"
    )]
    pub(crate) cache_dir: Option<PathBuf>,
    /// Pause the VM while it is read: a consistent view, at the price of stopping the guest
    #[arg(long, global = true, help_heading = "Target")]
    pub(crate) pause: bool,
    /// Search all of memory for kernels and ask the vCPUs which one they run (CR3, LSTAR, the page-fault gate): for guests whose
    /// root may have laid out a second kernel for us to find. Without it the first one that proves itself is taken
    #[arg(long, global = true, help_heading = "Target")]
    pub(crate) thorough: bool,
    /// How long to wait for a QMP socket or gdb stub, in seconds
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 2.0,
        global = true,
        help_heading = "Target"
    )]
    pub(crate) timeout: f64,
    /// Say more (-v: how the kernel was found; -vv, -vvv: debugging)
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub(crate) verbose: u8,
    /// Print errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
}

impl Global {
    pub(crate) fn style(&self) -> Style {
        Style {
            format: self.output,
            color: self.color,
            columns: self.columns.clone(),
            no_headers: self.no_headers,
            wide: self.wide,
            quiet: self.quiet,
            clear: self.watch.is_some() && self.output == Format::Table,
        }
    }
}

/// Defines [`Command`], and [`Lazy`] of the same commands.
macro_rules! commands {
    ($($variants:tt)*) => {
        /// What to do.
        #[derive(Subcommand, Debug)]
        pub(crate) enum Command { $($variants)* }

        /// The same commands, whose options are defined only when one is called. Not for help: there the options that all commands share
        /// would come before a command's own.
        #[derive(Subcommand)]
        #[command(defer = true)]
        pub(crate) enum Lazy { $($variants)* }
    };
}

commands! {
    /// The virtual machines of this host
    List(list::Cmd),
    /// What the guest is: kernel, paging, times, name
    Info(info::Cmd),
    /// Processes
    Ps(listing::Ps),
    /// Processes as a tree
    Pstree(listing::Pstree),
    /// Threads of all processes or of one
    Threads(listing::Threads),
    /// Kernel stacks of all threads or of some
    Stacks(listing::Stacks),
    /// Memory maps of processes
    Maps(listing::Maps),
    /// Open files
    Lsof(listing::Lsof),
    /// Loaded kernel modules
    Lsmod(listing::Lsmod),
    /// Sockets of every family, in every network namespace
    Net(listing::Net),
    /// UNIX sockets with their peers
    Unix(listing::Unix),
    /// Mounts of every mount namespace
    Mounts(listing::Mounts),
    /// The kernel's log
    Kmsg(kmsg::Cmd),
    /// Environment of processes
    Env(listing::Env),
    /// Control groups and who is in them
    Cgroups(listing::Cgroups),
    /// Network interfaces and their addresses
    Ifaces(listing::Ifaces),
    /// What lies at which physical address and I/O port
    Iomem(listing::Iomem),
    /// The caches of the kernel's allocator, and what they hold
    Slabs(listing::Slabs),
    /// BPF programs, maps and links
    Bpf(listing::Bpf),
    /// Perf events: what is counted, and what is called for it
    Perf(listing::Perf),
    /// Registers of the vCPUs
    Regs(regs::Cmd),
    /// Read memory: bytes, numbers, strings or typed objects
    Read(raw::Read),
    /// Write memory of a live VM
    Write(write::Write),
    /// Write the guest's memory as a dump, or a dump in another format
    Dump(dump::Cmd),
    /// Virtual to physical, with every table entry on the way
    Translate(translate::Cmd),
    /// Disassemble, with symbols
    Disas(disas::Cmd),
    /// Printable strings in physical, kernel or process memory
    Strings(strings::Cmd),
    /// Kernel symbols: list, search, address to name, export
    Symbols(symbols::Cmd),
    /// Kernel types with their members' offsets
    Types(types::Cmd),
    /// Check the integrity of a guest's kernel: tampering, hooks, what it hides
    Check(check::Cmd),
    /// Make a trusted copy of a kernel's code, for `vmsight check --golden`
    Baseline(check::baseline::Cmd),
    /// Get back what is in a guest's memory: files, and what people and programs left behind
    Recover(recover::Cmd),
    /// YARA rules over physical memory, the kernel's, or that of processes
    Scan(scan::Cmd),
    /// Everything in memory that has a time, in order
    Timeline(timeline::Cmd),
    /// A report on a guest: one HTML page
    Report(report::Cmd),
    /// What can be hooked in a VM, and by which means
    Hooks(hooks::Cmd),
    /// What happens in a running guest, as it happens
    Trace(trace::Cmd),
    /// Hold a running guest to rules: deny what they forbid, and say who tried
    Guard(guard::Cmd),
    /// Start a QEMU whose guest can be hooked
    Launch(launch::Cmd),
    /// Let gdb or lldb debug a guest's kernel, or one process of it
    Debug(debug::Cmd),
    /// Measure what hooks cost on this machine
    Bench(bench::Cmd),
    /// A monitor inside the guest, out of its reach: images, runs in Bochs, cost, attacks
    Sim(sim::Cmd),
    /// Print a completion script for a shell
    Completions(shell::Completions),
    /// Write the manual pages
    Man(shell::Man),
}

impl Command {
    /// Whether it has results in SARIF.
    pub(crate) fn has_sarif(&self) -> bool {
        matches!(self, Command::Check(c) if c.has_sarif())
    }

    /// Whether it may be run again and again: it shows something and changes nothing.
    pub(crate) fn can_repeat(&self) -> bool {
        match self {
            Command::Write(_)
            | Command::Baseline(_)
            | Command::Dump(_)
            | Command::Report(_)
            | Command::Trace(_)
            | Command::Guard(_)
            | Command::Launch(_)
            | Command::Debug(_)
            | Command::Bench(_)
            | Command::Sim(_)
            | Command::Completions(_)
            | Command::Man(_) => false,
            Command::Symbols(c) => !c.exports(),
            Command::Recover(c) => c.can_repeat(),
            _ => true,
        }
    }
}
