//! How a file is changed: as JSON, where it is JSON, else as bytes.
//!
//! Changed bytes rarely make another valid file. So three times in four a JSON file is taken apart,
//! one to three of its parts are changed, and it is written again.

use libfuzzer_sys::fuzzer_mutate;
use serde_json::{Value, json};

/// The custom mutator of all targets. Returns the new size.
pub fn mutate(data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let mut random = Random(u64::from(seed));
    if random.below(4) > 0
        && let Ok(mut file) = serde_json::from_slice::<Value>(&data[..size])
    {
        for _ in 0..=random.below(3) {
            change(&mut file, &mut random);
        }
        let written = file.to_string();
        if written.len() <= max_size.min(data.len()) {
            data[..written.len()].copy_from_slice(written.as_bytes());
            return written.len();
        }
    }
    fuzzer_mutate(data, size, max_size)
}

/// Numbers that follow from a seed (`SplitMix64`).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Changes one part, found by walking down to a random depth.
fn change(part: &mut Value, random: &mut Random) {
    let inner = match part {
        Value::Array(list) => list.len(),
        Value::Object(fields) => fields.len(),
        _ => 0,
    };
    if inner > 0 && random.below(8) > 0 {
        let index = random.below(inner);
        match part {
            Value::Array(list) => change(&mut list[index], random),
            Value::Object(fields) => {
                let inner = fields.values_mut().nth(index);
                change(inner.expect("the index is below their number"), random);
            }
            _ => {}
        }
        return;
    }
    match part {
        Value::Array(list) => change_list(list, random),
        Value::Object(fields) => change_fields(fields, random),
        Value::Number(_) => *part = number(part.as_i64().unwrap_or(0), random),
        Value::Bool(truth) => *truth = !*truth,
        Value::String(text) => change_text(text, random),
        Value::Null => *part = json!(0),
    }
}

fn change_list(list: &mut Vec<Value>, random: &mut Random) {
    let (left, right) = (random.below(list.len()), random.below(list.len()));
    match random.below(6) {
        0 => list.push(json!(random.below(16))),
        1 if !list.is_empty() => list.insert(right, list[left].clone()),
        2 | 3 if !list.is_empty() => drop(list.remove(left)),
        4 if !list.is_empty() => list.swap(left, right),
        _ => list.truncate(right),
    }
}

fn change_fields(fields: &mut serde_json::Map<String, Value>, random: &mut Random) {
    let names: Vec<String> = fields.keys().cloned().collect();
    let (left, right) = (random.below(names.len()), random.below(names.len()));
    let (Some(left), Some(right)) = (names.get(left), names.get(right)) else { return };
    match random.below(4) {
        0 => drop(fields.remove(left)),
        1 => {
            let copy = fields[left].clone();
            fields.insert(right.clone(), copy);
        }
        2 => {
            let copy = fields[left].clone();
            fields.insert(format!("{left}2"), copy);
        }
        _ => {
            fields.insert(left.clone(), Value::Null);
        }
    }
}

fn number(old: i64, random: &mut Random) -> Value {
    const EDGES: [u64; 12] = [
        0,
        1,
        2,
        7,
        1 << 31,
        u32::MAX as u64,
        1 << 40,
        1 << 53,
        i64::MAX as u64,
        1 << 63,
        u64::MAX - 1,
        u64::MAX,
    ];
    match random.below(8) {
        0 | 1 => json!(EDGES[random.below(EDGES.len())]),
        2 => json!(old.wrapping_add(1)),
        3 => json!(old.wrapping_sub(1)),
        4 => json!(old.wrapping_mul(2)),
        5 => json!(old.wrapping_neg()),
        6 => json!([old, random.below(9)]),
        _ => json!(random.below(16)),
    }
}

fn change_text(text: &mut String, random: &mut Random) {
    const WORDS: [&str; 18] = [
        "none",
        "sum",
        "whole",
        "input",
        "parameter",
        "buffer",
        "constant",
        "activation",
        "float32",
        "int64",
        "fill_drain",
        "1f1b",
        "optimizer",
        "parameters",
        "cpu",
        "v100-32gb",
        "layer0/op#0",
        "layer1/op#0",
    ];
    match random.below(4) {
        0 => text.push('x'),
        1 => text.clear(),
        _ => WORDS[random.below(WORDS.len())].clone_into(text),
    }
}
