"""A sweep on a real cluster: Ray on three nodes of this machine."""

import warnings
from pathlib import Path

import optuna
import pytest
from support import end_session, start, wait_for

from patternsearch.search.study import trained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mlflow.tracking import MlflowClient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
]


def check(storage: str | None, folder: Path, name: str, uri: str, count: int) -> None:
    """Study and record agree; so many trials, none left open."""
    url = storage or optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(folder / "sweeps" / name / "study.log"))
    )
    found = optuna.load_study(study_name=name, storage=url).get_trials()
    ran = [t for t in found if trained(t)]
    assert len(ran) == count and {t.state.name for t in ran} <= {"COMPLETE", "PRUNED"}
    assert not {t.state.name for t in found} & {"RUNNING", "WAITING"}
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("digits")
    kept = client.search_runs([experiment.experiment_id], max_results=1000)
    parent = next(r for r in kept if r.info.run_name == name)
    assert parent.info.status == "FINISHED"
    assert "best.yaml" in {f.path for f in client.list_artifacts(parent.info.run_id)}
    children = {int(r.data.tags["trial"]): r for r in kept if "trial" in r.data.tags}
    assert {t.number for t in ran} <= set(children)
    assert not any(r.info.status == "RUNNING" for r in kept)


def test_a_cluster_that_loses_a_node(stocked):
    """Three nodes, each with room for one worker; one of them goes in mid-sweep."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        options = ("--name", "wide", "--trials", "9", "--address", cluster.address)
        options += ("--executor", "ray", "--set", "train.epochs=60", "--set", "pruner=none")
        process = start(stocked, "sweep", "sweep.yaml", *options)
        log = stocked / "sweeps" / "wide" / "study.log"
        try:
            text = '"intermediate_value"'
            wait_for(lambda: log.exists() and text in log.read_text(), 120, "a report")
            cluster.remove_node(nodes[0], allow_graceful=False)
            out, err = process.communicate(timeout=300)
        finally:
            end_session(process)
        assert process.returncode == 0, out + err
    finally:
        cluster.shutdown()
    check(None, stocked, "wide", f"sqlite:///{stocked / 'sweeps' / 'mlflow.db'}", 9)
