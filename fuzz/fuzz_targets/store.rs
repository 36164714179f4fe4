#![no_main]

#[path = "../targets/store.rs"]
#[allow(dead_code, reason = "seeds are for the short run")]
mod store;

libfuzzer_sys::fuzz_target!(|data: &[u8]| store::target(data));
