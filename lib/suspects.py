"""Chunks that are missing after their wave, each tried alone; one that kills its process is narrowed to the guilty rows.

Missing is not poison: with several tasks in flight, a dying actor takes innocent neighbours with it. Here one process does
one thing at a time, a row is guilty only if it alone kills two fresh processes, and a process that dies while it loads
the model blames no row. A chunk whose reading alone kills makes a bad shard.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import ray

from lib.actors import LoneWorker
from lib.archive import first_line
from lib.errors import IncompleteError, say
from lib.planning import Chunk
from lib.progress import end_actors, read_progress
from lib.watch import AGAIN, Running, Watch, explain_ray_error

WAYS = 16
"""Parts that a range of rows which kills its process is split into."""

KILLS = 2
"""Fresh processes that a chunk, and then a single row, must kill before it is believed to be the cause."""

LOST_NODES = 4
"""Processes in a row that may go with their nodes before the run is given up."""

NODE_DIED = "its node has died"
"""What Ray 2.60 says of an actor that was lost with its node, or was sent to one that nobody missed yet. It says so nowhere else."""

DEATHS = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)


@dataclass
class Bench:
    """The process that suspects are tried in; a new one after each death."""

    run: Running
    worker: Any = None
    why: str = ""
    """how the last one died"""

    def survives(self, method: str, *arguments: Any) -> bool:
        """Call a method of a `LoneWorker`; returns False if the process died or was ended because it hung.

        A process that was lost with its node says nothing of the rows: they are tried in another one. Keeps the answer in `answer`.
        Raises our error for what the method raised, `IncompleteError` if no process can start, or nodes are lost one after another.
        """
        for _ in range(LOST_NODES):
            try:
                if self.worker is None:
                    self.worker = self.start()
                self.answer = self.wait(getattr(self.worker, method).remote(*arguments))
            except DEATHS as error:
                self.worker, self.why = None, first_line(error)
                end_actors(self.run.progress)  # the dead one is at nothing any more
                if NODE_DIED not in str(error):
                    return False
                say(
                    "WARNING: a node was lost, and with it a process that tried rows alone; they are tried on another node"
                )
            except ray.exceptions.RayError as error:
                counts = read_progress(self.run.progress) or self.run.outcome.counts
                raise explain_ray_error(error, counts) from error
            else:
                return True
        raise IncompleteError(f"{LOST_NODES} processes in a row were lost with their nodes; {AGAIN}")

    def start(self) -> Any:
        """Start a process and wait until its model is loaded. Raises Ray's error if it was lost with its node."""
        job, layout, progress = self.run.job, self.run.layout, self.run.progress
        options = {"num_cpus": layout.actor_cpus, "num_gpus": layout.actor_gpus}
        worker = LoneWorker.options(**options).remote(job, layout.threads, progress)  # type: ignore[attr-defined]
        try:
            self.wait(worker.ready.remote())
        except DEATHS as error:
            if NODE_DIED in str(error):
                raise
            counts = read_progress(progress) or self.run.outcome.counts
            if counts.failures:
                raise explain_ray_error(error, counts) from error
            raise IncompleteError(f"an actor died while it loaded the model: {error}; {AGAIN}") from error
        return worker

    def wait(self, reference: Any) -> Any:
        """Wait for an answer, watching: a process that hangs is ended."""
        watch = Watch(self.run)
        while not ray.wait([reference], timeout=1)[0]:
            watch.look()
        return ray.get(reference)


def settle(run: Running, chunks: list[Chunk]) -> None:
    """Make the objects of missing chunks, one after the other; a chunk that kills its process loses only the guilty rows."""
    bench = Bench(run)
    try:
        for chunk in chunks:
            if attempt(bench, chunk):
                continue
            if not any(bench.survives("probe", chunk, chunk.start, chunk.start) for _ in range(KILLS)):
                run.outcome.give_up(chunk, f"reading it kills the process ({bench.why})")
                continue
            guilty = find_guilty(bench, chunk)
            run.outcome.guilty.setdefault(chunk.shard, []).extend(guilty)
            if not attempt(bench, replace(chunk, excluded=tuple((row, row + 1) for row in guilty))):
                raise IncompleteError(
                    f"{chunk.name}: without its rows {guilty} it still kills the process that scores it ({bench.why}); {AGAIN}"
                )
    finally:
        end_actors(run.progress)


def attempt(bench: Bench, chunk: Chunk) -> bool:
    """Make a chunk's object; returns False if that killed `KILLS` processes."""
    for _ in range(KILLS):
        if bench.survives("score", chunk):
            if bench.answer is not None:
                bench.run.add(bench.answer)
            return True
        print(f"WARNING: {chunk.name}: the process that scored it died ({bench.why})", flush=True)
    return False


def find_guilty(bench: Bench, chunk: Chunk) -> list[int]:
    """Find the rows (counted in the shard) that kill the process alone, by splitting what kills it into `WAYS` parts.

    Raises `IncompleteError` if no row is to blame, or if that is not known after `limits.max_probes`.
    """
    print(
        f"{chunk.name}: looking for the rows that kill the process (limits.max_probes = {bench.run.limits.max_probes})"
    )
    guilty: list[int] = []
    suspects = [(chunk.start, chunk.start + chunk.rows)]
    probes = 0

    def kills(first: int, last: int) -> bool:
        nonlocal probes
        probes += 1
        if probes > bench.run.limits.max_probes:
            raise IncompleteError(
                f"{chunk.name}: rows {suspects} kill the process that scores them; which of them was not found with"
                f" limits.max_probes = {bench.run.limits.max_probes}; raise it and run the same command again, or take the"
                f" rows out of {chunk.shard}"
            )
        return not bench.survives("probe", chunk, first, last)

    while suspects:
        first, last = suspects.pop()
        if last - first == 1:
            if all(kills(first, last) for _ in range(KILLS)):
                guilty.append(first)
                print(
                    f"{chunk.shard}: row {first} kills the process that scores it; it gets the error 'crash'",
                    flush=True,
                )
            continue
        parts = min(WAYS, last - first)
        bounds = [first + (last - first) * part // parts for part in range(parts + 1)]
        suspects.extend(span for span in pairwise(bounds) if kills(*span))
    if not guilty:
        raise IncompleteError(
            f"{chunk.name}: it kills the process that scores it ({bench.why}), but none of its rows alone does: likely memory;"
            " give the actors more of it, or lower resources.token_budget, and run the same command again"
        )
    return sorted(guilty)
