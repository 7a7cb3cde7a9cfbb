"""What several test files share: an offline session, tiny models, and slow independent references."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client
# before anything imports triton: the kernels run on the CPU; TRITON_INTERPRET=0 leaves them to a GPU
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("HF_TOKEN", None)

import socket
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from dfrot_kernels.reference import QuantSpec
from hypothesis import settings
from scipy.stats import ortho_group
from torch import Tensor, nn

from dfrot_lab import models

torch.set_num_threads(1)  # everything here is tiny: threads would only wait for each other
# the same examples on every machine and run: a tolerance that fails here fails everywhere
settings.register_profile("dfrot", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("dfrot")

GUARD = 4096  # numbers behind what a kernel writes
LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Connections that leave this machine fail the test that makes them."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address) -> None:
        remote = self.family in (socket.AF_INET, socket.AF_INET6)
        if remote and not str(address[0]).startswith(LOOPBACK):
            raise AssertionError(f"a test reached for the network: {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(autouse=True)
def poisoned(request, monkeypatch) -> Iterator[None]:
    """In files marked `poisoned`, new memory holds NaN, or large integers, and as many behind its end.

    An element that a kernel does not write is seen, and so is one that it writes too far.
    """
    if request.node.get_closest_marker("poisoned") is None:
        yield
        return
    empty, behind = torch.empty, []

    def fill(t: Tensor) -> Tensor:
        return t.fill_(torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max - 50)

    def poison(*size, **options) -> Tensor:
        wanted = empty(*size, **options)
        if wanted.is_meta:
            return wanted
        room = fill(empty(wanted.numel() + GUARD, dtype=wanted.dtype))
        behind.append(room[wanted.numel() :])
        return room[: wanted.numel()].view(wanted.shape)

    monkeypatch.setattr(torch, "empty", poison)
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **k: poison(t.shape, **{"dtype": t.dtype} | k)
    )
    yield
    for guard in behind:
        assert torch.equal(guard.nan_to_num(7), fill(guard.clone()).nan_to_num(7))


@pytest.fixture
def llama() -> nn.Module:
    """A tiny LLaMA with its gains folded: hidden 64, 4 heads over 2, 2 layers."""
    return models.fold_gains(models.tiny("llama"))


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny checkpoint in a folder, as from the hub; returns the folder."""

    def save(kind="llama", name="source", **options):
        folder = tmp_path / name
        models.tiny(kind, **options).save_pretrained(folder)
        return folder

    return save


def byte_pairs(folder, cut=None):
    """A byte-level BPE tokenizer of fewer than 384 tokens, saved in `folder`."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers, processors, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    from dfrot_lab.exports import vocabularies

    qwen = next(text for text, name in vocabularies.PRE.items() if name == "qwen2")
    raw = Tokenizer(kinds.BPE())
    split = pre_tokenizers.Split(Regex(cut or qwen), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator(
        ["the rotation of the stream and the rotation of the heads"] * 3, trainer
    )
    raw.add_tokens(["<tool>"])
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>").save_pretrained(folder)
    return raw


def haar(d: int, seed: int = 0) -> Tensor:
    """A random orthogonal [d, d] in fp64 that owes nothing to the code under test."""
    return torch.from_numpy(ortho_group.rvs(d, random_state=seed))


def own_for_each_head(model, seed: int) -> Tensor:
    """R2 [layers, kv_heads, head_dim, head_dim]."""
    parts = models.layers(model)
    size, heads = parts[0].module.self_attn.head_dim, model.config.num_key_value_heads
    made = [haar(size, seed + i) for i in range(len(parts) * heads)]
    return torch.stack(made).reshape(len(parts), heads, size, size)


def relative(a: Tensor, b: Tensor) -> float:
    """max|a − b| / max|b| in fp64."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).abs().max() / b.abs().max()).item()


def random_tokens(seed: int = 0, shape: tuple[int, ...] = (2, 12)) -> Tensor:
    """Bytes as ByT5 numbers them, newlines among them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 259, shape, generator=generator)
    tokens[..., shape[-1] // 2] = NEWLINE
    return tokens


NEWLINE = 3 + ord("\n")


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def exact(model: nn.Module) -> nn.Module:
    """`model` in fp64, norms included."""
    return models.preserve_norm_dtype(model.double())


def slow_quantize(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(codes, x̂) by the definition of Δ and z, one number at a time in Python's fp64."""
    x = x.double()
    if spec.granularity == "tensor":
        shares = x.reshape(1, -1)
    else:
        shares = x.reshape(-1, spec.group_size or x.shape[-1])
    low, high = spec.code_range
    codes, values = [], []
    for share in shares.tolist():
        if spec.symmetric:
            step, zero = max(abs(v) for v in share) * spec.clip / high, 0
        else:
            least, most = min(0.0, *share) * spec.clip, max(0.0, *share) * spec.clip
            step = (most - least) / (high - low)
            zero = round(-least / (step or 1.0))
        step = step or 1.0
        row = [min(max(round(v / step) + zero, low), high) for v in share]
        codes.append(row)
        values.append([(q - zero) * step for q in row])
    return tuple(
        torch.tensor(np.array(t), dtype=torch.float64).reshape(x.shape) for t in (codes, values)
    )
