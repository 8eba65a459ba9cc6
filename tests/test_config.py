"""What a sweep is told: files, options and --set, each mistake with its line and its remedy."""

import pytest

from patternsearch.config import SweepConfig, load_config, saved_config
from patternsearch.errors import ConfigError
from patternsearch.files import find, shipped


def test_a_name_a_path_or_a_task(here):
    assert load_config("digits").task == "digits"
    assert load_config("sweep.yaml").train.epochs == 2
    bare = load_config("my_module:MyTask")  # no file of that name: a task with the defaults
    assert bare == SweepConfig(task="my_module:MyTask")


def test_command_line_wins_over_the_file(here):
    changes = [
        "train.lr=1e-3",
        "caps.parameters=5e3",
        "trials=7",
        "objectives={accuracy: maximize}",
    ]
    config = load_config("sweep.yaml", changes, trials=9, time=None)
    assert config.train.lr == 1e-3 and config.train.batch == 50
    assert config.caps.parameters == 5000
    assert config.trials == 9 and config.time is None
    assert config.objectives == {"accuracy": "maximize"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("task: digits\ntrian: {epochs: 3}", "bad.yaml, line 2: unknown key 'trian'. Did you mean"),
        ("task: digits\ntrain:\n  epoch: 3", "bad.yaml, line 3: unknown key 'train.epoch'. Did"),
        ("task: digits\ntrain: {epochs: three}", "line 2: train.epochs: got 'three'"),
        ("task: digits\ntrials: 0", "line 2: trials: got 0; input should be greater than or equal"),
        ("task: digits\ntrain: 3", "line 2: train: got 3"),
        ("task: digits\nsampler: tpee", "'random' or 'structured'. Did you mean 'tpe'"),
        ("task: digits\nsampler: 5", "got 5; input should be 'tpe', 'gp', 'nsga2', 'random' or"),
        ("task: digits\nobjectives: {accuracy: up}", "'maximize' or 'minimize'"),
        ("task: digits\nresources: {cpu: 0}", "resources.cpu: got 0"),
        ("task: digits\ncaps: {parameters: -1}", "caps.parameters: got -1"),
        ("trials: 3", "bad.yaml: 'task' is missing"),
        ("task: ''", "must name a task"),
        ("task: [digits]", "line 1: task: got ['digits']"),
        ("- digits", "expected a mapping such as 'task: digits'"),
        ("", "expected a mapping such as 'task: digits'"),
    ],
)
def test_mistakes_in_a_file(here, text, message):
    (here / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config("bad.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ("trails=3", "--set trails=3: unknown key 'trails'. Did you mean 'trials'?"),
        ("trials=many", "--set trials=many: trials: got 'many'"),
        ("train.lrr=1", "--set train.lrr=1: unknown key 'train.lrr'. Did you mean 'lr'?"),
        ("trian.lr=1", "--set trian.lr=1: unknown key 'trian'. Did you mean 'train'?"),
        ("train=3", "--set train=3: train: got 3"),
        ("train.lr=.inf", "train.lr: got inf; input should be a finite number"),
        ("trial_time=.inf", "trial_time: got inf; input should be a finite number"),
        ("task=''", "task: got ''; must name a task"),
        ("trials", "expected key=value, such as train.lr=1e-2"),
        ("=3", "expected key=value"),
        ("trials.x=3", "'trials' has no keys below it"),
        ("trials=[1", "the value is not YAML"),
        ("seed=!!python/name:os.system", "the value is not YAML"),
    ],
)
def test_mistakes_in_set(here, change, message):
    with pytest.raises(ConfigError) as caught:
        load_config("sweep.yaml", [change])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_option_is_named_as_it_is_typed(here):
    with pytest.raises(ConfigError, match=r"^--trials: trials: got 0"):
        load_config("sweep.yaml", trials=0)


def test_saved_configurations_come_back(here):
    config = load_config("sweep.yaml", ["caps.flops=1e6"], storage="sqlite:///s.db")
    from patternsearch.yamlfile import write_yaml

    write_yaml(here / "kept.yaml", config.model_dump(exclude_none=True))
    assert saved_config(here / "kept.yaml") == config
    (here / "kept.yaml").write_text("task: digits\ntrails: 3\n")
    with pytest.raises(ConfigError, match=r"kept\.yaml, line 2: unknown key 'trails'"):
        saved_config(here / "kept.yaml")


def test_files_by_name_and_by_path(here):
    assert find("configs", "digits", ConfigError) == shipped("configs")["digits"]
    assert find("configs", "sweep.yaml", ConfigError).name == "sweep.yaml"
    with pytest.raises(ConfigError, match=r"no file none\.yaml; give an existing YAML file or one"):
        find("configs", "none.yaml", ConfigError)
    with pytest.raises(ConfigError, match=r"'digit'\. Did you mean 'digits.*Or give a path"):
        find("configs", "digit", ConfigError)
