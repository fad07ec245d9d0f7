//! Values that a recipe may write as a name or, to say more, as a table.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor, value::MapAccessDeserializer};

use crate::error::Result;

/// A value that a name alone can stand for.
pub(crate) trait Named: Sized {
    /// What to call it in "expected …".
    const WHAT: &'static str;
    /// The table form.
    type Table: for<'de> Deserialize<'de>;
    /// The value of a name; the error lists the valid ones.
    fn named(name: &str) -> Result<Self>;
    /// The value of a table.
    fn from_table(table: Self::Table) -> Result<Self>;
}

/// For `#[serde(deserialize_with = …)]` and hand-written `Deserialize`.
pub(crate) fn deserialize<'de, D: Deserializer<'de>, T: Named>(deserializer: D) -> Result<T, D::Error> {
    struct Either<T>(PhantomData<T>);
    impl<'de, T: Named> Visitor<'de> for Either<T> {
        type Value = T;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "the name of {0}, or a table that describes {0}", T::WHAT)
        }
        fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<T, E> {
            T::named(name).map_err(E::custom)
        }
        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::from_table(T::Table::deserialize(MapAccessDeserializer::new(map))?).map_err(A::Error::custom)
        }
    }
    deserializer.deserialize_any(Either(PhantomData))
}
