"""Records and rows made by hand, and a reader of pages."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import torch

from bayestune.metrics import summarise
from bayestune.report import write_page

METRICS = ("accuracy", "ece", "nll", "brier", "aurc")
VOID = {"meta", "br", "hr", "img", "link", "input"}


def record(label, seed=1, **fields):
    """A record; a field called like a metric is one, with an interval of ±0.01."""
    found = {key: fields.pop(key) for key in METRICS if key in fields}
    return {
        "label": label,
        "method": label.split()[0].lower(),
        "draws": 10,
        "seed": seed,
        "task": "arc_easy",
        "model": "tiny",
        "scoring": "letter",
        "n": 10,
        "bins": 15,
        "binning": "textbook",
        "metrics": {k: {"value": v, "low": v - 0.01, "high": v + 0.01} for k, v in found.items()},
        **fields,
    }


def with_rows(folder, rows, label, seed=1, **fields):
    """A record whose rows are in a file of the folder."""
    task = fields.get("task", "arc_easy")
    name = f"rows-{re.sub('[^a-z0-9]', '', label.lower())}-{task}-{seed}.jsonl"
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return record(label, seed, **{"n": len(rows), "predictions": name, **fields})


def row(i, probabilities, answer, mutual=0.0, **more):
    """A row of which a number stands for the entropy: its order is all that counts."""
    doubt = 1 - max(probabilities)
    return {
        "id": f"q{i}",
        "probabilities": probabilities,
        "answer": answer,
        "confidence": max(probabilities),
        "total_entropy": doubt + mutual,
        "expected_entropy": doubt,
        "mutual_information": mutual,
        **more,
    }


def sampled_rows(n, seed=0, sharpness=1.0):
    """Rows of three options, calibrated but for the sharpness."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 3, generator=g, dtype=torch.float64) * 2
    answers = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0].tolist()
    p = (logits * sharpness).softmax(1).tolist()
    return [row(i, p[i], answers[i], mutual=0.01) for i in range(n)]


def evaluated(folder, label, sharpness=1.0, n=120, **fields):
    """What `evaluate` leaves of a method with sampled rows."""
    rows = sampled_rows(n, sharpness=sharpness)
    p = torch.tensor([one["probabilities"] for one in rows], dtype=torch.float64)
    y = torch.tensor([one["answer"] for one in rows])
    found = {key: asdict(value) for key, value in summarise(p, y, resamples=100).items()}
    fields = {"binning": "torchmetrics", "metrics": found, **fields}
    return with_rows(folder, rows, label, **fields)


def shown(records, folder, **more):
    """The data of the page of these records, as it stands in `report.html` of the folder."""
    page = write_page({folder: records}, folder / "report.html", "a title", **more)
    return Page(page.read_text(encoding="utf-8")).data


class Page(HTMLParser):
    """Reads markup; fails on tags that do not match."""

    def __init__(self, markup):
        super().__init__()
        self.stack = []
        self.attributes = []
        self.tags = []
        self.words = []
        self.scripts = {}
        self.open_script = None
        self.feed(markup)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        self.open_script = dict(attrs).get("id", "code") if tag == "script" else None
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag
        self.open_script = None

    def handle_data(self, data):
        if self.open_script:
            self.scripts[self.open_script] = self.scripts.get(self.open_script, "") + data
        else:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    @property
    def data(self):
        """What the page embeds."""
        return json.loads(self.scripts["data"])
