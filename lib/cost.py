"""What a run holds of a cluster, what that costs, and the end of a run whose budget is spent."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from lib.errors import BudgetError, UsageError
from lib.runtime import Cluster, cluster_facts
from lib.score_config import ForecastSection

ASK_EVERY_SECONDS = 10
"""A cluster that grows or shrinks is seen after so long at most; asking Ray takes a few milliseconds."""

SECONDS_PER_HOUR = 3_600


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What was held, whether it worked or waited: nodes, CPUs and GPUs of the whole cluster, each times seconds."""

    node_seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0

    def plus(self, cluster: Cluster, seconds: float) -> "Usage":
        """This, and a cluster for so long."""
        return Usage(
            node_seconds=self.node_seconds + seconds * len(cluster.nodes),
            cpu_seconds=self.cpu_seconds + seconds * cluster.cpus,
            gpu_seconds=self.gpu_seconds + seconds * cluster.gpus,
        )

    def cost(self, prices: ForecastSection) -> float | None:
        """In the currency of the prices; None if there are none."""
        if not prices.has_price:
            return None
        priced = (
            (self.node_seconds, prices.node_hour),
            (self.cpu_seconds, prices.cpu_hour),
            (self.gpu_seconds, prices.gpu_hour),
        )
        return sum(seconds / SECONDS_PER_HOUR * (price or 0.0) for seconds, price in priced)


@dataclass
class Meter:
    """Counts what a run holds, and ends it when its budget is spent."""

    prices: ForecastSection
    budget: float | None
    begun: float
    """when the run began, by `time.monotonic`"""
    cluster: Cluster
    """as it was seen last"""
    ask: Callable[[], Cluster] = cluster_facts
    used: Usage = field(default_factory=Usage)
    """up to `seen_at`"""
    seen_at: float = 0.0
    asked_at: float = 0.0

    def __post_init__(self) -> None:
        """Raises `UsageError` for a budget that would never be spent."""
        self.seen_at = self.begun
        self.asked_at = time.monotonic()
        if self.budget is not None and not Usage().plus(self.cluster, 1).cost(self.prices):
            raise UsageError(
                f"limits.budget = {self.budget:g} would never be spent: nothing of this cluster ({self.cluster}) has a price; set"
                " forecast.node_hour, forecast.cpu_hour or, with GPUs, forecast.gpu_hour"
            )

    def look(self) -> None:
        """Count up to now. Raises `BudgetError` if the budget is spent."""
        self.count()
        if time.monotonic() - self.asked_at > ASK_EVERY_SECONDS:
            self.cluster, self.asked_at = self.ask(), time.monotonic()
        spent = self.spent
        if self.budget is not None and spent is not None and spent >= self.budget:
            raise BudgetError(f"limits.budget = {self.budget:g} is spent: {spent:,.2f} by now")

    def count(self) -> Usage:
        """What was held up to now."""
        now = time.monotonic()
        self.used, self.seen_at = self.used.plus(self.cluster, now - self.seen_at), now
        return self.used

    @property
    def spent(self) -> float | None:
        """In the currency of the prices; None without prices."""
        return self.used.cost(self.prices)

    def __str__(self) -> str:
        if self.spent is None:
            return ""
        return f"{self.spent:,.2f} spent" if self.budget is None else f"{self.spent:,.2f} of {self.budget:g} spent"


def budget_spent(why: BudgetError, num_shards: int, left: pa.Table, num_objects: int) -> BudgetError:
    """What a budget has brought when it was spent: objects that are new, and the shards (with their sizes) that are left."""
    size = int(pc.sum(left["size"]).as_py() or 0) / 1e6
    too_small = "" if num_objects else "; not one chunk was finished: raise it, jobs.plan says what is needed"
    return BudgetError(
        f"{why}; of {num_shards:,} shards to do {left.num_rows:,} ({size:,.1f} MB) are left; what is finished is kept, nothing is"
        f" published{too_small}; run the same command again, and it goes on with a new budget"
    )
