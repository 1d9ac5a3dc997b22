"""A made-up checkout with the packages and names that the loader of the authors' code looks for."""

from pathlib import Path

BLOB = """
import ipdb
from peft import PeftModel
from peft.tuners.lora.bnb import Linear8bitLt
from tqdm import tqdm
from utils.extra import FACTOR


class BLoB(PeftModel):
    def __init__(self, model, config, args, accelerator):
        super().__init__(model, config)
        self.args, self.accelerator, self.seen = args, accelerator, []

    def forward_logits(self, batch, sample=True, n_samples=1):
        inputs, _, _ = batch
        return self.base_model(**inputs).logits[:, -1, self.target_ids].unsqueeze(1) * FACTOR

    def fit(self, train_loader, eval_loader):
        with tqdm(total=len(train_loader)) as bar:
            for inputs, golds, _ in train_loader:
                logits = self.forward_logits((inputs, golds, None)).mean(1)
                self.accelerator.backward(logits.sum())
                self.seen.append((inputs["input_ids"].shape, golds.tolist(), logits.dtype, bar.disable))
"""


def write_checkout(folder: Path) -> Path:
    """Writes it, with a class whose `fit` notes what it is given."""
    for room, files in {
        "modelwrappers": {"blob": BLOB},
        "utils": {"extra": "FACTOR = 3.0"},
    }.items():
        (folder / room).mkdir(parents=True)
        for name, text in {**files, "__init__": ""}.items():
            (folder / room / f"{name}.py").write_text(text, encoding="utf-8")
    return folder
