//! The checker refuses every program with a single thing wrong.

use proptest::prelude::*;
use proptest::sample::Index;
use rannc_schedule::{Action, Flow, Pass, Place, Program, RankId, Slot, StageId, check, compile};

use crate::pipelines::{Case, batch, cases, chain};
use crate::properties::program;

fn refused(program: &Program, case: &Case) -> bool {
    check(program, &case.pipeline, &case.batch, case.mode).is_err()
}

fn lists(program: &mut Program, pass: usize) -> &mut Vec<Vec<Action>> {
    if pass == 0 { &mut program.forward } else { &mut program.backward }
}

/// The pass, rank and step of every action.
fn places(program: &Program) -> Vec<(usize, usize, usize)> {
    let passes = program.passes().into_iter().enumerate();
    let lists = passes.flat_map(|(pass, (_, lists))| {
        lists.iter().enumerate().map(move |(rank, list)| (pass, rank, list.len()))
    });
    lists.flat_map(|(pass, rank, len)| (0..len).map(move |step| (pass, rank, step))).collect()
}

/// What an action uses, makes and uses up.
#[derive(Default)]
struct Uses {
    reads: Vec<Thing>,
    writes: Vec<Thing>,
    takes: Vec<Thing>,
}

#[derive(Clone, Copy, PartialEq)]
enum Thing {
    Slot(Slot),
    Activations(StageId, u32),
    Gradients(StageId),
    Peer(RankId),
    Reductions,
}

fn uses(action: &Action, case: &Case) -> Uses {
    let mut uses = Uses::default();
    let flows = &case.pipeline.flows;
    let slots = |keep: &dyn Fn(&&Flow) -> bool, place: Place, microbatch: u32, pass: Pass| {
        let kept = flows.iter().filter(keep);
        let slot = |flow: &Flow| Thing::Slot(Slot::new(place, microbatch, flow.value, pass));
        kept.map(slot).collect::<Vec<_>>()
    };
    let mut moves = |from: Slot, release: bool| {
        let things = if release { &mut uses.takes } else { &mut uses.reads };
        things.push(Thing::Slot(from));
    };
    match *action {
        Action::Forward { stage, microbatch, .. } => {
            let place = Place::Stage(stage);
            uses.takes = slots(&|flow| flow.to.contains(&place), place, microbatch, Pass::Forward);
            uses.writes = slots(&|flow| flow.from == place, place, microbatch, Pass::Forward);
            uses.writes.push(Thing::Activations(stage, microbatch));
        }
        Action::Backward { stage, microbatch, .. } => {
            let place = Place::Stage(stage);
            uses.takes = slots(&|flow| flow.from == place, place, microbatch, Pass::Backward);
            uses.writes =
                slots(&|flow| flow.to.contains(&place), place, microbatch, Pass::Backward);
            uses.takes.push(Thing::Activations(stage, microbatch));
            uses.writes.push(Thing::Gradients(stage));
        }
        Action::Send { slot, peer, release, .. } => {
            moves(slot, release);
            uses.writes.push(Thing::Peer(peer));
            uses.reads.push(Thing::Peer(peer));
        }
        Action::Recv { slot, peer, .. } => {
            uses.writes = vec![Thing::Slot(slot), Thing::Peer(peer)];
            uses.reads.push(Thing::Peer(peer));
        }
        Action::Copy { from, to, release, .. } => {
            moves(from, release);
            uses.writes.push(Thing::Slot(to));
        }
        Action::ReduceGradients { group } => {
            let groups = &case.pipeline.gradient_groups;
            let group = groups.iter().find(|other| other.id == group).unwrap();
            uses.reads = group.stages.iter().map(|&stage| Thing::Gradients(stage)).collect();
            uses.reads.push(Thing::Reductions);
            // Two groups that meet in one rank only may swap.
            if group.ranks.len() as u32 == case.pipeline.world_size {
                uses.writes.push(Thing::Reductions);
            }
        }
        Action::ReduceOutput { value } => {
            let output = Slot::new(Place::Sink, 0, value, Pass::Forward);
            uses.reads = vec![Thing::Slot(output), Thing::Reductions];
            uses.writes.push(Thing::Reductions);
        }
    }
    uses
}

/// Whether two receives get the same piece for two of its consumers, or are equal.
fn alike(first: &Action, second: &Action) -> bool {
    match (first, second) {
        (
            Action::Recv { slot, rows, peer, .. },
            Action::Recv { slot: other_slot, rows: other_rows, peer: other_peer, .. },
        ) => {
            (slot.place != other_slot.place || slot == other_slot)
                && (slot.value, slot.pass, rows, peer)
                    == (other_slot.value, other_slot.pass, other_rows, other_peer)
        }
        _ => false,
    }
}

/// Whether the second action must stay behind the first.
fn depends(first: &Action, second: &Action, case: &Case) -> bool {
    if alike(first, second) {
        return false;
    }
    let (first, second) = (uses(first, case), uses(second, case));
    let common = |left: &[Thing], right: &[Thing]| left.iter().any(|thing| right.contains(thing));
    common(&first.writes, &second.reads)
        || common(&first.writes, &second.takes)
        || common(&first.reads, &second.takes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn an_action_less_is_refused(case in cases(), index in any::<Index>()) {
        let mut program = program(&case);
        let (pass, rank, step) = *index.get(&places(&program));
        let removed = lists(&mut program, pass)[rank].remove(step);
        prop_assert!(refused(&program, &case), "without {} of rank {}", removed, rank);
    }

    #[test]
    fn an_action_twice_is_refused(case in cases(), index in any::<Index>()) {
        let mut program = program(&case);
        let (pass, rank, step) = *index.get(&places(&program));
        let action = lists(&mut program, pass)[rank][step];
        lists(&mut program, pass)[rank].insert(step, action);
        prop_assert!(refused(&program, &case), "{} of rank {} twice", action, rank);
    }

    #[test]
    fn another_peer_is_refused(case in cases(), index in any::<Index>(), other in any::<u32>()) {
        let mut program = program(&case);
        let mut places = places(&program);
        places.retain(|&(pass, rank, step)| {
            let action = &program.passes()[pass].1[rank][step];
            matches!(action, Action::Send { .. } | Action::Recv { .. })
        });
        if places.is_empty() {
            return Ok(());
        }
        let (pass, rank, step) = *index.get(&places);
        let action = &mut lists(&mut program, pass)[rank][step];
        let (Action::Send { peer, .. } | Action::Recv { peer, .. }) = action else {
            unreachable!("only those were kept")
        };
        // One rank beyond the last is a wrong peer, too.
        let num_wrong = case.pipeline.world_size;
        peer.0 = (peer.0 + 1 + other % num_wrong) % (num_wrong + 1);
        prop_assert!(refused(&program, &case));
    }

    #[test]
    fn another_order_is_refused(case in cases(), index in any::<Index>(), other in any::<Index>()) {
        let mut program = program(&case);
        let (pass, rank, step) = *index.get(&places(&program));
        let list = &mut lists(&mut program, pass)[rank];
        let after: Vec<usize> =
            (step + 1..list.len()).filter(|&after| depends(&list[step], &list[after], &case)).collect();
        if after.is_empty() {
            return Ok(());
        }
        let after = *other.get(&after);
        let (first, second) = (list[step], list[after]);
        list.swap(step, after);
        prop_assert!(refused(&program, &case), "{} after {} of rank {}", first, second, rank);
    }

    #[test]
    fn other_details_are_refused(case in cases(), index in any::<Index>(), detail in 0..4u8) {
        let mut program = program(&case);
        let (pass, rank, step) = *index.get(&places(&program));
        let action = &mut lists(&mut program, pass)[rank][step];
        let before = *action;
        match action {
            Action::Forward { rows, .. } | Action::Backward { rows, .. } => *rows += 1,
            Action::Send { slot, rows, release, .. } => match (detail, rows) {
                (0, _) => *release = !*release,
                (1, _) => slot.value += 1,
                (2, Some(rows)) => rows.end += 1,
                (_, _) => slot.pass = if slot.pass == Pass::Forward { Pass::Backward } else { Pass::Forward },
            },
            Action::Recv { slot, rows, total, .. } => match (detail, rows) {
                (0, _) => *total += 1,
                (1, _) => slot.value += 1,
                (2, Some(rows)) => rows.start += 1,
                (_, rows) => *rows = None.or(rows.xor(Some((7..9).into()))),
            },
            Action::Copy { to, from_rows, to_rows, total, release, .. } => match (detail, to_rows) {
                (0, _) => *release = !*release,
                (1, _) => to.value += 1,
                (2, _) => *total += 1,
                (_, Some(rows)) => rows.end += 1,
                (_, None) => *from_rows = Some((0..1).into()),
            },
            Action::ReduceGradients { group } => *group += 1,
            Action::ReduceOutput { value } => *value += 1,
        }
        prop_assert!(refused(&program, &case), "{} for {}", before, rank);
    }
}

#[test]
fn the_error_shows_the_place() {
    let pipeline = chain(2, &[&[0], &[1]]);
    let case = Case {
        pipeline: pipeline.clone(),
        batch: batch(&[2, 2], 2),
        schedule: rannc_schedule::ScheduleKind::FillDrain,
        mode: rannc_schedule::Mode::Training,
    };
    let mut program = compile(&pipeline, &case.batch, case.schedule, case.mode).unwrap();
    let list = &mut program.backward[1];
    let last = list.len() - 1;
    list.swap(last, last - 1);
    let error = check(&program, &pipeline, &case.batch, case.mode).unwrap_err();
    insta::assert_snapshot!(error, @r"
    the program is not valid: rank 0, step 3 of backward: `0B1[2]`: it waits for ever: what it needs comes later, or after something that waits for this rank
    rank 0 | 0B0 >>0B1<<
    rank 1 | 1B0 1B1
    ");
    program.backward[1].remove(last);
    let error = check(&program, &pipeline, &case.batch, case.mode).unwrap_err();
    insta::assert_snapshot!(error, @r"
    the program is not valid: rank 1 never runs `1B1`
    rank 0 | 0F0 0F1
    rank 1 | 1F0 1F1
    ");
}
