"""`export`: a posterior's adapters for servers."""

from jsonargparse import Namespace

from bayestune.cli.output_folder import check_writable
from bayestune.sharing import export, read_manifest, vllm_command


def export_adapters(o: Namespace) -> None:
    """Writes the mean, the student and draws of a posterior as plain LoRA folders."""
    check_writable(o.to)
    names = ("draws", "draw_seed", "student", "name", "server")
    given = {name: o[name] for name in names}
    folder = export(o.posterior, o.to, model=o.model, overwrite=o.overwrite, **given)
    manifest = read_manifest(folder) or {}
    print(f"in {folder}: {', '.join(one['folder'] for one in manifest['adapters'])}, manifest.json")
    print(f"with vLLM, for instance: {vllm_command(folder)}")
