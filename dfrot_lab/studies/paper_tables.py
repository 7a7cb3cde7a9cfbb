"""Study 05: every row type of the paper's Tables 1 to 3 and its γ sweep, with seeds and intervals."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from dfrot_lab import paper
from dfrot_lab.evaluation import spread
from dfrot_lab.lab import Lab
from dfrot_lab.results import Claim
from dfrot_lab.studies.perplexities import gamma_sweep, paired, table

__all__ = ["calibration", "claims", "gamma_sweep", "measure", "summary"]

TABLE1 = (("NR", "none"), ("RO", "none"), ("RO", "massive"), ("RH", "none"), ("RH", "massive"))
COMPARED = ("RO", "RH", "DFRot(RO)", "DFRot(RH)")  # RTN against GPTQ


def measure(
    lab: Lab, seeds: list[int], windows: int, bits: list[str], gptq: str
) -> list[dict[str, Any]]:
    """The rows of Tables 1 and 2: `gptq` for both, "rtn" without kept tokens, FP once.

    Rows that share rotation, seed and weights come together and share a quantized model.
    """
    grid = []
    for name in ("NR", "RO", "RH", "DFRot(RO)", "DFRot(RH)"):
        keeps = [keep for n, keep in TABLE1 if n == name] or ["none"]
        for seed in seeds if name != "NR" else seeds[:1]:
            for method in (gptq, "rtn") if name in COMPARED else (gptq,):
                kept = keeps if method == gptq else ["none"]
                grid += [(name, seed, method, b, keep) for b in bits for keep in kept]
    rows = [lab.perplexity("FP", bits="16-16-16", windows=windows)]
    bar = tqdm(grid, desc="tables", unit="row")
    for name, seed, method, b, keep in bar:
        bar.set_postfix_str(f"{name} {b} {method} keep={keep} seed={seed}", refresh=False)
        rows.append(lab.perplexity(name, seed, bits=b, keep=keep, windows=windows, method=method))
    return rows


def calibration(
    lab: Lab, samples: int, sites: list[int], windows: int, bits: str, method: str = "rtn"
) -> dict[str, list[dict[str, Any]]]:
    """Table 3: DFRot(RH), seed 0, from each of `samples` calibration samples, and from fewer norm sites."""

    def row(file: str, **about: Any) -> dict[str, Any]:
        found = lab.perplexity(file, bits=bits, windows=windows, method=method)
        return about | {"ppl": found["ppl"], "bits": bits, "method": found["method"]}

    every = len(lab.activations.sites)
    return {
        "sample": [
            row(str(lab.sample(k).rotation_file("DFRot(RH)")), index=k)
            for k in tqdm(range(samples), desc="calibration samples")
        ],
        "sites": [
            row(str(lab.rotation_file("DFRot(RH)", sites=n)), used=n, of=every)
            for n in tqdm(sites, desc="norm sites")
        ],
    }


def summary(rows: list[dict[str, Any]], gptq: str) -> dict[str, Any]:
    """Rows, means, paired differences by bits, and the closed share of each setting."""
    pairs = []
    for bits in dict.fromkeys(r["bits"] for r in rows[1:]):
        for method in (gptq, "rtn"):
            these = [r for r in rows if r["bits"] == bits and r["method"] == method]
            known = {(r["rotation"], r["keep"]) for r in these}
            wanted = [
                (("RO", "none"), ("RH", "none")),
                (("RO", "massive"), ("RH", "massive")),
                (("RH", "none"), ("DFRot(RH)", "none")),
                (("RO", "none"), ("DFRot(RO)", "none")),
            ]
            for a, b in wanted:
                if {a, b} <= known and len(these[0]["nll"]) > 1:
                    pairs.append({"bits": bits, "method": method} | paired(these, a, b))
    return {"rows": rows, "table": table(rows), "paired": pairs, "gptq": gptq}


def claims(result: dict[str, Any]) -> list[Claim]:
    """The closing table of notebook 05; means over seeds."""
    gptq, mean = result["gptq"], _means(result["table"])
    bits = list(dict.fromkeys(b for _, _, b, m in mean if m == gptq))
    out = [_order(mean, b, gptq) for b in bits]
    better = [
        (n, b, mean[n, "none", b, gptq], mean[n, "none", b, "rtn"]) for n in COMPARED for b in bits
    ]
    worst = max(better, key=lambda r: r[2] / r[3])
    readme = paper.numbers()
    rtn = readme["table2_readme_rtn"]["LLaMA2-7B"]["QuaRot-RTN"]
    gpt = readme["table2_readme_gptq"]["LLaMA2-7B"]["QuaRot-GPTQ"]
    out.append(
        Claim(
            "GPTQ is better than RTN in every rotated row",
            f"LLaMA2-7B, QuaRot, 4-4-4: RTN {rtn[0]} → GPTQ {gpt[0]} (README)",
            f"in {sum(g < r for *_, g, r in better)} of {len(better)} rows; worst: "
            f"{worst[0]} at {worst[1]}, {worst[3]:.2f} → {worst[2]:.2f}",
            "all means over seeds lower",
            all(g < r for *_, g, r in better),
        )
    )
    for b in bits:
        if b.split("-")[1] == "8":
            ro, rh = mean["RO", "none", b, gptq], mean["RH", "none", b, gptq]
            two = [paper.table1("LLaMA2-7B", n, b) for n in ("RO", "RH")]
            out.append(
                Claim(
                    f"At {b} with GPTQ RO and RH are alike",
                    f"LLaMA2-7B: {two[0]} and {two[1]} (Table 1)",
                    f"{ro:.2f} and {rh:.2f}",
                    "within 2 %",
                    abs(ro / rh - 1) <= 0.02,
                )
            )
    out += _calibration_claims(result)
    return out


def _means(rows: list[dict[str, Any]]) -> dict[tuple, float]:
    return {(r["rotation"], r["keep"], r["bits"], r["method"]): float(r["mean"]) for r in rows}


def _order(mean: dict[tuple, float], bits: str, gptq: str) -> Claim:
    four = bits.split("-")[1] == "4"
    names = ("NR", "RO", "RH", "DFRot(RH)")
    values = [mean[n, "none", bits, gptq] for n in names]
    two, three = "LLaMA2-7B", "LLaMA3-8B"
    published = "; ".join(
        f"{m}: {paper.table1(m, 'RO', bits)}, {paper.table1(m, 'RH', bits)}" for m in (two, three)
    )
    holds = values[0] > 2 * values[1] and values[1] > values[2] >= values[3]
    return Claim(
        f"{bits}, GPTQ: NR ≫ RO > RH ≥ DFRot" if four else f"{bits}, GPTQ: no rotation is worst",
        f"RO, RH: {published} (Table 1)",
        ", ".join(f"{n} {v:,.2f}" for n, v in zip(names, values, strict=True)),
        "NR above 2 × RO, RO above RH, DFRot not above RH" if four else "NR above RO and RH",
        holds if four else values[0] > max(values[1:3]),
    )


def _calibration_claims(result: dict[str, Any]) -> list[Claim]:
    out, numbers = [], paper.numbers()["calibration_ablation_4-4-16"]
    if samples := result.get("calibration", {}).get("sample"):
        s = spread([r["ppl"] for r in samples])
        published = numbers["sample_index_1_to_5"]["LLaMA2-7B"]
        out.append(
            Claim(
                "The calibration sample hardly matters",
                f"LLaMA2-7B: {min(published)} to {max(published)} over 5 samples (Table 3)",
                f"{s['mean']:.2f} ± {s['sd']:.2f} over {s['n']} samples at {samples[0]['bits']}",
                "sd at most 2 % of the mean",
                s["sd"] <= 0.02 * s["mean"],
            )
        )
    return out
