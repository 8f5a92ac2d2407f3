"""What ranks do together: slow work, the index of tar files that one makes for all, the choice of a back end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from sam2fast import recipe
from sam2fast.config import Config, ConfigError, DatasetConfig, UserError
from sam2fast.data.formats import sa1b
from sam2fast.data.synthetic import write_dataset
from sam2fast.parallel import HERE, Ranks, mesh
from sam2fast.parallel.fsdp import ranks_of_a_node


class ThreadRanks(Ranks):
    """Two ranks that are threads of this process and gather through `told`."""

    told: list[Any] = [None, None]
    barrier_of_threads = threading.Barrier(2, timeout=60)
    rounds = 0

    def gather(self, value: Any) -> list[Any]:
        cls = ThreadRanks
        cls.told[self.rank] = value
        cls.barrier_of_threads.wait()
        values = list(cls.told)
        cls.rounds += self.main
        cls.barrier_of_threads.wait()
        return values


def on_both(body: Callable[[Ranks], Any]) -> list[Any]:
    """Result, or error, of each rank."""
    ThreadRanks.barrier_of_threads.reset()
    ranks = [ThreadRanks(rank, 2, rank, torch.device("cpu")) for rank in range(2)]

    def of(rank: Ranks) -> Any:
        try:
            return body(rank)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(of, ranks))


def test_ranks_that_wait_hear_from_those_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "_STILL_BUSY", 0.01)

    def body(ranks: Ranks) -> int:
        first = ThreadRanks.rounds

        def work() -> int:
            while ranks.rank and ThreadRanks.rounds < first + 5:
                threading.Event().wait(0.01)
            return ranks.rank

        return ranks.agree(work, slow="work")

    assert on_both(body) == [0, 1]


def test_who_waits_for_slow_work_is_seen_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "_STILL_BUSY", 0.01)
    this, deadline = threading.current_thread(), time.monotonic() + 60
    monkeypatch.setattr(threading, "main_thread", lambda: this)
    ThreadRanks.barrier_of_threads.reset()
    waiting, working = (ThreadRanks(rank, 2, rank, torch.device("cpu")) for rank in range(2))

    def work() -> list[str]:
        while HERE.collective != "slow work of other ranks" and time.monotonic() < deadline:
            time.sleep(0.01)
        first, since = ThreadRanks.rounds, HERE.since
        while ThreadRanks.rounds < first + 3:  # which are no progress of the rank that waits
            time.sleep(0.01)
        return [HERE.collective, *(each.what for each in HERE.works if HERE.since == since)]

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(working.agree, work, slow="counting objects")
        waiting.agree(lambda: None, slow="counting objects")
        assert result.result() == ["slow work of other ranks", "counting objects"]
    assert not HERE.works and not HERE.collective


def test_ranks_in_a_group_of_their_own_use_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh.dist, "new_group", lambda **_: "its group")
    used = []
    monkeypatch.setattr(mesh.dist, "barrier", lambda group: used.append(group))
    for name in ("all_reduce", "broadcast_object_list", "all_gather_object"):
        monkeypatch.setattr(mesh.dist, name, lambda *_, group, **__: used.append(group))
    ranks = Ranks(0, 2, 0, torch.device("cpu"))
    for each in (ranks, ranks.beside(1.0)):
        each.barrier()
        each.sum(torch.zeros(1))
        each.broadcast(1)
        each.gather(1)
    assert used == [None] * 4 + ["its group"] * 4


def test_a_mistake_ends_both_ranks() -> None:
    def fail() -> None:
        raise UserError("a mistake")

    mistake, ended = on_both(lambda ranks: ranks.agree(fail if ranks.main else int, slow="work"))
    assert isinstance(mistake, UserError) and isinstance(ended, SystemExit)


@pytest.mark.filterwarnings("ignore:what was read from")
@pytest.mark.parametrize("kept", [True, False])
def test_first_rank_scans_for_the_others(kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "data", "sa1b", 2, size=(64, 96), tar=True)
    (tar,) = (tmp_path / "data").rglob("*.tar")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    if not kept:
        tar.with_name(f"{tar.name}.members.npz").mkdir()  # also where tests run as root
    scans, read_tar = [], sa1b._read_tar
    monkeypatch.setattr(sa1b, "_read_tar", lambda path: (scans.append(path), read_tar(path))[1])

    def body(ranks: Ranks) -> int:
        return len(recipe._open_datasets({"data": DatasetConfig(root=str(tmp_path / "data"))}, 0, ranks)["data"])

    assert on_both(body) == [2, 2]
    assert len(scans) == (1 if kept else 2)


def test_index_that_cannot_be_kept_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "data", "sa1b", 2, size=(64, 96), tar=True)
    (tar,) = (tmp_path / "data").rglob("*.tar")
    tar.with_name(f"{tar.name}.members.npz").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept in .* reads it again at every start"):
        recipe.open_dataset(DatasetConfig(root=str(tmp_path / "data")), "data", 0)


@pytest.mark.parametrize("installed, chosen", [((0,), "opencv"), ((0, 1), "dali")])
def test_ranks_render_with_the_same_back_end(
    installed: tuple[int, ...], chosen: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(recipe, "choose_backend", lambda _, device: "dali" if device.index in installed else "opencv")
    data, stage = {"datasets": {"a": {"root": "a"}}}, {"name": "s", "steps": 1, "data": [{"dataset": "a"}]}
    config = Config(name="x", data=data, stages=[stage])
    decoders = on_both(
        lambda ranks: recipe._decoder(config, replace(ranks, device=torch.device("cpu", ranks.rank))),
    )
    assert [decoder is not None for decoder in decoders] == [chosen == "dali"] * 2
    assert ("takes opencv on all ranks, because rank 1 has no DALI" in capsys.readouterr().out) == (chosen == "opencv")


def test_ranks_of_a_node_are_counted_by_host() -> None:
    assert ranks_of_a_node(["a", "a", "b", "b"]) == 2 and ranks_of_a_node(["a"] * 3) == 3
    for hosts in (["a", "a", "b"], ["a", "b", "a", "b"]):
        with pytest.raises(ConfigError, match="as many ranks on every node, with neighboring numbers"):
            ranks_of_a_node(hosts)


def test_restarts_on_several_nodes_need_a_store_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in (values | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(mesh.free_port())}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        mesh.connect(timedelta(seconds=5))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        mesh.connect(timedelta(seconds=5))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # of this node alone
    mine = mesh.connect(timedelta(seconds=5), serve=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    mine.set("key", "value")
    assert mesh.connect(timedelta(seconds=5)).get("key") == b"value"
