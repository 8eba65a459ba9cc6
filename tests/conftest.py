import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported

torch.set_num_threads(1)  # the test tensors are tiny: threads cost more than they save

SPACE = """\
train:
  lr: {float: [1e-3, 2.0e-2], log: true}
assignment:
  width: {int: [4, 12], step: 4}
  stem:
    mixer:
      positions:
        family: banded
        lower: {int: [0, 1]}
        upper: {same_as: lower}
        entry: {family: dense}
    stride: 2
    activation: relu
  blocks:
    repeat: {int: [0, 2]}
    each:
      one_of:
        conv:
          mixer:
            positions:
              {family: banded, lower: 1, upper: 1, entry: {families: [dense, diagonal]}}
          norm: none
          residual: false
          activation: relu
        attention:
          mixer:
            order: 3
            positions: {family: dense}
            heads: {choice: [1, 2]}
            maps:
              query: {family: dense}
              key: {family: dense}
              value: {family: dense}
              output: {family: dense}
        mlp:
          channel: [{families: [dense, low_rank]}]
  head: {regions: {choice: [1, 2]}}
experts:
  cnn:
    width: 8
    stem.mixer.positions.lower: 1
    blocks: 1
    block0: conv
    block0.conv.mixer.positions.entry: dense
    head.regions: 2
    train.lr: 0.01
"""
SWEEP = """\
task: digits
space: small.yaml
trials: 4
executor: inline
train: {epochs: 2, batch: 50}
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with a small space and a sweep over it."""
    monkeypatch.chdir(tmp_path)
    write_sweep(tmp_path)
    return tmp_path


def write_sweep(folder: Path) -> None:
    (folder / "small.yaml").write_text(SPACE)
    (folder / "sweep.yaml").write_text(SWEEP)


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """A small untrained pattern for the digits, as YAML with its weights beside it."""
    from patternsearch import Assignment, Block, Head, Mixer, Stem, build_model
    from patternsearch.export import make_export, save, save_weights, weights_path
    from patternsearch.patterns.banded import Banded
    from patternsearch.patterns.dense import Dense
    from patternsearch.patterns.monarch import Monarch
    from patternsearch.task import get_task

    task = get_task("digits")
    conv = Mixer(positions=Banded(entry=Dense()))
    assignment = Assignment(
        width=8,
        stem=Stem(mixer=conv, stride=2, activation="relu"),
        blocks=(Block(channel=(Monarch(blocks=2), Dense())),),
        head=Head(regions=2),
    )
    train = {"epochs": 2, "batch": 50}
    export = make_export(task, "digits", assignment.to_dict(), train, 0, {}, {"sweep": "none"})
    path = tmp_path_factory.mktemp("exported") / "best.yaml"
    save(export, path)
    model = build_model(assignment, task.spec)
    for parameter in model.parameters():  # a fresh head is zero and would hide everything before it
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    save_weights(model, weights_path(path))
    return path
