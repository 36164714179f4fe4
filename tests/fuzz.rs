//! The targets of `fuzz/` that read files, each for a short while.
#![cfg(feature = "store")]

#[path = "../fuzz/brief.rs"]
mod brief;
#[path = "../fuzz/targets/config.rs"]
mod config;
#[path = "../fuzz/targets/record.rs"]
mod record;
#[path = "../fuzz/targets/store.rs"]
mod store;
#[path = "../fuzz/targets/template.rs"]
mod template;
#[path = "../fuzz/targets/tokenizer.rs"]
mod tokenizer;
#[path = "../fuzz/targets/weights.rs"]
mod weights;

use brief::Brief;

macro_rules! brief {
    ($name:ident, $rounds:expr, $base:expr, $each:expr) => {
        #[test]
        fn $name() {
            let (seeds, words) = ($name::seeds(), $name::WORDS);
            let name = stringify!($name);
            Brief { name, target: $name::target, seeds, words, rounds: $rounds, base: $base, each: $each }.run();
        }
    };
}

brief!(record, 200_000, 1 << 17, 8);
brief!(store, 60, 32 << 20, 8);
brief!(weights, 1_500, 16 << 20, 64);
brief!(config, 20_000, 1 << 20, 64);
brief!(tokenizer, 800, 4 << 20, 64);
brief!(template, 2_000, 64 << 20, 64);
