"""places.py -- the place resolver: quality on the held-out names against CPU time of training, beside other methods.

python bench/places.py                  epochs 1, 2, 4 and 8
python bench/places.py --epochs 1 2     others
"""

from __future__ import annotations

import argparse
import dataclasses
import re

import common
import numpy as np

from widehead.demo.evaluate import hits_of, quality
from widehead.demo.options import Options
from widehead.demo.places import from_package
from widehead.demo.report import PEERS
from widehead.demo.resolver import Resolver
from widehead.demo.train import train

_BATCH = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    places = from_package()
    peers = {}
    for peer in PEERS:
        cpu = re.fullmatch(r"(\d+) CPU s", peer.cost)
        seconds = int(cpu[1]) if cpu else None
        peers[peer.name] = {"P@1": peer.p1, "hit@5": peer.hit5, "cost": peer.cost, "cpu_seconds": seconds}
    result = {"machine": common.machine(), "held_out": len(places.test), "peers": peers, "runs": []}
    for epochs in args.epochs:
        options = dataclasses.replace(Options(), epochs=epochs)
        model, cost = train(places, options, progress=True)
        resolver = Resolver(model, places)
        names = places.test.names
        parts = [resolver.topk(names[at : at + _BATCH], 10) for at in range(0, len(names), _BATCH)]
        found = quality(hits_of(np.concatenate(parts), places.test.labels))
        run = {**dataclasses.asdict(options), **dataclasses.asdict(cost), **found}
        result["runs"].append(run)
        shown = f"P@1 {run['P@1']:.1f}, hit@5 {run['hit@5']:.1f}, {run['cpu_seconds']:.0f} CPU s"
        print(f"{epochs} epochs: {shown}", flush=True)
    print("written:", common.write("places", result))


if __name__ == "__main__":
    main()
