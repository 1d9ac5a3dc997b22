"""A grid of models, tasks, methods and seeds → one record for each cell, computed once.

A run can be cut off at any time and goes on where it stopped, here or on a Ray cluster.
"""

from bayestune.bench.cells import Cell, Grid, TaskSettings
from bayestune.bench.keys import digest, lasting, lasting_method, model_facts
from bayestune.bench.launch import Launcher, run_bench
from bayestune.bench.store import PLAN, collect, finished
from bayestune.bench.weights import weights_digest

__all__ = [
    "PLAN",
    "Cell",
    "Grid",
    "Launcher",
    "TaskSettings",
    "collect",
    "digest",
    "finished",
    "lasting",
    "lasting_method",
    "model_facts",
    "run_bench",
    "weights_digest",
]
