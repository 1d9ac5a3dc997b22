"""A grid of models, tasks, methods and seeds → one record for each, computed once, whatever interrupts the run."""

from bayestune.benchmark.cells import collect
from bayestune.benchmark.grid import Cell, Grid, TaskSettings, cells
from bayestune.benchmark.running import Launcher, run_bench
from bayestune.benchmark.table import run_table

__all__ = ["Cell", "Grid", "Launcher", "TaskSettings", "cells", "collect", "run_bench", "run_table"]
