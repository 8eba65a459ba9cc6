"""Our AdamW is torch's."""

import subprocess
import sys

import pytest
import torch

from patternsearch.optimizer import AdamW


def groups(params):
    return [
        {"params": params[:2], "lr": 1e-2, "weight_decay": 0.1},
        {"params": params[2:], "lr": 3e-2, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_numbers_are_those_of_torch(kind):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator, dtype=kind) for s in [(4, 3), (5,), (2, 2), (3,)]]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    a, b = AdamW(groups(ours)), torch.optim.AdamW(groups(theirs), fused=True)
    for step in range(6):
        for optimizer in (a, b):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            optimizer.zero_grad()
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            if (step + i) % 3:  # some have no gradient
                p.grad = torch.randn(p.shape, generator=generator, dtype=kind)
                q.grad = p.grad.clone()
        a.step()
        b.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], start[0])


def test_training_does_not_load_the_compiler():
    code = (
        "import sys; from patternsearch.train import *; from patternsearch.task import open_task\n"
        "from patternsearch.space import load_space; import torch\n"
        "task, data = open_task('digits'); space = load_space(task.space)\n"
        "assignment = space.point(space.experts['cnn'])[1]\n"
        "settings = TrainSettings(epochs=1)\n"
        "run(assignment, task, Splits(data, torch.device('cpu')), settings)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
