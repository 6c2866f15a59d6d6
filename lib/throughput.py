"""How fast actors were, by what they compute with: kept in the record of every run, for the forecasts of later ones."""

import platform
import re
from pathlib import Path

from pydantic import AliasChoices, BaseModel, ConfigDict, Field


class Device(BaseModel):
    """What an actor computes with."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    """as its maker calls it"""
    is_gpu: bool
    engine: str
    precision: str
    threads: int
    """of one forward pass on a processor; 1 on a GPU"""

    def __str__(self) -> str:
        threads = "" if self.is_gpu else f", {self.threads} threads"
        return f"{self.name}{threads}, {self.engine}, {self.precision}"


class Throughput(BaseModel):
    """What actors of one kind did."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    device: Device
    lives: int = Field(validation_alias=AliasChoices("lives", "actors"))
    """of actors, added up: each wave's actors are new, and one that restarts begins another; older records call them actors"""
    tokens: int
    seconds: float
    """from the beginning of each life's first block to the end of its last, added up: waiting for blocks is part of it"""
    busy_seconds: float
    """of these, at a block"""

    @property
    def seconds_each(self) -> float:
        """Of one life, on average."""
        return self.seconds / self.lives

    @property
    def tokens_per_second(self) -> float:
        """Of one actor."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def per_unit(self) -> float:
        """Tokens a second of one GPU, or of one thread of a processor."""
        return self.tokens_per_second / (1 if self.device.is_gpu else self.device.threads)

    def record(self) -> dict[str, object]:
        """Plain JSON values."""
        rounded = {name: round(getattr(self, name), 3) for name in ("seconds", "busy_seconds", "tokens_per_second")}
        return self.model_dump() | rounded


def processor_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor is called, with family and model number; its architecture where the system does not say.

    The numbers, since virtual machines call processors of two generations alike ("AMD EPYC") whose bf16 differs by a factor of two.
    """
    text = info.read_text() if info.exists() else ""
    name, family, model = (
        (found.group(1).strip() if (found := re.search(rf"^{key}\s*: (.*)", text, re.MULTILINE)) else None)
        for key in ("model name", "cpu family", "model")
    )
    if name is None:
        return platform.machine()
    return name if family is None or model is None else f"{name} (family {family}, model {model})"


def add_up(parts: list[Throughput]) -> tuple[Throughput, ...]:
    """Put together what actors with equal devices did, the most tokens first."""
    by_device: dict[Device, list[Throughput]] = {}
    for part in parts:
        by_device.setdefault(part.device, []).append(part)
    whole = [
        Throughput(
            device=device,
            lives=sum(one.lives for one in same),
            tokens=sum(one.tokens for one in same),
            seconds=sum(one.seconds for one in same),
            busy_seconds=sum(one.busy_seconds for one in same),
        )
        for device, same in by_device.items()
    ]
    return tuple(sorted(whole, key=lambda one: -one.tokens))
