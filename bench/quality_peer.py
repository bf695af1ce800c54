"""quality_peer.py -- one run of Omikuji or napkinXC for sparse_quality.py, under the Python that has them.

Reads X.npz, Y.npz and T.npz (training features and labels, test features) in a folder, writes the five best classes of
every test row to best.npy there, and prints a line of JSON. Needs numpy and scipy, not widehead.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp

K = 5


def omikuji(folder: Path, x: sp.csr_matrix, y: sp.csr_matrix, t: sp.csr_matrix, options: dict) -> tuple[list, float]:
    import omikuji as peer

    with open(folder / "train.txt", "w") as out:
        out.write(f"{x.shape[0]} {x.shape[1]} {y.shape[1]}\n")
        for i in range(x.shape[0]):
            labels = ",".join(map(str, y.indices[y.indptr[i] : y.indptr[i + 1]]))
            row = slice(x.indptr[i], x.indptr[i + 1])
            out.write(
                labels + "".join(f" {c}:{v:.6g}" for c, v in zip(x.indices[row], x.data[row], strict=True)) + "\n"
            )
    hyper = peer.Model.default_hyper_param()
    for name, value in options.items():
        setattr(hyper, name, value)
    begin = time.process_time()
    model = peer.Model.train_on_data(str(folder / "train.txt"), hyper, n_threads=1)
    cpu = time.process_time() - begin
    model.save(str(folder / "model"))
    best = []
    for i in range(t.shape[0]):
        row = slice(t.indptr[i], t.indptr[i + 1])
        pairs = list(zip(t.indices[row].tolist(), t.data[row].tolist(), strict=True))
        best.append([label for label, _ in model.predict(pairs, top_k=K)])
    return best, cpu


def napkinxc(folder: Path, x: sp.csr_matrix, y: sp.csr_matrix, t: sp.csr_matrix, options: dict) -> tuple[list, float]:
    from napkinxc.models import PLT

    model = PLT(str(folder / "model"), threads=1, seed=0, **options)
    rows = [y.indices[y.indptr[i] : y.indptr[i + 1]].tolist() for i in range(y.shape[0])]
    begin = time.process_time()
    model.fit(x, rows)
    cpu = time.process_time() - begin
    return model.predict(t, top_k=K), cpu


def main() -> None:
    folder, name, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    x, y, t = (sp.csr_matrix(sp.load_npz(folder / f"{part}.npz")) for part in "XYT")
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    best, cpu = {"omikuji": omikuji, "napkinxc": napkinxc}[name](folder, x, y, t, options)
    out = np.full((t.shape[0], K), -1, np.int64)
    for i, row in enumerate(best):
        out[i, : len(row)] = row[:K]
    np.save(folder / "best.npy", out)
    model = folder / "model"
    size = sum(f.stat().st_size for f in model.rglob("*") if f.is_file()) if model.exists() else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"cpu_s": cpu, "peak_mib": peak, "data_mib": base, "model_file_bytes": size}))


if __name__ == "__main__":
    main()
