//! The targets of `fuzz/` that read what clients and models write, each for a short while.

#[path = "../../../fuzz/brief.rs"]
mod brief;
#[path = "../../../fuzz/targets/calls.rs"]
mod calls;
#[path = "../../../fuzz/targets/request.rs"]
mod request;

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

brief!(calls, 60_000, 1 << 16, 256);
brief!(request, 60_000, 1 << 20, 512);
