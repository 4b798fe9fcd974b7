"""sane_ray: learn from the weights of neural networks, on Ray.

Folders follow the way of the data: ``zoo`` (checkpoints) -> ``tokens`` (token stores) -> ``pretraining`` (Ray Train)
-> ``autoencoder`` (the SANE model, loadable with torch alone). Importing this package imports neither Ray nor MLflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sane_ray.autoencoder.model import SANE

__version__ = "0.1.0"
__all__ = ["SANE", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "SANE":
        from sane_ray.autoencoder.model import SANE

        return SANE
    raise AttributeError(f"module 'sane_ray' has no attribute {name!r}")
