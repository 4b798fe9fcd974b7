"""Which checkpoints are trained on, chosen on and tested on; never two checkpoints of a model in two of these.

* ``split``: the zoo's own splits by model.
* ``leave-one-epoch``: trained on every epoch but one, tested on that epoch; still other models.
* ``out-of-distribution``: trained and chosen on one zoo, tested on the test split of another.

Never reads a feature or a property.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sane_ray.properties.features import Zoo
from sane_ray.zoo.splits import SPLITS

Rows = NDArray[np.int64]

FEWEST_TRAIN, FEWEST_TEST = 3, 2
"""Models that a fit and its intervals need."""


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one evaluation.

    Attributes:
        protocol: See above.
        part: Which epoch or which zoos; empty for ``split``.
        train: Rows to fit on.
        val: Rows to choose on.
        test: Rows to judge on.
    """

    protocol: str
    part: str
    train: Rows
    val: Rows
    test: Rows

    def only(self, keep_R: NDArray[np.bool_]) -> Part:
        """Without the rows that are not kept."""
        train, val, test = (rows[keep_R[rows]] for rows in self.splits.values())
        return replace(self, train=train, val=val, test=test)

    @property
    def splits(self) -> dict[str, Rows]:
        """Rows by split."""
        return {split: getattr(self, split) for split in SPLITS}

    def complaint(self, models_R: NDArray[np.object_]) -> str:
        """Why nothing can be fitted or judged; empty if it can."""
        for split, fewest in (("train", FEWEST_TRAIN), ("test", FEWEST_TEST)):
            count = len(np.unique(models_R[self.splits[split]].astype(str)))
            if count < fewest:
                return f"the {split} split has {count} models, and {fewest} are needed: take a larger zoo"
        return ""


@dataclass(frozen=True, eq=False)
class Population:
    """The checkpoints of one or several zoos as rows, one zoo after the other.

    Attributes:
        zoos: The zoos.
        zoo_R: Which zoo each row is of.
        model_R: Its model, told apart between zoos.
        epoch_R: Its epoch.
        split_R: Its split.
        counted_R: Whether it takes part at all.
    """

    zoos: Sequence[Zoo]
    zoo_R: Rows
    model_R: NDArray[np.object_]
    epoch_R: NDArray[np.float64]
    split_R: NDArray[np.object_]
    counted_R: NDArray[np.bool_]

    @classmethod
    def of(cls, zoos: Sequence[Zoo], last_epoch_only: bool = False) -> Population:
        """The rows of these zoos; with ``last_epoch_only`` each model counts with its last checkpoint alone."""
        zoo_R = np.repeat(np.arange(len(zoos)), [len(zoo) for zoo in zoos])
        model_R = np.array([f"{place}:{m}" for place, zoo in enumerate(zoos) for m in zoo.column("model")], object)
        epoch_R = np.concatenate([zoo.column("epoch").astype(float) for zoo in zoos])
        split_R = np.concatenate([zoo.column("split") for zoo in zoos]).astype(object)
        counted_R = _is_last(model_R, epoch_R) if last_epoch_only else np.ones(len(zoo_R), bool)
        return cls(zoos, zoo_R, model_R, epoch_R, split_R, counted_R)

    def rows(self, split: str, zoo: int = 0) -> Rows:
        """The rows of a split of one zoo."""
        return np.flatnonzero(self.counted_R & (self.split_R == split) & (self.zoo_R == zoo))

    def split(self) -> Part:
        """The first zoo's splits."""
        return Part("split", "", *(self.rows(split) for split in SPLITS))

    def leave_one_epoch(self) -> Iterator[Part]:
        """A part for each epoch of the first zoo; none if there is only one."""
        whole = self.split()
        epochs = np.unique(self.epoch_R[np.concatenate(list(whole.splits.values()))])
        for epoch in epochs[np.isfinite(epochs)] if len(epochs) > 1 else ():
            here = self.epoch_R == epoch
            others, tested = whole.only(~here), whole.only(here)
            yield Part("leave-one-epoch", f"epoch {epoch:g}", others.train, others.val, tested.test)

    def out_of_distribution(self) -> Iterator[Part]:
        """Trained on each zoo, tested on each other."""
        for trained, source in enumerate(self.zoos):
            for tested, target in enumerate(self.zoos):
                if trained != tested:
                    name = f"{source.name} -> {target.name}"
                    train, val = (self.rows(split, trained) for split in ("train", "val"))
                    yield Part("out-of-distribution", name, train, val, self.rows("test", tested))


def _is_last(model_R: NDArray[np.object_], epoch_R: NDArray[np.float64]) -> NDArray[np.bool_]:
    names, index_R = np.unique(model_R.astype(str), return_inverse=True)
    last = np.full(len(names), -np.inf)
    np.maximum.at(last, index_R, epoch_R)
    return epoch_R == last[index_R]
