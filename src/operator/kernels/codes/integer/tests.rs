use ndarray::{Array2, Axis};

use super::super::{Beside, CodedRows, PackedCodes, pack};
use super::avx2::Digits;
use super::way::Layout;
use super::*;

/// Ways that so many inputs go, by vectors of eight rows in all digits there are and by those of sixteen, of what the machine has: with how
/// columns are cut then.
fn by_vectors(inputs: usize, bits: u8, group: usize, n: usize) -> Vec<(Way, Layout)> {
    let narrow = |of| Digits::all(inputs, bits, of).map(Way::Narrow).chain(available().then_some(Way::Vectors(of)));
    let ways = ActivationBits::ALL.into_iter().flat_map(narrow);
    ways.map(|way| (way, way.layout(bits, group, n).unwrap())).collect()
}

/// Ways by matrix instructions, a unit of each panel after the other, and inputs: of all shapes, if the machine has them.
fn by_turns(bits: u8, group: usize, n: usize) -> Vec<(usize, Way, Layout)> {
    let layout = Layout::cut(bits, group, n, turns::COLUMNS).unwrap();
    let all = [4, 8, 16].into_iter().flat_map(|inputs| ActivationBits::ALL.map(|of| (inputs, of)));
    let shapes = all.filter_map(|(inputs, of)| Some((inputs, turns::shape(inputs, of, bits, &layout)?)));
    let shapes = shapes.filter(|_| matrix::available());
    shapes.map(|(inputs, shape)| (inputs, Way::Turns(shape), layout)).collect()
}

/// A product, with the way that was taken and the most that rounded inputs may make of it.
type Product = (Way, Array2<f32>, Array2<f64>);

/// Products with inputs that go all ways, by matrix instructions too if the machine has them; with the exact products, and with
/// those of the sizes of what is added up.
fn all(bits: u8, group: usize, (m, n): (usize, usize), x: &Array2<f32>) -> (Vec<Product>, [Array2<f64>; 2]) {
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
    let laid_out = by_vectors(x.ncols(), bits, group, n).into_iter();
    let laid_out = laid_out.map(|(way, layout)| Inputs::laid_out(x.view(), layout, way));
    let full = ActivationBits::TwentyFour;
    let by_matrices = |of| {
        let found = Inputs::new(x.view(), of, bits, group);
        found.filter(|x| matches!(x.way, Way::Turns(_) | Way::Bytes(_) | Way::Numbers(_)))
    };
    let (matrices, fewer) = (by_matrices(full), by_matrices(ActivationBits::Sixteen));
    // The fastest there is was taken.
    let run = Layout::cut(bits, group, n, 128).unwrap().run;
    let fewest = |of_64| match run {
        32 => 3,
        64 => of_64,
        128 => 2,
        _ => TOGETHER + 1,
    };
    assert_eq!(matrices.is_some(), matrix::available() && x.ncols() >= fewest(2));
    assert_eq!(fewer.is_some(), matrix::available() && x.ncols() >= fewest(3));
    assert_eq!(takes::<f32>(bits, group, n), available() || Digits::all(1, bits, full).next().is_some());
    let product = |x: &Inputs| {
        let mut y = Array2::from_elem((m, x.vectors), f32::NAN);
        let rows = CodedRows { group, codes: &codes, groups, beside, activations: x.way.activations() };
        // Calls begin at panels.
        for (at, y) in y.as_slice_mut().unwrap().chunks_mut(64 * x.vectors).enumerate() {
            products(&rows, at * 64..(at * 64 + 64).min(m), x, y);
        }
        y
    };
    // Half of a unit, of the largest input of each run, for each entry.
    let rounding = |x_of: &Inputs| {
        let unit = 1.0 / f64::from(2 * (127u32 << (8 * (x_of.way.activations().bytes() - 1))));
        let mut most = x.mapv(|x| f64::from(x.abs()) * unit);
        for mut run in most.axis_chunks_iter_mut(Axis(0), x_of.layout.run) {
            let largest = run.fold_axis(Axis(0), 0f64, |most, x| most.max(*x));
            run.assign(&largest);
        }
        dense.mapv(f64::abs).dot(&most)
    };
    let all = laid_out.chain(matrices).chain(fewer).map(|x| (x.way, product(&x), rounding(&x)));
    (all.collect(), exact)
}

/// The most that products are off, in what is added up, beside what rounded inputs may make of them. (A unit may be twice as large as
/// it had to be where all bits of an `f32` are there.)
fn worst((way, y, rounding): &Product, [exact, sizes]: &[Array2<f64>; 2]) -> f64 {
    let slack = if way.activations() == ActivationBits::TwentyFour { 0.0 } else { 1.001 };
    let off = y.iter().zip(exact).zip(rounding.iter().zip(sizes));
    off.map(|((&y, exact), (most, size))| ((f64::from(y) - exact).abs() - slack * most) / size.max(1e-30))
        .fold(0.0, f64::max)
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
        for count in [1, 2, 3, 5, 8, 10, 11, 16, 17, 40] {
            let x = Array2::from_shape_fn((n, count), |(j, v)| {
                let size = if (j + v).is_multiple_of(41) { 300.0 } else { 1.0 };
                size * (((j * 37 + v * 11) % 101) as f32 / 50.0 - 1.0)
            });
            let (products, of) = all(width, group, (327, n), &x);
            let what = format!("{width} bits, groups of {group}, {n} columns, {count} inputs");
            for product in &products {
                let worst = worst(product, &of);
                assert!(worst < 1e-6, "{what}, {:?}: off by {worst:e} of what is added up", product.0);
            }
            // As many bytes, in runs as long, have the same sums, whatever adds them up.
            let bytes = |way: &Way| {
                !matches!(way, Way::Numbers(_) | Way::Narrow(Digits::Twelve | Digits::Sixteen | Digits::Numbers(_)))
            };
            let bytes: Vec<_> = products.iter().filter(|(way, ..)| bytes(way)).collect();
            let cut = |way: Way| (way.activations(), way.layout(width, group, n));
            for (at, (first, sums, _)) in bytes.iter().enumerate() {
                for (way, y, _) in bytes[at + 1..].iter().filter(|(way, ..)| cut(*way) == cut(*first)) {
                    assert_eq!(sums.mapv(f32::to_bits), y.mapv(f32::to_bits), "{what}, {first:?}, {way:?}");
                }
            }
        }
    }
}

#[test]
fn inputs_meet_rows_in_blocks() {
    // Of so many columns there are sixteen in a block.
    let n = 11_000;
    let x = Array2::from_shape_fn((n, 41), |(j, v)| ((j * 37 + v * 11) % 101) as f32 / 50.0 - 1.0);
    for (bits, group) in [(4, 64), (3, 32), (8, n)] {
        for (way, layout) in by_vectors(41, bits, group, n) {
            let laid_out = Inputs::laid_out(x.view(), layout, way);
            let block = Meeting::new(&laid_out, bits).block(&laid_out);
            let several = matches!(way, Way::Vectors(_)) && layout.run > 32;
            assert_eq!(block, if several { LANES } else { laid_out.padded() }, "{way:?}, runs of {}", layout.run);
        }
        let (products, of) = all(bits, group, (70, n), &x);
        for product in &products {
            let worst = worst(product, &of);
            assert!(worst < 1e-6, "{bits} bits, groups of {group}, {:?}: off by {worst:e}", product.0);
        }
    }
}

#[test]
fn stretches_of_blocks_are_all_tiles() {
    let counts = [1, 2, 4, 6, 9, 16, 17, 28, 32, 41, 64, 71];
    // (Blocks are whole tiles; those of numbers are as wide as parts of all inputs.)
    let whole = |(way, _): &(Way, Layout)| LANES.is_multiple_of(way.width());
    let of = |count| by_vectors(count, 4, 64, 64).into_iter().filter(whole).map(move |way| (count, way));
    for (count, (way, layout)) in counts.into_iter().flat_map(of) {
        let x = Inputs::laid_out(Array2::from_elem((64, count), 1f32).view(), layout, way);
        for (block, together) in [(16, true), (32, true), (64, true), (16, false), (128, false)] {
            let blocks = (0..x.padded()).step_by(block).map(|first| first..x.padded().min(first + block));
            let stretches: Vec<_> = blocks.clone().flat_map(|block| x.stretches(block, together)).collect();
            let tiles = stretches
                .iter()
                .flat_map(|&(first, count, tiles)| (0..tiles).map(move |at| (first + at * count, count)));
            assert!(tiles.eq(x.tiles()), "{count} vectors in blocks of {block}: {stretches:?}");
            // One for each block, and for what is left.
            assert!(!together || stretches.len() <= blocks.count() + 1, "{stretches:?}");
        }
    }
}

/// Units are all that changes where inputs are larger or smaller by a power of two.
#[test]
fn inputs_may_be_of_any_size() {
    let x = Array2::from_shape_fn((300, 7), |(j, v)| ((j * 37 + v * 11) % 101) as f32 / 50.0 - 1.0);
    for (bits, group) in [(2, 64), (3, 32), (4, 128), (7, 64), (8, 300)] {
        let (products, _) = all(bits, group, (40, 300), &x);
        for factor in [100, -90].map(|power| 2f32.powi(power)) {
            for ((way, y, _), (_, scaled, _)) in products.iter().zip(all(bits, group, (40, 300), &(&x * factor)).0) {
                assert_eq!(
                    (y * factor).mapv(f32::to_bits),
                    scaled.mapv(f32::to_bits),
                    "{bits} bits, {way:?}, {factor:e}"
                );
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
        for (way, y, _) in all(bits, group, (40, 256), &x).0 {
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
        let Some(laid_out) =
            Inputs::new(x.view(), Default::default(), bits, 64).filter(|x| x.way == Way::Numbers(LANES))
        else {
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
    let full = ActivationBits::TwentyFour;
    assert_eq!(takes::<f32>(4, 32, 1), available() || Digits::all(1, 4, full).next().is_some());
    assert!([1, 32].iter().all(|&group| !takes::<f32>(4, group, 0)));
    assert!(!takes::<f64>(4, 32, 64));
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
    for (activations, count) in ActivationBits::ALL.into_iter().flat_map(|of| [1, 3, 8, 16].map(|count| (of, count))) {
        let rows = CodedRows { group, codes: &codes, groups: 3, beside, activations };
        let Some(x) = Inputs::new(Array2::from_elem((n, count), 1f32).view(), activations, 4, group) else {
            assert!(!available() && Digits::all(count, 4, activations).next().is_none());
            continue;
        };
        let mut y = vec![f32::NAN; m * count];
        products(&rows, 0..m, &x, &mut y);
        let close = |y: &f32| (y - 48.0).abs() < 1e-4;
        assert!(y[..32 * count].iter().all(close), "{count} inputs in {activations:?}: {:?}", &y[..count]);
    }
}

#[test]
fn inputs_of_one_sign_are_no_less_exact() {
    // What numbers of codes have too much is several times the codes themselves, and all of one sign then.
    for (bits, group, n) in
        (2..=7).flat_map(|bits| [(32, 32), (32, 640), (64, 64), (128, 128), (512, 512)].map(|(g, n)| (bits, g, n)))
    {
        let x = Array2::from_shape_fn((n, 16), |(j, v)| 1.0 + ((j * 37 + v * 11 + j * j * 3) % 1009) as f32 / 1009.0);
        let (products, of) = all(bits, group, (96, n), &x);
        for product in products {
            let worst = worst(&product, &of);
            assert!(worst < 1e-6, "{bits} bits, groups of {group}, {n} columns, {:?}: off by {worst:e}", product.0);
        }
    }
}

/// What is added up is as large as the codes are, and not as all of their levels.
#[test]
fn codes_near_the_middle_are_no_less_exact() {
    let (m, n) = (32, 512);
    let x = Array2::from_shape_fn((n, 9), |(j, v)| 1.0 + ((j * 37 + v * 11 + j * j * 3) % 1009) as f32 / 1009.0);
    for bits in [3u8, 5, 6, 7, 8] {
        let number = |i: usize, j: usize| ((i * 29 + j * 13 + i * j) % 3) as f64 - 1.0;
        let (scales, mut codes) = (vec![1f32; m], Vec::new());
        let code = |i, j| (number(i, j) + f64::from(1u8 << (bits - 1))) as u8;
        (0..m).for_each(|i| pack(bits, &(0..n).map(|j| code(i, j)).collect::<Vec<_>>(), &mut codes));
        let beside = Beside { scales: &scales, zeros: None, offsets: None };
        let codes = PackedCodes::new(bits, n, (m, n), codes, beside);
        let ways = by_vectors(x.ncols(), bits, n, n).into_iter();
        for (way, layout) in ways.filter(|(way, _)| way.activations() == ActivationBits::TwentyFour) {
            let rows = CodedRows { group: n, codes: &codes, groups: 1, beside, activations: way.activations() };
            let mut y = vec![f32::NAN; m * x.ncols()];
            products(&rows, 0..m, &Inputs::laid_out(x.view(), layout, way), &mut y);
            for (at, &y) in y.iter().enumerate() {
                let terms = (0..n).map(|j| number(at / x.ncols(), j) * f64::from(x[[j, at % x.ncols()]]));
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                assert!((f64::from(y) - sum).abs() <= 3e-7 * size, "{bits} bits, {way:?}: {y} {sum}");
            }
        }
    }
}

#[test]
fn many_inputs_of_few_columns_have_rows_written_out_where_codes_become_numbers() {
    let laid_out = |columns, count| {
        Inputs::new(Array2::from_elem((columns, count), 1f32).view(), ActivationBits::TwentyFour, 4, 64)
    };
    let numbers = |x: &Inputs| matches!(x.way, Way::Narrow(Digits::Numbers(_)));
    let by_numbers = laid_out(64, 3).is_some_and(|x| numbers(&x));
    assert_eq!(laid_out(64, 48).is_some_and(|x| numbers(&x)), by_numbers);
    assert_eq!(laid_out(64, 49).is_none(), by_numbers);
    assert_eq!(laid_out(2048, 49).is_some_and(|x| numbers(&x)), by_numbers);
}

#[test]
fn inputs_serve_the_rows_they_are_laid_out_for() {
    let rows = |activations, bits| Rows { activations, bits, group: 64, columns: 64 };
    // (Codes of three and of eight bits are cut the same way.)
    for bits in [3u8, 5, 6, 7, 8] {
        for (way, layout) in by_vectors(1, bits, 64, 64) {
            for (other, asked) in [3, 5, 6, 7, 8].into_iter().flat_map(|n| ActivationBits::ALL.map(|of| (n, of))) {
                let pairs = match asked {
                    ActivationBits::Eight => 6,
                    ActivationBits::Sixteen => 4,
                    ActivationBits::TwentyFour => 5,
                };
                let fits = match way {
                    Way::Vectors(of) | Way::Narrow(Digits::Bytes(of)) => of == asked,
                    Way::Narrow(Digits::Pairs(of)) => of == asked && other <= pairs,
                    Way::Narrow(Digits::Twelve) => asked == ActivationBits::TwentyFour && other > pairs,
                    Way::Narrow(Digits::Numbers(_)) => asked == ActivationBits::TwentyFour,
                    // (Of one byte no more is asked than of two.)
                    _ => asked != ActivationBits::TwentyFour && other > pairs,
                };
                let serves = way.serves::<f32>(1, rows(asked, other)) == Some(layout);
                assert_eq!(serves, fits, "{way:?} of {bits} bits with {other}, {asked:?}");
            }
        }
    }
    // Up to four have three bytes, whatever is asked for; more have two where fewer bits are.
    assert_eq!(by_turns(4, 64, 64).len(), if matrix::available() { 3 + 2 + 2 } else { 0 });
    for (inputs, way, layout) in by_turns(4, 64, 64) {
        for asked in ActivationBits::ALL {
            let serves = way.serves::<f32>(inputs, rows(asked, 4)) == Some(layout);
            assert_eq!(serves, inputs == 4 || asked != ActivationBits::TwentyFour, "{way:?}, {asked:?}");
        }
        // (Codes of eight bits are cut otherwise.)
        assert_ne!(way.serves::<f32>(inputs, rows(ActivationBits::Eight, 8)), Some(layout), "{way:?}");
    }
    // Runs of a byte are shorter ones.
    assert!(by_vectors(1, 4, 128, 256).iter().all(|(way, layout)| match way.activations() {
        ActivationBits::Eight => layout.run == 32,
        _ => layout.run == 128,
    }));
}

#[test]
fn no_sum_of_the_largest_products_overflows() {
    // All bytes as large as they can be, and next to it, of units of one: the largest of a run decides. With the largest codes.
    for (bits, n, sign) in (2..=8).flat_map(|bits| [(64, -1.0), (512, -1.0), (512, 1.0)].map(|(n, s)| (bits, n, s))) {
        let (m, most) = (32, f64::from(u8::MAX >> (8 - bits)));
        let (scales, zeros, mut codes) = (vec![1f32; m], vec![0; m], Vec::new());
        (0..m).for_each(|_| pack(bits, &vec![most as u8; n], &mut codes));
        let beside = Beside { scales: &scales, zeros: Some(&zeros), offsets: None };
        let codes = PackedCodes::new(bits, n, (m, n), codes, beside);
        let of = |count| by_vectors(count, bits, n, n).into_iter().map(move |(way, layout)| (count, way, layout));
        let ways = [1, 2, 4, 8].into_iter().flat_map(of);
        for (count, way, layout) in ways.chain(by_turns(bits, n, n)) {
            let activations = way.activations();
            // Bytes -126, -128, -128 and 126, 127, 127 of three, as units are powers of two; else the largest there are.
            let whole = sign
                * match activations {
                    ActivationBits::Eight => 127.0,
                    ActivationBits::Sixteen => 32_512.0,
                    ActivationBits::TwentyFour if sign < 0.0 => 8_290_432.0,
                    ActivationBits::TwentyFour => 8_290_175.0,
                };
            let rows = CodedRows { group: n, codes: &codes, groups: 1, beside, activations };
            let x = Inputs::laid_out(Array2::from_elem((n, count), whole as f32).view(), layout, way);
            let (mut y, exact) = (vec![f32::NAN; m * count], most * whole * n as f64);
            products(&rows, 0..m, &x, &mut y);
            let off = y.iter().map(|&y| (f64::from(y) - exact).abs() / exact.abs()).fold(0.0, f64::max);
            assert!(off < 1e-6, "{bits} bits, {n} columns, {count} inputs, {way:?}: off by {off:e}");
        }
    }
}
