"""`export`, `card` and `push`: what leaves the machine."""

from pathlib import Path

from jsonargparse import Namespace

from bayestune.cli.output_folder import check_writable
from bayestune.cli.reporting import results_of
from bayestune.evaluation import Record
from bayestune.report import renewed
from bayestune.sharing import export, push_to_hub, read_manifest, vllm_command, write_card


def export_adapters(o: Namespace) -> None:
    """Writes the mean, the student and draws of a posterior as plain LoRA folders."""
    check_writable(o.to)
    names = ("draws", "draw_seed", "student", "name", "server")
    given = {name: o[name] for name in names}
    folder = export(o.posterior, o.to, model=o.model, overwrite=o.overwrite, **given)
    manifest = read_manifest(folder) or {}
    print(f"in {folder}: {', '.join(one['folder'] for one in manifest['adapters'])}, manifest.json")
    print(f"with vLLM, for instance: {vllm_command(folder)}")


def card(o: Namespace) -> None:
    """Writes the model card of a posterior into its folder."""
    of_card = {"records": _records(o.records), "base_model": o.base_model}
    print(f"card in {write_card(o.posterior, overwrite=o.overwrite, **of_card)}")


def push(o: Namespace) -> None:
    """Uploads a posterior to the Hub."""
    of_card = {"records": _records(o.records), "base_model": o.base_model}
    place = {"private": o.private or None, "revision": o.revision}
    print(f"uploaded: {push_to_hub(o.posterior, o.repo_id, **place, **of_card)}")


def _records(path: Path | None) -> list[Record] | None:
    """The records of a results folder or file, with today's metrics; None if none is named."""
    if path is None:
        return None
    found = []
    for folder, records in results_of(path):
        found += renewed(records, folder)
    return found
