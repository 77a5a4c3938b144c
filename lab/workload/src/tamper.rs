//! What our kernel module `vmsight_tamper` (lab/modules) can be told to do to a guest's kernel, as rootkits do it, and to undo.

use serde::{Deserialize, Serialize};

/// Something to be changed. Each can be done once, and then undone, which needs the same words but for the process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tamper {
    /// Takes the module itself out of the kernel's list of modules. `object` is its `struct module`.
    ModuleList,
    /// Takes its kobject out of sysfs and of the set of all modules' kobjects. `object` is the kobject.
    ModuleSysfs,
    /// Takes it out of the tree by which the kernel finds a module by an address. `object` is its `struct module`.
    ModuleTree,
    /// Marks the module as one that is only being made: /proc/modules leaves it out. `object` is the mark.
    ModuleMark,
    /// Takes a process out of the list of tasks. `object` is its `task_struct`.
    TaskList {
        /// Who.
        pid: u32,
    },
    /// Takes a process's pids out of the tables of their namespaces: nobody can send it a signal. `object` is its `struct pid`.
    TaskPid {
        /// Who.
        pid: u32,
    },
    /// Replaces an entry of the table of system calls. `object` is the entry, `hook` what it leads to.
    SyscallTable {
        /// Which call.
        number: u64,
    },
    /// Has the head of a function jump to the module. `object` is the jump, `hook` where it leads.
    Inline {
        /// The function.
        symbol: String,
    },
    /// Hooks a function by ftrace. `object` is where it is hooked, `hook` what is called.
    Ftrace {
        /// The function.
        symbol: String,
    },
    /// Hooks a function by a kprobe. `object` is the probe's address, `hook` what is called.
    Kprobe {
        /// The function.
        symbol: String,
    },
    /// Replaces what shows a line of /proc/net/tcp, so that a port is not shown. `object` is the pointer, `hook` what it leads to.
    TcpSeq {
        /// The local port.
        port: u16,
    },
    /// Replaces a gate of the interrupt descriptor table. `object` is the gate, `hook` what it leads to.
    Idt {
        /// The vector.
        vector: u8,
    },
    /// Has all IPv4 packets that come in pass the module. `object` is the `nf_hook_ops`, `hook` what is called.
    Netfilter,
    /// Makes a process root by writing to the `struct cred` that it has. `object` is that.
    CredWrite {
        /// Who.
        pid: u32,
    },
    /// Gives a process the `struct cred` of another, or with 0 that of the kernel's own. `object` is the shared one.
    CredShare {
        /// Who gets it.
        pid: u32,
        /// Whose.
        other: u32,
    },
    /// Makes a page that is writable and executable. `object` is the page.
    PageWx,
    /// Maps a page of the kernel's code a second time, writable. `object` is the page, `hook` the second mapping.
    TextAlias {
        /// A function in the page.
        symbol: String,
    },
    /// Takes a process's listening socket (IPv4, TCP) out of its table: connections are refused. `object` is the `struct sock`.
    Socket {
        /// Who.
        pid: u32,
    },
    /// Sets a timer. `object` is the `timer_list`, `hook` what is called, as with those that follow.
    Timer,
    /// Sets a high-resolution timer. `object` is the `hrtimer`.
    HrTimer,
    /// Has work queued after a while. `object` is the `delayed_work`.
    DelayedWork,
    /// Starts a kernel thread that is named as a worker of the kernel's. `object` is its `task_struct`.
    KernelThread,
    /// Is told of all keys. `object` is the `notifier_block`.
    Keyboard,
    /// Puts a uprobe on the first instruction of a program. `object` is the `uprobe_consumer`.
    Uprobe {
        /// Its path.
        program: String,
    },
    /// Hooks a function by a breakpoint of the processor, on every CPU. `object` is the function.
    Breakpoint {
        /// The function.
        symbol: String,
    },
    /// Takes a process's seccomp filters out of force. `object` is its `task_struct`.
    Seccomp {
        /// Who.
        pid: u32,
    },
    /// Takes a file out of what its directory has in memory: on tmpfs no listing shows it, and by its name it can be opened. `object`
    /// is its `dentry`, as with the next.
    FileList {
        /// Its path.
        path: String,
    },
    /// Takes a file's name out of the table of names: who has it open has it, and nobody else finds it.
    FileName {
        /// Its path.
        path: String,
    },
}

/// What the module says of what it has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tampered {
    /// The address of what was changed.
    pub object: u64,
    /// The address of what it leads to now; 0 where it leads nowhere.
    pub hook: u64,
    /// The module's `struct module`.
    pub module: u64,
    /// A page of the module's code.
    pub text: u64,
}
