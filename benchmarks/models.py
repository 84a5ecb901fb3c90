"""The models that benchmarks plan: ordinary PyTorch, of the sizes that publications report.

Each function gives `(model, args, kwargs)` of one call, as `rannc capture` wants it:

    rannc capture benchmarks/models.py:bert_4_9b --meta -o bert.json

They are far larger than a host's memory, so make them under `torch.device("meta")` (`--meta`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

_VOCABULARY = 30522
_GPT_VOCABULARY = 50257
_ROWS = 8


class SquareLinears(nn.Module):
    """The tutorial's model (`examples/tutorial.py`): `layers` linears of `hidden` x `hidden`."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Applies one linear after another."""
        for layer in self.layers:
            x = layer(x)
        return x


def tutorial_small() -> Call:
    """10 linears of 512 x 512: 2.6 M parameters."""
    return SquareLinears(512, 10), (torch.empty(64, 512),), {}


def tutorial_large() -> Call:
    """100 linears of 5000 x 5000: 2.5 B parameters."""
    return SquareLinears(5000, 100), (torch.empty(64, 5000),), {}


def bert_4_9b() -> Call:
    """BERT with 96 layers of width 2048: 4.9 B parameters."""
    return _bert(hidden=2048, layers=96, heads=32)


def bert_4_9b_half() -> Call:
    """The same in half precision, with the sequences of BERT's first phase: 128 tokens."""
    model, args, kwargs = _bert(hidden=2048, layers=96, heads=32, tokens=128)
    return model.half(), args, kwargs


def bert_100b() -> Call:
    """BERT with 124 layers of width 8192: 100 B parameters."""
    return _bert(hidden=8192, layers=124, heads=64)


def gpt_1t() -> Call:
    """GPT with 128 layers of width 25600: 1 T parameters, in bfloat16 and without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=_GPT_VOCABULARY,
        n_positions=2048,
        n_embd=25600,
        n_layer=128,
        n_head=160,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    config.use_cache = False
    tokens = torch.zeros(_ROWS, 2048, dtype=torch.long)
    model = _LossOnly(GPT2LMHeadModel(config).to(torch.bfloat16))
    return model, (), {"input_ids": tokens, "labels": tokens.clone()}


def llama_70b() -> Call:
    """LLaMA with 80 layers of width 8192: 69 B parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    config.use_cache = False
    tokens = torch.zeros(_ROWS, 2048, dtype=torch.long)
    return LlamaForCausalLM(config), (), {"input_ids": tokens, "labels": tokens.clone()}


def t5_11b() -> Call:
    """T5: 24 encoder and 24 decoder layers, 11 B parameters; all decoder layers read one value."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32128,
        d_model=1024,
        d_kv=128,
        d_ff=65536,
        num_layers=24,
        num_heads=128,
        decoder_start_token_id=0,
    )
    config.use_cache = False
    tokens = torch.zeros(_ROWS, 512, dtype=torch.long)
    labels = torch.zeros(_ROWS, 128, dtype=torch.long)
    return T5ForConditionalGeneration(config), (), {"input_ids": tokens, "labels": labels}


def resnet152x8() -> Call:
    """ResNet-152 with 8 times the filters: 3.7 B parameters; the loss is inside."""
    return _WithLoss(WideResNet([3, 8, 36, 3], 8)), _images(), {}


def resnet50() -> Call:
    """ResNet-50 with torchvision's bottlenecks; the loss is inside."""
    return _WithLoss(WideResNet([3, 4, 6, 3], 1)), _images(), {}


class _WithLoss(nn.Module):
    """A classifier and its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(images), labels)


def _images() -> tuple[Tensor, Tensor]:
    return torch.empty(_ROWS, 3, 224, 224), torch.zeros(_ROWS, dtype=torch.long)


def _bert(*, hidden: int, layers: int, heads: int, tokens: int = 512) -> Call:
    """BERT with a decoder tied to its embedding; gives the masked-token and the sentence loss."""
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=512,
    )
    ids = torch.zeros(_ROWS, tokens, dtype=torch.long)
    kwargs = {
        "input_ids": ids,
        "token_type_ids": ids.clone(),
        "attention_mask": torch.ones(_ROWS, tokens, dtype=torch.long),
        "labels": ids.clone(),
        "next_sentence_label": torch.zeros(_ROWS, dtype=torch.long),
    }
    return _LossOnly(BertForPreTraining(config)), (), kwargs


class _LossOnly(nn.Module):
    """A transformers model that gives its loss only: its logits need not leave their stage."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Tensor) -> Tensor:
        loss: Tensor = self.model(**kwargs).loss
        return loss


class WideResNet(nn.Module):
    """A ResNet of torchvision's bottlenecks, with `times` the filters in all of its layers."""

    def __init__(self, layers: list[int], times: int, classes: int = 1000) -> None:
        super().__init__()
        from torchvision.models.resnet import Bottleneck

        width = 64 * times
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        groups, channels = [], width
        for group, count in enumerate(layers):
            planes = width * 2**group
            wide = planes * Bottleneck.expansion
            stride = 1 if group == 0 else 2
            shortcut = nn.Sequential(
                nn.Conv2d(channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)
            )
            first = Bottleneck(channels, planes, stride, shortcut)
            groups.append(
                nn.Sequential(first, *(Bottleneck(wide, planes) for _ in range(count - 1)))
            )
            channels = wide
        self.groups = nn.Sequential(*groups)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        features: Tensor = self.groups(self.stem(images))
        return self.classifier(features.mean((2, 3)))  # type: ignore[no-any-return]
