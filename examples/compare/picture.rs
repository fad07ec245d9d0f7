//! Quality against bytes on disk, every method a line.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::{Comparison, Outcome};

/// What is so many times worse than the best compressed result would flatten all the rest, and is left to the table.
const HIGHEST: f64 = 1e3;

/// Draws an SVG picture; the axis of quality is logarithmic.
pub fn draw(path: &Path, all: &Comparison) -> Result<()> {
    let shown = |r: &Outcome| r.loss.is_finite() && r.loss > 0.0;
    let mut losses: Vec<f64> = all.rows.iter().filter_map(|row| row.result).filter(shown).map(|r| r.loss).collect();
    losses.sort_by(f64::total_cmp);
    let Some(&best) = losses.first() else { return Ok(()) };
    let worst = losses.iter().copied().filter(|&loss| loss <= best * HIGHEST).fold(best, f64::max);
    let inside = |r: &Outcome| shown(r) && r.loss <= worst;
    let sizes: Vec<f64> = all.rows.iter().filter_map(|row| row.result).map(|r| megabytes(&r)).collect();
    let (low, high) = sizes.iter().fold((f64::INFINITY, 0.0f64), |(low, high), &v| (low.min(v), high.max(v)));
    let drawn = || -> Result<(), Box<dyn std::error::Error>> {
        let root = SVGBackend::new(path, (1080, 640)).into_drawing_area();
        root.fill(&WHITE)?;
        // Few powers of ten lie between figures that are close to each other.
        let base = if worst / best < 100.0 { 2.0 } else { 10.0 };
        let y = ((best / 1.3)..(worst * 1.3)).log_scale().base(base);
        let mut chart = ChartBuilder::on(&root)
            .margin(16)
            .x_label_area_size(40)
            .y_label_area_size(80)
            .build_cartesian_2d((low * 0.95)..(high * 1.05), y)?;
        let figure = |v: &f64| if *v < 1e-2 { format!("{v:.0e}") } else { format!("{v}") };
        chart.configure_mesh().x_desc("MB on disk").y_desc(&all.loss).y_label_formatter(&figure).draw()?;
        let mut names: Vec<&str> = all.rows.iter().map(|row| row.line.as_str()).collect();
        names.dedup();
        for (at, name) in names.into_iter().enumerate() {
            let rows = || all.rows.iter().filter(|row| row.line == name);
            let baseline = rows().any(|row| row.baseline);
            let color = Palette99::pick(at).to_rgba();
            let width = if baseline { 1 } else { 2 };
            let mut points: Vec<(f64, f64)> =
                rows().filter_map(|row| row.result).filter(inside).map(|r| (megabytes(&r), r.loss)).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let style = color.stroke_width(width);
            chart
                .draw_series(LineSeries::new(points.iter().copied(), style))?
                .label(if baseline { format!("{name} (baseline)") } else { name.to_owned() })
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], style));
            let dot = if baseline { ShapeStyle::from(color) } else { color.filled() };
            chart.draw_series(points.into_iter().map(|at| Circle::new(at, 4, dot)))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()?;
        root.present()?;
        Ok(())
    };
    drawn().map_err(|why| anyhow!("drawing {}: {why}", path.display()))
}

fn megabytes(outcome: &Outcome) -> f64 {
    outcome.file_bytes as f64 / 1e6
}
