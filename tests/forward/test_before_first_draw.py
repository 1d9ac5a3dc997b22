"""What comes before the first drawn slot is computed once, and the logits are the draws' own."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bayestune.adapters import Slots, bayesify
from bayestune.forward import Draws, without_common_prefix
from bayestune.posteriors import Gaussian
from tiny import (
    CAUSAL,
    CLOSE,
    adapted,
    causal,
    end_logits,
    one_by_one,
    passes,
    ragged_batches,
    tiny_llama,
)


def rows_of_blocks(model: nn.Module) -> list[int]:
    """The rows that each block sees in the next pass, block by block."""
    seen = []
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for block in blocks:
        block.register_forward_hook(lambda _, args, output: seen.append(len(output)))
    return seen


def drawn_in(model: nn.Module, *blocks: int) -> nn.Module:
    """The model, Gaussian in some of its blocks alone."""
    names = [name for name in Slots(model).names() if int(name.split(".")[2]) in blocks]
    bayesify(model, init_root_std=0.5, slots=names)
    return model


@pytest.mark.parametrize("kind", ["letter", "packed", "expanded"])
@pytest.mark.parametrize("blocks", [(1, 2), (2,), (0, 1, 2)])
def test_blocks_before_the_first_drawn_one_run_once(kind, blocks, byte_level):
    scorer, (batch,) = ragged_batches(byte_level, kind, [(0, 1, 2)])
    posterior = Gaussian(drawn_in(adapted(causal(CAUSAL["llama"])), *blocks), scorer)
    expected = one_by_one(posterior, batch, Draws(3))
    seen = rows_of_blocks(posterior.model)
    with without_common_prefix():
        assert_close(posterior.logits(batch, Draws(3)), expected, **CLOSE)
    sequences = len(batch["input_ids"])
    assert seen == [sequences * (1 if block < blocks[0] else 3) for block in range(3)]


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("rows", [1, 3])
def test_other_architectures_and_batches_without_masks(name, rows):
    posterior = Gaussian(drawn_in(adapted(causal(CAUSAL[name])), 2), end_logits)
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(3, 400, (rows, 7))}
    expected = one_by_one(posterior, batch, Draws(4))
    seen = rows_of_blocks(posterior.model)
    assert_close(posterior.logits(batch, Draws(4)), expected, **CLOSE)
    assert seen == [rows, rows, 4 * rows]


@pytest.fixture
def of_head(byte_level) -> tuple[Gaussian, dict[str, torch.Tensor]]:
    """A posterior whose output head alone is drawn, and a batch."""
    scorer, (batch,) = ragged_batches(byte_level, "letter", [(0, 1, 2)])
    model = adapted(tiny_llama(), target_modules=["q_proj", "lm_head"])
    bayesify(model, init_root_std=0.5, slots=["lm_head.lora_A"])
    return Gaussian(model, scorer), batch


def test_any_number_of_draws_of_the_head_alone_is_one_pass(of_head):
    posterior, batch = of_head
    expected = one_by_one(posterior, batch, Draws(5))
    seen = passes(posterior.model)
    assert_close(posterior.logits(batch, Draws(5, max_rows=1)), expected, **CLOSE)
    assert seen == [tuple(batch["input_ids"].shape)]
    assert expected.nan_to_num(neginf=0).var(0).max() > 0


def test_bounds_hold_for_draws_of_the_head_that_share_a_prefix(of_head):
    posterior, batch = of_head
    seen = passes(posterior.model)
    posterior.logits(batch, Draws(4, shared_prefix=2, max_rows=6))
    assert seen[1:] == [(6, 2), (6, 2)]
