"""The notebook: measurements that answered a question once, and the page that shows what was found.

They share the benchmarks' harness: its folder goes on the path before any study is imported.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
