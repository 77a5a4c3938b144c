//! Programs: `struct bpf_prog` and its `bpf_prog_aux` (include/linux/bpf.h).

use std::fmt::Write as _;
use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::names::Names;
use super::{BpfObject, MapLayout, Reader, array_text};
use crate::budget::{Budget, NO_ROOM};
use crate::clock::Clock;
use crate::layout::{Field, Place, layout};
use crate::listing::Problem;
use crate::{Kernel, LinuxError};

/// Functions of one program: BPF_MAX_SUBPROGS (include/linux/bpf_verifier.h), and itself.
const MAX_FUNCTIONS: u32 = 257;
/// Maps of one program that are listed: MAX_USED_MAPS is 64.
const MAX_MAPS: u32 = 256;
/// Bytes of the name of a function of the kernel.
const MAX_FUNCTION_NAME: usize = 128;

layout! {
    struct ProgramLayout = "bpf_prog" {
        jited: Field<bool> = "jited",
        kind: Field<u32> = "type",
        attach: Field<u32> = "expected_attach_type",
        len: Field<u32> = "len",
        jited_len: Field<u32> = "jited_len",
        tag: Place = "tag",
        code: Field<Gva> = "bpf_func",
        aux: Field<Gva> = "aux",
    }
}

layout! {
    struct AuxLayout = "bpf_prog_aux" {
        references: Field<i64> = "refcnt",
        map_count: Field<u32> = "used_map_cnt",
        maps: Field<Gva> = "used_maps",
        id: Field<u32> = "id",
        function_count: Field<u32> = "func_cnt",
        functions: Field<Gva> = "func",
        verified: Option<Field<u32>> = "verified_insns",
        attach_function: Option<Field<Gva>> = "attach_func_name",
        load_time: Field<u64> = "load_time",
        user: Field<Gva> = "user",
        name: Place = "name",
    }
}

layout! {
    struct LoaderLayout = "user_struct" {
        uid: Field<u32> = "uid",
    }
}

/// Reads programs.
pub(super) struct Programs {
    kernel: Kernel,
    program: Arc<ProgramLayout>,
    aux: Arc<AuxLayout>,
    user: Arc<LoaderLayout>,
    map: Arc<MapLayout>,
    clock: Option<Clock>,
}

impl Programs {
    pub(super) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        Ok(Self {
            kernel: kernel.clone(),
            program: kernel.layout()?,
            aux: kernel.layout()?,
            user: kernel.layout()?,
            map: kernel.layout()?,
            clock: Clock::read(kernel).ok(),
        })
    }

    /// The number of the program at an address.
    pub(super) fn id(&self, at: Gva) -> Result<u32, ReadError> {
        let space = self.kernel.space();
        self.aux.id.read(space, self.program.aux.read(space, at)?)
    }

    /// The function that the program at an address was made for: that of tracing, of extensions and of the security module.
    pub(super) fn function(&self, at: Gva) -> Result<Option<String>, ReadError> {
        let space = self.kernel.space();
        self.function_of(self.program.aux.read(space, at)?)
    }

    fn function_of(&self, aux: Gva) -> Result<Option<String>, ReadError> {
        let Some(field) = &self.aux.attach_function else {
            return Ok(None);
        };
        match field.read(self.kernel.space(), aux)? {
            Gva(0) => Ok(None),
            name => self.kernel.text(name, MAX_FUNCTION_NAME).map(Some),
        }
    }

    /// Reads a program, and the number that it says it has.
    pub(super) fn fill(&self, row: &mut BpfObject, names: &Names, budget: &Budget) -> Result<u32, ReadError> {
        let (p, a, space, at) = (&self.program, &self.aux, self.kernel.space(), row.address);
        row.type_name = names.program(p.kind.read(space, at)?);
        // Zero is an attach type of its own, and what all have that were loaded for none.
        let attach = p.attach.read(space, at)?;
        if attach != 0 || row.type_name == "cgroup_skb" {
            row.attach_type = Some(names.attach(attach));
        }
        row.instructions = Some(p.len.read(space, at)?);
        let mut tag = vec![0; p.tag.size().min(64) as usize];
        space.read(p.tag.at(at), &mut tag)?;
        row.tag = Some(tag.iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        }));
        let aux = p.aux.read(space, at)?;
        row.name = array_text(&self.kernel, &a.name, aux)?;
        row.references = Some(a.references.read(space, aux)?);
        let loaded = a.load_time.read(space, aux)?;
        row.loaded_ns = Some(loaded);
        row.load_time = self
            .clock
            .as_ref()
            .and_then(|clock| clock.wall(loaded))
            .map(String::from);
        if let Some(verified) = &a.verified {
            row.verified_instructions = Some(verified.read(space, aux)?);
        }
        if p.jited.read(space, at)? {
            row.jited_address = Some(p.code.read(space, at)?);
            match self.jited_size(at, aux, budget) {
                Ok(size) => row.jited_size = Some(size),
                Err(error) => row.problems.push(Problem::read("jited_size", &error)),
            }
        }
        match a
            .user
            .read(space, aux)
            .and_then(|user| self.user.uid.read(space, user))
        {
            Ok(uid) => row.uid = Some(uid),
            Err(error) => row.problems.push(Problem::read("uid", &error)),
        }
        match self.function_of(aux) {
            Ok(function) => row.target = function,
            Err(error) => row.problems.push(Problem::read("target", &error)),
        }
        if let Err(error) = self.maps(row, aux, budget) {
            row.problems.push(Problem::read("maps", &error));
        }
        a.id.read(space, aux)
    }

    /// Bytes of machine code: of a program of several functions, the sum of theirs, of which it is the first.
    fn jited_size(&self, at: Gva, aux: Gva, budget: &Budget) -> Result<u64, ReadError> {
        let (p, space) = (&self.program, self.kernel.space());
        let count = self.aux.function_count.read(space, aux)?;
        let functions = self.aux.functions.read(space, aux)?;
        if count == 0 || functions.is_null() {
            return Ok(u64::from(p.jited_len.read(space, at)?));
        }
        let mut sum = 0u64;
        for index in 0..count.min(MAX_FUNCTIONS) {
            if !budget.step() {
                break;
            }
            let function = self
                .kernel
                .pointer(functions.wrapping_add(u64::from(index) * 8))?;
            sum = sum.saturating_add(u64::from(p.jited_len.read(space, function)?));
        }
        Ok(sum)
    }

    /// The maps that a program uses.
    fn maps(&self, row: &mut BpfObject, aux: Gva, budget: &Budget) -> Result<(), ReadError> {
        let space = self.kernel.space();
        let count = self.aux.map_count.read(space, aux)?;
        if count > MAX_MAPS {
            row.problems.push(Problem::new(
                "maps",
                format!("cut after {MAX_MAPS}; it claims {count}"),
            ));
        }
        let first = self.aux.maps.read(space, aux)?;
        for index in 0..count.min(MAX_MAPS) {
            if !budget.step() || !budget.bytes(4) {
                row.problems.push(Problem::new("maps", NO_ROOM));
                break;
            }
            let map = self.kernel.pointer(first.wrapping_add(u64::from(index) * 8))?;
            row.maps.push(Reader::map_id(&self.map, &self.kernel, map)?);
        }
        Ok(())
    }
}
