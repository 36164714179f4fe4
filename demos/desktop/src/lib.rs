//! A window on a local Gated DeltaNet model: a conversation with tools, the tree of its turns, the devices and the reasons.
//!
//! | module | what it is |
//! |---|---|
//! | [`app`] | the window: what it knows and how it is laid out |
//! | [`chat`], [`side`], [`tree`], [`plots`] | its parts |
//! | [`worker`] | the thread that runs the model |
//! | [`conversation`], [`store`] | turns, and how they are kept on disk |
//! | [`host`] | the wgpu device that draws the window and runs the model |

pub mod app;
pub mod chat;
pub mod conversation;
pub mod host;
mod options;
pub mod plots;
pub mod side;
pub mod store;
pub mod theme;
pub mod tree;
pub mod worker;

use std::process::ExitCode;

use clap::Parser;
use eframe::egui::ViewportBuilder;

use crate::app::{App, Setup};
use crate::options::Options;

/// The program.
pub fn main() -> ExitCode {
    let options = Options::parse();
    let level = if options.verbose { "info" } else { "error" };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level)).init();
    let native = eframe::NativeOptions {
        viewport: ViewportBuilder::default()
            .with_app_id("gatedelta-desktop")
            .with_inner_size([1180.0, 760.0])
            .with_min_inner_size([760.0, 480.0]),
        renderer: eframe::Renderer::Wgpu,
        wgpu_options: host::configuration(),
        ..Default::default()
    };
    let opened = eframe::run_native(
        "gatedelta",
        native,
        Box::new(move |context| {
            let (host, why) = match context.wgpu_render_state.as_ref().map(host::share) {
                Some(Ok(host)) => (Some(host), None),
                Some(Err(why)) => (None, Some(format!("The window's GPU cannot run the model as well: {why}"))),
                None => (None, None),
            };
            let setup = Setup { args: options.agent(), folder: options.data(), host };
            let mut app = App::new(&context.egui_ctx, setup);
            if options.data().is_none() {
                app.report(
                    "The conversation is not kept: this system names no place for it; give one with --data DIR.".into(),
                );
            }
            why.into_iter().for_each(|why| app.report(why));
            Ok(Box::new(app))
        }),
    );
    match opened {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: no window can be opened: {why}");
            ExitCode::FAILURE
        }
    }
}
