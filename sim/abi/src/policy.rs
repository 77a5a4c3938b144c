//! What a monitor looks at in one build of a kernel: which functions are hooked, where what the handlers need lies, and what
//! is not let pass. Made on the host out of the kernel's own symbols and types, booted along as a module, and put by the
//! hypervisor into the monitor's data, where the guest cannot reach it.
//!
//! A policy has one length, and all in it are integers. It is checked where it is read: nothing that a file holds is more
//! than a wrong answer to whoever wrote it.

use crate::Handler;
use crate::image::{SITE_STRIDE, site_offset};

/// The first eight bytes of a policy.
pub const POLICY_MAGIC: u64 = u64::from_le_bytes(*b"vmsimpol");
/// Hooks that a policy has room for.
pub const HOOKS: usize = 16;
/// Numbers of system calls that are told apart. Linux has no higher ones on x86 but those of x32, which begin at 512 and
/// have a handler of their own.
pub const CALLS: usize = 512;
/// Hashes of modules that a policy has room for.
pub const MODULES: usize = 128;
/// Members and constants that a policy has room for.
pub const MEMBERS: usize = 40;
/// What the head of a kernel function holds, once the kernel runs, where it can be traced: a NOP of five bytes. The linker
/// leaves a call of `__fentry__` there, which the kernel replaces early in its boot.
pub const FENTRY_NOP: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];
/// Bytes of a policy.
pub const POLICY_LENGTH: usize = 8 * (8 + 4 * HOOKS + MEMBERS) + 2 * CALLS + 32 * MODULES;

/// A member that the kernel does not have.
pub const ABSENT: u64 = u64::MAX;
/// No member lies further from the begin of its structure, in bytes. Bits, and the per-CPU area, are not counted so.
const FURTHEST: u64 = 1 << 24;
/// Greatest error number that a function of the kernel returns.
const MAX_ERRNO: u16 = 4095;
/// A call's entry: it is told as an event.
const TOLD: u16 = 1 << 15;

/// Flag of a policy: a module whose hash is not in the list is refused. Without, it is told only.
pub const LISTED_MODULES_ONLY: u64 = 1;
/// Flag of a policy: system calls of 32 bits and of x32 are refused. Their numbers are others, so the list of calls says
/// nothing about them.
pub const REFUSE_OTHER_CALLS: u64 = 2;
const FLAGS: u64 = LISTED_MODULES_ONLY | REFUSE_OTHER_CALLS;

/// A hooked function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Hook {
    /// Link-time address of the five bytes that become a call of the stub: of [`FENTRY_NOP`].
    pub address: u64,
    /// The [`Handler`]. Each is in a policy once at most.
    pub handler: u64,
    /// 1: the handler may make the function return [`Self::refusal`] at once. 0: it may not, whatever it finds.
    pub may_refuse: u64,
    /// What the function returns then: a negative error number.
    pub refusal: i64,
}

impl Hook {
    /// Link-time address to which the hook's call returns.
    pub const fn site(&self) -> u64 {
        self.address.wrapping_add(FENTRY_NOP.len() as u64)
    }
}

/// Offsets of members, in bytes from the begin of their structure, and other constants of a kernel build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Member {
    /// From the base of GS: where the pointer to the running `task_struct` lies.
    Current = 0,
    /// `task_struct.pid`, 4 bytes.
    TaskPid = 1,
    /// `task_struct.tgid`, 4 bytes.
    TaskTgid = 2,
    /// `task_struct.comm`, 16 bytes.
    TaskComm = 3,
    /// `task_struct.real_parent`.
    TaskRealParent = 4,
    /// `task_struct.cred`.
    TaskCred = 5,
    /// `task_struct.mm`, 0 for threads of the kernel.
    TaskMm = 6,
    /// `task_struct.in_execve`: a bit. In bits.
    TaskInExecve = 7,
    /// `mm_struct.exe_file`.
    MmExeFile = 8,
    /// `file.f_inode`.
    FileInode = 9,
    /// `file.f_path.dentry`.
    FileDentry = 10,
    /// `dentry.d_name.name`.
    DentryName = 11,
    /// `inode.i_mode`, 2 bytes.
    InodeMode = 12,
    /// `inode.i_uid`, 4 bytes.
    InodeUid = 13,
    /// `cred.uid`, 4 bytes, as the next three.
    CredUid = 14,
    /// `cred.euid`.
    CredEuid = 15,
    /// `cred.suid`.
    CredSuid = 16,
    /// `cred.fsuid`.
    CredFsuid = 17,
    /// `linux_binprm.filename`.
    BprmFilename = 18,
    /// `linux_binprm.file`.
    BprmFile = 19,
    /// `pt_regs.di`: first argument of a system call, and so on.
    RegsDi = 20,
    /// `pt_regs.si`.
    RegsSi = 21,
    /// `pt_regs.dx`.
    RegsDx = 22,
    /// `pt_regs.r10`.
    RegsR10 = 23,
    /// `pt_regs.r8`.
    RegsR8 = 24,
    /// `pt_regs.r9`.
    RegsR9 = 25,
    /// The value of `READING_MODULE` of `kernel_read_file_id`.
    ReadingModule = 26,
    /// The value of `LOADING_MODULE` of `kernel_load_data_id`.
    LoadingModule = 27,
}

/// What a monitor looks at, and what it does not let pass.
#[derive(Debug, Clone, PartialEq, Eq)]
#[repr(C)]
pub struct Policy {
    /// [`POLICY_MAGIC`]
    pub magic: u64,
    /// [`crate::VERSION`]
    pub version: u64,
    /// [`POLICY_LENGTH`]
    pub length: u64,
    /// [`LISTED_MODULES_ONLY`] and so on.
    pub flags: u64,
    /// Link-time addresses of the kernel's text: `_text` and `_etext`. All others are in it.
    pub text: [u64; 2],
    /// Link-time address of `entry_SYSCALL_64`: what the kernel writes into LSTAR, and so KASLR's slide.
    pub entry: u64,
    /// How many of `modules` there are.
    pub modules_used: u64,
    /// The hooks. Those whose address is 0 are none.
    pub hooks: [Hook; HOOKS],
    /// By [`Member`].
    pub members: [u64; MEMBERS],
    /// By number of a system call of 64 bits: see [`Self::call`].
    pub calls: [u16; CALLS],
    /// SHA-256 of modules, as they lie in files and are given to the kernel.
    pub modules: [[u8; 32]; MODULES],
}

/// What is done about a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallRule {
    /// It is refused with this error number; 0: it is not.
    pub errno: u16,
    /// Each is told, with its arguments. One that is refused always is.
    pub told: bool,
}

/// Why bytes are no policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// Not as long as a policy is.
    Length,
    /// It does not begin as one.
    Magic,
    /// Of another version than [`crate::VERSION`].
    Version,
    /// A flag that is not known.
    Flags,
    /// The kernel's text ends before it begins, or the entry is not in it.
    Text,
    /// The hook at this index is not in the text, has no handler or one that another has, or refuses with what is no error.
    Hook(usize),
    /// The hook at this index cannot be told from another by the monitor's table of sites.
    Collision(usize),
    /// The offset at this index is larger than a structure can be.
    Member(usize),
    /// The rule of this system call has an error number that is none.
    Call(usize),
    /// It says that it has more modules than there is room for.
    Modules,
}

impl Policy {
    /// Room for one, all zero.
    pub const EMPTY: Self = Self {
        magic: 0,
        version: 0,
        length: 0,
        flags: 0,
        text: [0; 2],
        entry: 0,
        modules_used: 0,
        hooks: [Hook {
            address: 0,
            handler: 0,
            may_refuse: 0,
            refusal: 0,
        }; HOOKS],
        members: [0; MEMBERS],
        calls: [0; CALLS],
        modules: [[0; 32]; MODULES],
    };

    /// The policy of a kernel with this text and entry that looks at nothing yet and knows no members.
    pub const fn new(text: [u64; 2], entry: u64) -> Self {
        Self {
            magic: POLICY_MAGIC,
            version: crate::VERSION,
            length: POLICY_LENGTH as u64,
            text,
            entry,
            members: [ABSENT; MEMBERS],
            ..Self::EMPTY
        }
    }

    /// Reads and checks one.
    ///
    /// # Errors
    /// If anything in it is not what it must be.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut policy = Self::EMPTY;
        policy.read(bytes)?;
        Ok(policy)
    }

    /// The same into a place there is. What is there after an error is of no use.
    ///
    /// # Errors
    /// As for [`Self::from_bytes`].
    pub fn read(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        if bytes.len() != POLICY_LENGTH {
            return Err(Malformed::Length);
        }
        let (head, rest) = bytes.split_at(8 * (8 + 4 * HOOKS + MEMBERS));
        let (calls, modules) = rest.split_at(2 * CALLS);
        let mut words = head.chunks_exact(8).map(|eight| {
            let mut word = [0; 8];
            word.copy_from_slice(eight);
            u64::from_le_bytes(word)
        });
        let mut next = || words.next().unwrap_or(0);
        self.magic = next();
        self.version = next();
        self.length = next();
        self.flags = next();
        self.text = [next(), next()];
        self.entry = next();
        self.modules_used = next();
        for hook in &mut self.hooks {
            *hook = Hook {
                address: next(),
                handler: next(),
                may_refuse: next(),
                refusal: next() as i64,
            };
        }
        for member in &mut self.members {
            *member = next();
        }
        for (rule, two) in self.calls.iter_mut().zip(calls.chunks_exact(2)) {
            let mut word = [0; 2];
            word.copy_from_slice(two);
            *rule = u16::from_le_bytes(word);
        }
        for (hash, from) in self.modules.iter_mut().zip(modules.chunks_exact(32)) {
            hash.copy_from_slice(from);
        }
        self.check()
    }

    fn check(&self) -> Result<(), Malformed> {
        if self.magic != POLICY_MAGIC {
            return Err(Malformed::Magic);
        }
        if self.version != crate::VERSION {
            return Err(Malformed::Version);
        }
        if self.length != POLICY_LENGTH as u64 {
            return Err(Malformed::Length);
        }
        if self.flags & !FLAGS != 0 {
            return Err(Malformed::Flags);
        }
        let [start, end] = self.text;
        let in_text = |address: u64, length: u64| {
            address >= start && address.checked_add(length).is_some_and(|last| last <= end)
        };
        if start == 0 || !in_text(self.entry, 1) {
            return Err(Malformed::Text);
        }
        for (n, hook) in self.hooks() {
            let known = Handler::from_number(hook.handler).is_some();
            let twice = self.hooks().any(|(m, h)| m < n && h.handler == hook.handler);
            let refuses = match hook.may_refuse {
                0 => hook.refusal == 0,
                1 => (-i64::from(MAX_ERRNO)..0).contains(&hook.refusal),
                _ => false,
            };
            if !in_text(hook.address, FENTRY_NOP.len() as u64) || !known || twice || !refuses {
                return Err(Malformed::Hook(n));
            }
            let mut others = self.hooks().filter(|&(m, _)| m < n);
            let near = |other: u64| site_offset(hook.site()).abs_diff(site_offset(other)) < SITE_STRIDE;
            if others.any(|(_, h)| near(h.site())) {
                return Err(Malformed::Collision(n));
            }
        }
        // The first is no member: where per-CPU variables are linked is up to the kernel.
        let mut members = self.members.iter().enumerate().skip(1);
        if let Some((n, _)) = members.find(|&(_, &m)| m != ABSENT && m > FURTHEST) {
            return Err(Malformed::Member(n));
        }
        if let Some(n) = self.calls.iter().position(|&rule| rule & !TOLD > MAX_ERRNO) {
            return Err(Malformed::Call(n));
        }
        if self.modules_used > MODULES as u64 {
            return Err(Malformed::Modules);
        }
        Ok(())
    }

    /// The hooks that there are, with their indices.
    pub fn hooks(&self) -> impl Iterator<Item = (usize, &Hook)> {
        self.hooks
            .iter()
            .enumerate()
            .filter(|(_, hook)| hook.address != 0)
    }

    /// The hook with a handler.
    pub fn hook(&self, handler: Handler) -> Option<&Hook> {
        self.hooks()
            .map(|(_, hook)| hook)
            .find(|hook| hook.handler == handler as u64)
    }

    /// The offset of a member, if this kernel has it.
    pub fn member(&self, member: Member) -> Option<u64> {
        self.members
            .get(member as usize)
            .copied()
            .filter(|&offset| offset != ABSENT)
    }

    /// What is done about the system call with this number.
    pub fn call(&self, number: usize) -> CallRule {
        let rule = self.calls.get(number).copied().unwrap_or(0);
        CallRule {
            errno: rule & !TOLD,
            told: rule & TOLD != 0,
        }
    }

    /// Sets what is done about a system call; `false` if there is no such number or error.
    pub fn set_call(&mut self, number: usize, rule: CallRule) -> bool {
        let Some(slot) = self.calls.get_mut(number).filter(|_| rule.errno <= MAX_ERRNO) else {
            return false;
        };
        *slot = rule.errno | if rule.told { TOLD } else { 0 };
        true
    }

    /// The modules that may be loaded.
    pub fn modules(&self) -> &[[u8; 32]] {
        let used = usize::try_from(self.modules_used).unwrap_or(MODULES);
        self.modules.get(..used).unwrap_or(&self.modules)
    }

    /// Adds the SHA-256 of a module; `false` if there is no room for it.
    pub fn allow_module(&mut self, hash: [u8; 32]) -> bool {
        let slot = usize::try_from(self.modules_used)
            .ok()
            .and_then(|n| self.modules.get_mut(n));
        let Some(slot) = slot else { return false };
        *slot = hash;
        self.modules_used += 1;
        true
    }

    /// The policy as it is booted along.
    pub fn to_bytes(&self) -> [u8; POLICY_LENGTH] {
        let mut bytes = [0; POLICY_LENGTH];
        let mut rest = bytes.as_mut_slice();
        let mut put = |from: &[u8]| {
            let (slot, after) = core::mem::take(&mut rest).split_at_mut(from.len());
            slot.copy_from_slice(from);
            rest = after;
        };
        let [start, end] = self.text;
        let head = [
            self.magic,
            self.version,
            self.length,
            self.flags,
            start,
            end,
            self.entry,
            self.modules_used,
        ];
        head.iter().for_each(|word| put(&word.to_le_bytes()));
        for hook in &self.hooks {
            [hook.address, hook.handler, hook.may_refuse, hook.refusal as u64]
                .iter()
                .for_each(|word| put(&word.to_le_bytes()));
        }
        self.members.iter().for_each(|word| put(&word.to_le_bytes()));
        self.calls.iter().for_each(|rule| put(&rule.to_le_bytes()));
        self.modules.iter().for_each(|hash| put(hash));
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Policy {
        let mut policy = Policy::new(
            [0xffff_ffff_8100_0000, 0xffff_ffff_81e0_0000],
            0xffff_ffff_81c0_0080,
        );
        policy.hooks[0] = Hook {
            address: 0xffff_ffff_8100_3320,
            handler: Handler::Call as u64,
            may_refuse: 1,
            refusal: -1,
        };
        policy.hooks[3] = Hook {
            address: 0xffff_ffff_810e_2ac0,
            handler: Handler::Process as u64,
            ..Hook::default()
        };
        policy.members[Member::TaskPid as usize] = 0x998;
        policy
    }

    #[test]
    fn a_policy_is_the_same_after_a_round_trip() {
        let mut policy = policy();
        assert!(policy.set_call(
            41,
            CallRule {
                errno: 13,
                told: false
            }
        ));
        assert!(policy.set_call(59, CallRule { errno: 0, told: true }));
        assert!(!policy.set_call(CALLS, CallRule { errno: 0, told: true }));
        assert!(policy.allow_module([7; 32]));
        let again = Policy::from_bytes(&policy.to_bytes()).unwrap();
        assert_eq!(again, policy);
        assert_eq!(again.call(41).errno, 13);
        assert!(again.call(59).told && !again.call(41).told);
        assert_eq!(again.modules(), [[7; 32]]);
        assert_eq!(again.hooks().count(), 2);
        assert_eq!(
            again.hook(Handler::Process).unwrap().site(),
            0xffff_ffff_810e_2ac5
        );
        assert_eq!(again.member(Member::TaskPid), Some(0x998));
        assert_eq!(again.member(Member::TaskMm), None);
        assert_eq!(size_of::<Policy>(), POLICY_LENGTH);
    }

    #[test]
    fn the_seed_of_fuzzing_is_a_policy() {
        let seed = include_bytes!("../../../fuzz/seeds/sim_monitor/policy");
        let policy = Policy::from_bytes(seed).unwrap();
        assert_eq!((policy.hooks().count(), policy.modules().len()), (3, 2));
        assert_eq!(&policy.to_bytes(), seed);
    }

    #[test]
    fn what_is_none_is_refused() {
        let refused = |change: &dyn Fn(&mut Policy)| {
            let mut policy = policy();
            change(&mut policy);
            Policy::from_bytes(&policy.to_bytes()).unwrap_err()
        };
        assert_eq!(refused(&|p| p.magic = 0), Malformed::Magic);
        assert_eq!(refused(&|p| p.version += 1), Malformed::Version);
        assert_eq!(refused(&|p| p.length = 8), Malformed::Length);
        assert_eq!(refused(&|p| p.flags = 4), Malformed::Flags);
        assert_eq!(refused(&|p| p.entry = 0), Malformed::Text);
        assert_eq!(refused(&|p| p.hooks[3].address = 1), Malformed::Hook(3));
        assert_eq!(refused(&|p| p.hooks[3].address = u64::MAX), Malformed::Hook(3));
        assert_eq!(refused(&|p| p.hooks[3].handler = 99), Malformed::Hook(3));
        assert_eq!(
            refused(&|p| p.hooks[3].handler = p.hooks[0].handler),
            Malformed::Hook(3)
        );
        assert_eq!(refused(&|p| p.hooks[0].refusal = 1), Malformed::Hook(0));
        assert_eq!(refused(&|p| p.hooks[0].may_refuse = 2), Malformed::Hook(0));
        assert_eq!(
            refused(&|p| p.hooks[3].address = p.hooks[0].address + 0x1_0008),
            Malformed::Collision(3)
        );
        assert_eq!(refused(&|p| p.members[1] = 1 << 40), Malformed::Member(1));
        assert_eq!(refused(&|p| p.calls[5] = 0x7fff), Malformed::Call(5));
        assert_eq!(refused(&|p| p.modules_used = 129), Malformed::Modules);
        let whole = policy().to_bytes();
        assert_eq!(Policy::from_bytes(&whole[1..]).unwrap_err(), Malformed::Length);
        assert_eq!(Policy::from_bytes(&[]).unwrap_err(), Malformed::Length);
    }

    #[test]
    fn the_list_of_modules_ends() {
        let mut policy = policy();
        for n in 0..MODULES {
            assert!(policy.allow_module([n as u8; 32]));
        }
        assert!(!policy.allow_module([0; 32]));
        assert_eq!(policy.modules().len(), MODULES);
    }
}
