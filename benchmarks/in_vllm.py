"""Perplexity of a checkpoint by vLLM itself: `PYTHON in_vllm.py FOLDER TOKENS OUT`, in vLLM's environment.

TOKENS: a JSON list of windows of token ids. OUT gets {"vllm": version, "nll": mean of every window in nats}.
No other part of the project is imported: vLLM pins versions of transformers and compressed-tensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: str, tokens: str, out: str) -> None:
    """Write to `out` what vLLM finds."""
    import vllm
    from vllm import LLM, SamplingParams

    windows = json.loads(Path(tokens).read_text())
    seqlen = max(map(len, windows))
    model = LLM(
        folder, dtype="float32", max_model_len=seqlen + 1, max_num_seqs=1, enforce_eager=True, seed=0,
        enable_prefix_caching=False, gpu_memory_utilization=0.4, max_num_batched_tokens=max(seqlen + 1, 2048),
    )  # fmt: skip
    ask = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    nll = []
    for window in windows:
        [found] = model.generate({"prompt_token_ids": window}, ask, use_tqdm=False)
        # position 0 has no log-probability; each other one that of the token that stands there
        values = [p[t].logprob for p, t in zip(found.prompt_logprobs[1:], window[1:], strict=True)]
        nll.append(-sum(values) / len(values))
    Path(out).write_text(json.dumps({"vllm": vllm.__version__, "nll": nll}))


if __name__ == "__main__":
    main(*sys.argv[1:])
