"""The alternation: each half step against a direct evaluation, the whole against what was planted."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import haar, relative, slow_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from benchmarks.optimiser import forced
from dfrot_lab import dfrot, massive, objectives, polar, products, rotations
from dfrot_lab.activations import Activations, ActivationsError
from dfrot_lab.dfrot import Weighting, loss, optimize
from dfrot_lab.quantizers import QuantSpec, fake_quantize
from dfrot_lab.rotations import RotationError
from dfrot_lab.weighting import importance

FP64 = torch.float64
SOLVERS = st.sampled_from(["svd", "fast"])
SPECS = st.builds(QuantSpec, bits=st.sampled_from([3, 4]), symmetric=st.booleans())
WEIGHTINGS = st.builds(
    Weighting,
    gamma=st.sampled_from([0.0, 0.3, 1.0, 100.0, math.inf]),
    form=st.sampled_from(["sum", "group_mean"]),
    rule=st.just("floor"),
)


def rows(seed: int, sites: int = 2, tokens: int = 40, d: int = 12, dtype=FP64) -> Activations:
    """Heavy-tailed rows of norm √d, every eighth of them a spike: massive."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sites, tokens, d, generator=generator, dtype=FP64) ** 3
    x[:, ::8] *= 0.002
    x[:, ::8, seed % d] = 3 + seed % 5
    return Activations.of((x * d**0.5 / x.norm(dim=-1, keepdim=True)).to(dtype))


def expected_weights(x: Activations, spec: QuantSpec, weighting: Weighting) -> torch.Tensor:
    """w² of every row, straight from the two formulas."""
    heavy = massive.is_massive(x.X.flatten(0, 1), spec)
    assert heavy.any() and not heavy.all()
    w = torch.ones(len(heavy), dtype=FP64)
    w[heavy] = weighting.gamma**2
    if math.isinf(weighting.gamma):
        w = heavy.double()
    if weighting.form == "group_mean":
        w /= torch.where(heavy, heavy.sum(), (~heavy).sum())
    return w


# --- weights and loss ------------------------------------------------------------------------------


@given(st.integers(0, 999), SPECS, WEIGHTINGS)
def test_weights_and_loss_are_the_written_sums(seed, spec, weighting):
    x, r = rows(seed), haar(12, seed)
    w = expected_weights(x, spec, weighting)
    weights, count = dfrot.row_weights(x, spec, weighting)
    assert torch.allclose(torch.cat(weights), w, rtol=1e-14, atol=0)
    assert count == massive.is_massive(x.X, spec).sum()
    y = x.X.flatten(0, 1)
    error = (y @ r - slow_quantize(y @ r, spec)[1]).square().sum(-1)
    wanted = (w * error).sum() / (w * y.square().sum(-1)).sum()
    assert loss(x, r, spec, weighting) == pytest.approx(wanted.item(), rel=1e-12)


def test_published_rule_weighs_what_it_finds():
    x, spec = rows(0, d=12), QuantSpec()
    x.X[:, 1::3] *= 100
    mask = massive.published_rule(x.X, spec).flatten()
    weights, count = dfrot.row_weights(x, spec, Weighting(gamma=3, rule="published"))
    assert 0 < count == mask.sum() < len(mask)
    assert torch.equal(torch.cat(weights), torch.where(mask, 9.0, 1.0).double())


@pytest.mark.parametrize(
    "options, said",
    [
        ({"gamma": -1.0}, r"gamma = -1\.0: use a number ≥ 0"),
        ({"gamma": math.nan}, "gamma = nan"),
        ({"gamma": 1e20}, r"gamma = 1e\+20: fp64 loses .* use 1e\+06 at most, or inf"),
        ({"form": "mean"}, "form = 'mean': use 'sum' or 'group_mean'"),
        ({"rule": "l2"}, "rule = 'l2': use 'floor' or 'published'"),
    ],
)
def test_bad_weightings(options, said):
    with pytest.raises(ValueError, match=said):
        Weighting(**options)


# --- half steps ------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.integers(0, 999),
    SPECS,
    WEIGHTINGS,
    st.tuples(st.integers(1, 3), st.integers(9, 60), st.integers(3, 24)),
    st.sampled_from(["RO", "RH"]),
    SOLVERS,
)
def test_the_procrustes_step_never_raises_the_loss(seed, spec, weighting, shape, start, solver):
    x = rows(seed, *shape)
    _, count = dfrot.row_weights(x, spec, Weighting())
    if count in (0, x.X[..., 0].numel()):  # γ may then leave nothing to weigh
        weighting = Weighting(gamma=1.0)
    r0 = rotations.START[start](x.d, seed)
    r, log = optimize(x, r0, spec, weighting, iterations=3, dtype=FP64, solver=solver)
    assert rotations.orthogonality_error(r) <= 1e-12
    assert len(log.quantized) == len(log.rotated) == 3
    for before, after in zip(log.quantized, log.rotated, strict=True):
        assert after <= before + 1e-13
    assert (log.rows, log.massive_rows) == (shape[0] * shape[1], count)


@pytest.mark.parametrize("dtype, tolerance", [(FP64, 1e-11), (torch.float32, 1e-5)])
@given(seed=st.integers(0, 999), spec=SPECS, weighting=WEIGHTINGS, solver=SOLVERS)
@settings(max_examples=15)
def test_the_log_is_a_direct_evaluation(dtype, tolerance, seed, spec, weighting, solver):
    x = rows(seed, dtype=dtype)
    w, y = expected_weights(x, spec, weighting), x.X.flatten(0, 1)
    total = (w * y.double().square().sum(-1)).sum()
    runs = [
        optimize(x, haar(12, seed), spec, weighting, iterations=i, dtype=dtype, solver=solver)
        for i in range(4)
    ]
    for t, ((r, _), (refined, log)) in enumerate(itertools.pairwise(runs)):
        codes = fake_quantize(y @ r.to(dtype), spec).double()
        error = (y.double() @ refined - codes).square().sum(-1)
        assert log.rotated[t] == pytest.approx(((w * error).sum() / total).item(), rel=tolerance)
        assert log.quantized[t] == pytest.approx(
            loss(x, r, spec, weighting), rel=1e-12 if dtype == FP64 else 1e-6
        )


def test_fp32_follows_fp64():
    x, start = rows(3, tokens=400), haar(12, 3)
    double = optimize(x, start, QuantSpec(), Weighting(), iterations=1, dtype=FP64)
    single = optimize(x, start, QuantSpec(), Weighting(), iterations=1)
    assert relative(single[0], double[0]) < 1e-5
    assert single[1].rotated == pytest.approx(double[1].rotated, rel=1e-5)
    assert rotations.orthogonality_error(single[0]) <= 1e-12


@given(
    st.integers(0, 999),
    SPECS,
    st.sampled_from([0.3, 1.0, 100.0]),  # with massive rows alone the product is singular
    st.sampled_from(["centroids", "corners", "whip"]),
)
def test_the_fast_step_is_the_plain_step(seed, spec, gamma, objective):
    x, start, weighting = rows(seed), haar(12, seed), Weighting(gamma)
    (plain, wanted), (fast, found) = (
        optimize(x, start, spec, weighting, iterations=1, dtype=FP64, solver=s, objective=objective)
        for s in ("svd", "fast")
    )
    assert (fast - plain).abs().max() < 1e-8
    assert found.quantized == pytest.approx(wanted.quantized, rel=1e-12)
    assert found.rotated == pytest.approx(wanted.rotated, rel=1e-10)


def written_product(x, r, spec, weighting, relax=1.0) -> torch.Tensor:
    """XᵀW²(Y − ωE), E = Y − Q(Y), with no Gram matrix and no chunks."""
    rows_, w = x.X.flatten(0, 1), expected_weights(x, spec, weighting)
    y = rows_ @ r
    e = y - slow_quantize(y, spec)[1]
    return rows_.mT @ ((y - relax * e) * w[:, None])


@pytest.mark.parametrize("method", ["mixed", "products", "newton"])
def test_the_fast_step_by_each_iteration_is_the_svd_step(method):
    """A CPU would take the SVD by itself: the iteration is forced."""
    determined = 0
    for seed, gamma, spec in itertools.product(
        range(8), (0.3, 1.0, 100.0), (QuantSpec(), QuantSpec(symmetric=True))
    ):
        x, start, weighting = rows(seed, tokens=80, d=24), haar(24, seed), Weighting(gamma)
        m = written_product(x, start, spec, weighting)
        options = {"iterations": 1, "dtype": FP64}
        plain, _ = optimize(x, start, spec, weighting, solver="svd", **options)
        with forced(method):
            fast, _ = optimize(x, start, spec, weighting, solver="fast", **options)
        assert rotations.orthogonality_error(fast) <= 1e-12
        assert (fast * m).sum().item() == pytest.approx((plain * m).sum().item(), rel=1e-10)
        if torch.linalg.cond(m) < 1e6:
            determined += 1
            assert (fast - plain).abs().max() < 1e-8
    assert determined > 30  # of 48


@pytest.mark.parametrize(("least", "condition"), [(-4.8, 1e9), (-9.3, 1e14)])
def test_an_ill_conditioned_step_at_full_size_is_as_good(least, condition):
    """d = 576: the polar factor is no longer known to 1e-8, its objective is."""
    d, spec, generator = 576, QuantSpec(), torch.Generator().manual_seed(1)
    scales = torch.logspace(0, least, d, dtype=FP64)
    x = Activations.of(torch.randn(2 * d, d, generator=generator, dtype=FP64) * scales)
    start = rotations.random_hadamard(d, 2)
    m = x.X[0].mT @ fake_quantize(x.X[0] @ start, spec)
    s = torch.linalg.svdvals(m)
    assert 0.3 < s[0] / s[-1] / condition < 3
    for method in ("mixed", "products", "newton"):
        with forced(method):
            r, _ = optimize(x, start, spec, Weighting(1.0), iterations=1, dtype=FP64)
        assert rotations.orthogonality_error(r) <= 1e-12
        assert (r * m).sum().item() == pytest.approx(s.sum().item(), rel=1e-10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, step, end", [(FP64, 1e-8, 1e-3), (torch.float32, 1e-4, 5e-3)])
def test_a_gpu_takes_the_step_of_the_cpu_and_ends_as_low(dtype, step, end):
    """Not the same R at the end: a code that rounding turns over sends the alternation elsewhere."""
    x, start, spec = rows(3, tokens=2000, d=64), haar(64, 3), QuantSpec()
    ends = {}
    for count in (1, 30):
        found = [
            optimize(x, start, spec, Weighting(), iterations=count, dtype=dtype, device=device)[0]
            for device in ("cpu", "cuda")
        ]
        assert all(rotations.orthogonality_error(r) <= 1e-12 for r in found)
        ends[count] = found
    assert (ends[1][0] - ends[1][1]).abs().max() < step
    cpu, gpu = (loss(x, r, spec, Weighting()) for r in ends[30])
    assert gpu == pytest.approx(cpu, rel=end)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("how", [{"tf32": True}, {"dtype": torch.bfloat16}], ids=["tf32", "bf16"])
def test_shorter_products_of_a_gpu_take_as_much_off(how):
    """Two runs in other precision part ways, and stop in other local minima."""
    x, start, spec = rows(3, tokens=20_000, d=256), haar(256, 3), QuantSpec()
    begin = loss(x, start, spec, Weighting())
    plain, found = (
        optimize(x, start, spec, Weighting(), iterations=30, device="cuda", **options)[0]
        for options in ({}, how)
    )
    assert rotations.orthogonality_error(found) <= 1e-12
    wanted = begin - loss(x, plain, spec, Weighting())
    assert begin - loss(x, found, spec, Weighting()) > 0.95 * wanted > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_that_stay_on_a_gpu_give_the_step_of_rows_that_are_sent(monkeypatch):
    """In chunks of one size, since another order of sums is another sum."""
    x, start, spec = rows(4, tokens=3000, d=64), haar(64, 4), QuantSpec()
    monkeypatch.setattr(Activations, "piece", 2048)
    found = []
    for stay in (True, False):
        if not stay:
            monkeypatch.setattr(Activations, "on", lambda self, device: self)
        r, _ = optimize(x, start, spec, Weighting(), iterations=3, device="cuda")
        found.append(r)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype, device", [(torch.float32, "cpu"), (torch.bfloat16, "cuda")])
def test_tf32_is_for_fp32_on_a_gpu(dtype, device):
    with pytest.raises(ValueError, match=r"tf32 with dtype = .* float32 on a GPU"):
        optimize(
            rows(1), haar(12, 1), QuantSpec(), Weighting(), dtype=dtype, device=device, tf32=True
        )


# --- over-relaxation -------------------------------------------------------------------------------


@given(st.integers(0, 999), SPECS, st.sampled_from([1.0, 100.0]), SOLVERS)
def test_a_relaxed_step_is_the_polar_factor_of_what_is_written(seed, spec, gamma, solver):
    """R ← polar(XᵀW²(Y − 1.6E)); the log stays that of the loss, with the codes of the half step (a)."""
    x, start, weighting = rows(seed), haar(12, seed), Weighting(gamma)
    m = written_product(x, start, spec, weighting, relax=1.6)
    r, log = optimize(x, start, spec, weighting, iterations=1, dtype=FP64, solver=solver, relax=1.6)
    assert (r - torch.from_numpy(scipy.linalg.polar(m.numpy())[0])).abs().max() < 1e-8
    plain, _ = optimize(x, start, spec, weighting, iterations=1, dtype=FP64, solver=solver)
    assert (r - plain).abs().max() > 1e-4
    w, y = expected_weights(x, spec, weighting), x.X.flatten(0, 1)
    error = (y @ r - slow_quantize(y @ start, spec)[1]).square().sum(-1)
    wanted = (w * error).sum() / (w * y.square().sum(-1)).sum()
    assert log.rotated[0] == pytest.approx(wanted.item(), rel=1e-10)


@pytest.mark.parametrize("relax", [0, 2, -1.0, math.nan])
def test_a_relaxation_that_does_not_converge_is_refused(relax):
    with pytest.raises(ValueError, match=rf"relax = {relax}: use a number in \(0, 2\)"):
        optimize(rows(0), haar(12), QuantSpec(), Weighting(), relax=relax)


@pytest.mark.parametrize("stop", [-0.1, 1.0, math.nan])
def test_a_share_at_which_nothing_can_stop_is_refused(stop):
    with pytest.raises(ValueError, match=rf"stop = {stop}: use a share in \[0, 1\)"):
        optimize(rows(0), haar(12), QuantSpec(), Weighting(), stop=stop)


def test_bf16_for_the_small_product_alone_leaves_the_step_as_it_is():
    """Codes are those of fp32; only XᵀE is shorter, and E is small."""
    x, start = rows(5, tokens=2000, d=64), haar(64, 5)
    first, ends = {}, {}
    for name, how in (
        ("fp32", {}),
        ("small", {"error_dtype": torch.bfloat16}),
        ("bf16", {"dtype": torch.bfloat16}),
    ):
        first[name], _ = optimize(x, start, QuantSpec(), Weighting(), iterations=1, **how)
        r, _ = optimize(x, start, QuantSpec(), Weighting(), iterations=30, **how)
        ends[name] = loss(x, r, QuantSpec(), Weighting())
    off = {n: (first[n] - first["fp32"]).abs().max().item() for n in ("small", "bf16")}
    assert 0 < off["small"] < 1e-2 and off["small"] < off["bf16"]
    assert ends["small"] == pytest.approx(ends["fp32"], rel=2e-2)


@pytest.mark.parametrize(
    "how", [{"error_dtype": torch.float64}, {"error_dtype": torch.bfloat16, "solver": "svd"}]
)
def test_an_error_dtype_is_bf16_for_the_fast_step(how):
    with pytest.raises(ValueError, match=r"error_dtype = .* use bfloat16, with solver 'fast'"):
        optimize(rows(1), haar(12, 1), QuantSpec(), Weighting(), **how)


def along(start: torch.Tensor, length: float, steps: int, seed: int = 0) -> list[torch.Tensor]:
    """`start` and rotations behind it, each ‖ΔR‖_F = `length`·√d from the one before, roughly."""
    d, path = len(start), [start]
    for t in range(steps):
        a = torch.randn(d, d, generator=torch.Generator().manual_seed(seed + t), dtype=FP64)
        path.append(path[-1] @ torch.matrix_exp((a - a.mT) * (length / (2 * d) ** 0.5)))
    return path


def gram_of(x: Activations, weights: list[torch.Tensor]) -> torch.Tensor:
    return sum((c * w[:, None]).mT @ c for c, w in products.pairs(x, weights, FP64, "cpu"))


def test_a_turn_of_the_massive_direction_alone_is_far():
    """It hardly moves R, and all of the rows that weigh."""
    x = rows(4, sites=1, tokens=400, d=64, dtype=torch.float32)
    weights = dfrot.row_weights(x, QuantSpec(), Weighting(gamma=100.0))[0]
    streamed = products.Streamed(gram=gram_of(x, weights))
    objective, start = objectives.Centroids(QuantSpec()), torch.eye(64, dtype=FP64)
    streamed(x, start, weights, objective, torch.float32)
    where = int(x.X[0, 0].abs().argmax())  # where the massive rows have their spikes
    for i, far in ((where - 2, False), (where, True)):
        turned = start.clone()
        turned[i, i] = turned[i + 1, i + 1] = math.cos(0.6)
        turned[i, i + 1], turned[i + 1, i] = math.sin(0.6), -math.sin(0.6)
        turned = turned @ streamed.base
        assert (turned - streamed.base).norm() < products.FAR * 8
        before = streamed.base
        streamed(x, turned, weights, objective, torch.float32)
        assert (streamed.base is not before) == far


@pytest.mark.parametrize("length, most", [(0.02, 2), (0.2, 4), (2.0, 6)])
def test_updated_products_are_those_of_the_rotation_at_hand(monkeypatch, length, most):
    """XR by its change is within 0.07 % of XR, wherever the path leads; where R moves far, it is XR."""
    x = rows(4, sites=3, tokens=700, d=64, dtype=torch.float32)
    weights = dfrot.row_weights(x, QuantSpec(), Weighting(gamma=1.0))[0]
    monkeypatch.setattr(products, "PIECE", 64 * 300)  # several pieces a chunk
    seen: list[torch.Tensor] = []

    class Watch(objectives.Centroids):
        def direction(self, y, chunk=0):
            seen.append(y)
            return super().direction(y, chunk)

    streamed, bases, worst = products.Streamed(gram=gram_of(x, weights)), set(), []
    for r in along(haar(64, 3), length, 5):
        seen.clear()
        found = streamed(x, r, weights, Watch(QuantSpec()), torch.float32)
        bases.add(id(streamed.base))
        exact = x.X.flatten(0, 1).double() @ r
        off = torch.cat(seen).double() - exact
        worst.append((off.norm() / exact.norm()).item())
        plain = products.whole(x, r, weights, objectives.Centroids(QuantSpec()), FP64)
        assert found[1] == pytest.approx(plain[1], rel=5e-3)
    assert len(bases) <= most and (most == 6) == (len(bases) == 6)
    assert max(worst) < 7e-4
    assert (max(worst) < 1e-6) == (most == 6)  # an update was taken, or none


def test_updates_end_where_full_products_do():
    x, start = rows(3, tokens=4000, d=32, dtype=torch.float32), haar(32, 3)
    ends = {}
    for how in ({}, {"update": True, "error_dtype": torch.bfloat16}):
        r, log = optimize(x, start, QuantSpec(), Weighting(), iterations=20, **how)
        assert rotations.orthogonality_error(r) <= 1e-12
        ends[bool(how)] = loss(x, r, QuantSpec(), Weighting())
        assert log.quantized[-1] < log.quantized[0]
    assert ends[True] == pytest.approx(ends[False], rel=5e-3)


@pytest.mark.parametrize("how", [{"dtype": torch.bfloat16}, {"solver": "svd"}, {"dtype": FP64}])
def test_updates_are_for_fp32_and_the_fast_step(how):
    with pytest.raises(ValueError, match=r"update with dtype = .*: it is for float32 and 'fast'"):
        optimize(rows(1), haar(12, 1), QuantSpec(), Weighting(), update=True, **how)


def test_bf16_products_follow_fp32():
    x, start = rows(3, tokens=4000, d=32, dtype=torch.float32), haar(32, 3)
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        r, _ = optimize(x, start, QuantSpec(), Weighting(), iterations=20, dtype=dtype)
        assert rotations.orthogonality_error(r) <= 1e-12
        ends[dtype] = loss(x, r, QuantSpec(), Weighting())
    assert ends[torch.bfloat16] == pytest.approx(ends[torch.float32], rel=5e-3)
    with pytest.raises(ValueError, match="dtype = bfloat16 is for solver 'fast'"):
        optimize(x, start, QuantSpec(), Weighting(), dtype=torch.bfloat16, solver="svd")


@pytest.mark.parametrize("relax", [1.0, 1.6])
def test_a_stopped_run_has_given_up_little(relax):
    """Of what three hundred steps reach; for the demo model see docs/optimiser.md."""
    x, start = rows(5, tokens=500, d=32), haar(32, 5)
    options = {"iterations": 300, "relax": relax}
    _, long = optimize(x, start, QuantSpec(), Weighting(), **options)
    assert len(long.rotated) == 300
    for stop, lost in ((1e-2, 0.02), (3e-3, 0.005), (1e-3, 0.001)):
        _, short = optimize(x, start, QuantSpec(), Weighting(), stop=stop, **options)
        assert len(short.rotated) < 100
        assert short.rotated[-1] <= (1 + lost) * long.rotated[-1]


def test_a_warm_start_needs_fewer_steps():
    """From the R1 of γ = 1 to γ = 100, against from the Hadamard: to the loss that 40 steps reach."""
    x, spec, weighting = rows(5, tokens=1000, d=32), QuantSpec(), Weighting(100.0)
    cold = rotations.random_hadamard(32, 0)
    warm, _ = optimize(x, cold, spec, Weighting(1.0), iterations=40)
    runs = {}
    for name, start in (("cold", cold), ("warm", warm)):
        _, log = optimize(x, start, spec, weighting, iterations=60)
        runs[name] = log.rotated
    wanted = 1.01 * runs["cold"][39]
    steps = {n: next(i for i, v in enumerate(run) if v <= wanted) for n, run in runs.items()}
    assert steps["warm"] <= steps["cold"] / 2


def test_it_stops_when_the_loss_has_settled():
    x, start = rows(5, tokens=300, d=32), haar(32, 5)
    options = {"iterations": 300, "dtype": FP64}
    _, long = optimize(x, start, QuantSpec(), Weighting(), **options)
    r, short = optimize(x, start, QuantSpec(), Weighting(), stop=0.01, **options)
    n = len(short.quantized)
    assert 10 < n < 300 and short.quantized == long.quantized[:n]
    gains = [a - b for a, b in zip(short.quantized, short.quantized[10:], strict=False)]
    settled = [g < 0.01 * b for g, b in zip(gains, short.quantized[10:], strict=True)]
    assert settled[-1] and not any(settled[:-1])
    assert torch.equal(optimize(x, start, QuantSpec(), Weighting(), iterations=n, dtype=FP64)[0], r)


@pytest.mark.parametrize(
    "name, known", [("solver", "'svd' or 'fast'"), ("sampling", "'uniform' or")]
)
def test_unknown_names(name, known):
    with pytest.raises(ValueError, match=f"{name} = 'x': use {known}"):
        optimize(rows(0), haar(12), QuantSpec(), Weighting(), **{name: "x"})


@pytest.mark.parametrize("solver", ["svd", "fast"])
def test_chunks_do_not_matter(monkeypatch, solver):
    x, start = rows(4, sites=3, tokens=2100, d=8), haar(8, 4)
    assert [len(c) for c in x.chunks()] == [2048, 52] * 3
    options = {"iterations": 3, "dtype": FP64, "solver": solver}
    monkeypatch.setattr(products, "PIECE", 8 * 300)
    monkeypatch.setattr(products, "FLUSH", 1000)
    cut = optimize(x, start, QuantSpec(), Weighting(), **options)
    assert loss(x, start, QuantSpec(), Weighting()) == pytest.approx(cut[1].quantized[0], rel=1e-12)
    whole = Activations.chunks
    monkeypatch.setattr(Activations, "chunks", lambda self, rows=0: whole(self, 10**9))
    monkeypatch.setattr(products, "PIECE", 10**9)
    uncut = optimize(x, start, QuantSpec(), Weighting(), **options)
    assert relative(cut[0], uncut[0]) < 1e-10
    assert cut[1].rotated == pytest.approx(uncut[1].rotated, rel=1e-10)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_planted_rotation_is_recovered(symmetric):
    """Rows that some R puts exactly on the grid: started near it, the loss falls to nothing."""
    spec, planted = QuantSpec(symmetric=symmetric), haar(8, 7)
    low, high = spec.code_range
    codes = torch.randint(low + 1, high, (2000, 8), generator=torch.Generator().manual_seed(1))
    codes = codes.double() - (0 if symmetric else 7)
    codes[:, 0], codes[:, 1] = (7, -7) if symmetric else (8, -7)  # the grid's own scale
    codes = codes[:, torch.randperm(8, generator=torch.Generator().manual_seed(2))]
    x = Activations.of(codes @ planted.mT)
    skew = 0.01 * np.random.default_rng(3).standard_normal((8, 8))
    start = planted @ torch.from_numpy(scipy.linalg.expm(skew - skew.T))
    assert loss(x, start, spec, Weighting(1.0)) > 1e-4
    r, log = optimize(x, start, spec, Weighting(1.0), iterations=60, dtype=FP64)
    assert log.rotated[-1] < 1e-12
    assert relative(r, planted) < 1e-6


def test_refining_helps_on_rows_with_spikes():
    x, spec = rows(5, tokens=300, d=32), QuantSpec()
    start = rotations.random_orthogonal(32)
    r, _ = optimize(x, start, spec, Weighting(), iterations=30)
    assert loss(x, r, spec, Weighting()) < 0.8 * loss(x, start, spec, Weighting())


def test_no_iterations_return_the_start():
    start = haar(12)
    r, log = optimize(rows(0), start, QuantSpec(), Weighting(), iterations=0)
    assert torch.equal(r, start) and r is not start and log.rotated == []


def test_inputs_are_left_alone():
    x, start = rows(6), haar(12)
    before = x.X.clone(), start.clone()
    optimize(x, start, QuantSpec(), Weighting(), iterations=3)
    assert torch.equal(x.X, before[0]) and torch.equal(start, before[1])


# --- shares of the rows ----------------------------------------------------------------------------


def test_a_share_keeps_massive_rows_and_the_expected_loss():
    x, spec, weighting = rows(8, tokens=4000), QuantSpec(), Weighting(gamma=3.0)
    weights, count = dfrot.row_weights(x, spec, weighting)
    few, scaled = dfrot.subsample(x, spec, weighting, weights, 0.25, seed=1)
    assert [len(w) for w in scaled] == [len(c) for c in few.chunks()]
    w = torch.cat(scaled)
    assert torch.equal(w, torch.where(massive.is_massive(few.X[0], spec), 9.0, 4.0).double())
    assert (w == 9).sum() == count
    other = dfrot.subsample(x, spec, weighting, weights, 0.25, seed=2)[0]
    assert other.X.shape != few.X.shape or not torch.equal(other.X, few.X)
    assert w.sum().item() == pytest.approx(torch.cat(weights).sum().item(), rel=0.03)


def test_a_share_by_importance_keeps_the_expected_loss():
    x, spec, weighting, r = rows(8, tokens=4000), QuantSpec(), Weighting(gamma=3.0), haar(12, 8)
    weights, _ = dfrot.row_weights(x, spec, weighting)
    scores = importance(x, r, spec, weights)
    y = x.X.flatten(0, 1) @ r
    direct = torch.cat(weights) * (y - slow_quantize(y, spec)[1]).square().sum(-1)
    assert torch.allclose(torch.cat(scores), direct, rtol=1e-3)
    sums = []
    for seed in range(30):
        few, w = dfrot.subsample(x, spec, weighting, weights, 0.25, seed=seed, scores=scores)
        assert len(few.X[0]) == pytest.approx(2000, rel=0.1)
        error = torch.cat(importance(few, r, spec, w)).sum().item()
        sums.append(error / direct.sum().item())
    assert np.mean(sums) == pytest.approx(1, abs=0.01) and np.std(sums) < 0.05


@pytest.mark.parametrize("solver", ["svd", "fast"])
def test_refining_on_rows_drawn_by_importance(solver):
    """A tenth of the rows, and the loss of all of them falls nearly as far as if all were used."""
    x, spec, start = rows(8, sites=2, tokens=4000, d=32), QuantSpec(), haar(32, 8)
    options = {"iterations": 20, "solver": solver}
    _, whole = optimize(x, start, spec, Weighting(), **options)
    options |= {"rows": 0.1, "sampling": "importance"}
    r, log = optimize(x, start, spec, Weighting(), **options)
    assert rotations.orthogonality_error(r) <= 1e-12
    assert log.rows == pytest.approx(800, rel=0.15) and log.massive_rows == whole.massive_rows
    few, first, all_ = loss(x, r, spec, Weighting()), whole.quantized[0], whole.rotated[-1]
    assert few < first - 0.9 * (first - all_)
    again, same = optimize(x, start, spec, Weighting(), **options)
    assert torch.equal(again, r) and same == log
    uniform, _ = optimize(x, start, spec, Weighting(), **options | {"sampling": "uniform"})
    assert not torch.equal(uniform, r)


def test_the_whole_share_is_the_whole():
    x = rows(9)
    weights, _ = dfrot.row_weights(x, QuantSpec(), Weighting())
    assert dfrot.subsample(x, QuantSpec(), Weighting(), weights, 1.0) == (x, weights)
    for share in (0, 1.1, -1, math.nan):
        with pytest.raises(ValueError, match=r"rows = .*: use a share in \(0, 1\]"):
            optimize(x, haar(12), QuantSpec(), Weighting(), rows=share)


# --- checkpoints -----------------------------------------------------------------------------------


def interrupted(monkeypatch, path, x, start, weighting, at: int, **options) -> None:
    """Run until the `at`-th polar factor, then stop as Ctrl-C would."""
    name = "svd" if options.get("solver") == "svd" else "polar"
    calls, real = [], getattr(polar, name)

    def stop(m):
        calls.append(m)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(m)

    with monkeypatch.context() as patch:
        patch.setattr(polar, name, stop)
        with pytest.raises(KeyboardInterrupt):
            optimize(x, start, QuantSpec(), weighting, checkpoint=path, every=3, **options)


@pytest.mark.parametrize(
    "more",
    [
        {"objective": "centroids"},
        {"objective": "least_squares"},
        {"rows": 0.5, "sampling": "importance"},
        {"relax": 1.6},
        {"qr": True},
        {"update": True, "error_dtype": torch.bfloat16},
    ],
    ids=lambda more: "-".join(map(str, more.values())),
)
@pytest.mark.parametrize(
    "solver, owner, step",
    [("svd", products, "whole"), ("fast", products.Streamed, "__call__")],
    ids=["svd", "fast"],
)
def test_an_interrupted_run_ends_with_the_same_bytes(
    monkeypatch, tmp_path, solver, owner, step, more
):
    if "update" in more and solver == "svd":
        pytest.skip("updates are of the fast step")
    x, start, path = rows(10), haar(12, 1), tmp_path / "state.safetensors"
    options = {"iterations": 10, "solver": solver} | more
    wanted = optimize(x, start, QuantSpec(), Weighting(), **options)
    interrupted(monkeypatch, path, x, start, Weighting(), at=9, **options)
    assert path.exists()
    if "update" in more:  # taken up between two full products, or it would show nothing
        saved = load_file(path)
        assert 0 < (saved["R"] - saved["base"]).norm() <= products.FAR * 12**0.5
    steps, accumulate = [], getattr(owner, step)
    monkeypatch.setattr(owner, step, lambda *a, **k: steps.append(1) or accumulate(*a, **k))
    found = optimize(x, start, QuantSpec(), Weighting(), checkpoint=path, every=3, **options)
    assert len(steps) == 4  # six of ten were saved
    assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]
    assert not list(tmp_path.iterdir())


OTHERWISE = {
    "share": 0.5, "solver": "svd", "objective": "whip", "stop": 0.5, "relax": 1.6,
    "sampling": "importance", "qr": True, "update": True, "error_dtype": torch.bfloat16,
}  # fmt: skip


def test_a_damaged_checkpoint_is_named(monkeypatch, tmp_path):
    x, start, path = rows(10), haar(12, 1), tmp_path / "state.safetensors"
    interrupted(monkeypatch, path, x, start, Weighting(), at=9, iterations=10)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RotationError, match=r"state\.safetensors cannot be read: .*; delete it"):
        optimize(x, start, QuantSpec(), Weighting(), checkpoint=path, iterations=10)


@pytest.mark.parametrize(
    "changed",
    [
        "gamma",
        "start",
        "rows",
        "spec",
        "iterations",
        "dtype",
        "share",
        "solver",
        "objective",
        "stop",
        "relax",
        "sampling",
        "qr",
        "update",
        "error_dtype",
        "whose",
    ],
)
def test_a_checkpoint_of_another_optimisation_is_not_taken(monkeypatch, tmp_path, changed):
    x, start, path = rows(10), haar(12, 1), tmp_path / "state.safetensors"
    interrupted(monkeypatch, path, x, start, Weighting(), at=9, iterations=10)
    spec, weighting, options = QuantSpec(), Weighting(), {"iterations": 10}
    if changed == "gamma":
        weighting = Weighting(gamma=7.0)
    elif changed == "start":
        start = haar(12, 2)
    elif changed == "rows":
        x = rows(11)
    elif changed == "spec":
        spec = QuantSpec(symmetric=True)
    elif changed == "dtype":
        options["dtype"] = FP64
    elif changed in OTHERWISE:
        options["rows" if changed == "share" else changed] = OTHERWISE[changed]
    else:
        options["iterations"] = 4
    wanted = optimize(x, start, spec, weighting, **options)
    resumed, real = [], dfrot._resume

    def resume(path, key, log, *rest):
        r = real(path, key, log, *rest)
        resumed.append(log.rotated != [])
        return r

    monkeypatch.setattr(dfrot, "_resume", resume)
    found = optimize(x, start, spec, weighting, checkpoint=path, **options)
    # where all rows are used, `sampling` alone would not show in the result
    assert resumed == [False]
    assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_rows_are_refused(bad):
    x = rows(0)
    x.X[1, 3, 2] = bad
    for call in (loss, optimize):
        with pytest.raises(
            ActivationsError, match="hold NaN or Inf: collect them again in float32"
        ):
            call(x, haar(12), QuantSpec(), Weighting())


def test_no_massive_row_for_an_infinite_gamma():
    x = Activations.of(torch.tensor([[1.0, 0.3, -0.21, 0.4]]).repeat(30, 1))
    assert not massive.is_massive(x.X, QuantSpec(bits=2)).any()
    with pytest.raises(ActivationsError, match="gamma = inf, but no calibration row is massive"):
        optimize(x, haar(4), QuantSpec(bits=2), Weighting(gamma=math.inf))


def test_nothing_to_weigh():
    x = Activations.of(torch.eye(64).repeat(5, 1))  # every row massive
    with pytest.raises(ActivationsError, match=r"no calibration row counts: .* \(gamma = 0\.0\)"):
        optimize(x, haar(64), QuantSpec(), Weighting(gamma=0.0))


def test_a_wrong_start_is_refused():
    with pytest.raises(RotationError, match=r"start is \[8, 8\] but the model needs \[12, 12\]"):
        optimize(rows(0), haar(8), QuantSpec(), Weighting())
    with pytest.raises(RotationError, match="start is not orthogonal"):
        optimize(rows(0), 2 * haar(12), QuantSpec(), Weighting())


def test_distance():
    r = haar(50, 1)
    assert dfrot.distance(r, r) == pytest.approx(
        {"relative_distance": 0, "mean_column_cosine": 1}, abs=1e-12
    )
    far = dfrot.distance(haar(50, 2), r)
    assert far["relative_distance"] == pytest.approx(1, abs=0.05)
    assert abs(far["mean_column_cosine"]) < 0.1
    turned = r.clone()
    turned[:, 0] *= -1
    assert dfrot.distance(turned, r)["relative_distance"] == pytest.approx((2 * 1 / 50) ** 0.5)
