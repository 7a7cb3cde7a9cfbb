"""Zero-shot: lm-eval's own harness on a model in place, and what it gives item by item.

The quantized model stays a transformers PreTrainedModel, so lm-eval runs it as it runs any other. Values of
every item are kept: two quantizers differ by less than the standard error of 500 items, but their
paired differences, and the log-probability of the target, show more.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import statistics
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from dfrot_lab import corpora, files
from dfrot_lab.lab import Lab
from dfrot_lab.models import ModelError
from dfrot_lab.refinements import parse_rotation
from dfrot_lab.text_tasks import TaskError

__all__ = ["OFFLINE", "STOCK", "TaskError", "check", "evaluate", "fetch", "measure", "with_means"]

# task → the metric that is reported: acc_norm where the task has it, as in the paper
OFFLINE = {"last_word": "acc", "continuation": "acc_norm"}
STOCK = {
    "piqa": "acc_norm",
    "winogrande": "acc",
    "hellaswag": "acc_norm",
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "lambada_openai": "acc",
    "mmlu": "acc",
}
FOLDER = Path(__file__).parent / "data" / "tasks"
_CODE = ("dfrot_lab.text_tasks", "dfrot_lab.zero_shot")


def check(tasks: list[str]) -> None:
    """TaskError for an unknown task, for none, and where lm-eval is not installed."""
    if not tasks:
        raise TaskError(f"no task given: use some of {', '.join(OFFLINE | STOCK)}")
    for task in tasks:
        if task not in OFFLINE | STOCK:
            raise TaskError(f"task {task!r} is unknown: use one of {', '.join(OFFLINE | STOCK)}")
    _version()


def _version() -> str:
    try:
        return version("lm-eval")
    except PackageNotFoundError:
        raise TaskError("lm-eval is not installed: run `pip install lm-eval`") from None


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    task: str,
    *,
    corpus: str = "demo",
    items: int = 500,
    batch: int = 16,
) -> dict[str, Any]:
    """`task` on `model`, zero-shot: the metric, accuracy and log-probability of the target, by item.

    {task, metric, correct [items] of 0 and 1, logp [items] in nats a target, tokens, hash, version,
    lm_eval}: tokens that went through the model, and lm-eval's hash over items, prompts and targets.
    corpus, items: of our own tasks; the hub's are run whole. Ours have no special tokens, as perplexity
    here; the hub's have those that the tokenizer adds, as in the paper. Raises TaskError for a task that
    is unknown, too large for the corpus, or out of reach, and for a model without a tokenizer.
    """
    check([task])
    if tokenizer is None or not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise TaskError("the model has no tokenizer: put its files beside the weights")
    with _quiet():
        from lm_eval.evaluator import evaluate as run
        from lm_eval.models.huggingface import HFLM

        loaded = _load(task, corpus, items)
        for one in loaded["tasks"].values():
            if one.get_config("num_fewshot") is None:
                one.set_config("num_fewshot", 0)
        harness = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # lm-eval gives it a padding token
            batch_size=batch,
            add_bos_token=False if task in OFFLINE else None,
        )
        # not simple_evaluate: that would also collect what machine this is
        found = run(lm=harness, task_dict=loaded, bootstrap_iters=0, log_samples=True)
        metric = (OFFLINE | STOCK)[task]
        out: dict[str, Any] = {"task": task, "metric": metric, "correct": [], "logp": []}
        names = sorted(loaded["tasks"])
        out["tokens"], versions = 0, {str(found["versions"][n]) for n in names}
        for name in names:
            for sample in sorted(found["samples"][name], key=lambda s: s["doc_id"]):
                responses = [response[0] for response in sample["filtered_resps"]]
                if not isinstance(sample["filtered_resps"][0], list | tuple):
                    raise TaskError(f"task {name!r} is not scored by log-probabilities")
                out["logp"].append(float(responses[_gold(loaded["tasks"][name], sample["doc"])]))
                out["correct"].append(int(sample[metric]))
                out["tokens"] += sum(
                    len(harness.tok_encode(context + target))
                    for context, target, *_ in sample["arguments"]
                )
        out["hash"] = _hash([found["samples"][name] for name in names])
    return out | {"version": ", ".join(sorted(versions)), "lm_eval": _version()}


def _gold(task: Any, doc: dict[str, Any]) -> int:
    """Which of the item's requests holds the target."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return gold if isinstance(gold, int) else task.doc_to_choice(doc).index(gold)


def _hash(samples: list[list[dict[str, Any]]]) -> str:
    """As lm-eval's tracker: over the hashes of items, prompts and targets."""
    from lm_eval.utils import hash_string

    return hash_string(
        "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for t in samples for s in t)
    )


def fetch(task: str) -> None:
    """The items of a task of the hub are in the local cache afterwards; TaskError where they cannot be."""
    check([task])
    _load(task, "", 0)


def _load(task: str, corpus: str, items: int) -> dict[str, Any]:
    """lm-eval's task objects: ours from the YAML beside this module, the others from lm-eval's own."""
    from lm_eval.tasks import TaskManager

    if task in OFFLINE:
        about = {"corpus": corpus, "items": items}
        ours = TaskManager(include_defaults=False, include_path=str(FOLDER), metadata=about)
        return ours.load([task])
    why = corpora._why_offline()
    try:
        with corpora._offline() if why else contextlib.nullcontext():
            return TaskManager().load([task])
    except Exception as error:  # datasets raises many kinds; each means "no items"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        state = f"{why} and it is not in the local cache" if why else "loading it failed"
        raise TaskError(
            f"task {task!r}: {state} ({reason}): connect and try again, or use "
            f"{' and '.join(OFFLINE)}, which work offline"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns of what is meant here: a model that is given, a task with its own items."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def measure(
    lab: Lab,
    name: str,
    seed: int = 0,
    *,
    task: str,
    bits: str = "4-4-16",
    method: str = "rtn",
    gamma: float = 100.0,
    items: int = 500,
    batch: int = 16,
) -> dict[str, Any]:
    """One row: rotation, seed, bits, gamma, method and what `evaluate` gives, with means of both.

    name, method: as in `Lab.perplexity`, "FP" for the model as loaded. Kept in `folder`/measurements
    by all of that, the code, lm-eval's version and the task's YAML.
    """
    check([task])
    if name != "FP" and not name.endswith(".safetensors"):
        parse_rotation(name)
    spec = lab.spec("16-16-16" if name == "FP" else bits, "none", method)
    row = {"rotation": name, "seed": seed, "bits": "16-16-16" if name == "FP" else bits}
    row |= {"gamma": str(float(gamma)) if name.startswith("DFRot(") else None}
    row |= {"method": method if spec.weights else None}
    options = row | lab.rests_on(name, spec, method)
    options |= {"task": task, "items": items if task in OFFLINE else None, "batch": batch}
    options |= {"lm_eval": _version()}
    if task in OFFLINE:
        options["yaml"] = files.sha256(FOLDER / f"{task}.yaml")

    def found() -> dict[str, Any]:
        how = {"bits": bits, "method": method, "gamma": gamma}
        model = lab.lm if name == "FP" else lab.quantized(name, seed, **how)
        return row | evaluate(
            model, _tokenizer(lab), task, corpus=lab.corpus, items=items, batch=batch
        )

    return with_means(lab.kept("zero-shot", options, found, _CODE))


def with_means(found: dict[str, Any]) -> dict[str, Any]:
    """What `evaluate` gives, or its JSON, with the means over items: accuracy, target_logp, items."""
    # a model whose activations overflow gives NaN, which JSON holds as a string
    logp = [float(v) for v in found["logp"]]
    return found | {
        "logp": logp,
        "accuracy": statistics.fmean(found["correct"]),
        "target_logp": statistics.fmean(logp),
        "items": len(logp),
    }


def _tokenizer(lab: Lab) -> Any:
    try:
        return lab.tokenizer
    except ModelError as error:
        raise TaskError(
            f"model {lab.model!r} has no tokenizer that can be read ({error})"
        ) from error
