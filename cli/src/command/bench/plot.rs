//! Plots as SVG in text. Secret: the library that draws.

use plotters::prelude::*;

/// Pixels of a plot.
const SIZE: (u32, u32) = (480, 280);
/// Points that are drawn of a line; of more, every so many-th.
const MAX_POINTS: usize = 2000;

/// A line to draw.
pub(super) struct Line {
    pub(super) title: String,
    pub(super) x: &'static str,
    pub(super) y: &'static str,
    /// Ascending in x.
    pub(super) points: Vec<(f64, f64)>,
}

/// One plot; nothing where it cannot be drawn.
pub(super) fn line(line: &Line) -> String {
    let mut svg = String::new();
    match draw(line, &mut svg) {
        Ok(()) => svg,
        Err(_) => String::new(),
    }
}

fn draw(line: &Line, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let every = line.points.len().div_ceil(MAX_POINTS).max(1);
    let last = line.points.len().saturating_sub(1);
    let points = line.points.iter().enumerate();
    let points: Vec<(f64, f64)> = points
        .filter(|(i, _)| i % every == 0 || *i == last)
        .map(|(_, &point)| point)
        .collect();
    // An axis needs a length even where there is nothing on it.
    let end = |value: fn(&(f64, f64)) -> f64| points.iter().map(value).fold(0.0, f64::max);
    let (right, top) = (end(|p| p.0), end(|p| p.1));
    let reach = |end: f64| if end > 0.0 { end * 1.05 } else { 1.0 };

    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(&line.title, ("sans-serif", 15))
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..reach(right), 0.0..reach(top))?;
    chart
        .configure_mesh()
        .x_desc(line.x)
        .y_desc(line.y)
        .light_line_style(TRANSPARENT)
        .draw()?;
    chart.draw_series(LineSeries::new(points, &BLUE))?;
    area.present()?;
    Ok(())
}
