"""Hub: the commit of a model there, transformers without its chatter, and one plain line for what fails."""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError

from dfrot_lab.architectures import ModelError

__all__ = ["commit", "on_hub", "plain_errors", "quiet_transformers", "snapshot"]


def commit(model_id: str, revision: str | None = None) -> str | None:
    """The commit that `revision` of `model_id` on the hub is; None for others. Errors as `models.load`."""
    return snapshot(model_id, revision).name if on_hub(model_id) else None


@lru_cache  # one process, one commit; and the hub is asked once
def snapshot(model_id: str, revision: str | None = None) -> Path:
    """The folder of the hub's local cache for a commit of `model_id`, config.json there.

    With the hub out of reach: the commit that was fetched last. Errors as `models.load`.
    """
    transformers = quiet_transformers()
    with plain_errors(model_id):
        file = transformers.utils.cached_file(model_id, "config.json", revision=revision)
        return Path(file).parent


def on_hub(model_id: str) -> bool:
    """Whether `model_id` has the form of an id on the hub, owner/name, and is no local path."""
    path = Path(model_id)
    local = path.suffix == ".gguf" or path.is_dir() or path.is_absolute()
    return not local and not model_id.startswith((".", "tiny:")) and model_id.count("/") == 1


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
