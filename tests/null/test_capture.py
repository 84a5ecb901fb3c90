"""Stages cut out of captured models give what the bare models give."""

from __future__ import annotations

import pytest
import torch

from pyrannc.capture import capture, input_signature
from tests.models import QUICK_CASES, Case
from tests.null.capturing import Graph, check_against_bare, check_parts

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("case", QUICK_CASES, ids=str)
def test_stages_equal_the_bare_model(case: Case) -> None:
    model = case.make_model()
    args, kwargs = case.make_batch(8)
    graph = Graph.of(capture(model, args, kwargs))
    assert graph.splittable == case.splittable, graph.reason
    counts = [8, 6, 3, 1] if graph.captured.static_rows is None else [8]
    if case.batch_norm:
        counts = counts[:-1]
    for rows in counts:
        args, kwargs = case.make_batch(rows)
        check_against_bare(model, graph, args, kwargs, bare=case.make_model())


@pytest.mark.parametrize("case", [case for case in QUICK_CASES if case.splittable], ids=str)
def test_parts_make_up_the_whole(case: Case) -> None:
    model = case.make_model()
    if case.batch_norm:
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
                if not module.track_running_stats:
                    pytest.skip("normalises over the batch in any mode")
    args, kwargs = case.make_batch(7)
    graph = Graph.of(capture(model, args, kwargs))
    tensors = graph.captured.flatten_inputs(args, kwargs)
    tolerance = 1e-10 if case.float64_ok else 1e-4
    check_parts(model, graph, tensors, [1, 3], tolerance)


def test_a_batch_of_one_row_is_captured_for_any() -> None:
    model = torch.nn.Linear(3, 2).double()
    graph = Graph.of(capture(model, (torch.randn(1, 3).double(),)))
    assert graph.captured.static_rows is None
    assert graph.data["batch"]["rows"] == 1
    for rows in (1, 2, 5):
        check_against_bare(model, graph, (torch.randn(rows, 3).double(),), {})


def test_signatures_tell_calls_apart() -> None:
    x = torch.randn(4, 3)
    same = input_signature((x,), {"scale": 2.0})
    assert input_signature((torch.randn(7, 3),), {"scale": 2.0}) == same
    assert input_signature((torch.randn(7, 4),), {"scale": 2.0}) != same
    assert input_signature((x,), {"scale": 3.0}) != same
    assert input_signature((x.double(),), {"scale": 2.0}) != same
    assert input_signature((x.clone().requires_grad_(),), {"scale": 2.0}) != same
    assert input_signature(([x],), {"scale": 2.0}) != same
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert input_signature((x,), {"scale": 2.0}) != same
