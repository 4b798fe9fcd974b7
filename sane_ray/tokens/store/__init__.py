"""The token store: a folder of the tokens of a zoo's checkpoints, its reading side at hand here.

Never imports Ray: ``sane_ray.tokens.store.writing`` does, and is imported by who writes a store.
"""

from sane_ray.tokens.store.reading import SPLITS, Architecture, Counts, RowGroup, Segment, TokenStore, is_store

__all__ = ["SPLITS", "Architecture", "Counts", "RowGroup", "Segment", "TokenStore", "is_store"]
