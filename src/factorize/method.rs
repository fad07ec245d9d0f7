//! The built-in methods: the typed form, the boxed form and the TOML form are the same thing.

use serde::{Deserialize, Deserializer, Serialize};

use super::{
    Armor, Auto, Bitmask, Cosine, Cospadi, Decomposition, Factorize, Forecast, InParts, Masa, Mixed, Monarch, Outline,
    Problem, Quantize, Residual, Svd, TwoFour,
};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::metric::MetricSpec;
use crate::named::{self, Named};
use crate::operator::Operator;
use crate::scalar::Real;

/// One line for each method: what it is, its name in a recipe, its type.
macro_rules! methods {
    ($(#[doc = $what:literal] $name:literal $method:ident,)*) => {
        /// The built-in methods. Read from a name, which stands for the default parameters, or from a table.
        #[derive(Debug, Clone, PartialEq, Serialize)]
        #[serde(tag = "type")]
        #[non_exhaustive]
        pub enum Method {
            $(#[doc = $what] #[serde(rename = $name)] $method($method),)*
        }

        /// The table form.
        #[derive(Deserialize)]
        #[serde(tag = "type", deny_unknown_fields)]
        pub(crate) enum Described {
            $(#[serde(rename = $name)] $method($method),)*
        }

        impl From<Described> for Method {
            fn from(described: Described) -> Self {
                match described {
                    $(Described::$method(method) => Method::$method(method),)*
                }
            }
        }

        impl Method {
            /// Names of the built-in methods, as recipes write them.
            pub const NAMES: &[&str] = &[$($name),*];

            /// A built-in method with its default parameters.
            ///
            /// # Errors
            /// [`Error::Unsupported`] with the valid names.
            pub fn named(name: &str) -> Result<Self> {
                match name {
                    $($name => Ok(Method::$method($method::default())),)*
                    _ => {
                        let names = Self::NAMES.join(", ");
                        Err(Error::Unsupported(format!("unknown method `{name}`, expected one of {names}")))
                    }
                }
            }

            /// Its name in a recipe.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Method::$method(_) => $name,)*
                }
            }

            fn inner<T: Real>(&self) -> &dyn Factorize<T> {
                match self {
                    $(Method::$method(method) => method,)*
                }
            }
        }
    };
}

methods! {
    /// Truncated, weighted singular value decomposition.
    "svd" Svd,
    /// Projection on chosen rows of a fixed orthogonal transform.
    "cosine" Cosine,
    /// Two block-diagonal factors with a permutation between them.
    "monarch" Monarch,
    /// N of every M consecutive inputs, 2 of 4 by default.
    "two-four" TwoFour,
    /// Entries anywhere, with a bit mask.
    "bitmask" Bitmask,
    /// A 2:4 core between block-diagonal wrappers.
    "armor" Armor,
    /// Sparse codes over a dictionary.
    "cospadi" Cospadi,
    /// Matrix atoms shared across layers.
    "masa" Masa,
    /// Small integers for the numbers of a weight or of another method's factors.
    "quantize" Quantize,
    /// A width of its own for each row of a weight.
    "mixed" Mixed,
    /// One method on the weight, another on what it leaves.
    "residual" Residual,
    /// The best of several methods for each weight.
    "auto" Auto,
}

impl Named for Method {
    const WHAT: &'static str = "a method";
    type Table = Described;
    fn named(name: &str) -> Result<Self> {
        Method::named(name)
    }
    fn from_table(described: Described) -> Result<Self> {
        Ok(described.into())
    }
}

impl<'de> Deserialize<'de> for Method {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        named::deserialize(deserializer)
    }
}

impl<T: Real> Factorize<T> for Method {
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
        self.inner().factorize(group)
    }
    fn factorize_noting(&self, group: &[Problem<'_, T>], notes: &mut Vec<String>) -> Result<Vec<Operator<T>>> {
        self.inner().factorize_noting(group, notes)
    }
    fn takes_parts(&self) -> bool {
        self.inner::<T>().takes_parts()
    }
    fn factorize_parts(&self, group: &[InParts<'_, T>], notes: &mut Vec<String>) -> Result<Vec<Operator<T>>> {
        self.inner().factorize_parts(group, notes)
    }
    fn decompose(&self, group: &[Problem<'_, T>]) -> Result<Option<Decomposition<T>>> {
        self.inner().decompose(group)
    }
    fn has_curve(&self) -> bool {
        self.inner::<T>().has_curve()
    }
    fn assemble(&self, group: &[Problem<'_, T>], decomposition: &Decomposition<T>) -> Result<Vec<Operator<T>>> {
        self.inner().assemble(group, decomposition)
    }
    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast> {
        self.inner::<T>().forecast(group, metric, budget)
    }
}
