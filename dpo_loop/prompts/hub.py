"""Rows of a data set, at the revision that was asked for or not at all.

Where the hub cannot be reached, `datasets` takes the newest copy in its cache, whatever its revision, and says so in its log only. For a pinned
revision that is another data set, so the commit that was loaded is compared with the one that was pinned.
"""

from __future__ import annotations

import re
from typing import Any

from dpo_loop.errors import InputError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 20.0


def load_rows(path: str, *, name: str | None, split: str, revision: str | None, data_files: str | None = None) -> Any:
    """A `datasets.Dataset`. Raises InputError that says why there is none and what can be done."""
    from datasets import load_dataset_builder

    failed = f"data set {path!r} (name {name}, split {split}{f', revision {revision}' if revision else ''}) cannot be loaded"
    pinned = revision if revision and _COMMIT.fullmatch(revision) else None
    # With the prefix, a directory here that happens to have the name is not taken for the set.
    place = f"hf://datasets/{path}" if pinned else path
    try:
        builder = load_dataset_builder(place, name, revision=revision, data_files=data_files)
        if pinned in (None, builder.hash):
            builder.download_and_prepare()
            return builder.as_dataset(split=split)
    except Exception as error:
        # The library raises its own, the hub's, pandas' and arrow's errors; all mean that these prompts cannot be had.
        told = f"{' '.join(str(error).split())}. Check the network, name another set or split (in a new run)"
        cause = (pinned and _cause(path, pinned)) or told
        raise InputError(f"{failed}: {cause}, or give a JSON lines file (`kind: jsonl`; in a new run).") from error
    raise InputError(
        f"{failed}: the hub cannot be reached, and the cache here holds revision {builder.hash} instead. Try again with a network, or bring the "
        "cache (HF_HOME) of a machine that has loaded the right one."
    )


def missing_columns(rows: Any, wanted: list[str]) -> list[str]:
    return [column for column in wanted if column not in rows.column_names]


def _cause(path: str, revision: str) -> str | None:
    """What the hub says to a plain question, for the library's own errors lose their cause on the way; None if it sees nothing wrong."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"https://huggingface.co/datasets/{path}"
    try:
        HfApi().dataset_info(path, revision=revision, timeout=_TIMEOUT_S)
        HfApi().auth_check(path, repo_type="dataset")
    except GatedRepoError:
        return f"it is gated. Accept its terms at {page} and export a token of the account that did as HF_TOKEN"
    except RevisionNotFoundError:
        return f"the hub knows no such revision. Take a commit of {page}/commits/main (in a new run)"
    except RepositoryNotFoundError:
        return "the hub has no such data set, or none that the token in HF_TOKEN may see. Check the token, mend the name (in a new run)"
    except HFValidationError:
        return None
    except Exception as unreachable:
        return f"the hub cannot be reached: {' '.join(str(unreachable).split())}. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    return None
