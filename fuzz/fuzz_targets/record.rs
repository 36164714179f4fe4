#![no_main]

#[path = "../targets/record.rs"]
#[allow(dead_code, reason = "seeds are for the short run")]
mod record;

libfuzzer_sys::fuzz_target!(|data: &[u8]| record::target(data));
