"""Several commands of `distill` in one launch, as a user gives them one by one: the imports are paid once.

`accelerate launch --config_file FILE tests/many_launch.py COMMANDS.json`, a list of lists of words. With
ACCELERATE_USE_FSDP=true, as recipes/accelerate/fsdp2.yaml sets it, a CPU counts as an accelerator (fsdp_launch.py).
"""

import json
import os
import sys
from pathlib import Path

from distill.commands.cli import main
from distill.training import train

if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        from fsdp_launch import Sharded

        train.Accelerator = Sharded
    for words in json.loads(Path(sys.argv[1]).read_text()):
        if code := main(words):
            print(f"failed: {' '.join(words)}", file=sys.stderr)
            sys.exit(code)
