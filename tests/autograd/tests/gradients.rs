//! The hand-written reverse pass against candle's automatic differentiation, on the bundled model.

use std::path::Path;

use candle_core::DType;
use weightpress::checkpoint::Checkpoint;
use weightpress_autograd::support::llama::Llama;
use weightpress_autograd::{Apart, Reference};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/model");

#[test]
fn fisher_sums_by_hand_are_those_of_candle() {
    let checkpoint = Checkpoint::open(MODEL).unwrap();
    let text: Vec<usize> = std::fs::read(Path::new(MODEL).join("calibration.txt")).unwrap()[..512]
        .iter()
        .map(|&byte| usize::from(byte))
        .collect();
    // Windows of different lengths, two of them longer than a head is wide.
    let windows = [&text[..200], &text[200..391], &text[391..400], &text[400..402]];
    let model = Llama::load(&checkpoint).unwrap();
    let by_hand = model.fisher(&windows, &|_| ()).unwrap();
    // In f32 as the hand-written pass; in f64, beside which both show their rounding.
    for (dtype, norm, entry) in [(DType::F32, 1e-4, 1e-3), (DType::F64, 1e-4, 1e-3)] {
        let candle = Reference::load(&checkpoint, dtype).unwrap();
        for window in windows {
            let loss = candle.loss(window).unwrap().to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap();
            let ours = model.mean_loss(window, window.len(), &|_| ()).unwrap();
            assert!((loss - ours).abs() < 1e-5 * ours, "{loss} {ours}");
        }
        let apart = Apart::between(&by_hand, &candle.fisher(&windows, &|_| ()).unwrap(), 6).unwrap();
        println!("{dtype:?}: {apart}");
        assert!(apart.vectors == 84 && apart.norm < norm && apart.entry < entry, "{dtype:?}: {apart}");
    }
}
