//! Replays the fuzzer's corpus, and all files that once made something go wrong.

#[expect(unreachable_pub, reason = "the crate of the fuzz targets is another one")]
#[path = "../../../../fuzz/src/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;

/// Runs a target on all its files; how many there are.
fn replay(name: &str, target: fn(&[u8])) -> usize {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let mut count = 0;
    for folder in ["corpus", "regressions"] {
        let Ok(files) = fs::read_dir(fuzz.join(folder).join(name)) else { continue };
        for file in files {
            let path = file.expect("the folder can be read").path();
            let data = fs::read(&path).expect("the file can be read");
            let played = std::panic::catch_unwind(|| target(&data));
            assert!(played.is_ok(), "{}", path.display());
            count += 1;
        }
    }
    count
}

#[test]
fn graphs() {
    assert!(replay("graph", targets::graph) > 5);
}

#[test]
fn profiles() {
    assert!(replay("profile", targets::profile) > 1);
}

#[test]
fn clusters() {
    assert!(replay("cluster", targets::cluster) > 2);
}

#[test]
fn plans() {
    assert!(replay("plan", targets::plan) > 2);
}
