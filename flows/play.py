"""Play a run from the command line: find out what is left to do, start Prefect only for that, show progress, end with the table."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpo_loop.layout import RunDir
from flows.config import RunConfig
from flows.progress import Event, Watcher, watching
from flows.rounds import adopt_config, exit_code, lease, round_exit_code, stop_reason, verify_rounds
from flows.show import print_run, run_json
from flows.summary import summaries, write_index_page

if TYPE_CHECKING:
    from rich.console import Console
    from rich.spinner import Spinner
    from rich.text import Text

PLAIN_WIDTH = 160


def play(config: RunConfig, *, one_round: bool, as_json: bool) -> int:
    """Returns the exit code. Raises ConfigError, BusyError, StaleArtifactError, CorruptArtifactError and whatever a stage raises."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    run = RunDir(Path(config.run_dir))
    started = time.monotonic()
    with lease(run):
        adopt_config(run, config)
        num_files = verify_rounds(run, [here.number for here in run.rounds()])
        if one_round or (stop := stop_reason(run, config)) is None:
            _play_with_prefect(run, config, one_round, console)
            if not one_round and (stop := stop_reason(run, config)) is not None and stop.wants_change:
                console.print(f"stopped: {stop}", highlight=False, soft_wrap=True)
        else:
            console.print(f"nothing left to play: {stop}; {num_files} files match their hashes", highlight=False, soft_wrap=True)
    mend_index_page(run, config)
    print_run(console, run)
    console.print(f"{time.monotonic() - started:.0f} s", highlight=False)
    if as_json:
        click.echo(run_json(run))
    return round_exit_code(run, summaries(run)[-1]) if one_round else exit_code(run, config)


def mend_index_page(run: RunDir, config: RunConfig) -> None:
    """Write index.html where a crash came between a round's end and it."""
    ended = [here.manifest.stat().st_mtime for here in run.rounds() if here.manifest.is_file()]
    if ended and (not run.index_page.is_file() or run.index_page.stat().st_mtime < max(ended)):
        write_index_page(run, config)


def _play_with_prefect(run: RunDir, config: RunConfig, one_round: bool, console: Console) -> None:
    from flows.server import prefect_api

    console.print(f"run {config.run_id} in {run.path}: starting Prefect", highlight=False, soft_wrap=True)
    with prefect_api(run), _progress(console) as watcher, watching(watcher):
        from flows.loop import play_next_round, run_loop

        (play_next_round if one_round else run_loop)(config)


@contextmanager
def _progress(console: Console) -> Iterator[Watcher]:
    """Lines on anything; on a terminal also a last line that lives: round, stage, what it said last, elapsed time."""
    if not console.is_terminal:
        yield lambda event: _print_event(console, event)
        return
    from rich.live import Live
    from rich.spinner import Spinner

    with Live(console=console, refresh_per_second=4, transient=True) as live:
        now = _Now()

        def watcher(event: Event) -> None:
            if event.kind != "line":
                _print_event(console, event)
            now.take(event)
            live.update(now.spinner if now.stage else "")

        now.spinner = Spinner("dots", text=now)
        yield watcher


class _Now:
    """The living line. Rendered again at every refresh, so the elapsed time runs while the stage is silent."""

    spinner: Spinner

    def __init__(self) -> None:
        self.stage, self.line, self.started = "", "", time.monotonic()

    def take(self, event: Event) -> None:
        match event.kind:
            case "began":
                self.stage, self.line, self.started = f"round {event.round} {event.stage}", "", time.monotonic()
            case "line":
                self.stage, self.line = f"round {event.round} {event.stage}", event.text.partition(": ")[2]
            case "ended" | "found":
                self.stage = ""

    def __rich__(self) -> Text:
        from rich.text import Text

        elapsed = f" {time.monotonic() - self.started:4.0f} s "
        return Text.assemble((self.stage, "bold"), (elapsed, "dim"), self.line, no_wrap=True, overflow="ellipsis")


def _print_event(console: Console, event: Event) -> None:
    from rich.markup import escape

    match event.kind:
        case "found":
            text = f"{event.stage}: done before"
        case "began" if console.is_terminal:
            return
        case "began":
            text = f"{event.stage}: begins"
        case "line":
            text = escape(event.text)
        case "ended" if event.text:
            text = f"[red]{event.stage}: failed after {event.seconds:.1f} s[/] {escape(event.text)}"
        case "ended":
            text = f"[green]{event.stage}: done[/] in {event.seconds:.1f} s"
    console.print(f"[bold]r{event.round:03d}[/] {text}", highlight=False, soft_wrap=True)
