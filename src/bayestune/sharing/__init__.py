"""What leaves the machine: plain adapters for servers, a model card, a repository on the Hub.

`export` writes folders that stock PEFT and LoRA servers load; `write_card` says what is known of a
posterior, and `push_to_hub` uploads it whole.
"""

from bayestune.sharing.card import make_card, write_card
from bayestune.sharing.draw_folders import ExportOptions, Server, export
from bayestune.sharing.hub import push_to_hub
from bayestune.sharing.known import Known
from bayestune.sharing.manifest import MANIFEST, read_manifest, vllm_command
from bayestune.sharing.vllm_rules import Finding, vllm_findings

__all__ = [
    "MANIFEST",
    "ExportOptions",
    "Finding",
    "Known",
    "Server",
    "export",
    "make_card",
    "push_to_hub",
    "read_manifest",
    "vllm_command",
    "vllm_findings",
    "write_card",
]
