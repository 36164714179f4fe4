//! Colours and spacing, in light and in dark.

use eframe::egui::{
    Color32, Context, CornerRadius, FontFamily, FontId, Frame, Margin, Stroke, TextStyle, Theme, ThemePreference,
    Visuals,
};

use crate::store;

/// Colours beyond those of the widgets. Text on each background keeps a contrast of at least 4.5 to 1.
#[derive(Debug, Clone, Copy)]
pub struct Palette {
    /// Behind the conversation.
    pub page: Color32,
    /// Behind the side panels.
    pub side: Color32,
    /// Behind a question.
    pub question: Color32,
    /// Behind a tool call.
    pub tool: Color32,
    /// Lines between things.
    pub line: Color32,
    /// Text.
    pub text: Color32,
    /// Text that matters less.
    pub dim: Color32,
    /// What is selected, links, the main button.
    pub accent: Color32,
    /// Text on the accent.
    pub on_accent: Color32,
    /// What went well.
    pub good: Color32,
    /// What failed.
    pub bad: Color32,
    /// Behind what failed.
    pub bad_fill: Color32,
}

const LIGHT: Palette = Palette {
    page: Color32::from_rgb(0xff, 0xff, 0xff),
    side: Color32::from_rgb(0xf5, 0xf6, 0xf8),
    question: Color32::from_rgb(0xe8, 0xee, 0xf9),
    tool: Color32::from_rgb(0xf5, 0xf6, 0xf8),
    line: Color32::from_rgb(0xdc, 0xdf, 0xe5),
    text: Color32::from_rgb(0x1c, 0x20, 0x28),
    dim: Color32::from_rgb(0x5b, 0x63, 0x70),
    accent: Color32::from_rgb(0x1f, 0x5f, 0xc4),
    on_accent: Color32::WHITE,
    good: Color32::from_rgb(0x1c, 0x7a, 0x3e),
    bad: Color32::from_rgb(0xb3, 0x26, 0x1e),
    bad_fill: Color32::from_rgb(0xfd, 0xec, 0xea),
};

const DARK: Palette = Palette {
    page: Color32::from_rgb(0x16, 0x18, 0x1d),
    side: Color32::from_rgb(0x1d, 0x20, 0x27),
    question: Color32::from_rgb(0x24, 0x31, 0x49),
    tool: Color32::from_rgb(0x1f, 0x23, 0x2b),
    line: Color32::from_rgb(0x34, 0x39, 0x44),
    text: Color32::from_rgb(0xe7, 0xe9, 0xee),
    dim: Color32::from_rgb(0xa0, 0xa7, 0xb4),
    accent: Color32::from_rgb(0x8a, 0xb4, 0xf8),
    on_accent: Color32::from_rgb(0x0d, 0x1b, 0x33),
    good: Color32::from_rgb(0x7d, 0xd3, 0x9b),
    bad: Color32::from_rgb(0xff, 0x9b, 0x92),
    bad_fill: Color32::from_rgb(0x3d, 0x20, 0x20),
};

/// The colours in use.
pub fn palette(visuals: &Visuals) -> &'static Palette {
    if visuals.dark_mode { &DARK } else { &LIGHT }
}

/// Gives both themes their looks.
pub fn install(ctx: &Context) {
    for (theme, palette) in [(Theme::Light, &LIGHT), (Theme::Dark, &DARK)] {
        ctx.style_mut_of(theme, |style| {
            style.visuals = visuals(theme, palette);
            style.spacing.item_spacing = [8.0, 6.0].into();
            style.spacing.button_padding = [10.0, 5.0].into();
            style.spacing.interact_size.y = 26.0;
            style.text_styles = [
                (TextStyle::Small, FontId::new(12.0, FontFamily::Proportional)),
                (TextStyle::Body, FontId::new(14.5, FontFamily::Proportional)),
                (TextStyle::Button, FontId::new(14.0, FontFamily::Proportional)),
                (TextStyle::Heading, FontId::new(20.0, FontFamily::Proportional)),
                (TextStyle::Monospace, FontId::new(13.0, FontFamily::Monospace)),
            ]
            .into();
        });
    }
}

/// Follows the user's choice.
pub fn choose(ctx: &Context, theme: store::Theme) {
    ctx.set_theme(match theme {
        store::Theme::System => ThemePreference::System,
        store::Theme::Light => ThemePreference::Light,
        store::Theme::Dark => ThemePreference::Dark,
    });
}

fn visuals(theme: Theme, palette: &Palette) -> Visuals {
    let mut visuals = theme.default_visuals();
    visuals.panel_fill = palette.page;
    visuals.window_fill = palette.page;
    visuals.extreme_bg_color = palette.page;
    visuals.code_bg_color = palette.tool;
    visuals.faint_bg_color = palette.side;
    visuals.hyperlink_color = palette.accent;
    visuals.error_fg_color = palette.bad;
    visuals.weak_text_color = Some(palette.dim);
    visuals.selection.bg_fill = palette.accent.gamma_multiply(0.35);
    visuals.selection.stroke = Stroke::new(1.0, palette.text);
    let widgets = &mut visuals.widgets;
    for widget in [
        &mut widgets.noninteractive,
        &mut widgets.inactive,
        &mut widgets.hovered,
        &mut widgets.active,
        &mut widgets.open,
    ] {
        widget.corner_radius = CornerRadius::same(6);
        widget.fg_stroke = Stroke::new(1.0, palette.text);
        widget.bg_stroke = Stroke::new(1.0, palette.line);
        widget.expansion = 0.0;
    }
    widgets.inactive.weak_bg_fill = palette.side;
    widgets.inactive.bg_fill = palette.side;
    widgets.hovered.weak_bg_fill = palette.question;
    widgets.hovered.bg_stroke = Stroke::new(1.0, palette.accent);
    widgets.active.weak_bg_fill = palette.question;
    widgets.active.bg_stroke = Stroke::new(1.0, palette.accent);
    visuals
}

/// A box with a background of its own.
pub fn card(fill: Color32) -> Frame {
    Frame::new().fill(fill).corner_radius(8).inner_margin(Margin::symmetric(12, 8))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Contrast by WCAG 2: (L1 + 0.05) / (L2 + 0.05) with the lighter luminance first.
    fn contrast(a: Color32, b: Color32) -> f32 {
        let luminance = |color: Color32| {
            let [r, g, b] = [color.r(), color.g(), color.b()].map(|x| {
                let x = f32::from(x) / 255.0;
                if x <= 0.04045 { x / 12.92 } else { ((x + 0.055) / 1.055).powf(2.4) }
            });
            0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05
        };
        let (a, b) = (luminance(a), luminance(b));
        a.max(b) / a.min(b)
    }

    #[test]
    fn text_can_be_read_on_every_background() {
        for p in [LIGHT, DARK] {
            let mut pairs = vec![(p.on_accent, p.accent), (p.bad, p.bad_fill), (p.text, p.bad_fill)];
            for back in [p.page, p.side, p.question, p.tool] {
                pairs.extend([p.text, p.dim, p.accent, p.good, p.bad].map(|text| (text, back)));
            }
            for (text, back) in pairs {
                let found = contrast(text, back);
                assert!(found >= 4.5, "{text:?} on {back:?}: {found}");
            }
        }
    }
}
