use ndarray::Array2;

use super::super::{Beside, CodedRows, PackedCodes, pack};
use super::inputs::Layout;
use super::*;

/// Products with more than a few inputs by vectors, and by matrix instructions where the machine has both; none where it
/// has neither.
fn all(bits: u8, group: usize, (m, n): (usize, usize), x: &Array2<f32>) -> Vec<Vec<f32>> {
    let (groups, levels) = (n.div_ceil(group), 1usize << bits);
    let scales: Vec<f32> = (0..m * groups).map(|g| 0.01 + (g % 7) as f32 / 64.0).collect();
    let zeros: Vec<u8> = (0..m * groups).map(|g| (g * 5 % levels) as u8).collect();
    let mut codes = Vec::new();
    for i in 0..m {
        pack(bits, &(0..n).map(|j| ((i * 29 + j * 13 + i * j) % levels) as u8).collect::<Vec<_>>(), &mut codes);
    }
    let beside = Beside { scales: &scales, zeros: bits.is_multiple_of(2).then_some(&zeros), offsets: None };
    let codes = PackedCodes::new(bits, group, (m, n), codes, beside);
    let rows = CodedRows { group, codes: &codes, groups, beside };
    let layout = Layout::new::<f32>(bits, group, n);
    let vectors = layout.map(|layout| Inputs::laid_out(x.view(), layout, None));
    let matrices = Inputs::new(x.view(), bits, group).filter(|x| x.shape.is_some());
    // The fastest there is was taken.
    assert_eq!((vectors.is_some(), matrices.is_some()), (available(), matrix::available()));
    let product = |x: Inputs| {
        let mut y = vec![f32::NAN; m * x.vectors];
        // Calls begin at panels.
        for (at, y) in y.chunks_mut(64 * x.vectors).enumerate() {
            products(&rows, at * 64..(at * 64 + 64).min(m), &x, y);
        }
        y
    };
    vectors.into_iter().chain(matrices).map(product).collect()
}

#[test]
fn matrix_instructions_find_the_same_sums() {
    let bits = |y: &[f32]| y.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    for (width, group, n) in (2..=8).flat_map(|width| {
        // Lanes that fill steps and that do not, the last run a short one, whole rows.
        [(32, 320), (64, 300), (128, 700), (96, 290), (16, 40), (1031, 1031), (70, 70)].map(|(g, n)| (width, g, n))
    }) {
        for count in [5, 8, 16, 17, 40] {
            let x = Array2::from_shape_fn((n, count), |(j, v)| {
                let size = if (j + v).is_multiple_of(41) { 300.0 } else { 1.0 };
                size * (((j * 37 + v * 11) % 101) as f32 / 50.0 - 1.0)
            });
            if let [vectors, matrices] = &all(width, group, (70, n), &x)[..] {
                let what = format!("{width} bits, groups of {group}, {n} columns, {count} inputs");
                assert_eq!(bits(vectors), bits(matrices), "{what}");
            }
        }
    }
}

#[test]
fn inputs_that_are_not_finite_make_no_numbers() {
    let mut x = Array2::from_elem((256, 20), 0.5f32);
    (x[[3, 7]], x[[200, 11]]) = (f32::NAN, f32::INFINITY);
    for y in all(4, 64, (40, 256), &x) {
        assert!(y.iter().enumerate().all(|(at, y)| y.is_nan() == [7, 11].contains(&(at % 20))));
    }
}
