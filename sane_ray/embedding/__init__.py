"""Networks to embeddings, with a trained SANE: of tokens, of layers, of whole networks.

``encoder`` is plain torch; ``networks`` reads tokens from a store or from checkpoints, ``preprocessing`` sees to it
that they are as in the model's training, ``parts`` and ``writing`` embed many with Ray Data, and ``reading`` opens what
was written.
Only ``writing`` imports Ray, and is imported by who writes.
"""

from sane_ray.embedding.encoder import QUANTILES, SHAPE, VECTORS, Embedder, Summary
from sane_ray.embedding.reading import Embeddings

__all__ = ["QUANTILES", "SHAPE", "VECTORS", "Embedder", "Embeddings", "Summary"]
