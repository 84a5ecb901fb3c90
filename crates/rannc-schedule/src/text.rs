//! The text form of actions, made for tests and error messages.
//!
//! ```text
//! 2F0[8]                             forward of stage 2, microbatch 0, 8 rows
//! 2B0[8]                             backward
//! 2SEND_F0 v7[0:4]>3                 rows 0 to 4 of its value 7 to rank 3
//! 2SEND_F0 v7>3!                     the whole value; `!`: the last use of the slot on this rank
//! 2RECV_B1 v7[0:4/8]<1               the gradient of rows 0 to 4 of 8 from rank 1
//! 2RECV_F1 v9[/8]<1                  a whole value that was made from 8 rows
//! inCOPY_F v7[4:8]>2_F0 v7[0:4/4]!   from this rank's model inputs (outputs: `out`) to stage 2
//! REDUCE_GRADIENTS 3                 add up the gradients of group 3
//! REDUCE_OUTPUT 9                    add up output value 9
//! ```

use std::fmt;
use std::str::FromStr;

use crate::{Action, Pass, Place, RankId, RowRange, ScheduleError, Slot, StageId};

impl fmt::Display for RowRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.start, self.end)
    }
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Forward => "F",
            Self::Backward => "B",
        })
    }
}

impl Slot {
    fn write_stamp(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            Place::Stage(_) => write!(f, "{}{}", self.pass, self.microbatch),
            Place::Source | Place::Sink => write!(f, "{}", self.pass),
        }
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_", self.place)?;
        self.write_stamp(f)?;
        write!(f, " v{}", self.value)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forward { stage, microbatch, rows } => write!(f, "{stage}F{microbatch}[{rows}]"),
            Self::Backward { stage, microbatch, rows } => write!(f, "{stage}B{microbatch}[{rows}]"),
            Self::Send { slot, rows, peer, release } => {
                write_verb(f, slot, "SEND")?;
                write_rows(f, *rows)?;
                write!(f, ">{peer}{}", mark(*release))
            }
            Self::Recv { slot, rows, total, peer } => {
                write_verb(f, slot, "RECV")?;
                write_part(f, *rows, *total)?;
                write!(f, "<{peer}")
            }
            Self::Copy { from, from_rows, to, to_rows, total, release } => {
                write_verb(f, from, "COPY")?;
                write_rows(f, *from_rows)?;
                write!(f, ">{to}")?;
                write_part(f, *to_rows, *total)?;
                f.write_str(mark(*release))
            }
            Self::ReduceGradients { group } => write!(f, "REDUCE_GRADIENTS {group}"),
            Self::ReduceOutput { value } => write!(f, "REDUCE_OUTPUT {value}"),
        }
    }
}

fn write_verb(f: &mut fmt::Formatter<'_>, slot: &Slot, verb: &str) -> fmt::Result {
    write!(f, "{}{verb}_", slot.place)?;
    slot.write_stamp(f)?;
    write!(f, " v{}", slot.value)
}

fn write_rows(f: &mut fmt::Formatter<'_>, rows: Option<RowRange>) -> fmt::Result {
    match rows {
        Some(rows) => write!(f, "[{rows}]"),
        None => Ok(()),
    }
}

fn write_part(f: &mut fmt::Formatter<'_>, rows: Option<RowRange>, total: u64) -> fmt::Result {
    match rows {
        Some(rows) => write!(f, "[{rows}/{total}]"),
        None => write!(f, "[/{total}]"),
    }
}

const fn mark(release: bool) -> &'static str {
    if release { "!" } else { "" }
}

impl FromStr for Action {
    type Err = ScheduleError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut reader = Reader { rest: text };
        let action = reader.action();
        match action {
            Some(action) if reader.rest.is_empty() => Ok(action),
            _ => Err(ScheduleError::ParseAction {
                text: text.to_owned(),
                problem: match reader.rest {
                    "" => "it ends too early".into(),
                    rest => format!("`{rest}` is not understood"),
                },
            }),
        }
    }
}

/// Reads the text form from left to right; `None` where it finds something else.
struct Reader<'a> {
    rest: &'a str,
}

impl Reader<'_> {
    fn skip(&mut self, word: &str) -> Option<()> {
        self.rest = self.rest.strip_prefix(word)?;
        Some(())
    }

    fn number<T: FromStr>(&mut self) -> Option<T> {
        let end = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
        let number = self.rest[..end].parse().ok()?;
        self.rest = &self.rest[end..];
        Some(number)
    }

    fn action(&mut self) -> Option<Action> {
        if self.skip("REDUCE_GRADIENTS ").is_some() {
            return Some(Action::ReduceGradients { group: self.number()? });
        }
        if self.skip("REDUCE_OUTPUT ").is_some() {
            return Some(Action::ReduceOutput { value: self.number()? });
        }
        let place = self.place()?;
        if self.skip("SEND_").is_some() {
            let (slot, rows) = (self.slot(place)?, self.rows());
            self.skip(">")?;
            Some(Action::Send { slot, rows, peer: RankId(self.number()?), release: self.mark() })
        } else if self.skip("RECV_").is_some() {
            let (slot, (rows, total)) = (self.slot(place)?, self.part()?);
            self.skip("<")?;
            Some(Action::Recv { slot, rows, total, peer: RankId(self.number()?) })
        } else if self.skip("COPY_").is_some() {
            let (from, from_rows) = (self.slot(place)?, self.rows());
            self.skip(">")?;
            let place = self.place()?;
            self.skip("_")?;
            let (to, (to_rows, total)) = (self.slot(place)?, self.part()?);
            Some(Action::Copy { from, from_rows, to, to_rows, total, release: self.mark() })
        } else {
            self.compute(place)
        }
    }

    fn compute(&mut self, place: Place) -> Option<Action> {
        let Place::Stage(stage) = place else { return None };
        let pass = self.pass()?;
        let microbatch = self.number()?;
        self.skip("[")?;
        let rows = self.number()?;
        self.skip("]")?;
        Some(match pass {
            Pass::Forward => Action::Forward { stage, microbatch, rows },
            Pass::Backward => Action::Backward { stage, microbatch, rows },
        })
    }

    fn place(&mut self) -> Option<Place> {
        if self.skip("in").is_some() {
            Some(Place::Source)
        } else if self.skip("out").is_some() {
            Some(Place::Sink)
        } else {
            Some(Place::Stage(StageId(self.number()?)))
        }
    }

    fn pass(&mut self) -> Option<Pass> {
        if self.skip("F").is_some() {
            Some(Pass::Forward)
        } else {
            self.skip("B").map(|()| Pass::Backward)
        }
    }

    fn slot(&mut self, place: Place) -> Option<Slot> {
        let pass = self.pass()?;
        let microbatch = if matches!(place, Place::Stage(_)) { self.number()? } else { 0 };
        self.skip(" v")?;
        Some(Slot { place, microbatch, value: self.number()?, pass })
    }

    /// Rows in brackets; reads nothing where there are none.
    fn rows(&mut self) -> Option<RowRange> {
        let before = self.rest;
        let rows = self.bracketed();
        if rows.is_none() {
            self.rest = before;
        }
        rows
    }

    fn bracketed(&mut self) -> Option<RowRange> {
        self.skip("[")?;
        let rows = self.range()?;
        self.skip("]")?;
        Some(rows)
    }

    fn part(&mut self) -> Option<(Option<RowRange>, u64)> {
        self.skip("[")?;
        let rows = if self.rest.starts_with('/') { None } else { Some(self.range()?) };
        self.skip("/")?;
        let total = self.number()?;
        self.skip("]")?;
        Some((rows, total))
    }

    fn range(&mut self) -> Option<RowRange> {
        let start = self.number()?;
        self.skip(":")?;
        Some(RowRange::new(start, self.number()?))
    }

    fn mark(&mut self) -> bool {
        self.skip("!").is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::Action;

    #[test]
    fn text_form_round_trips() {
        for text in [
            "2F0[8]",
            "12B3[1]",
            "2SEND_F0 v7[0:4]>3",
            "2SEND_B10 v7>3!",
            "inSEND_F v7[4:8]>0!",
            "2RECV_B1 v7[0:4/8]<1",
            "outRECV_F v9[/8]<1",
            "inCOPY_F v7[4:8]>2_F0 v7[0:4/4]!",
            "1COPY_F2 v7>out_F v7[/4]",
            "REDUCE_GRADIENTS 3",
            "REDUCE_OUTPUT 9",
        ] {
            assert_eq!(text.parse::<Action>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_text_is_refused() {
        for text in [
            "",
            "2",
            "2F",
            "2F0",
            "inF0[8]",
            "2SEND_F v7>3",
            "2F0[8]x",
            "2RECV_F0 v7<1",
            "2SEND_F0 v7[0:4>3",
        ] {
            assert!(text.parse::<Action>().is_err(), "{text}");
        }
        let error = "2SEND_F0 v7[0:4]<3".parse::<Action>().unwrap_err();
        insta::assert_snapshot!(error, @"`2SEND_F0 v7[0:4]<3` is not an action: `<3` is not understood");
    }

    #[test]
    fn labels_are_short() {
        let label = |text: &str| text.parse::<Action>().unwrap().label();
        assert_eq!(label("2F0[8]"), "2F0");
        assert_eq!(label("2SEND_F0 v7[0:4]>3"), "2SEND_F0");
    }
}
