"""The tiny question-answering case on which the tests of methods fit."""

import pytest

from promises import Case


@pytest.fixture(scope="session")
def case() -> Case:
    return Case("letter")


@pytest.fixture(scope="session")
def head() -> Case:
    return Case("head")
