//! What methods do with a group before and instead of solving it.

use super::{Outline, Problem};
use crate::error::{Error, Result};
use crate::operator::Operator;
use crate::scalar::Real;

/// The first problem of a group and the outlines of all, every one checked.
pub(super) fn checked<'g, 'a, T: Real>(group: &'g [Problem<'a, T>]) -> Result<(&'g Problem<'a, T>, Vec<Outline>)> {
    let Some(first) = group.first() else {
        return Err(Error::shape("a group of at least one weight", 0));
    };
    group.iter().try_for_each(|p| p.check().map_err(|e| e.of_tensor(p.name)))?;
    Ok((first, group.iter().map(|p| Outline { shape: p.shape(), dtype: p.dtype }).collect()))
}

/// All weights as they are.
pub(super) fn kept_dense<T: Real>(group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
    let all: Vec<Vec<Operator<T>>> = group.iter().map(Problem::dense).collect::<Result<_>>()?;
    Ok(all.into_iter().flatten().collect())
}
