//! One structure of the kernel, read by its members' names.

use vmsight_arch::Gva;
use vmsight_linux::{Kernel, LinuxError};
use vmsight_symbols::{Field, Kind, TypeId, Types};

/// A structure in the guest. Each member is read when it is asked for. A path is as in [`vmsight_symbols::Types::member_of`];
/// alternatives that another release has are parted by `|`: `"__state|state"`.
#[derive(Clone, Debug)]
pub struct Object<'c> {
    kernel: &'c Kernel,
    /// Those of a module; else the kernel's.
    types: Option<Types>,
    structure: String,
    id: TypeId,
    at: Gva,
}

impl<'c> Object<'c> {
    pub(crate) fn new(kernel: &'c Kernel, structure: &str, at: Gva) -> Result<Self, LinuxError> {
        Self::find_type(kernel, None, structure, at)
    }

    /// A structure of a type that a module defines.
    pub(crate) fn of_module(
        kernel: &'c Kernel,
        types: &Types,
        structure: &str,
        at: Gva,
    ) -> Result<Self, LinuxError> {
        Self::find_type(kernel, Some(types.clone()), structure, at)
    }

    fn find_type(
        kernel: &'c Kernel,
        types: Option<Types>,
        structure: &str,
        at: Gva,
    ) -> Result<Self, LinuxError> {
        let id = types.as_ref().unwrap_or(kernel.types()).find_struct(structure);
        let id = id.ok_or_else(|| LinuxError::NoType {
            name: structure.to_owned(),
            release: kernel.release().to_owned(),
        })?;
        Ok(Self {
            kernel,
            types,
            structure: structure.to_owned(),
            id,
            at,
        })
    }

    /// Where it lies.
    pub fn address(&self) -> Gva {
        self.at
    }

    /// Another structure of the same type.
    #[must_use]
    pub fn moved(&self, at: Gva) -> Self {
        Self { at, ..self.clone() }
    }

    /// A structure of another type in the same kernel.
    ///
    /// # Errors
    /// If the kernel's types have no such structure.
    pub fn of(&self, structure: &str, at: Gva) -> Result<Self, LinuxError> {
        Self::find_type(self.kernel, self.types.clone(), structure, at)
    }

    fn types(&self) -> &Types {
        self.types.as_ref().unwrap_or(self.kernel.types())
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.types().size_of(self.id).unwrap_or(0)
    }

    /// Whether the structure has such a member.
    pub fn has(&self, path: &str) -> bool {
        self.find(path).is_some()
    }

    fn find(&self, path: &str) -> Option<Field> {
        path.split('|')
            .find_map(|path| self.types().member_of(self.id, path))
    }

    fn field(&self, path: &str) -> Result<Field, LinuxError> {
        self.find(path).ok_or_else(|| LinuxError::NoMember {
            structure: self.structure.clone(),
            member: path.replace('|', " or "),
            release: self.kernel.release().to_owned(),
        })
    }

    /// The address of a member.
    ///
    /// # Errors
    /// If there is no such member.
    pub fn member(&self, path: &str) -> Result<Gva, LinuxError> {
        Ok(self.at.wrapping_add(self.field(path)?.offset))
    }

    /// A member's size in bytes.
    ///
    /// # Errors
    /// If there is no such member.
    pub fn size_of(&self, path: &str) -> Result<u64, LinuxError> {
        Ok(self.field(path)?.size)
    }

    /// An integer or bit-field, without sign.
    ///
    /// # Errors
    /// If there is no such member, it is no integer, or it cannot be read.
    pub fn number(&self, path: &str) -> Result<u64, LinuxError> {
        let field = self.field(path)?;
        let at = self.at.wrapping_add(field.offset);
        let mut bytes = [0; 8];
        let wanted = usize::try_from(field.size).unwrap_or(usize::MAX);
        let to = bytes.get_mut(..wanted).ok_or_else(|| LinuxError::BadLayout {
            structure: self.structure.clone(),
            release: self.kernel.release().to_owned(),
            reason: format!("member {path} has {wanted} bytes, not an integer"),
        })?;
        let read = self.kernel.space().read(at, to);
        read.map_err(|source| LinuxError::Read {
            what: format!("{}.{path}", self.structure),
            at,
            source,
        })?;
        Ok(field.extract(u64::from_le_bytes(bytes)))
    }

    /// A pointer.
    ///
    /// # Errors
    /// As for [`Self::number`].
    pub fn pointer(&self, path: &str) -> Result<Gva, LinuxError> {
        self.number(path).map(Gva)
    }

    /// The text that a `char *` member points to, at most `max` bytes.
    ///
    /// # Errors
    /// As for [`Self::number`], or if the text cannot be read.
    pub fn text(&self, path: &str, max: usize) -> Result<String, LinuxError> {
        self.text_at(path, self.pointer(path)?, max)
    }

    /// The text in an array of characters.
    ///
    /// # Errors
    /// If there is no such member or it cannot be read.
    pub fn array_text(&self, path: &str) -> Result<String, LinuxError> {
        let size = self.size_of(path)?.min(4096);
        self.text_at(path, self.member(path)?, size as usize)
    }

    fn text_at(&self, path: &str, at: Gva, max: usize) -> Result<String, LinuxError> {
        let read = self.kernel.space().read_cstr(at, max);
        read.map(|bytes| vmsight_linux::text::guest_text(&bytes))
            .map_err(|source| LinuxError::Read {
                what: format!("{}.{path}", self.structure),
                at,
                source,
            })
    }

    /// The members that are pointers to functions: name and address of the member. Members of structures and unions inside
    /// are left out.
    pub fn function_pointers(&self) -> Vec<(String, Gva)> {
        let types = self.types();
        types
            .members(self.id)
            .filter(|member| {
                let target = types.get(types.resolve(member.type_id));
                target
                    .filter(|t| t.kind() == Kind::Ptr)
                    .and_then(|t| t.target())
                    .and_then(|id| types.get(types.resolve(id)))
                    .is_some_and(|t| t.kind() == Kind::FuncProto)
            })
            .map(|member| (member.name.to_owned(), self.at.wrapping_add(member.offset())))
            .collect()
    }
}
