"""DeepSpeed's optimisers that a KL step cannot reach are refused by name, before the first step."""

import pytest
import torch

from bayestune.adapters import bayesify
from bayestune.errors import Refusal
from bayestune.kl import KLStep
from bayestune.kl.zero_optimizer import groups_of, is_zero
from tiny import adapted, tiny_llama


def of_deepspeed(name, **own):
    return type(name, (), {"__module__": "deepspeed.runtime", "param_groups": [], **own})()


def test_a_plain_optimiser_is_none_of_zero():
    optimizer = torch.optim.SGD([torch.zeros(2)], 0.1)
    assert not is_zero(optimizer)
    assert [len(parameters) for _, parameters in groups_of(optimizer)] == [1]


def test_groups_of_zero_3_are_those_of_its_sub_groups():
    parameters = [torch.zeros(1), torch.ones(1)]
    groups = [{"weight_decay": 0.1}, {"weight_decay": 0.0}]
    told = {"param_groups": groups, "sub_group_to_group_id": {0: 0, 1: 0, 2: 1}}
    sub_groups = [[parameters[0]], [], [parameters[1]]]
    zero = of_deepspeed("DeepSpeedZeroOptimizer_Stage3", fp16_groups=sub_groups, **told)
    found = [(group["weight_decay"], len(held)) for group, held in groups_of(zero)]
    assert found == [(0.1, 1), (0.1, 0), (0.0, 1)]


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (of_deepspeed("FP16_Optimizer"), "copies of DeepSpeed's FP16_Optimizer: expected .* ZeRO"),
        (
            of_deepspeed("DeepSpeedZeroOptimizer_Stage3", swap_optimizer=True),
            'offload_optimizer with device "nvme", expected "cpu" or none',
        ),
    ],
)
def test_what_a_kl_step_cannot_reach_is_refused(optimizer, said):
    model = adapted(tiny_llama())
    bayesify(model)
    with pytest.raises(Refusal, match=said):
        KLStep().attach(model, optimizer, total_steps=4)
