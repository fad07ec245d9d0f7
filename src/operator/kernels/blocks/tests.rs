use ndarray::Array2;

use super::*;
use crate::testing::architectures;

fn numbers(rows: usize, columns: usize, seed: usize) -> Array2<f64> {
    Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 31 + j * 17 + seed * 5) % 13) as f64 - 6.0)
}

/// The definition, entry by entry. All numbers are small integers, so that every order of summation is exact.
fn naive(
    values: &[f64],
    extents: &[(usize, usize)],
    transposed: bool,
    x: &Array2<f64>,
    maps: (Option<&[u32]>, Option<&[u32]>),
    rows: usize,
) -> Array2<f64> {
    let (gather, scatter) = maps;
    let place =
        |map: Option<&[u32]>, at: usize| map.map_or(Some(at), |map| (map[at] != NONE).then(|| map[at] as usize));
    let mut y = Array2::zeros((rows, x.ncols()));
    let (mut value, mut corner) = (0, (0, 0));
    for &(height, width) in extents {
        for i in 0..height {
            for j in 0..width {
                let (o, c) = if transposed { (j, i) } else { (i, j) };
                if let (Some(to), Some(from)) = (place(scatter, corner.0 + o), place(gather, corner.1 + c)) {
                    y.row_mut(to).scaled_add(values[value + i * width + j], &x.row(from));
                }
            }
        }
        value += height * width;
        corner = if transposed { (corner.0 + width, corner.1 + height) } else { (corner.0 + height, corner.1 + width) };
    }
    y
}

/// A map of `places` into more rows than that: shuffled, the last of a run or every fifth missing.
fn map(places: usize, kind: usize) -> (Option<Vec<u32>>, usize) {
    let stride = (1..).find(|stride| stride * stride >= places).unwrap_or(1);
    match kind {
        0 => (None, places),
        1 => (
            (0..places).map(|i| if i + 2 < places { i as u32 + 3 } else { NONE }).collect::<Vec<_>>().into(),
            places + 3,
        ),
        _ => {
            let mut order: Vec<u32> = (0..stride).flat_map(|i| (i..places).step_by(stride).map(|i| i as u32)).collect();
            order.iter_mut().step_by(5).for_each(|i| *i = NONE);
            (Some(order), places)
        }
    }
}

fn check<T: Real>(extents: &[(usize, usize)], batches: &[usize], arch: Arch) {
    let count: usize = extents.iter().map(|(height, width)| height * width).sum();
    let values: Vec<f64> = numbers(1, count, 3).into_raw_vec_and_offset().0;
    let wide: Vec<T> = values.iter().map(|&v| T::from_f64(v)).collect();
    let half: Vec<bf16> = values.iter().map(|&v| bf16::from_f64(v)).collect();
    let (m, n) = extents.iter().fold((0, 0), |(m, n), (height, width)| (m + height, n + width));
    for (case, &b) in batches.iter().enumerate() {
        for transposed in [false, true] {
            let (outputs, inputs) = if transposed { (n, m) } else { (m, n) };
            let ((gather, sources), (scatter, rows)) = (map(inputs, case % 3), map(outputs, (case + 1) % 3));
            let x = numbers(sources, b, case);
            let expected = naive(&values, extents, transposed, &x, (gather.as_deref(), scatter.as_deref()), rows);
            let x = x.mapv(T::from_f64);
            let sideways = x.t().as_standard_layout().into_owned().reversed_axes();
            let every_second = Array2::from_shape_fn((2 * sources, b), |(i, j)| x[(i / 2, j)]);
            for x in [x.view(), sideways.view(), every_second.slice(ndarray::s![..;2, ..])] {
                let label = format!("{extents:?} b={b} transposed={transposed} strides {:?}", x.strides());
                let job = Job { values: &wide[..], extents, transposed, x, gather: gather.as_deref() };
                // Into some columns of a wider matrix.
                let mut y = Array2::zeros((rows, b + 3));
                block_product_by(arch, &job, scatter.as_deref(), &mut y, 2);
                assert!(
                    y.slice(ndarray::s![.., ..2]).iter().chain(y.column(b + 2)).all(|&v| v == T::zero()),
                    "{label}"
                );
                let y = y.slice(ndarray::s![.., 2..b + 2]);
                assert_eq!(y.mapv(|v| v.wide()), expected, "{label}");
                let job = Job { values: &half[..], extents, transposed, x, gather: gather.as_deref() };
                // Into some columns of a wider matrix.
                let mut y = Array2::zeros((rows, b + 3));
                block_product_by(arch, &job, scatter.as_deref(), &mut y, 2);
                assert!(
                    y.slice(ndarray::s![.., ..2]).iter().chain(y.column(b + 2)).all(|&v| v == T::zero()),
                    "{label}"
                );
                let y = y.slice(ndarray::s![.., 2..b + 2]);
                assert_eq!(y.mapv(|v| v.wide()), expected, "{label}, bf16");
            }
        }
    }
}

#[test]
fn equals_the_naive_sums_for_every_shape() {
    let shapes: [&[(usize, usize)]; 9] = [
        &[],
        &[(1, 1)],
        &[(1, 1); 7],
        &[(0, 3), (2, 0), (0, 0), (3, 2)],
        &[(4, 4), (4, 4), (4, 4)],
        &[(16, 64), (64, 16)],
        &[(3, 5), (7, 2), (1, 13), (11, 1)],
        &[(31, 37), (29, 41)],
        &[(17, 130), (70, 9)],
    ];
    if cfg!(miri) {
        // One path, interpreted: all heights of tiles, and all widths of panels.
        check::<f32>(shapes[6], &[0, 3], Arch::Scalar);
        check::<f32>(&[(3, 5)], &[1, 9], Arch::Scalar);
        return check::<f64>(&[(18, 9)], &[5], Arch::Scalar);
    }
    for arch in architectures() {
        for extents in shapes {
            check::<f32>(extents, &[0, 1, 2, 3, 5, 15, 16, 17, 33, 64, 67, 128], arch);
            check::<f64>(extents, &[1, 2, 8, 33], arch);
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "large")]
fn large_blocks_and_many_threads_do_the_same() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let extents = [(257, 256), (40, 40), (256, 258), (100, 300)];
    check::<f32>(&extents, &[1, 33, 40], Arch::new());
    // On a worker thread all runs in sequence; `spawn` in a scope of another pool does not change that.
    pool.install(|| check::<f32>(&extents, &[33, 40], Arch::new()));
}
