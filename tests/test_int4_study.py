"""Study 07: what is counted and compared by hand, what is read of a benchmark, each claim once false."""

from __future__ import annotations

import copy
import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from dfrot_kernels import reference
from dfrot_kernels.hadamard import transform
from scipy.stats import ttest_ind
from torch import nn

from dfrot_lab import plots, quantized_model, results
from dfrot_lab.lab import Lab
from dfrot_lab.linears import Int4Linear
from dfrot_lab.studies import int4_kernels, int4_model, int4_speed

SITE = "layers.1.mlp"
SAME = "The packed model is the fake-quantized one at"
LAST = "What sets them apart in fp32 is a last bit, no more"
TIES = "Given equal input, codes are equal up to ties"
EVERY = "Every kernel computes what its reference defines"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    return Lab(
        model="tiny:llama", corpus="pydoc", seqlen=64, folder=folder, threads=1, clip_steps=2
    )


@pytest.fixture(scope="module")
def packed(lab):
    return int4_model.packed_model(lab, 0, "torch")


# --- where kernels run ----------------------------------------------------------------------------


def test_prepare_says_which_backend_runs(monkeypatch, capsys):
    assert int4_kernels.prepare("cpu") == "triton"  # the tests' interpreter
    assert "interpreter" in capsys.readouterr().out
    monkeypatch.setattr(int4_kernels, "find_spec", lambda name: None)
    assert int4_kernels.prepare("cpu") == "torch"
    assert "not installed" in capsys.readouterr().out
    assert int4_kernels.language().constexpr is int  # enough to write a kernel down


def test_prepare_sets_the_interpreter_in_time_or_says_that_it_is_late(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setitem(sys.modules, "triton.language", None)
    assert int4_kernels.prepare("cpu") == "torch" and "restart" in capsys.readouterr().out
    assert "TRITON_INTERPRET" not in os.environ
    monkeypatch.delitem(sys.modules, "triton.language")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert int4_kernels.prepare("cpu") == "triton" and os.environ["TRITON_INTERPRET"] == "1"


# --- packing and kernels --------------------------------------------------------------------------


def test_the_drawing_shows_what_is_stored(lab):
    found = int4_kernels.nibbles(lab, SITE, shown=4)
    assert found["channels"] == lab.activations.d
    for low, high, byte in zip(*found["codes"].values(), found["bytes"], strict=True):
        assert byte == int(np.int8(np.uint8((low & 15) | (high & 15) << 4)))
    for name in ("low", "high"):
        values, codes = np.array(found["values"][name]), np.array(found["codes"][name])
        back = found["scale"] * (codes - found["zero"])
        assert np.abs(values - back).max() <= 0.52 * found["scale"]


def test_every_kernel_is_compared_and_right():
    rows = int4_kernels.correctness("cpu", "triton")
    assert all(int4_kernels._right(r) for r in rows), rows
    public = {n for n in dir(reference) if n in set(_twins())}
    assert {r["kernel"] for r in rows} == public
    table = int4_kernels.correctness_table({"correctness": rows})
    assert len(table.rows) == len(rows) and "355 of 355" in str(table)
    assert int4_kernels.correctness("cpu", "torch") == []  # nothing to compare with


def _twins() -> list[str]:
    from dfrot_kernels import triton_ops

    shared = {"KV", "Tokens", "Weight", "pack", "pack_weight", "unpack"}
    return [n for n in triton_ops.__all__ if n not in shared]


def test_a_kernel_that_leaves_nan_is_seen(monkeypatch):
    from dfrot_kernels import triton_ops

    right = reference.matmul

    def holes(*arguments, **options):
        found = right(*arguments, **options)
        found[..., -1] = math.nan
        return found

    monkeypatch.setattr(triton_ops, "matmul", holes)
    rows = [r for r in int4_kernels.correctness("cpu", "triton") if r["kernel"] == "matmul"]
    assert rows and not any(int4_kernels._right(r) for r in rows)


def test_a_wrong_kernel_is_seen(monkeypatch):
    from dfrot_kernels import triton_ops

    right = reference.quantize_int4

    def one_off(x, **options):
        found = right(x, **options)
        found.codes[..., 0] ^= 1
        return found

    monkeypatch.setattr(triton_ops, "quantize_int4", one_off)
    rows = int4_kernels.correctness("cpu", "triton")
    assert [int4_kernels._right(r) for r in rows].count(False) == 2  # both ways it is called
    assert rows[0]["differ"] == 5 and rows[0]["by"] == 1


# --- the model ------------------------------------------------------------------------------------


def test_the_packed_model_scores_as_the_fake_quantized_one(lab, packed):
    rows = int4_model.perplexities(lab, packed, 0, 1, 2, "torch")
    ppl = {(r["model"], r["bits"], r["draw"]): r["ppl"] for r in rows}
    assert len(ppl) == len(rows) == 1 + 2 * 2 + 2 + 2 * 2
    exact = [ppl[m + int4_model.EXACT, int4_model.BITS, 0] for m in ("fake-quantized", "packed")]
    assert exact[1] == pytest.approx(exact[0], rel=1e-12)
    assert exact[0] == pytest.approx(ppl["fake-quantized", int4_model.BITS, 0], rel=1e-3)
    for bits in (int4_model.WEIGHTS, int4_model.BITS):
        fake = ppl["fake-quantized", bits, 0]
        assert ppl["packed", bits, 0] == pytest.approx(fake, rel=1e-3)
        assert fake != ppl["floating point", "", 0]
    assert ppl["fake-quantized", int4_model.WEIGHTS, 0] != ppl["fake-quantized", int4_model.BITS, 0]
    assert "fake-quantized" in str(int4_model.perplexity_table({"perplexity": rows}))
    fake = lab.quantized("RH", 0, bits=int4_model.BITS)  # still there, and not packed
    assert not any(isinstance(m, Int4Linear) for m in fake.modules())


def test_in_fp64_the_packed_codes_are_what_is_computed_with(lab, packed):
    fake = lab.quantized("RH", 0, bits=int4_model.BITS)
    wide, four = (int4_model.in_fp64(m, packed) for m in (fake, packed))
    assert all(p.dtype == torch.float64 for p in (*wide.parameters(), *four.parameters()))
    tokens = lab.evaluation_tokens(1)[:, :40]
    with torch.inference_mode():
        a, b, c = (m(tokens, use_cache=False).logits for m in (wide, four, fake))
    assert a.dtype == b.dtype == torch.float64
    assert (a - b).abs().max() < 1e-12 * a.abs().max()
    assert (a - c).abs().max() > 1e-9 * a.abs().max()  # fp32 is seen
    name, linear = next((n, m) for n, m in packed.named_modules() if isinstance(m, Int4Linear))
    linear = copy.deepcopy(linear)
    linear.packed[0, 0] ^= 1  # one code
    other = int4_model.in_fp64(packed, packed)
    other.get_submodule(name).packed.copy_(linear.packed)
    with torch.inference_mode():
        assert (other(tokens, use_cache=False).logits - b).abs().max() > 1e-9 * b.abs().max()


def test_only_last_bits_are_changed(lab, packed):
    fake = lab.quantized("RH", 0, bits=int4_model.BITS)
    for model, part in ((fake, "weight"), (packed, "scale")):
        other = int4_model._nudged(model, 1)
        for (name, a), b in zip(model.named_modules(), other.modules(), strict=True):
            if isinstance(a, (int4_model.QuantLinear, Int4Linear)):
                x, y = getattr(a, part), getattr(b, part)
                assert not torch.equal(x, y), name
                assert ((x - y).abs() <= 3e-7 * x.abs()).all()


def test_apart_by_hand():
    def rows(model, *nll):
        return [
            {"model": model, "bits": int4_model.BITS, "draw": i, "nll": [v, v], "ppl": math.exp(v)}
            for i, v in enumerate(nll)
        ]

    a, b = (1.0, 1.2, 1.1), (1.0, 1.0, 1.3)
    found = int4_model.apart({"perplexity": rows("packed", *a) + rows("fake-quantized", *b)})
    wanted = ttest_ind(a, b, equal_var=False).confidence_interval()
    assert found["itself"] == 0 and found["means"] == pytest.approx(0)
    assert (found["low"], found["high"]) == pytest.approx((wanted.low, wanted.high))
    one = int4_model.apart({"perplexity": rows("packed", 1.0) + rows("fake-quantized", 1.1)})
    assert one["low"] == -math.inf and one["means"] == pytest.approx(-0.1)
    same = int4_model.apart({"perplexity": rows("packed", 1, 1) + rows("fake-quantized", 2, 2)})
    assert same["low"] == same["high"] == -1


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_codes_of_every_layer_are_compared(lab, packed, backend):
    rows = int4_model.codes(lab, packed, 0, 8, backend)
    assert [(r["layer"], r["input"]) for r in rows] == [
        (i, role) for i in range(2) for role in int4_model.ROLES
    ]
    assert [r["codes"] for r in rows[:4]] == [8 * k for k in (64, 64, 64, 96)]
    assert all(r["equal"] >= 0.99 * r["codes"] and r["by"] <= 1 for r in rows)
    assert all(r["output"] < 1e-2 for r in rows)
    table = int4_model.codes_table({"codes": rows})
    assert "2 layers" in table.title and len(table.rows) == 4


def test_codes_that_differ_are_counted(lab, packed, monkeypatch):
    monkeypatch.setattr(reference, "hadamard_quantize", reference.quantize_int4)  # R4 left out
    rows = int4_model.codes(lab, packed, 0, 8, "torch")
    assert len(rows) == 2 * len(int4_model.ROLES)
    for r in rows:
        assert (r["equal"] < r["codes"]) == (r["input"] == int4_model.ROLES[3])


def test_bytes_by_hand(lab, packed):
    found = int4_model.memory(lab, packed, [1, 16])
    d, inner, kv, layers = 64, 96, 32, 2
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (inner, d), (inner, d), (d, inner)]
    assert found["fp16"]["linears"] == layers * sum(2 * n * k for n, k in shapes)
    assert found["packed"]["linears"] == layers * sum(n * k // 2 + 8 * n for n, k in shapes)
    assert found["fp16"]["rest"] == found["packed"]["rest"] >= 2 * 2 * 384 * d
    for row in found["peak"]:
        for kind in ("fp16", "packed"):
            assert row[kind] > sum(found[kind].values())
    first, second = found["peak"]
    assert first["fp16"] < second["fp16"] and first["packed"] < second["packed"]
    assert next(packed.parameters()).dtype == torch.float32  # a copy was cast
    large = found["large"]
    assert sum(large["fp16"].values()) == 2 * (6_738_415_616 - 65 * 4096)  # all but its 65 norms
    assert int4_model.ratio(large) == pytest.approx(3.57, abs=0.01)


def test_peak_counts_what_is_alive_at_once():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1000))

        def forward(self, window, **options):
            a = self.w.expand(5, 1000) + 1  # 20 kB
            a = a.view(10, 500) * 2  # 20 kB more, then the first goes
            return a.sum() + a.abs().sum()  # |a| beside a

    size = int4_model._peak(Two(), 1)
    assert 4000 + 40_000 <= size <= 4000 + 40_100


# --- speed ----------------------------------------------------------------------------------------


def documents() -> tuple[dict, dict]:
    """What benchmarks/int4_kernels.py and end_to_end.py write, with invented numbers."""
    rows = []
    for shape, n, k in (("llama-3-8b.down", 4096, 14336), ("llama-2-7b.gate", 11008, 4096)):
        for m in (1, 16, 2048):
            for who, ours, ms in (
                ("cuBLAS bf16", False, 0.1 + m / 2048),
                ("dfrot W4A4", True, 0.04 + m / 3000),
                ("dfrot quantize + W4A4", True, 0.05 + m / 3000),
                ("gemlite A16W4", False, 0.2),
            ):
                row = {"op": "linear", "who": who, "ours": ours, "shape": shape, "gate": "ok"}
                row |= {"n": n, "k": k, "m": m, "ms20": ms, "ms50": ms, "ms80": ms, "gbs": 600 / ms}
                rows.append(row | {"tflops": 2 * m * n * k / ms / 1e9, "share": 0.5})
    codes = {"op": "hadamard_quantize", "who": "dfrot", "ours": True, "shape": "llama-3-8b.down"}
    codes |= {"gate": "ok", "n": None, "k": 14336, "m": 2048, "tflops": None}
    rows.append(codes | {"ms20": 0.02, "ms50": 0.02, "ms80": 0.02, "gbs": 3500.0})
    rows.append(rows[0] | {"who": "dfrot W4A16", "ours": True, "gate": "wrong", "ms50": None})
    about = {"device": "Invented GPU", "capability": "9.0", "date": "2026-11-24T10:00:00+00:00"}
    about |= {"commit": "0123456789", "dirty": False, "torch": "2.13.0", "triton": "3.9.0"}
    about |= {"backend": "triton", "interpreted": False}
    target = {"target": "W4A4 prefill", "wanted": 1.4, "worst": 1.5, "found": {}, "verdict": "met"}
    kernels = {"provenance": about, "rows": rows, "targets": [target]}
    kernels["sessions"] = [{"ceilings": {"copy": 4200.0, "bf16": 790.0, "int8": None}}]
    whole = {
        "rows": [
            {
                "who": w,
                "gate": "ok",
                "tokens": 2048,
                "prefill_ms50": 45.0 / i,
                "decode_ms50": 4.0 / i,
            }
            for i, w in enumerate(("fp16", "W4A4"), 1)
        ],
        "targets": [target | {"target": "decode", "wanted": 1.0, "worst": None}],
    }
    return kernels, whole


def written(folder, **changes) -> None:
    folder.mkdir(parents=True)
    kernels, whole = documents()
    kernels["provenance"] |= changes
    (folder / "kernels.json").write_text(json.dumps(kernels))
    (folder / "end_to_end.json").write_text(json.dumps(whole))


def test_committed_measurements_are_read_with_their_provenance(tmp_path):
    written(tmp_path / "old", date="2025-01-01T00:00:00+00:00", device="Old GPU")
    written(tmp_path / "new")
    written(tmp_path / "cpu", date="2027-01-01T00:00:00+00:00", capability=None)  # no GPU: no speed
    found = int4_speed.committed(tmp_path)
    said = found["said"]
    for part in ("Committed", "Invented GPU", "2026-11-24", "0123456", "2.13.0", "3.9.0"):
        assert part in said
    assert all(r["who"] != "dfrot W4A16" for r in found["rows"])  # a wrong one has no speed
    assert [r["who"] for r in found["end_to_end"]] == ["fp16", "W4A4"]
    assert int4_speed.committed(tmp_path / "nowhere") is None
    assert int4_speed.committed(tmp_path / "cpu") is None


def test_an_older_run_of_the_same_device_fills_the_gaps(tmp_path):
    written(tmp_path / "new")
    path = tmp_path / "new" / "kernels.json"
    new = json.loads(path.read_text())
    new["rows"] = [r for r in new["rows"] if r["who"] != "gemlite A16W4"]
    new["targets"].append(new["targets"][0] | {"target": "ahead of gemlite", "worst": None})
    path.write_text(json.dumps(new))
    written(tmp_path / "old", date="2026-11-20T00:00:00+00:00")
    path = tmp_path / "old" / "kernels.json"
    old = json.loads(path.read_text())
    for row in old["rows"]:
        row["ms50"] = 9.0
    old["targets"] = [t | {"worst": 0.5} for t in new["targets"]]
    path.write_text(json.dumps(old))
    for i, change in enumerate(({"device": "Other GPU"}, {"triton": "3.0.0"})):
        written(tmp_path / f"other{i}", date="2026-11-21T00:00:00+00:00", **change)
    found = int4_speed.committed(tmp_path)
    assert {r.get("of") for r in found["rows"]} == {None, "2026-11-20T00:00:00+00:00"}
    assert "left out is of 2026-11-20 00:00" in found["said"]
    times = {
        who: {r["ms50"] for r in found["rows"] if r["who"] == who}
        for who in ("dfrot W4A4", "gemlite A16W4")
    }
    assert 9.0 not in times["dfrot W4A4"] and times["gemlite A16W4"] == {9.0}
    worst = {t["target"]: t["worst"] for t in found["targets"]}
    assert worst == {"W4A4 prefill": 1.5, "ahead of gemlite": 0.5, "decode": None}


def test_where_nothing_was_measured_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(int4_speed, "SECONDS", 0.0)
    monkeypatch.setattr(int4_speed, "ROWS", (1, 4))
    monkeypatch.setattr(int4_speed.files, "project_root", lambda: tmp_path)
    found = int4_speed.speed("cpu", (64, 96), tmp_path)
    assert found["origin"] == "cpu" and "Not measured" in capsys.readouterr().out
    assert "torch definitions" in found["device"] and not found["end_to_end"]
    assert int4_speed.claims(found) == []
    linear = [r for r in found["rows"] if r["op"] == "linear"]
    assert len(linear) == 2 * 2 * 4
    gate = next(r for r in linear if (r["shape"], r["who"], r["m"]) == ("gate", "W4A4", 4))
    assert (gate["n"], gate["k"]) == (96, 64)
    tokens, weight, out = 4 * 64 + 4 * 8, 96 * 32 + 96 * 8, 4 * 96 * 4
    assert gate["gbs"] * gate["ms50"] * 1e6 == pytest.approx(tokens + weight + out)
    assert gate["tflops"] * gate["ms50"] * 1e9 == pytest.approx(2 * 4 * 96 * 64)
    for name in plots.int4_speed.TIMED:
        plots.draw(name, {"speed": found})
    written(tmp_path / int4_speed.COMMITTED)
    assert int4_speed.speed("cpu", (64, 96), tmp_path)["origin"] == "committed"


def test_only_what_does_not_change_goes_into_the_result(tmp_path):
    for origin, kept in (("committed", 1), ("measured", 0)):
        found = int4_speed.from_benchmarks(*documents(), origin)
        assert len(int4_speed.claims(found, only="committed")) == kept
        shown = int4_speed.with_claims({"claims": []}, found)["claims"]
        assert len(shown) == 1 - kept  # a fresh one is shown all the same
        [claim] = int4_speed.claims(found)  # the target that was not measured has no line
        assert claim.agrees and "1.50" in claim.ours and claim.paper.startswith("not ")
    int4_speed.save(tmp_path, found)
    assert json.loads((tmp_path / "speed.json").read_text())["device"] == "Invented GPU"


def test_ratios_are_of_equal_sizes_and_rates_of_counted_work():
    speed = int4_speed.from_benchmarks(*documents(), "committed")
    told = plots.caption("kernel_speed", {"speed": speed})
    wanted = (0.1 + 1) / (0.05 + 2048 / 3000)
    assert f"{wanted:.2f} at M = 2,048" in told and "cuBLAS bf16" in told and "gemlite" not in told
    assert "W4A4 0.011 ms a token in prefill, 2.00 in decode" in told
    points = plots.int4_speed._points(speed)
    turned = next(p for p in points if p[0] == "Hadamard + quantize")
    seconds, work = 2e-5, 2048 * 14336 * (5 + math.log2(14336))
    assert turned[3] == pytest.approx(work / seconds / 1e12)
    assert turned[2] == pytest.approx(work / (3500e9 * seconds))


# --- figures and claims ---------------------------------------------------------------------------


def test_figures_of_what_was_timed_are_left_out_where_nothing_was(lab, packed, tmp_path):
    result = {"nibbles": int4_kernels.nibbles(lab, SITE)}
    result["memory"] = int4_model.memory(lab, packed, [1])
    results.save(tmp_path, result, {})
    names = {p.stem for p in plots.draw_notebook("07_int4_kernels", tmp_path)}
    assert names == {"nibble_packing", "packed_memory"}
    int4_speed.save(tmp_path, int4_speed.from_benchmarks(*documents(), "measured"))
    names = {p.stem for p in plots.draw_notebook("07_int4_kernels", tmp_path)}
    assert names == {n for n, s in plots.FIGURES.items() if s.notebook == "07_int4_kernels"}


def good() -> dict:
    row = {"kernel": "matmul", "integers": 9, "differ": 0, "by": 0, "relative": 1e-4}
    return {
        "perplexity": [
            {"model": m, "bits": bits, "draw": draw, "ppl": p, "nll": [math.log(p)]}
            for draw in (0, 1)
            for bits in (int4_model.WEIGHTS, int4_model.BITS)
            for m, p in (("fake-quantized", 60.0 + 0.1 * draw), ("packed", 60.1 + 0.1 * draw))
        ]
        + [
            {
                "model": m + int4_model.EXACT,
                "bits": int4_model.BITS,
                "draw": 0,
                "ppl": p,
                "nll": [4],
            }
            for m, p in (("fake-quantized", 60.0), ("packed", 60.0))
        ],
        "codes": [{"codes": 10_000, "equal": 9_995, "by": 1}],
        "correctness": [
            row,
            row | {"kernel": "hadamard_quantize", "integers": 5000, "differ": 3, "by": 1},
        ],
        "memory": {
            "fp16": {"linears": 200, "rest": 100},
            "packed": {"linears": 52, "rest": 100},
            "large": int4_model._large(**int4_model.LLAMA_2_7B),
        },
    }


@pytest.mark.parametrize(
    ("claim", "change"),
    [
        ("4-bit weights take a quarter of FP16", lambda r: r["memory"]["packed"].update(linears=60)),
        ("So does a large model, nearly", lambda r: r["memory"]["large"]["packed"].update(rest=10**9)),
        (f"{SAME} 4-16-16", lambda r: r["perplexity"][1].update(ppl=60.4)),
        (f"{SAME} 4-4-16, in fp64", lambda r: r["perplexity"][-1].update(ppl=59.6)),
        (LAST, lambda r: [x.update(nll=[4.3]) for x in r["perplexity"] if x["model"] == "packed"]),
        (TIES, lambda r: r["codes"][0].update(equal=9_989)),
        (TIES, lambda r: r["codes"][0].update(by=2)),
        (EVERY, lambda r: r["correctness"][0].update(differ=1, by=1)),
        (EVERY, lambda r: r["correctness"][1].update(by=2)),
        (EVERY, lambda r: r["correctness"][1].update(differ=6)),
        (EVERY, lambda r: r["correctness"][0].update(relative=0.01)),
    ],
)  # fmt: skip
def test_claims_of_07_can_fail(claim, change):
    verdicts = {c.claim: c.agrees for c in int4_kernels.claims(good())}
    assert verdicts[claim] and all(verdicts.values())
    result = copy.deepcopy(good())
    change(result)
    assert not {c.claim: c.agrees for c in int4_kernels.claims(result)}[claim]


def test_without_triton_nothing_is_claimed_of_kernels():
    result = good() | {"correctness": []}
    assert not any("kernel" in c.claim for c in int4_kernels.claims(result))


def test_the_hadamard_of_the_model_is_the_one_that_is_fused():
    assert transform is quantized_model.hadamard.transform
