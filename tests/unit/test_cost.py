"""What a run costs: the whole cluster by its prices, also one that grows, and a budget that ends it."""

import pytest

from lib.config import validate
from lib.cost import ASK_EVERY_SECONDS, Meter, Usage
from lib.errors import BudgetError, ExitCode, UsageError
from lib.runtime import Cluster, Node
from lib.score_config import ForecastSection, ScoreConfig
from lib.throughput import Device, Throughput, add_up

SMALL, LARGE = Cluster((Node(8, 2),)), Cluster((Node(8, 2), Node(8, 2)))
GPU = ForecastSection(gpu_hour=3.5)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock, as its one number says."""
    now = [1_000.0]
    monkeypatch.setattr("lib.cost.time.monotonic", lambda: now[0])
    return now


def test_everything_that_has_a_price_costs_by_the_hour() -> None:
    used = Usage().plus(LARGE, 1_800)
    assert (used.node_seconds, used.cpu_seconds, used.gpu_seconds) == (3_600, 28_800, 7_200)
    assert used.cost(GPU) == pytest.approx(7.0)
    assert used.cost(ForecastSection(cpu_hour=0.05, node_hour=2)) == pytest.approx(0.4 + 2)
    assert used.cost(ForecastSection(cpu_hour=0)) == 0
    assert used.cost(ForecastSection()) is None


def test_a_cluster_that_grows_costs_more_from_when_it_is_seen(clock: list[float]) -> None:
    meter = Meter(GPU, None, clock[0] - 600, SMALL, ask=lambda: LARGE)
    meter.look()
    assert meter.spent == pytest.approx(2 * 600 / 3_600 * 3.5), "what came before the first look is counted"
    clock[0] += ASK_EVERY_SECONDS + 1
    meter.look()
    before = meter.used.gpu_seconds
    clock[0] += 100
    assert meter.count().gpu_seconds - before == pytest.approx(400)


def test_a_budget_ends_the_run_when_it_is_spent_and_not_before(clock: list[float]) -> None:
    meter = Meter(GPU, 7.0, clock[0], SMALL, ask=lambda: SMALL)
    clock[0] += 3_599
    meter.look()
    assert str(meter) == "7.00 of 7 spent"
    clock[0] += 1
    with pytest.raises(BudgetError, match=r"limits\.budget = 7 is spent: 7\.00 by now") as caught:
        meter.look()
    assert caught.value.exit_code is ExitCode.OVER_BUDGET


def test_a_budget_that_nothing_would_ever_spend_is_refused() -> None:
    needs = {"input": {"path": "a"}, "model": {"path": "m"}, "output": {"path": "o"}, "limits": {"budget": 5}}
    with pytest.raises(UsageError, match=r"limits\.budget = 5, but nothing has a price: set forecast\.gpu_hour"):
        validate(ScoreConfig, needs)
    assert validate(ScoreConfig, needs | {"forecast": {"gpu_hour": 1}}).limits.budget == 5
    with pytest.raises(UsageError, match=r"would never be spent: nothing of this cluster \(1 nodes, 4 CPUs, 0 GPUs\)"):
        Meter(GPU, 5.0, 0.0, Cluster((Node(4, 0),)))


def test_throughput_is_added_up_by_device() -> None:
    one = Device(name="GPU", is_gpu=True, engine="packed", precision="bf16", threads=1)
    other = Device(name="CPU", is_gpu=False, engine="openvino", precision="bf16", threads=4)
    parts = [
        Throughput(device=one, lives=1, tokens=300, seconds=2, busy_seconds=1),
        Throughput(device=other, lives=1, tokens=100, seconds=5, busy_seconds=5),
        Throughput(device=one, lives=1, tokens=100, seconds=2, busy_seconds=1),
    ]
    fast, slow = add_up(parts)
    assert (fast.device, fast.lives, fast.tokens_per_second, fast.per_unit) == (one, 2, 100, 100)
    assert (slow.tokens_per_second, slow.per_unit) == (20, 5)
    assert Throughput.model_validate(fast.record()) == fast
