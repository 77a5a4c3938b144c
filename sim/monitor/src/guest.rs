//! A guest for tests: some memory, mapped twice, and a few of the kernel's structures in it.

extern crate std;

use core::cell::Cell;
use std::boxed::Box;
use std::collections::BTreeMap;

use vmsight_sim_abi::{Frame, Handler, Hook, Member, Policy, Verdict, Watch};

use crate::{Context, Memory, Rest, handle};

/// Where the kernel sees its memory: what lies at physical address 0.
pub(crate) const KERNEL: u64 = 0xffff_8880_0000_0000;
const SIZE: u64 = 1 << 20;
/// This processor's variables.
const PER_CPU: u64 = KERNEL + 0x1_0000;
const CURRENT: u64 = 0x40;

/// The members' offsets, none like another.
const MEMBERS: [(Member, u64); 28] = [
    (Member::Current, CURRENT),
    (Member::TaskPid, 0x10),
    (Member::TaskTgid, 0x14),
    (Member::TaskComm, 0x41),
    (Member::TaskRealParent, 0x58),
    (Member::TaskCred, 0x60),
    (Member::TaskMm, 0x68),
    (Member::TaskInExecve, 0x70 * 8 + 33),
    (Member::MmExeFile, 0x18),
    (Member::FileInode, 0x20),
    (Member::FileDentry, 0x28),
    (Member::DentryName, 0x30),
    (Member::InodeMode, 0x2),
    (Member::InodeUid, 0x4),
    (Member::CredUid, 0x8),
    (Member::CredEuid, 0xc),
    (Member::CredSuid, 0x10),
    (Member::CredFsuid, 0x14),
    (Member::BprmFilename, 0x38),
    (Member::BprmFile, 0x48),
    (Member::RegsDi, 0x70),
    (Member::RegsSi, 0x68),
    (Member::RegsDx, 0x60),
    (Member::RegsR10, 0x38),
    (Member::RegsR8, 0x48),
    (Member::RegsR9, 0x40),
    (Member::ReadingModule, 2),
    (Member::LoadingModule, 3),
];

pub(crate) struct Guest {
    words: BTreeMap<u64, u64>,
    pub(crate) watch: Box<Watch>,
    pub(crate) handled: u64,
    /// How often a handler showed that it does not hang.
    pub(crate) progress: Cell<u64>,
}

impl Memory for &mut Guest {
    fn read(&self, gpa: u64) -> Option<u64> {
        (gpa < SIZE).then(|| self.words.get(&gpa).copied().unwrap_or(0))
    }

    fn write(&mut self, gpa: u64, word: u64) -> bool {
        self.words.insert(gpa, word);
        gpa < SIZE
    }

    fn getting_on(&self) {
        self.progress.set(self.progress.get() + 1);
    }
}

/// The fields of a task's credentials, in their order.
pub(crate) const ROOT: [u32; 4] = [0; 4];
pub(crate) const USER: [u32; 4] = [1000; 4];

impl Guest {
    /// With a running task: 57, of user 1000, whose file is not setuid.
    pub(crate) fn new() -> Self {
        let mut watch = Box::new(Watch::EMPTY);
        watch.policy = Policy::new([0x1000, 0x2000], 0x1000);
        for (member, offset) in MEMBERS {
            watch.policy.members[member as usize] = offset;
        }
        let mut guest = Self {
            words: BTreeMap::new(),
            watch,
            handled: 0,
            progress: Cell::new(0),
        };
        // Root, then a page of 1 GiB.
        guest.words.insert(0x1000 + (KERNEL >> 39 & 511) * 8, 0x2003);
        guest.words.insert(0x2000, 0x83);
        let task = guest.task(0x2_0000, (57, 56), b"sh", guest_at(0x2_8000));
        guest.put(PER_CPU + CURRENT, &task.to_le_bytes());
        guest.file(0x2_4000, 0o100_755, 0);
        guest
    }

    /// Writes bytes at one of the kernel's addresses.
    pub(crate) fn put(&mut self, address: u64, bytes: &[u8]) {
        for (at, byte) in (address - KERNEL..).zip(bytes) {
            let word = self.words.entry(at & !7).or_insert(0);
            let shift = at % 8 * 8;
            *word = *word & !(0xff << shift) | u64::from(*byte) << shift;
        }
    }

    pub(crate) fn member(&mut self, base: u64, member: Member, bytes: &[u8]) {
        let offset = self.watch.policy.member(member).unwrap();
        self.put(base + offset, bytes);
    }

    /// A task with its own credentials and memory.
    pub(crate) fn task(&mut self, at: u64, ids: (u32, u32), name: &[u8], parent: u64) -> u64 {
        let task = guest_at(at);
        let (cred, mm) = (task + 0x1000, task + 0x2000);
        self.member(task, Member::TaskPid, &ids.0.to_le_bytes());
        self.member(task, Member::TaskTgid, &ids.1.to_le_bytes());
        self.member(task, Member::TaskComm, name);
        self.member(task, Member::TaskRealParent, &parent.to_le_bytes());
        self.member(task, Member::TaskCred, &cred.to_le_bytes());
        self.member(task, Member::TaskMm, &mm.to_le_bytes());
        self.member(mm, Member::MmExeFile, &guest_at(0x2_4000).to_le_bytes());
        self.cred(cred, USER);
        task
    }

    pub(crate) fn cred(&mut self, at: u64, ids: [u32; 4]) {
        let members = [
            Member::CredUid,
            Member::CredEuid,
            Member::CredSuid,
            Member::CredFsuid,
        ];
        for (member, id) in members.into_iter().zip(ids) {
            self.member(at, member, &id.to_le_bytes());
        }
    }

    /// A file with its inode and directory entry.
    pub(crate) fn file(&mut self, at: u64, mode: u16, owner: u32) -> u64 {
        let file = guest_at(at);
        let (inode, dentry, name) = (file + 0x100, file + 0x200, file + 0x300);
        self.member(file, Member::FileInode, &inode.to_le_bytes());
        self.member(file, Member::FileDentry, &dentry.to_le_bytes());
        self.member(dentry, Member::DentryName, &name.to_le_bytes());
        self.member(inode, Member::InodeMode, &mode.to_le_bytes());
        self.member(inode, Member::InodeUid, &owner.to_le_bytes());
        self.put(name, b"dummy.ko\0");
        file
    }

    /// The running task's `task_struct`.
    pub(crate) fn current() -> u64 {
        guest_at(0x2_0000)
    }

    /// Has a handler be one that may refuse.
    pub(crate) fn may_refuse(&mut self, handler: Handler, refusal: i64) {
        self.watch.policy.hooks[handler as usize] = Hook {
            address: 0x1000,
            handler: handler as u64,
            may_refuse: 1,
            refusal,
        };
    }

    /// Calls a handler at the head of a function with these arguments.
    pub(crate) fn call(&mut self, handler: Handler, [rdi, rsi, rdx, rcx]: [u64; 4]) -> Verdict {
        let frame = Frame {
            rdi,
            rsi,
            rdx,
            cr3: 0x1000,
            ..Frame::default()
        };
        let rest = Rest {
            gs_base: PER_CPU,
            rcx: Some(rcx),
        };
        let mut watch = core::mem::replace(&mut self.watch, Box::new(Watch::EMPTY));
        let mut handled = self.handled;
        let verdict = handle(
            &mut Context::new(&frame, rest, &mut *self),
            handler,
            &mut watch,
            &mut handled,
        );
        (self.watch, self.handled) = (watch, handled);
        verdict
    }

    /// The lines of what was told since.
    pub(crate) fn told(&mut self) -> std::vec::Vec<std::string::String> {
        core::iter::from_fn(|| self.watch.ring.take())
            .map(|event| std::format!("{event}"))
            .collect()
    }
}

/// The kernel's address of a physical one.
pub(crate) fn guest_at(gpa: u64) -> u64 {
    KERNEL + gpa
}
