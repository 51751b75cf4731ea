"""Models by their id on the Hugging Face hub: fetched into its cache, or taken from there when offline."""

from __future__ import annotations

import re
from pathlib import Path

from runtime.errors import BackendError, FormatError, OptionError, first_line

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([^@\s]+))?")
"""owner/name, or owner/name@revision: a branch, a tag or a commit."""

FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
WEIGHTS = ["*.safetensors"]
LEGACY_WEIGHTS = ["pytorch_model*.bin"]
NOT_NEEDED = ["*/*", "consolidated*", "training_args*", "optimizer*"]
"""Folders hold other formats; `consolidated` files the same weights once more."""


def described_by(folder: Path) -> list[Path]:
    """All that a model's folder holds but weights: config, tokenizer, templates."""
    return sorted({path for pattern in FILES for path in folder.glob(pattern)})


def split_id(model: str) -> tuple[str, str | None] | None:
    """Repository and revision of what is shaped like an id on the hub; None for what is not."""
    match = HUB_ID.fullmatch(model)
    return (match[1], match[2]) if match and ".." not in match[1] else None


def fetch(model: str) -> Path:
    """The folder of a model, owner/name[@revision], in the hub's cache, its files fetched where they lack.

    Weights are safetensors; where a model has none, pytorch_model.bin. Without a network, what the cache
    holds of that revision is taken.

    Raises FormatError for a model or revision that is not there, is gated, or cannot be fetched;
    BackendError without the package huggingface_hub; OptionError for what is no id.
    """
    known = split_id(model)
    if known is None:
        raise OptionError(f"{model}: no id of a model on the hub; wanted owner/name or owner/name@revision")
    repository, revision = known
    folder = _snapshot(model, repository, revision, WEIGHTS)
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(model, repository, revision, LEGACY_WEIGHTS)
    return folder


def _snapshot(model: str, repository: str, revision: str | None, weights: list[str]) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise BackendError(
            "models of the hub need the package huggingface_hub; run: pip install 'dbf2gguf[convert]'"
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=FILES + weights, ignore_patterns=NOT_NEEDED
            )
        )
    except errors.GatedRepoError:
        reason = (
            f"gated: accept its terms at https://huggingface.co/{repository}, then run `hf auth login` or "
            "set HF_TOKEN"
        )
    except errors.RepositoryNotFoundError:
        reason = (
            "neither a folder or file here nor a model on the hub, or a private one: check the name; for a "
            "private one run `hf auth login` or set HF_TOKEN"
        )
    except errors.RevisionNotFoundError:
        reason = f"the model has no revision {revision!r}; wanted a branch, a tag or a commit"
    except errors.LocalEntryNotFoundError:
        reason = (
            "neither a folder or file here nor whole in the hub's cache, and the hub cannot be reached; go "
            "online (and unset HF_HUB_OFFLINE), or name a folder"
        )
    except errors.HFValidationError as error:
        reason = f"no id of a model on the hub: {first_line(error)}"
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        denied = "; run `hf auth login` or set HF_TOKEN" if status in (401, 403) else ""
        reason = f"the hub refuses it: {first_line(error)}{denied}"
    except Exception as error:  # of the network's libraries, of the disk of the cache
        reason = f"cannot be fetched from the hub: {first_line(error)}"
    raise FormatError(f"{model}: {reason}") from None
