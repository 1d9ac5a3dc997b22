"""`export`, `card` and `push`: a posterior for LoRA servers, its model card, its upload."""

from pathlib import Path

from jsonargparse import Namespace

from bayestune.cli.output_folder import check_writable
from bayestune.cli.reporting import results_of
from bayestune.evaluation import Record
from bayestune.report import renewed
from bayestune.sharing import export, push_to_hub, read_manifest, vllm_command, write_card


def export_adapters(args: Namespace) -> None:
    """Writes the mean, the student and draws of a posterior as plain LoRA folders."""
    check_writable(args.to)
    folder = export(
        args.posterior,
        args.to,
        model=args.model,
        overwrite=args.overwrite,
        draws=args.draws,
        draw_seed=args.draw_seed,
        student=args.student,
        name=args.name,
        server=args.server,
    )
    manifest = read_manifest(folder) or {}
    adapters = ", ".join(adapter["folder"] for adapter in manifest["adapters"])
    print(f"in {folder}: {adapters}, manifest.json")
    print(f"with vLLM, for instance: {vllm_command(folder)}")


def card(args: Namespace) -> None:
    """Writes the model card of a posterior into its folder."""
    path = write_card(
        args.posterior,
        overwrite=args.overwrite,
        records=_records(args.records),
        base_model=args.base_model,
    )
    print(f"card in {path}")


def push(args: Namespace) -> None:
    """Uploads a posterior to the Hub."""
    address = push_to_hub(
        args.posterior,
        args.repo_id,
        private=args.private or None,  # None: as the account has it
        revision=args.revision,
        records=_records(args.records),
        base_model=args.base_model,
    )
    print(f"uploaded: {address}")


def _records(path: Path | None) -> list[Record] | None:
    """The records of a results folder or file, with today's metrics; None if none is named."""
    if path is None:
        return None
    up_to_date = []
    for folder, records in results_of(path):
        up_to_date += renewed(records, folder)
    return up_to_date
