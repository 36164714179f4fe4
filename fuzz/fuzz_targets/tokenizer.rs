#![no_main]

#[path = "../targets/tokenizer.rs"]
#[allow(dead_code, reason = "seeds are for the short run")]
mod tokenizer;

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenizer::target(data));
