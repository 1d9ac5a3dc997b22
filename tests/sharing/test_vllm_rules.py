"""Each rule of vLLM's loader, by what breaks it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bayestune.sharing import vllm_findings
from bayestune.sharing.vllm_rules import largest_rank, smallest_max_rank

PLAIN = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
SLOTS = (f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight")


def folder_of(tmp_path, weights=SLOTS, **changes):
    (tmp_path / "adapter_config.json").write_text(json.dumps({**PLAIN, **changes}))
    tensors = {name: torch.ones(2) for name in weights}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


def test_a_plain_adapter_has_no_findings(tmp_path):
    inits = {"init_lora_weights": "eva", "use_rslora": True, "rank_pattern": {}}
    assert vllm_findings(folder_of(tmp_path, **inits)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_alpha": None}, "without ['lora_alpha'], expected all of"),
        ({"use_dora": True}, "got DoRA (use_dora=True), expected plain LoRA; fit with"),
        ({"lora_bias": True}, "a bias in lora_B"),
        ({"alora_invocation_tokens": [1]}, "an activated LoRA"),
        ({"layer_replication": [[0, 1]]}, "replicated layers"),
        ({"use_bdlora": {"a": 1}}, "a block-diagonal LoRA"),
        ({"use_qalora": True}, "a QALoRA"),
        ({"bias": "all"}, "got trained biases (bias='all'), expected bias='none'"),
        ({"modules_to_save": ["lm_head"]}, "(modules_to_save has ['lm_head']), expected none but"),
        ({"init_lora_weights": "pissa"}, "got init_lora_weights='pissa', which changes the base"),
        ({"r": 513}, "got rank 513, expected at most 512; fit with a smaller --lora.rank"),
        ({"rank_pattern": {"q_proj": 600}}, "got rank 600, expected at most 512"),
        ({"r": 0}, "got rank 0, expected 1 or more"),
    ],
)
def test_settings_that_do_not_load(changes, said, tmp_path):
    found = [str(one) for one in vllm_findings(folder_of(tmp_path, **changes)) if one.refused]
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    "weight",
    [
        "base_model.model.score.weight",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        f"{LAYER}.lora_magnitude_vector",
        f"{LAYER}.lora_B.bias",
        "base_model.model.model.norm.weight",
    ],
)
def test_weights_beside_loras_do_not_load(weight, tmp_path):
    (found,) = vllm_findings(folder_of(tmp_path, (*SLOTS, weight)))
    assert found.refused
    assert str(found).startswith(f"got 1 weights beside LoRA's, such as [{weight!r}]")


def test_a_head_that_is_saved_whole_loads(tmp_path):
    weights = (*SLOTS, "base_model.model.score.weight")
    assert vllm_findings(folder_of(tmp_path, weights, modules_to_save=["score"])) == []


@pytest.mark.parametrize(
    ("weights", "changes", "said"),
    [
        (SLOTS, {"alpha_pattern": {"q_proj": 3}}, "got alpha_pattern, expected vLLM 0.33.0 or"),
        (("base_model.model.lm_head.lora_A.weight",), {}, "LoRA on embeddings or the output"),
        (("base_model.model.model.embed_tokens.lora_embedding_A",), {}, "LoRA on embeddings"),
    ],
)
def test_what_may_be_read_otherwise_is_no_refusal(weights, changes, said, tmp_path):
    (found,) = vllm_findings(folder_of(tmp_path, weights, **changes))
    assert not found.refused
    assert said in str(found)


def test_a_folder_without_weights_does_not_load(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    (found,) = vllm_findings(tmp_path)
    assert "no readable adapter_model.safetensors" in str(found)


def test_the_ranks_that_a_server_is_started_with():
    assert [smallest_max_rank(rank) for rank in (1, 2, 8, 257, 512, 513)] == [
        1,
        8,
        8,
        320,
        512,
        None,
    ]
    assert largest_rank({"r": 4, "rank_pattern": {"q": 20, "k": 2}}) == 20
