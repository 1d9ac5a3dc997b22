"""A folder with a tiny model, a posterior fitted on it, and its student; tests do not change it."""

import pytest

from running import fitting, furnish, run
from tiny import byte_level_tokenizer, tiny_llama


@pytest.fixture(scope="package")
def home(tmp_path_factory):
    """`model`, `out` (BLoB, with records), `student`, and rows."""
    place = furnish(
        tmp_path_factory.mktemp("home"), tiny_llama(initializer_range=0.3), byte_level_tokenizer()
    )
    noisy = {"blob.init_root_std": 0.3, "blob.final_std": 0.15, "learning_rate": 0.05, "steps": 6}
    run(*fitting(place, method="blob", **noisy))
    quick = ("--steps=3", "--batch_size=2", "--progress=false")
    rows = f"--unlabelled={place / 'ask.jsonl'}"
    run("distil", place / "out", rows, f"--output={place / 'student'}", *quick)
    shown = ("--evaluation_data", place / "test.jsonl", "--draws=[0,8]")
    run("evaluate", "--posterior", place / "out", *shown)
    return place
