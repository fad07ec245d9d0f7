//! Where codes are: unit by unit, of one panel after the other.

use pulp::bytemuck::try_cast_slice;

use super::super::panel::Pair;
use super::{Rest, Turns, UNIT};

/// A unit of a panel.
#[derive(Clone, Copy, Default)]
pub(super) struct Place {
    panel: usize,
    unit: usize,
}

impl<'a, const KIND: u8, const PARTS: usize, const V: usize, const DIGITS: usize, const RUNS: usize>
    Turns<'a, KIND, PARTS, V, DIGITS, RUNS>
{
    /// What comes after a unit of a panel: that of the next panel.
    #[inline(always)]
    pub(super) fn after(&self, Place { panel, unit }: Place) -> Place {
        if panel + 1 < self.panels.len() {
            Place { panel: panel + 1, unit }
        } else {
            Place { panel: 0, unit: unit + 1 }
        }
    }

    /// The codes of a unit; those of another, or any, where a row has no more.
    #[inline(always)]
    pub(super) fn codes<'s>(&self, place: Place, rest: &'s mut Rest) -> &'s [u8]
    where
        'a: 's,
    {
        let codes: &'a [u8] = self.panels[place.panel].packed.get(place.unit * self.unit..).unwrap_or_default();
        match codes.get(..self.unit) {
            Some(codes) => codes,
            None => {
                rest[..codes.len()].copy_from_slice(codes);
                &rest[..self.unit]
            }
        }
    }

    /// Codes of eight bits where they lie, if all are there.
    #[inline(always)]
    pub(super) fn in_place(&self, place: Place) -> Option<&'a [Pair; UNIT]> {
        let codes: &'a [u8] = self.panels[place.panel].packed.get(place.unit * self.unit..)?.get(..self.unit)?;
        if KIND == 8 { try_cast_slice(codes).ok()?.first_chunk() } else { None }
    }

    /// Bytes to a unit from the first of all: behind the last one come the panels that are multiplied next.
    #[inline(always)]
    pub(super) fn offset(&self, Place { panel, unit }: Place) -> usize {
        let (whole, from) = (self.one.packed.len(), unit * self.unit);
        match from < whole {
            true => panel * whole + from,
            false => (self.panels.len() + panel) * whole + from - whole,
        }
    }
}
