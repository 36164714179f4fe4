#![no_main]

#[path = "../targets/config.rs"]
#[allow(dead_code, reason = "seeds are for the short run")]
mod config;

libfuzzer_sys::fuzz_target!(|data: &[u8]| config::target(data));
