"""Hub: transformers without its chatter, and one plain line for what goes wrong when a model is fetched."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from safetensors import SafetensorError

from dfrot_lab.architectures import ModelError

__all__ = ["plain_errors", "quiet_transformers"]


def quiet_transformers():
    """transformers, without its own progress bars and their complaint that notebooks lack widgets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tqdm.auto  # noqa: F401  (complains once, when first imported)
        import transformers
    transformers.utils.logging.disable_progress_bar()
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # a hub out of reach is told once, not at each retry
    return transformers


class plain_errors:
    """Turn the hub's many exceptions into one ModelError line; never shows a token."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        failures = (OSError, ValueError, SafetensorError)
        if not isinstance(error, failures) or isinstance(error, ModelError):
            return
        text = re.sub(r"hf_\w+", "hf_…", " ".join(str(error).split()))
        if Path(self.model_id).exists() or self.model_id == "demo":
            why = f"{text[:300]}; check that its files are whole"
        elif re.search(r"gated repo|\b40[13] client", text.lower()):
            why = "it is gated: accept its licence on the hub and log in with `hf auth login`"
        elif "connect" in text.lower() or "offline" in text.lower():
            why = "the hub cannot be reached and it is not in the local cache; `demo` works offline"
        else:
            why = text[:300]
        raise ModelError(f"model {self.model_id!r} could not be loaded: {why}") from error
