"""Activations: the outputs of every in-layer norm, written as the model runs, read back in chunks.

These rows x [d], ‖x‖ ≈ √d since the gains are folded, are what q/k/v and gate/up quantize and what R1
is optimised on (DFRot, Section 3.4): 2·L sites × T tokens.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dfrot_lab import files, models

__all__ = ["Activations", "ActivationsError", "capture", "collect", "load"]


class ActivationsError(ValueError):
    """Activations that cannot be used; one line: what, where, what to do."""


@dataclass(frozen=True)
class Activations:
    """Norm outputs X [sites, tokens, d], in memory or mapped from a file, with their site names."""

    X: Tensor
    sites: tuple[str, ...]
    metadata: dict
    piece: int = 2048  # rows of a chunk

    @property
    def d(self) -> int:
        """Hidden size."""
        return self.X.shape[-1]

    def site(self, name: str) -> Tensor:
        """The rows [tokens, d] of one site; ActivationsError lists the known ones."""
        if name not in self.sites:
            raise ActivationsError(f"site {name!r} is unknown: use one of {', '.join(self.sites)}")
        return self.X[self.sites.index(name)]

    def spaced(self, count: int) -> Activations:
        """`count` of the sites, evenly spaced in order; ValueError if there are not so many."""
        if not 1 <= count <= len(self.sites):
            raise ValueError(f"sites = {count}: the model has 1 to {len(self.sites)} norm sites")
        which = [i * len(self.sites) // count for i in range(count)]
        return Activations(self.X[which], tuple(self.sites[i] for i in which), self.metadata)

    def chunks(self, rows: int | None = None) -> Iterator[Tensor]:
        """All rows, [≤ rows, d] at a time in a fixed order; may be iterated again and again."""
        for x in self.X:
            yield from x.split(rows or self.piece)

    def on(self, device: str) -> Activations:
        """For use on a GPU: there where they take at most half of its free memory, else as they are.

        Either way in longer chunks, or a GPU's time goes into starting kernels: sums do not depend on
        what else its memory holds.
        """
        device = torch.device(device)
        if device.type != "cuda":
            return self
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        fits = 2 * self.X.nbytes <= torch.cuda.mem_get_info(device)[0] + held
        return replace(self, X=self.X.to(device) if fits else self.X, piece=16_384)

    @classmethod
    def of(cls, x: Tensor) -> Activations:
        """Wrap a plain tensor [tokens, d] or [sites, tokens, d]."""
        x = x if x.dim() == 3 else x[None]
        return cls(x, tuple(f"site.{i}" for i in range(len(x))), {})


def collect(
    model: nn.Module, tokens: Tensor, path: str | Path, metadata: dict | None = None
) -> Activations:
    """Run `tokens` [windows, seqlen] through a gain-folded `model`; write every norm output to `path`.

    Each window goes straight to a mapped safetensors file, so memory holds one norm output. Raises
    ActivationsError, naming the site, at the first NaN or Inf; then no file is left.
    """
    if not models.is_folded(model):
        raise ActivationsError("RMSNorm gains are not folded: call models.fold_gains(model) first")
    names, d = list(models.norm_sites(model)), model.config.hidden_size
    about = {"sites": names, "windows": list(tokens.shape)} | (metadata or {})
    shape = (len(names), tokens.numel(), d)
    with files.atomic(path) as temporary:
        out = _mapped(temporary, shape, about)
        for i, window in enumerate(tqdm(tokens, desc="activations", unit="window")):
            rows = slice(i * tokens.shape[1], (i + 1) * tokens.shape[1])

            def write(site: int, _: str, x: Tensor, rows: slice = rows, out=out) -> None:
                out[site, rows] = x[0].float().cpu().numpy()

            _watch(model, window[None], write)
        out.flush()
        del out
    return load(path)


def capture(model: nn.Module, tokens: Tensor) -> list[tuple[int, str, Tensor]]:
    """(index, site, output [batch, seqlen, d]) of every in-layer norm for one forward pass.

    Raises ActivationsError at the first NaN or Inf.
    """
    found: list[tuple[int, str, Tensor]] = []
    _watch(model, tokens, lambda *site: found.append(site))
    return found


def _watch(model: nn.Module, tokens: Tensor, receive: Callable[[int, str, Tensor], None]) -> None:
    """Call `receive(index, site, output)` for every in-layer norm, as the layers run."""

    def check(index: int, name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if not torch.isfinite(output).all():
            raise ActivationsError(
                f"activations at {name} hold NaN or Inf: load the model in float32, or check its weights"
            )
        receive(index, name, output)

    hooks = [
        norm.register_forward_hook(partial(check, i, name))
        for i, (name, norm) in enumerate(models.norm_sites(model).items())
    ]
    try:
        with torch.inference_mode():
            models.base(model)(tokens.to(next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def load(path: str | Path) -> Activations:
    """Map activations written by `collect` (no copy); ActivationsError if missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise ActivationsError(
            f"activations {path} do not exist: make them with `dfrot-lab collect`"
        )
    try:
        with path.open("rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            if size > path.stat().st_size:
                raise ValueError("its header is cut off, or it is no safetensors file")
            header = json.loads(f.read(size))
        about, shape = json.loads(header["__metadata__"]["dfrot"]), tuple(header["X"]["shape"])
        sites = tuple(about["sites"])
        array = np.memmap(path, np.float32, "c", offset=8 + size, shape=shape)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ActivationsError(
            f"activations {path} cannot be read ({error}): delete the file"
        ) from error
    return Activations(torch.from_numpy(array), sites, about)


def _mapped(path: Path, shape: tuple[int, ...], metadata: dict) -> np.memmap:
    """A new safetensors file holding one fp32 tensor X, open for writing in place.

    The safetensors library writes only tensors that are whole in memory; these need not be.
    """
    size = 4 * int(np.prod(shape))
    header = json.dumps(
        {
            "__metadata__": {"dfrot": json.dumps(metadata, sort_keys=True)},
            "X": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        # claim the space now: a full disk is then an error here and not a bus error in the middle
        block = bytes(1 << 22)
        for left in range(size, 0, -len(block)):
            f.write(block[: min(left, len(block))])
    return np.memmap(path, np.float32, "r+", offset=8 + len(header), shape=shape)
