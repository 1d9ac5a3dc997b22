"""Rows of your own, from a CSV file to decisions: fit, calibrate, decide.

    python examples/own_csv.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Writes a file of support tickets, as you would bring one (columns: question, answer), fits BLoB on
a part of it, asks the calibration for at most 20 % errors among the rows acted on, and decides new
tickets. Expect "act" on plain ones and "abstain" on those that say nothing, or where the promise
cannot be kept, on all.
"""

import argparse
import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bayestune import (
    BLoB,
    CalibrationOptions,
    Lora,
    Promise,
    Training,
    calibrate,
    decide,
    load_rows,
)
from bayestune.report import promises
from bayestune.session import Session, TaskOptions

TICKETS = {
    "billing": ("I was charged {} times", "my invoice of {} euros is wrong", "refund me {} euros"),
    "delivery": ("my parcel is {} days late", "{} parcels never came", "the courier lost {} boxes"),
}
NEW = ("they charged me for 70 items", "71 packets are still on their way", "72 72 72")


def write_tickets(file: Path, numbers: range) -> Path:
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["question", "answer"])
        for number in numbers:
            for queue, texts in TICKETS.items():
                writer.writerow([texts[number % 3].format(number), queue])
    return file


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--held_out", type=int, default=60, help="rows to calibrate on")
    given = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        train = write_tickets(place / "train.csv", range(1, 25))
        held_out = write_tickets(place / "held_out.csv", range(25, 25 + given.held_out // 2))
        session = Session.open(given.model, TaskOptions(data=train))
        lora = Lora(rank=8, alpha=16)
        training = Training(lora=lora, steps=given.steps, learning_rate=1e-3, progress=False)
        session.fit(BLoB(), training, place / "posterior")

        promise = Promise(risk=0.2, confidence=0.9)
        print(promises(calibrate(place / "posterior", held_out, CalibrationOptions(promise))))
        new = write_tickets(place / "new.csv", range(0))
        with new.open("a", encoding="utf-8") as opened:
            opened.writelines(f"{ticket},\n" for ticket in NEW)
        rows = load_rows(new, tuple(TICKETS), labelled=False)
        for row, line in zip(rows, decide(place / "posterior", rows), strict=True):
            told = f"{line['choice_text']} {line['confidence']:.2f}"
            print(f"{row.question:36} {told:16} {line['decision']}")


if __name__ == "__main__":
    main()
