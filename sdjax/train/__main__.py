"""The training command: `python -m sdjax.train CONFIG.toml [--key value ...] [--resume] [--debug]`.

Exit codes: 0; 2 usage or configuration; 3 data or weights; 4 training stopped itself; 128 + signal. Of several
processes (`--coordinator HOST:PORT --processes N --process I`), one that fails ends at once, so the others notice it.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from sdjax.runtime import command
from sdjax.train.config_file import parse_args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; see `command.run`."""
    # A run stopped before the first step still removes its unfinished files. Training has a handler that saves first.
    code = command.run(_run, argv, (signal.SIGINT, signal.SIGTERM))
    if code and (processes := sys.modules.get("sdjax.runtime.processes")) and processes.are_joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # JAX would wait here for the other processes, which wait for this one
    return code


def _run(argv: Sequence[str]) -> int:
    arguments = parse_args(argv)
    # JAX is imported only now, so that --help and errors in flags are shown at once.
    from tqdm.contrib.logging import logging_redirect_tqdm

    from sdjax.runtime import compilation_cache, host_memory, processes
    from sdjax.runtime.devices import divide_cpu
    from sdjax.train.loop import train

    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(command.Formatter("%(message)s"))
    logging.basicConfig(handlers=[shown])
    logging.getLogger("sdjax").setLevel(logging.INFO)
    compilation_cache.enable()
    divide_cpu(arguments.config.parallel.cpu_devices)
    processes.join(arguments.coordinator, arguments.processes, arguments.process)
    if not processes.is_first():
        shown.setFormatter(command.Formatter(f"process {processes.index()}: %(message)s"))
        logging.getLogger("sdjax").setLevel(logging.WARNING)
    host_memory.keep()
    with logging_redirect_tqdm():
        return train(arguments.config, resume=arguments.resume, resume_step=arguments.resume_step)


if __name__ == "__main__":
    sys.exit(main())
