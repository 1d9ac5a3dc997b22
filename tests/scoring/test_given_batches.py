"""Ready scorers on heads of several kinds: where classes are, and which places are padding."""

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForAudioFrameClassification,
)

from bayestune import Draws, Gaussian, HeadLogits, LastToken, predict
from tiny import SIZES, converted

T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
SOUND = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
SOUND |= {"intermediate_size": 64, "conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [8, 4]}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
PICTURES = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}
PICTURES |= {"hidden_sizes": [16, 32], "patch_sizes": [3, 3], "strides": [2, 2]}
PICTURES |= {"num_attention_heads": [1, 2], "decoder_hidden_size": 16, "num_labels": 5}


def posterior_of(base, scorer, *targets):
    """A Gaussian over LoRA on some layers of a base."""
    return Gaussian(converted(base, target_modules=list(targets), task_type=None), scorer)


def seq2seq(scorer):
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=1))
    return posterior_of(base, scorer, "q", "v")


def both_padded():
    """A batch for an encoder–decoder: both sides as long, each padded in another row."""
    torch.manual_seed(3)
    ids = torch.randint(4, 60, (2, 6))
    read = torch.randint(4, 60, (2, 6))
    masks = torch.ones(2, 2, 6, dtype=torch.long)
    masks[0, 0, 4:] = 0
    masks[1, 1, 3:] = 0
    batch = {"input_ids": ids, "attention_mask": masks[0]}
    return {**batch, "decoder_input_ids": read, "decoder_attention_mask": masks[1]}


def test_the_classes_of_pixels_come_last():
    torch.manual_seed(0)
    base = SegformerForSemanticSegmentation(SegformerConfig(**PICTURES))
    leaves = {path.split(".")[-1] for path, _ in base.named_modules()}
    targets = {"query", "value", "q_proj", "v_proj"} & leaves
    posterior = posterior_of(base, HeadLogits(), *targets)
    batch = {"pixel_values": torch.randn(2, 3, 32, 48)}
    found = predict(posterior, batch, 3)
    assert found.probabilities.shape == (2, 16, 24, 5)
    own = posterior.on(lambda model, given: model(**given).logits).logits(batch, Draws(3))
    assert_close(found.probabilities, own.double().softmax(2).mean(0).movedim(1, -1))
    assert found.choice.shape == (2, 16, 24)


def test_frames_of_padded_sounds_are_nothing():
    torch.manual_seed(0)
    base = Wav2Vec2ForAudioFrameClassification(Wav2Vec2Config(**SOUND))
    posterior = posterior_of(base, HeadLogits(), "q_proj", "v_proj")
    mask = torch.ones(2, 600, dtype=torch.long)
    mask[1, 250:] = 0
    found = predict(posterior, {"input_values": torch.randn(2, 600), "attention_mask": mask}, 3)
    real = base._get_feature_vector_attention_mask(found.choice.shape[1], mask)
    assert real.sum(1).tolist() == [found.choice.shape[1], 12]
    assert_close((found.total_entropy > 0), real)


def test_what_a_decoder_has_read_says_which_places_are_padding():
    batch = both_padded()
    found = predict(seq2seq(HeadLogits()), batch, 3)
    assert_close(found.total_entropy > 0, batch["decoder_attention_mask"] > 0)
    del batch["decoder_attention_mask"]
    assert (predict(seq2seq(HeadLogits()), batch, 3).total_entropy > 0).all()


def test_the_last_token_of_an_encoder_decoder_is_its_decoders():
    posterior = seq2seq(LastToken([11, 12]))
    batch = both_padded()
    plain = posterior.on(lambda model, given: model(**given).logits[:, [5, 2]][..., [11, 12]])
    expected = plain.logits(batch, Draws(3))
    expected = torch.stack([expected[:, 0, 0], expected[:, 1, 1]], 1)
    assert_close(posterior.logits(batch, Draws(3)), expected, rtol=1e-4, atol=1e-5)
    start = {**batch, "decoder_input_ids": torch.ones(2, 1, dtype=torch.long)}
    del start["decoder_attention_mask"]
    plain = posterior.on(lambda model, given: model(**given).logits[:, 0, [11, 12]])
    assert_close(posterior.logits(start, Draws(3)), plain.logits(start, Draws(3)))
    with pytest.raises(
        ValueError, match=r"is its decoder's: got \['attention_mask', 'input_ids'\]"
    ):
        posterior.logits({name: batch[name] for name in ("input_ids", "attention_mask")}, Draws(3))


def test_heads_without_logits_are_refused():
    torch.manual_seed(0)
    base = BertForQuestionAnswering(BertConfig(**SIZES))
    posterior = posterior_of(base, HeadLogits(), "query")
    batch = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
    with pytest.raises(
        ValueError, match=r"gives no logits: got an output of \['start_logits', 'en"
    ):
        predict(posterior, batch, 3)
