use ndarray::Array2;

use super::super::{Beside, CodedRows, PackedCodes, pack};
use super::avx2::Digits;
use super::*;

/// With the way that was taken.
type Products = Vec<(Way, Array2<f32>)>;

/// Products with inputs by vectors of eight rows in all digits there are, by those of sixteen, and by matrix instructions, of
/// what the machine has; with the exact products, and with those of the sizes of what is added up.
fn all(bits: u8, group: usize, (m, n): (usize, usize), x: &Array2<f32>) -> (Products, [Array2<f64>; 2]) {
    let (groups, levels) = (n.div_ceil(group), 1usize << bits);
    let scales: Vec<f32> = (0..m * groups).map(|g| 0.01 + (g % 7) as f32 / 64.0).collect();
    let zeros: Vec<u8> = (0..m * groups).map(|g| (g * 5 % levels) as u8).collect();
    let zeros = bits.is_multiple_of(2).then_some(&zeros[..]);
    let code = |i: usize, j: usize| ((i * 29 + j * 13 + i * j) % levels) as u8;
    let mut codes = Vec::new();
    for i in 0..m {
        pack(bits, &(0..n).map(|j| code(i, j)).collect::<Vec<_>>(), &mut codes);
    }
    let dense = Array2::from_shape_fn((m, n), |(i, j)| {
        let group = i * groups + j / group;
        let zero = zeros.map_or(1 << (bits - 1), |zeros| zeros[group]);
        f64::from(scales[group]) * (f64::from(code(i, j)) - f64::from(zero))
    });
    let largest = Array2::from_shape_fn((m, n), |(i, j)| f64::from(scales[i * groups + j / group]) * levels as f64);
    let exact = [dense.dot(&x.mapv(f64::from)), largest.dot(&x.mapv(|v| f64::from(v.abs())))];
    let beside = Beside { scales: &scales, zeros, offsets: None };
    let codes = PackedCodes::new(bits, group, (m, n), codes, beside);
    let rows = CodedRows { group, codes: &codes, groups, beside };
    let layout = Layout::new::<f32>(bits, group, n);
    let narrow: Vec<Way> = Digits::all(bits).map(Way::Narrow).collect();
    let few = [Way::Vectors].into_iter().filter(|_| available());
    let laid_out = |way| layout.map(|layout| Inputs::laid_out(x.view(), layout, way));
    let matrices = Inputs::new(x.view(), bits, group).filter(|x| matches!(x.way, Way::Bytes(_) | Way::Numbers(_)));
    // The fastest there is was taken.
    let four = x.ncols() >= four::FEWEST && layout.as_ref().and_then(four::shape).is_some();
    assert_eq!(matrices.is_some(), matrix::available() && (x.ncols() > TOGETHER || four));
    assert!(layout.is_some() == (available() || !narrow.is_empty()));
    let product = |x: Inputs| {
        let mut y = Array2::from_elem((m, x.vectors), f32::NAN);
        // Calls begin at panels.
        for (at, y) in y.as_slice_mut().unwrap().chunks_mut(64 * x.vectors).enumerate() {
            products(&rows, at * 64..(at * 64 + 64).min(m), &x, y);
        }
        y
    };
    let all = narrow.into_iter().chain(few).filter_map(laid_out).chain(matrices);
    (all.map(|x| (x.way, product(x))).collect(), exact)
}

#[test]
fn all_instructions_find_the_same_sums() {
    for (width, group, n) in (2..=8).flat_map(|width| {
        // Lanes that fill steps and that do not, blocks of runs, the last run a short one, whole rows.
        [
            (32, 320),
            (32, 1064),
            (64, 300),
            (128, 700),
            (192, 500),
            (96, 290),
            (16, 40),
            (48, 500),
            (1031, 1031),
            (70, 70),
        ]
        .map(|(g, n)| (width, g, n))
    }) {
        for count in [1, 2, 3, 5, 8, 11, 16, 17, 40] {
            let x = Array2::from_shape_fn((n, count), |(j, v)| {
                let size = if (j + v).is_multiple_of(41) { 300.0 } else { 1.0 };
                size * (((j * 37 + v * 11) % 101) as f32 / 50.0 - 1.0)
            });
            let (products, [exact, sizes]) = all(width, group, (327, n), &x);
            let what = format!("{width} bits, groups of {group}, {n} columns, {count} inputs");
            for (way, y) in &products {
                let off = |((y, exact), size): ((&f32, &f64), &f64)| (f64::from(*y) - exact).abs() / size.max(1e-30);
                let worst = y.iter().zip(&exact).zip(&sizes).map(off).fold(0.0, f64::max);
                assert!(worst < 1e-6, "{what}, {way:?}: off by {worst:e} of what is added up");
            }
            // Bytes have the same sums, whatever adds them up.
            let bytes = |way: &Way| !matches!(way, Way::Numbers(_) | Way::Narrow(Digits::Twelve));
            let mut bytes = products.iter().filter(|(way, _)| bytes(way));
            if let Some((first, sums)) = bytes.next() {
                for (way, y) in bytes {
                    assert_eq!(sums.mapv(f32::to_bits), y.mapv(f32::to_bits), "{what}, {first:?}, {way:?}");
                }
            }
        }
    }
}

#[test]
fn inputs_that_are_not_finite_make_no_numbers() {
    for (bits, group) in [(4, 64), (3, 32), (8, 64)] {
        let mut x = Array2::from_elem((256, 20), 0.5f32);
        // (Of the last, what is left of a number that is cut is not all zero.)
        (x[[3, 7]], x[[200, 11]], x[[77, 2]]) = (f32::NAN, f32::INFINITY, f32::from_bits(0x7f80_0001));
        for (way, y) in all(bits, group, (40, 256), &x).0 {
            assert!(y.indexed_iter().all(|((_, v), y)| y.is_nan() == [2, 7, 11].contains(&v)), "{way:?}");
        }
    }
}

#[test]
fn inputs_are_the_sums_of_their_numbers() {
    // All exponents but the least, all lengths of numbers.
    let x = Array2::from_shape_fn((320, LANES), |(j, v)| {
        let bits = ((j * 31 + v * 7 + 1) as u32).wrapping_mul(0x9e37_79b9);
        f32::from_bits((bits & 0x807f_ffff & !((1 << (j % 24)) - 1)) | (60 + (j * 5 + v) as u32 % 190) << 23)
    });
    // Where a chunk's codes begin in the same 16 bits: those of 4 columns and the next 4, of 8 and the next 8, of 2 and 2.
    for (bits, half) in [(4, 4), (2, 8), (3, 2), (5, 2)] {
        let Some(laid_out) = Inputs::new(x.view(), bits, 64).filter(|x| x.way == Way::Numbers(LANES)) else {
            assert!(!matrix::available());
            continue;
        };
        for (step, digits) in laid_out.numbers::<LANES>().iter().enumerate() {
            for (v, at) in (0..LANES).flat_map(|v| (0..32).map(move |at| (v, at))) {
                let word = |digit: usize| digits[digit][v].0[at / 2] as u32 >> (at % 2 * 16) << 16;
                let number = |digit| f64::from(f32::from_bits(word(digit)));
                let column = step * 32 + at / 2 / half * 2 * half + at / 2 % half + at % 2 * half;
                // (A run that fills the last block has no columns.)
                let whole = x.get((column, v)).map_or(0.0, |&x| f64::from(x));
                assert_eq!(number(0) + number(1) + number(2), whole, "{bits} bits, {column}, {v}");
            }
        }
    }
}

#[test]
fn rows_without_columns_have_no_kernel() {
    assert_eq!(Layout::new::<f32>(4, 32, 1).is_some(), available() || Digits::all(4).next().is_some());
    assert!([1, 32].iter().all(|&group| Layout::new::<f32>(4, group, 0).is_none()));
}

#[test]
fn rows_know_nothing_of_the_scales_of_others() {
    // Three runs, of which blocks have two: what would be the fourth belongs to the rows that come next.
    let (m, n, group) = (64, 96, 32);
    let scales: Vec<f32> = (0..m * 3).map(|at| if at < 32 * 3 { 0.5 } else { f32::MAX }).collect();
    let (zeros, mut codes) = (vec![0; m * 3], Vec::new());
    (0..m).for_each(|_| pack(4, &[1; 96], &mut codes));
    let beside = Beside { scales: &scales, zeros: Some(&zeros), offsets: None };
    let codes = PackedCodes::new(4, group, (m, n), codes, beside);
    let rows = CodedRows { group, codes: &codes, groups: 3, beside };
    for count in [1, 8, 16] {
        let Some(x) = Inputs::new(Array2::from_elem((n, count), 1f32).view(), 4, group) else {
            assert!(!available() && Digits::all(4).next().is_none());
            continue;
        };
        let mut y = vec![f32::NAN; m * count];
        products(&rows, 0..m, &x, &mut y);
        assert!(y[..32 * count].iter().all(|&y| y == 48.0), "{count} inputs: {:?}", &y[..count]);
    }
}

#[test]
fn inputs_of_one_sign_are_no_less_exact() {
    // What numbers of codes have too much is several times the codes themselves, and all of one sign then.
    for (bits, group, n) in
        (2..=7).flat_map(|bits| [(32, 32), (32, 640), (64, 64), (128, 128), (512, 512)].map(|(g, n)| (bits, g, n)))
    {
        let x = Array2::from_shape_fn((n, 16), |(j, v)| 1.0 + ((j * 37 + v * 11 + j * j * 3) % 1009) as f32 / 1009.0);
        let (products, [exact, sizes]) = all(bits, group, (96, n), &x);
        for (way, y) in products {
            let off = |((y, exact), size): ((&f32, &f64), &f64)| (f64::from(*y) - exact).abs() / size;
            let worst = y.iter().zip(&exact).zip(&sizes).map(off).fold(0.0, f64::max);
            assert!(worst < 1e-6, "{bits} bits, groups of {group}, {n} columns, {way:?}: off by {worst:e}");
        }
    }
}

#[test]
fn lines_are_the_same_by_all_instructions() {
    let chunks = std::array::from_fn(|at| (at * 31 + at / 256) as u8);
    let exact: [[u8; LINE]; PANEL] =
        std::array::from_fn(|row| std::array::from_fn(|at| chunks[(at / EACH * PANEL + row) * EACH + at % EACH]));
    let narrow = Digits::all(4).next().is_some();
    for (found, present) in [(lines(&chunks), available() || narrow), (avx2::lines(&chunks), narrow)] {
        assert_eq!(found, present.then_some(exact));
    }
}

#[test]
fn digits_meet_no_codes_that_do_not_fit_them() {
    // (Codes of three and of eight bits are cut the same way.)
    let x = Array2::from_elem((64, 2), 1f32);
    for (bits, digits) in [3u8, 7, 8].into_iter().flat_map(|bits| Digits::all(bits).map(move |digits| (bits, digits))) {
        // (There are digits, and so there is a kernel.)
        let layout = Layout::new::<f32>(bits, 64, 64).unwrap();
        let x = Inputs::laid_out(x.view(), layout, Way::Narrow(digits));
        for other in [3, 7, 8] {
            let fits = digits == Digits::Bytes || (bits == 8) == (other == 8);
            assert_eq!(x.meet::<f32>(other, 64, 64), fits, "{digits:?} of {bits} bits with {other}");
        }
    }
}

#[test]
fn no_sum_of_the_largest_products_overflows() {
    // Bytes -126, -128, -128 and 126, 127, 127 of units of one, with the largest codes.
    for (bits, n, whole) in (2..=8)
        .flat_map(|bits| [(64, -8_290_432.0), (512, -8_290_432.0), (512, 8_290_175.0)].map(|(n, w)| (bits, n, w)))
    {
        let (m, most) = (32, f64::from(u8::MAX >> (8 - bits)));
        let (scales, zeros, mut codes) = (vec![1f32; m], vec![0; m], Vec::new());
        (0..m).for_each(|_| pack(bits, &vec![most as u8; n], &mut codes));
        let beside = Beside { scales: &scales, zeros: Some(&zeros), offsets: None };
        let codes = PackedCodes::new(bits, n, (m, n), codes, beside);
        let rows = CodedRows { group: n, codes: &codes, groups: 1, beside };
        let Some(layout) = Layout::new::<f32>(bits, n, n) else {
            assert!(!available() && Digits::all(bits).next().is_none());
            continue;
        };
        let four = four::shape(&layout).filter(|_| matrix::available()).map(Way::Bytes);
        let ways = Digits::all(bits).map(Way::Narrow).chain(available().then_some(Way::Vectors)).chain(four);
        for (way, count) in ways.flat_map(|way| [1, 2, 4].map(|count| (way, count))) {
            let x = Inputs::laid_out(Array2::from_elem((n, count), whole as f32).view(), layout, way);
            let (mut y, exact) = (vec![f32::NAN; m * count], most * whole * n as f64);
            products(&rows, 0..m, &x, &mut y);
            let off = y.iter().map(|&y| (f64::from(y) - exact).abs() / exact.abs()).fold(0.0, f64::max);
            assert!(off < 1e-6, "{bits} bits, {n} columns, {count} inputs, {way:?}: off by {off:e}");
        }
    }
}
