use super::*;
use crate::testing::sizes;

#[test]
fn masks_are_all_choices_in_lexicographic_order() {
    assert_eq!(Nm::TWO_FOUR.masks(), [0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100]);
    assert_eq!(Nm::new(4, 8).unwrap().masks().len(), 70);
    assert_eq!(Nm::new(7, 8).unwrap().masks().len(), 8);
    assert!(Nm::new(0, 4).is_err() && Nm::new(4, 4).is_err() && Nm::new(2, 9).is_err());
}

#[test]
fn positions_survive_packing_for_every_pattern_and_length() {
    for (n, m) in (2..=8).flat_map(|m| (1..m).map(move |n| (n, m))) {
        let pattern = Nm::new(n, m).unwrap();
        let choices = pattern.masks().len();
        for groups in [0, 1, 2, 3, 4, 7, 24, 25] {
            let ranks: Vec<u8> = (0..groups).map(|i| ((i * 7 + 5) % choices) as u8).collect();
            let bytes = pattern.pack(&ranks);
            assert_eq!(bytes.len(), pattern.position_bytes(groups * m), "{n}:{m} {groups}");
            assert_eq!(pattern.unpack(&bytes, groups).as_ref(), Some(&ranks), "{n}:{m} {groups}");
        }
    }
    assert_eq!(Nm::TWO_FOUR.position_bytes(576), 48);
    // Bytes that no row packs to: digits out of range, and digits beyond the end.
    assert_eq!(Nm::TWO_FOUR.unpack(&[216], 3), None);
    assert_eq!(Nm::TWO_FOUR.unpack(&[6], 1), None);
    assert_eq!(Nm::TWO_FOUR.unpack(&[5, 0], 3), None);
    assert_eq!(Nm::new(4, 8).unwrap().unpack(&[70], 1), None);
    assert_eq!(Nm::new(4, 8).unwrap().unpack(&[0x80], 1), None);
}

#[test]
fn zeros_keep_their_place_and_lose_their_sign() {
    let matrix = ndarray::array![[-0.0, 0.0, 3.0, 0.0, 5.0], [0.0, -0.0, -0.0, 0.0, -0.0]];
    let kept = ndarray::array![[true, false, false, true, true], [false, true, true, false, true]];
    let sparse = NmSparse::gather(Nm::TWO_FOUR, matrix.view(), kept.view(), DType::BF16).unwrap();
    assert_eq!(*sparse.ranks(), [2, 3]);
    assert!(sparse.values().values().iter().all(|v: &f64| v.is_sign_positive()));
    assert_eq!(sparse.to_dense(), ndarray::array![[0.0, 0.0, 0.0, 0.0, 5.0], [0.0; 5]]);
    let back = NmSparse::decode(Nm::TWO_FOUR, 5, &sparse.encode_positions(), sparse.values().into_owned()).unwrap();
    // A pattern whose positions are whole bits, and a length whose positions no computer could count.
    let (wide, none) = (Nm::new(4, 8).unwrap(), Dense::new(ndarray::Array2::zeros((0, 0))));
    assert!(NmSparse::<f64>::decode(wide, usize::MAX, &[], none).is_err());
    assert_eq!(back, sparse);
    let wrong = ndarray::array![[true, true, true, false, true], [true, true, false, false, true]];
    assert!(NmSparse::gather(Nm::TWO_FOUR, matrix.view(), wrong.view(), DType::F32).is_err());
}

#[test]
fn multiplies_like_its_dense_form() {
    for (n, m, rows, columns) in [(2, 4, 5, 13), (1, 4, 3, 8), (4, 8, 7, 27), (3, 5, 1, 5), (2, 4, 2, 3)] {
        let pattern = Nm::new(n, m).unwrap();
        let matrix = Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 7 + j * 3) % 11) as f64 - 5.0);
        let masks = pattern.masks();
        let kept = Array2::from_shape_fn((rows, columns), |(i, j)| {
            j / m >= columns / m || masks[(i + j / m) % masks.len()] >> (j % m) & 1 == 1
        });
        let sparse = NmSparse::gather(pattern, matrix.view(), kept.view(), DType::F64).unwrap();
        let dense = Array2::from_shape_fn((rows, columns), |at| if kept[at] { matrix[at] } else { 0.0 });
        assert_eq!(sparse.to_dense(), dense);
        let x = Array2::from_shape_fn((3, columns), |(i, j)| (i + 2 * j) as f64 - 3.0);
        assert_eq!(sparse.product(x.t()), dense.dot(&x.t()));
        let y = Array2::from_shape_fn((rows, 2), |(i, j)| (i * 2 + j) as f64);
        assert_eq!(sparse.product_transposed(y.view()), dense.t().dot(&y));
    }
}

#[test]
fn the_form_of_the_kernels_loses_nothing() {
    for &(m, n) in sizes(&[(1, 1), (1, 4), (3, 6), (5, 67), (9, 128), (2, 0)], &[(3, 6), (2, 0)]) {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let masks = Nm::TWO_FOUR.masks();
            let ranks: Vec<u8> = (0..m * (n / 4)).map(|i| (i * 5 % 6) as u8).collect();
            let dim = (m, Nm::TWO_FOUR.values_per_row(n));
            let values = Array2::from_shape_fn(dim, |(i, j)| ((i * 7 + j * 3) % 11) as f32 - 5.0);
            let leaf = Dense::rounded(values.clone(), dtype).unwrap();
            let sparse = NmSparse::new(Nm::TWO_FOUR, n, ranks.clone(), leaf.clone()).unwrap();
            assert!(!matches!(sparse.stored, Stored::Rows { .. }));
            assert_eq!((&*sparse.ranks(), &*sparse.values()), (&ranks[..], &leaf), "{m}x{n}");
            // The same in f64, which has no such form.
            let wide = Dense::rounded(values.mapv(f64::from), dtype).unwrap();
            let wide = NmSparse::new(Nm::TWO_FOUR, n, ranks.clone(), wide).unwrap();
            assert!(matches!(wide.stored, Stored::Rows { .. }) && wide.masks == masks);
            assert_eq!(
                (wide.bytes(), wide.params(), wide.flops(3)),
                (sparse.bytes(), sparse.params(), sparse.flops(3))
            );
            assert_eq!(wide.to_dense(), sparse.to_dense().mapv(f64::from));
            assert_eq!(wide.encode_positions(), sparse.encode_positions());
            let (x, y) = (Array2::from_shape_fn((n, 3), |(i, j)| (i % 5 + j) as f32), Array2::<f32>::ones((m, 2)));
            assert_eq!(wide.product(x.mapv(f64::from).view()), sparse.product(x.view()).mapv(f64::from));
            let t = sparse.product_transposed(y.view()).mapv(f64::from);
            assert_eq!(wide.product_transposed(y.mapv(f64::from).view()), t);
            assert!(sparse.apply(Array2::zeros((n + 1, 1)).view()).is_err());
        }
    }
}
