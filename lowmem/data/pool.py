"""Make pieces in parallel: one process per worker, one pipe each, the next job to whoever is free.

Workers are spawned, not forked: the parent may hold torch's and the tokenizer's threads. A worker
whose parent is gone ends at its next message; a parent whose worker is gone gets end of file.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from lowmem.data.jobs import Job, PieceMaker
from lowmem.data.pieces import Piece
from lowmem.data.shards import Split
from lowmem.errors import DataError, LowMemError
from lowmem.units import MIB

WORTH_A_POOL_BYTES = 16 * MIB
"""Input below this is done before a second process has started."""

_FIELDS = 3  # of the board, per job: bytes, tokens, files


@dataclass(frozen=True)
class Progress:
    """How far a prepare is.

    file: the one that is being read. bytes: of the packed input; 0 for a stream, whose end is
    not known.
    """

    file: str
    files_done: int
    files: int
    bytes_done: int
    bytes: int
    tokens: int


class Watch:
    """Numbers per job that workers write and the parent adds up for the progress callback."""

    def __init__(self, jobs: Sequence[Job], progress: Callable[[Progress], None] | None) -> None:
        self._jobs, self._progress = jobs, progress
        self.board: Any = multiprocessing.get_context("spawn").RawArray("q", _FIELDS * len(jobs))
        self._bytes = sum(one.bytes for job in jobs for one in job.inputs)
        self._files = sum(len(job.inputs) for job in jobs)

    def note(self, place: int, *numbers: int) -> None:
        """Set bytes, tokens, files of the job at `place`."""
        _note(self.board, place, numbers)

    def emit(self, place: int) -> None:
        """Call the callback, with a file of the job at `place`."""
        if self._progress is not None:
            done = [sum(self.board[column::_FIELDS]) for column in range(_FIELDS)]
            inputs = self._jobs[place].inputs
            current = inputs[min(self.board[place * _FIELDS + 2], len(inputs) - 1)]
            self._progress(
                Progress(current.name, done[2], self._files, done[0], self._bytes, done[1])
            )


def make_pieces(
    jobs: Sequence[Job],
    maker: PieceMaker,
    workers: int | None,
    progress: Callable[[Progress], None] | None,
) -> list[Piece]:
    """The pieces of `jobs`, in their order; of each split no more than its limit needs.

    The result is the same for any number of workers. Errors of any job end everything.
    """
    watch = Watch(jobs, progress)
    with _workforce(jobs, maker, watch, workers) as finish:
        places: dict[Split, list[int]] = {"train": [], "validation": []}
        for place, job in enumerate(jobs):
            places[job.split].append(place)
        done: list[Piece] = []
        for split, own in places.items():
            done += _enough(finish(own, maker.options.limit(split)), maker.options.limit(split))
    return done


Finish = Callable[[list[int], int | None], list[Piece]]
"""Makes the pieces of these places in order, at least until the limit of tokens is reached."""


def _enough(pieces: Sequence[Piece], limit: int | None) -> list[Piece]:
    """The first pieces that together reach `limit`."""
    taken, tokens = [], 0
    for piece in pieces:
        if limit is not None and tokens >= limit:
            break
        taken.append(piece)
        tokens += piece.kept_tokens
    return taken


@contextmanager
def _workforce(
    jobs: Sequence[Job], maker: PieceMaker, watch: Watch, workers: int | None
) -> Iterator[Finish]:
    """This process itself or a pool, whichever suits the number and size of the jobs."""
    if workers is None:
        small = sum(one.bytes for job in jobs for one in job.inputs) < WORTH_A_POOL_BYTES
        workers = 1 if small else _cores()
    workers = min(workers, len(jobs))
    if workers > 1:
        with Pool(jobs, maker, watch, workers) as pool:
            yield pool.finish
        return

    def finish(places: list[int], limit: int | None) -> list[Piece]:
        pieces: list[Piece] = []
        for place in places:
            if limit is not None and sum(piece.kept_tokens for piece in pieces) >= limit:
                break
            pieces.append(_make_here(jobs[place], place, maker, watch))
        return pieces

    yield finish


def _make_here(job: Job, place: int, maker: PieceMaker, watch: Watch) -> Piece:
    def told(*numbers: int) -> None:
        watch.note(place, *numbers)
        watch.emit(place)

    piece = maker.make(job, told)
    told(*_whole(job, piece))
    return piece


class Pool:
    """Worker processes for as long as the `with` lasts."""

    def __init__(self, jobs: Sequence[Job], maker: PieceMaker, watch: Watch, workers: int) -> None:
        self._jobs, self._maker, self._watch, self._count = jobs, maker, watch, workers
        self._workers: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> "Pool":
        context = multiprocessing.get_context("spawn")
        threads = max(1, _cores() // self._count)
        for _ in range(self._count):
            ours, theirs = context.Pipe()
            given = (theirs, self._maker, self._watch.board, threads)
            process = context.Process(target=_work, args=given, daemon=True)
            process.start()
            theirs.close()
            self._workers[ours] = process
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in self._workers.items():
            pipe.close()
            process.terminate()  # a piece becomes visible only when whole, so nothing is spoilt
        for process in self._workers.values():
            process.join()

    def finish(self, places: list[int], limit: int | None) -> list[Piece]:
        """As `Finish`."""
        done: dict[int, Piece] = {}
        running: dict[Connection, int] = {}
        waiting = iter(places)
        idle = list(self._workers)
        while True:
            while idle and (limit is None or _prefix_tokens(places, done) < limit):
                if (place := next(waiting, None)) is None:
                    break
                pipe = idle.pop()
                with suppress(BrokenPipeError):  # a dead worker; receiving says so
                    pipe.send((place, self._jobs[place]))
                running[pipe] = place
            if not running:
                return [done[place] for place in places[: _prefix(places, done)]]
            shown = min(running.values())
            for ready in wait(list(running), timeout=0.2):
                assert isinstance(ready, Connection)
                place = running.pop(ready)
                done[place] = self._received(ready, place)
                idle.append(ready)
                self._watch.note(place, *_whole(self._jobs[place], done[place]))
            self._watch.emit(shown)

    def _received(self, pipe: Connection, place: int) -> Piece:
        try:
            answer = pipe.recv()
        except (EOFError, OSError) as error:
            raise DataError(
                f"a worker died while it read {self._jobs[place].inputs[0].path}",
                "the system may have ended it for lack of memory; finished parts are kept",
                "run it again with fewer workers",
            ) from error
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _work(pipe: Connection, maker: PieceMaker, board: Any, threads: int) -> None:
    """The life of a worker process: jobs in, pieces or errors out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    parent = os.getppid()
    while True:
        try:
            place, job = pipe.recv()
        except EOFError:
            return

        def told(*numbers: int, place: int = place) -> None:
            if os.getppid() != parent:
                raise SystemExit
            _note(board, place, numbers)

        answer: Piece | Exception
        try:
            answer = maker.make(job, told)
        except (LowMemError, OSError) as error:
            answer = error
        except Exception as error:  # a bug: other exceptions need not survive the pipe
            answer = RuntimeError(f"{type(error).__name__} in {job.inputs[0].path}: {error}")
        with suppress(BrokenPipeError):  # the parent is gone; so is then the next message
            pipe.send(answer)


def _note(board: Any, place: int, numbers: tuple[int, ...]) -> None:
    board[place * _FIELDS : (place + 1) * _FIELDS] = numbers


def _whole(job: Job, piece: Piece) -> tuple[int, int, int]:
    return sum(one.bytes for one in job.inputs), piece.tokens, len(job.inputs)


def _prefix(places: list[int], done: dict[int, Piece]) -> int:
    """How many places from the first on are done without a gap."""
    return next((n for n, place in enumerate(places) if place not in done), len(places))


def _prefix_tokens(places: list[int], done: dict[int, Piece]) -> int:
    return sum(done[place].kept_tokens for place in places[: _prefix(places, done)])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
