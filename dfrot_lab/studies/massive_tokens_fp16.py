"""Study 03: how much of the RO–RH gap goes when massive tokens alone are kept in floating point."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dfrot_lab.evaluation import Perplexity, spread
from dfrot_lab.lab import Lab
from dfrot_lab.paper import table1
from dfrot_lab.results import Claim
from dfrot_lab.studies.perplexities import paired, perplexities, table

__all__ = ["claims", "closed_share", "exempted", "paired", "perplexities", "summary", "table"]


def summary(
    lab: Lab, rows: list[dict[str, Any]], side: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The notebook's result, without its claims: rows, table, share closed, what was kept.

    side: rows with the first token alone kept, which may be on fewer windows.
    """
    return {
        "rows": rows,
        "table": table(rows),
        "closed": closed_share(rows),
        "exempted": exempted(rows, lab.activations.sites, lab.seqlen),
        "first_token": first_token(rows, side or []),
        "paired": [
            paired(rows, ("RO", "none"), ("RH", "none")),
            paired(rows, ("RO", "none"), ("RO", "massive")),
            paired(rows, ("RO", "massive"), ("RH", "massive")),
        ],
    }


def first_token(rows: list[dict[str, Any]], side: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Perplexity of `side`, the first token alone kept, beside none and all massive ones of `rows`.

    All on the first windows, those that both were measured on, and with the same seed.
    """
    nll, out = {(r["rotation"], r["keep"], r["seed"]): r["nll"] for r in rows}, []
    for r in side:
        found = {k: nll[r["rotation"], k, r["seed"]] for k in ("none", "massive")}
        found = {"first": r["nll"]} | found
        n = min(map(len, found.values()))
        row = {"rotation": r["rotation"], "seed": r["seed"], "windows": n}
        out.append(row | {k: Perplexity(v[:n]).value for k, v in found.items()})
    return out


def closed_share(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """1 − (RO.kept − RH.kept)/(RO − RH) in perplexity: by seed, mean ± sd, and of the means."""
    ppl = {(r["rotation"], r["keep"], r["seed"]): float(r["ppl"]) for r in rows}
    seeds = sorted({r["seed"] for r in rows if r["rotation"] == "RO" and r["keep"] == "massive"})

    def share(get) -> float:
        gap = get("RO", "none") - get("RH", "none")
        return 1 - (get("RO", "massive") - get("RH", "massive")) / gap if gap else float("nan")

    per_seed = [share(lambda n, k, s=s: ppl[n, k, s]) for s in seeds]
    of_means = share(lambda n, k: sum(ppl[n, k, s] for s in seeds) / len(seeds))
    return {"by_seed": per_seed, "of_means": of_means} | spread(per_seed)


def exempted(
    rows: list[dict[str, Any]], sites: tuple[str, ...], seqlen: int
) -> list[dict[str, Any]]:
    """For each rotation, first seed: how many (token, site) pairs were kept, which tokens, where.

    share: of all (token, site) pairs; by_site in order of the sites; by_token: the ten most frequent.
    """
    out = []
    for r in rows:
        if r["keep"] != "massive" or r["seed"] != min(x["seed"] for x in rows):
            continue
        tokens, by_site, by_position = Counter(), Counter(), Counter()
        for _, position, text, where in r["kept"]:
            tokens[text] += len(where)
            by_position["first" if position == 0 else "later"] += len(where)
            by_site.update(where)
        total = sum(by_site.values())
        pairs = len(sites) * r["windows"] * seqlen
        out.append(
            {
                "rotation": r["rotation"],
                "pairs": total,
                "share": total / pairs,
                "tokens": len(r["kept"]),
                "token_share": len(r["kept"]) / (r["windows"] * seqlen),
                "by_site": [by_site[s] for s in sites],
                "by_position": dict(by_position),
                "by_token": tokens.most_common(10),
            }
        )
    return out


def claims(result: dict[str, Any]) -> list[Claim]:
    """The closing table of notebook 03; every rule compares means over seeds."""
    mean = {(r["rotation"], r["keep"]): r["mean"] for r in result["table"]}
    sd = {(r["rotation"], r["keep"]): r["sd"] for r in result["table"]}
    closed, gap = result["closed"], mean["RO", "none"] - mean["RH", "none"]
    pair = next(p for p in result["paired"] if (p["a"], p["b"]) == ("RO none", "RH none"))
    two, three = "LLaMA2-7B", "LLaMA3-8B"
    paper_gap = "; ".join(f"{m} {table1(m, 'RO')} → {table1(m, 'RH')}" for m in (two, three))
    paper_kept = "; ".join(
        f"{m} {table1(m, 'RO.FP16')} and {table1(m, 'RH.FP16')}" for m in (two, three)
    )
    out = [
        Claim(
            "Without rotation 4-bit activations fail",
            f"GPTQ without rotation: {table1(two, 'GPTQ')}, {table1(three, 'GPTQ')} (Table 1)",
            f"NR {mean['NR', 'none']:.0f} against FP {mean['FP', 'none']:.2f}",
            "NR at least 10 × FP",
            mean["NR", "none"] >= 10 * mean["FP", "none"],
        ),
        Claim(
            "RO is clearly worse than RH",
            f"{paper_gap} (Table 1, 4-4-16)",
            ", ".join(f"{n} {mean[n, 'none']:.2f} ± {sd[n, 'none']:.2f}" for n in ("RO", "RH"))
            + f"; Δnll {pair['mean']:.3f} [{pair['low']:.3f}, {pair['high']:.3f}]",
            "RO − RH above twice the larger sd, 95 % interval of Δnll over windows above 0",
            gap > 2 * max(sd["RO", "none"], sd["RH", "none"]) and pair["low"] > 0,
        ),
        Claim(
            "Keeping massive tokens closes the gap",
            f"kept: {paper_kept} (Table 1, 4-4-16)",
            f"{mean['RO', 'massive']:.2f}/{mean['RH', 'massive']:.2f}: {closed['of_means']:.0%} closed",
            "at least half of RO − RH closed (the paper: all of it)",
            gap > 0 and closed["of_means"] >= 0.5,
        ),
        Claim(
            "It closes all of the gap",
            "RO.FP16 = RH.FP16 within 0.02 (Table 1)",
            f"left: {mean['RO', 'massive'] - mean['RH', 'massive']:.2f}",
            "RO.kept − RH.kept at most 10 % of RO − RH",
            gap > 0 and mean["RO", "massive"] - mean["RH", "massive"] <= 0.1 * gap,
        ),
        *_composed(result["rows"]),
    ]
    out += _first_token(result["first_token"])
    exempt = {r["rotation"]: r for r in result["exempted"]}
    share = exempt["RO"]["share"]
    out.append(
        Claim(
            "Massive tokens are about one in a thousand",
            "about 0.1 % of tokens",
            f"{exempt['RO']['token_share']:.2%} of tokens at some site, {share:.3%} of (token, site) pairs",
            "0.03 % to 0.3 % of tokens are massive at some site",
            3e-4 <= exempt["RO"]["token_share"] <= 3e-3,
        )
    )
    return out


def _composed(rows: list[dict[str, Any]]) -> list[Claim]:
    """Whether two composed Hadamards behave like RO, on the seeds for which they were measured."""
    seeds = sorted({r["seed"] for r in rows if r["rotation"] == "RH2"})
    if not seeds:
        return []
    mean = {
        n: spread(
            [
                float(r["ppl"])
                for r in rows
                if (r["rotation"], r["keep"]) == (n, "none") and r["seed"] in seeds
            ]
        )["mean"]
        for n in ("RO", "RH", "RH2")
    }
    return [
        Claim(
            "Structure, not orthogonality, is the cause",
            "not tested; composed Hadamards should behave like RO",
            f"RH² {mean['RH2']:.2f}, RO {mean['RO']:.2f}, RH {mean['RH']:.2f} "
            f"(seed {', '.join(map(str, seeds))})",
            "RH² nearer to RO than to RH, same seeds",
            abs(mean["RH2"] - mean["RO"]) < abs(mean["RH2"] - mean["RH"]),
        )
    ]


def _first_token(rows: list[dict[str, Any]]) -> list[Claim]:
    """Whether the first token alone does it, on the seeds and windows where it was measured."""
    found = [r for r in rows if r["rotation"] == "RO"]
    if not found:
        return []
    none, first, kept = (
        sum(r[keep] for r in found) / len(found) for keep in ("none", "first", "massive")
    )
    return [
        Claim(
            "The first token alone does most of it",
            "not tested",
            f"RO, seed {', '.join(str(r['seed']) for r in found)}, "
            f"{found[0]['windows']} windows: {none:.2f}; "
            f"first token kept {first:.2f}, massive tokens kept {kept:.2f}",
            "at least half of what keeping massive tokens gains",
            none > kept and none - first >= 0.5 * (none - kept),
        )
    ]
