"""quality_run.py -- one run of sparse_quality.py in a process of its own: trains, measures, prints a line of JSON."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import common
import quality_data

import widehead
from widehead import Classifier
from widehead.data import Dataset
from widehead.metrics import MetricAccumulator

KS = (1, 3, 5)
_SERVE = 1024


class Model(Classifier):
    """The classifier, but a dense head with squared hinge starts at the bias of a sparse one, -1: the rival is to have
    no worse start."""

    def _build(self, *arguments: Any) -> None:
        super()._build(*arguments)
        if self.head == "dense" and self.loss == "squared_hinge":
            self.head_.bias[:] = -1.0


def measure(lists: Any, part: Dataset) -> dict[str, float]:
    found = MetricAccumulator(KS)
    found.update(lists, part.labels)
    return {name: value for name, value in found.result().items() if name.startswith("P@")}


def sizes(layer: Any) -> dict[str, int]:
    """Bytes of a layer's arrays."""
    out = {name: getattr(layer, name).nbytes for name in ("weight", "index") if hasattr(layer, name)}
    if getattr(layer, "bias", None) is not None:
        out["weight"] += layer.bias.nbytes
    return {**out, "state": sum(array.nbytes for array in layer._optimizer.arrays.values())}


def train(settings: dict[str, Any], part: Dataset, test: Dataset) -> dict[str, Any]:
    """Trains by the settings on one thread; the evaluation is in no time and in no peak."""
    import numpy as np

    widehead.set_num_threads(1)
    base = common.resident_mib()
    common.reset_peak()
    model = Model(n_classes=part.n_labels, **settings)
    wall, cpu = time.perf_counter(), time.process_time()
    model.fit(part.features, part.labels)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = common.peak_mib()
    dictionary = {} if model.dictionary_ is None else {"dictionary": sum(sizes(model.dictionary_).values())}
    assert test.features is not None
    lists = [model.predict_topk(test.features[at : at + _SERVE], max(KS))[1] for at in range(0, len(test), _SERVE)]
    return {
        "metrics": measure(np.concatenate(lists), test),
        "epoch_loss": [entry["loss"] for entry in model.history_],
        "cpu_s": cpu,
        "wall_s": wall,
        "cpu_s_per_epoch": cpu / len(model.history_),
        "peak_mib": peak,
        "data_mib": base,
        "head_bytes": {**sizes(model.head_), **dictionary},
        "first_layer_bytes": sizes(model.bag_),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--validation", action="store_true")
    args = parser.parse_args()
    part, test = quality_data.split(args.folder, args.validation)
    print(json.dumps(train(args.settings, part, test)))


if __name__ == "__main__":
    main()
