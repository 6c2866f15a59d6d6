"""Forked processes are as good as started ones."""

from pathlib import Path

from tests.conftest import REPOSITORY
from tests.preloaded import preloaded


def test_forked_drivers_draw_ids_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "draw.py").write_text("import lib.pipeline, ray\nprint(ray.WorkerID.from_random().hex())\n")
    environment = {"PYTHONPATH": str(REPOSITORY)}
    drawn = []
    (tmp_path / "server").mkdir()
    with preloaded(tmp_path / "server", "lib.pipeline") as process:
        for number in range(2):
            log = tmp_path / f"{number}.log"
            assert process.start("draw", [], environment, tmp_path, log).wait(60) == 0, log.read_text()
            drawn.append(log.read_text())
    assert drawn[0] != drawn[1]
