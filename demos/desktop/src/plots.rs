//! Speed and memory over the last minutes.

use std::collections::VecDeque;

use eframe::egui::{Color32, RichText, Role, Ui, WidgetInfo};
use egui_plot::{Line, Plot, PlotPoints};

use crate::theme::palette;

/// Seconds between two samples.
const PERIOD: f64 = 0.25;
/// Seconds that are shown.
const SPAN: f64 = 120.0;
const MIB: f64 = 1_048_576.0;

/// A moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Seconds.
    pub time: f64,
    /// Tokens written a second since the sample before.
    pub rate: f64,
    /// Memory of the program, bytes; none where the system does not tell.
    pub memory: Option<u64>,
}

/// The samples of the last minutes.
#[derive(Debug, Clone, Default)]
pub struct Samples {
    samples: VecDeque<Sample>,
    tokens: u64,
}

impl Samples {
    /// Takes a sample if it is time; `tokens` are those written since the program began.
    pub fn take(&mut self, time: f64, tokens: u64) {
        let last = self.samples.back().map_or(f64::NEG_INFINITY, |last| last.time);
        if time - last < PERIOD {
            return;
        }
        // After a pause nothing is known of what was in between; it was no writing.
        let rate = if time - last > 2.0 { 0.0 } else { tokens.saturating_sub(self.tokens) as f64 / (time - last) };
        if time - last > 2.0 && last.is_finite() {
            self.push(Sample {
                time: last + PERIOD,
                rate: 0.0,
                memory: self.samples.back().and_then(|last| last.memory),
            });
        }
        self.tokens = tokens;
        let memory = memory_stats::memory_stats().map(|stats| stats.physical_mem as u64);
        self.push(Sample { time, rate, memory });
    }

    /// Adds a sample.
    pub fn push(&mut self, sample: Sample) {
        self.samples.push_back(sample);
        while self.samples.front().is_some_and(|first| sample.time - first.time > SPAN) {
            self.samples.pop_front();
        }
    }

    /// Whether writing shows in the last sample, so that the picture is not at rest yet.
    pub fn moving(&self) -> bool {
        self.samples.back().is_some_and(|last| last.rate > 0.0)
    }

    /// Draws both.
    pub fn show(&self, ui: &mut Ui) {
        let colors = palette(ui.visuals());
        let now = self.samples.back().map_or(0.0, |last| last.time);
        let points = |value: &dyn Fn(&Sample) -> Option<f64>| -> Vec<[f64; 2]> {
            self.samples.iter().filter_map(|sample| Some([sample.time - now, value(sample)?])).collect()
        };
        let rate = self.samples.back().map_or(0.0, |last| last.rate);
        chart(ui, "Tokens/s", format!("{rate:.0}"), points(&|sample| Some(sample.rate)), colors.accent);
        ui.add_space(6.0);
        let memory = points(&|sample| Some(sample.memory? as f64 / MIB));
        let last = memory.last().map_or_else(|| "not known".into(), |last| format!("{:.0}", last[1]));
        chart(ui, "Memory of the program, MiB", last, memory, colors.good);
    }
}

fn chart(ui: &mut Ui, name: &str, last: String, points: Vec<[f64; 2]>, color: Color32) {
    ui.horizontal(|ui| {
        ui.label(RichText::new(name).small().weak());
        ui.label(RichText::new(&last).small().strong());
    });
    let top = points.iter().map(|point| point[1]).fold(1.0, f64::max) * 1.1;
    let response = Plot::new(name)
        .height(76.0)
        .show_background(false)
        .allow_drag(false)
        .allow_zoom(false)
        .allow_scroll(false)
        .allow_boxed_zoom(false)
        .allow_double_click_reset(false)
        .show_grid([false, true])
        .y_axis_min_width(34.0)
        .x_axis_formatter(|mark, _| format!("{:.0} s", mark.value))
        .include_x(-SPAN)
        .include_x(0.0)
        .include_y(0.0)
        .include_y(top)
        .show(ui, |plot| plot.line(Line::new(name.to_string(), PlotPoints::from(points)).color(color).width(1.5)));
    response.response.widget_info(|| WidgetInfo::labeled(Role::Image, true, format!("{name}: {last}")));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_counted_between_samples() {
        let mut samples = Samples::default();
        for (time, tokens) in [(0.0, 0), (0.1, 5), (0.5, 50), (10.0, 60), (10.5, 70), (500.0, 70)] {
            samples.take(time, tokens);
        }
        assert_eq!(samples.samples.len(), 1, "older ones are gone");
        let mut samples = Samples::default();
        for (time, tokens) in [(0.0, 0), (0.1, 5), (0.5, 50), (10.0, 60), (10.5, 70)] {
            samples.take(time, tokens);
        }
        let rates: Vec<(f64, f64)> = samples.samples.iter().map(|sample| (sample.time, sample.rate)).collect();
        assert_eq!(rates, [(0.0, 0.0), (0.5, 100.0), (0.75, 0.0), (10.0, 0.0), (10.5, 20.0)]);
        assert!(samples.moving());
        assert!(cfg!(not(target_os = "linux")) || samples.samples.iter().all(|sample| sample.memory > Some(1 << 20)));
    }
}
