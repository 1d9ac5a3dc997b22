"""When should the KL be taken? The mean's loss and the draws' under the schedules, one small task.

    python -m studies.kl_schedules [--rates 1e-3 5e-3] [--steps 150] [--seeds 6]

A random decoder learns four classes, each a distribution of tokens, from 256 rows, with batch 4,
final_std 0.1 under prior_std 0.2. For each learning rate and schedule, the mean over seeds of: the
mean's training loss; the loss on 1000 other rows of the mean and of ten draws; σ after a third and
after half of the run and at its end; the most that ten steps take off |A|. Then the differences
from "constant", with their standard errors.
"""

from argparse import ArgumentParser, Namespace

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from bayestune.adapters import GaussianLinear, bayesify
from bayestune.kl import KLStep, warmup_decay

ROWS, TESTED, BATCH, DRAWS = 256, 1000, 4, 10
CLASSES = [0, 1, 2, 3]
SCHEDULES = ("constant", "early", "bursts")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
NAMES = ("train", "test", "test of draws", "σ at 1/3", "σ at 1/2", "σ at end", "most off |A|")


def rows_of(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens (N, 12) and classes (N,)."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 4, (count,), generator=generator)
    spread = 0.8 * torch.randn(4, 90, generator=torch.Generator().manual_seed(99))
    of_rows = spread.softmax(-1)[classes]
    return torch.multinomial(of_rows, 12, replacement=True, generator=generator) + 4, classes


def model_of(seed: int) -> nn.Module:
    """A random decoder, the same for all seeds, with a Gaussian adapter of its own."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128}
    blocks = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
    base = LlamaForCausalLM(LlamaConfig(**sizes, **blocks))
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    bayesify(model)
    return model.train()


def class_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """The logits of the four classes (N, 4)."""
    return model(input_ids=tokens, use_cache=False).logits[:, -1, CLASSES]


def size_of(model: nn.Module) -> float:
    """|A| over all layers."""
    layers = [one for one in model.modules() if isinstance(one, GaussianLinear)]
    return sum(float(one.weight.detach().square().sum()) for one in layers) ** 0.5


def fit(schedule: str, rate: float, steps: int, seed: int) -> list[float]:
    """The figures of `NAMES`."""
    model = model_of(seed)
    tokens, classes = rows_of(ROWS, seed)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, rate, eps=1e-6, weight_decay=0)
    step = KLStep(0.2, final_std=0.1, schedule=schedule)  # type: ignore[arg-type]
    step.attach(model, optimizer, total_steps=steps, num_rows=ROWS, batch_size=BATCH)
    generator = torch.Generator().manual_seed(seed + 1)
    orders = [torch.randperm(ROWS, generator=generator) for _ in range(steps * BATCH // ROWS + 1)]
    order = torch.cat(orders)
    stds = []
    sizes = []
    for t, factor in enumerate(warmup_decay(steps).tolist()):
        optimizer.param_groups[0]["lr"] = rate * factor
        batch = order[t * BATCH : (t + 1) * BATCH]
        F.cross_entropy(class_logits(model, tokens[batch]), classes[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        stds.append(step.state_of_kl()["std_over_prior"] * 0.2)
        sizes.append(size_of(model))
    kept = min(late / early for early, late in zip(sizes, sizes[10:], strict=False))
    ends = [stds[steps // 3 - 1], stds[steps // 2 - 1], stds[-1]]
    return [*losses(model, tokens, classes, seed), *ends, 1 - kept]


@torch.no_grad()
def losses(model: nn.Module, tokens: Tensor, classes: Tensor, seed: int) -> list[float]:
    """The mean's loss on the training rows; on others, the mean's and the draws'."""
    others, their_classes = rows_of(TESTED, seed + 500)
    model.eval()
    of_mean = F.cross_entropy(class_logits(model, tokens), classes)
    on_others = F.cross_entropy(class_logits(model, others), their_classes)
    model.train()
    torch.manual_seed(0)
    drawn = [class_logits(model, others).softmax(-1) for _ in range(DRAWS)]
    of_draws = F.nll_loss(torch.stack(drawn).mean(0).log(), their_classes)
    return [float(of_mean), float(on_others), float(of_draws)]


def show(rate: float, options: Namespace) -> None:
    """Prints the figures of a learning rate."""
    first = None
    for schedule in SCHEDULES:
        runs = [fit(schedule, rate, options.steps, seed) for seed in range(options.seeds)]
        found = torch.tensor(runs, dtype=torch.float64)
        first = found if first is None else first
        apart = found[:, :3] - first[:, :3]
        error = apart.std(0, correction=0) / max(1, options.seeds - 1) ** 0.5
        print(f"learning rate {rate:g}, {schedule}:")
        pairs = zip(NAMES, found.mean(0).tolist(), strict=True)
        print("  " + ", ".join(f"{name} {value:.3f}" for name, value in pairs))
        pairs = zip(apart.mean(0).tolist(), error.tolist(), strict=True)
        print("  − constant: " + ", ".join(f"{a:+.4f} ± {e:.4f}" for a, e in pairs), flush=True)


def main() -> None:
    """Reads the options and prints."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 5e-3])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for rate in options.rates:
        show(rate, options)


if __name__ == "__main__":
    main()
