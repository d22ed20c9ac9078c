"""`dpo-loop export`, `card` and `serve-report`: what leaves a run. Only click is imported here; each command imports what it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.options import json_flag, run_argument

if TYPE_CHECKING:
    from dpo_loop.layout import RunDir

_licence_option = click.option(
    "--licence", metavar="ID", help="Of the base, where its own card does not say: apache-2.0, llama3.1, …"
)


@click.command()
@run_argument
@click.option("--what", required=True, type=click.Choice(["adapter", "merged", "pairs"]))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A directory that is empty or does not exist.")
@click.option(
    "--round", "round_number", type=click.IntRange(min=0), help="Default: the current policy; the pairs of all promoted rounds."
)
@click.option("--format", "pair_format", type=click.Choice(["trl", "axolotl", "parquet"]), help="Of pairs; default trl.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="How a merged model is stored; default float32.")
@_licence_option
@click.option("--force", is_flag=True, help="Export although it was not blessed; kept with the export, in its card and in the run.")
@click.option("--reviewer", help="With --force: your name.")
@click.option("--reason", help="With --force: why.")
@json_flag
def export(
    run: RunDir,
    what: Any,
    out: Path,
    round_number: int | None,
    pair_format: Any,
    dtype: Any,
    licence: str | None,
    force: bool,
    reviewer: str | None,
    reason: str | None,
    as_json: bool,
) -> None:
    """Ship what was blessed: the adapter, the merged model or the preference pairs of RUN, with a model card and the base's licence."""
    for name, given, wanted in (("--format", pair_format, "pairs"), ("--dtype", dtype, "merged")):
        if given is not None and what != wanted:
            raise click.UsageError(f"{name} is for --what {wanted}")
    if not force and (reviewer or reason):
        raise click.UsageError("--reviewer and --reason are for --force")
    from flows.exporting import export as make
    from flows.shipments import force_of

    forced = force_of(reviewer, reason) if force else None
    made = make(
        run,
        out,
        what=what,
        round_number=round_number,
        pair_format=pair_format or "trl",
        dtype=dtype or "float32",
        licence=licence,
        force=forced,
    )
    if as_json:
        click.echo(json.dumps({"out": str(out.absolute()), **made.model_dump(mode="json")}))
        return
    rounds = ", ".join(map(str, made.rounds))
    click.echo(f"{what} of round {rounds} at {out}: {len(made.files)} files, licence {made.licence}")
    for name, value in made.figures.items():
        click.echo(
            f"  {name.replace('_', ' ')}: {value:.3g}" if isinstance(value, float) else f"  {name.replace('_', ' ')}: {value}"
        )
    if made.forced is not None:
        click.echo("warning: it was not blessed; the card, export.json and the run say who forced it and why", err=True)


@click.command()
@run_argument
@click.argument("round_number", metavar="ROUND", type=click.IntRange(min=0))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write it here rather than print it.")
@_licence_option
def card(run: RunDir, round_number: int, out: Path | None, licence: str | None) -> None:
    """The model card of a ROUND: lineage, training, what the safety gate said, limits."""
    from dpo_loop.errors import InputError
    from dpo_loop.files import write_text
    from flows.card import card_of

    text = card_of(run, round_number, licence=licence)
    if out is None:
        click.echo(text, nl=False)
        return
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out: {out.absolute().parent} does not exist; make it first")
    if out.resolve().is_relative_to(run.path.resolve()):
        raise InputError(f"--out: {out} is inside the run, whose files stay as they were made; give a place outside {run.path}")
    write_text(out, text)


@click.command(name="serve-report")
@run_argument
@click.option("--port", type=click.IntRange(0, 65_535), default=0, help="0: any that is free.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="An address of this machine; others can read what is not loopback. Browsers must ask for this name or its address in numbers.",
)
@json_flag
def serve_report(run: RunDir, port: int, host: str, as_json: bool) -> None:
    """Serve the reports of RUN to a browser, read-only, and nothing else of it. Ends on Ctrl-C. /latest is the newest report."""
    from flows.serve import is_loopback, serve

    if not is_loopback(host):
        click.echo(f"warning: whoever reaches {host} can read these reports; nobody is asked for a password", err=True)
    serve(run, host, port, lambda url: click.echo(json.dumps({"url": url}) if as_json else f"{url}  (Ctrl-C ends it)"))
