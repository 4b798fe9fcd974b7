"""Ray Train's side of tracking: rank 0's reports go to MLflow from the controller, which outlives every worker.

Never runs in a training worker, so no worker waits for MLflow or writes to it.
"""

from __future__ import annotations

import contextlib
from typing import Any

from ray.train import UserCallback

from sane_ray.tracking import Tracker


class TrackingCallback(UserCallback):
    """Logs the points under ``"history"`` in rank 0's report; for ``ray.train.RunConfig(callbacks=[...])``.

    Steps that were logged before are left out: after a restart, training repeats those since its last checkpoint.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._kept: dict[str, list[dict[str, float]]] = {"history": [], "evaluations": []}

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray Train's controller when every worker has reported.

        Args:
            run_context: of the training run; not used.
            metrics: one report a worker, by rank. Rank 0's may hold ``"history"``: points as `Tracker.log` takes them,
                ``"evaluations"``: further points of steps that were logged before, and ``"rewound_to"``: the step that
                training has gone back to, whose followers come again with other values.
            checkpoint: of this report, or None; not used.
        """
        if (step := metrics[0].get("rewound_to")) is not None:
            self._tracker.rewind(step)
        for name, kept in self._kept.items():
            kept += metrics[0].get(name, ())
            with contextlib.suppress(OSError):  # the spool's disk is away: kept here until it is back
                self._tracker.log(kept, new_steps_only=name == "history")
                kept.clear()
