"""A made-up checkout that fits and evaluates: what `official_runs` asks of the authors' code.

Its data set, parser and wrappers are made for the tests; their mathematics is a plain loop.
"""

from pathlib import Path

WRAPPERBASE = """
import math
from argparse import ArgumentParser

import torch
from peft import PeftModel
from torch.nn import functional as F
from tqdm import tqdm


def get_parser():
    parser = ArgumentParser()
    for name in ("dataset-type", "dataset", "model-type", "model", "modelwrapper", "opt"):
        parser.add_argument("--" + name)
    for name in ("batch-size", "max-seq-len", "lora-r", "lora-alpha", "max-train-steps", "seed"):
        parser.add_argument("--" + name, type=int)
    for name in ("eval-per-steps", "bayes-train-n-samples"):
        parser.add_argument("--" + name, type=int)
    for name in ("lr", "warmup-ratio", "lora-dropout", "bayes-eps", "bayes-beta", "bayes-gamma"):
        parser.add_argument("--" + name, type=float)
    parser.add_argument("--bayes-kllr", type=float)
    for name in ("apply-classhead-lora", "nowand", "bayes-klreweighting"):
        parser.add_argument("--" + name, action="store_true")
    parser.add_argument("--bayes-datasetrescaling", action="store_true")
    parser.add_argument("--opt-wd", type=float, default=0.0)
    return parser


class Plain(PeftModel):
    def __init__(self, model, config, args, accelerator):
        super().__init__(model, config)
        self.args, self.accelerator, self.noisy = args, accelerator, False
        trained = [one for one in self.parameters() if one.requires_grad]
        self.opt = torch.optim.AdamW(trained, lr=args.lr, eps=1e-6, weight_decay=0.0)
        steps = args.max_train_steps
        rise = max(1, int(args.warmup_ratio * steps))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.opt, lambda step: min(step / rise, max(0, steps - step) / (steps - rise))
        )

    def prepare_for_fit_evaluate(self, data):
        self.target_ids = data.target_ids.squeeze(-1)
        self.train_loader, self.test_loader = data.train_dataloader, data.test_dataloader
        self.args.n_epochs = math.ceil(self.args.max_train_steps / len(self.train_loader))

    def forward_logits(self, batch, sample=True, n_samples=1):
        found = []
        for _ in range(n_samples if sample else 1):
            logits = self.base_model(**batch[0]).logits[:, -1, self.target_ids]
            found.append(logits + 0.3 * torch.randn_like(logits) * (self.noisy and sample))
        return torch.stack(found, 1)

    def fit(self, train_loader, eval_loader):
        with tqdm(total=len(train_loader)) as bar:
            assert bar.disable
            for batch in train_loader:
                F.cross_entropy(self.forward_logits(batch).mean(1), batch[1]).backward()
                self.opt.step()
                self.opt.zero_grad()
                self.scheduler.step()

    def evaluate(self, loader):
        sample = not self.args.bayes_inference_notsample
        with torch.inference_mode():
            found = [self.forward_logits(batch, sample, self.eval_n_samples) for batch in loader]
        p = torch.cat(found).softmax(-1).mean(1)
        labels = torch.cat([batch[1] for batch in loader])
        right = (p.argmax(-1) == labels).float().mean()
        return right, torch.zeros(()), F.nll_loss(p.log(), labels), torch.zeros(())
"""
MLE = """
from modelwrappers.wrapperbase import Plain, get_parser


class MLE(Plain):
    pass
"""
BLOB = """
import ipdb
import torch
from peft.tuners.lora import LoraLayer
from modelwrappers.wrapperbase import Plain, get_parser


class BLoB(Plain):
    def __init__(self, model, config, args, accelerator):
        super().__init__(model, config, args, accelerator)
        self.noisy = True
        for layer in self.modules():
            if isinstance(layer, LoraLayer):
                start = torch.empty_like(layer.lora_A["default"].weight).uniform_(0.03, 0.05)
                layer.lora_A_rho = torch.nn.ParameterDict({"default": start})
"""
DSETS = """
import torch
from datasets import load_dataset


class obqa:
    def __init__(self, tokenizer):
        self.dset, self.tokenizer = load_dataset("openbookqa", "main"), tokenizer
        letters = tokenizer(["A", "B", "C", "D"], add_special_tokens=False).input_ids
        self.target_ids = torch.tensor(letters)[:, -1:]

    def clm_collate_fn(self, batch):
        texts = [row["question_stem"] + " Answer:" for row in batch]
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        classes = torch.tensor([ord(row["answerKey"]) - ord("A") for row in batch])
        return inputs, classes, self.target_ids[classes]
"""
S2S = """
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from dataset.utils import dsets


class S2SDataset_Classification:
    num_labels = 4

    def __init__(self, accelerator, args):
        accelerator.wait_for_everyone()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.bos_token
        self.args, self.dset = args, dsets.obqa(tokenizer)

    def get_loaders(self):
        made = {}
        for split, rows in self.dset.dset.items():
            size = self.args.batch_size
            collate = self.dset.clm_collate_fn
            made[split] = DataLoader(rows, size, collate_fn=collate, drop_last=True)
        self.train_dataloader, self.test_dataloader = made["train"], made["validation"]
        self.target_ids, self.num_samples = self.dset.target_ids, len(self.dset.dset["train"])
"""
FILES = {
    "modelwrappers/wrapperbase.py": WRAPPERBASE,
    "modelwrappers/mle.py": MLE,
    "modelwrappers/blob.py": BLOB,
    "dataset/__init__.py": "",
    "dataset/utils/__init__.py": "",
    "dataset/utils/dsets.py": DSETS,
    "dataset/S2SDataset_Classification.py": S2S,
}


def write_whole_checkout(folder: Path) -> Path:
    """Writes it."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder
