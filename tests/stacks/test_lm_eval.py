"""Tasks of lm-evaluation-harness under a posterior's draws, on tiny models and local files."""

import copy
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from bayestune import Draws, Gaussian, Mixture, Point, generate, save_posterior
from bayestune.adapters import Slots
from bayestune.evaluation import read_records
from bayestune.posteriors import Dropout, Tempered, posterior_digest
from bayestune.whole_files import read_json_lines
from conformance.test_posteriors import linearised
from running import COLOURS, failed, fitting, furnish, run
from tiny import CAUSAL, adapted, byte_level_tokenizer, causal, converted, end_logits, with_second

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from bayestune.evaluation.lm_eval import AveragedLM  # noqa: E402

pytestmark = pytest.mark.stacks
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
OPTIONS = ("red", "the blue sky", "green grass")


def request(context, continuation, document=None, place=0, task="colours"):
    args = (context,) if continuation is None else (context, continuation)
    return SimpleNamespace(args=args, task_name=task, doc_id=document, idx=place)


def questions(count=4):
    """Requests of some documents, option by option, the options of one not side by side."""
    found = []
    for place, option in enumerate(OPTIONS):
        for number in range(count):
            text = f"Question: what is {COLOURS[number]}?\nAnswer:"
            found.append(request(text, f" {option}", number, place))
    return found


def gaussian():
    return Gaussian(converted(causal(CAUSAL["llama"])), end_logits)


def plain(model):
    return HFLM(model, tokenizer=byte_level_tokenizer(), batch_size=8)


def averaged(posterior, draws, **more):
    return AveragedLM(posterior, byte_level_tokenizer(), draws, **more)


def alone(posterior, index, seed=0):
    """HFLM on a copy of the model whose adapter is one draw."""
    model = copy.deepcopy(posterior.model).eval()
    slots = Slots(model, posterior.adapter).modules()
    with torch.no_grad():
        for name, weight in posterior.draw(index, seed).items():
            slots[name].weight.copy_(weight)
    return plain(model)


def numbers(answers):
    return torch.tensor([answer[0] for answer in answers]).double()


@pytest.fixture(scope="module")
def posterior():
    return gaussian()


@pytest.fixture(scope="module")
def drawn(posterior):
    """(S, options, documents), the oracle's."""
    each = [numbers(alone(posterior, i).loglikelihood(questions())) for i in range(3)]
    return torch.stack(each).unflatten(1, (3, 4))


# The numbers


def test_no_draws_are_hflm_with_the_mean_adapter_bit_for_bit(posterior, tmp_path):
    save_posterior(posterior, tmp_path)
    stock = plain(PeftModel.from_pretrained(causal(CAUSAL["llama"]), tmp_path).eval())
    ours = averaged(posterior, Draws(0))
    assert ours.loglikelihood(questions()) == stock.loglikelihood(questions())
    texts = [request("what is the red sky", None), request("green grass", None)]
    assert ours.loglikelihood_rolling(texts) == stock.loglikelihood_rolling(texts)
    asked = [request("what is", {"until": ["sky"], "max_gen_toks": 6}, n) for n in range(2)]
    assert ours.generate_until(asked) == stock.generate_until(asked)


def test_options_have_the_average_of_their_probabilities_under_each_draw(posterior, drawn):
    lm = averaged(posterior, Draws(3))
    found = numbers(lm.loglikelihood(questions())).unflatten(0, (3, 4))
    assert_close(found.softmax(0), drawn.softmax(1).mean(0), **CLOSE)
    assert_close(found.exp().sum(0), drawn.exp().sum(1).mean(0), rtol=1e-4, atol=0)
    # and not the softmax of the average, which weighs draws by what they think of all options
    wrong = (drawn.exp().mean(0).log()).softmax(0)
    assert (found.softmax(0) - wrong).abs().max() > 1e-3
    assert_close(lm.drawn[("colours", 2)], drawn[:, :, 2], **CLOSE)


def test_draws_go_on_and_seeds_are_other_draws(posterior, drawn):
    second = averaged(posterior, Draws(1, first=1)).loglikelihood(questions())
    assert_close(numbers(second), drawn[1].flatten(), **CLOSE)
    other = averaged(posterior, Draws(1, seed=5)).loglikelihood(questions())
    expected = alone(posterior, 0, seed=5).loglikelihood(questions())
    assert_close(numbers(other), numbers(expected), **CLOSE)


def test_a_request_by_itself_has_its_average_likelihood(posterior, drawn):
    lm = averaged(posterior, Draws(3))
    nameless = [replace_with(one, doc_id=None) for one in questions()]
    expected = drawn.exp().mean(0).log().flatten()
    assert_close(numbers(lm.loglikelihood(nameless)), expected, **CLOSE)
    single = [one for one in questions() if one.idx == 0]
    assert_close(numbers(lm.loglikelihood(single)), expected[:4], **CLOSE)
    assert not lm.drawn
    text = [request("what is the red sky", None)]
    each = [alone(posterior, i).loglikelihood_rolling(text)[0] for i in range(3)]
    mean = torch.tensor(each).double().exp().mean().log().item()
    assert lm.loglikelihood_rolling(text)[0] == pytest.approx(mean, abs=1e-4)


def replace_with(one, **changes):
    return SimpleNamespace(**{**vars(one), **changes})


def test_what_most_draws_would_write_is_greedy(posterior):
    context = "Question: what is red?\nAnswer:"
    tokenizer = byte_level_tokenizer()
    firsts = []
    for index in range(3):
        own = alone(posterior, index)
        ids = torch.tensor([tokenizer(context)["input_ids"]])
        firsts.append(int(own.model(ids).logits[0, -1].argmax()))
    asked = [request(context, tokenizer.decode([token])) for token in firsts]
    asked = [
        one for one in asked if tokenizer(one.args[0] + one.args[1])["input_ids"][-1] in firsts
    ]
    found = averaged(posterior, Draws(3)).loglikelihood(asked)
    each = [alone(posterior, i).loglikelihood(asked) for i in range(3)]
    for place, (_, greedy) in enumerate(found):
        assert greedy == (sum(draw[place][1] for draw in each) >= 2)


def test_requests_that_come_twice_and_options_without_a_context(posterior, drawn):
    own = questions()
    bare = [request("", f" {option}", 1, 3 + place) for place, option in enumerate(OPTIONS)]
    lm = averaged(posterior, Draws(3))
    found = numbers(lm.loglikelihood([*own, *own[:5], *bare]))
    assert_close(found[:12], numbers(lm.loglikelihood(own)), **CLOSE)
    assert_close(found[12:17], found[:5], **EXACT)
    each = torch.stack([numbers(alone(posterior, i).loglikelihood(bare)) for i in range(3)])
    assert_close(found[17:].softmax(0), each.softmax(1).mean(0), **CLOSE)
    assert_close(lm.drawn[("colours", 1)], drawn[:, :, 1], **CLOSE)  # not of the bare ones


def test_texts_average_the_draws_at_each_token(posterior):
    tokenizer = byte_level_tokenizer()
    inputs = dict(tokenizer(["what is red and"], return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    expected = tokenizer.decode(generate(posterior, inputs, 3, **settings).sequences[0])
    asked = [request("what is red and", {"until": ["</s>"], "max_gen_toks": 8}, 0)]
    (found,) = averaged(posterior, Draws(3)).generate_until(asked)
    assert found == tokenizer.decode(tokenizer(expected)["input_ids"], skip_special_tokens=True)
    cut = expected[len(expected) // 2]
    asked = [request("what is red and", {"until": [cut], "max_gen_toks": 8}, 0)]
    assert averaged(posterior, Draws(3)).generate_until(asked) == [expected.split(cut)[0]]


def test_a_temperature_is_of_options(posterior, drawn, caplog):
    lm = averaged(Tempered(posterior, 2.0), Draws(3))
    found = numbers(lm.loglikelihood(questions())).unflatten(0, (3, 4))
    assert_close(found.softmax(0), (drawn / 2).softmax(1).mean(0), **CLOSE)
    assert_close(found.exp().sum(0), drawn.exp().sum(1).mean(0), rtol=1e-4, atol=0)
    with caplog.at_level(logging.WARNING, "bayestune"):
        lm.loglikelihood([request("red", " sky")])
    assert "the temperature 2 is of options: 1 requests without options" in caplog.text


def test_points_in_a_mixture_are_its_draws():
    model = with_second(adapted(causal(CAUSAL["llama"])))
    members = [Point(model, end_logits), Point(model, end_logits, adapter="b")]
    each = []
    for member in members:
        lm = averaged(member, Draws(0))
        each.append(numbers(lm.loglikelihood(questions())).unflatten(0, (3, 4)))
    found = numbers(averaged(Mixture(members), Draws(2)).loglikelihood(questions()))
    expected = torch.stack(each).softmax(1).mean(0)
    assert_close(found.unflatten(0, (3, 4)).softmax(0), expected, **CLOSE)


def test_precision_travels_with_the_draws(posterior, drawn):
    found = averaged(posterior, Draws(3, bf16=True)).loglikelihood(questions())
    narrow = numbers(found).unflatten(0, (3, 4)).softmax(0)
    exact = drawn.softmax(1).mean(0)
    assert not torch.equal(narrow, exact)
    assert_close(narrow, exact, rtol=0.1, atol=0.05)


# The cache


def test_a_cache_keeps_posteriors_seeds_and_draws_apart(posterior, tmp_path, monkeypatch):
    one = gaussian()
    one.digest = "a" * 64
    asked = questions()

    def read(draws, digest="a" * 64):
        one.digest = digest
        return averaged(one, draws, cache=tmp_path).loglikelihood(asked)

    expected = averaged(one, Draws(2)).loglikelihood(asked)
    assert read(Draws(2)) == expected
    files = {path.name for path in tmp_path.iterdir()}
    assert len(files) == 2
    assert read(Draws(0)) == averaged(one, Draws(0)).loglikelihood(asked)
    assert read(Draws(2, seed=1)) == averaged(one, Draws(2, seed=1)).loglikelihood(asked)
    assert read(Draws(2), "b" * 64) == expected
    assert len(list(tmp_path.iterdir())) == 7  # two draws, the mean, two and two draws
    # what is there is not read again, and a third draw alone is new
    calls = []
    whole = HFLM._model_call

    def counted(self, *given, **more):
        calls.append(1)
        return whole(self, *given, **more)

    monkeypatch.setattr(HFLM, "_model_call", counted)
    assert read(Draws(2)) == expected
    assert not calls
    assert read(Draws(3)) == averaged(one, Draws(3)).loglikelihood(asked)
    passes = len(calls)
    assert passes == 4 * 2  # three draws without a cache and one with, twelve requests by eight


def test_the_harness_own_cache_is_refused(posterior, tmp_path):
    from lm_eval.api.model import CachingLM

    lm = averaged(posterior, Draws(2))
    with pytest.raises(ValueError, match="use_cache, whose keys know neither posterior nor draws"):
        CachingLM(lm, str(tmp_path / "cache.db"))
    with pytest.raises(ValueError, match="for a posterior without a digest"):
        averaged(posterior, Draws(2), cache=tmp_path)


# What cannot be read


def test_draws_that_are_no_functions_are_refused():
    model = adapted(causal(CAUSAL["llama"]), lora_dropout=0.3)
    with pytest.raises(ValueError, match="draws of a Dropout are other ones in each batch"):
        averaged(Dropout(model, end_logits), Draws(2))
    assert averaged(Dropout(model, end_logits), Draws(0)).loglikelihood(questions())


def test_draws_that_cannot_stand_alone_are_refused():
    posterior = linearised(adapted(causal(CAUSAL["llama"])), end_logits)
    with pytest.raises(ValueError, match="cannot be read under the draws of a Linearised: "):
        averaged(posterior, Draws(2))
    assert averaged(posterior, Draws(0)).loglikelihood(questions())


# Tasks and records


def write_task(folder, name, documents, **changes):
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "hub")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{q}}\nAnswer:",
        "doc_to_choice": "options",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        **changes,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
    return folder


def documents(count=9):
    found = []
    for i in range(count):
        asked = f"what is {COLOURS[i % 4]} and {COLOURS[(i + 1) % 4]}?"
        found.append({"q": asked, "options": list(OPTIONS), "gold": i % 3})
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory, monkeypatch_module):
    folder = tmp_path_factory.mktemp("harness")
    monkeypatch_module.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    whole = TaskManager.__init__

    def local_only(self, **given):
        whole(self, **given, include_defaults=False)  # else it reads 13,000 files, for each run

    monkeypatch_module.setattr(TaskManager, "__init__", local_only)
    model = causal(CAUSAL["llama"])
    furnish(folder, model, byte_level_tokenizer())
    run(*fitting(folder, **{"blob.final_std": 0.1}))
    brier = [{"metric": name} for name in ("acc", "acc_norm", "brier_score")]
    tasks = write_task(folder / "tasks", "colours", documents(), metric_list=brier)
    uneven = [
        {**row, "options": row["options"][: 2 + i % 2], "gold": i % 2}
        for i, row in enumerate(documents())
    ]
    write_task(tasks, "uneven", uneven)
    several = [{**row, "gold": [0, 1] if i else [2]} for i, row in enumerate(documents())]
    write_task(tasks, "several", several)
    cloze = [{"q": "what is", "options": list(OPTIONS), "gold": i % 3} for i in range(4)]
    inputs = {"doc_to_text": "gold", "doc_to_choice": "{{options}}", "doc_to_target": "{{' sky'}}"}
    write_task(tasks, "inputs", cloze, **inputs)
    texts = [{"q": "red green", "gold": "sky"}] * 3
    own = {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    own |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, "doc_to_choice": None}
    write_task(tasks, "texts", texts, **own)
    return folder


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def evaluated(place, tasks, output, *more):
    given = ("--posterior", place / "out", "--include_path", place / "tasks", "--tasks", tasks)
    run("lm-eval", *given, "--output", place / output, *more)
    return read_records(place / output), json.loads((place / output / "lm-eval.json").read_text())


def test_records_say_how_calibrated_a_task_is(place):
    records, told = evaluated(place, "colours", "records", "--draws", 4)
    of = {record["scoring"]: record for record in records}
    assert list(of) == ["lm-eval acc", "lm-eval acc_norm"]
    plain = of["lm-eval acc"]
    assert (plain["task"], plain["n"], plain["draws"], plain["label"]) == (
        "colours",
        9,
        4,
        "BLoB N=4",
    )
    metrics = plain["metrics"]
    harness = told["results"]["colours"]
    assert metrics["accuracy"]["value"] == pytest.approx(harness["acc,none"])
    assert metrics["brier"]["value"] == pytest.approx(harness["brier_score,none"], abs=1e-6)
    assert metrics["aurc"]["value"] > 0
    for name in ("ece", "nll", "brier"):
        assert metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"]
    rows = read_json_lines(place / "records" / plain["predictions"])
    assert rows[4]["options"] == list(OPTIONS)
    assert rows[4]["answer"] == 1
    assert rows[4]["question"].startswith("Question: what is red and green?")
    average = torch.tensor([row["drawn"] for row in rows]).mean(1)
    assert_close(average, torch.tensor([row["probabilities"] for row in rows]), atol=1e-4, rtol=0)
    questions = plain["config"]["questions"]
    assert questions["lm_eval"] == lm_eval.__version__
    # a second run takes the first one's place, the mean stands beside it
    again, _ = evaluated(place, "colours", "records", "--draws", 4)
    assert len(again) == 2
    both, _ = evaluated(place, "colours", "records", "--draws", 0)
    assert len(both) == 4
    run("table", place / "records")
    run("report", place / "records", "--to", place / "page.html")


def test_normalised_readings_are_averages_of_normalised_options(place, monkeypatch):
    from bayestune.evaluation import lm_eval as models

    kept = []
    whole = models.AveragedLM.loglikelihood

    def noted(self, requests):
        kept.append(self)
        return whole(self, requests)

    monkeypatch.setattr(models.AveragedLM, "loglikelihood", noted)
    records, _ = evaluated(place, "uneven", "normalised", "--draws", 3)
    (normalised,) = [record for record in records if record["scoring"] == "lm-eval acc_norm"]
    rows = read_json_lines(place / "normalised" / normalised["predictions"])
    for row in rows:
        drawn = kept[0].drawn[("uneven", int(row["id"]))]
        sizes = torch.tensor([len(option) for option in row["options"]])
        expected = (drawn / sizes).softmax(-1).mean(0)
        assert_close(torch.tensor(row["probabilities"]).double(), expected, **CLOSE)
    assert {len(row["probabilities"]) for row in rows} == {2, 3}


def test_a_limit_examples_and_a_cache_are_the_harness_own(place):
    options = ("--draws", 2, "--limit", 5, "--num_fewshot", 1, "--use_cache", place / "kept")
    records, told = evaluated(place, "colours", "limited", *options)
    assert records[0]["n"] == 5
    assert records[0]["config"]["questions"]["num_fewshot"] == 1
    assert told["n-samples"]["colours"]["effective"] == 5
    assert len(list((place / "kept").iterdir())) == 2
    again, _ = evaluated(place, "colours", "limited", *options)
    assert again[0]["metrics"] == records[0]["metrics"]


def test_several_tasks_of_other_kinds(place, capsys, caplog):
    with caplog.at_level(logging.WARNING, "bayestune"):
        records, told = evaluated(place, "several, inputs,texts", "kinds", "--draws", 2)
    assert {record["task"]: record["n"] for record in records} == {"several": 1, "inputs": 4}
    assert "several: 8 rows are not in the record, such as row 1: got the target [0, 1]" in (
        caplog.text
    )
    assert set(told["results"]) == {"several", "inputs", "texts"}
    (inputs,) = [r for r in records if (r["task"], r["scoring"]) == ("inputs", "lm-eval acc")]
    assert inputs["metrics"]["accuracy"]["value"] == pytest.approx(
        told["results"]["inputs"]["acc,none"]
    )
    assert "exact_match" in capsys.readouterr().out


def test_a_posterior_that_no_fit_wrote_and_a_plain_adapter(place, tmp_path):
    base = causal(CAUSAL["llama"])
    model = converted(base)
    model.peft_config["default"].base_model_name_or_path = str(place / "model")
    save_posterior(Gaussian(model, end_logits), tmp_path / "saved")
    given = ("--tasks", "colours", "--include_path", place / "tasks", "--draws", 2)
    run("lm-eval", "--posterior", tmp_path / "saved", *given)
    (record, _) = read_records(tmp_path / "saved")
    assert (record["method"], record["label"]) == ("gaussian", "gaussian N=2")
    plain = adapted(causal(CAUSAL["llama"]))
    plain.peft_config["default"].base_model_name_or_path = str(place / "model")
    plain.save_pretrained(tmp_path / "plain")
    run("lm-eval", "--posterior", tmp_path / "plain", *given)
    assert {record["draws"] for record in read_records(tmp_path / "plain")} == {0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "colors"], "got the task 'colors'; expected one of the harness's"),
        (["--tasks", "colours", "--draws", "-1"], "got --draws -1; expected a whole number of 0"),
        (["--tasks", "colours", "--limit", "0"], "got --limit 0; expected a whole number of 1"),
        (["--tasks", ","], "got --tasks ','; expected names such as arc_easy,piqa"),
        (["--tasks", "colours", "--include_path", "nowhere"], "got --include_path nowhere; expect"),
        (["--tasks", "broken"], "the harness cannot load ['broken']: got "),
    ],
)
def test_what_cannot_be_run_is_said_in_a_line(place, options, said, capsys):
    write_task(place / "tasks", "broken", [{"q": 1}], dataset_path="no-such-kind-of-data")
    own = [] if "--include_path" in options else ["--include_path", str(place / "tasks")]
    line = failed(["lm-eval", "--posterior", place / "out", *own, *options], capsys)
    assert said in line


def test_the_digest_is_of_the_folder(place, tmp_path):
    from bayestune.session import LanguageFit

    opened = LanguageFit.open(place / "out")
    assert opened.fit.posterior.digest == posterior_digest(place / "out")
    assert opened.fit.facts is not None
