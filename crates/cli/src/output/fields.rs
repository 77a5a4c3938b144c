//! A row taken apart: each field that is wanted goes to its column, the others are passed over.
//!
//! Rows stay what the libraries made of them until they are written. A map of values for each would cost more than
//! all else that is done for a listing.

use serde::Serialize;
use serde::ser::{Error as _, Impossible, SerializeMap, SerializeStruct, Serializer};
use serde_json::{Error, Map, Value};

use super::Row;

/// Takes the cells of a row, in the order the row has them.
pub(crate) trait Sink {
    /// The row's value for this column; `None` is null.
    fn cell<T: Serialize + ?Sized>(&mut self, column: usize, value: &T) -> Result<(), Error>;
}

/// One row of a listing.
pub(crate) trait Record {
    /// Hands over each field under its key.
    fn fields<S: Sink>(&self, to: &mut Fields<'_, S>) -> Result<(), Error>;
}

impl<T: Row> Record for &T {
    fn fields<S: Sink>(&self, to: &mut Fields<'_, S>) -> Result<(), Error> {
        self.serialize(to)
    }
}

impl Record for Map<String, Value> {
    fn fields<S: Sink>(&self, to: &mut Fields<'_, S>) -> Result<(), Error> {
        self.serialize(to)
    }
}

/// The column of what goes to none.
const UNWANTED: usize = usize::MAX;

/// Tells for each field of a row which column it belongs to.
pub(crate) struct Fields<'k, S> {
    pub(super) sink: S,
    keys: &'k [&'static str],
    wanted: Vec<bool>,
    /// Of each field, in the order of the row before: its key, and its column or [`UNWANTED`]. Rows of one type
    /// have the same keys, so that it is enough to see that this is the same piece of memory.
    known: Vec<(&'static str, usize)>,
    /// How many fields of this row went by.
    passed: usize,
    /// Where the value goes whose key came alone.
    pending: Option<usize>,
}

impl<'k, S: Sink> Fields<'k, S> {
    /// For rows with these keys, of which some are wanted.
    pub(super) fn new(keys: &'k [&'static str], wanted: impl Fn(&str) -> bool, sink: S) -> Self {
        Fields {
            sink,
            keys,
            wanted: keys.iter().map(|key| wanted(key)).collect(),
            known: Vec::with_capacity(keys.len()),
            passed: 0,
            pending: None,
        }
    }

    /// Hands the cells of a row to the sink.
    pub(super) fn take(&mut self, row: &impl Record) -> Result<(), Error> {
        self.passed = 0;
        row.fields(self)
    }

    /// A field of the row. Most are not wanted: to pass over one is a few instructions where it stands.
    #[inline(always)]
    pub(crate) fn field<T: Serialize + ?Sized>(&mut self, key: &'static str, value: &T) -> Result<(), Error> {
        let at = self.passed;
        self.passed += 1;
        let column = match self.known.get(at) {
            Some((known, column)) if std::ptr::eq(*known, key) => *column,
            _ => self.learn(key, at),
        };
        if column == UNWANTED {
            return Ok(());
        }
        self.sink.cell(column, value)
    }

    /// Finds the column of a key that is not where it was in the row before.
    #[cold]
    fn learn(&mut self, key: &'static str, at: usize) -> usize {
        let column = self.find(key, at).unwrap_or(UNWANTED);
        match self.known.get_mut(at) {
            Some(known) => *known = (key, column),
            None => self.known.push((key, column)),
        }
        column
    }

    /// The column of this key, which is likely the one `at` this place.
    fn find(&self, key: &str, at: usize) -> Option<usize> {
        let column = match self.keys.get(at) {
            Some(likely) if *likely == key => at,
            _ => self.keys.iter().position(|k| *k == key)?,
        };
        self.wanted.get(column).is_some_and(|w| *w).then_some(column)
    }
}

impl<S: Sink> SerializeStruct for &mut Fields<'_, S> {
    type Ok = ();
    type Error = Error;

    #[inline(always)]
    fn serialize_field<T: Serialize + ?Sized>(&mut self, key: &'static str, value: &T) -> Result<(), Error> {
        self.field(key, value)
    }

    fn end(self) -> Result<(), Error> {
        Ok(())
    }
}

impl<S: Sink> SerializeMap for &mut Fields<'_, S> {
    type Ok = ();
    type Error = Error;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Error> {
        let Value::String(key) = serde_json::to_value(key)? else {
            return Err(Error::custom(
                "a row has a key that is no text; this is a bug in vmsight",
            ));
        };
        self.pending = self.find(&key, self.passed);
        self.passed += 1;
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        match self.pending.take() {
            Some(column) => self.sink.cell(column, value),
            None => Ok(()),
        }
    }

    fn end(self) -> Result<(), Error> {
        Ok(())
    }
}

/// What a row is not.
macro_rules! no_row {
    ($($method:ident($($argument:ty),*) -> $result:ty;)+) => {
        $(fn $method(self, $(_: $argument),*) -> Result<$result, Error> {
            Err(Error::custom("a row has no fields; this is a bug in vmsight"))
        })+
    };
}

impl<'f, 'k, S: Sink> Serializer for &'f mut Fields<'k, S> {
    type Ok = ();
    type Error = Error;
    type SerializeSeq = Impossible<(), Error>;
    type SerializeTuple = Impossible<(), Error>;
    type SerializeTupleStruct = Impossible<(), Error>;
    type SerializeTupleVariant = Impossible<(), Error>;
    type SerializeMap = &'f mut Fields<'k, S>;
    type SerializeStruct = &'f mut Fields<'k, S>;
    type SerializeStructVariant = Impossible<(), Error>;

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Self::SerializeStruct, Error> {
        Ok(self)
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Self::SerializeMap, Error> {
        Ok(self)
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), Error> {
        value.serialize(self)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<(), Error> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: &T,
    ) -> Result<(), Error> {
        self.serialize_unit()
    }

    no_row! {
        serialize_bool(bool) -> ();
        serialize_i8(i8) -> ();
        serialize_i16(i16) -> ();
        serialize_i32(i32) -> ();
        serialize_i64(i64) -> ();
        serialize_u8(u8) -> ();
        serialize_u16(u16) -> ();
        serialize_u32(u32) -> ();
        serialize_u64(u64) -> ();
        serialize_f32(f32) -> ();
        serialize_f64(f64) -> ();
        serialize_char(char) -> ();
        serialize_str(&str) -> ();
        serialize_bytes(&[u8]) -> ();
        serialize_none() -> ();
        serialize_unit() -> ();
        serialize_unit_struct(&'static str) -> ();
        serialize_unit_variant(&'static str, u32, &'static str) -> ();
        serialize_seq(Option<usize>) -> Self::SerializeSeq;
        serialize_tuple(usize) -> Self::SerializeTuple;
        serialize_tuple_struct(&'static str, usize) -> Self::SerializeTupleStruct;
        serialize_tuple_variant(&'static str, u32, &'static str, usize) -> Self::SerializeTupleVariant;
        serialize_struct_variant(&'static str, u32, &'static str, usize) -> Self::SerializeStructVariant;
    }
}
