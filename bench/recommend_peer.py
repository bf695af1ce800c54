"""recommend_peer.py -- one run of implicit's ALS for exact_quality.py, under the Python that has it.

Reads R.npz (users by items) in a folder, writes the factors to users.npy and items.npy there, and prints a line of
JSON. Needs numpy, scipy and implicit, not widehead.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from implicit.cpu.als import AlternatingLeastSquares
from implicit.nearest_neighbours import bm25_weight


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    observed = sp.csr_matrix(sp.load_npz(folder / "R.npz"))
    bm25 = options.pop("bm25", None)
    wall, cpu = time.perf_counter(), time.process_time()
    if bm25:
        observed = bm25_weight(observed.T, K1=bm25[0], B=bm25[1]).T.tocsr().astype(np.float32)
        observed.data /= observed.data.mean()
    model = AlternatingLeastSquares(num_threads=1, random_state=0, **options)
    model.fit(observed, show_progress=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    np.save(folder / "users.npy", model.user_factors)
    np.save(folder / "items.npy", model.item_factors)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"cpu_s": cpu, "wall_s": wall, "peak_mib": peak}))


if __name__ == "__main__":
    main()
