#![no_main]

#[path = "../targets/record.rs"]
#[allow(dead_code, reason = "seeds are for the short run")]
mod record;
#[path = "../targets/store.rs"]
#[allow(dead_code, reason = "its files are all that is taken")]
mod store;

libfuzzer_sys::fuzz_target!(|data: &[u8]| record::target(data));
