"""MLflow: figures as metrics, settings as params, document, card and table as artifacts.

Where it goes to is MLFLOW_TRACKING_URI's matter. The client alone is used, which tells a server
nothing of who ran what in which folder.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

from llm_coreml.errors import TrackerError
from llm_coreml.eval.trackers.record import Record

_EXPERIMENT = "llm-coreml"
# MLflow takes no longer value of a param from an older server.
_LONGEST = 500
# Its own would wait for minutes for a server that is down.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


@dataclass(frozen=True)
class MlflowSink:
    """Logs to MLflow.

    Attributes:
        place: The experiment, made if it is not there; empty for MLFLOW_EXPERIMENT_NAME, or else
            llm-coreml.
    """

    place: str = ""

    def log(self, record: Record) -> str:
        """Log a run, and return its experiment's and its own address at the server."""
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        import mlflow
        from mlflow.entities import Metric, Param

        where = mlflow.get_tracking_uri()
        _check_store(where)
        client = mlflow.MlflowClient(where)
        made = datetime.datetime.strptime(record.created, "%Y-%m-%dT%H:%M:%SZ")
        begun = int(made.replace(tzinfo=datetime.timezone.utc).timestamp() * 1000)
        experiment = self._experiment(client)
        run = client.create_run(experiment, start_time=begun, run_name=record.name)
        name = run.info.run_id
        try:
            client.log_batch(
                name,
                metrics=[Metric(key, value, begun, 0) for key, value in record.metrics.items()],
                params=[Param(key, str(v)[:_LONGEST]) for key, v in record.config.items()],
            )
            client.log_dict(name, dict(record.document), "results.json")
            if record.card:
                client.log_text(name, record.card, "README.md")
            columns, rows = record.models
            table = {key: [row[at] for row in rows] for at, key in enumerate(columns)}
            client.log_table(name, table, "models.json")
        except BaseException:
            client.set_terminated(name, "FAILED")
            raise
        client.set_terminated(name)
        return f"{where.rstrip('/')}/#/experiments/{experiment}/runs/{name}"

    def _experiment(self, client: Any) -> str:
        name = self.place or os.environ.get("MLFLOW_EXPERIMENT_NAME") or _EXPERIMENT
        found = client.get_experiment_by_name(name)
        return str(found.experiment_id if found else client.create_experiment(name))


def _check_store(uri: str) -> None:
    """Say what is missing where MLflow would keep runs in a database of its own.

    Raises:
        TrackerError: as said.
    """
    if uri.partition(":")[0] == "sqlite" and importlib.util.find_spec("sqlalchemy") is None:
        raise TrackerError(
            "MLFLOW_TRACKING_URI names no server, and what keeps runs on this machine is not "
            "installed: set it, or pip install mlflow"
        )
