//! Measured times of operators, and their file form `rannc.profile/1`.
//!
//! An operator is measured once for each distinct *signature* (operator, shapes, types, attributes)
//! at a few numbers of rows. Times between the samples are interpolated, times beyond them follow
//! the nearest line; a calibration factor corrects the sum of parts to the measured whole.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::CostError;

const FORMAT: &str = "rannc.profile/1";
const PARTS: u64 = 1_000_000;
/// More rows than this in a batch are surely a mistake.
const MAX_ROWS: u64 = 1 << 40;
/// A longer time than this, 104 days, is surely a mistake.
const MAX_NS: u64 = 1 << 53;
/// A larger factor than this, a million, is surely a mistake.
const MAX_PPM: u64 = PARTS * PARTS;

/// The time of an operator at one number of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Rows of the batch it saw.
    pub rows: u64,
    /// Time of the forward pass.
    pub forward_ns: u64,
    /// Time of the backward pass; zero when nothing in it needs a gradient.
    pub backward_ns: u64,
}

/// How much longer the whole model takes than the sum of its operators, in millionths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calibration {
    /// Factor on forward times; 1,000,000 leaves them as they are.
    pub forward_ppm: u64,
    /// Factor on backward times; 1,000,000 leaves them as they are.
    pub backward_ppm: u64,
}

impl Default for Calibration {
    fn default() -> Self {
        Self { forward_ppm: PARTS, backward_ppm: PARTS }
    }
}

/// What one kind of device needs for each operator.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// The device that was measured.
    pub device: String,
    /// What else the times depend on: torch version, threads, autocast.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    /// The correction for what single operators do not show.
    #[serde(default)]
    pub calibration: Calibration,
    /// The samples of each signature.
    pub entries: BTreeMap<String, Vec<Sample>>,
}

#[derive(Serialize)]
struct Written<'a> {
    format: &'a str,
    #[serde(flatten)]
    profile: &'a Profile,
}

#[derive(Deserialize)]
struct Header {
    format: String,
}

impl Profile {
    /// Reads the JSON form; samples may be in any order.
    ///
    /// # Errors
    ///
    /// [`CostError::Json`], [`CostError::Format`] or [`CostError::BadProfile`].
    pub fn from_json(text: &str) -> Result<Self, CostError> {
        let json = |source| CostError::Json { what: "profile", source };
        let header: Header = serde_json::from_str(text).map_err(json)?;
        if header.format != FORMAT {
            return Err(CostError::Format { found: header.format, needed: FORMAT });
        }
        let mut profile: Self = serde_json::from_str(text).map_err(json)?;
        for samples in profile.entries.values_mut() {
            samples.sort_by_key(|sample| sample.rows);
            samples.dedup_by_key(|sample| sample.rows);
        }
        profile.refuse_absurd_numbers()?;
        Ok(profile)
    }

    fn refuse_absurd_numbers(&self) -> Result<(), CostError> {
        let calibration = || "`calibration`".to_owned();
        let Calibration { forward_ppm, backward_ppm } = self.calibration;
        refuse_above(calibration, "forward_ppm", forward_ppm, MAX_PPM)?;
        refuse_above(calibration, "backward_ppm", backward_ppm, MAX_PPM)?;
        for (signature, samples) in &self.entries {
            let place = || format!("a sample of `{signature}`");
            for sample in samples {
                refuse_above(place, "rows", sample.rows, MAX_ROWS)?;
                refuse_above(place, "forward_ns", sample.forward_ns, MAX_NS)?;
                refuse_above(place, "backward_ns", sample.backward_ns, MAX_NS)?;
            }
        }
        Ok(())
    }

    /// The JSON form; equal profiles give equal bytes.
    pub fn to_json(&self) -> String {
        serde_json::to_string(&Written { format: FORMAT, profile: self })
            .expect("a profile holds nothing that JSON cannot say")
    }
}

fn refuse_above(
    place: impl Fn() -> String,
    field: &str,
    found: u64,
    limit: u64,
) -> Result<(), CostError> {
    if found <= limit {
        return Ok(());
    }
    let problem = format!("{} has {found} for `{field}`, needed at most {limit}", place());
    Err(CostError::BadProfile { problem })
}

/// A time as a function of rows, piecewise linear through its samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Curve {
    points: Vec<(u64, u64)>,
}

impl Curve {
    /// The curve through `points`, ascending in rows and not empty, each time scaled by `ppm`.
    pub(crate) fn new(points: impl Iterator<Item = (u64, u64)>, ppm: u64) -> Self {
        let points = points.map(|(rows, time)| (rows, scale(time, ppm, PARTS))).collect();
        Self { points }
    }

    /// The time for `rows`.
    ///
    /// Above the samples it follows the last line, never falling. Below them it follows the first
    /// line, but between the share proportional to rows and the first sample.
    pub(crate) fn at(&self, rows: u64) -> u64 {
        let after = self.points.partition_point(|&(sampled, _)| sampled < rows);
        let first = self.points[0];
        let Some(&last) = self.points.last().filter(|_| self.points.len() > 1) else {
            return if first.0 == 0 { first.1 } else { scale(first.1, rows, first.0) };
        };
        if after == 0 {
            let proportional = if first.0 == 0 { 0 } else { scale(first.1, rows, first.0) };
            line(first, self.points[1], rows).clamp(proportional, first.1)
        } else if after == self.points.len() {
            line(self.points[after - 2], last, rows).max(last.1)
        } else {
            line(self.points[after - 1], self.points[after], rows)
        }
    }

    /// The least time for one row, in thousandths of a nanosecond, at any number of rows from 1 to
    /// `most_rows`. The curve is piecewise linear, so time over rows is least at a sample or an end.
    pub(crate) fn least_per_row(&self, most_rows: u64) -> u64 {
        let sampled = self.points.iter().map(|&(rows, _)| rows);
        let places =
            sampled.filter(|rows| (1..=most_rows).contains(rows)).chain([1, most_rows.max(1)]);
        // Below the first sample the curve is at least proportional to it.
        let first = self.points.first().filter(|&&(rows, _)| rows > 0);
        let below = first.map(|&(rows, time)| scale(time, 1000, rows));
        places.map(|rows| scale(self.at(rows), 1000, rows)).chain(below).min().unwrap_or(0)
    }
}

/// `value * numerator / denominator`, rounded down; saturates.
pub(crate) fn scale(value: u64, numerator: u64, denominator: u64) -> u64 {
    // Dividing 128 bits takes several times as long, and is rarely needed.
    if let Some(product) = value.checked_mul(numerator) {
        return product / denominator.max(1);
    }
    let scaled = u128::from(value) * u128::from(numerator) / u128::from(denominator.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// The height at `rows` of the line through two points, not below zero.
fn line(left: (u64, u64), right: (u64, u64), rows: u64) -> u64 {
    let run = i128::from(right.0) - i128::from(left.0);
    let rise = i128::from(right.1) - i128::from(left.1);
    let offset = i128::from(rows) - i128::from(left.0);
    let height = i128::from(left.1).saturating_add(rise.saturating_mul(offset) / run.max(1));
    u64::try_from(height.max(0)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::{Calibration, Curve, Profile, Sample};
    use proptest::prelude::*;

    fn curve(points: &[(u64, u64)]) -> Curve {
        Curve::new(points.iter().copied(), 1_000_000)
    }

    #[test]
    fn times_are_interpolated_and_extended() {
        let curve = curve(&[(2, 100), (4, 140), (8, 300)]);
        assert_eq!([2, 3, 4, 6, 8, 12].map(|rows| curve.at(rows)), [100, 120, 140, 220, 300, 460]);
        assert_eq!(curve.at(1), 80);
    }

    #[test]
    fn noise_gives_no_negative_or_falling_times() {
        assert_eq!(curve(&[(2, 100), (4, 50)]).at(100), 50);
        assert_eq!(curve(&[(2, 100), (4, 50)]).at(1), 100);
        assert_eq!(curve(&[(4, 10), (8, 1000)]).at(2), 5);
    }

    #[test]
    fn the_largest_numbers_saturate() {
        let huge = curve(&[(0, 0), (1, u64::MAX)]);
        assert_eq!([1, 2, u64::MAX].map(|rows| huge.at(rows)), [u64::MAX; 3]);
        assert_eq!(curve(&[(u64::MAX, u64::MAX)]).at(1), 1);
    }

    #[test]
    fn one_sample_means_proportional_unless_it_saw_no_rows() {
        assert_eq!(curve(&[(4, 100)]).at(8), 200);
        assert_eq!(curve(&[(0, 100)]).at(8), 100);
    }

    #[test]
    fn other_formats_are_refused() {
        let error = Profile::from_json(r#"{"format":"rannc.graph/1"}"#).unwrap_err();
        insta::assert_snapshot!(error, @"the file has format `rannc.graph/1`, needed `rannc.profile/1`");
    }

    #[test]
    fn absurd_numbers_name_the_place() {
        let refused = |calibration: u64, rows: u64, time: u64| {
            let text = format!(
                r#"{{"format": "rannc.profile/1", "device": "cpu",
                "calibration": {{"forward_ppm": 1, "backward_ppm": {calibration}}},
                "entries": {{"op": [{{"rows": {rows}, "forward_ns": {time}, "backward_ns": 1}}]}}}}"#
            );
            Profile::from_json(&text).unwrap_err().to_string()
        };
        let found = [refused(u64::MAX, 1, 1), refused(1, u64::MAX, 1), refused(1, 1, u64::MAX)];
        insta::assert_snapshot!(found.join("\n"), @"
        the profile is not valid: `calibration` has 18446744073709551615 for `backward_ppm`, needed at most 1000000000000
        the profile is not valid: a sample of `op` has 18446744073709551615 for `rows`, needed at most 1099511627776
        the profile is not valid: a sample of `op` has 18446744073709551615 for `forward_ns`, needed at most 9007199254740992
        ");
    }

    proptest! {
        #[test]
        fn json_round_trips(times in prop::collection::vec((0..99u64, 0..99u64), 1..4), ppm in 1..9u64) {
            let samples = times.iter().zip(1..).map(|(&(forward_ns, backward_ns), rows)| {
                Sample { rows, forward_ns, backward_ns }
            });
            let profile = Profile {
                device: "cpu".into(),
                settings: [("threads".into(), "1".into())].into(),
                calibration: Calibration { forward_ppm: ppm, backward_ppm: ppm * 2 },
                entries: [("op".into(), samples.collect())].into(),
            };
            prop_assert_eq!(Profile::from_json(&profile.to_json()).unwrap(), profile);
        }
    }
}
