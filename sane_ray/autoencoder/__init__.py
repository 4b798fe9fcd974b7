"""The SANE autoencoder: model, losses, and the way from and to published weights.

Nothing here imports Ray, MLflow, pandas or pyarrow: a trained model works wherever torch does.
"""

from __future__ import annotations

from sane_ray.autoencoder.model import SANE

__all__ = ["SANE"]
