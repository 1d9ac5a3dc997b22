"""`--dtype 4bit` and `8bit`: what is refused, and when; the real thing is in tests/stacks."""

from importlib.metadata import PackageNotFoundError

import pytest
import torch
from transformers.quantizers import AutoHfQuantizer

from bayestune import Refusal
from bayestune.models import bits, is_bits, load_model
from bayestune.models.bits import quantisation, settle_quantised
from running import failed, fitting, furnish
from tiny import byte_level_tokenizer, tiny_bert, tiny_llama


@pytest.fixture
def installed(monkeypatch):
    """A version of bitsandbytes that seems to be there."""

    def put(version, error=None):
        def validate(*_, **__):
            if error:
                raise error

        def found(_):
            if version is None:
                raise PackageNotFoundError
            return version

        monkeypatch.setattr(bits, "version", found)
        quantizer = type("Quantizer", (), {"validate_environment": validate})
        monkeypatch.setattr(AutoHfQuantizer, "from_config", lambda *_, **__: quantizer())

    return put


def test_bits_are_types_of_their_own():
    assert [is_bits(kind) for kind in ("4bit", "8bit", "float32", torch.bfloat16)] == [1, 1, 0, 0]


@pytest.mark.parametrize("dtype", ["4bit", "8bit"])
@pytest.mark.parametrize(("version", "got"), [(None, "no bitsandbytes"), ("0.45.2", "0.45.2")])
def test_a_missing_or_old_package_is_said_before_any_work(
    dtype, version, got, installed, tmp_path, capsys
):
    installed(version)
    place = furnish(tmp_path, tiny_llama(), byte_level_tokenizer())
    said = failed(fitting(place, dtype=dtype), capsys)
    assert f"dtype '{dtype}' needs a package: got {got}" in said.replace("bitsandbytes 0", "0")
    assert "expected 0.46.1 or newer; pip install 'bayestune[quantised]'" in said
    assert not (place / "out").exists()
    with pytest.raises(Refusal, match="needs a package"):
        load_model(str(place / "model"), dtype=dtype, device="meta")


def test_a_device_that_bitsandbytes_does_not_know_is_said_with_its_reason(installed):
    installed("0.50.0", RuntimeError("None of the available devices are supported\nmore"))
    with pytest.raises(
        Refusal, match=r"cannot quantise here: .*available devices are supported', .*dtype bfloat16"
    ):
        quantisation("tiny", "8bit", tiny_llama(), None)


def test_weights_that_are_quantised_already_are_refused(installed):
    installed("0.50.0")
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(
        Refusal, match=r"'tiny' is quantised already: got dtype '4bit' for weights of gptq"
    ):
        quantisation("tiny", "4bit", model, None)


def test_what_transformers_is_told(installed):
    installed("0.50.0")
    options = quantisation("tiny", "4bit", tiny_llama(), "cpu")
    asked = options["quantization_config"]
    assert options["device_map"] == {"": "cpu"}
    assert options["dtype"] is torch.float32
    assert (asked.bnb_4bit_quant_type, asked.bnb_4bit_use_double_quant) == ("nf4", True)
    assert asked.bnb_4bit_compute_dtype is torch.bfloat16
    assert asked.llm_int8_skip_modules is None
    asked = quantisation("tiny", "8bit", tiny_bert(), "cpu")["quantization_config"]
    assert asked.load_in_8bit
    assert {"classifier", "pooler"} <= set(asked.llm_int8_skip_modules)


def test_a_model_without_a_quantised_layer_is_refused():
    with pytest.raises(Refusal, match="'tiny' has no layer that can be quantised: got dtype '4b"):
        settle_quantised("tiny", "4bit", tiny_llama())


def test_outlines_for_settings_have_float_weights(installed, tmp_path):
    installed("0.50.0")
    place = furnish(tmp_path, tiny_llama(), byte_level_tokenizer())
    model = load_model(str(place / "model"), dtype="4bit", device="meta").model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
