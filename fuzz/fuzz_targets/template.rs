#![no_main]

#[path = "../targets/template.rs"]
#[allow(dead_code, reason = "seeds are for the short run")]
mod template;

libfuzzer_sys::fuzz_target!(|data: &[u8]| template::target(data));
