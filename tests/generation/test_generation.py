"""Text under held draws: the loop against plain passes, its figures, and what is refused."""

import copy
from collections import Counter

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    LogitsProcessor,
    MambaConfig,
    MistralConfig,
    Qwen2MoeConfig,
    StoppingCriteria,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
)

from bayestune import Draws, Gaussian, Mixture, Point, generate
from bayestune.adapters import Slots
from bayestune.forward import without_common_prefix
from bayestune.posteriors import Dropout, Prediction, Tempered, TokenNoise
from conformance.test_posteriors import CASES
from tiny import (
    CAUSAL,
    CLOSE,
    WIDE,
    adapted,
    causal,
    converted,
    end_logits,
    tiny_bert,
    with_second,
)

IDS = torch.arange(3, 27).reshape(2, 12)
PROMPTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
RAGGED = {"input_ids": IDS.clone(), "attention_mask": torch.ones_like(IDS)}
RAGGED["input_ids"][1, :5] = 0
RAGGED["attention_mask"][1, :5] = 0


def whole(model, batch):
    """A scorer: the logits (N, V) after the last token."""
    return model(**batch).logits[:, -1]


@pytest.fixture(params=CAUSAL)
def posterior(request):
    return Gaussian(converted(causal(CAUSAL[request.param])), whole)


@pytest.fixture
def llama_posterior():
    return Gaussian(converted(causal(CAUSAL["llama"])), whole)


def single(posterior, index, seed=0):
    """A plain model that has one draw's weights."""
    model = copy.deepcopy(posterior.model).eval()
    slots = Slots(model, posterior.adapter).modules()
    with torch.no_grad():
        for name, weight in posterior.draw(index, seed).items():
            slots[name].weight.copy_(weight)
    return model


@torch.no_grad()
def plain_loop(posterior, ids, draws, steps):
    """Greedy tokens of the averaged probabilities: whole passes of each draw's own model."""
    models = [single(posterior, index) for index in range(draws)]
    predictions = []
    for _ in range(steps):
        logits = torch.stack([model(input_ids=ids).logits[:, -1] for model in models])
        predictions.append(Prediction.of(logits))
        ids = torch.cat([ids, predictions[-1].choice[:, None]], 1)
    return ids[:, -steps:], predictions


@pytest.mark.parametrize("use_cache", [True, False])
def test_tokens_and_figures_are_those_of_whole_passes_of_each_draw(posterior, use_cache):
    tokens, predictions = plain_loop(posterior, IDS, 3, 6)
    found = generate(
        posterior, PROMPTS, 3, max_new_tokens=6, eos_token_id=None, use_cache=use_cache
    )
    assert torch.equal(found.sequences, tokens)
    assert found.mask.all()
    for name in ("total_entropy", "expected_entropy", "mutual_information"):
        expected = torch.stack([getattr(p, name) for p in predictions], 1)
        assert_close(getattr(found, name), expected, **CLOSE)
        assert_close(getattr(found.per_sequence(), name), expected.sum(1), **CLOSE)
    chosen = torch.stack([p.log_probabilities.amax(-1) for p in predictions], 1)
    assert_close(found.log_probabilities, chosen, **CLOSE)
    assert_close(found.per_sequence().log_probability, chosen.sum(1), **CLOSE)
    assert (found.mutual_information > 1e-3).all()


def test_prompts_of_other_lengths_are_what_each_is_alone(posterior):
    found = generate(posterior, RAGGED, 3, max_new_tokens=5, eos_token_id=None)
    for row, start in ((0, 0), (1, 5)):
        ids = RAGGED["input_ids"][row : row + 1, start:]
        alone = generate(
            posterior,
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            3,
            max_new_tokens=5,
            eos_token_id=None,
        )
        assert torch.equal(alone.sequences[0], found.sequences[row])
        assert_close(alone.mutual_information[0], found.mutual_information[row], **CLOSE)


OTHERS = {
    "sliding windows": (MistralConfig(**WIDE, sliding_window=8), ["q_proj", "v_proj"]),
    "experts": (
        Qwen2MoeConfig(
            **WIDE,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
        ["q_proj", "shared_expert_gate", "up_proj"],
    ),
    "states": (MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2), ["in_proj"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_caches_of_other_kinds_are_right_too(name):
    config, targets = OTHERS[name]
    posterior = Gaussian(converted(causal(config), target_modules=targets), whole)
    tokens, predictions = plain_loop(posterior, IDS, 2, 4)
    found = generate(posterior, PROMPTS, 2, max_new_tokens=4, eos_token_id=None)
    assert torch.equal(found.sequences, tokens)
    expected = torch.stack([p.mutual_information for p in predictions], 1)
    assert_close(found.mutual_information, expected, **CLOSE)


def test_precision_travels_with_the_draws(llama_posterior):
    found = generate(llama_posterior, PROMPTS, Draws(3), max_new_tokens=1)
    narrow = generate(llama_posterior, PROMPTS, Draws(3, bf16=True), max_new_tokens=1)
    assert not torch.equal(narrow.total_entropy, found.total_entropy)
    assert_close(narrow.total_entropy, found.total_entropy, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}])
def test_the_mean_writes_what_the_model_itself_writes(posterior, options):
    settings = {"max_new_tokens": 12, "do_sample": False, **options}
    expected = posterior.model.generate(**RAGGED, **settings)[:, 12:]
    found = generate(posterior, RAGGED, 0, **settings)
    assert torch.equal(found.sequences, expected)
    assert not found.mutual_information.any()
    assert_close(found.total_entropy, found.expected_entropy)


def test_each_draw_writes_its_own_text_if_asked(posterior):
    found = generate(posterior, PROMPTS, 3, draws_as="sequences", max_new_tokens=6)
    assert found.sequences.shape == found.total_entropy.shape == (3, 2, 6)
    for index in range(3):
        own = single(posterior, index).generate(**PROMPTS, max_new_tokens=6, do_sample=False)
        assert torch.equal(found.sequences[index, :, : own.shape[1] - 12], own[:, 12:])
    assert len({tuple(text.tolist()) for text in found.sequences[:, 0]}) > 1
    assert not found.mutual_information.any()


def test_seeds_are_sets_of_draws_and_draws_go_on(llama_posterior):
    def information(draws, **more):
        found = generate(llama_posterior, PROMPTS, draws, max_new_tokens=1, **more)
        return found.mutual_information

    assert torch.equal(information(3, seed=1), information(Draws(3, seed=1)))
    assert not torch.allclose(information(3, seed=1), information(3))
    assert not torch.allclose(information(Draws(3, first=3)), information(3))


# Sampling


def test_sampled_tokens_follow_the_processed_average_and_draws_agree(llama_posterior):
    one = {name: value[:1, :4] for name, value in PROMPTS.items()}
    logits = llama_posterior.logits(one, Draws(4))
    average = logits.double().softmax(-1).mean(0)[0]
    best = average.topk(3)
    expected = (best.values ** (1 / 0.5)) / (best.values ** (1 / 0.5)).sum()
    torch.manual_seed(0)
    found = generate(
        llama_posterior,
        one,
        4,
        max_new_tokens=1,
        do_sample=True,
        temperature=0.5,
        top_k=3,
        num_return_sequences=2000,
    )
    counts = Counter(found.sequences[:, 0].tolist())
    assert set(counts) <= set(best.indices.tolist())
    for token, share in zip(best.indices.tolist(), expected.tolist(), strict=True):
        error = (share * (1 - share) / 2000) ** 0.5
        assert abs(counts[token] / 2000 - share) < 4 * error
    # the figures are of the average itself
    assert_close(found.log_probabilities.exp().amax(), best.values[0], **CLOSE)


def test_sampling_follows_torchs_generator_and_scores_what_it_chose(llama_posterior):
    def sampled(seed):
        torch.manual_seed(seed)
        return [
            generate(llama_posterior, RAGGED, 3, max_new_tokens=8, do_sample=True, top_k=0)
            for _ in range(2)
        ]

    first, second = sampled(5)
    assert torch.equal(first.sequences, sampled(5)[0].sequences)
    assert not torch.equal(first.sequences, second.sequences)
    text = torch.cat([RAGGED["input_ids"], first.sequences], 1)[:1]

    def all_logits(model, batch):
        return model(**batch).logits.flatten(1)

    with without_common_prefix():
        logits = llama_posterior.on(all_logits).logits({"input_ids": text}, Draws(3))
    logits = logits.unflatten(-1, (text.shape[1], -1))[:, 0, 11:-1]
    prediction = Prediction.of(logits)
    chosen = prediction.log_probabilities.gather(1, first.sequences[0][:, None])[:, 0]
    assert_close(first.log_probabilities[0], chosen, **CLOSE)
    assert_close(first.mutual_information[0], prediction.mutual_information, **CLOSE)


def test_greedy_text_leaves_torchs_generator_alone_and_dropout_restores_it():
    posterior = Dropout(adapted(causal(CAUSAL["llama"]), lora_dropout=0.3), whole)
    before = torch.get_rng_state()
    found = generate(posterior, PROMPTS, 4, max_new_tokens=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found.sequences, generate(posterior, PROMPTS, 4, max_new_tokens=4).sequences)
    assert (found.mutual_information > 0).all()
    sampled = [
        generate(posterior, PROMPTS, 4, max_new_tokens=8, do_sample=True).sequences
        for _ in range(2)
    ]
    assert not torch.equal(*sampled)


# Ends


def test_a_sequence_ends_at_its_own_end_token(llama_posterior):
    free = generate(llama_posterior, PROMPTS, 3, max_new_tokens=8, eos_token_id=None)
    end = int(free.sequences[0, 2])
    found = generate(
        llama_posterior, PROMPTS, 3, max_new_tokens=8, eos_token_id=end, pad_token_id=end
    )
    lengths = []
    for row in free.sequences.tolist():
        lengths.append(row.index(end) + 1 if end in row else 8)
    assert found.lengths.tolist() == lengths
    assert lengths[0] < lengths[1]
    for name in ("log_probabilities", "total_entropy", "mutual_information"):
        assert_close(getattr(found, name), getattr(free, name) * found.mask, **CLOSE)
    assert not found.total_entropy[~found.mask].any()


class AfterTwo(StoppingCriteria):
    """Ends every text once it has two new tokens."""

    def __call__(self, input_ids, scores, **more):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 14)


def test_criteria_and_strings_of_the_callers_own_end_texts(llama_posterior, byte_level):
    own = generate(llama_posterior, PROMPTS, 3, max_new_tokens=9, stopping_criteria=[AfterTwo()])
    assert own.lengths.tolist() == [2, 2]
    free = generate(llama_posterior, PROMPTS, 3, max_new_tokens=9, eos_token_id=None)
    words = byte_level.batch_decode(free.sequences[0][:, None])
    place = next(i for i, word in enumerate(words) if word.strip().isalpha())
    given = {"max_new_tokens": 9, "stop_strings": [words[place]], "tokenizer": byte_level}
    assert generate(llama_posterior, PROMPTS, 3, **given).lengths[0] <= place + 1
    config = GenerationConfig(max_new_tokens=9, stop_strings=[words[place]], pad_token_id=0)
    found = generate(llama_posterior, PROMPTS, 3, generation_config=config, tokenizer=byte_level)
    assert found.lengths[0] <= place + 1
    assert config.stop_strings == [words[place]]
    with pytest.raises(ValueError, match="stop strings need the tokenizer: got stop_strings="):
        generate(llama_posterior, PROMPTS, 3, stop_strings=["a"])


# What the caller hands in


class SeesRows(LogitsProcessor):
    def __init__(self):
        self.shapes = set()

    def __call__(self, input_ids, scores):
        self.shapes.add((len(input_ids), *scores.shape))
        return scores.index_fill(1, torch.tensor([7]), 1e4)


def test_processors_of_the_callers_own_see_the_average_of_n_rows(llama_posterior):
    own = SeesRows()
    found = generate(llama_posterior, PROMPTS, 3, max_new_tokens=3, logits_processor=[own])
    assert own.shapes == {(2, 2, 400)}
    assert (found.sequences == 7).all()


def test_a_streamer_sees_one_text(llama_posterior, byte_level):
    one = {name: value[:1] for name, value in PROMPTS.items()}
    streamer = TextIteratorStreamer(byte_level, skip_prompt=True)
    found = generate(llama_posterior, one, 3, max_new_tokens=6, streamer=streamer)
    assert "".join(streamer) == byte_level.decode(found.sequences[0])


# Families


@pytest.mark.parametrize("name", CASES)
def test_families_whose_draws_stand_side_by_side_generate_and_others_are_refused(name):
    posterior = CASES[name](adapted(causal(CAUSAL["llama"]), lora_dropout=0.3), end_logits)
    refused = {
        "token_noise": "draws of a TokenNoise cannot stand side by side",
        "linearised": "draws of a Linearised cannot stand side by side",
        "mixture of passes": "run one by one cannot generate together: got Dropout, expected",
        "mixture, member by member": "one by one cannot generate together: got Linearised, Point",
    }
    if name in refused:
        with pytest.raises(ValueError, match=refused[name]):
            generate(posterior, PROMPTS, 3, max_new_tokens=2)
    else:
        found = generate(posterior, PROMPTS, 3, max_new_tokens=2)
        varied = bool((found.mutual_information > 0).all())
        assert varied == (posterior.atoms != 1)
    if posterior.has_mean:
        assert not generate(posterior, PROMPTS, 0, max_new_tokens=2).mutual_information.any()


def test_a_temperature_and_a_mixture_mean_what_they_mean_in_predictions(llama_posterior):
    model = with_second(adapted(causal(CAUSAL["llama"])))
    mixture = Mixture([Point(model, whole), Point(model, whole, adapter="b")])
    for posterior in (Tempered(llama_posterior, 3.0), mixture, Tempered(mixture, 0.5)):
        exact = posterior.atoms is not None
        logits = posterior.logits({"input_ids": IDS}, Draws(2))
        expected = Prediction.of(logits, exact=exact)
        found = generate(posterior, PROMPTS, 2, max_new_tokens=1)
        assert torch.equal(found.sequences[:, 0], expected.choice)
        assert_close(found.mutual_information[:, 0], expected.mutual_information, **CLOSE)
        assert_close(found.total_entropy[:, 0], expected.total_entropy, **CLOSE)
    with pytest.raises(ValueError, match="has no mean: got draws=0"):
        generate(mixture, PROMPTS, 0)


SIZES = {"vocab_size": 400, "d_model": 32, "decoder_start_token_id": 2, "pad_token_id": 0}
BART = BartConfig(
    **SIZES,
    encoder_layers=2,
    decoder_layers=2,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    init_std=0.3,
    bos_token_id=1,
    eos_token_id=2,
    forced_eos_token_id=None,
)
T5 = T5Config(**SIZES, num_layers=2, num_heads=2, d_kv=16, d_ff=64, eos_token_id=1)
SEQ2SEQ = {
    "bart": (BartForConditionalGeneration, BART, ["q_proj", "v_proj"]),
    "t5": (T5ForConditionalGeneration, T5, ["q", "v"]),
}


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoders_generate_too(name):
    kind, config, targets = SEQ2SEQ[name]
    torch.manual_seed(0)
    base = kind(config)
    model = converted(base, target_modules=targets, task_type="SEQ_2_SEQ_LM")
    posterior = Gaussian(model, whole)
    padded = {name: value.flip(1) for name, value in RAGGED.items()}  # on the right, as encoders
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1}
    found = generate(posterior, padded, 3, **settings)
    models = [single(posterior, index) for index in range(3)]
    text = torch.full((2, 1), 2)
    with torch.no_grad():
        for step in range(found.sequences.shape[1]):
            logits = [m(**padded, decoder_input_ids=text).logits[:, -1] for m in models]
            prediction = Prediction.of(torch.stack(logits))
            information = prediction.mutual_information * found.mask[:, step]
            assert_close(found.mutual_information[:, step], information, **CLOSE)
            text = torch.cat([text, found.sequences[:, step : step + 1]], 1)
    own = generate(posterior, padded, 3, draws_as="sequences", **settings)
    alone = models[2].generate(**padded, **settings)[:, 1:]
    assert torch.equal(own.sequences[2, :, : alone.shape[1]], alone)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams, because beam search .* got num_beams=4 given, expected"),
        ({"prompt_lookup_num_tokens": 3}, "because assisted decoding takes several tokens"),
        ({"assistant_model": object()}, "with assistant_model, because assisted decoding"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search compares tokens"),
        ({"dola_layers": "high"}, "DoLa compares layers"),
        ({"guidance_scale": 2.0}, "guidance runs the model on other rows"),
        ({"encoder_repetition_penalty": 1.5}, "looks at the prompt of each"),
        ({"return_dict_in_generate": True}, "returns a Generation"),
        ({"output_scores": True}, "returns a Generation"),
        ({"custom_generate": print}, "average over draws is taken in one"),
        ({"past_key_values": object()}, "the cache has a row for each draw"),
        ({"token_healing": True}, "healing generates on its own"),
        ({"cache_implementation": "paged"}, "schedules rows one by one"),
        ({"draws_as": "words"}, "got draws_as='words'; expected 'average' or 'sequences'"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "of the generation configuration"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(llama_posterior, options, message):
    with pytest.raises(ValueError, match=message):
        generate(llama_posterior, PROMPTS, 2, max_new_tokens=2, **options)


def test_a_models_own_beams_are_refused_with_what_switches_them_off(llama_posterior):
    llama_posterior.model.generation_config.num_beams = 4
    with pytest.raises(ValueError, match="of the generation configuration, .* pass num_beams=1"):
        generate(llama_posterior, PROMPTS, 2, max_new_tokens=2)
    assert generate(llama_posterior, PROMPTS, 2, max_new_tokens=2, num_beams=1).mask.all()


def test_prompts_and_draws_that_cannot_work_are_refused(llama_posterior):
    padded = {name: value.flip(1) for name, value in RAGGED.items()}
    with pytest.raises(ValueError, match="got 1 of 2 prompts padded on the right, expected the"):
        generate(llama_posterior, padded, 2)
    with pytest.raises(ValueError, match="got shared_prefix=3, expected None"):
        generate(llama_posterior, PROMPTS, Draws(2, shared_prefix=3))
    with pytest.raises(ValueError, match="got 5 draws of 2 rows and max_rows=9"):
        generate(llama_posterior, PROMPTS, Draws(5, max_rows=9))
    with pytest.raises(ValueError, match="prompts name their tensors: got a Tensor"):
        generate(llama_posterior, PROMPTS["input_ids"], 2)
    with pytest.raises(
        ValueError, match=r"got input_ids of shape \(2, 0\), expected a row or more"
    ):
        generate(llama_posterior, {"input_ids": PROMPTS["input_ids"][:, :0]}, 2)
    bert = Point(adapted(tiny_bert(), target_modules=["query"], task_type="SEQ_CLS"), whole)
    with pytest.raises(ValueError, match="BertForSequenceClassification writes no text"):
        generate(bert, PROMPTS, 1)


def test_generating_leaves_the_model_as_it_was(llama_posterior):
    model = llama_posterior.model.train()
    modules = list(model.modules())
    generate(llama_posterior, PROMPTS, 2, max_new_tokens=2)
    with pytest.raises(TypeError, match="streamer of its own"):
        generate(llama_posterior, PROMPTS, 2, max_new_tokens=2, streamer=Failing())
    assert list(model.modules()) == modules
    assert all(module.training for module in modules)
    assert torch.is_grad_enabled()


class Failing:
    def put(self, value):
        raise TypeError("streamer of its own")

    def end(self):
        pass


def test_token_noise_has_a_mean_to_generate_with():
    posterior = TokenNoise(converted(causal(CAUSAL["llama"])), whole)
    assert generate(posterior, PROMPTS, 0, max_new_tokens=2).sequences.shape == (2, 2)
