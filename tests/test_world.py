import json

import pytest
import torch
from torch import nn

from tests.conftest import run_ranks
from tests.test_model import GROUPED, random_model
from wmtp.critic import Critic
from wmtp.world import World, blocks_of, joined, pick_device

ALONE = World(0, 1, torch.device("cpu"))


def test_one_process_needs_no_group():
    with joined("cpu") as world:
        assert world == ALONE and world.is_first
        assert not torch.distributed.is_initialized()
        world.barrier()


def test_sums_are_float64_and_detached():
    values = torch.tensor([1.5, 2.0], requires_grad=True)
    total = ALONE.sum(values)
    assert total.dtype == torch.float64 and total.tolist() == [1.5, 2.0] and not total.requires_grad
    assert ALONE.sum(torch.tensor(3)).item() == 3.0


def test_one_process_gathers_itself_and_wraps_nothing():
    model = nn.Linear(2, 2)
    assert ALONE.gather({"a": 1}) == [{"a": 1}]
    assert ALONE.wrap(model, "ddp") is model and ALONE.wrap(model, "fsdp") is model


def test_blocks_are_the_trunks_and_the_heads_once_each_also_within_a_critic():
    model = random_model()
    expected = [*model.layers, *model.extra_heads]
    assert len(expected) == GROUPED.n_layers
    for found in (blocks_of(model), blocks_of(Critic(model))):
        assert [id(block) for block in found] == [id(block) for block in expected]


def test_a_named_device_must_have_room_for_every_rank():
    assert pick_device("cpu", 64) == "cpu"
    with pytest.raises(ValueError, match=r"run\.device cuda: \d+ processes on this machine, found \d+ of them; lower run\.n_processes"):
        pick_device("cuda", torch.cuda.device_count() + 1)


def test_auto_takes_accelerators_only_where_each_rank_has_one_of_its_own():
    n_cuda, n_mps = torch.cuda.device_count(), int(torch.backends.mps.is_available())
    assert pick_device("auto", 1) == ("cuda" if n_cuda else "mps" if n_mps else "cpu")
    assert pick_device("auto", max(n_cuda, n_mps) + 1) == "cpu"


def two_ranks(out):
    """What each rank of a real group sees."""
    with joined("cpu") as world:
        tiny = 2.0**-40
        total = world.sum(torch.tensor([1.0 + world.rank, tiny if world.rank else 1.0]))
        gathered = world.gather({"rank": world.rank, "text": "ä" * (world.rank + 1)})
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        wrapped = world.wrap(model, "ddp")
        wrapped(torch.tensor([[3.0 + 4 * world.rank]])).sum().backward()
        world.barrier()
        found = {
            "world": [world.rank, world.size, world.is_first, str(world.device)],
            "sum": total.tolist(), "exact": total[1].item() == 1 + tiny, "empty": world.sum(torch.zeros(0)).tolist(),
            "gathered": gathered, "gradient": model.weight.grad.item(),
        }  # fmt: skip
    assert not torch.distributed.is_initialized()
    with open(f"{out}/{world.rank}.json", "w") as file:
        json.dump(found, file)


@pytest.mark.slow
def test_two_ranks_sum_gather_and_average(tmp_path):
    ends = run_ranks("tests.test_world", "two_ranks", tmp_path)
    assert [code for code, _ in ends] == [0, 0], ends
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["world"] == [0, 2, True, "cpu"] and second["world"] == [1, 2, False, "cpu"]
    assert first["sum"] == second["sum"] and first["sum"][0] == 3.0 and first["exact"], "a sum of ranks keeps float64's digits"
    assert first["gathered"] == [{"rank": 0, "text": "ä"}, {"rank": 1, "text": "ää"}] and second["gathered"] is None
    assert first["gradient"] == second["gradient"] == 5.0 and first["empty"] == []
