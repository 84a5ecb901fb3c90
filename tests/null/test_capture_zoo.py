"""Models from libraries, small and with random weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyrannc.capture import capture
from pyrannc.stage import build_stage
from tests.null.capturing import Graph, captured_graph, check_against_bare, check_parts

VOCABULARY = 50


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _tokens(rows: int, length: int = 12) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length))


def _masked(tokens: Tensor) -> Tensor:
    labels = tokens.clone()
    labels[::2, :5] = -100
    return labels


def _check(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    exact: bool = True,
    tolerance: float = 1e-9,
) -> Graph:
    graph = captured_graph(model, *args, **kwargs)
    check_against_bare(model, graph, args, kwargs, exact=exact)
    tensors = graph.captured.flatten_inputs(args, kwargs)
    check_parts(model, graph, tensors, [1, 3], tolerance)
    return graph


def test_transformer_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).double()
    mask = nn.Transformer.generate_square_subsequent_mask(5).double()
    _check(layer, (torch.randn(5, 5, 16).double(),), {"src_mask": mask})


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer_with_time_first() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, 16)
            self.model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            source = self.embedding(source).transpose(0, 1)
            return self.model(source, self.embedding(target).transpose(0, 1)).transpose(0, 1)

    _check(Model().double(), (_tokens(5), _tokens(5, 7)), {})


def test_multihead_attention_with_padding() -> None:
    attention = nn.MultiheadAttention(16, 4, batch_first=True).double()
    x = torch.randn(5, 6, 16).double()
    padding = torch.zeros(5, 6, dtype=torch.bool)
    padding[:, 4:] = True
    _check(attention, (x, x.clone(), x.clone()), {"key_padding_mask": padding})


def test_resnet() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=7).double()
    images = torch.randn(4, 3, 32, 32).double()
    graph = captured_graph(model, images)
    assert graph.splittable
    bare = copy.deepcopy(model)
    for rows in (4, 3):
        check_against_bare(model, graph, (images[:rows],), {}, bare=bare)
    model.eval()
    check_parts(model, captured_graph(model, images), [images], [1], 1e-9)


def test_vision_transformer() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=5
    )
    _check(model.double(), (torch.randn(4, 3, 32, 32).double(),), {})


def test_swin_transformer() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.SwinTransformer(
        [2, 2], 16, [2, 2], [2, 4], [2, 2], stochastic_depth_prob=0.0, num_classes=5
    )
    _check(model.double(), (torch.randn(4, 3, 32, 32).double(),), {}, exact=False)


SMALL = {"hidden_size": 16, "vocab_size": VOCABULARY, "num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _gpt2(transformers: Any) -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=16, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _bert(transformers: Any) -> nn.Module:
    config = transformers.BertConfig(
        **SMALL, **NO_DROPOUT, num_hidden_layers=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def _llama(transformers: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        **SMALL, num_hidden_layers=2, intermediate_size=32, num_key_value_heads=1,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _t5(transformers: Any) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [_gpt2, _bert, _llama, _t5], ids=lambda make: make.__name__[1:])
@pytest.mark.parametrize("masked", [True, False])
def test_language_models(make: Any, masked: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = make(transformers).double().train()
    tokens = _tokens(5)
    kwargs: dict[str, Any] = {"labels": _masked(tokens)}
    if masked:
        kwargs["attention_mask"] = torch.ones_like(tokens)
        kwargs["attention_mask"][1, 7:] = 0
    # The losses are computed in float32.
    graph = _check(model, (tokens,), kwargs, exact=False, tolerance=1e-5)
    tensors = graph.captured.flatten_inputs((tokens,), kwargs)
    counts = [count(tensors) for count in graph.captured.denominators]
    results = graph.run(graph.cut(2), tensors, 5, 1.0, counts)
    rebuilt = graph.captured.unflatten_outputs(results)
    bare = model(tokens, **kwargs)
    assert type(rebuilt) is type(bare)
    torch.testing.assert_close(rebuilt.loss, bare.loss)
    torch.testing.assert_close(rebuilt["logits"], bare["logits"])


def test_tied_parameters_are_the_users_own() -> None:
    transformers = pytest.importorskip("transformers")
    model = _gpt2(transformers)
    graph = captured_graph(model, _tokens(3))
    first, *_, last = graph.cut(3)
    (tied,) = {name for name in first.parameters if first.parameters[name] is model.lm_head.weight}
    assert last.parameters[tied] is model.transformer.wte.weight
    assert tied == next(iter(dict(model.named_parameters())))


def test_results_of_all_kinds_come_back() -> None:
    @dataclass
    class Result:
        hidden: Tensor
        extra: dict[str, Any]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, flags: tuple[int, None] = (1, None)) -> Result:
            y = self.layer(x)
            extra = {
                "same": y,
                "input": x,
                "weight": self.layer.weight,
                "none": None,
                "flags": flags,
            }
            return Result(y, {**extra, "nested": [(y[:, 0],), "text", 2.5]})

    model, x = Model(), torch.randn(4, 3)
    graph = captured_graph(model, x, flags=(7, None))
    results = graph.run(graph.cut(1), [x], 4)
    rebuilt = graph.captured.unflatten_outputs(results)
    assert isinstance(rebuilt, Result)
    assert rebuilt.extra["same"] is rebuilt.hidden
    assert rebuilt.extra["input"] is x
    assert rebuilt.extra["weight"] is model.layer.weight
    assert rebuilt.extra["flags"] == (7, None)
    assert rebuilt.extra["nested"][1:] == ["text", 2.5]
    torch.testing.assert_close(rebuilt.extra["nested"][0][0], model(x).hidden[:, 0])


def test_autocast_around_the_model_shows_in_types() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = captured_graph(model, x)
        check_against_bare(model, graph, (x,), {})
    assert [graph.values[v]["dtype"] for v in graph.data["outputs"]] == ["bfloat16"]


def test_autocast_and_no_grad_inside_the_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.first(x).relu()
                with torch.no_grad():
                    teacher = self.second(x)
                with torch.autocast("cpu", enabled=False):
                    x = self.second(x.float())
            return x - teacher

    model, x = Model(), torch.randn(6, 4)
    graph = captured_graph(model, x)
    types = {value["name"]: value["dtype"] for value in graph.values}
    assert types["linear"] == "bfloat16"
    assert len(graph.nodes) > 4
    check_against_bare(model, graph, (x,), {}, num_stages=4)


def test_models_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1000, 4000), nn.ReLU(), nn.Linear(4000, 1000))
        graph = captured_graph(model, torch.randn(8, 1000))
    assert graph.splittable
    assert [node["flops"] for node in graph.nodes] == [[8_000_000, 0], 0, [8_000_000, 0]]
    # The first layer keeps its input, the rectifier its result, which the second layer shares.
    assert [node["saved_bytes"] for node in graph.nodes] == [[4000, 0], [16_000, 0], 0]


def test_a_stage_leaves_its_inputs_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).double()
    graph = captured_graph(model, torch.randn(3, 4).double())
    second = graph.cut(2)[1]
    received = torch.randn(3, 4).double().requires_grad_()
    before = received.detach().clone()
    (value,) = second.inputs
    (result,) = second({value: received}, 3).values()
    result.sum().backward()
    torch.testing.assert_close(received.detach(), before)
    assert received.grad is not None
    assert [node["mutates"] for node in graph.nodes if node.get("mutates")] == [[value]]


def test_random_numbers_are_tied_to_the_batch() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            noise = torch.randn(x.size(0), 3)
            return x + noise, noise

    graph = captured_graph(Model(), torch.randn(4, 3))
    node = next(node for node in graph.nodes if "randn" in node["op"])
    assert node["inputs"] == graph.data["inputs"]
    assert graph.splittable


def test_the_same_tensor_may_be_given_twice() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * 2 + y

    x = torch.randn(4, 3)
    graph = captured_graph(Model(), x, x)
    assert len(graph.data["inputs"]) == 2
    y = torch.randn(4, 3)
    (result,) = graph.run(graph.cut(1), [x, y], 4)
    torch.testing.assert_close(result, x * 2 + y)


def test_inputs_without_rows_stay_whole() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
            return x @ mask * scale

    # The mask has as many rows as the batch, by chance.
    x, mask = torch.randn(4, 4), torch.randn(4, 4)
    graph = captured_graph(Model(), x, mask, torch.tensor(2.0))
    assert [graph.values[v]["rows"] for v in graph.data["inputs"]][1:] == ["none", "none"]
    check_parts(Model(), graph, [x, mask, torch.tensor(2.0)], [1], 1e-6)


def test_a_model_for_one_batch_size_is_captured_for_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.bias).relu()

    graph = captured_graph(Model(), torch.randn(4, 3))
    assert graph.captured.static_rows == 4
    assert not graph.splittable
    assert graph.output_rows == [{"split": {"dim": 0, "outer": 1, "inner": 1}}]


def test_a_decision_by_the_batch_size_makes_the_capture_serve_one() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.size(0) > 3 else x * 3

    model = Model()
    for rows in (5, 2, 1):
        x = torch.randn(rows, 3)
        graph = captured_graph(model, x)
        assert graph.captured.static_rows == rows
        assert not graph.splittable
        check_against_bare(model, graph, (x,), {})


def test_keys_are_stable_and_name_their_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    train = captured_graph(model, torch.randn(4, 4))
    evaluation = captured_graph(model.eval(), torch.randn(2, 4))
    keys = [node["key"] for node in train.nodes]
    assert keys == ["0/aten.linear.default#0", "1/aten.relu.default#0", "2/aten.linear.default#0"]
    assert keys == [node["key"] for node in evaluation.nodes]


def test_stages_refuse_what_they_do_not_have() -> None:
    from pyrannc.errors import CaptureError

    captured = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.randn(2, 4),))
    with pytest.raises(CaptureError, match="no operator"):
        build_stage(captured, ["nowhere/aten.relu.default#0"], [], [])
    graph = Graph.of(captured)
    with pytest.raises(CaptureError, match="neither has nor is given"):
        build_stage(captured, ["1/aten.relu.default#0"], [], graph.data["outputs"])


def test_calls_of_another_form_are_refused() -> None:
    from pyrannc.errors import CaptureError

    captured = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(CaptureError, match="was captured with"):
        captured.flatten_inputs((), {"input": torch.randn(2, 4)})


def test_objects_of_unknown_types_are_refused() -> None:
    from pyrannc.errors import CaptureError

    class Hidden:
        pass

    with pytest.raises(CaptureError, match="may hold tensors unseen"):
        capture(nn.Linear(4, 4), (torch.randn(2, 4), Hidden()))
