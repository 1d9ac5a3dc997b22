import pytest
import torch

from bayestune.metrics import confusion


def test_a_line_is_a_right_class_and_a_column_a_choice():
    choices = torch.tensor([0, 1, 1, 2, 2, 2])
    answers = torch.tensor([0, 0, 0, 1, 2, 2])
    assert confusion(choices, answers, 4).tolist() == [
        [1, 2, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 2, 0],
        [0, 0, 0, 0],
    ]
    assert confusion(choices[:0], answers[:0], 2).tolist() == [[0, 0], [0, 0]]


def test_what_cannot_be_counted_is_refused():
    two = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(1,\); expected \(N,\) of both"):
        confusion(two, two[:1], 2)
    with pytest.raises(ValueError, match="class indices from 0 to 1; expected 0 to 0"):
        confusion(two, two, 1)
    with pytest.raises(ValueError, match="class indices from -1 to 1; expected 0 to 2"):
        confusion(torch.tensor([-1, 1]), two, 3)
