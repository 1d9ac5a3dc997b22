"""The two lines in Lightning and in sentence-transformers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from bayestune import Gaussian, KLStep, bayesify, predict
from bayestune.adapters import GaussianLinear
from tiny import SIZES, adapted, byte_level_tokenizer, tiny_llama

pytestmark = pytest.mark.stacks
PRIOR, FINAL = 0.2, 0.1


def mean_std(model):
    layers = [module for module in model.modules() if isinstance(module, GaussianLinear)]
    assert layers
    return torch.cat([layer.std.flatten() for layer in layers]).mean().item()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_lightning_trains_a_posterior(accumulation, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = adapted(tiny_llama()).train()
            bayesify(self.model)
            self.step = KLStep(prior_std=PRIOR, final_std=FINAL)

        def training_step(self, batch, _):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)

        def on_train_start(self):
            steps = self.trainer.estimated_stepping_batches
            optimizer = self.optimizers(use_pl_optimizer=False)
            self.step.attach(self.model, optimizer, total_steps=steps)

    torch.manual_seed(0)
    module = Module()
    rows = torch.randint(3, 400, (32, 8))
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accumulate_grad_batches=accumulation,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(rows, batch_size=4))
    assert trainer.global_step == 16 // accumulation
    assert mean_std(module) == pytest.approx(FINAL, rel=1e-2)

    def last(model, batch):
        return model(**batch).logits[:, -1]

    found = predict(Gaussian(module.model.eval(), last), {"input_ids": rows[:2]}, draws=4)
    assert found.mutual_information.min() > 0


def test_sentence_transformers_train_a_posterior(tmp_path):
    sentences = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    tokenizer = byte_level_tokenizer()
    tokenizer.cls_token = "<s>"
    tokenizer.sep_token = "</s>"
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    from sentence_transformers import losses, models

    words = models.Transformer(str(tmp_path / "bert"), max_seq_length=32)
    pooling = models.Pooling(SIZES["hidden_size"])
    model = sentences.SentenceTransformer(modules=[words, pooling], device="cpu")
    lora = LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["query", "value"], r=4)
    model[0].auto_model = get_peft_model(model[0].auto_model, lora)
    bayesify(model)
    pairs = {"anchor": [f"red {i}" for i in range(16)]}
    pairs["positive"] = [f"a red thing {i}" for i in range(16)]
    arguments = sentences.SentenceTransformerTrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        max_steps=6,
        report_to=[],
        use_cpu=True,
    )
    trainer = sentences.SentenceTransformerTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_dict(pairs),
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[KLStep(prior_std=PRIOR, final_std=FINAL)],
    )
    trainer.train()
    assert mean_std(model) == pytest.approx(FINAL, rel=1e-2)
