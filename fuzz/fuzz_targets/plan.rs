//! The plan reader and all that works on what it reads.

#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};

fuzz_target!(|data: &[u8]| rannc_fuzz::targets::plan(data));
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    rannc_fuzz::mutate::mutate(data, size, max_size, seed)
});
