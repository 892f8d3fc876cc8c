"""What a run does where the device runs out of memory: the same updates with less.

    step                what changes                                        the numbers are
    free                nothing: ballast, garbage and cache are let go of   the same bits
    slices              pieces of vocabulary and weights, a quarter         summed in another order
    logits, recompute   less is kept for backward                           the same bits
    micro-batch         halved, and twice as many                           summed in another order
    boundaries          inputs of blocks wait in host memory                the same bits

The batch, its order and the learning rate never change. Each step is told, is written down, and
stays for the rest of the run. Before the first write of an update the whole update is repeated,
a step further down; from then on the call alone that failed (`retried.py`), after `free`, and in
layer-major order once more after `boundaries`. Where nothing is left to do the run saves, if it
stands between two updates, and ends with exit code 7.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from lowmem.config.recompute import levels_of, one_level_down
from lowmem.config.schema import MOVE_EARLY
from lowmem.errors import CheckpointError, short
from lowmem.model.llama import Llama
from lowmem.optim.optimizer import Optimizer
from lowmem.phases import current_phase, phases_of, sentence
from lowmem.planner.hardware import available_memory
from lowmem.planner.job import Job
from lowmem.planner.plan import Choice, Plan
from lowmem.train.cap import Cap
from lowmem.train.evaluate import halved
from lowmem.train.events import Eased, Report
from lowmem.train.retried import RetriedCalls, without_frames
from lowmem.train.rungs import Rungs, standing_on

DIVISOR = 4  # of slices
FREED_OFTEN = 3  # updates that had to be repeated, after which freeing is no answer any more

T = TypeVar("T")


@dataclass
class Ladder:
    """A context, in which the model, the optimizer and all slices are as `rungs` says.

    rungs: where the run stands; changed in place, for it outlives a rollback. plan: to ask whether
    smaller micro-batches help, since the sums of more of them take memory, too; without one they
    are taken to. taken: what was done, in words, for the end of the run.
    """

    model: Llama
    optimizer: Optimizer
    rungs: Rungs
    plan: Plan | None
    cap: Cap
    report: Report
    taken: list[str] = field(default_factory=list)
    update: int = 0
    _torn: bool = False
    _retrying: bool = False
    _told: int = -1  # the update of which a freed call was last told
    _freed: int = 0
    _standing: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Ladder":
        self.optimizer.writing = self.writing
        self._stand()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._standing.close()
        self.optimizer.writing = nullcontext  # no circle that would keep them alive

    def carried(self) -> dict[str, Rungs]:
        """For a checkpoint; empty of a run that never met the end of memory."""
        now: Rungs = {**self.rungs, "prepared": self.optimizer.prepared()}
        return {"ladder": now} if self.taken or now["prepared"] else {}

    def resume(self, carried: Rungs | None) -> None:
        """Stand where a checkpoint says that its run stood, or further down after a rollback.

        CheckpointError: this model has not what the checkpoint speaks of.
        """
        if carried is None:
            return
        _require_ours(carried, self.model, self.optimizer)
        for name in carried["prepared"]:
            self.optimizer.slots[name].prepared = self.optimizer.updates + 1
        if not self.taken:
            before = dict(self.rungs, prepared=carried["prepared"])
            changed = [f"{key} {value}" for key, value in carried.items() if value != before[key]]
            self.rungs.update({**carried, "prepared": []})
            self.taken += [f"resumed with {', '.join(changed)}"] if changed else []

    def told(self) -> str:
        """How the run ends where nothing helped."""
        tried = "; ".join(self.taken) or "memory was freed"
        if self.whole:
            return f"tried: {tried}\nno update was half made, and everything is saved"
        return f"tried: {tried}\nan update was half made: the last checkpoint is where to resume"

    @property
    def whole(self) -> bool:
        """Is everything as between two updates, so that it can be saved?"""
        return not (self._torn or self.optimizer.moved)

    def gathered(self, update: int, attempt: Callable[[int], T]) -> T:
        """What `attempt(micro_batch)` returns: the gradients of an update; it is called again.

        Raises torch.OutOfMemoryError when no step is left, or once weights have moved.
        """
        self.update, failures, before = update, 0, self.optimizer.updates
        while True:
            try:
                with self.calls() if self.optimizer.mode in MOVE_EARLY else nullcontext():
                    return attempt(self.rungs["micro_batch"])
            except torch.OutOfMemoryError as error:
                failed = without_frames(error)
            if not self.whole:
                raise failed
            self.optimizer.rewind(before)
            self.free()
            failures += 1
            self._freed += failures == 1
            if failures == 1 and self._freed <= FREED_OFTEN:
                self._tell("free", "memory freed, the update is made again", failed)
            elif not self._step_down(failed):
                raise failed

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Inside, a call that fails is repeated by itself; nests."""
        if self._retrying:
            yield
            return
        self._retrying = True
        try:
            with RetriedCalls([self._free_for_call, self._lend_for_call]):
                yield
        finally:
            self._retrying = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The same; what leaves it with an error has left a state or weight half changed."""
        try:
            with self.calls():
                yield
        except torch.OutOfMemoryError:
            self._torn = True
            raise

    @contextmanager
    def saved_at_the_end(self, save: Callable[[], None]) -> Iterator[None]:
        """Save before an out-of-memory error leaves, where there is something whole to save."""
        try:
            yield
            return
        except torch.OutOfMemoryError as error:
            failed = without_frames(error)
        self.free()
        if self.whole:
            with self.calls():
                save()
        raise failed

    def evaluation_rows(self, failed: torch.OutOfMemoryError, rows: int) -> int:
        """Windows of the next try of an evaluation batch; training goes on as it was."""
        self.cap.ballast = None
        self.rungs["evaluation"] = fewer = halved(failed, rows)
        self._tell("evaluation", f"validation in batches of {fewer} sequences", failed)
        return fewer

    def ahead(self) -> None:
        """Step down before an error, by what costs least: slices, and one level for the blocks."""
        for easier in (self._slice, self._keep_less):
            said = easier()
            if said is not None:
                self._tell(*said, None)

    def free(self, garbage: bool = True) -> None:
        """Let go of the ballast, of garbage and of what the allocator keeps."""
        self.cap.ballast = None
        if garbage:
            gc.collect()
        torch.cuda.empty_cache()  # does nothing where CUDA was not used

    def _free_for_call(self, failed: torch.OutOfMemoryError) -> bool:
        first = self._told != self.update  # where memory is short many calls may fail,
        self.free(garbage=first)  # and garbage takes a tenth of a second to look for
        if first:
            self._told = self.update
            self._tell("free", "memory freed, the call is made again", failed)
        return True

    def _lend_for_call(self, failed: torch.OutOfMemoryError) -> bool:
        """In the middle of a layer-major update: all that waits on the device goes to the host."""
        layers = len(self.model.blocks) + 1
        needed = layers * self.model.boundaries.layer_bytes
        if not needed or needed > available_memory():
            return False
        said = self._lent()
        self.free()
        self._tell(*said, failed)
        return True

    def _step_down(self, failed: torch.OutOfMemoryError) -> bool:
        """Take the next step; False: there is none."""
        for easier in (self._slice, self._keep_less, self._halve, self._lend):
            said = easier()
            if said is not None:
                self._tell(*said, failed)
                return True
        return False

    def _slice(self) -> tuple[str, str] | None:
        if self.rungs["slices"] > 1:
            return None
        self.rungs["slices"] = DIVISOR
        self._stand()
        return "slices", f"slices of vocabulary and weights are {DIVISOR} times smaller"

    def _keep_less(self) -> tuple[str, str] | None:
        if self.rungs["logits"]:
            self.rungs["logits"] = False
            self._stand()
            return "logits", "logits are made twice"
        before = self.rungs["recompute"]
        less = one_level_down(before, len(self.model.model.layers))
        if less == one_level_down(less, len(self.model.model.layers)) == before:
            return None
        self.rungs["recompute"] = less
        self._stand()
        return "recompute", f"recompute {before} -> {less}"

    def _halve(self) -> tuple[str, str] | None:
        rows = self.rungs["micro_batch"]
        fewer = -(-rows // 2)
        if rows == 1 or self.optimizer.mode == "fused" or not self._helps(fewer):
            return None
        self.rungs["micro_batch"] = fewer
        return "micro-batch", f"micro-batches of {fewer} sequences instead of {rows}"

    def _lend(self) -> tuple[str, str] | None:
        if self.rungs["boundaries"] == "host" or len(self.model.blocks) == 1:
            return None
        if self.plan is not None:
            job = Job.of(self.plan.config, self.plan.card)
            there = replace(self._now(job, self.plan.choice), boundaries="host")
            if job.host(there) > available_memory():
                return None
        return self._lent()

    def _lent(self) -> tuple[str, str]:
        self.rungs["boundaries"] = "host"
        self.model.boundaries.lend()
        return "boundaries", "inputs of blocks wait in host memory"

    def _now(self, job: Job, planned: Choice) -> Choice:
        """What was planned, as far down as the run is."""
        rows = self.rungs["micro_batch"]
        return replace(
            planned,
            recompute=self.rungs["recompute"],
            logits="keep" if self.rungs["logits"] else "recompute",
            micro_batch=rows,
            accumulate=-(-job.rows // rows),
            boundaries=self.rungs["boundaries"],
        )

    def _helps(self, rows: int) -> bool:
        """Do micro-batches of so many sequences need less, with the sums they are added to?"""
        if self.plan is None:
            return True
        job = Job.of(self.plan.config, self.plan.card)
        now = self._now(job, self.plan.choice)
        smaller = replace(now, micro_batch=rows, accumulate=-(-job.rows // rows))
        return job.tensors(smaller) < job.tensors(now)

    def _stand(self) -> None:
        self._standing.close()
        self._standing.enter_context(standing_on(self.rungs, self.model))

    def _tell(self, step: str, said: str, failed: torch.OutOfMemoryError | None) -> None:
        where = sentence(current_phase() or phases_of(failed)) if failed is not None else ""
        reason = str(failed).partition("\n")[0] if failed is not None else ""
        if step != "free":
            self.taken.append(said)
        self.report(Eased(self.update, step, said, where, reason))


def _require_ours(carried: Rungs, model: Llama, optimizer: Optimizer) -> None:
    foreign = [name for name in carried["prepared"] if name not in optimizer.slots]
    try:
        levels_of(carried["recompute"], len(model.model.layers))
    except ValueError as error:
        foreign.append(str(error))
    if foreign:
        raise CheckpointError(
            f"the checkpoint speaks of {short(foreign[0])}, which this model does not have",
            "it was written by a run of another model, or changed by hand",
            "resume from another checkpoint: --from previous",
        )
