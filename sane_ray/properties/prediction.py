"""One run of property prediction: fits every probe on every feature set for every target, judges and writes them.

Results are a folder that ``results.json`` makes complete, beside ``results.parquet`` (a row a fit) and
``predictions.parquet`` (a row a test checkpoint and fit; validation too for the zoo's own split). Never starts Ray.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sane_ray.config import PropertiesConfig, to_dict
from sane_ray.errors import InputError
from sane_ray.properties.evaluation import Score, evaluate_categories, evaluate_numbers, percentile_interval, r2_score
from sane_ray.properties.features import PUBLISHED, FeatureSource, Unavailable, Zoo, embedded_as, parts
from sane_ray.properties.probes import BlockRidge, Boosting, Fit, Logistic, Probe, PublishedRidge
from sane_ray.properties.protocols import Part, Population
from sane_ray.properties.table import LABELS, digits, shown
from sane_ray.properties.targets import Target, find_target
from sane_ray.tokens.store.progress_bar import progress_bar
from sane_ray.zoo.splits import SPLITS

RESULTS_FILE = "results.json"
TABLE_FILE = "results.parquet"
PREDICTIONS_FILE = "predictions.parquet"
_STAGED_FILE = f"{RESULTS_FILE}.partial"
FORMAT, VERSION = "sane_ray properties", 2

METRICS = ("r2", "tau", "mae", "accuracy")

FEW_MODELS = 20
"""Fewer test models cannot tell two feature sets apart, and a verdict says so: their bootstrap is too sure."""

_MOST_NAMED = 3
"""Parts that a note names; of more, it says how many."""

_NUMBER, _COUNT, _TEXT = pa.float64(), pa.int64(), pa.string()
ROW_SCHEMA = pa.schema(
    [(name, _TEXT) for name in ("target", "features", "probe", "protocol", "part")]
    + [(name, _COUNT) for name in ("seeds", "n_train", "n_val", "n_test", "n_test_models")]
    + [(f"{metric}{end}", _NUMBER) for metric in METRICS for end in ("", "_low", "_high")]
    + [("choice", _TEXT), ("note", _TEXT), ("n_columns", _COUNT), ("validation", _NUMBER)]
)
PREDICTION_SCHEMA = pa.schema(
    [(name, _TEXT) for name in ("target", "features", "probe", "protocol", "part", "id", "model")]
    + [("epoch", _COUNT), ("split", _TEXT), ("truth", _NUMBER), ("prediction", _NUMBER)]
    + [("truth_category", _TEXT), ("prediction_category", _TEXT)]
)


@dataclass(frozen=True, eq=False)
class Judged:
    """A fit of one probe, judged on test rows.

    Attributes:
        row: As ``ROW_SCHEMA`` has it.
        scores: By metric; with the draws that intervals of differences need.
        notes: What ``row["note"]`` says, one by one.
    """

    row: dict[str, Any]
    scores: dict[str, Score] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Prediction:
    """Everything that is predicted of one or two zoos.

    Attributes:
        zoos: The zoo, and another one for out-of-distribution evaluation.
        config: What and how.
        judged: Every fit, once it has run.
        predictions: Of each fit.
        population: Whose rows features and targets are.
        source: Features of these rows; computed ones are kept.
    """

    zoos: list[Zoo]
    config: PropertiesConfig
    judged: list[Judged] = field(default_factory=list)
    predictions: list[pa.Table] = field(default_factory=list)
    population: Population = field(init=False)
    source: FeatureSource = field(init=False)

    def __post_init__(self) -> None:
        self.population = Population.of(self.zoos, self.config.epochs == "last")
        self.source = FeatureSource(self.zoos)
        self._fitted: dict[Any, Any] = {}
        self._columns: dict[str, NDArray[Any]] = {}
        self.targets = [self._find_target(name) for name in self.config.targets]

    def check(self) -> None:
        """Raises ``InputError`` if no target at all can be predicted."""
        if not any(target.usable for target in self.targets):
            raise InputError("nothing to predict: " + "; ".join(target.note for target in self.targets))

    @property
    def doubts(self) -> list[str]:
        """What of the zoos and of each target cannot be used, or why nothing can."""
        return [*self.population.notes, *(target.note for target in self.targets if target.note)]

    def run(self) -> None:
        """Fits and judges everything; what cannot be done is a row with a note.

        Raises:
            InputError: No target at all can be predicted, or store and embeddings do not fit each other.
        """
        self.check()
        each = self._fits_of_a_set
        with progress_bar("fit probes", len(self.config.features) * each, "fit") as progress:
            self.source.prepare(self.config.features)
            for place, name in enumerate(self.config.features, 1):
                for judged in self._features(name):
                    self.judged.append(judged)
                    progress.update()
                progress.update(place * each - progress.n)  # of a set that cannot be had

    def best(self, target: str) -> Judged | None:
        """Of the fits of a target on the zoo's own split, the one that did best on validation models.

        Of fits that have no validation, the first; None where nothing was fitted.
        """
        fitted = [
            judged
            for judged in self.judged
            if judged.scores and (judged.row["target"], judged.row["protocol"]) == (target, "split")
        ]
        return max(fitted, key=lambda judged: by_validation(judged.row), default=None)

    def build(self, features: str, probe: str) -> Callable[[dict[str, NDArray[Any]]], Probe]:
        """Makes the probe of a row of the results anew, of any features by block whose first rows are the population's.

        Args:
            features: The feature set of the row.
            probe: Its probe.
        """
        variant = self._variant(probe, features)
        return lambda values: self._probe(variant, values, {})

    def _find_target(self, name: str) -> Target:
        """The target over the rows of all zoos."""
        tables = [zoo.table for zoo in self.zoos]
        if len(tables) == 1:
            return find_target(name, tables[0])
        first = find_target(name, tables[0])
        others = [find_target(name, table) for table in tables[1:]]
        joined = [target.values_R for target in (first, *others)]
        if any(target.usable and target.kind != first.kind for target in others):
            joined[1:] = [np.full(len(table), None if first.kind == "category" else np.nan) for table in tables[1:]]
        values_R = np.concatenate([_like(first, values) for values in joined])
        note = "; ".join(dict.fromkeys(target.note for target in (first, *others) if target.note))
        return Target(name, first.column, first.kind, values_R, note, first.usable)

    @property
    def _fits_of_a_set(self) -> int:
        """How many rows a feature set has that can be had."""
        return sum(
            sum(_reads(probe, target) for target in self.targets) * len(list(self._parts(probe)))
            for probe in self._probes()
        )

    def _features(self, name: str) -> Iterator[Judged]:
        """Every fit on one feature set."""
        try:
            blocks = self.source.blocks(name)
        except Unavailable as reason:
            yield from self._unavailable(name, str(reason))
            return
        notes = [block.note for block in blocks]
        columns = sum(len(block.columns) for block in blocks)
        values = {block.name: block.values_RF for block in blocks}
        for probe in self._probes():
            fitted = self._probe(self._variant(probe, name), values, self._fitted)
            for part in self._parts(probe):
                for target in self.targets:
                    if _reads(probe, target):
                        yield self._judge(name, probe, fitted, part, target, notes, columns)

    def _unavailable(self, name: str, reason: str) -> Iterator[Judged]:
        for target in self.targets:
            for probe in (probe for probe in self._probes() if _reads(probe, target)):
                yield _noted(self._row(target.name, name, probe, self.population.split()), [reason])

    def _probes(self) -> list[str]:
        kinds = {target.kind for target in self.targets}
        return [*(self.config.probes if "number" in kinds else ()), *(["logistic"] if "category" in kinds else ())]

    def _variant(self, probe: str, features: str) -> str:
        """The published ridge for feature sets of the published tables, or wherever it is asked for."""
        asked = self.config.ridge
        is_published = asked == "published" or (asked == "auto" and set(parts(features)) <= set(PUBLISHED))
        return "published" if probe == "ridge" and is_published else probe

    def _probe(self, variant: str, values: dict[str, NDArray[Any]], fitted: dict[Any, Any]) -> Probe:
        """A probe; boostings of the same blocks of the same rows may share what was fitted."""
        models_R = self.population.model_R.astype(str)
        if variant == "boosting":
            return Boosting(values, models_R, fitted)
        if variant == "logistic":
            return Logistic(values, models_R)
        return (PublishedRidge if variant == "published" else BlockRidge)(values, models_R, self.config.refit)

    def _parts(self, probe: str) -> Iterator[Part]:
        yield self.population.split()
        if self.config.leave_one_epoch and probe == "ridge":
            yield from self.population.leave_one_epoch()
        yield from self.population.out_of_distribution()

    def _judge(
        self, features: str, probe: str, fitted: Probe, part: Part, target: Target, notes: list[str], columns: int
    ) -> Judged:
        """One fit of a probe for each seed, and how good they are together."""
        part = part.only(target.known_R)
        notes = [*notes, target.note, part.note]
        row = self._row(target.name, features, probe, part, columns)
        complaint = "" if not target.usable else part.complaint(self.population.model_R)
        complaint = complaint or self._undefined(target, part)
        if complaint or not target.usable:
            return _noted(row, [complaint, *notes])
        if len(part.val) == 0:
            notes.append("no model is for validation: chosen on training rows")
        seeds = self.config.seeds if probe == "boosting" else 1
        try:
            fits = [fitted(target.values_R, part.train, part.val, self.config.seed + seed) for seed in range(seeds)]
            scores = self._scores(target, part, fits)
        except (ValueError, RuntimeError, np.linalg.LinAlgError) as error:  # one fit must not end all the others
            return _noted(row, [f"it could not be fitted: {error}", *notes])
        by_design = (part.protocol, target.column) == ("leave-one-epoch", "epoch")
        if target.kind == "number" and np.ptp(target.values_R[part.test]) == 0 and not by_design:
            notes.append("the truth is the same for all test rows: neither R² nor tau is defined")
        self.predictions.append(self._table(row, part, target, fits))
        choice = "; ".join(dict.fromkeys(fit.choice for fit in fits))
        measured = {"seeds": seeds, "choice": choice, "validation": _validation(target, part.val, fits)}
        return _noted(row | measured | _metrics(scores), notes, scores)

    def _row(self, target: str, features: str, probe: str, part: Part, columns: int | None = None) -> dict[str, Any]:
        """A row without metrics."""
        row: dict[str, Any] = dict.fromkeys(ROW_SCHEMA.names)
        row |= {"target": target, "features": features, "probe": probe, "protocol": part.protocol, "part": part.part}
        row |= {f"n_{split}": len(rows) for split, rows in part.splits.items()}
        row["n_test_models"] = len(np.unique(self.population.model_R[part.test].astype(str)))
        return row | {"choice": "", "n_columns": columns}

    def _undefined(self, target: Target, part: Part) -> str:
        if not target.usable or len(part.train) == 0:
            return ""
        if len(set(target.values_R[part.train].tolist())) < 2:
            return f"{target.column} is the same for all {len(part.train)} training rows"
        return ""

    def _scores(self, target: Target, part: Part, fits: list[Fit]) -> dict[str, Score]:
        evaluate = evaluate_numbers if target.kind == "number" else evaluate_categories
        predictions_Sn = np.stack([fit.prediction_R[part.test] for fit in fits])
        models_n = self.population.model_R[part.test].astype(str)
        return evaluate(target.values_R[part.test], predictions_Sn, models_n, self.config.bootstrap, self.config.seed)

    def _table(self, row: dict[str, Any], part: Part, target: Target, fits: list[Fit]) -> pa.Table:
        """Mean predictions over seeds of test rows, and of validation rows for the zoo's own split."""
        val = part.val if part.protocol == "split" else part.val[:0]
        rows = np.concatenate([val, part.test])
        truth, category = target.values_R[rows], target.kind == "category"
        said = [np.concatenate([fit.of_validation(val), fit.prediction_R[part.test]]) for fit in fits]
        predicted = said[0] if category else np.mean(said, axis=0)
        columns = {name: [row[name]] * len(rows) for name in ("target", "features", "probe", "protocol", "part")}
        columns |= {name: self._column(name)[rows].tolist() for name in ("id", "model", "epoch", "split")}
        empty = [None] * len(rows)
        numbers, texts = (empty, empty), (truth.tolist(), predicted.tolist())
        columns["truth"], columns["prediction"] = numbers if category else texts
        columns["truth_category"], columns["prediction_category"] = texts if category else numbers
        return pa.table(columns, schema=PREDICTION_SCHEMA)

    def _column(self, name: str) -> NDArray[Any]:
        if name not in self._columns:
            self._columns[name] = np.concatenate([zoo.column(name) for zoo in self.zoos])
        return self._columns[name]

    @property
    def notes(self) -> list[str]:
        """What the reader of the table should know, each once, with what it is of unless that is everything."""
        rows_of: dict[str, list[dict[str, Any]]] = {}
        for judged in self.judged:
            for note in judged.notes:
                rows_of.setdefault(note, []).append(judged.row)
        return [*self.population.notes, *(f"{self._whose(rows)}{note}" for note, rows in rows_of.items())]

    def _whose(self, rows: list[dict[str, Any]]) -> str:
        """Which targets, feature sets and parts some rows are of, with a colon."""
        targets, features, places = (
            list(dict.fromkeys(r[key] for r in rows)) for key in ("target", "features", "part")
        )
        named = [] if len(targets) == len(self.targets) > 1 else targets
        named += [] if len(features) == len(self.config.features) else features
        places = [] if "" in places else places
        named += places if len(places) <= _MOST_NAMED else [places[0], f"{len(places) - 1} more parts like it"]
        return f"{', '.join(named)}: " if named else ""

    @property
    def verdict(self) -> list[str]:
        """For each target, probe and part, whether SANE with other features is better than these alone.

        Of each feature set that has both, where these alone were fitted too; another zoo's parts come last, and epochs
        that were left out have none.
        """
        fits = {
            (judged.row["part"], judged.row["target"], judged.row["probe"], _set(judged.row["features"])): judged
            for judged in sorted(self.judged, key=lambda judged: judged.row["protocol"] != "split")
            if judged.row["protocol"] != "leave-one-epoch" and judged.scores
        }
        sentences = []
        for (*where, names), larger in fits.items():
            smaller = fits.get((*where, _without_sane(names)))
            if smaller is not None and smaller is not larger:
                sentences.append(compare(larger, smaller, self.config.metric))
        return [sentence for sentence in sentences if sentence]


def by_validation(row: Mapping[str, Any]) -> float:
    """Key by which a fit is chosen: how good it is on validation models; one that has none comes last."""
    validation = row.get("validation")
    return -np.inf if validation is None else float(validation)


def compare(larger: Judged, smaller: Judged, metric: str = "r2") -> str:
    """One sentence on two fits of the same rows, with an interval of their difference over the same draws of models.

    One is called better only if all of that interval is on its side of zero, and there are ``FEW_MODELS`` test models.
    Empty if a number is not defined.

    Args:
        larger: SANE with other features, such as s(W).
        smaller: These alone.
        metric: What numbers are compared by: ``r2`` or ``tau``. Categories have their accuracy.
    """
    metric = metric if metric in larger.scores else "accuracy"
    first, second = larger.scores[metric], smaller.scores[metric]
    difference, (low, high) = first.value - second.value, percentile_interval(first.draws_D - second.draws_D)
    if not np.isfinite([difference, low, high]).all():
        return ""
    both, alone = _called(larger.row["features"])
    models = larger.row.get("n_test_models")
    if models is not None and models < FEW_MODELS:
        says = f"only {models} test models, too few to tell {both} from {alone}"
    elif metric != "accuracy" and max(first.value, second.value) <= 0:
        says = f"neither {both} nor {alone} reads it"
    elif _gave_sane_nothing(larger.row["choice"]):
        says = f"{both} is {alone}, as held-out models gave SANE no weight"
    elif low > 0 or high < 0:
        says = f"{both} is {'better' if low > 0 else 'worse'} than {alone}"
    else:
        says = f"{both} is not told apart from {alone}"
    what = ", ".join(filter(None, (larger.row.get(key) for key in ("target", "probe", "part"))))
    return (
        f"{what}: {says}: {LABELS[metric]} {_with_interval(first)} against {_with_interval(second)}, difference "
        f"{digits(difference, sign='+')} [{digits(low, sign='+')}, {digits(high, sign='+')}]"
    )


def _set(features: str) -> frozenset[str]:
    return frozenset(features.split("+"))


def _without_sane(names: frozenset[str]) -> frozenset[str]:
    return frozenset(name for name in names if not name.startswith("sane"))


def _called(features: str) -> tuple[str, str]:
    """A feature set and what of it is not SANE, for a reader: ``SANE with s(W)`` and ``s(W) alone``."""
    names = features.split("+")
    sane = "+".join(name for name in names if name.startswith("sane"))
    others = " and ".join("s(W)" if name == "statistics" else name for name in names if not name.startswith("sane"))
    return f"{'SANE' if sane == 'sane' else sane} with {others}", f"{others} alone"


def _with_interval(score: Score) -> str:
    low, high = score.interval
    return f"{shown(score.value)} [{shown(low)}, {shown(high)}]"


def _gave_sane_nothing(choice: str) -> bool:
    """Whether every fit gave weight 0 to all that has SANE in it, or chose a block without it."""
    return all(_weighs_no_sane(one) for one in choice.split("; "))


def _weighs_no_sane(choice: str) -> bool:
    weights = re.findall(r"\b(sane\w*|all) ([\d.]+)", choice)
    alone = re.search(r" of (\w+)$", choice)
    if weights or alone is None:
        return bool(weights) and all(float(weight) == 0 for _, weight in weights)
    return alone[1] != "all" and not alone[1].startswith("sane")


def identity(zoos: list[Zoo], config: PropertiesConfig) -> tuple[str, dict[str, Any]]:
    """A hash of all that changes the results, and what it is the hash of."""
    settings = {"properties": to_dict(config), "zoos": [_fingerprints(zoo) for zoo in zoos]}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8], settings


def check_output(output: Path, digest: str) -> bool:
    """Whether the folder already holds the results of this identity.

    Raises:
        InputError: It holds others, or something else.
    """
    if not output.exists() or not any(output.iterdir()):
        return False
    path = output / RESULTS_FILE
    known = read_results(output) if path.exists() else {}
    if known.get("identity") == digest:
        return True
    leftovers = {TABLE_FILE, PREDICTIONS_FILE, _STAGED_FILE}
    if not path.exists() and {entry.name for entry in output.iterdir()} <= leftovers:
        return False
    what = "results with other settings" if known else "something else"
    raise InputError(f"{output} holds {what}: name another --output or --run-name, or delete it")


def read_results(output: Path) -> dict[str, Any]:
    """The content of results.json.

    Raises:
        InputError: It is missing or damaged.
    """
    path = output / RESULTS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete {output} and run jobs/predict.py again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        raise InputError(f"{path} is not what jobs/predict.py of this version writes: delete {output}, or name another")
    return content


def predict(
    zoos: list[Zoo], config: PropertiesConfig, output: Path, prediction: Prediction | None = None
) -> dict[str, Any]:
    """Predicts, judges, and writes the results.

    Args:
        zoos: The zoo, and another one if there is.
        config: What and how.
        output: Folder of the results.
        prediction: Of these zoos with this config, not run yet: afterwards it has the features and the fits.

    Returns:
        The content of results.json.

    Raises:
        InputError: No target at all can be predicted, no checkpoint is in a split, or store and embeddings do not fit
            each other.
    """
    digest, settings = identity(zoos, config)
    began = time.perf_counter()
    prediction = prediction or Prediction(zoos, config)
    prediction.run()
    content = {
        "format": FORMAT,
        "version": VERSION,
        "identity": digest,
        "settings": settings,
        "zoos": [facts_of(zoo) for zoo in zoos],
        "compute": {
            "seconds": round(time.perf_counter() - began, 2),
            "cores": os.cpu_count(),
            "pretraining": [zoo.embeddings.index.get("model") for zoo in zoos if zoo.embeddings is not None],
        },
        "verdict": prediction.verdict,
        "notes": prediction.notes,
        "rows": [_json(judged.row) for judged in prediction.judged],
    }
    _write(output, content, prediction)
    return content


def _write(output: Path, content: dict[str, Any], prediction: Prediction) -> None:
    output.mkdir(parents=True, exist_ok=True)
    rows = pa.Table.from_pylist([judged.row for judged in prediction.judged], schema=ROW_SCHEMA)
    pq.write_table(rows, output / TABLE_FILE)
    pq.write_table(
        pa.concat_tables([PREDICTION_SCHEMA.empty_table(), *prediction.predictions]), output / PREDICTIONS_FILE
    )
    staged = output / _STAGED_FILE
    staged.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    staged.replace(output / RESULTS_FILE)


def facts_of(zoo: Zoo) -> dict[str, Any]:
    """How large a zoo is: its entry in results.json."""
    splits, models = zoo.column("split"), zoo.column("model")
    return {
        "name": zoo.name,
        "checkpoints": len(zoo),
        "models": len(np.unique(models)),
        "architectures": len(zoo.tables),
        "models_by_split": {s: len(np.unique(models[splits == s])) for s in SPLITS if (splits == s).any()},
    }


def _fingerprints(zoo: Zoo) -> dict[str, Any]:
    index = zoo.embeddings.index if zoo.embeddings is not None else {}
    return {
        "store": zoo.store.fingerprint if zoo.store is not None else None,
        "model": index.get("model", {}).get("fingerprint"),
        "embedded": embedded_as(index) | {"latent_dim": index.get("latent_dim")} if index else None,
        "source": index.get("source", {}).get("fingerprint"),
    }


def _noted(row: dict[str, Any], notes: list[str], scores: dict[str, Score] | None = None) -> Judged:
    """A row with its notes, each once."""
    said = list(dict.fromkeys(note for note in notes if note))
    return Judged(row | {"note": "; ".join(said)}, scores or {}, said)


def _metrics(scores: dict[str, Score]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, score in scores.items():
        low, high = score.interval
        values = {name: score.value, f"{name}_low": low, f"{name}_high": high}
        found |= {key: float(value) if np.isfinite(value) else None for key, value in values.items()}
    return found


def _validation(target: Target, val: NDArray[np.int64], fits: list[Fit]) -> float | None:
    """Mean R^2 or accuracy on validation rows, of fits that were not trained on them."""
    if len(val) == 0:
        return None
    truth = target.values_R[val]
    if target.kind == "category":
        return float(np.mean([np.mean(fit.of_validation(val) == truth) for fit in fits]))
    found = float(np.mean([r2_score(truth, fit.of_validation(val)) for fit in fits]))
    return found if np.isfinite(found) else None


def _reads(probe: str, target: Target) -> bool:
    return (probe == "logistic") == (target.kind == "category")


def _like(first: Target, values: NDArray[Any]) -> NDArray[Any]:
    """Values of another zoo's target as the first's kind; unknown where they are of the other kind."""
    if first.kind == "number":
        return values.astype(float) if values.dtype != object else np.full(len(values), np.nan)
    return values if values.dtype == object else np.full(len(values), None, dtype=object)


def _json(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}
