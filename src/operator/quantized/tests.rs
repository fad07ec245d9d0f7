use ndarray::{Array2, array};

use super::*;
use crate::operator::codec::{Decoder, Encoder};
use crate::operator::{Dense, Operator};
use crate::scalar::DType;
use crate::testing::numbers;

fn grid(m: usize, n: usize, bits: u8, group: usize, zero: ZeroPoint) -> Grid<f64> {
    let groups = n.div_ceil(group);
    let scales = Array2::from_shape_fn((m, groups), |(i, g)| 0.25 + ((i * 5 + g * 3) % 7) as f64 / 16.0);
    let zeros = Array2::from_shape_fn((m, groups), |(i, g)| ((i * 11 + g * 7) % (1 << bits)) as u8);
    let scales = Dense::rounded(scales, DType::F16).unwrap();
    let offsets = || Dense::rounded(zeros.mapv(|z| f64::from(z) / 64.0 - 0.7), DType::F16).unwrap();
    let zeros = match zero {
        ZeroPoint::None => ZeroPoints::None,
        ZeroPoint::Float => ZeroPoints::Float(offsets()),
        ZeroPoint::Integer => ZeroPoints::Integer(zeros),
    };
    Grid::new(bits, group, scales, zeros).unwrap()
}

#[test]
fn multiplies_as_its_dense_form_at_all_widths_and_groups() {
    for (m, n, group) in [(3, 1, 1), (2, 31, 64), (5, 64, 32), (4, 130, 32), (3, 257, 128), (2, 300, 7), (130, 96, 16)]
    {
        let kinds = [ZeroPoint::None, ZeroPoint::Integer, ZeroPoint::Float];
        for (bits, zero) in Grid::<f64>::BITS.flat_map(|bits| kinds.map(|zero| (bits, zero))) {
            let grid = grid(m, n, bits, group, zero);
            let wide = Quantized::nearest((numbers(m, n, 31) * 4.0).view(), grid.clone()).unwrap();
            let dense = wide.to_dense();
            // What is on the grid stays what it is.
            assert_eq!(Quantized::nearest(dense.view(), grid).unwrap(), wide);
            let single = {
                let grid = wide.grid();
                let scales = Dense::rounded(grid.scales().values().mapv(|v| v as f32), DType::F16).unwrap();
                let zeros = match grid.zeros() {
                    ZeroPoints::None => ZeroPoints::None,
                    ZeroPoints::Integer(zeros) => ZeroPoints::Integer(zeros.clone()),
                    ZeroPoints::Float(zeros) => {
                        ZeroPoints::Float(Dense::rounded(zeros.values().mapv(|v| v as f32), DType::F16).unwrap())
                    }
                };
                let grid = Grid::new(bits, group, scales, zeros).unwrap();
                Quantized::new(n, grid, wide.codes().to_vec()).unwrap()
            };
            assert_eq!(single.to_dense().mapv(f64::from), dense);
            for b in [1, 3, 5, 40] {
                let x = numbers(n, b, 17);
                let (exact, scale) = (dense.dot(&x), dense.mapv(f64::abs).dot(&x.mapv(f64::abs)));
                let close = |got: Array2<f64>, eps: f64| {
                    let off = (&got - &exact).mapv(f64::abs) - &scale * eps;
                    assert!(off.iter().all(|&v| v <= 1e-9), "{m}x{n}, {bits} bits, group {group}, batch {b}");
                };
                close(wide.product(x.view()), 1e-13);
                close(single.product(x.mapv(|v| v as f32).view()).mapv(f64::from), 4e-6);
            }
            let y = numbers(m, 2, 19);
            let turned = &wide.product_transposed(y.view()) - &dense.t().dot(&y);
            assert!(turned.iter().all(|v| v.abs() < 1e-9));
            let zeros = match wide.grid().zeros() {
                ZeroPoints::Float(zeros) => zeros.bytes(),
                _ => wide.grid().packed_zeros().map_or(0, |zeros| zeros.len() as u64),
            };
            let stored = wide.codes().len() as u64 + wide.grid().scales().bytes() + zeros;
            assert_eq!((stored, stored), (wide.bytes(), Grid::<f64>::bytes_of((m, n), bits, group, zero)));
        }
    }
}

#[test]
fn a_row_by_hand() {
    // 3 bits, groups of 2: codes 0…7, the zero of a symmetric grid at 4.
    let grid = Grid::new(3, 2, Dense::new(array![[0.5, 2.0]]), ZeroPoints::None).unwrap();
    let row = Quantized::nearest(array![[-9.0, 1.2, 6.0, -1.1]].view(), grid).unwrap();
    assert_eq!(row.to_dense(), array![[-2.0, 1.0, 6.0, -2.0]]);
    // Codes 0, 6, 7, 3 in three bits each, the lowest first.
    assert_eq!(row.codes()[..], [0b1111_0000, 0b0000_0111]);
    let zeros = Grid::<f64>::unpack_zeros(3, (1, 3), &[0b1101_0001, 0b0000_0001]).unwrap();
    assert_eq!(zeros, array![[1, 2, 7]]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let scales = || Dense::new(array![[1.0, 1.0]]);
    assert!(Grid::new(1, 2, scales(), ZeroPoints::None).is_err());
    assert!(Grid::new(9, 2, scales(), ZeroPoints::None).is_err());
    assert!(Grid::new(4, 0, scales(), ZeroPoints::None).is_err());
    assert!(Grid::new(2, 2, scales(), ZeroPoints::Integer(array![[1, 4]])).is_err());
    assert!(Grid::new(2, 2, scales(), ZeroPoints::Integer(array![[1], [1]])).is_err());
    let grid = || Grid::new(3, 2, scales(), ZeroPoints::None).unwrap();
    assert!(Quantized::new(5, grid(), vec![0; 2]).is_err());
    assert!(Quantized::new(3, grid(), vec![0; 3]).is_err());
    assert!(Quantized::new(3, grid(), vec![0, 0b10]).is_err());
    assert!(Quantized::new(3, grid(), vec![0, 1]).is_ok());
    assert!(Quantized::new(0, grid(), vec![]).is_err());
    assert!(Grid::<f64>::unpack_zeros(3, (2, 3), &[0; 3]).is_err());
}

#[test]
fn inputs_of_another_length_are_refused() {
    let grid = || {
        Grid::new(4, 64, Dense::rounded(Array2::from_elem((40, 2), 0.25f32), DType::F16).unwrap(), ZeroPoints::None)
            .unwrap()
    };
    // A panel of rows, and fewer.
    let whole = Quantized::new(100, grid(), vec![0x52; 40 * 50]).unwrap();
    let few = Grid::new(4, 64, Dense::new(array![[0.25f32, 0.5]]), ZeroPoints::None).unwrap();
    let few = Quantized::new(100, few, vec![0x52; 50]).unwrap();
    for (w, n, b) in [(&whole, 99, 1), (&whole, 101, 9), (&few, 99, 1), (&few, 101, 1), (&few, 101, 9)] {
        let x = Array2::<f32>::ones((n, b));
        assert!(Operator::Quantized(w.clone()).apply(x.view()).is_err());
        assert!(std::panic::catch_unwind(|| w.product(x.view())).is_err(), "{n} inputs, batch {b}");
        let y = Array2::<f32>::ones((w.shape().0 + n - 100, b));
        assert!(std::panic::catch_unwind(|| w.product_transposed(y.view())).is_err(), "{n} outputs, batch {b}");
    }
}

#[test]
fn inputs_of_any_size_count() {
    // With rows side by side, and without.
    [6, 40].into_iter().for_each(any_size);
}

fn any_size(m: usize) {
    let n: usize = 1100;
    let scales = Dense::rounded(Array2::from_elem((m, n.div_ceil(64)), 0.25f32), DType::F16).unwrap();
    let grid = Grid::new(5, 64, scales, ZeroPoints::None).unwrap();
    let w = Quantized::nearest((numbers(m, n, 31) * 4.0).mapv(|v| v as f32).view(), grid).unwrap();
    let dense = w.to_dense().mapv(f64::from);
    for b in [1, 2, 3] {
        // From 1e-42, which is subnormal, to 1e28 in one vector, and vectors that are zero but for one.
        let mut x = Array2::from_shape_fn((n, b), |(i, j)| {
            (((i * 37 + j * 11) % 101) as f32 / 50.0 - 1.0) * 10f32.powi((i / 64) as i32 * 4 - 42 + j as i32)
        });
        let y = w.product(x.view());
        for ((i, j), &got) in y.indexed_iter() {
            let terms = dense.row(i).iter().zip(x.column(j)).map(|(w, &x)| w * f64::from(x)).collect::<Vec<_>>();
            let (exact, size) = (terms.iter().sum::<f64>(), terms.iter().map(|t| t.abs()).sum::<f64>());
            assert!((f64::from(got) - exact).abs() <= 1e-6 * size, "{got} {exact}");
        }
        x.fill(0.0);
        x[(n - 1, b - 1)] = 1.0;
        assert_eq!(w.product(x.view()).column(b - 1).mapv(f64::from), dense.column(n - 1));
        for bad in [f32::NAN, f32::INFINITY] {
            x[(70, b - 1)] = bad;
            let y = w.product(x.view());
            assert!(y.column(b - 1).iter().all(|v| !v.is_finite()));
            assert!(b == 1 || y.column(0).iter().all(|&v| v == 0.0));
        }
    }
}

#[test]
fn no_rows_make_no_numbers() {
    for b in [1, 9] {
        let none = Quantized::<f64>::new(8, grid(0, 8, 4, 8, ZeroPoint::None), Vec::new()).unwrap();
        assert_eq!(none.product(numbers(8, b, 3).view()), Array2::<f64>::zeros((0, b)));
        assert_eq!(none.product_transposed(Array2::<f64>::zeros((0, b)).view()), Array2::<f64>::zeros((8, b)));
        assert_eq!(none.to_dense(), Array2::<f64>::zeros((0, 8)));
    }
}

#[test]
fn fewer_bits_of_inputs_are_off_by_what_they_round() {
    let (m, n) = (40usize, 300usize);
    for (bits, group) in [(8, 128), (4, 32), (3, 300), (5, 7)] {
        let scales = Dense::new(Array2::from_elem((m, n.div_ceil(group)), 0.125f32));
        let grid = Grid::new(bits, group, scales, ZeroPoints::None).unwrap();
        let w = Quantized::nearest((numbers(m, n, 31) * 2.0).mapv(|v| v as f32).view(), grid).unwrap();
        let dense = w.to_dense().mapv(f64::from);
        for (activations, b) in ActivationBits::ALL.into_iter().flat_map(|of| [1, 2, 3, 4, 8, 9, 17].map(|b| (of, b))) {
            let x = numbers(n, b, 17).mapv(|v| v as f32);
            let met = w.clone().with_activation_bits(activations);
            assert_eq!(met.activation_bits(), activations);
            assert_eq!(met.select(&[3, 1]).unwrap().activation_bits(), activations);
            let (y, x) = (met.product(x.view()).mapv(f64::from), x.mapv(f64::from));
            let off = (&y - &dense.dot(&x)).mapv(f64::abs);
            // Half a unit of each input, in which the largest of all has no more than so many.
            let largest = x.fold(0f64, |most, x| most.max(x.abs()));
            let half = largest / (127.0 * 2f64.powi(i32::from(activations.bits()) - 8)) / 2.0;
            let most = &dense.mapv(f64::abs).sum_axis(ndarray::Axis(1)).insert_axis(ndarray::Axis(1)) * (half * 1.01);
            let rounding = dense.mapv(f64::abs).dot(&x.mapv(f64::abs)) * 2e-6;
            let within = (off - most - rounding).iter().all(|&of| of <= 0.0);
            assert!(within, "{bits} bits, groups of {group}, {activations:?}, {b} vectors");
        }
    }
}

#[test]
fn files_say_nothing_of_the_bits_of_inputs() {
    let leaf = |m, n| {
        let grid = grid(m, n, 4, 32, ZeroPoint::None);
        Quantized::nearest(numbers(m, n, 31).view(), grid).unwrap()
    };
    let tree = |left: Quantized<f64>, right: Quantized<f64>| {
        let shared = Operator::Shared(std::sync::Arc::new(Operator::Quantized(right)));
        Operator::product_of(vec![Operator::Quantized(left), shared]).unwrap()
    };
    let whole = tree(leaf(9, 40), leaf(40, 64));
    for activations in ActivationBits::ALL {
        let met = tree(leaf(9, 40).with_activation_bits(activations), leaf(40, 64).with_activation_bits(activations));
        let mut encoder = Encoder::new();
        let node = encoder.encode("w", &met).unwrap();
        let tensors = encoder.into_tensors();
        assert_eq!(Decoder::<_, f64>::new(&tensors).decode(&node).unwrap(), whole);
        let again = Decoder::<_, f64>::new(&tensors).with_activation_bits(activations).decode(&node).unwrap();
        assert_eq!(again, met);
        assert_eq!(again == whole, activations == ActivationBits::default());
    }
}

#[test]
fn codes_and_zero_points_have_a_row_for_each_row_of_scales() {
    for m in [6, 0] {
        let leaf = Quantized::nearest(numbers(m, 16, 31).view(), grid(m, 16, 4, 4, ZeroPoint::Integer)).unwrap();
        let mut encoder = Encoder::new();
        let node = encoder.encode("w", &Operator::Quantized(leaf.clone())).unwrap();
        let tensors = encoder.into_tensors();
        assert_eq!(Decoder::<_, f64>::new(&tensors).decode(&node).unwrap(), Operator::Quantized(leaf));
        let bytes: Vec<usize> = (0..tensors.len()).filter(|&at| tensors[at].dtype == DType::U8).collect();
        assert_eq!(bytes.len(), 2);
        assert!(bytes.iter().all(|&at| tensors[at].shape.iter().product::<usize>() == tensors[at].bytes.len()));
        // As many bytes in other rows.
        for at in bytes {
            let mut tensors = tensors.clone();
            tensors[at].shape = vec![3, tensors[at].bytes.len() / 3];
            let why = Decoder::<_, f64>::new(&tensors).decode(&node).unwrap_err().to_string();
            assert!(why.contains(&tensors[at].name) && why.contains(&format!("({m}, ")), "{why}");
        }
    }
}
