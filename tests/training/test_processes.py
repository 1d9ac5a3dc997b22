"""A batch is the run's, however many processes or GPUs there are."""

import pytest
from transformers import TrainingArguments

from bayestune.errors import Refusal
from bayestune.kl.trainer_runs import say_several_batches
from bayestune.training import Training
from bayestune.training.training import _arguments, _on_one_device


def test_a_batch_is_shared_among_processes(monkeypatch, tmp_path):
    training = Training(batch_size=6)
    assert _arguments(training, tmp_path, 3).per_device_train_batch_size == 6
    monkeypatch.setattr("bayestune.training.training.num_processes", lambda: 3)
    assert _arguments(training, tmp_path, 3).per_device_train_batch_size == 2
    with pytest.raises(Refusal, match="batch_size 4, expected a multiple of 3"):
        _arguments(Training(batch_size=4), tmp_path, 3)


def test_one_process_uses_one_gpu_and_says_so(tmp_path, caplog):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4
    )
    assert arguments.train_batch_size == 4
    arguments._n_gpu = 2
    assert arguments.train_batch_size == 8
    assert _on_one_device(arguments).train_batch_size == 4
    assert "2 GPUs are there and one is used" in caplog.text


def test_a_kl_step_says_that_a_trainer_gives_each_gpu_a_batch(tmp_path, caplog):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4
    )
    say_several_batches(arguments)
    assert not caplog.text
    arguments._n_gpu = 2
    say_several_batches(arguments)
    assert "each of 2 GPUs a batch (DataParallel), so a step has 8 rows instead of 4" in caplog.text
