"""What trust costs: judging with ledger, budget and limiter, in calls a second. `python -m tests.benchmarks.judge_throughput [--json]`

    latency-bound   the server takes 500 ms, 200 calls at once: calls/s of the 400 that are possible                        at least 0.90
    CPU-bound       the server takes 50 ms, 64 at once: calls/s of what a bare AsyncOpenAI loop reaches with the same body,
                    server and concurrency; rounds of both in alternation, medians                                          at least 0.75
    storm           the server lets 100 calls/s in and answers 429 to the rest, 64 at once: verdicts/s of those 100,
                    the wait for the last one included; none lost, none paid twice                                          above 0.70
    memory          peak of a process that judges 20 000 comparisons (40 000 calls)                                         under 400 MB

The real path from `open_jury` to the vendor's SDK, over loopback to a server in another process; every call has a price and is
reserved. A comparison is two answers in both orders: two paid calls, and one look at the ledger for what the knockout has asked already.
Clocks start when the jury is open. Three minutes; `--quick`: about one, with figures that are worth less.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from dpo_loop.types import Message, Prompt, content_id
from judges.accounts import Accounts, BudgetConfig
from judges.asker import Candidate
from judges.backend import JudgeRequest
from judges.config import OpenAICompatibleJudge
from judges.figures import Figures, spaced
from judges.jury import open_jury
from judges.ledger import Ledger
from judges.openai_dialects import ChatDialect
from judges.stage import judge_prompts
from tests.benchmarks.judge_server import REPOSITORY, Server, served

KEY_ENV = "DPO_LOOP_BENCHMARK_JUDGE_KEY"
PRICED_MODEL = "gpt-4.1-mini"
CAP_USD = 10_000.0
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass(frozen=True)
class Size:
    """Comparisons of each part. The latency-bound part and the storm end with a wait for the last few, which long runs dilute."""

    latency: int = 4_000
    cpu_round: int = 600
    cpu_rounds: int = 7
    storm: int = 1_500
    memory: int = 20_000


QUICK = Size(latency=1_000, cpu_round=300, cpu_rounds=3, storm=500, memory=3_000)


@dataclass(frozen=True)
class Storm:
    goodput: float
    refused: int


@dataclass(frozen=True)
class Memory:
    """MB. early: when a quarter was judged."""

    early: float
    late: float
    peak: float
    calls_per_s: float


# ------------------------------------------------------------------------------------------------------------------ material


_WORDS = (
    "air",
    "light",
    "blue",
    "wave",
    "short",
    "long",
    "path",
    "dust",
    "noon",
    "dusk",
    "eye",
    "sun",
    "cloud",
    "water",
    "bend",
    "colour",
    "often",
)
_served = itertools.count()


def comparisons(num: int) -> tuple[list[Prompt], dict[str, list[Candidate]]]:
    """Of the size of a chat turn. No two are equal in one process: every round's calls are new to the server."""
    rng = random.Random(next(_served))

    def text(num_words: int) -> str:
        return " ".join(rng.choices(_WORDS, k=num_words))

    prompts = [Prompt.build((Message(role="user", content=f"{n}. Is it so? {text(40)}"),), source="b", tags={}) for n in range(num)]
    answers = {p.id: [Candidate(content_id(p.id, words), text(words)) for words in (120, 100)] for p in prompts}
    return prompts, answers


def judge_at(server: Server, *, concurrency: int, start: int) -> OpenAICompatibleJudge:
    return OpenAICompatibleJudge(
        kind="openai_compatible",
        model=PRICED_MODEL,
        base_url=server.base_url,
        api_key_env=KEY_ENV,
        concurrency=concurrency,
        start_concurrency=start,
    )


# -------------------------------------------------------------------------------------------------------------------- racers


async def judged(
    server: Server, num: int, *, concurrency: int, start: int | None = None, memory: list[float] | None = None
) -> float:
    """Calls a second of `num` comparisons, judged in a new ledger. Exits if a call was lost or paid twice.

    memory: gets the process's MB whenever another quarter is judged.
    """
    prompts, candidates = comparisons(num)
    already, _ = server.figures()
    figures = Figures()
    with tempfile.TemporaryDirectory() as scratch:
        accounts = Accounts(Path(scratch) / "ledger.sqlite", BudgetConfig(usd_per_run=CAP_USD))
        async with open_jury(judge_at(server, concurrency=concurrency, start=start or concurrency), accounts) as jury:

            async def watch(into: list[float]) -> None:
                for quarter in (1, 2, 3):
                    while jury.num_asked < 2 * num * quarter / 4:
                        await asyncio.sleep(0.05)
                    into.append(_status_mb("VmRSS"))

            watcher = None if memory is None else asyncio.create_task(watch(memory))
            started = time.monotonic()
            with redirect_stdout(sys.stderr):
                await judge_prompts(jury, prompts, candidates, figures.add, seed=1)
            took_s = time.monotonic() - started
            if watcher is not None and memory is not None:
                await watcher
                memory.append(_status_mb("VmRSS"))
        with Ledger(accounts.ledger) as ledger:
            done = ledger.counts().get("done", 0)
    billed = {key: times for key, times in server.figures()[0].items() if key and key not in already}
    undecided = figures.tally().parts["undecided"] + figures.tally().parts["nothing_to_compare"]
    if undecided or done != 2 * num or len(billed) != 2 * num or set(billed.values()) != {1}:
        twice = sum(times > 1 for times in billed.values())
        sys.exit(
            f"no figures: of {2 * num} calls {done} are done, {len(billed)} billed, {twice} more than once; {undecided} undecided"
        )
    return 2 * num / took_s


async def bare(server: Server, num_calls: int, *, concurrency: int) -> float:
    """Calls a second of the least that asks the same of the same server: the vendor's SDK in a loop."""
    prompts, candidates = comparisons(1)
    left, right = (answer.text for answer in candidates[prompts[0].id])
    dialect = ChatDialect(judge_at(server, concurrency=concurrency, start=concurrency))
    body = dialect.body(JudgeRequest(key="0" * 64, prompt=prompts[0], left=left, right=right), 1_024)
    await dialect.aclose()
    async with AsyncOpenAI(api_key=dialect.key, base_url=server.base_url, max_retries=0, timeout=60) as client:
        turns = iter(range(num_calls))

        async def worker() -> None:
            for _ in turns:
                reply = await client.chat.completions.create(**body)
                assert reply.choices[0].message.content

        started = time.monotonic()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return num_calls / (time.monotonic() - started)


# --------------------------------------------------------------------------------------------------------------------- parts


def latency_bound(num: int) -> float:
    """Calls a second."""
    with served(delay_ms=500) as server:
        return asyncio.run(judged(server, num, concurrency=200))


def cpu_bound(num: int, rounds: int) -> list[tuple[float, float]]:
    """Per round, calls a second of ours and of the bare loop."""
    with served(delay_ms=50) as server:

        def play(num: int) -> tuple[float, float]:
            without = asyncio.run(bare(server, 2 * num, concurrency=64))
            return asyncio.run(judged(server, num, concurrency=64)), without

        play(50)  # imports, and the first use of everything
        return [play(num) for _ in range(rounds)]


def storm(num: int, *, rate: float = 100) -> Storm:
    """From the judge's usual start, so that it runs into the limit at full growth."""
    with served(delay_ms=100, rate=rate, burst=rate / 10) as server:
        goodput = asyncio.run(judged(server, num, concurrency=64, start=8))
        return Storm(goodput / rate, server.figures()[1])


def memory(num: int) -> Memory:
    """In a process that has done nothing else."""
    with served(delay_ms=20) as server:
        command = [sys.executable, "-m", "tests.benchmarks.judge_throughput", "--memory-of", str(num), "--at", server.origin]
        child = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
    return Memory(**json.loads(child.stdout.splitlines()[-1]))


def memory_here(num: int, server: Server) -> dict[str, float]:
    seen: list[float] = []
    calls_per_s = asyncio.run(judged(server, num, concurrency=64, memory=seen))
    return {"early": seen[0], "late": seen[-1], "peak": _status_mb("VmHWM"), "calls_per_s": calls_per_s}


def _status_mb(name: str) -> float:
    """Of this process. Not getrusage: its peak is the parent's, if that was higher when the process was made."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1_024


# --------------------------------------------------------------------------------------------------------------------- table


def table(rows: Sequence[tuple[str, float, str, bool, str]]) -> Table:
    made = Table("part", "figure", "target", "met", "more", title="judge throughput")
    for part, figure, target, is_met, more in rows:
        made.add_row(part, f"{figure:.3g}", target, "yes" if is_met else "NO", more)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--at", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ[KEY_ENV] = "sk-benchmark-0123456789"
    for name in _PROXIES:
        os.environ.pop(name, None)
    if options.memory_of:
        print(json.dumps(memory_here(options.memory_of, Server(options.at))))
        return

    size = QUICK if options.quick else Size()
    rounds = cpu_bound(size.cpu_round, size.cpu_rounds)
    ours, without = median(ours for ours, _ in rounds), median(without for _, without in rounds)
    latency = latency_bound(size.latency)
    weather = storm(size.storm)
    held = memory(size.memory)
    figures = {
        "latency_bound_ratio": round(latency / 400, 3),
        "cpu_bound_ratio": round(ours / without, 3),
        "storm_goodput_ratio": round(weather.goodput, 3),
        "peak_rss_mb": round(held.peak, 1),
        "calls_per_s": round(ours, 1),
    }
    pairs = ", ".join(f"{ours:.0f}/{without:.0f}" for ours, without in rounds)
    growth = f"{held.early:.0f} MB at {spaced(size.memory // 4)} comparisons, {held.late:.0f} MB at {spaced(size.memory)}; {held.calls_per_s:.0f} calls/s"
    rows = [
        ("latency-bound", figures["latency_bound_ratio"], "≥ 0.90", latency / 400 >= 0.90, f"{latency:.0f} of 400 calls/s"),
        ("CPU-bound", figures["cpu_bound_ratio"], "≥ 0.75", ours / without >= 0.75, f"ours/bare {pairs} calls/s"),
        (
            "429 storm",
            figures["storm_goodput_ratio"],
            "> 0.70",
            weather.goodput > 0.70,
            f"{spaced(weather.refused)} refused, none lost or paid twice",
        ),
        ("memory, MB", figures["peak_rss_mb"], "< 400", held.peak < 400, growth),
    ]
    Console(width=140).print(table(rows))
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
