"""What accelerate's launcher may do with a training."""

import pytest

from bayestune.errors import Refusal
from bayestune.kl import KLStep
from bayestune.training.callbacks import FiniteLoss
from bayestune.training.launched import check_launched

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


@pytest.fixture
def under(monkeypatch):
    def put(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("environment", [{}, FSDP2, ZERO2])
def test_adamw_and_a_kl_step_are_taken(environment, under):
    under(environment)
    check_launched([KLStep()], None, bf16=False)


@pytest.mark.parametrize(
    ("environment", "callbacks", "optimizer", "said"),
    [
        (FSDP2, [FiniteLoss()], None, "FSDP 2 keeps what is trained in parts: got FiniteLoss"),
        (ZERO2, [], object(), "ZeRO-2 keeps what is trained in parts: got an optimiser"),
        ({**FSDP2, "FSDP_VERSION": "1"}, [], None, "got --fsdp_version 1, expected FSDP 2"),
    ],
)
def test_what_would_miss_the_parts_is_refused(environment, callbacks, optimizer, said, under):
    under(environment)
    with pytest.raises(Refusal, match=said):
        check_launched(callbacks, optimizer, bf16=False)


def test_in_whole_models_callbacks_and_optimisers_are_free():
    check_launched([FiniteLoss()], object(), bf16=False)


@pytest.mark.parametrize(
    ("precision", "bf16", "refused"),
    [
        ("no", False, False),
        ("no", True, False),
        ("bf16", True, False),
        ("bf16", False, True),
        ("fp16", False, True),
    ],
)
def test_the_launcher_does_not_change_the_precision(precision, bf16, refused, under):
    under({"ACCELERATE_MIXED_PRECISION": precision})
    if not refused:
        check_launched([], None, bf16=bf16)
        return
    with pytest.raises(Refusal, match=f"got --mixed_precision {precision} and bf16=False"):
        check_launched([], None, bf16=bf16)
