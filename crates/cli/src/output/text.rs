//! One value as the text of a table's cell.

use std::fmt::{self, Write};

use serde::Serialize;
use serde::ser::{self, Impossible, Serializer};
use serde_json::{Error, Number};

use super::cell::{escape_into, shown};

/// What kind of value a text stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Null: the value is not there.
    Missing,
    /// A list of nothing.
    Empty,
    Number,
    Other,
}

/// Appends a value as a table shows it, with nothing in it that steers a terminal. Null and an empty list append
/// nothing.
pub(super) fn append<T: Serialize + ?Sized>(out: &mut String, value: &T) -> Result<Kind, Error> {
    let before = out.len();
    if let Ok(kind) = value.serialize(Plain(out)) {
        return Ok(kind);
    }
    // Lists are few and short; they go the longer way.
    out.truncate(before);
    match serde_json::to_value(value)? {
        serde_json::Value::Null => Ok(Kind::Missing),
        serde_json::Value::Array(none) if none.is_empty() => Ok(Kind::Empty),
        value => {
            out.push_str(&shown(&value));
            Ok(match value {
                serde_json::Value::Number(_) => Kind::Number,
                _ => Kind::Other,
            })
        }
    }
}

/// Writes what is one piece: numbers, texts, truths.
struct Plain<'a>(&'a mut String);

/// It is not one piece.
#[derive(Debug)]
struct Composed;

impl fmt::Display for Composed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not one piece")
    }
}

impl std::error::Error for Composed {}

impl ser::Error for Composed {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Composed
    }
}

/// Escapes what is written through it.
struct Escaped<'a>(&'a mut String);

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        escape_into(self.0, text);
        Ok(())
    }
}

impl Plain<'_> {
    fn text(self, text: &str) -> Result<Kind, Composed> {
        escape_into(self.0, text);
        Ok(Kind::Other)
    }
}

macro_rules! integers {
    ($($method:ident($number:ty);)+) => {
        $(fn $method(self, value: $number) -> Result<Kind, Composed> {
            self.0.push_str(itoa::Buffer::new().format(value));
            Ok(Kind::Number)
        })+
    };
}

macro_rules! composed {
    ($($method:ident($($argument:ty),*) -> $result:ty;)+) => {
        $(fn $method(self, $(_: $argument),*) -> Result<$result, Composed> {
            Err(Composed)
        })+
    };
}

impl Serializer for Plain<'_> {
    type Ok = Kind;
    type Error = Composed;
    type SerializeSeq = Impossible<Kind, Composed>;
    type SerializeTuple = Impossible<Kind, Composed>;
    type SerializeTupleStruct = Impossible<Kind, Composed>;
    type SerializeTupleVariant = Impossible<Kind, Composed>;
    type SerializeMap = Impossible<Kind, Composed>;
    type SerializeStruct = Impossible<Kind, Composed>;
    type SerializeStructVariant = Impossible<Kind, Composed>;

    integers! {
        serialize_i8(i8);
        serialize_i16(i16);
        serialize_i32(i32);
        serialize_i64(i64);
        serialize_u8(u8);
        serialize_u16(u16);
        serialize_u32(u32);
        serialize_u64(u64);
    }

    fn serialize_bool(self, value: bool) -> Result<Kind, Composed> {
        self.text(if value { "yes" } else { "no" })
    }

    fn serialize_f32(self, value: f32) -> Result<Kind, Composed> {
        self.serialize_f64(value.into())
    }

    fn serialize_f64(self, value: f64) -> Result<Kind, Composed> {
        match Number::from_f64(value) {
            Some(number) => write!(self.0, "{number}")
                .map(|()| Kind::Number)
                .map_err(|_| Composed),
            None => Ok(Kind::Missing),
        }
    }

    fn serialize_char(self, value: char) -> Result<Kind, Composed> {
        self.text(value.encode_utf8(&mut [0; 4]))
    }

    fn serialize_str(self, value: &str) -> Result<Kind, Composed> {
        self.text(value)
    }

    fn collect_str<T: fmt::Display + ?Sized>(self, value: &T) -> Result<Kind, Composed> {
        write!(Escaped(self.0), "{value}")
            .map(|()| Kind::Other)
            .map_err(|_| Composed)
    }

    fn serialize_none(self) -> Result<Kind, Composed> {
        Ok(Kind::Missing)
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Kind, Composed> {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<Kind, Composed> {
        Ok(Kind::Missing)
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<Kind, Composed> {
        Ok(Kind::Missing)
    }

    fn serialize_unit_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
    ) -> Result<Kind, Composed> {
        self.text(variant)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<Kind, Composed> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: &T,
    ) -> Result<Kind, Composed> {
        Err(Composed)
    }

    composed! {
        serialize_bytes(&[u8]) -> Kind;
        serialize_seq(Option<usize>) -> Self::SerializeSeq;
        serialize_tuple(usize) -> Self::SerializeTuple;
        serialize_tuple_struct(&'static str, usize) -> Self::SerializeTupleStruct;
        serialize_tuple_variant(&'static str, u32, &'static str, usize) -> Self::SerializeTupleVariant;
        serialize_map(Option<usize>) -> Self::SerializeMap;
        serialize_struct(&'static str, usize) -> Self::SerializeStruct;
        serialize_struct_variant(&'static str, u32, &'static str, usize) -> Self::SerializeStructVariant;
    }
}
