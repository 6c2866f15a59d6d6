"""The forecast's arithmetic: blocks on actors, waves, the driver's part, which speed is believed, and what a cluster costs."""

import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib import forecast as forecasts
from lib.errors import UsageError
from lib.estimate import Estimate
from lib.forecast import (
    BLOCK_SECONDS,
    Speed,
    described_cluster,
    earlier_speed,
    forecast,
    given_speed,
    makespan,
    scoring_seconds,
)
from lib.runtime import Cluster, Node, plan_layout
from lib.score_config import ForecastSection, ScoreResources
from lib.throughput import Device, Throughput, processor_name


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=50), st.integers(1, 9))
def test_a_schedule_is_within_the_bounds_of_list_scheduling(blocks: list[float], actors: int) -> None:
    """Graham 1966: at least the mean load and the longest block, at most the mean load and a part of the longest block."""
    found, mean, longest = makespan(np.array(blocks), actors), sum(blocks) / actors, max(blocks)
    assert found >= max(mean, longest) - 1e-6
    assert found <= mean + (1 - 1 / actors) * longest + 1e-6


def test_the_tail_is_the_last_block_that_begins() -> None:
    assert makespan(np.array([1.0, 1, 1, 9]), 2) == 10
    assert makespan(np.array([]), 4) == 0


def test_waves_have_a_tail_each_and_new_actors_for_each_but_the_first() -> None:
    assert scoring_seconds(np.full(6, 100.0), 2, 10.0, 7.0, wave_blocks=3) == 20 + 7 + 20


def test_the_driver_limits_what_many_actors_can_do() -> None:
    blocks = np.full(1_000, 100.0)
    assert scoring_seconds(blocks, 1_000, 100.0, 0.0) == pytest.approx(1_000 * BLOCK_SECONDS)
    assert scoring_seconds(blocks, 1, 100.0, 0.0) == pytest.approx(1_000)


def test_a_forecast_adds_up_and_costs_the_whole_cluster() -> None:
    cluster = Cluster((Node(16, 2),))
    layout = plan_layout(cluster, ScoreResources())
    tokens = Estimate(value=1e6, low=0.5e6, high=2e6)
    speed = Speed(per_unit=1_000, source="a test", starting_seconds=20, finishing_seconds=5)
    found = forecast(tokens, np.ones(100), cluster, layout, speed, 10.0, ForecastSection(gpu_hour=3.6, cpu_hour=0.36))
    assert found.seconds == Estimate(value=535, low=285, high=1_035)
    assert found.cost is not None
    assert found.cost.value == pytest.approx(535 / 3_600 * (2 * 3.6 + 16 * 0.36))
    free = forecast(tokens, np.ones(100), cluster, layout, speed, 10.0, ForecastSection())
    assert free.cost is None


def test_clusters_are_described_by_a_part_of_what_they_are() -> None:
    assert described_cluster(ForecastSection(gpus=32)) == Cluster((Node(64, 8),) * 4)
    assert described_cluster(ForecastSection(cpus=64, nodes=2)) == Cluster((Node(32, 0),) * 2)
    assert described_cluster(ForecastSection(gpus=0, nodes=3)) == Cluster((Node(8, 0),) * 3)


def test_threads_are_those_of_the_described_cluster() -> None:
    cluster = described_cluster(ForecastSection(cpus=96, nodes=2))
    assert plan_layout(cluster, ScoreResources(), most_threads=96).threads == 48


def test_a_node_without_cpus_gets_no_actor_and_takes_no_thread() -> None:
    """The head of our KubeRay cluster, for example."""
    cluster = Cluster((Node(0, 0), Node(8, 0)))
    layout = plan_layout(cluster, ScoreResources(num_actors=2), most_threads=8)
    assert (layout.num_actors, layout.threads) == (2, 4)


def record(
    run: str, name: str, seconds: float, tokens: int = 1_000, is_gpu: bool = True, lives: int = 1
) -> dict[str, Any]:
    device = Device(name=name, is_gpu=is_gpu, engine="torch", precision="bf16", threads=1 if is_gpu else 4)
    done = Throughput(device=device, lives=lives, tokens=tokens, seconds=seconds, busy_seconds=seconds)
    return {"run_id": run, "throughput": [done.record()], "phases": {"starting": 33.0}}


def test_the_latest_run_that_was_long_enough_is_believed_with_its_start() -> None:
    records = [
        record("short", "NVIDIA H100", 2.0),
        record("late", "NVIDIA H100", 20.0),
        record("early", "NVIDIA H100", 90),
    ]
    found = earlier_speed(records, True, None, "of this version")
    assert found is not None
    assert (found.per_unit, found.source) == (50, "run late of this version")
    assert (found.starting_seconds, found.finishing_seconds) == (33, forecasts.FINISHING_SECONDS)


def test_of_runs_that_were_all_too_short_the_longest_is_believed_and_says_so() -> None:
    found = earlier_speed([record("a", "x", 2.0), record("b", "x", 4.0)], True, None, "")
    assert found is not None
    assert "run b" in found.source
    assert "for 4 s only" in found.source


def test_many_short_lives_are_not_one_long_one() -> None:
    """Eight actors in three waves that worked for a second each tell less than one that worked for 20."""
    records = [record("waves", "x", 24.0, lives=24), record("one", "x", 20.0)]
    found = earlier_speed(records, True, None, "")
    assert found is not None
    assert found.source == "run one "
    short = earlier_speed(records[:1], True, None, "")
    assert short is not None
    assert "whose actors worked for 1 s only" in short.source


def test_records_that_call_lives_actors_are_read() -> None:
    (done,) = record("old", "x", 40.0, lives=2)["throughput"]
    done["actors"] = done.pop("lives")
    assert Throughput.model_validate(done).seconds_each == 20


def test_other_devices_and_old_records_say_nothing() -> None:
    records = [{"run_id": "old"}, record("cpu", "EPYC", 50, is_gpu=False), record("gpu", "NVIDIA A10G", 50)]
    assert earlier_speed(records, True, "h100", "") is None
    a10, cpu = earlier_speed(records, True, "a10", ""), earlier_speed(records, False, None, "")
    assert a10 is not None
    assert a10.per_unit == 20
    assert cpu is not None
    assert cpu.per_unit == 5, "of one of its four threads"


@pytest.mark.parametrize(("short", "long"), [("A10", "A100"), ("L4", "L40S"), ("H100", "GH100")])
def test_a_device_is_not_taken_for_one_whose_name_is_longer(short: str, long: str) -> None:
    table = {long: 9.0, short: 1.0}
    for device, expected in ((short, 1), (long.lower(), 9), (f"NVIDIA {short}", 1), (f"NVIDIA {long} 48GB", 9)):
        found = given_speed(ForecastSection(tokens_per_second=table, device=device))
        assert found is not None
        assert found.per_unit == expected, device
    records = [record("long", f"NVIDIA {long}-PCIe", 20.0), record("short", f"NVIDIA {short}", 20.0)]
    for device, run in ((short, "short"), (f"nvidia {short}", "short"), (long, "long")):
        found = earlier_speed(records, True, device, "")
        assert found is not None
        assert f"run {run}" in found.source, device
    assert earlier_speed(records[:1], True, short, "") is None


def test_a_part_of_several_names_is_refused_and_each_of_them_taken() -> None:
    records = [
        record("a", "NVIDIA H100 PCIe", 20.0),
        record("b", "NVIDIA H100", 20.0),
        record("c", "EPYC", 20, is_gpu=False),
    ]
    with pytest.raises(UsageError, match=r"'h100' fits 'NVIDIA H100', 'NVIDIA H100 PCIe', which earlier runs had"):
        earlier_speed(records, True, "h100", "")
    for device, run in (("NVIDIA H100", "b"), ("h100 pcie", "a")):
        found = earlier_speed(records, True, device, "")
        assert found is not None
        assert f"run {run}" in found.source


def test_a_table_of_speeds_is_read_by_the_device() -> None:
    table = {"H100": 400.0, "A10G": 60.0}
    for device, expected in (("H100", 400), ("NVIDIA A10G", 60)):
        found = given_speed(ForecastSection(tokens_per_second=table, device=device))
        assert found is not None
        assert found.per_unit == expected
    with pytest.raises(UsageError, match=r"has H100, A10G, and forecast\.device = None does not say which"):
        given_speed(ForecastSection(tokens_per_second=table))
    with pytest.raises(UsageError, match=r"forecast\.device = 'L4' does not say which"):
        given_speed(ForecastSection(tokens_per_second=table, device="L4"))
    assert given_speed(ForecastSection()) is None


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (
            ["processor\t: 0", "cpu family\t: 25", "model\t\t: 17", "model name\t: AMD EPYC"],
            "AMD EPYC (family 25, model 17)",
        ),
        (
            ["processor\t: 0", "cpu family\t: 26", "model\t\t: 2", "model name\t: AMD EPYC"],
            "AMD EPYC (family 26, model 2)",
        ),
        (["processor\t: 0", "model name\t: Cortex"], "Cortex"),
        (["processor\t: 0"], platform.machine()),
    ],
)
def test_processors_of_one_name_and_two_generations_are_told_apart(lines: list[str], name: str, tmp_path: Path) -> None:
    """A speed that one of them reached says nothing of the other."""
    (tmp_path / "cpuinfo").write_text("\n".join(lines))
    assert processor_name(tmp_path / "cpuinfo") == name


def test_a_system_that_does_not_describe_its_processor_gives_its_architecture(tmp_path: Path) -> None:
    assert processor_name(tmp_path / "missing") == platform.machine()
