//! ISF's JSON, given to the converter piece by piece.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::convert::Convert;

/// A type as a member, pointer or symbol mentions it. serde_json bounds the nesting (128 levels).
#[derive(Debug, Deserialize)]
pub(super) struct Mention {
    pub(super) kind: String,
    #[serde(default)]
    pub(super) name: Option<String>,
    #[serde(default)]
    pub(super) subtype: Option<Box<Mention>>,
    #[serde(default)]
    pub(super) count: Option<Number>,
    #[serde(default)]
    pub(super) bit_position: Option<Number>,
    #[serde(default)]
    pub(super) bit_length: Option<Number>,
    /// Of a bitfield: the number it is cut from.
    #[serde(default, rename = "type")]
    pub(super) of: Option<Box<Mention>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct BaseType {
    #[serde(default)]
    pub(super) size: Number,
    #[serde(default)]
    pub(super) signed: bool,
    #[serde(default)]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) endian: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct UserType {
    #[serde(default)]
    pub(super) size: Number,
    #[serde(default)]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) fields: Pairs<Member>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Member {
    #[serde(rename = "type")]
    pub(super) mention: Mention,
    #[serde(default)]
    pub(super) offset: Number,
    #[serde(default)]
    pub(super) anonymous: bool,
}

#[derive(Debug, Deserialize)]
pub(super) struct Enum {
    #[serde(default)]
    pub(super) size: Number,
    #[serde(default)]
    pub(super) base: String,
    #[serde(default)]
    pub(super) constants: Pairs<Number>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Symbol {
    #[serde(default)]
    pub(super) address: Option<Number>,
    #[serde(default, rename = "type")]
    pub(super) mention: Option<Mention>,
    #[serde(default)]
    pub(super) constant_data: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Metadata {
    #[serde(default)]
    pub(super) format: String,
    #[serde(default)]
    pub(super) producer: Producer,
    #[serde(default)]
    pub(super) linux: Option<Sources>,
    #[serde(default)]
    pub(super) windows: Option<IgnoredAny>,
    #[serde(default)]
    pub(super) mac: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Producer {
    #[serde(default)]
    pub(super) name: String,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Sources {
    #[serde(default)]
    pub(super) symbols: Items,
}

/// The first few items of a list.
#[derive(Debug, Default)]
pub(super) struct Items(pub(super) Vec<SourceItem>);

impl<'de> Deserialize<'de> for Items {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct First;
        impl<'de> Visitor<'de> for First {
            type Value = Items;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of sources")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Items, A::Error> {
                let mut items = Vec::new();
                while items.len() < 16 {
                    match list.next_element()? {
                        Some(item) => items.push(item),
                        None => return Ok(Items(items)),
                    }
                }
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Items(items))
            }
        }
        deserializer.deserialize_seq(First)
    }
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct SourceItem {
    #[serde(default)]
    pub(super) name: String,
}

/// An integer of any of JSON's spellings: 64 bits, signed or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Number(pub(super) i128);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Integer;
        impl Visitor<'_> for Integer {
            type Value = Number;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer")
            }
            fn visit_u64<E>(self, v: u64) -> Result<Number, E> {
                Ok(Number(v.into()))
            }
            fn visit_i64<E>(self, v: i64) -> Result<Number, E> {
                Ok(Number(v.into()))
            }
            fn visit_f64<E: de::Error>(self, v: f64) -> Result<Number, E> {
                // The schema says "number" for addresses; what is beyond 64 bits arrives as a fraction.
                Err(E::custom(format_args!("{v} is not an integer of 64 bits")))
            }
        }
        deserializer.deserialize_any(Integer)
    }
}

/// Most members or values of one type. The largest enumerations and structs of kernels have some 2,000.
const MAX_PAIRS: usize = 1 << 17;

/// An object whose keys are names, in the order of the file.
#[derive(Debug)]
pub(super) struct Pairs<T>(pub(super) Vec<(String, T)>);

impl<T> Default for Pairs<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut pairs = Vec::new();
        let mut left = 0usize;
        deserializer.deserialize_map(Each(PhantomData, |name, value| {
            if pairs.len() < MAX_PAIRS {
                pairs.push((name, value));
            } else {
                left += 1;
            }
        }))?;
        if left > 0 {
            return Err(de::Error::custom(format_args!(
                "a type has {left} members or values more than {MAX_PAIRS}"
            )));
        }
        Ok(Self(pairs))
    }
}

/// Gives each pair of an object to a function as soon as it is read.
struct Each<T, F>(PhantomData<T>, F);

impl<'de, T: Deserialize<'de>, F: FnMut(String, T)> Visitor<'de> for Each<T, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some((name, value)) = map.next_entry::<String, T>()? {
            (self.1)(name, value);
        }
        Ok(())
    }
}

impl<'de, T: Deserialize<'de>, F: FnMut(String, T)> DeserializeSeed<'de> for Each<T, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

/// The whole table.
pub(super) struct Table<'a>(pub(super) &'a mut Convert);

impl<'de> DeserializeSeed<'de> for Table<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Table<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a symbol table: an object with metadata, base_types, user_types, enums and symbols")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let convert = self.0;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "metadata" => convert.metadata(map.next_value()?).map_err(de::Error::custom)?,
                "base_types" => {
                    map.next_value_seed(Each(PhantomData, |name, t| convert.base_type(name, t)))?
                }
                "user_types" => {
                    map.next_value_seed(Each(PhantomData, |name, t| convert.user_type(name, t)))?
                }
                "enums" => map.next_value_seed(Each(PhantomData, |name, t| convert.enumeration(name, t)))?,
                "symbols" => map.next_value_seed(Each(PhantomData, |name, s| convert.symbol(name, s)))?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}
