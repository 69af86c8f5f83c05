"""Batches of damaged files in processes of their own, under a watch; what a case that failed has read is kept."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from tests.fuzz.targets import TARGETS, run_case

BATCH = 500  # cases of one process
SECONDS_OF_CASE = 10.0
WALL_SECONDS_OF_CASE = 300.0  # for one that waits for ever
MEMORY = 2 << 30  # bytes beside what a process has when its seeds are written


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _work(pipe: Connection, target: str, seed: int, numbers: range, folder: Path) -> None:
    """In a process of its own: tells the number of each case before it, and what went wrong after it."""
    os.environ["PADDLEMIX_CACHE"] = str(folder / "cache")
    seeds = folder / "seeds"
    seeds.mkdir()
    with open(folder / "log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    TARGETS[target].seeds(seeds)
    pipe.send(None)
    _limit_memory()
    for number in numbers:
        pipe.send(number)
        try:
            run_case(target, seed, number, seeds, folder / "case")
        except BaseException:  # a panic of a Rust library is no Exception
            (folder / "case").rename(folder / f"case {number}")
            pipe.send(traceback.format_exc())


def _processor_time(pid: int | None) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_batch(target: str, seed: int, numbers: range, failures: Path, until: float = float("inf")) -> tuple[int, int]:
    """Runs cases one after the other; after one that ends or hangs its process, the next in a new one.

    Returns:
        Cases that ran, and those that failed.
    """
    done = failed = 0
    context = multiprocessing.get_context("spawn")
    while done < len(numbers) and time.monotonic() < until:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, target, seed, numbers[done:], Path(folder)))
            process.start()
            theirs.close()
            ran, problems = _watch(process, ours, until)
            for number, problem in problems:
                kept = Path(folder) / f"case {number}"  # of a process that went on; else what it read last
                case = kept if kept.is_dir() else Path(folder) / "case"
                _keep(failures / f"{target}-{seed}-{number}", case, target, seed, number, problem)
            done, failed = done + ran, failed + len(problems)
            if not ran:
                log = (Path(folder) / "log").read_text(errors="replace")
                raise SystemExit(f"the valid files of '{target}' were not written:\n{log[-3000:]}")
    return done, failed


def _watch(process: SpawnProcess, pipe: Connection, until: float) -> tuple[int, list[tuple[int, str]]]:
    """Follows a process; how many cases it began, and which went wrong in which way."""
    problems: list[tuple[int, str]] = []
    ran, number, since, began = 0, None, 0.0, time.monotonic()
    while True:
        try:
            if pipe.poll(0.2):
                told = pipe.recv()
                if isinstance(told, str):
                    problems.append((number, told))  # type: ignore[arg-type]
                elif told is not None:
                    number, ran = told, ran + 1
                    since, began = _processor_time(process.pid), time.monotonic()
                if time.monotonic() < until or number is None:
                    continue
                break
        except EOFError:  # all done, or it ended
            process.join()
            if process.exitcode and number is not None:
                problems.append((number, f"the process ended with status {process.exitcode}"))
            return ran, problems
        used, waited = _processor_time(process.pid) - since, time.monotonic() - began
        if number is not None and (used > SECONDS_OF_CASE or waited > WALL_SECONDS_OF_CASE):
            problems.append((number, f"not done after {used:.0f} s of processor time, {waited:.0f} s in all"))
            break
    process.kill()
    process.join()
    return ran, problems


def _keep(place: Path, case: Path, target: str, seed: int, number: int, problem: str) -> None:
    """Copies what a case read, beside what happened."""
    sys.stderr.write(f"{target} case {number}: {problem.strip().splitlines()[-1][:300]}\n  kept in {place}\n")
    shutil.rmtree(place, ignore_errors=True)
    if case.is_dir():
        shutil.copytree(case, place)
    place.mkdir(parents=True, exist_ok=True)
    again = f"python -m tests.fuzz --target {target} --seed {seed} --case {number}"
    (place / "problem.txt").write_text(f"{problem}\n\n{again}\n", encoding="utf-8", errors="backslashreplace")
