"""The shared models themselves: they run, train, repeat, and say the truth about their batches."""

from __future__ import annotations

import pytest
import torch

from tests.models import CASES, Case, slice_rows

PARAMETERS = [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow, pytest.mark.timeout(300)])
    if case.slow
    else pytest.param(case, id=case.name)
    for case in CASES
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def gradients(case: Case, start: int, stop: int, rows: int = 6) -> dict[str, torch.Tensor]:
    model = case.make_model()
    args, kwargs = slice_rows(case.make_batch(rows), start, stop)
    loss = case.make_loss(model(*args, **kwargs))
    assert loss.dim() == 0
    if loss.requires_grad:
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"": loss.detach(), **found}


@pytest.mark.parametrize("case", PARAMETERS)
def test_case(case: Case) -> None:
    whole = gradients(case, 0, 6)
    num_parameters = len(list(case.make_model().parameters()))
    assert len(whole) == 1 + num_parameters
    assert (num_parameters > 0) == case.has_parameters
    again = gradients(case, 0, 6)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("case", PARAMETERS)
def test_parts_weighted_by_rows_make_the_whole_where_said(case: Case) -> None:
    whole, first, second = gradients(case, 0, 6), gradients(case, 0, 2), gradients(case, 2, 6)
    equal = all(
        torch.allclose(whole[name], (first[name] * 2 + second[name] * 4) / 6, rtol=1e-4, atol=1e-6)
        for name in whole
    )
    weighted_by_targets = case.name == "masked_loss"
    assert equal == (case.splittable and not case.batch_norm and not weighted_by_targets)
