"""Documents of a packed batch see the draws that they would see as sequences of their own."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bayestune.adapters import bayesify, group_rows
from bayestune.adapters.packing import BLOCK, Documents
from tiny import adapted, tiny_llama

LENGTHS = (5, BLOCK + 9, 1, BLOCK)


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 400, (length,), generator=generator) for length in LENGTHS]


def packed() -> dict[str, torch.Tensor]:
    places = torch.cat([torch.arange(length) for length in LENGTHS])
    return {"input_ids": torch.cat(documents())[None], "position_ids": places[None]}


def padded() -> dict[str, torch.Tensor]:
    ids = nn.utils.rnn.pad_sequence(documents(), batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def gaussian(noise: str = "row", **config: object) -> nn.Module:
    model = adapted(tiny_llama(), **config)
    bayesify(model, init_root_std=0.5, noise=noise)
    return model.double().train()


def outcome(model: nn.Module, inputs: dict[str, torch.Tensor], seed: int = 0):
    """The logits of all documents' tokens, and the gradients of their sum of squares."""
    model.zero_grad()
    torch.manual_seed(seed)
    logits = model(**inputs, use_cache=False).logits
    mask = inputs.get("attention_mask")
    tokens = logits[0] if mask is None else logits[mask.bool()]
    tokens.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return tokens.detach(), gradients


@pytest.mark.parametrize("noise", ["row", "independent"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("groups", [None, 2, [1, 0, 0, 1]])
def test_a_packed_batch_gives_what_its_documents_give_side_by_side(noise, checkpointing, groups):
    model = gaussian(noise)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if groups is not None:
        options = {"size": groups} if isinstance(groups, int) else {"row_of": groups}
        group_rows(model, **options, lasting=True)
    logits, gradients = outcome(model, packed())
    expected, of_padded = outcome(model, padded())
    assert_close(logits, expected)
    assert_close(gradients, of_padded)
    other, _ = outcome(model, packed(), seed=1)
    assert not torch.allclose(other, expected)


def test_documents_see_their_draws_under_lora_dropout_too():
    model = gaussian(lora_dropout=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()  # the draws are made for all layers at once, without masks
    assert_close(outcome(model, packed()), outcome(model, padded()))


def test_a_sequence_whose_positions_go_on_is_one_row():
    counted = torch.arange(6).repeat(2, 1)
    assert Documents.of(counted) is None
    assert Documents.of(counted + 3) is None
    counted[1, 4:] = torch.arange(2)
    found = Documents.of(counted)
    assert found.number == 3
    assert found.document.tolist() == [0, 1, 2]


def test_positions_beside_a_mask_tell_no_documents_apart():
    model = gaussian()
    inputs = packed() | {"attention_mask": torch.ones_like(packed()["input_ids"])}
    first, _ = outcome(model, inputs)
    group_rows(model, 1)
    assert_close(outcome(model, inputs)[0], first)
    assert not torch.allclose(first, outcome(model, packed())[0])
