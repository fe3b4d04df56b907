"""SAM3 on two ranks: a rank without any concept neither hangs the other nor changes what it learns."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import object_sets
import pytest
import torch
import torch.distributed as dist
from test_sam3_module import make_batch, module
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_shards.batch import TripletBatch, collate
from trainer.losses import SetPredictionLoss
from trainer.modules import SAM3Module
from trainer.prompts import Exemplars

BATCHES = {"one rank has nothing": (True, False), "both have something": (True, True)}


class Step(nn.Module):
    """What DDP wraps: its forward pass is a training step."""

    def __init__(self, made: SAM3Module) -> None:
        super().__init__()
        self.made = made

    def forward(self, batch: TripletBatch) -> Tensor:
        return self.made.training_step(batch, 0)


def made() -> SAM3Module:
    loss = SetPredictionLoss(mask_weight=200.0, dice_weight=10.0, mask_chunk=2)
    return module(loss=loss, exemplars=Exemplars(share=0.5, seed=1)).train()


def gradients(made: SAM3Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def rank_main(rank: int, port: int, case: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    learner = made()
    step = DistributedDataParallel(Step(learner))  # unused parameters would be an error in the second step
    for _ in range(2):
        learner.zero_grad()
        step(make_batch() if BATCHES[case][rank] else collate([])).backward()
    torch.save(gradients(learner), Path(out) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("case", BATCHES)
def test_a_step_on_two_ranks(case: str, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    arguments = (object_sets.free_port(), case, str(tmp_path))
    torch.multiprocessing.start_processes(rank_main, arguments, nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    full = sum(BATCHES[case])
    alone = made()
    alone.training_step(make_batch(), 0).backward()
    expected = gradients(alone)
    assert first.keys() == second.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(first[name], second[name])
        # the same prompts once or twice: means stay, and their number's square root is a factor
        torch.testing.assert_close(first[name], gradient * sqrt(full), msg=name, rtol=1e-3, atol=1e-4)
