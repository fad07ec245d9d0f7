//! Sweeps with inertia: each begins a step beyond the end of the last one, on the way that one went.
//!
//! > y = x_k + β·(x_k − x_{k−1}),  x_{k+1} = sweep(y) if its loss is below that of x_k, else x_k
//!
//! with x = (A, S, B); of S only what both masks keep moves on. Alternating steps creep along valleys, which this
//! follows. A sweep chooses masks again, so that, unlike descent between frozen masks, nothing is settled early.
//! y itself is nearly always above x_k, so that only the end of a sweep is judged. After a step back the next
//! sweep begins at x_k itself and cannot rise.
//!
//! Cost: nothing beside the sweeps but copies of the factors; steps say what they change.

use ndarray::{Array2, Zip};

use super::state::{Form, State};
use crate::coder::Coded;
use crate::error::Result;
use crate::operator::Nm;
use crate::scalar::Real;

/// The factors at the end of a sweep.
struct Point<T> {
    left: Vec<Array2<T>>,
    core: Coded<T>,
    right: Vec<Array2<T>>,
}

impl<T: Real> State<'_, T> {
    /// Some sweeps, the refused ones counted. Returns the losses tr(E·G·Eᵀ) at the end of those that were kept, which
    /// fall. Without inertia (0) all are.
    pub(super) fn descend(
        &mut self,
        form: &Form<'_, T>,
        (nm, block): (Nm, usize),
        sweeps: usize,
        inertia: f64,
    ) -> Result<Vec<f64>> {
        let (mut losses, mut before): (Vec<f64>, Option<Point<T>>) = (Vec::with_capacity(sweeps), None);
        for _ in 0..sweeps {
            let here = (inertia > 0.0).then(|| self.point());
            if let Some(before) = &before {
                self.go_on(before, T::from_f64(inertia));
            }
            self.refresh();
            let mut loss = self.step_left(form)?;
            loss += self.step_right(form)?;
            loss += self.step_core(form, nm, block);
            // What is not a number is refused too.
            let lower = losses.last().is_none_or(|&last| loss < last);
            before = match (before, here) {
                (Some(_), Some(here)) if !lower => {
                    self.restore(here);
                    None
                }
                (_, here) => {
                    losses.push(loss);
                    here
                }
            };
        }
        Ok(losses)
    }

    fn point(&self) -> Point<T> {
        Point { left: self.left.clone(), core: self.core.clone(), right: self.right.clone() }
    }

    fn restore(&mut self, point: Point<T>) {
        (self.left, self.core, self.right) = (point.left, point.core, point.right);
        self.refresh();
    }

    /// x + β·(x − before).
    fn go_on(&mut self, before: &Point<T>, inertia: T) {
        let further = |x: &mut T, &before: &T| *x = *x + inertia * (*x - before);
        for (blocks, before) in [(&mut self.left, &before.left), (&mut self.right, &before.right)] {
            blocks.iter_mut().zip(before).for_each(|(block, before)| block.zip_mut_with(before, further));
        }
        let core = Zip::from(&mut self.core.values).and(&before.core.values);
        core.and(&self.core.kept).and(&before.core.kept).for_each(|x, before, &now, &then| {
            if now && then {
                further(x, before);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::parts;
    use super::super::tests::{form, nowag, numbers};
    use super::*;
    use crate::linalg::Faer;

    fn start(w: &Array2<f64>, g: &Array2<f64>, block: usize) -> State<'static, f64> {
        let (m, n) = w.dim();
        State::new(w.clone(), nowag(w, g.diag()), parts(m, block), parts(n, block), &Faer)
    }

    #[test]
    fn losses_fall_and_are_those_of_the_factors_with_any_inertia() {
        let mut refused = 0;
        for (m, n, block, inertia) in
            [(32, 48, 8, 0.0), (30, 50, 8, 0.8), (21, 33, 6, 1.0), (80, 24, 4, 0.9), (17, 36, 1, 1.0)]
        {
            let (w, g) = (numbers(m, n, 3), form(n, 5));
            let diagonal = g.diag().to_owned();
            for form in [Form::Diagonal(diagonal.view()), Form::full(g.view(), w.view())] {
                let mut state = start(&w, &g, block);
                let mut last = state.loss(&form);
                let losses = state.descend(&form, (Nm::TWO_FOUR, block), 30, inertia).unwrap();
                refused += 30 - losses.len();
                for loss in &losses {
                    assert!(*loss <= last * (1.0 + 1e-12), "{m}x{n}/{block}, {inertia}: {losses:?}");
                    last = *loss;
                }
                let carried = state.loss(&form);
                state.refresh();
                for now in [carried, state.loss(&form)] {
                    assert!((now / last - 1.0).abs() < 1e-9, "{m}x{n}/{block}, {inertia}: {now} against {last}");
                }
                let kept = state.core.values.indexed_iter().all(|(at, &v)| v == 0.0 || state.core.kept[at]);
                assert!(kept, "{m}x{n}/{block}: a value off the mask");
            }
        }
        assert!(refused > 0, "no sweep was taken back");
    }

    #[test]
    fn the_same_sweeps_end_lower() {
        for (m, n, block) in [(32, 48, 8), (64, 32, 8), (40, 60, 4)] {
            let (w, g) = (numbers(m, n, 7), form(n, 11));
            let run = |sweeps, inertia| {
                let mut state = start(&w, &g, block);
                let form = Form::full(g.view(), w.view());
                state.descend(&form, (Nm::TWO_FOUR, block), sweeps, inertia).unwrap()
            };
            for sweeps in [6, 12, 24] {
                let ends = [0.0, 0.8].map(|inertia| run(sweeps, inertia).pop().unwrap());
                assert!(ends[1] <= ends[0], "{m}x{n}/{block}, {sweeps} sweeps: {ends:?}");
            }
            let (few, many) = (run(12, 0.8).pop().unwrap(), run(24, 0.0).pop().unwrap());
            assert!(few < many, "{m}x{n}/{block}: {few} after 12 sweeps, {many} after 24 plain ones");
        }
    }
}
