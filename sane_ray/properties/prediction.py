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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from sane_ray.config import PropertiesConfig, to_dict
from sane_ray.errors import InputError
from sane_ray.properties.evaluation import Score, evaluate_categories, evaluate_numbers, percentile_interval, r2_score
from sane_ray.properties.features import PUBLISHED, FeatureSource, Unavailable, Zoo, parts
from sane_ray.properties.probes import PROBES, Boosting, Fit, Probe
from sane_ray.properties.protocols import Part, Population
from sane_ray.properties.targets import Target, find_target

RESULTS_FILE = "results.json"
TABLE_FILE = "results.parquet"
PREDICTIONS_FILE = "predictions.parquet"
_STAGED_FILE = f"{RESULTS_FILE}.partial"
FORMAT, VERSION = "sane_ray properties", 1

METRICS = ("r2", "tau", "mae", "accuracy")

_NUMBER, _COUNT, _TEXT = pa.float64(), pa.int64(), pa.string()
ROW_SCHEMA = pa.schema(
    [(name, _TEXT) for name in ("target", "features", "probe", "protocol", "part")]
    + [(name, _COUNT) for name in ("seeds", "n_train", "n_val", "n_test")]
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
    """

    row: dict[str, Any]
    scores: dict[str, Score] = field(default_factory=dict)


@dataclass(eq=False)
class Prediction:
    """Everything that is predicted of one or two zoos.

    Attributes:
        zoos: The zoo, and another one for out-of-distribution evaluation.
        config: What and how.
    """

    zoos: list[Zoo]
    config: PropertiesConfig
    judged: list[Judged] = field(default_factory=list)
    predictions: list[pa.Table] = field(default_factory=list)

    def __post_init__(self) -> None:
        last = self.config.epochs == "last"
        self._population = Population.of(self.zoos, last)
        self._source = FeatureSource(self.zoos)
        self._fitted: dict[Any, Any] = {}
        self._columns: dict[str, NDArray[Any]] = {}
        self._targets = [self._find_target(name) for name in self.config.targets]

    def check(self) -> None:
        """Raises ``InputError`` if no target at all can be predicted."""
        if not any(target.usable for target in self._targets):
            raise InputError("nothing to predict: " + "; ".join(target.note for target in self._targets))

    @property
    def doubts(self) -> list[str]:
        """What cannot be used of each target, or why nothing can."""
        return [target.note for target in self._targets if target.note]

    def run(self) -> None:
        """Fits and judges everything; what cannot be done is a row with a note.

        Raises:
            InputError: No target at all can be predicted, or store and embeddings do not fit each other.
        """
        self.check()
        self._source.prepare(self.config.features)
        for name in tqdm(self.config.features, desc="feature sets", unit="set", disable=None):
            self._features(name)

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

    def _features(self, name: str) -> None:
        try:
            blocks = self._source.blocks(name)
        except Unavailable as reason:
            self._unavailable(name, str(reason))
            return
        note = "; ".join(dict.fromkeys(block.note for block in blocks if block.note))
        columns = sum(len(block.columns) for block in blocks)
        values = {block.name: block.values_RF for block in blocks}
        for probe in self._probes():
            fitted = self._probe(self._variant(probe, name), values)
            for part in self._parts(probe):
                for target in self._targets:
                    if _reads(probe, target):
                        self.judged.append(self._judge(name, probe, fitted, part, target, note, columns))

    def _unavailable(self, name: str, reason: str) -> None:
        for target in self._targets:
            for probe in (probe for probe in self._probes() if _reads(probe, target)):
                self.judged.append(Judged(_row(target.name, name, probe, self._population.split(), note=reason)))

    def _probes(self) -> list[str]:
        kinds = {target.kind for target in self._targets}
        return [*(self.config.probes if "number" in kinds else ()), *(["logistic"] if "category" in kinds else ())]

    def _variant(self, probe: str, features: str) -> str:
        """The published ridge for feature sets of the published tables, or wherever it is asked for."""
        asked = self.config.ridge
        is_published = asked == "published" or (asked == "auto" and set(parts(features)) <= set(PUBLISHED))
        return "published" if probe == "ridge" and is_published else probe

    def _probe(self, variant: str, values: dict[str, NDArray[Any]]) -> Probe:
        models_R = self._population.model_R.astype(str)
        if variant == "boosting":
            return Boosting(values, models_R, fitted=self._fitted)
        return PROBES[variant](values, models_R, self.config.refit)

    def _parts(self, probe: str) -> Iterator[Part]:
        yield self._population.split()
        if self.config.leave_one_epoch and probe == "ridge":
            yield from self._population.leave_one_epoch()
        yield from self._population.out_of_distribution()

    def _judge(
        self, features: str, probe: str, fitted: Probe, part: Part, target: Target, note: str, columns: int
    ) -> Judged:
        """One fit of a probe for each seed, and how good they are together."""
        part = part.only(target.known_R)
        notes = [note, target.note]
        row = _row(target.name, features, probe, part, columns=columns)
        complaint = "" if not target.usable else part.complaint(self._population.model_R)
        complaint = complaint or self._undefined(target, part)
        if complaint or not target.usable:
            return Judged(row | {"note": _joined([complaint, *notes])})
        if len(part.val) == 0:
            notes.append("no model is for validation: chosen on training rows")
        seeds = self.config.seeds if probe == "boosting" else 1
        fits = [fitted(target.values_R, part.train, part.val, self.config.seed + seed) for seed in range(seeds)]
        scores = self._scores(target, part, fits)
        if target.kind == "number" and np.ptp(target.values_R[part.test]) == 0:
            notes.append("the truth is the same for all test rows: neither R2 nor tau is defined")
        self.predictions.append(self._table(row, part, target, fits))
        choice = "; ".join(dict.fromkeys(fit.choice for fit in fits))
        measured = {"seeds": seeds, "choice": choice, "validation": _validation(target, part.val, fits)}
        return Judged(row | measured | _metrics(scores) | {"note": _joined(notes)}, scores)

    def _undefined(self, target: Target, part: Part) -> str:
        if not target.usable or len(part.train) == 0:
            return ""
        if len(set(target.values_R[part.train].tolist())) < 2:
            return f"{target.column} is the same for all {len(part.train)} training rows"
        return ""

    def _scores(self, target: Target, part: Part, fits: list[Fit]) -> dict[str, Score]:
        evaluate = evaluate_numbers if target.kind == "number" else evaluate_categories
        predictions_Sn = np.stack([fit.prediction_R[part.test] for fit in fits])
        models_n = self._population.model_R[part.test].astype(str)
        return evaluate(target.values_R[part.test], predictions_Sn, models_n, self.config.bootstrap, self.config.seed)

    def _table(self, row: dict[str, Any], part: Part, target: Target, fits: list[Fit]) -> pa.Table:
        """Mean predictions over seeds of test rows, and of validation rows for the zoo's own split."""
        rows = np.concatenate([part.val, part.test]) if part.protocol == "split" else part.test
        truth, category = target.values_R[rows], target.kind == "category"
        predicted = fits[0].prediction_R[rows] if category else np.mean([f.prediction_R[rows] for f in fits], axis=0)
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
        """What the reader of the table should know, each once."""
        return list(dict.fromkeys(judged.row["note"] for judged in self.judged if judged.row["note"]))

    @property
    def verdict(self) -> list[str]:
        """For each target and probe, whether SANE with s(W) is at least as good as s(W) alone."""
        fits = {
            (judged.row["target"], judged.row["probe"], judged.row["features"]): judged
            for judged in self.judged
            if judged.row["protocol"] == "split" and judged.scores
        }
        sentences = []
        for target, probe, features in fits:
            if features == "sane+statistics" and (target, probe, "statistics") in fits:
                sentences.append(compare(fits[target, probe, features], fits[target, probe, "statistics"]))
        return sentences


def compare(larger: Judged, smaller: Judged) -> str:
    """One sentence on two fits of the same rows, with an interval of their difference over the same draws of models."""
    metric = "r2" if "r2" in larger.scores else "accuracy"
    label = {"r2": "R2", "accuracy": "accuracy"}[metric]
    first, second = larger.scores[metric], smaller.scores[metric]
    difference = first.value - second.value
    low, high = percentile_interval(first.draws_D - second.draws_D)
    if _without_sane(larger.row["choice"]):
        says = "is s(W) alone, as held-out models gave SANE no weight"
    elif difference >= 0:
        says = "is at least as good as s(W) alone"
    elif high >= 0:
        says = "is not told apart from s(W) alone"
    else:
        says = "is worse than s(W) alone"
    return (
        f"{larger.row['target']}, {larger.row['probe']}: SANE with s(W) {says}: {label} {first.value:.3f} "
        f"[{first.interval[0]:.3f}, {first.interval[1]:.3f}] against {second.value:.3f} "
        f"[{second.interval[0]:.3f}, {second.interval[1]:.3f}], difference {difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    )


def _without_sane(choice: str) -> bool:
    """Whether every fit gave weight 0 to all that has SANE in it, or chose statistics alone."""
    return all(_weighs_no_sane(one) for one in choice.split("; "))


def _weighs_no_sane(choice: str) -> bool:
    weights = re.findall(r"\b(sane\w*|all) ([\d.]+)", choice)
    return all(float(weight) == 0 for _, weight in weights) if weights else choice.endswith("of statistics")


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
    raise InputError(f"{output} holds {what}: name another --output or --run_name, or delete it")


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


def predict(zoos: list[Zoo], config: PropertiesConfig, output: Path) -> dict[str, Any]:
    """Predicts, judges, and writes the results.

    Returns:
        The content of results.json.

    Raises:
        InputError: No target at all can be predicted, or store and embeddings do not fit each other.
    """
    digest, settings = identity(zoos, config)
    began = time.perf_counter()
    prediction = Prediction(zoos, config)
    prediction.run()
    content = {
        "format": FORMAT,
        "version": VERSION,
        "identity": digest,
        "settings": settings,
        "zoos": [_facts(zoo) for zoo in zoos],
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


def _facts(zoo: Zoo) -> dict[str, Any]:
    splits, models = zoo.column("split"), zoo.column("model")
    return {
        "name": zoo.name,
        "checkpoints": len(zoo),
        "models": len(np.unique(models)),
        "architectures": len(zoo.tables),
        "models_by_split": {str(split): len(np.unique(models[splits == split])) for split in np.unique(splits)},
    }


def _fingerprints(zoo: Zoo) -> dict[str, Any]:
    index = zoo.embeddings.index if zoo.embeddings is not None else {}
    return {
        "store": zoo.store.fingerprint if zoo.store is not None else None,
        "model": index.get("model", {}).get("fingerprint"),
        "embedded": {name: index.get(name) for name in ("window", "halo", "latent_dim")} if index else None,
        "source": index.get("source", {}).get("fingerprint"),
    }


def _row(
    target: str, features: str, probe: str, part: Part, note: str = "", columns: int | None = None
) -> dict[str, Any]:
    """A row without metrics."""
    row: dict[str, Any] = dict.fromkeys(ROW_SCHEMA.names)
    row |= {"target": target, "features": features, "probe": probe, "protocol": part.protocol, "part": part.part}
    row |= {f"n_{split}": len(rows) for split, rows in part.splits.items()}
    return row | {"note": note, "choice": "", "n_columns": columns}


def _metrics(scores: dict[str, Score]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, score in scores.items():
        low, high = score.interval
        values = {name: score.value, f"{name}_low": low, f"{name}_high": high}
        found |= {key: float(value) if np.isfinite(value) else None for key, value in values.items()}
    return found


def _validation(target: Target, val: NDArray[np.int64], fits: list[Fit]) -> float | None:
    """Mean R^2 or accuracy of the fits on validation rows."""
    if len(val) == 0:
        return None
    truth = target.values_R[val]
    if target.kind == "category":
        return float(np.mean([np.mean(fit.prediction_R[val] == truth) for fit in fits]))
    found = float(np.mean([r2_score(truth, fit.prediction_R[val]) for fit in fits]))
    return found if np.isfinite(found) else None


def _reads(probe: str, target: Target) -> bool:
    return (probe == "logistic") == (target.kind == "category")


def _like(first: Target, values: NDArray[Any]) -> NDArray[Any]:
    """Values of another zoo's target as the first's kind; unknown where they are of the other kind."""
    if first.kind == "number":
        return values.astype(float) if values.dtype != object else np.full(len(values), np.nan)
    return values if values.dtype == object else np.full(len(values), None, dtype=object)


def _joined(notes: list[str]) -> str:
    return "; ".join(dict.fromkeys(note for note in notes if note))


def _json(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}
