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
        logits = self.base_model(**batch[0]).logits
        return logits[:, -1, self.target_ids].unsqueeze(1) * FACTOR

    def fit(self, train_loader, eval_loader):
        with tqdm(total=len(train_loader)) as bar:
            for inputs, golds, _ in train_loader:
                logits = self.forward_logits((inputs, golds, None)).mean(1)
                self.accelerator.backward(logits.sum())
                shape = inputs["input_ids"].shape
                self.seen.append((shape, golds.tolist(), logits.dtype, bar.disable))
"""


def write_checkout(folder: Path) -> Path:
    """Writes it, with a class whose `fit` notes what it is given."""
    files = {"modelwrappers/blob.py": BLOB, "utils/extra.py": "FACTOR = 3.0"}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder
