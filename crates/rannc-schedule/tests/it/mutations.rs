//! The checker refuses every program with a single thing wrong.

use proptest::prelude::*;
use proptest::sample::Index;
use rannc_schedule::{
    Action, Flow, Pass, Place, Program, RankId, RowRange, Slot, StageId, check, compile,
};

use crate::pipelines::{Case, batch, cases, chain};
use crate::properties::program;
use crate::simulation::timeline;

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

/// The slot and rows at the other end of a transfer, which is at the same position between the two ranks.
fn other_end(lists: &[Vec<Action>], rank: usize, step: usize) -> Option<(Slot, Option<RowRange>)> {
    let (Action::Send { peer, .. } | Action::Recv { peer, .. }) = lists[rank][step] else {
        return None;
    };
    let between = |action: &&Action, other: usize| match action {
        Action::Send { peer, .. } | Action::Recv { peer, .. } => peer.index() == other,
        _ => false,
    };
    let number = lists[rank][..step].iter().filter(|action| between(action, peer.index())).count();
    match lists[peer.index()].iter().filter(|action| between(action, rank)).nth(number) {
        Some(&(Action::Send { slot, rows, .. } | Action::Recv { slot, rows, .. })) => {
            Some((slot, rows))
        }
        other => panic!("{other:?} is no other end"),
    }
}

/// Whether two actions may change places although they are transfers with the same peer: they are equal,
/// one piece goes to two slots, or two gradients are added to the same rows.
fn alike(lists: &[Vec<Action>], rank: usize, first: usize, second: usize) -> bool {
    let end = other_end(lists, rank, first);
    lists[rank][first] == lists[rank][second]
        || (end.is_some() && end == other_end(lists, rank, second))
}

/// Whether the second action must stay behind the first.
fn depends(first: &Action, second: &Action, case: &Case) -> bool {
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
        let lists = lists(&mut program, pass);
        let bound = |after: &usize| {
            depends(&lists[rank][step], &lists[rank][*after], &case)
                && !alike(lists, rank, step, *after)
        };
        let after: Vec<usize> = (step + 1..lists[rank].len()).filter(bound).collect();
        let list = &mut lists[rank];
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

fn small_or_huge() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0..6u64, 1 => any::<u64>()]
}

fn any_slot() -> impl Strategy<Value = Slot> {
    let place = prop_oneof![
        Just(Place::Source),
        Just(Place::Sink),
        (0..6u32).prop_map(|stage| Place::Stage(StageId(stage))),
    ];
    let pass = prop_oneof![Just(Pass::Forward), Just(Pass::Backward)];
    let value = prop_oneof![0..6u32, 11..16u32];
    (place, small_or_huge(), value, pass).prop_map(|(place, microbatch, value, pass)| Slot {
        place,
        microbatch: microbatch as u32,
        value,
        pass,
    })
}

fn any_rows() -> impl Strategy<Value = Option<RowRange>> {
    let range = (small_or_huge(), small_or_huge());
    prop::option::of(range.prop_map(|(start, end)| RowRange::new(start, end)))
}

fn any_action() -> impl Strategy<Value = Action> {
    let work = (0..6u32, small_or_huge(), small_or_huge(), any::<bool>());
    let end = || (any_slot(), any_rows());
    let details = (small_or_huge(), 0..7u32, any::<bool>());
    prop_oneof![
        work.prop_map(|(stage, microbatch, rows, forward)| {
            let (stage, microbatch) = (StageId(stage), microbatch as u32);
            if forward {
                Action::Forward { stage, microbatch, rows }
            } else {
                Action::Backward { stage, microbatch, rows }
            }
        }),
        (end(), end(), details, 0..3u8).prop_map(|(from, to, (total, peer, release), kind)| {
            let ((slot, rows), peer) = (from, RankId(peer));
            match kind {
                0 => Action::Send { slot, rows, peer, release },
                1 => Action::Recv { slot, rows, total, peer },
                _ => {
                    let (from_rows, (to, to_rows)) = (rows, to);
                    Action::Copy { from: slot, from_rows, to, to_rows, total, release }
                }
            }
        }),
        (0..12u32).prop_map(|group| Action::ReduceGradients { group }),
        (0..16u32).prop_map(|value| Action::ReduceOutput { value }),
    ]
}

proptest! {
    #[test]
    fn nonsense_does_no_harm(
        case in cases(),
        changes in prop::collection::vec((any::<Index>(), any_action()), 1..4),
    ) {
        let mut program = program(&case);
        let before = program.clone();
        for (index, action) in changes {
            let (pass, rank, step) = *index.get(&places(&program));
            lists(&mut program, pass)[rank][step] = action;
        }
        prop_assert!(program == before || refused(&program, &case));
        let _ = timeline(&program, &case.pipeline, 1);
    }

    #[test]
    fn lists_for_other_ranks_are_refused(case in cases(), less in any::<bool>()) {
        let mut program = program(&case);
        if less {
            program.forward.pop();
        } else {
            program.forward.push(vec![Action::ReduceOutput { value: 0 }]);
        }
        prop_assert!(refused(&program, &case));
        prop_assert!(timeline(&program, &case.pipeline, 1).is_err());
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
