//! Measurements by turn as an SVG that a person can look at.

use std::error::Error;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Width of the picture and height of each panel.
const SIZE: [u32; 2] = [920, 300];
/// Room above the panels.
const HEAD: u32 = 44;

/// Colours of the series of a panel, in their order.
const COLOURS: [RGBColor; 3] = [RGBColor(21, 101, 192), RGBColor(239, 108, 0), RGBColor(150, 150, 150)];

/// One diagram over the turns 1, 2, ...
pub struct Panel {
    /// What it shows.
    pub title: String,
    /// What is on the vertical axis.
    pub unit: &'static str,
    /// Names and values, a value for each turn; at most three.
    pub series: Vec<(String, Vec<f64>)>,
    /// The values are parts of a whole and stand one on the other.
    pub stacked: bool,
}

/// The picture.
///
/// # Errors
/// What the library reports.
pub fn svg(title: &str, panels: &[Panel]) -> Result<String, Box<dyn Error + Send + Sync>> {
    let mut out = String::new();
    draw(&mut out, title, panels).map_err(|error| error.to_string())?;
    Ok(out)
}

fn draw(out: &mut String, title: &str, panels: &[Panel]) -> Result<(), Box<dyn Error>> {
    let [width, height] = SIZE;
    let root = SVGBackend::with_string(out, (width, HEAD + height * panels.len() as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    let (head, body) = root.split_vertically(HEAD);
    let style = ("sans-serif", 19).into_font().color(&BLACK).pos(Pos::new(HPos::Center, VPos::Center));
    head.draw_text(title, &style, (width as i32 / 2, HEAD as i32 / 2 + 4))?;
    for (area, panel) in body.split_evenly((panels.len(), 1)).iter().zip(panels) {
        let lines = lines(panel);
        let turns = panel.series.iter().map(|(_, values)| values.len()).max().unwrap_or(0).max(2);
        let top = lines.iter().flatten().copied().filter(|y| y.is_finite()).fold(0.0, f64::max);
        // Room for the names.
        let top = if top > 0.0 { top * 1.25 } else { 1.0 };
        let mut chart = ChartBuilder::on(area)
            .caption(&panel.title, ("sans-serif", 15))
            .margin_left(8)
            .margin_right(24)
            .x_label_area_size(38)
            .y_label_area_size(62)
            .build_cartesian_2d(1.0..turns as f64, 0.0..top)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc("turn")
            .y_desc(panel.unit)
            .x_labels(turns.min(11))
            .y_labels(6)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| label(*y, top))
            .label_style(("sans-serif", 12))
            .axis_desc_style(("sans-serif", 13))
            .draw()?;
        // Of a stack the whole comes first: each further one covers its lower part.
        let mut order: Vec<_> = lines.iter().zip(&panel.series).zip(COLOURS).collect();
        if panel.stacked {
            order.reverse();
        }
        for ((line, (name, _)), colour) in order {
            let points = line.iter().enumerate().map(|(at, y)| (at as f64 + 1.0, *y));
            let drawn = if panel.stacked {
                chart.draw_series(AreaSeries::new(points, 0.0, colour.filled()))?
            } else {
                chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            };
            drawn.label(name).legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], colour.filled()));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(200, 200, 200))
            .label_font(("sans-serif", 13))
            .draw()?;
    }
    root.present()?;
    Ok(())
}

/// The heights that are drawn: the values, or their sums up to each.
fn lines(panel: &Panel) -> Vec<Vec<f64>> {
    let mut out: Vec<Vec<f64>> = panel.series.iter().map(|(_, values)| values.clone()).collect();
    for i in 1..out.len() {
        if panel.stacked {
            let (below, above) = out.split_at_mut(i);
            above[0].iter_mut().zip(&below[i - 1]).for_each(|(y, under)| *y += under);
        }
    }
    out
}

/// As many digits as tell the ticks up to `top` apart.
fn label(y: f64, top: f64) -> String {
    let digits = (1.0 - top.log10().floor()).clamp(0.0, 6.0) as usize;
    format!("{y:.digits$}")
}

/// The middle of each value and its neighbours up to `reach` turns away, so that one turn that was disturbed does not stand out.
pub fn smooth(values: &[f64], reach: usize) -> Vec<f64> {
    let middle = |i: usize| {
        let mut near = values[i.saturating_sub(reach)..(i + reach + 1).min(values.len())].to_vec();
        near.sort_by(f64::total_cmp);
        near[near.len() / 2]
    };
    (0..values.len()).map(middle).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(stacked: bool, series: &[&[f64]]) -> Panel {
        let series = series.iter().map(|values| ("a < b".to_string(), values.to_vec())).collect();
        Panel { title: "reading & writing".into(), unit: "ms", series, stacked }
    }

    #[test]
    fn parts_stand_one_on_the_other() {
        let parts: [&[f64]; 3] = [&[1.0, 2.0], &[3.0, 4.0], &[5.0, 6.0]];
        assert_eq!(lines(&panel(true, &parts)), [[1.0, 2.0], [4.0, 6.0], [9.0, 12.0]]);
        assert_eq!(lines(&panel(false, &parts)), parts);
    }

    #[test]
    fn the_picture_is_sound_xml_with_all_there_is() {
        let values: Vec<f64> = (0..50).map(|i| i as f64).collect();
        for panels in [vec![panel(true, &[&values, &values]), panel(false, &[&values])], vec![panel(false, &[&[]])]] {
            let svg = svg("a title", &panels).unwrap();
            let mut reader = quick_xml::Reader::from_str(&svg);
            while !matches!(reader.read_event().unwrap(), quick_xml::events::Event::Eof) {}
            for word in ["a title", "reading &amp; writing", "turn", "ms"] {
                assert!(svg.contains(word), "{word} is not in {svg}");
            }
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn one_disturbed_turn_does_not_stand_out() {
        assert_eq!(smooth(&[1.0, 1.0, 9.0, 1.0, 1.0], 2), [1.0; 5]);
        assert_eq!(smooth(&[], 2), Vec::<f64>::new());
        assert_eq!((label(3.0, 50.0), label(0.25, 0.8), label(12.0, 120.0)), ("3".into(), "0.25".into(), "12".into()));
    }
}
