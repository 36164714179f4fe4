#![no_main]

#[path = "../targets/weights.rs"]
#[allow(dead_code, reason = "seeds are for the short run")]
mod weights;

libfuzzer_sys::fuzz_target!(|data: &[u8]| weights::target(data));
