"""Runs in MLflow's store: experiment, parent run, child runs; records of wmtp.tracking in, batches of MlflowClient out.

The store is MLFLOW_TRACKING_URI where that is set, else a database and an artifact folder in the directory `home`. Importing this
module imports nothing heavy; the first Run imports mlflow, which takes about two seconds.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXPERIMENT = "wmtp"
LOCK_SECONDS = 60.0  # for the making of a new database, up to 9 s on a busy machine, by several stages in turn
KEY_LIMIT, VALUE_LIMIT, TAG_LIMIT = 250, 6000, 5000  # characters; mlflow's own limits, for tags those of its oldest servers
BATCH_METRICS, BATCH_PARAMS = 1000, 100


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{'a': {'b': [1]}} as {'a.b': '[1]'}, keys and values within mlflow's limits."""
    found: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            found[name(f"{prefix}{key}")] = text[:VALUE_LIMIT]
    return found


def name(text: str) -> str:
    """`text` with the characters that mlflow takes in a name (pass@1 becomes pass_at_1), at most KEY_LIMIT of them."""
    text = re.sub(r"[^\w. /-]", "_", text.replace("@", "_at_"))
    if len(text) <= KEY_LIMIT:
        return text
    return f"{text[: KEY_LIMIT - 9]}-{hashlib.sha1(text.encode()).hexdigest()[:8]}"


class Run:
    """One child run, with its parent and experiment; each is made by whoever comes first, under a lock in `home`.

    `start` is the first record of a stage: stage, key, params, tags, time. The file `note` keeps the run's id, so that a second
    delivery of the same records goes on with that run.
    """

    def __init__(self, home: Path, start: dict[str, Any], note: Path):
        from filelock import FileLock
        from mlflow.tracking.client import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
        # The lock covers the client too: four first clients of a new database break each other's schema.
        with FileLock(home / "lock", timeout=LOCK_SECONDS):
            self.client = MlflowClient(uri)
            experiment = self._experiment(uri, home)
            self.parent = self._parent(experiment, start["key"])
            self.id = self._child(experiment, start, note)

    def _experiment(self, uri: str, home: Path) -> str:
        if found := self.client.get_experiment_by_name(EXPERIMENT):
            return found.experiment_id
        remote = uri.startswith(("http:", "https:", "databricks"))  # a server has its own place for artifacts
        return self.client.create_experiment(EXPERIMENT, artifact_location=None if remote else (home / "artifacts").as_uri())

    def _parent(self, experiment: str, key: str) -> str:
        query = f"tags.`wmtp.key` = '{key}' and tags.`wmtp.role` = 'parent'"
        if found := self.client.search_runs([experiment], query, max_results=1):
            return found[0].info.run_id
        return self.client.create_run(experiment, tags={"wmtp.key": key, "wmtp.role": "parent"}, run_name=key).info.run_id

    def _child(self, experiment: str, start: dict[str, Any], note: Path) -> str:
        if note.exists():
            return note.read_text()
        tags = {key: value[:TAG_LIMIT] for key, value in start["tags"].items()}
        tags |= {"wmtp.key": start["key"], "wmtp.role": "stage", "mlflow.parentRunId": self.parent}
        run_id = self.client.create_run(experiment, start["time"], tags, run_name=start["stage"]).info.run_id
        note.write_text(run_id)
        return run_id

    def write(self, records: list[dict[str, Any]]) -> bool:
        """Sends the records as few requests; true when they contain the end of the stage."""
        from mlflow.entities import Metric, Param

        params = [Param(key, value) for record in records for key, value in record.get("params", {}).items()]
        metrics = [
            Metric(name(key), value, record["time"], record["step"])
            for record in records
            for key, value in record.get("metrics", {}).items()
        ]
        for part in _parts(params, BATCH_PARAMS):
            self.client.log_batch(self.id, params=part)
        for part in _parts(metrics, BATCH_METRICS):
            self.client.log_batch(self.id, metrics=part)
        for record in records:
            if "artifact" in record:
                self._artifact(Path(record["artifact"]))
            if "end" in record:
                self.client.set_terminated(self.id, record["end"], record["time"])
                self.client.set_terminated(self.parent, record["end"], record["time"])
                return True
        return False

    def _artifact(self, path: Path) -> None:
        if path.is_dir():
            self.client.log_artifacts(self.id, str(path), path.name)
        else:
            self.client.log_artifact(self.id, str(path))


def _parts(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
