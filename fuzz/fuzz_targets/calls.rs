#![no_main]

#[path = "../targets/calls.rs"]
#[allow(dead_code, reason = "seeds are for the short run")]
mod calls;

libfuzzer_sys::fuzz_target!(|data: &[u8]| calls::target(data));
