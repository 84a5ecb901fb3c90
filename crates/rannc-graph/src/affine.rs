//! Quantities that grow with the number of rows in the batch.

use std::fmt;
use std::ops::{Add, AddAssign};

use serde::de::{Error, IgnoredAny, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// `per_row * rows + fixed`: a size, a byte count or an operation count as a function of the batch.
///
/// In JSON a plain number when it does not depend on the batch, else `[per_row, fixed]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Affine {
    /// Growth with each row of the batch.
    pub per_row: i64,
    /// The part that every batch has.
    pub fixed: i64,
}

impl Affine {
    /// A quantity that no batch changes.
    pub const fn fixed(fixed: i64) -> Self {
        Self { per_row: 0, fixed }
    }

    /// A quantity proportional to the number of rows.
    pub const fn per_row(per_row: i64) -> Self {
        Self { per_row, fixed: 0 }
    }

    /// The quantity for a batch of `rows`, never below zero; saturates instead of overflowing.
    pub fn at(self, rows: u64) -> u64 {
        let rows = i64::try_from(rows).unwrap_or(i64::MAX);
        let value = self.per_row.saturating_mul(rows).saturating_add(self.fixed);
        u64::try_from(value).unwrap_or(0)
    }

    /// Whether the batch size makes no difference.
    pub const fn is_fixed(self) -> bool {
        self.per_row == 0
    }
}

impl Add for Affine {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            per_row: self.per_row.saturating_add(other.per_row),
            fixed: self.fixed.saturating_add(other.fixed),
        }
    }
}

impl AddAssign for Affine {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Serialize for Affine {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.is_fixed() {
            self.fixed.serialize(serializer)
        } else {
            (self.per_row, self.fixed).serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Affine {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AffineVisitor)
    }
}

/// Reads either form; a derived reader would not say which number it could not take.
struct AffineVisitor;

impl<'de> Visitor<'de> for AffineVisitor {
    type Value = Affine;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number below 2^63, or two of them as `[per_row, fixed]`")
    }

    fn visit_i64<E: Error>(self, fixed: i64) -> Result<Affine, E> {
        Ok(Affine::fixed(fixed))
    }

    fn visit_u64<E: Error>(self, fixed: u64) -> Result<Affine, E> {
        match i64::try_from(fixed) {
            Ok(fixed) => Ok(Affine::fixed(fixed)),
            Err(_) => Err(E::invalid_value(Unexpected::Unsigned(fixed), &self)),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut numbers: A) -> Result<Affine, A::Error> {
        let mut next = |index| {
            let number = numbers.next_element::<i64>()?;
            number.ok_or_else(|| A::Error::invalid_length(index, &self))
        };
        let (per_row, fixed) = (next(0)?, next(1)?);
        if numbers.next_element::<IgnoredAny>()?.is_some() {
            return Err(A::Error::invalid_length(3, &self));
        }
        Ok(Affine { per_row, fixed })
    }
}

#[cfg(test)]
mod tests {
    use super::Affine;

    #[test]
    fn json_is_short_for_fixed_sizes() {
        assert_eq!(serde_json::to_string(&Affine::fixed(7)).unwrap(), "7");
        assert_eq!(serde_json::to_string(&Affine { per_row: 5, fixed: -1 }).unwrap(), "[5,-1]");
        assert_eq!(
            serde_json::from_str::<Affine>("[5,-1]").unwrap(),
            Affine { per_row: 5, fixed: -1 }
        );
    }

    #[test]
    fn other_forms_are_refused_with_their_place() {
        let refused = |text| serde_json::from_str::<Affine>(text).unwrap_err().to_string();
        let found = ["9223372036854775808", "1.5", "[1]", "[1, 2, 3]", "[1, 1e30]"].map(refused);
        insta::assert_snapshot!(found.join("\n"), @"
        invalid value: integer `9223372036854775808`, expected a whole number below 2^63, or two of them as `[per_row, fixed]` at line 1 column 19
        invalid type: floating point `1.5`, expected a whole number below 2^63, or two of them as `[per_row, fixed]` at line 1 column 3
        invalid length 1, expected a whole number below 2^63, or two of them as `[per_row, fixed]` at line 1 column 3
        invalid length 3, expected a whole number below 2^63, or two of them as `[per_row, fixed]` at line 1 column 9
        invalid type: floating point `1e+30`, expected i64 at line 1 column 8
        ");
    }

    #[test]
    fn huge_products_saturate() {
        assert_eq!(Affine::per_row(i64::MAX).at(3), i64::MAX as u64);
        assert_eq!(Affine { per_row: 1, fixed: -9 }.at(3), 0);
    }
}
