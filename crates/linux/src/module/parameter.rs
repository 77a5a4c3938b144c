//! Module parameters and their present values, as `/sys/module/NAME/parameters` would print them.
//!
//! How a value is printed is decided by the function in `kernel_param_ops.get` (kernel/params.c), so that is what is looked at.

use std::sync::Arc;

use serde::{Serialize, Serializer};
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::budget::{NO_ROOM, Share};
use crate::layout::{Field, layout};
use crate::listing::Problem;
use crate::{Kernel, LinuxError};

/// More parameters than a module has.
const MAX_PARAMETERS: u32 = 4096;
/// Elements of an array parameter that are shown; sysfs itself stops at a page of text.
const MAX_ELEMENTS: u32 = 1024;
/// Longest string value; `param_set_charp` takes 1024.
const MAX_STRING: usize = 4096;

layout! {
    struct KernelParamLayout = "kernel_param" {
        name: Field<Gva> = "name",
        ops: Field<Gva> = "ops",
        perm: Field<u16> = "perm",
        arg: Field<Gva> = "arg",
    }
}

layout! {
    struct ParamOpsLayout = "kernel_param_ops" {
        get: Field<Gva> = "get",
    }
}

layout! {
    struct ParamArrayLayout = "kparam_array" {
        max: Field<u32> = "max",
        elemsize: Field<u32> = "elemsize",
        num: Field<Gva> = "num",
        ops: Field<Gva> = "ops",
        elem: Field<Gva> = "elem",
    }
}

layout! {
    struct ParamStringLayout = "kparam_string" {
        maxlen: Field<u32> = "maxlen",
        string: Field<Gva> = "string",
    }
}

/// One parameter of a module. Serialised as `"NAME=VALUE"`, `"NAME=?"` where the value is not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its value; `None` if it cannot be read, if it is write-only, or if the module prints it with code of its own.
    pub value: Option<String>,
    /// `int`, `uint`, `bool`, `charp`, `int[]`, … ; `custom` if the module prints it with code of its own.
    pub kind: String,
    /// Mode of its file in sysfs; 0 if it has none.
    pub mode: u16,
}

impl Parameter {
    fn bytes(&self) -> usize {
        size_of::<Self>() + self.name.len() + self.value.as_ref().map_or(0, String::len)
    }
}

impl Serialize for Parameter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!(
            "{}={}",
            self.name,
            self.value.as_deref().unwrap_or("?")
        ))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Signed(u32),
    Unsigned(u32),
    Hex,
    Bool,
    InvertedBool,
    Pointer,
    String,
    Array,
}

/// The functions by name (kernel/params.c).
const FUNCTIONS: &[(&str, &str, Kind)] = &[
    ("param_get_byte", "byte", Kind::Unsigned(1)),
    ("param_get_short", "short", Kind::Signed(2)),
    ("param_get_ushort", "ushort", Kind::Unsigned(2)),
    ("param_get_int", "int", Kind::Signed(4)),
    ("param_get_uint", "uint", Kind::Unsigned(4)),
    ("param_get_long", "long", Kind::Signed(8)),
    ("param_get_ulong", "ulong", Kind::Unsigned(8)),
    ("param_get_ullong", "ullong", Kind::Unsigned(8)),
    ("param_get_hexint", "hexint", Kind::Hex),
    ("param_get_charp", "charp", Kind::Pointer),
    ("param_get_string", "string", Kind::String),
    ("param_get_bool", "bool", Kind::Bool),
    ("param_get_invbool", "invbool", Kind::InvertedBool),
    ("param_array_get", "array", Kind::Array),
];

pub(super) struct ParameterReader<'k> {
    kernel: &'k Kernel,
    functions: Vec<(Gva, &'static str, Kind)>,
    param: Arc<KernelParamLayout>,
    ops: Arc<ParamOpsLayout>,
    array: Arc<ParamArrayLayout>,
    string: Arc<ParamStringLayout>,
}

impl<'k> ParameterReader<'k> {
    pub(super) fn new(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        let functions = FUNCTIONS
            .iter()
            .filter_map(|&(symbol, name, kind)| kernel.symbol(symbol).ok().map(|at| (at, name, kind)))
            .collect();
        Ok(Self {
            kernel,
            functions,
            param: kernel.layout()?,
            ops: kernel.layout()?,
            array: kernel.layout()?,
            string: kernel.layout()?,
        })
    }

    /// The `count` parameters of the array at `first`.
    pub(super) fn all(
        &self,
        first: Gva,
        count: u32,
        share: &mut Share<'_>,
    ) -> (Vec<Parameter>, Option<Problem>) {
        let mut parameters = Vec::new();
        let mut problem = (count > MAX_PARAMETERS)
            .then(|| Problem::new("parameters", format!("cut: the module claims {count}")));
        for index in 0..count.min(MAX_PARAMETERS) {
            match self.one(first.wrapping_add(u64::from(index) * self.param.size)) {
                Ok(parameter) if share.bytes(parameter.bytes()) => parameters.push(parameter),
                Ok(_) => {
                    problem = Some(Problem::new("parameters", NO_ROOM));
                    break;
                }
                Err(error) => {
                    problem = Some(Problem::read("parameters", &error));
                    break;
                }
            }
        }
        (parameters, problem)
    }

    fn one(&self, at: Gva) -> Result<Parameter, ReadError> {
        let space = self.kernel.space();
        let name = self.kernel.text(self.param.name.read(space, at)?, 256)?;
        let mode = self.param.perm.read(space, at)?;
        let arg = self.param.arg.read(space, at)?;
        let ops = self.param.ops.read(space, at)?;
        let function = self.function(ops)?;
        let (kind, value) = match function {
            None => ("custom".to_owned(), None),
            Some((_, Kind::Array)) => match self.array(arg) {
                Ok((element, value)) => (format!("{element}[]"), value),
                Err(_) => ("array".to_owned(), None),
            },
            Some((kind, how)) => (kind.to_owned(), self.value(how, arg).ok()),
        };
        Ok(Parameter {
            name,
            value,
            kind,
            mode,
        })
    }

    fn function(&self, ops: Gva) -> Result<Option<(&'static str, Kind)>, ReadError> {
        if ops.is_null() {
            return Ok(None);
        }
        let get = self.ops.get.read(self.kernel.space(), ops)?;
        Ok(self.functions.iter().find(|f| f.0 == get).map(|f| (f.1, f.2)))
    }

    fn array(&self, arg: Gva) -> Result<(String, Option<String>), ReadError> {
        let space = self.kernel.space();
        let num = self.array.num.read(space, arg)?;
        let max = self.array.max.read(space, arg)?;
        let count = if num.is_null() {
            max
        } else {
            space.read_u32(num)?.min(max)
        };
        let elemsize = self.array.elemsize.read(space, arg)?;
        let elem = self.array.elem.read(space, arg)?;
        let Some((kind, how)) = self.function(self.array.ops.read(space, arg)?)? else {
            return Ok(("custom".to_owned(), None));
        };
        if how == Kind::Array {
            return Ok((kind.to_owned(), None));
        }
        let mut values = Vec::new();
        for index in 0..count.min(MAX_ELEMENTS) {
            values.push(self.value(how, elem.wrapping_add(u64::from(index) * u64::from(elemsize)))?);
        }
        if count > MAX_ELEMENTS {
            values.push("…".to_owned());
        }
        Ok((kind.to_owned(), Some(values.join(","))))
    }

    fn value(&self, kind: Kind, at: Gva) -> Result<String, ReadError> {
        let space = self.kernel.space();
        let unsigned = |size: u32| -> Result<u64, ReadError> {
            let mut bytes = [0u8; 8];
            space.read(at, bytes.get_mut(..size as usize).unwrap_or(&mut []))?;
            Ok(u64::from_le_bytes(bytes))
        };
        Ok(match kind {
            Kind::Unsigned(size) => unsigned(size)?.to_string(),
            Kind::Signed(size) => {
                let unused = 64 - size * 8;
                (((unsigned(size)? << unused) as i64) >> unused).to_string()
            }
            Kind::Hex => format!("{:#08x}", unsigned(4)?),
            Kind::Bool => if unsigned(1)? != 0 { "Y" } else { "N" }.to_owned(),
            Kind::InvertedBool => if unsigned(1)? != 0 { "N" } else { "Y" }.to_owned(),
            Kind::Pointer => {
                let string = self.kernel.pointer(at)?;
                if string.is_null() {
                    "(null)".to_owned()
                } else {
                    self.kernel.text(string, MAX_STRING)?
                }
            }
            Kind::String => {
                let max = self.string.maxlen.read(space, at)? as usize;
                self.kernel
                    .text(self.string.string.read(space, at)?, max.min(MAX_STRING))?
            }
            Kind::Array => String::new(),
        })
    }
}
