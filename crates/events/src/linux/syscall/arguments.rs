//! From six numbers to what a call was asked to do: by the types and names of the parameters in the kernel's source.

use serde::{Serialize, Serializer};
use vmsight_arch::Gva;
use vmsight_linux::syscall::Syscall;
use vmsight_linux::text::guest_text;
use vmsight_memory::AddressSpace;

use super::value::Value;
use super::{names, sockaddr};

/// PATH_MAX: the kernel takes no longer path.
const MAX_PATH: usize = 4096;
/// Bytes shown of a buffer.
const MAX_DATA: usize = 64;
/// Texts shown of argv and envp.
const MAX_ITEMS: usize = 64;
/// Bytes shown of each of them.
const MAX_ITEM: usize = 1024;

/// An argument.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Argument {
    /// The parameter's name in the kernel's source; `arg0` … where the kernel does not say.
    pub name: String,
    /// What it is.
    pub value: Value,
}

impl Serialize for Argument {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        (&self.name, &self.value).serialize(serializer)
    }
}

/// Decodes the arguments of `call`, whose caller's memory is `space`. A pointer that cannot be followed becomes
/// [`Value::Unreadable`]; the rest is decoded all the same.
pub(super) fn decode(call: &Syscall, raw: &[u64; 6], space: &AddressSpace) -> Vec<Argument> {
    let Some(parameters) = &call.parameters else {
        return raw
            .iter()
            .enumerate()
            .map(|(i, v)| Argument {
                name: format!("arg{i}"),
                value: Value::Pointer(*v),
            })
            .collect();
    };
    let numbers = |i: usize| raw.get(i).copied().unwrap_or_default();
    let all = parameters.iter().enumerate().map(|(i, parameter)| {
        let value = numbers(i);
        let next = numbers(i + 1);
        let (declared, name) = (parameter.declared.as_str(), parameter.name.as_str());
        let value = names::symbolic(&call.name, name, value).unwrap_or_else(|| {
            if declared.contains("sockaddr *") && is_input(&call.name) {
                address(space, value, next)
            } else if declared.contains("char") && declared.matches('*').count() == 2 {
                list(space, value)
            } else if declared.contains("char *") {
                text(space, &call.name, name, value, next)
            } else if declared.contains('*') {
                Value::Pointer(value)
            } else {
                number(declared, name, value)
            }
        });
        Argument {
            name: parameter.name.clone(),
            value,
        }
    });
    all.collect()
}

/// Whether an address is given, as opposed to one that the kernel will fill in.
fn is_input(call: &str) -> bool {
    matches!(call, "connect" | "bind" | "sendto")
}

fn number(declared: &str, name: &str, value: u64) -> Value {
    match declared {
        "umode_t" | "mode_t" => Value::Octal(value & 0o7_777_777),
        "int" | "pid_t" | "key_t" | "clockid_t" | "timer_t" | "key_serial_t" => {
            Value::Signed(i64::from(value as u32 as i32))
        }
        "long" | "ssize_t" | "loff_t" | "off_t" => Value::Signed(value as i64),
        // Descriptors are unsigned in the source, and -1 for nobody.
        "unsigned int" if name.contains("fd") => Value::Signed(i64::from(value as u32 as i32)),
        "unsigned int" | "u32" | "uid_t" | "gid_t" | "qid_t" | "unsigned" => {
            Value::Unsigned(value & 0xffff_ffff)
        }
        "size_t" => Value::Unsigned(value),
        _ => Value::Pointer(value),
    }
}

/// A path or name, or the beginning of a buffer that is written.
fn text(space: &AddressSpace, call: &str, name: &str, at: u64, len: u64) -> Value {
    if at == 0 {
        return Value::Pointer(0);
    }
    if name == "buf" {
        if !matches!(call, "write" | "pwrite64") {
            return Value::Pointer(at);
        }
        let shown = usize::try_from(len).unwrap_or(usize::MAX).min(MAX_DATA);
        let mut data = vec![0; shown];
        return match space.read(Gva(at), &mut data) {
            Ok(()) => Value::Text {
                text: guest_text(&data),
                cut: len > shown as u64,
            },
            Err(_) => Value::Unreadable(at),
        };
    }
    string(space, at, MAX_PATH)
}

fn string(space: &AddressSpace, at: u64, max: usize) -> Value {
    match space.read_cstr(Gva(at), max) {
        Ok(bytes) => Value::Text {
            cut: bytes.len() == max,
            text: guest_text(&bytes),
        },
        Err(_) => Value::Unreadable(at),
    }
}

/// A vector of strings that ends with NULL.
fn list(space: &AddressSpace, at: u64) -> Value {
    if at == 0 {
        return Value::Pointer(0);
    }
    let mut items = Vec::new();
    for i in 0..=MAX_ITEMS as u64 {
        match space.read_u64(Gva(at).wrapping_add(i * 8)) {
            Ok(0) => return Value::List { items, cut: false },
            Ok(_) if i == MAX_ITEMS as u64 => break,
            Ok(item) => items.push(string(space, item, MAX_ITEM)),
            Err(_) if items.is_empty() => return Value::Unreadable(at),
            Err(_) => break,
        }
    }
    Value::List { items, cut: true }
}

fn address(space: &AddressSpace, at: u64, len: u64) -> Value {
    if at == 0 {
        return Value::Pointer(0);
    }
    let len = usize::try_from(len & 0xffff_ffff)
        .unwrap_or_default()
        .min(sockaddr::MAX_ADDRESS);
    let mut bytes = vec![0; len];
    match space.read(Gva(at), &mut bytes) {
        Ok(()) => sockaddr::describe(&bytes).map_or(Value::Pointer(at), Value::Address),
        Err(_) => Value::Unreadable(at),
    }
}
