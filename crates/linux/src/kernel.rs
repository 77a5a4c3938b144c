//! One kernel in a target's memory: what every listing starts from.

use std::any::{Any, TypeId as RustTypeId};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use vmsight_arch::Gva;
use vmsight_memory::{AddressSpace, GuestMemory, ReadError};
use vmsight_symbols::cache::Saving;
use vmsight_symbols::kernel::{Found, KernelImage};
use vmsight_symbols::{Located, Profile, Types};

use crate::LinuxError;
use crate::layout::Layout;
use crate::percpu::PerCpu;

/// A kernel in a target's memory. Cheap to clone; clones share what was looked up.
#[derive(Clone)]
pub struct Kernel(Arc<Inner>);

struct Inner {
    memory: GuestMemory,
    space: AddressSpace,
    image: KernelImage,
    profile: Profile,
    per_cpu: OnceLock<PerCpu>,
    layouts: RwLock<HashMap<RustTypeId, Arc<dyn Any + Send + Sync>>>,
    module_types: RwLock<HashMap<String, Types>>,
    found: Option<Found>,
    // Dropped with the last clone: waits until the profile is in the cache.
    _saving: Mutex<Option<Saving>>,
}

impl Kernel {
    /// Ties a kernel image that was found in `memory` to the profile that belongs to it. [`Kernel::attach`] finds both.
    pub fn new(memory: GuestMemory, image: KernelImage, profile: Profile) -> Self {
        Self::with(memory, image, profile, None, None)
    }

    /// The kernel that was located in `memory`.
    pub(crate) fn located(memory: GuestMemory, located: Located) -> Self {
        Self::with(
            memory,
            located.image,
            located.profile,
            Some(located.found),
            located.saving,
        )
    }

    fn with(
        memory: GuestMemory,
        image: KernelImage,
        profile: Profile,
        found: Option<Found>,
        saving: Option<Saving>,
    ) -> Self {
        let space = AddressSpace::new(memory.clone(), image.mode, image.dtb);
        Self(Arc::new(Inner {
            memory,
            space,
            image,
            profile,
            per_cpu: OnceLock::new(),
            layouts: RwLock::default(),
            module_types: RwLock::default(),
            found,
            _saving: Mutex::new(saving),
        }))
    }

    /// The guest's physical memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.0.memory
    }

    /// The kernel's own address space.
    pub fn space(&self) -> &AddressSpace {
        &self.0.space
    }

    /// Symbols and types.
    pub fn profile(&self) -> &Profile {
        &self.0.profile
    }

    /// Where the image lies and how that is known.
    pub fn image(&self) -> &KernelImage {
        &self.0.image
    }

    /// All kernels that were found, which of them runs, and why; `None` where the kernel was not searched for.
    pub fn found(&self) -> Option<&Found> {
        self.0.found.as_ref()
    }

    /// The types of the kernel proper.
    pub fn types(&self) -> &Types {
        &self.0.profile.types
    }

    /// The kernel's release, as `uname -r` says it.
    pub fn release(&self) -> &str {
        &self.0.profile.release
    }

    /// The run-time address of a symbol. Not for per-CPU variables: see [`Kernel::per_cpu_symbol`].
    pub fn symbol(&self, name: &str) -> Result<Gva, LinuxError> {
        self.find_symbol(&[name]).ok_or_else(|| LinuxError::NoSymbol {
            name: name.to_owned(),
            release: self.release().to_owned(),
        })
    }

    /// The run-time address of the first of these symbols that the kernel has.
    pub fn find_symbol(&self, names: &[&str]) -> Option<Gva> {
        let symbols = &self.0.profile.symbols;
        names
            .iter()
            .find_map(|name| symbols.address(name))
            .map(|address| self.0.image.runtime(address))
    }

    /// The base of a per-CPU variable: what [`PerCpu::copy`] takes.
    ///
    /// Up to 6.14, x86-64 links per-CPU variables from address zero on, and KASLR does not move them; from 6.15 on, and on other
    /// architectures, they lie in the image like all else. The address itself tells which.
    pub fn per_cpu_symbol(&self, name: &str) -> Result<Gva, LinuxError> {
        match self.0.profile.symbols.address(name) {
            Some(address) if address < 1 << 47 => Ok(Gva(address)),
            Some(address) => Ok(self.0.image.runtime(address)),
            None => Err(LinuxError::NoSymbol {
                name: name.to_owned(),
                release: self.release().to_owned(),
            }),
        }
    }

    /// The kernel's per-CPU offsets, read at the first call.
    pub fn per_cpu(&self) -> Result<&PerCpu, LinuxError> {
        if let Some(known) = self.0.per_cpu.get() {
            return Ok(known);
        }
        let read = PerCpu::read(self)?;
        Ok(self.0.per_cpu.get_or_init(|| read))
    }

    /// The offset in bytes of a member of a struct; `path` as in [`Types::member_of`].
    pub fn offset(&self, structure: &str, path: &str) -> Result<u64, LinuxError> {
        let types = self.types();
        let mut known = false;
        for id in types.structs(structure) {
            known = true;
            if let Some(field) = types.member_of(id, path) {
                return Ok(field.offset);
            }
        }
        let release = self.release().to_owned();
        Err(if known {
            LinuxError::NoMember {
                structure: structure.to_owned(),
                member: path.to_owned(),
                release,
            }
        } else {
            LinuxError::NoType {
                name: structure.to_owned(),
                release,
            }
        })
    }

    /// The value of a name of the enumeration `enumeration`: what the number means in this build.
    pub(crate) fn enumerator(&self, enumeration: &str, name: &str) -> Option<i64> {
        let types = self.types();
        types
            .enumerators(types.find_enum(enumeration)?)
            .find(|e| e.name == name)
            .map(|e| e.value)
    }

    /// The resolved members that a `layout!` declares; resolved once for all clones of this kernel.
    pub(crate) fn layout<L: Layout>(&self) -> Result<Arc<L>, LinuxError> {
        let key = RustTypeId::of::<L>();
        let known = self
            .0
            .layouts
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
            .cloned();
        if let Some(layout) = known.and_then(|any| any.downcast::<L>().ok()) {
            return Ok(layout);
        }
        let layout = Arc::new(L::resolve(self.types(), self.release())?);
        self.0
            .layouts
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key, layout.clone());
        Ok(layout)
    }

    /// The module types that were read already.
    pub(crate) fn module_type_cache(&self) -> &RwLock<HashMap<String, Types>> {
        &self.0.module_types
    }

    /// A pointer that lies at `at`.
    pub(crate) fn pointer(&self, at: Gva) -> Result<Gva, ReadError> {
        self.0.space.read_u64(at).map(Gva)
    }

    /// The pointer that a symbol names: `modules`, `curr_clocksource`, … .
    pub(crate) fn symbol_pointer(&self, name: &str) -> Result<Gva, LinuxError> {
        let at = self.symbol(name)?;
        self.pointer(at).map_err(LinuxError::read(name, at))
    }

    /// A NUL-terminated string of at most `max` bytes, as text.
    pub(crate) fn text(&self, at: Gva, max: usize) -> Result<String, ReadError> {
        self.0
            .space
            .read_cstr(at, max)
            .map(|bytes| crate::text::guest_text(&bytes))
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel")
            .field("release", &self.release())
            .field("text", &self.image().text)
            .finish_non_exhaustive()
    }
}
