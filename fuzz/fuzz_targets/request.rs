#![no_main]

#[path = "../targets/request.rs"]
#[allow(dead_code, reason = "seeds are for the short run")]
mod request;

libfuzzer_sys::fuzz_target!(|data: &[u8]| request::target(data));
