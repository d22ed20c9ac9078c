"""What tells a local judge's weights from all others, so that a retrained one is not answered from the ledger."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def weights_identity(weights: str, revision: str | None = None) -> dict[str, Any]:
    """Of a directory its files; of a hub id its whole name and the revision (best the commit that was loaded, whatever branch was asked for)."""
    path = Path(weights)
    if not path.is_dir():
        return {"weights": weights, "revision": revision}
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file():
            digest.update(file.name.encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return {"weights": path.name, "files_sha256": digest.hexdigest()}
