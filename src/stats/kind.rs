//! The kinds of statistics, and their keys in a file.

use std::fmt;

/// What can be known about a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// The Gram matrix of the inputs, n×n.
    Gram,
    /// Fisher information of each row, m.
    FisherRow,
    /// Fisher information of each column, n.
    FisherCol,
    /// What an allocation multiplies the weight's squared error with, one number.
    Sensitivity,
}

impl Kind {
    /// The key in a statistics file.
    pub fn key(self, weight: &str) -> String {
        format!("{weight}.{self}")
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Gram => "gram",
            Kind::FisherRow => "fisher_row",
            Kind::FisherCol => "fisher_col",
            Kind::Sensitivity => "sensitivity",
        })
    }
}
