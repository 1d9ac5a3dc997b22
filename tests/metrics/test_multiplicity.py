import pytest
import torch

from bayestune.metrics import holm


def test_holms_own_steps():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"alone": 0.2}) == {"alone": 0.2}
    assert holm({}) == {}


def test_the_chance_of_any_false_find_stays_at_the_level():
    p = torch.rand(2000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    names = "abcdef"
    false = 0
    for line in p.tolist():
        false += min(holm(dict(zip(names, line, strict=True))).values()) < 0.1
    # 1 − (1 − 0.1/6)^6 = 0.096, four standard errors
    assert abs(false / 2000 - 0.096) < 4 * (0.1 * 0.9 / 2000) ** 0.5
