"""The child of `train/evaluate/unit_tests.py`: limits itself, runs a program with its tests, and says that both ended.

Started as `python -I limited_program.py` in an empty folder. Standard input holds one JSON object: program, tests,
seconds, memory_bytes, word. The word is written to standard output after the last test: a program that leaves early has
not passed.
"""

import importlib
import json
import os
import resource
import runpy
import sys


def limit(seconds: int, memory_bytes: int) -> None:
    """Set the hard limits: CPU time, memory, file size, open files, processes, no core file."""
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 1 << 20,
        resource.RLIMIT_NOFILE: 16,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def main() -> None:
    """Run what standard input says."""
    given = json.load(sys.stdin)
    for name in ("program", "tests"):
        with open(f"{name}.py", "w", encoding="utf-8") as file:
            file.write(given[name])
    verdict, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    os.set_inheritable(verdict, False)
    limit(given["seconds"], given["memory_bytes"])
    # Two files: what the program leaves open, such as a quotation, must not swallow its tests.
    sys.path.insert(0, "")
    program = importlib.import_module("program")
    runpy.run_path("tests.py", init_globals=vars(program), run_name="__main__")
    os.write(verdict, given["word"].encode())


if __name__ == "__main__":
    main()
