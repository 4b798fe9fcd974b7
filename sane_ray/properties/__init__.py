"""Predicts properties of networks from their weights and embeddings: features, probes, protocols, intervals."""

from sane_ray.properties.features import FeatureSource, Zoo
from sane_ray.properties.prediction import Prediction, predict, read_results
from sane_ray.properties.probes import BlockRidge, Boosting, Logistic, PublishedRidge
from sane_ray.properties.targets import find_target

__all__ = [
    "BlockRidge",
    "Boosting",
    "FeatureSource",
    "Logistic",
    "Prediction",
    "PublishedRidge",
    "Zoo",
    "find_target",
    "predict",
    "read_results",
]
