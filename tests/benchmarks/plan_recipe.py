"""Plans a recipe for a published model without the model: `sdjax plan` with its shapes and the sample pictures.

    python tests/benchmarks/plan_recipe.py configs/sd15_lora.toml --for v5e:2x2 [--only-step] [--data.batch_size 4 ...]
    python tests/benchmarks/plan_recipe.py sdxl --draw --size 1024 --for v5e [--json]

Nothing of the released weights is read. A training step of full size takes minutes to compile, and that of all weights
of SDXL more than 21 GB of memory. `--depth N` leaves at most N blocks in each transformer of the U-Net: each more adds
the same operations, bytes and memory, so two programs tell what the whole one needs.
"""

import sys
import tempfile
from pathlib import Path

from recipe_cost import KINDS, TINY, skeleton

from sdjax import plan
from sdjax.train import config_file

with tempfile.TemporaryDirectory() as temporary:
    what, *flags = sys.argv[1:]
    depth = None
    if "--depth" in flags:
        place = flags.index("--depth")
        depth, flags = int(flags[place + 1]), flags[:place] + flags[place + 2 :]
    folder = Path(temporary) / "model"
    if "--draw" in flags:
        sys.exit(plan.main(["--model", str(skeleton(what, folder, depth)), *flags]))
    skeleton(KINDS[config_file.load(what).model], folder, depth)
    overrides = ["--model", str(folder), "--data.path", str(TINY / "samples")]
    sys.exit(plan.main([what, *flags, *overrides]))
