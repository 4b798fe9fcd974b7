"""Which checkpoints are trained on, chosen on and tested on; never two checkpoints of a model in two of these.

* ``split``: the zoo's own splits by model.
* ``leave-one-epoch``: trained on every epoch but one, tested on that epoch; still other models.
* ``out-of-distribution``: trained and chosen on one zoo, tested on the test split of another; and, for comparison, each
  other zoo by its own splits, as ``split`` has the first.

Out of distribution, no model is tested a checkpoint of which the other zoo has among its own train or val models.

Never reads a feature or a property.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sane_ray.errors import InputError
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
        note: What was left out of them.
    """

    protocol: str
    part: str
    train: Rows
    val: Rows
    test: Rows
    note: str = ""

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
        """The rows of these zoos; with ``last_epoch_only`` each model counts with its last checkpoint alone.

        Raises:
            InputError: No checkpoint of a zoo is in a split.
        """
        for place, zoo in enumerate(zoos):
            _check_splits(zoo, "--other-store" if place else "--store")
        zoo_R = np.repeat(np.arange(len(zoos)), [len(zoo) for zoo in zoos])
        model_R = np.array([f"{place}:{m}" for place, zoo in enumerate(zoos) for m in zoo.column("model")], object)
        epoch_R = np.concatenate([zoo.column("epoch").astype(float) for zoo in zoos])
        split_R = np.concatenate([zoo.column("split") for zoo in zoos]).astype(object)
        counted_R = np.full(len(zoo_R), not last_epoch_only)
        counted_R[last_rows(model_R, epoch_R)] = True
        return cls(zoos, zoo_R, model_R, epoch_R, split_R, counted_R)

    def rows(self, split: str, zoo: int = 0) -> Rows:
        """The rows of a split of one zoo."""
        return np.flatnonzero(self.counted_R & (self.split_R == split) & (self.zoo_R == zoo))

    def split(self) -> Part:
        """The first zoo's splits."""
        train, val, test = (self.rows(split) for split in SPLITS)
        return Part("split", "", train, val, test)

    def leave_one_epoch(self) -> Iterator[Part]:
        """A part for each epoch of the first zoo; none if there is only one."""
        whole = self.split()
        epochs = np.unique(self.epoch_R[np.concatenate(list(whole.splits.values()))])
        for epoch in epochs[np.isfinite(epochs)] if len(epochs) > 1 else ():
            here = self.epoch_R == epoch
            others, tested = whole.only(~here), whole.only(here)
            yield Part("leave-one-epoch", f"epoch {epoch:g}", others.train, others.val, tested.test)

    def out_of_distribution(self) -> Iterator[Part]:
        """Trained on each zoo, tested on each other; those after the first on themselves too."""
        for trained, source in enumerate(self.zoos):
            for tested, target in enumerate(self.zoos):
                if trained == tested == 0:
                    continue  # ``split``
                train, val = (self.rows(split, trained) for split in ("train", "val"))
                test, note = (self.rows("test", tested), "") if trained == tested else self._unknown(trained, tested)
                yield Part("out-of-distribution", moved(source.name, target.name), train, val, test, note)

    @property
    def notes(self) -> list[str]:
        """What of the zoos is in no split, and takes no part."""
        found = []
        for place, zoo in enumerate(self.zoos):
            without = int((~np.isin(self.split_R[self.zoo_R == place].astype(str), SPLITS)).sum())
            if without:
                found.append(f"{without:,} of {len(zoo):,} checkpoints of {zoo.name} are in no split, and left out")
        return found

    def _unknown(self, trained: int, tested: int) -> tuple[Rows, str]:
        """Test rows of a zoo without the models that another one trains or chooses on, and how many these are.

        A checkpoint is known by the digest of its weights; by its id where one of the two has no digest.
        """
        splits_r, models_r = self.split_R[self.zoo_R == trained], self.model_R[self.zoo_R == tested]
        known_of = _known_by(self.zoos[trained], np.isin(splits_r.astype(str), ("train", "val")))
        seen_r = known_of(self.zoos[tested])
        test = self.rows("test", tested)
        kept = test[~np.isin(self.model_R[test].astype(str), models_r[seen_r].astype(str))]
        models, left = (len(np.unique(self.model_R[rows].astype(str))) for rows in (test, kept))
        if models == left:
            return test, ""
        names = self.zoos[trained].name, self.zoos[tested].name
        how = "" if self._have_digests(trained, tested) else " by their ids (name both stores to compare weights)"
        return kept, f"{models - left} of {models} test models of {names[1]} left out: {names[0]} trains on them{how}"

    def _have_digests(self, *places: int) -> bool:
        return all(digest is not None for place in places for digest in self.zoos[place].digests)


def moved(trained: str, tested: str) -> str:
    """Name of the part that is trained on one zoo and tested on another."""
    return f"{trained} -> {tested}"


def last_rows(models: Sequence[Any] | NDArray[Any], epochs: Sequence[float | None] | NDArray[np.floating]) -> list[int]:
    """The row of each model's last checkpoint; one of an unknown epoch (None, NaN) is the last only if all are."""
    last: dict[Any, tuple[float, int]] = {}
    for row, (model, epoch) in enumerate(zip(models, epochs, strict=True)):
        known = -np.inf if epoch is None or np.isnan(epoch) else float(epoch)
        last[model] = max(last.get(model, (known, row)), (known, row))
    return [row for _, row in last.values()]


def _known_by(zoo: Zoo, seen_r: NDArray[np.bool_]) -> Callable[[Zoo], NDArray[np.bool_]]:
    """Tells which checkpoints of another zoo are among some of this one."""
    rows = np.flatnonzero(seen_r)
    every_id, every_digest = zoo.table["id"].to_pylist(), zoo.digests
    ids, digests = {every_id[row] for row in rows}, {every_digest[row] for row in rows}
    without_digest = {every_id[row] for row in rows if every_digest[row] is None}

    def knows(identity: str, digest: str | None) -> bool:
        return identity in ids if digest is None else digest in digests or identity in without_digest

    return lambda other: np.array(
        [knows(*pair) for pair in zip(other.table["id"].to_pylist(), other.digests, strict=True)], bool
    )


def _check_splits(zoo: Zoo, flag: str) -> None:
    if np.isin(zoo.column("split").astype(str), SPLITS).any():
        return
    if len(np.unique(zoo.column("model"))) == 1:
        raise InputError(
            f"{zoo.name} is a single network, and a property is predicted by fitting on many: name embeddings or a "
            "store of a zoo"
        )
    raise InputError(
        f"no checkpoint of {zoo.name} is in a split, and without train, val and test models nothing can be fitted: "
        f"prepare a store of these checkpoints with jobs/prepare.py, and name it by {flag}"
    )
