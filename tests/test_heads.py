"""R2 refined for each head: what is collected, what is lowered, what is refused."""

import copy

import pytest
import torch
from conftest import haar, logits, own_for_each_head, random_tokens, relative

from dfrot_lab import heads, models, rotations
from dfrot_lab.activations import ActivationsError
from dfrot_lab.objectives import NAMES, Centroids, named
from dfrot_lab.quantizers import QuantSpec, fake_quantize
from dfrot_lab.rotations import RotationError, Rotations


def rows(count: int = 200, seed: int = 0) -> torch.Tensor:
    """[count, 4 heads · 8], heads of several sizes, a channel that stands out in each."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, 8, generator=g) * torch.tensor([1.0, 2.0, 0.5, 1.5])[:, None]
    x[..., 3] *= 6
    return x.flatten(1)


def stack(seed: int = 0) -> torch.Tensor:
    return torch.stack([haar(8, seed), haar(8, seed + 1)])


@pytest.mark.parametrize("kind", models.ARCHITECTURES)
def test_collected_are_the_inputs_of_o_proj(kind):
    model = models.fold_gains(models.tiny(kind))
    tokens = random_tokens(1)
    found = heads.collect(model, tokens)
    width = models.layers(model)[0].attention_output.in_features
    assert found.shape == (2, tokens.numel(), width) and found.dtype == torch.float32
    # under R2 the same inputs come out turned, head by head
    r2 = own_for_each_head(model, 5)
    turned = rotations.merge(copy.deepcopy(model), Rotations(R2=r2))
    for layer, (x, y) in enumerate(zip(found, heads.collect(turned, tokens), strict=True)):
        assert relative(y, rotations.turn_heads(x.double(), r2[layer])) < 1e-5


def test_the_loss_falls_and_is_that_of_the_quantizer():
    x, spec = rows(), QuantSpec()
    r, losses = heads.refine(x, stack(), Centroids(spec), iterations=12)
    assert losses[-1] < 0.95 * losses[0]
    y = rotations.turn_heads(x, stack().float())
    first = (y - fake_quantize(y, spec)).square().sum() / x.square().sum()
    assert losses[0] == pytest.approx(first.item(), rel=1e-5)
    for one in r:
        assert rotations.orthogonality_error(one) < 1e-12


def test_one_group_of_one_head_is_procrustes():
    x = rows()[:, :8]
    g = fake_quantize(x @ haar(8).float(), QuantSpec())
    u, _, vt = torch.linalg.svd(x.mT.double() @ g.double())
    r, _ = heads.refine(x, haar(8)[None], Centroids(QuantSpec()), iterations=1)
    assert relative(r[0], u @ vt) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_serves(name):
    r, losses = heads.refine(rows(60), stack(3), named(name, QuantSpec()), iterations=3)
    assert r.shape == (2, 8, 8) and len(losses) == 3
    assert max(rotations.orthogonality_error(one) for one in r) < 1e-12


def test_what_an_objective_keeps_of_one_layer_is_not_of_the_next():
    x, own = torch.stack([rows(60), rows(60, 1)]), named("least_squares", QuantSpec())
    r2, _ = heads.refine_layers(x, stack(3), own, iterations=4)
    alone, _ = heads.refine(x[1], stack(3), named("least_squares", QuantSpec()), iterations=4)
    assert torch.equal(r2[1], alone) and own.grids == {}


def test_layers_are_refined_alone_and_change_no_logit():
    model = models.fold_gains(models.tiny("llama"))
    tokens = random_tokens(2)
    x = heads.collect(model, tokens)
    start = rotations.random_hadamard(16).expand(2, -1, -1)
    r2, losses = heads.refine_layers(x, start, Centroids(QuantSpec()), iterations=4)
    alone, _ = heads.refine(x[1], start, Centroids(QuantSpec()), iterations=4)
    assert r2.shape == (2, 2, 16, 16) and len(losses) == 2 and torch.equal(r2[1], alone)
    turned = rotations.merge(copy.deepcopy(model), Rotations(R2=r2))
    assert relative(logits(turned, tokens), logits(model, tokens)) < 1e-4


def test_bad_input_is_named():
    with pytest.raises(RotationError, match="R2 of head 1 is not orthogonal"):
        heads.refine(
            rows(), stack() * torch.tensor([1.0, 2.0])[:, None, None], Centroids(QuantSpec())
        )
    with pytest.raises(ValueError, match="rows of 30 do not hold 2 groups of heads of 8"):
        heads.refine(rows()[:, :30], stack(), Centroids(QuantSpec()))
    model = models.fold_gains(models.tiny("llama"))
    models.layers(model)[1].attention_inputs["self_attn.v_proj"].weight.data[0, 0] = torch.nan
    with pytest.raises(ActivationsError, match="o_proj of layer 1"):
        heads.collect(model, random_tokens())
