"""Memory that is available, by figures of the system's own and by control groups written down here; threads of a run."""

import json
import re
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
import torch

from moesaic.errors import InputError, StaleError
from moesaic.resources import THREADS, Resources, available_bytes

CPU, GB, UNLIMITED_V1 = torch.device("cpu"), 10**9, 9223372036854771712


def tree(root: Path, groups: str, files: dict[str, object]) -> Path:
    for path, text in {"proc/self/cgroup": groups, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text}\n")
    return root


def group(limit: object, used: int, cache: int, version: int = 2) -> dict[str, object]:
    """The files of one control group: `cache` of what is used are pages of files."""
    if version == 2:
        stat = f"anon {used - cache}\nfile {cache}\ninactive_file {cache // 4}\nactive_file {cache - cache // 4}"
        return {"memory.max": limit, "memory.current": used, "memory.stat": stat}
    stat = f"cache 7\ninactive_file 3\nactive_file 4\ntotal_inactive_file {cache}\ntotal_active_file 0"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


def under(path: str, files: dict[str, object]) -> dict[str, object]:
    return {f"{path}/{name}": text for name, text in files.items()}


def test_without_limits_it_is_what_the_system_calls_available(tmp_path: Path) -> None:
    """By /proc/meminfo, where there is one: what is empty (MemFree) is another figure."""
    found, meminfo = available_bytes(CPU, tmp_path), Path("/proc/meminfo")
    assert found == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    if meminfo.exists():
        (said,) = re.findall(r"MemAvailable: +(\d+) kB", meminfo.read_text())
        assert found == pytest.approx(int(said) * 1024, rel=0.2)


def test_a_containers_limit_counts_and_its_page_cache_is_free(tmp_path: Path) -> None:
    root = tree(tmp_path, "0::/", under("sys/fs/cgroup", group(GB // 4, GB // 5, GB // 10)))
    assert available_bytes(CPU, root) == GB // 4 - GB // 5 + GB // 10


def test_a_limit_above_counts_too_and_max_is_none(tmp_path: Path) -> None:
    files = {
        **under("sys/fs/cgroup/user/job", group("max", 1000, 0)),
        **under("sys/fs/cgroup/user", group(5000, 3000, 400)),
        "sys/fs/cgroup/cgroup.procs": "",
    }
    assert available_bytes(CPU, tree(tmp_path, "0::/user/job", files)) == 5000 - 3000 + 400


def test_a_limit_of_version_1_even_by_a_path_of_the_host(tmp_path: Path) -> None:
    groups = "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/"
    root = tree(tmp_path, groups, under("sys/fs/cgroup/memory", group(7000, 2000, 500, version=1)))
    assert available_bytes(CPU, root) == 7000 - 2000 + 500
    inside = {
        **under("sys/fs/cgroup/memory", group(UNLIMITED_V1, 9000, 0, version=1)),
        **under("sys/fs/cgroup/memory/docker/abc", group(4000, 5000, 0, version=1)),
    }
    assert available_bytes(CPU, tree(tmp_path, groups, inside)) == 0  # above its limit: nothing is left


def test_what_may_be_held_is_half_of_what_is_given_or_there() -> None:
    assert Resources(memory_bytes=16 * GB).held_bytes(CPU) == 8 * GB
    assert Resources().held_bytes(CPU) == pytest.approx(psutil.virtual_memory().available / 2, rel=0.3)


def used(resources: Resources, *folders: Path) -> AbstractContextManager[None]:
    return resources.used(*(folder / THREADS for folder in folders))


def test_a_run_keeps_the_count_of_threads_that_it_began_with(tmp_path: Path) -> None:
    """A new run takes what is asked for, or torch's own; later commands what the run has, and no other."""
    before, run = torch.get_num_threads(), tmp_path / "run"
    with used(Resources(threads=3), run):
        (run / "result").touch()
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
    with used(Resources(), run):
        assert torch.get_num_threads() == 3
    with used(Resources(threads=3), run, tmp_path / "cache"):
        assert torch.get_num_threads() == 3
    with (
        pytest.raises(StaleError, match=r"run was begun with 3 threads, and this would be 1: .*; give --threads 3, or"),
        used(Resources(threads=1), run),
    ):
        pass
    with used(Resources(), tmp_path / "other"):
        (tmp_path / "other" / "result").touch()
        assert torch.get_num_threads() == before
    if before != 3:
        with pytest.raises(StaleError, match="give --threads"), used(Resources(), run, tmp_path / "other"):
            pass
    with pytest.raises(InputError, match="--threads is 0; wanted 1 or more"), used(Resources(threads=0), run):
        pass
    assert torch.get_num_threads() == before


def test_the_count_stands_in_a_run_before_anything_else_and_a_refused_command_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "out" / "moesaic"
    with pytest.raises(InputError, match="refused"), used(Resources(threads=2), run):
        assert json.loads((run / "threads.json").read_text())["threads"] == 2
        raise InputError("refused")
    assert not any(tmp_path.iterdir())
    (tmp_path / "out").write_text("a file")
    with used(Resources(threads=2), run):  # what is in its way is the command's to tell
        assert torch.get_num_threads() == 2
    with pytest.raises(KeyboardInterrupt), used(Resources(threads=2), tmp_path / "run"):
        (tmp_path / "run" / "states").touch()
        raise KeyboardInterrupt
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"threads.json", "states"}
