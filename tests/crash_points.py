"""Kill a process at every file-system operation of `materialize`, for real: `python -m tests.crash_points DIR` prints one JSON line.

An audit hook sees each open, mkdir, rename and remove below DIR; the n-th ends the process with `os._exit`, for n = 1, 2, … until one
run survives. After each death the parent checks that nothing is published, or all of it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from dpo_loop.artifacts import Stage, materialize, read_manifest, scratch, verify
from dpo_loop.journal import Journal
from dpo_loop.types import StageOutcome

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def write_three_files(out: Path, *, text: str) -> StageOutcome:
    with Journal(scratch(out) / "items.jsonl") as journal:
        done = {row["name"] for row in journal.rows}
        for name in ("a.txt", "b.txt", "deep/c.txt"):
            path = out / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text + name)
            if name not in done:
                journal.append([{"name": name}])
    return StageOutcome(metrics={"seen": len(done)})


STAGE = Stage("three", 1, write_three_files)


def die_at(point: int, root: Path) -> None:
    count = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal count
        if event in EVENTS and str(root) in str(args[0]):
            count += 1
            if count == point:
                os._exit(99)

    sys.addaudithook(hook)


def main() -> None:
    root = Path(sys.argv[1]).resolve()
    point, partial, published_before_end = 0, 0, 0
    while True:
        point += 1
        child = os.fork()
        if child == 0:
            die_at(point, root)
            materialize(STAGE, root / f"run{point}" / "three", wait_s=0, text="hello ")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        out = root / f"run{point}" / "three"
        manifest = read_manifest(out)
        if manifest is None:
            partial += out.exists()
        else:
            verify(out, manifest)
            published_before_end += os.waitstatus_to_exitcode(status) != 0
        again = materialize(STAGE, out, wait_s=0, text="hello ")
        whole = sorted(again.files) == ["a.txt", "b.txt", "deep/c.txt"]
        clean = not any((out.parent / name).exists() for name in (".three.work", ".three.scratch"))
        if not whole or not clean:
            raise SystemExit(f"point {point}: whole={whole} clean={clean}")
        if os.waitstatus_to_exitcode(status) == 0:
            break
    print(json.dumps({"points": point - 1, "partial": partial, "published_before_end": published_before_end}))


if __name__ == "__main__":
    main()
