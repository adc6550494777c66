"""Do runs on threads repeat each other bit by bit?

`python benchmarks/determinism.py`: trains a module that draws and writes wherever a module can
(dropout, attention dropout, LSTM dropout, BatchNorm, activation checkpointing, noise in the step)
200 times with one seed, and counts the different results. `SingleDevice(shards=n)` must give the
same one as n threads, another seed must not.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import torch
from rich.table import Table
from timing import console, machine

from composefit import SingleDevice, Strategy, ThreadDataParallel, Trainer

sys.path.append(str(Path(__file__).parents[1]))  # the module is that of the tests

from tests.laws.noisy import Noisy, batches


def result(strategy: Strategy, seed: int = 0) -> str:
    """Train, and the hash of all parameters and buffers."""
    torch.manual_seed(0)
    module = Noisy()
    trainer = Trainer(
        strategy=strategy,
        max_epochs=1,
        seed=seed,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, batches(5))
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Run, print the table, fail if two results differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200, help="of each number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    given = parser.parse_args()
    torch.set_num_threads(1)  # SingleDevice then computes as each of the threads does

    table = Table(title=f"{given.runs} runs with one seed", title_justify="left")
    for column in ("threads", "different results", "shards in a row", "another seed"):
        table.add_column(column, justify="right")
    failed = False
    for threads in given.threads:
        found = {result(ThreadDataParallel(threads)) for _ in range(given.runs)}
        same = result(SingleDevice("cpu", shards=threads)) in found
        other = result(ThreadDataParallel(threads), seed=1) not in found
        failed |= len(found) > 1 or not same or not other
        table.add_row(
            str(threads),
            str(len(found)),
            "the same" if same else "DIFFERENT",
            "different" if other else "THE SAME",
        )
    console.print(table)
    console.print(machine())
    if failed:
        sys.exit("runs with one seed must give one result, on threads and in a row alike")


if __name__ == "__main__":
    main()
