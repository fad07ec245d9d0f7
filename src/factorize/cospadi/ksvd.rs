//! K-SVD (Aharon, Elad and Bruckstein, IEEE Trans. Signal Processing 54, 2006), as CoSpaDi uses it: Batch-OMP
//! codes, then one atom after the other by power iterations on what the others leave of its signals.

use ndarray::{Array1, Array2, ArrayView2, Axis};

use crate::coder::Coded;
use crate::error::Result;
use crate::linalg::{SparseCoder, SparseCodes, Stop};
use crate::scalar::Real;

/// Power iterations for an atom; the paper found nothing beyond five.
const POWER: usize = 5;

/// Codes S of Y ≈ S·D with at most `nonzeros` in each row, from atoms k×n (rows of any length).
pub(super) fn ksvd<T: Real>(
    y: ArrayView2<'_, T>,
    mut atoms: Array2<T>,
    nonzeros: usize,
    sweeps: usize,
) -> Result<Coded<T>> {
    for row in atoms.rows_mut() {
        unit(row);
    }
    for _ in 0..sweeps {
        let codes = SparseCoder::new(atoms.view())?.encode(y, Stop::nonzeros(nonzeros))?;
        sweep(y, &mut atoms, &codes);
    }
    let codes = SparseCoder::new(atoms.view())?.encode(y, Stop::nonzeros(nonzeros))?;
    let mut kept = Array2::from_elem(codes.shape(), false);
    for i in 0..y.nrows() {
        codes.signal(i).for_each(|(atom, _)| kept[(i, atom)] = true);
    }
    Ok(Coded { values: codes.to_dense(), kept })
}

/// Updates every atom and its coefficients; ‖Y − S·D‖ does not rise.
fn sweep<T: Real>(y: ArrayView2<'_, T>, atoms: &mut Array2<T>, codes: &SparseCodes<T>) {
    // Signals and coefficients of each atom.
    let mut users: Vec<Vec<(usize, T)>> = vec![Vec::new(); atoms.nrows()];
    let mut rest = y.to_owned();
    for (i, mut rest) in rest.rows_mut().into_iter().enumerate() {
        for (atom, value) in codes.signal(i) {
            users[atom].push((i, value));
            rest.scaled_add(-value, &atoms.row(atom));
        }
    }
    for (atom, users) in users.iter().enumerate() {
        if users.is_empty() {
            // A dead atom becomes the signal that is represented worst.
            let energy = |row: ndarray::ArrayView1<'_, T>| row.iter().map(|v| v.wide() * v.wide()).sum::<f64>();
            let worst = rest.rows().into_iter().map(energy).enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
            if let Some((worst, energy)) = worst.filter(|(_, energy)| *energy > 0.0) {
                let scale = T::from_f64(1.0 / energy.sqrt());
                let row = rest.row(worst).mapv(|v| v * scale);
                atoms.row_mut(atom).assign(&row);
            }
            continue;
        }
        // What the other atoms leave of the signals: E = rest + s·dᵀ.
        let rows: Vec<usize> = users.iter().map(|(i, _)| *i).collect();
        let mut left = rest.select(Axis(0), &rows);
        for (mut row, (_, value)) in left.rows_mut().into_iter().zip(users) {
            row.scaled_add(*value, &atoms.row(atom));
        }
        let mut d = atoms.row(atom).to_owned();
        let mut codes = Array1::zeros(rows.len());
        for _ in 0..POWER {
            codes = left.dot(&d);
            let next = codes.dot(&left);
            if next.iter().all(|v| *v == T::zero()) {
                break;
            }
            d = next;
            unit(d.view_mut());
        }
        if codes.iter().any(|v| *v != T::zero()) {
            codes = left.dot(&d);
            atoms.row_mut(atom).assign(&d);
        }
        for ((&i, row), &value) in rows.iter().zip(left.rows()).zip(&codes) {
            let mut to = rest.row_mut(i);
            to.assign(&row);
            to.scaled_add(-value, &atoms.row(atom));
        }
    }
}

fn unit<T: Real>(mut row: ndarray::ArrayViewMut1<'_, T>) {
    let length = row.iter().map(|v| v.wide() * v.wide()).sum::<f64>().sqrt();
    if length > 0.0 {
        let scale = T::from_f64(1.0 / length);
        row.mapv_inplace(|v| v * scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(rows: usize, columns: usize) -> Array2<f64> {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            ((i * 7919 + j * 104_729 + i * i * j + 13) % 1009) as f64 / 504.5 - 1.0
        })
    }

    #[test]
    fn recovers_planted_atoms_and_revives_dead_ones() {
        // Signals of two out of six orthogonal atoms each; the start has two of them twisted and one dead.
        let n = 8;
        let planted = Array2::from_shape_fn((6, n), |(i, j)| f64::from(u8::from(i == j)));
        let pairs = (0..6).flat_map(|a| (0..a).map(move |b| (a, b)));
        let signals: Vec<f64> = pairs
            .enumerate()
            .flat_map(|(t, (a, b))| {
                let (a, b) =
                    (planted.row(a).to_owned() * (1.0 + t as f64), planted.row(b).to_owned() * (2.0 - t as f64 / 9.0));
                (a + b).to_vec()
            })
            .collect();
        let y = Array2::from_shape_vec((15, n), signals).unwrap();
        let mut start = &planted + &(numbers(6, n) * 0.05);
        start.row_mut(5).fill(0.0);
        let coded = ksvd(y.view(), start, 2, 40).unwrap();
        assert!(coded.kept.rows().into_iter().all(|row| row.iter().filter(|&&kept| kept).count() <= 2));
        let squares = coded.values.t().dot(&coded.values) + Array2::<f64>::eye(6) * 1e-12;
        let right = coded.values.t().dot(&y);
        let atoms = crate::linalg::Kernels::<f64>::solve_spd(&crate::linalg::Faer, squares.view(), right).unwrap();
        let lost = (&y - &coded.values.dot(&atoms)).iter().map(|v| v * v).sum::<f64>();
        assert!(lost < 1e-8 * y.iter().map(|v| v * v).sum::<f64>(), "{lost}");
    }

    #[test]
    fn sweeps_do_not_lose() {
        let y = numbers(40, 10);
        let mut atoms = numbers(12, 10);
        atoms.rows_mut().into_iter().for_each(unit);
        let codes = SparseCoder::new(atoms.view()).unwrap().encode(y.view(), Stop::nonzeros(3)).unwrap();
        let before: f64 = codes.residuals().iter().sum();
        sweep(y.view(), &mut atoms, &codes);
        // The atoms moved for these supports: least squares on them cannot be worse than the sweep's own codes.
        let mut after = 0.0;
        for (i, signal) in y.rows().into_iter().enumerate() {
            let support: Vec<usize> = codes.signal(i).map(|(atom, _)| atom).collect();
            let chosen = atoms.select(Axis(0), &support);
            let coder = SparseCoder::new(chosen.view()).unwrap();
            let row = signal.insert_axis(Axis(0));
            after += coder.encode(row, Stop::nonzeros(support.len())).unwrap().residuals()[0];
        }
        assert!(after <= before, "{after} of {before}");
    }
}
