//! SparseGPT (Frantar, Alistarh, ICML 2023): the optimal brain surgeon, one column after the other.
//!
//! The paper inverts H and walks down the Cholesky factor U of the inverse, H⁻¹ = Uᵀ·U. The same steps
//! come from R = U⁻¹, upper triangular with H = R·Rᵀ, without an inverse: the error is ‖Δ·R‖², and while
//! Δ is settled up to column c, the best later weights make every later (Δ·R)ⱼ zero. With
//! sⱼ = Σ_{i<c} Δᵢ·Rᵢⱼ, the weight that makes up for what was lost is w′_c = w_c − s_c/R_cc, and pruning it
//! costs (w′_c·R_cc)². That is n³/3 flops for R and mn² for the walk, in matrix products for all that is
//! further left than a block.

use ndarray::{Array2, ArrayView1, ArrayView2, s};

use super::{BLOCK, Coded, LANES, Pattern, Strip, check, each, join, strips};
use crate::error::Result;
use crate::linalg::{Backend, matmul_into};
use crate::operator::Nm;
use crate::scalar::Real;

/// R of H + damping·mean(diag H)·I = R·Rᵀ.
#[derive(Debug, Clone)]
pub struct Factor<T> {
    upper: Array2<T>,
    dead: Vec<usize>,
    damping: f64,
}

/// How often a damping that is too small for an indefinite H is raised tenfold.
const ATTEMPTS: usize = 6;

impl<T: Real> Factor<T> {
    /// Factorizes H in f64. Inputs of zero diagonal are decoupled, as in the paper. If H is not positive
    /// definite even with the damping (1 % in the paper), that is raised tenfold until it is;
    /// [`damping`](Self::damping) says what was used. n³/3 flops.
    ///
    /// # Errors
    /// [`Error::Numerical`](crate::Error::Numerical) if no reasonable damping makes H positive definite.
    pub fn new(form: ArrayView2<'_, f64>, damping: f64, backend: &dyn Backend) -> Result<Self> {
        let n = form.nrows();
        let dead: Vec<usize> = (0..n).filter(|&j| form[(j, j)] <= 0.0).collect();
        let mean = form.diag().iter().map(|d| d.max(0.0)).sum::<f64>() / (n - dead.len()).max(1) as f64;
        let mean = if mean > 0.0 { mean } else { 1.0 };
        let (mut damping, mut attempt) = (damping, 0);
        loop {
            // Columns and rows in reverse order: the lower factor becomes the upper one.
            let mut turned = form.slice(s![..;-1, ..;-1]).to_owned();
            turned.diag_mut().mapv_inplace(|d| d + damping * mean);
            for &j in &dead {
                turned.row_mut(n - 1 - j).fill(0.0);
                turned.column_mut(n - 1 - j).fill(0.0);
                turned[(n - 1 - j, n - 1 - j)] = mean;
            }
            match f64::kernels(backend).cholesky(turned.view()) {
                Ok(lower) => {
                    let upper = Array2::from_shape_fn((n, n), |(i, j)| match i <= j {
                        true => T::from_f64(lower[(n - 1 - i, n - 1 - j)]),
                        false => T::zero(),
                    });
                    return Ok(Factor { upper, dead, damping });
                }
                Err(why) if attempt == ATTEMPTS => return Err(why),
                Err(_) => (damping, attempt) = ((10.0 * damping).max(1e-8), attempt + 1),
            }
        }
    }

    /// R, n×n.
    pub(super) fn upper(&self) -> ArrayView2<'_, T> {
        self.upper.view()
    }

    /// The damping used, as a fraction of the mean diagonal.
    pub fn damping(&self) -> f64 {
        self.damping
    }

    /// Inputs of zero diagonal.
    pub fn dead(&self) -> usize {
        self.dead.len()
    }
}

/// One pass over all columns: N of each group where it is reached, by (w′·R)²; for a free pattern, of each
/// block of columns the share of `count` out of all entries, over all rows. `rows`, if given, weighs the
/// rows against each other there.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if the factor is of another size.
pub fn obs<T: Real>(
    target: ArrayView2<'_, T>,
    factor: &Factor<T>,
    pattern: Pattern,
    count: usize,
    rows: Option<ArrayView1<'_, f64>>,
) -> Result<Coded<T>> {
    let (m, n) = target.dim();
    check(target, factor.upper.dim(), None)?;
    let mut strips = strips(target);
    for strip in &mut strips {
        factor.dead.iter().for_each(|&j| strip.target.row_mut(j).fill(T::zero()));
    }
    let (groups, block) = match pattern {
        Pattern::Groups(nm) => (Some(nm), BLOCK / nm.m() * nm.m()),
        // The paper's block, over which its threshold is taken.
        Pattern::Free => (None, 2 * BLOCK),
    };
    let upper = factor.upper.view();
    let Some(nm) = groups else {
        for start in (0..n).step_by(block) {
            let end = (start + block).min(n);
            let mut sums = each(&mut strips, |strip| before(strip, upper, start, end));
            let quota = share(count, m * n, m * start, m * end);
            choose(&mut strips, &sums, upper, (start, end), quota, rows);
            let mut pairs: Vec<_> = strips.iter_mut().zip(&mut sums).collect();
            each(&mut pairs, |(strip, sums)| walk(strip, sums, upper, start, end, None));
        }
        return Ok(join((m, n), &strips));
    };
    each(&mut strips, |strip| {
        for start in (0..n).step_by(block) {
            let end = (start + block).min(n);
            let mut sums = before(strip, upper, start, end);
            walk(strip, &mut sums, upper, start, end, Some(nm));
        }
    });
    Ok(join((m, n), &strips))
}

/// What of `count` falls on entries `start..end` of `all`, so that the parts add up.
fn share(count: usize, all: usize, start: usize, end: usize) -> usize {
    let upto = |entries: usize| (count as u128 * entries as u128 / all.max(1) as u128) as usize;
    upto(end) - upto(start)
}

/// s of a block: what the columns to its left lost, (block × lanes).
pub(super) fn before<T: Real>(strip: &Strip<T>, upper: ArrayView2<'_, T>, start: usize, end: usize) -> Array2<T> {
    let mut sums = Array2::zeros((end - start, strip.width()));
    let above = upper.slice(s![..start, start..end]);
    matmul_into(T::one(), above.t(), strip.error.slice(s![..start, ..]), T::zero(), sums.view_mut());
    sums
}

/// Marks the `quota` entries of a block that it would cost most to prune, over all rows.
fn choose<T: Real>(
    strips: &mut [Strip<T>],
    sums: &[Array2<T>],
    upper: ArrayView2<'_, T>,
    (start, end): (usize, usize),
    quota: usize,
    rows: Option<ArrayView1<'_, f64>>,
) {
    let costs = strips.iter().zip(sums).map(|(strip, sums)| {
        // x: what all later columns would change by, were nothing pruned.
        let mut x = sums.clone();
        for j in 0..end - start {
            let (done, mut rest) = x.view_mut().split_at(ndarray::Axis(0), j);
            let mut xj = rest.row_mut(0);
            for (i, xi) in done.rows().into_iter().enumerate() {
                xj.scaled_add(upper[(start + i, start + j)], &xi);
            }
            let scale = -T::one() / upper[(start + j, start + j)];
            xj.mapv_inplace(|v| v * scale);
        }
        Array2::from_shape_fn((strip.rows, end - start), |(i, j)| {
            let value = ((strip.target[(start + j, i)] + x[(j, i)]) * upper[(start + j, start + j)]).wide();
            value * value * rows.map_or(1.0, |rows| rows[strip.first + i])
        })
    });
    let costs: Vec<f64> = costs.flat_map(|costs| costs.into_iter()).collect();
    let mut order: Vec<usize> = (0..costs.len()).collect();
    let by_cost = |a: &usize, b: &usize| costs[*b].total_cmp(&costs[*a]).then(a.cmp(b));
    if quota < order.len() {
        order.select_nth_unstable_by(quota, by_cost);
    }
    let width = end - start;
    for &at in order.iter().take(quota) {
        let (row, column) = (at / width, at % width);
        let strip = &mut strips[row / super::STRIP];
        strip.kept[(start + column, row % super::STRIP)] = true;
    }
}

fn load<T: Real>(a: &Array2<T>, row: usize, lane: usize) -> [T; LANES] {
    let row = a.row(row);
    let lanes = row.as_slice().and_then(|row| row[lane..].first_chunk());
    lanes.copied().unwrap_or([T::zero(); LANES])
}

fn store<T: Real>(a: &mut Array2<T>, row: usize, lane: usize, values: [T; LANES]) {
    if let Some(row) = a.row_mut(row).as_slice_mut() {
        row[lane..lane + LANES].copy_from_slice(&values);
    }
}

/// Settles the columns of a block one after the other; `sums` is s at its start.
fn walk<T: Real>(
    strip: &mut Strip<T>,
    sums: &mut Array2<T>,
    upper: ArrayView2<'_, T>,
    start: usize,
    end: usize,
    pattern: Option<Nm>,
) {
    for lane in (0..strip.width()).step_by(LANES) {
        let mut tile: Vec<[T; LANES]> = (0..end - start).map(|j| load(sums, j, lane)).collect();
        for c in start..end {
            if let Some(nm) = pattern.filter(|nm| c % nm.m() == 0) {
                mark(strip, &tile[c - start..], upper, c, end, lane, nm);
            }
            let (row, diagonal) = (upper.row(c), upper[(c, c)]);
            let target: [T; LANES] = load(&strip.target, c, lane);
            let (mut value, mut delta) = ([T::zero(); LANES], [T::zero(); LANES]);
            for l in 0..LANES {
                value[l] = match strip.kept[(c, lane + l)] {
                    true => target[l] - tile[c - start][l] / diagonal,
                    false => T::zero(),
                };
                delta[l] = value[l] - target[l];
            }
            store(&mut strip.coded, c, lane, value);
            store(&mut strip.error, c, lane, delta);
            for (sum, &r) in tile[c + 1 - start..].iter_mut().zip(row.iter().skip(c + 1)) {
                for l in 0..LANES {
                    sum[l] += delta[l] * r;
                }
            }
        }
    }
}

/// Chooses N of the group that begins at column c, for each lane: the rest of a row is kept whole.
fn mark<T: Real>(
    strip: &mut Strip<T>,
    sums: &[[T; LANES]],
    upper: ArrayView2<'_, T>,
    c: usize,
    end: usize,
    lane: usize,
    nm: Nm,
) {
    let size = nm.m().min(end - c);
    if size < nm.m() {
        strip.kept.slice_mut(s![c..end, lane..lane + LANES]).fill(true);
        return;
    }
    let mut x = [[T::zero(); LANES]; Nm::LARGEST];
    let mut costs = [[T::zero(); LANES]; Nm::LARGEST];
    for k in 0..size {
        let diagonal = upper[(c + k, c + k)];
        let mut sum = sums[k];
        for i in 0..k {
            let r = upper[(c + i, c + k)];
            for l in 0..LANES {
                sum[l] += x[i][l] * r;
            }
        }
        let target: [T; LANES] = load(&strip.target, c + k, lane);
        for l in 0..LANES {
            x[k][l] = -sum[l] / diagonal;
            let value = (target[l] + x[k][l]) * diagonal;
            costs[k][l] = value * value;
        }
    }
    for k in 0..size {
        // How many of the group come first; of equal ones the lower column.
        let mut better = [0u8; LANES];
        for j in (0..size).filter(|&j| j != k) {
            for l in 0..LANES {
                let first = costs[j][l] > costs[k][l] || (j < k && costs[j][l] == costs[k][l]);
                better[l] += u8::from(first);
            }
        }
        for (l, better) in better.into_iter().enumerate() {
            strip.kept[(c + k, lane + l)] = usize::from(better) < nm.n();
        }
    }
}
