//! A curve as an SVG that a person can look at.

use std::fmt::Write;

/// Width and height of the picture, and the room around the plot: left, top, right, bottom.
const SIZE: [f64; 2] = [720.0, 400.0];
const ROOM: [f64; 4] = [64.0, 40.0, 20.0, 48.0];
/// Points that are drawn; of longer curves, means of neighbours.
const POINTS: usize = 400;

const BLUE: &str = "#1565c0";
const RED: &str = "#c62828";

/// The picture of `values`, one for each step from 1 on, in blue, and of values `held` at some of the steps in red. Values that
/// are no numbers leave gaps.
pub fn svg(title: &str, name: &str, values: &[f32], held: &[(u64, f32)]) -> String {
    let group = values.len().div_ceil(POINTS).max(1);
    let points: Vec<(f64, f64)> = values
        .chunks(group)
        .enumerate()
        .map(|(at, part)| {
            let middle = (at * group) as f64 + (part.len() as f64 + 1.0) / 2.0;
            (middle, part.iter().map(|&value| f64::from(value)).sum::<f64>() / part.len() as f64)
        })
        .collect();
    let held: Vec<(f64, f64)> = held.iter().map(|&(step, value)| (step as f64, f64::from(value))).collect();
    let top = points.iter().chain(&held).map(|point| point.1).filter(|y| y.is_finite()).fold(0.0, f64::max);
    let (across, up) = (step(values.len().max(1) as f64), step(if top > 0.0 { top } else { 1.0 }));
    let (right, top) = ((values.len().max(1) as f64 / across).ceil() * across, ((top / up).ceil() * up).max(up));
    let x = |at: f64| ROOM[0] + at / right * (SIZE[0] - ROOM[0] - ROOM[2]);
    let y = |value: f64| SIZE[1] - ROOM[3] - value / top * (SIZE[1] - ROOM[1] - ROOM[3]);

    let [width, height] = SIZE;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let mut text = |x: f64, y: f64, anchor: &str, text: &str| {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        // Writing to a String cannot fail.
        let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>");
    };
    text(width / 2.0, 24.0, "middle", title);
    text(width / 2.0, height - 10.0, "middle", "step");
    text(8.0, ROOM[1] - 8.0, "start", name);
    if !held.is_empty() {
        text(width - ROOM[2], ROOM[1] - 8.0, "end", "blue: training; red: held out");
    }
    let ticks = |unit: f64, end: f64| (0..=(end / unit).round() as usize).map(move |n| n as f64 * unit);
    ticks(across, right).for_each(|at| text(x(at), height - ROOM[3] + 18.0, "middle", &label(at, across)));
    ticks(up, top).for_each(|at| text(ROOM[0] - 8.0, y(at) + 4.0, "end", &label(at, up)));
    let mut line = |points: &str, colour: &str, thick: f64| {
        let _ =
            writeln!(out, "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{thick}\"/>");
    };
    for at in ticks(up, top) {
        line(&format!("{:.1},{:.1} {:.1},{:.1}", x(0.0), y(at), x(right), y(at)), "#ddd", 1.0);
    }
    for (points, colour) in [(&points, BLUE), (&held, RED)] {
        for part in points.split(|point| !point.1.is_finite()).filter(|part| !part.is_empty()) {
            let part: Vec<String> = part.iter().map(|point| format!("{:.1},{:.1}", x(point.0), y(point.1))).collect();
            line(&part.join(" "), colour, 1.5);
        }
    }
    out + "</svg>\n"
}

/// 1, 2 or 5 times a power of ten: the distance of about five ticks up to `end`.
fn step(end: f64) -> f64 {
    let rough = end / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].map(|n| n * power).into_iter().find(|step| *step >= rough * 0.999).unwrap_or(10.0 * power)
}

/// As many digits as the distance of the ticks asks for.
fn label(at: f64, step: f64) -> String {
    let digits = (-step.log10().floor()).max(0.0) as usize;
    format!("{at:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(svg: &str, colour: &str) -> Vec<(f64, f64)> {
        let points = svg.split("<polyline points=\"").filter(|line| line.contains(colour));
        let points = points.flat_map(|line| line.split('"').next().unwrap().split(' '));
        points
            .map(|point| point.split_once(',').unwrap())
            .map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap()))
            .collect()
    }

    #[test]
    fn falling_values_fall() {
        let values: Vec<f32> = (0..1000).map(|n| 4.0 * (-0.01 * n as f32).exp()).collect();
        let svg = svg("loss < 4", "loss", &values, &[]);
        assert!(svg.contains("loss &lt; 4") && svg.ends_with("</svg>\n"), "{svg}");
        let points = curve(&svg, BLUE);
        assert_eq!(points.len(), 334);
        assert!(points.windows(2).all(|two| two[0].0 < two[1].0 && two[0].1 <= two[1].1), "{points:?}");
        assert!(points.iter().all(|(x, y)| (64.0..=700.0).contains(x) && (40.0..=352.0).contains(y)), "{points:?}");
        assert!(!svg.contains("held out"));
        for tick in [">0<", ">200<", ">1000<", ">4<"] {
            assert!(svg.contains(tick), "{tick} {svg}");
        }
    }

    #[test]
    fn held_values_stand_at_their_steps() {
        let svg = svg("", "", &[1.0; 100], &[(50, 4.0), (100, f32::NAN), (100, 2.0)]);
        let (blue, red) = (curve(&svg, BLUE), curve(&svg, RED));
        assert_eq!((blue.len(), red.len()), (100, 2));
        assert!((red[0].0 - blue[49].0).abs() < 0.2 && (red[1].0 - blue[99].0).abs() < 0.2, "{red:?}");
        // The picture is as high as the higher of the two.
        assert!(red[0].1 < red[1].1 && red[1].1 < blue[0].1 && red[0].1 >= 40.0, "{red:?}");
        assert!(svg.contains("red: held out"));
    }

    #[test]
    fn odd_values_do_no_harm() {
        assert!(curve(&svg("", "", &[], &[]), BLUE).is_empty());
        assert_eq!(curve(&svg("", "", &[1.0], &[]), BLUE).len(), 1);
        assert_eq!(curve(&svg("", "", &[1.0, f32::NAN, 2.0, f32::INFINITY], &[]), BLUE).len(), 2);
        assert_eq!(curve(&svg("", "", &[0.0, 0.0], &[]), BLUE).len(), 2);
        assert_eq!((step(1000.0), step(4.0), step(0.03)), (200.0, 1.0, 0.01));
    }
}
