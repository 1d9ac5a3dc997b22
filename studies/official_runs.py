"""Whole runs of the authors' code on chosen rows: their data set, their fit, their evaluation.

What stands in for theirs: rows of a local folder for the data set's download, a model that is
loaded already for their 8-bit one, bfloat16 autocast around the forward pass, one process for
`accelerate`. The arguments are those of their scripts, read by their own parser.
"""

import copy
import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import set_seed

from bayestune.adapters import ADAPTER, GaussianLinear, Slots
from bayestune.models import LoadedModel
from bayestune.whole_files import JsonRow
from studies.official import official_module, one_process
from subjects import autocast

logger = logging.getLogger(__name__)

# As in scripts/mle and scripts/blob, but for the model, the steps and the seed.
OF_BOTH = """
    --dataset-type mcdataset --dataset obqa --model-type causallm --lr 1e-4 --batch-size 4
    --opt adamw --warmup-ratio 0.06 --max-seq-len 300 --apply-classhead-lora --lora-r 8
    --lora-alpha 16 --lora-dropout 0 --eval-per-steps 6000 --nowand
"""
OF_BLOB = """
    --bayes-klreweighting --bayes-eps 0.05 --bayes-beta 0.2 --bayes-gamma 8 --bayes-kllr 0.01
    --bayes-datasetrescaling --bayes-train-n-samples 1
"""
TARGETS = ("q_proj", "v_proj", "lm_head")  # what --apply-classhead-lora means in their code
CLASSES = {"mle": "MLE", "blob": "BLoB"}
Values = dict[str, dict[str, Tensor]]  # of an adapter, by layer


@dataclass(frozen=True)
class Evaluated:
    """Logits (S, N, C) of the evaluation rows, and what their own code says of them."""

    logits: Tensor
    told: Mapping[str, float]


@dataclass
class Run:
    """One of their model wrappers, ready to fit.

    Args:
        wrapper: theirs.
        precision: "bf16" or "fp32", of the forward passes.
    """

    wrapper: Any
    precision: str
    kept: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wrapper.forward_logits = self._forward_logits

    def _forward_logits(self, *arguments: Any, **options: Any) -> Tensor:
        with autocast(torch.device("cpu"), self.precision):
            logits = type(self.wrapper).forward_logits(self.wrapper, *arguments, **options)
        logits = logits.float()
        if not torch.is_grad_enabled():  # an evaluation
            self.kept.append(logits)
        return logits

    def values(self) -> Values:
        """A copy of the values of A and B, and of BLoB's ρ, whose square is the σ of A."""
        found: Values = {}
        for path, layer in Slots(self.wrapper).layers.items():
            values = {"A": layer.lora_A[ADAPTER].weight, "B": layer.lora_B[ADAPTER].weight}
            if hasattr(layer, "lora_A_rho"):
                values["rho"] = layer.lora_A_rho[ADAPTER]
            found[path] = {name: value.detach().clone() for name, value in values.items()}
        return found

    def std(self) -> float | None:
        """The mean σ of A over the layers; None for a point."""
        roots = [values["rho"] for values in self.values().values() if "rho" in values]
        return (
            torch.stack([root.square().mean() for root in roots]).mean().item() if roots else None
        )

    def fit(self) -> None:
        """Their fit, epoch by epoch."""
        wrapper = self.wrapper
        for epoch in range(wrapper.args.n_epochs):
            wrapper.args.epoch = epoch
            wrapper.fit(wrapper.train_loader, wrapper.test_loader)
            logger.info("their epoch %d of %d", epoch + 1, wrapper.args.n_epochs)

    def evaluate(self, draws: int) -> Evaluated:
        """Their evaluation with so many noisy passes; 0 for the mean."""
        wrapper = self.wrapper
        wrapper.eval_n_samples = max(1, draws)
        wrapper.args.bayes_inference_notsample = draws == 0
        self.kept = []
        values = map(float, wrapper.evaluate(wrapper.test_loader))
        told = dict(zip(("accuracy", "ece", "nll", "brier"), values, strict=True))
        return Evaluated(torch.cat(self.kept).transpose(0, 1), told)


@dataclass(frozen=True)
class Official:
    """The authors' code with a model and some rows.

    Args:
        folder: the checkout.
        loaded: the model, which each run takes modules of its own over.
        train: rows to fit on, as the data set has them, in this order in every epoch.
        evaluation: rows to evaluate on, likewise.
        steps: of a fit.
        precision: see `Run`.
    """

    folder: Path
    loaded: LoadedModel
    train: Sequence[JsonRow]
    evaluation: Sequence[JsonRow]
    steps: int
    precision: str

    def arguments(self, kind: str, seed: int) -> Namespace:
        """The arguments of their script, as their parser reads them."""
        words = f"{OF_BOTH} {OF_BLOB if kind == 'blob' else ''} --modelwrapper {kind}"
        words += f" --seed {seed} --max-train-steps {self.steps}"
        parser = official_module(self.folder, f"modelwrappers.{kind}").get_parser()
        return parser.parse_args([*words.split(), "--model", Path(self.loaded.name).name])

    def data(self, arguments: Namespace) -> Any:
        """Their data set of the rows, with its loaders."""
        sets = official_module(self.folder, "dataset.utils.dsets")
        splits = {"train": list(self.train), "validation": list(self.evaluation)}
        sets.load_dataset = lambda *_, **__: splits
        module = official_module(self.folder, "dataset.S2SDataset_Classification")
        tokenizer = copy.deepcopy(self.loaded.tokenizer)
        tokenizer.bos_token = tokenizer.bos_token or tokenizer.pad_token  # theirs pads with it
        module.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer)
        data = module.S2SDataset_Classification(one_process(torch.device("cpu")), arguments)
        data.get_loaders()
        return data

    def run(self, kind: str, seed: int) -> Run:
        """A run under a seed: "mle" or "blob"."""
        official_module(self.folder, "modelwrappers.wrapperbase")  # silences its progress bars
        arguments = self.arguments(kind, seed)
        set_seed(seed)
        data = self.data(arguments)
        arguments.outdim = data.num_labels
        arguments.num_samples = data.num_samples
        config = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=list(TARGETS),
            task_type="CAUSAL_LM",
        )
        base: Any = self.loaded.again().model
        base.config.use_cache = False
        cls = getattr(official_module(self.folder, f"modelwrappers.{kind}"), CLASSES[kind])
        wrapper = cls(base, config, arguments, one_process(torch.device("cpu")))
        wrapper.prepare_for_fit_evaluate(data)
        return Run(wrapper, self.precision)

    def prompts(self) -> tuple[dict[str, list[int]], list[int]]:
        """Their prompts' tokens by the row's id, and the tokens of their answers."""
        data = self.data(self.arguments("mle", 1))
        found = {}
        for row in (*self.train, *self.evaluation):
            inputs, _, _ = data.dset.clm_collate_fn([row])
            found[row["id"]] = inputs["input_ids"][0].tolist()
        return found, data.target_ids[:, 0].tolist()


def put_start(adapted: nn.Module, start: Values) -> None:
    """Gives an adapter of ours the first values of one of theirs, its σ where it is Gaussian.

    Raises:
        ValueError: if their layers are others.
    """
    layers = Slots(adapted).layers
    if set(layers) != set(start):
        other = sorted(set(layers) ^ set(start))
        raise ValueError(f"adapters on different layers: got {other} in one of the two alone")
    with torch.no_grad():
        for path, layer in layers.items():
            mean = layer.lora_A[ADAPTER]
            mean.weight.copy_(start[path]["A"])
            layer.lora_B[ADAPTER].weight.copy_(start[path]["B"])
            if isinstance(mean, GaussianLinear):
                mean.set_root_std(start[path]["rho"])


def settings_of(arguments: Namespace) -> dict[str, Any]:
    """The arguments that a record keeps, by name: those that something follows from."""
    kept = {}
    for name, value in sorted(vars(arguments).items()):
        if value is not None and not name.startswith(("wandb", "checkpoint")):
            kept[name] = value
    return kept
