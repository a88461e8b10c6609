"""More memory than there is: refused before it is taken, and what there is counts the limits of containers."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from headrace.config import EngineConfig
from headrace.engine.sizing import choose_pages
from headrace.errors import CapacityError
from headrace.memory import GIB, available_memory_bytes, check_memory, group_room_bytes, size
from headrace.models.checkpoint import load_model
from tools.bad_input import Bench

CPU = torch.device("cpu")


def groups(tmp_path: Path, version: int, limits: dict[str, tuple[str, int, int]]) -> list[int]:
    """Room below the given groups: limit, usage, and bytes of cached files."""
    names = ("memory.max", "memory.current", "inactive_file")
    base = root = tmp_path / "cgroup"
    if version == 1:
        names, base = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), root / "memory"
    for path, (limit, used, cached) in limits.items():
        (base / path).mkdir(parents=True, exist_ok=True)
        (base / path / names[0]).write_text(f"{limit}\n")
        (base / path / names[1]).write_text(f"{used}\n")
        (base / path / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")
    mine = tmp_path / "self"
    mine.write_text("0::/a/b\n" if version == 2 else "5:cpu,cpuacct:/x\n4:memory:/a/b\n0::/\n")
    return sorted(group_room_bytes(mine, root))


@pytest.mark.parametrize("version", [1, 2])
def test_containers_are_limits(version: int, tmp_path: Path) -> None:
    limits = {"a/b": ("1000", 400, 100), "a": ("5000", 4900, 0), "": ("8000", 9000, 0)}
    assert groups(tmp_path, version, limits) == [0, 100, 700]


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_that_sees_only_its_own_group(version: int, tmp_path: Path) -> None:
    assert groups(tmp_path, version, {"": ("3000", 1000, 0)}) == [2000]


def test_groups_without_limits(tmp_path: Path) -> None:
    assert groups(tmp_path, 2, {"a/b": ("max", 400, 100)}) == []
    assert group_room_bytes(tmp_path / "none") == []


def test_the_least_of_all_is_available() -> None:
    with mock.patch("headrace.memory._machine_bytes", return_value=10 * GIB):
        with mock.patch("headrace.memory.group_room_bytes", return_value=[]):
            assert available_memory_bytes(CPU) == 10 * GIB
        with mock.patch("headrace.memory.group_room_bytes", return_value=[3 * GIB, 20 * GIB]):
            assert available_memory_bytes(CPU) == 3 * GIB
            check_memory("it takes", 3 * GIB, CPU, "lower it")
            with pytest.raises(CapacityError, match=r"^it takes 4.00 GiB; 3.00 GiB are available on cpu: lower it$"):
                check_memory("it takes", 4 * GIB, CPU, "lower it")
    assert available_memory_bytes(CPU) > 0


def test_sizes_are_shown_in_their_unit() -> None:
    assert [size(n) for n in (0, 50, 300, 2**20, GIB // 2, 2000 * GIB)] == [
        "0 bytes",
        "50 bytes",
        "0.29 KiB",
        "1.00 MiB",
        "0.50 GiB",
        "2,000.00 GiB",
    ]


def test_a_model_is_refused_before_anything_is_allocated(bench: Bench) -> None:
    path = bench.copy(hidden_size=2**14, intermediate_size=2**14, vocab_size=2**20)
    with pytest.raises(CapacityError, match=r"the model in float32 takes [\d.]+ GiB; 8.00 GiB are available"):
        load_model(path, device="cpu", load_format="random")
    with mock.patch("headrace.memory._machine_bytes", return_value=10**4):
        for dtype, needed in (("float64", "100.62 KiB"), ("bfloat16", "26.16 KiB")):
            with pytest.raises(CapacityError, match=f"the model in {dtype} takes {needed}"):
                load_model(bench.model, device="cpu", dtype=dtype)


def test_a_cache_that_just_fits(bench: Bench) -> None:
    """One page less than the memory holds is taken, one more is not."""
    engine = bench.llm.engine
    config = EngineConfig(num_pages=50, page_size=4)
    page_bytes = engine.cache.allocated_bytes // engine.cache.n_pages
    for room, fits in ((50 * page_bytes, True), (50 * page_bytes - 1, False)):
        with mock.patch("headrace.memory._machine_bytes", return_value=room):
            if fits:
                assert choose_pages(config, engine.cache.groups, CPU, 64) == 50
                continue
            with pytest.raises(CapacityError, match="num_pages is 50, which takes"):
                choose_pages(config, engine.cache.groups, CPU, 64)
