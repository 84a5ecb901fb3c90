"""Models of Hugging Face's transformers, as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import pyrannc

if TYPE_CHECKING:
    from tests.gloo.pool import Pools

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(120)]

ROWS, LENGTH, WORDS = 6, 12, 50


def gpt2() -> torch.nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS,
            n_positions=LENGTH,
            n_embd=16,
            n_layer=3,
            n_head=2,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    )


def bert() -> torch.nn.Module:
    return transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=WORDS,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
        )
    )


def arguments(name: str) -> dict[str, torch.Tensor]:
    """A batch; a third of the labels counts, so that parts have different numbers of them."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(WORDS, (ROWS, LENGTH), generator=generator)
    ignored = torch.rand(ROWS, LENGTH, generator=generator) > 0.3
    found = {"input_ids": tokens, "labels": tokens.masked_fill(ignored, -100)}
    if name == "bert":
        found["next_sentence_label"] = torch.randint(2, (ROWS,), generator=generator)
    return found


def train(name: str) -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append({"gpt2": gpt2, "bert": bert}[name]().double())
    bare, model = made
    config = pyrannc.Config(
        partition_num=2, pipeline_num=2, measure=False, profile_cache_dir="off", timeout_s=60
    )
    wrapped = pyrannc.RaNNCModule(model, torch.optim.Adam(model.parameters()), config=config)
    rows = slice(0, 4) if pyrannc.get_rank() == 0 else slice(4, ROWS)
    whole = arguments(name)
    ours: Any = wrapped(**{key: tensor[rows] for key, tensor in whole.items()})
    theirs = bare(**whole)
    assert type(ours) is type(theirs)
    ours.loss.backward()
    theirs.loss.backward()
    # The models compute their loss in float32.
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=1e-6)
    for key, parameter in bare.named_parameters():
        found = wrapped.get_param_grad(key)
        torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-8)
    wrapped.undeploy()


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_model_of_transformers_trains_in_two_stages(pools: Pools, name: str) -> None:
    pools.run(2, train, name, seconds=100)
