//! Making a policy.

use vmsight_sim_abi::{
    CallRule, FENTRY_NOP, Handler, Hook, LISTED_MODULES_ONLY, MODULES, Malformed, Member, Policy,
    REFUSE_OTHER_CALLS,
};

use crate::KernelImage;

/// ENDBR64, which kernels with indirect-branch tracking have first.
const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// `EPERM` and `ENOSYS`.
const EPERM: i64 = 1;
const ENOSYS: i64 = 38;

/// What a policy is to do, beyond counting system calls and telling processes, programs, modules and who becomes root.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// System calls, by number, that are told each time.
    pub told: Vec<usize>,
    /// System calls, by number, that are refused, and the error number.
    pub refused: Vec<(usize, u16)>,
    /// System calls of 32 bits and of x32 are refused.
    pub refuse_other_calls: bool,
    /// SHA-256 of the modules' files that may be loaded; `None`: all.
    pub modules: Option<Vec<[u8; 32]>>,
    /// Nobody becomes root but by executing a setuid file.
    pub refuse_root: bool,
}

/// Why there is no policy for a kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// The kernel has no such function or variable.
    #[error("this kernel has no {0}")]
    Symbol(&'static str),
    /// It has, but the place for a hook is not there.
    #[error(
        "{function} of this kernel does not begin with what tracing reserves (CONFIG_FUNCTION_TRACER) but with {found}"
    )]
    NotTraceable {
        /// The function.
        function: &'static str,
        /// Its first bytes.
        found: String,
    },
    /// A member of a structure is not there.
    #[error("{structure} of this kernel has no {member}")]
    Member {
        /// The structure.
        structure: &'static str,
        /// The member.
        member: &'static str,
    },
    /// A rule for a system call that there cannot be.
    #[error("there is no rule for system call {0}: its number or the error is out of range")]
    Call(usize),
    /// More modules than a policy has room for.
    #[error("{0} modules are more than a policy has room for ({MODULES})")]
    Modules(usize),
    /// What was found contradicts itself.
    #[error("what this kernel's symbols and types say makes no policy: {0:?}")]
    Malformed(Malformed),
}

/// Handlers and the functions that they are for.
const FUNCTIONS: [(Handler, &str); 8] = [
    (Handler::Call, "x64_sys_call"),
    (Handler::CompatCall, "ia32_sys_call"),
    (Handler::X32Call, "x32_sys_call"),
    (Handler::Process, "wake_up_new_task"),
    (Handler::Exec, "begin_new_exec"),
    (Handler::ModuleFile, "security_kernel_post_read_file"),
    (Handler::ModuleData, "security_kernel_post_load_data"),
    (Handler::Credentials, "commit_creds"),
];

const OFFSETS: [(Member, &str, &str); 24] = [
    (Member::TaskPid, "task_struct", "pid"),
    (Member::TaskTgid, "task_struct", "tgid"),
    (Member::TaskComm, "task_struct", "comm"),
    (Member::TaskRealParent, "task_struct", "real_parent"),
    (Member::TaskCred, "task_struct", "cred"),
    (Member::TaskMm, "task_struct", "mm"),
    (Member::MmExeFile, "mm_struct", "exe_file"),
    (Member::FileInode, "file", "f_inode"),
    (Member::FileDentry, "file", "f_path.dentry"),
    (Member::DentryName, "dentry", "d_name.name"),
    (Member::InodeMode, "inode", "i_mode"),
    (Member::InodeUid, "inode", "i_uid"),
    (Member::CredUid, "cred", "uid"),
    (Member::CredEuid, "cred", "euid"),
    (Member::CredSuid, "cred", "suid"),
    (Member::CredFsuid, "cred", "fsuid"),
    (Member::BprmFilename, "linux_binprm", "filename"),
    (Member::BprmFile, "linux_binprm", "file"),
    (Member::RegsDi, "pt_regs", "di"),
    (Member::RegsSi, "pt_regs", "si"),
    (Member::RegsDx, "pt_regs", "dx"),
    (Member::RegsR10, "pt_regs", "r10"),
    (Member::RegsR8, "pt_regs", "r8"),
    (Member::RegsR9, "pt_regs", "r9"),
];

/// Makes the policy for a kernel.
///
/// # Errors
/// If the kernel lacks a function or a member that is needed, which the error names.
pub fn policy(kernel: &KernelImage, wanted: &Wanted) -> Result<Policy, PolicyError> {
    let symbol = |name| kernel.symbols.address(name).ok_or(PolicyError::Symbol(name));
    let mut policy = Policy::new([symbol("_text")?, symbol("_etext")?], symbol("entry_SYSCALL_64")?);
    let mut slots = policy.hooks.iter_mut();
    for (handler, function) in FUNCTIONS {
        // Kernels are built without the calls of 32 bits or of x32, too; there is nothing to hook then.
        let optional = matches!(handler, Handler::CompatCall | Handler::X32Call);
        if optional && kernel.symbols.address(function).is_none() {
            continue;
        }
        let refusal = match handler {
            Handler::Call if !wanted.refused.is_empty() => EPERM,
            Handler::CompatCall | Handler::X32Call if wanted.refuse_other_calls => ENOSYS,
            Handler::ModuleFile | Handler::ModuleData if wanted.modules.is_some() => EPERM,
            Handler::Credentials if wanted.refuse_root => EPERM,
            _ => 0,
        };
        if let Some(slot) = slots.next() {
            *slot = Hook {
                address: place(kernel, function)?,
                handler: handler as u64,
                may_refuse: u64::from(refusal != 0),
                refusal: -refusal,
            };
        }
    }
    let mut set = |member: Member, value: u64| {
        if let Some(slot) = policy.members.get_mut(member as usize) {
            *slot = value;
        }
    };
    set(Member::Current, current(kernel)?);
    for (member, structure, path) in OFFSETS {
        let field = kernel.types.member(structure, path);
        let missing = PolicyError::Member {
            structure,
            member: path,
        };
        set(member, field.ok_or(missing)?.offset);
    }
    let (structure, member) = ("task_struct", "in_execve");
    let missing = PolicyError::Member { structure, member };
    let bit = kernel.types.member(structure, member).ok_or(missing)?;
    set(Member::TaskInExecve, bit.offset * 8 + u64::from(bit.bit_offset));
    for (member, name) in [
        (Member::ReadingModule, "READING_MODULE"),
        (Member::LoadingModule, "LOADING_MODULE"),
    ] {
        let value = kernel
            .types
            .enumerator(name)
            .and_then(|value| u64::try_from(value).ok());
        set(member, value.ok_or(PolicyError::Symbol(name))?);
    }
    rules(&mut policy, wanted)?;
    // The same check as those make who read it.
    Policy::from_bytes(&policy.to_bytes()).map_err(PolicyError::Malformed)
}

fn rules(policy: &mut Policy, wanted: &Wanted) -> Result<(), PolicyError> {
    let numbers = wanted.told.iter().map(|&number| (number, 0, true));
    let refused = wanted
        .refused
        .iter()
        .map(|&(number, errno)| (number, errno, false));
    for (number, errno, told) in numbers.chain(refused) {
        let before = policy.call(number);
        let rule = CallRule {
            errno: if told { before.errno } else { errno },
            told: told || before.told,
        };
        let no_error = !told && errno == 0;
        if no_error || !policy.set_call(number, rule) {
            return Err(PolicyError::Call(number));
        }
    }
    if wanted.refuse_other_calls {
        policy.flags |= REFUSE_OTHER_CALLS;
    }
    if let Some(modules) = &wanted.modules {
        policy.flags |= LISTED_MODULES_ONLY;
        for hash in modules {
            if !policy.allow_module(*hash) {
                return Err(PolicyError::Modules(modules.len()));
            }
        }
    }
    Ok(())
}

/// Where the pointer to the running task lies, from the base of GS: `current_task`, from 6.2 to 6.14
/// `pcpu_hot.current_task` (arch/x86/include/asm/current.h).
fn current(kernel: &KernelImage) -> Result<u64, PolicyError> {
    let Some(hot) = kernel.symbols.address("pcpu_hot") else {
        let name = "current_task";
        return kernel.symbols.address(name).ok_or(PolicyError::Symbol(name));
    };
    let (structure, member) = ("pcpu_hot", "current_task");
    let field = kernel.types.member(structure, member);
    let missing = PolicyError::Member { structure, member };
    Ok(hot.wrapping_add(field.ok_or(missing)?.offset))
}

/// Link-time address of the five bytes at a function's head that tracing reserves: a call of `__fentry__`, which the kernel
/// itself makes a NOP of when it boots, or that NOP already.
fn place(kernel: &KernelImage, function: &'static str) -> Result<u64, PolicyError> {
    let missing = || PolicyError::Symbol(function);
    let mut address = kernel.symbols.address(function).ok_or_else(missing)?;
    if kernel.bytes(address) == Some(ENDBR64) {
        address += ENDBR64.len() as u64;
    }
    let bytes: [u8; 5] = kernel.bytes(address).ok_or_else(missing)?;
    let [opcode, relative @ ..] = bytes;
    let next = address.wrapping_add(bytes.len() as u64);
    let target = next.wrapping_add_signed(i32::from_le_bytes(relative).into());
    let calls_fentry = opcode == 0xe8 && kernel.symbols.address("__fentry__") == Some(target);
    if bytes != FENTRY_NOP && !calls_fentry {
        return Err(PolicyError::NotTraceable {
            function,
            found: bytes.map(|byte| format!("{byte:02x}")).join(" "),
        });
    }
    Ok(address)
}
