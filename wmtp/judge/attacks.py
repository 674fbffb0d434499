"""A dozen programs that must not pass: one for each way in which judges have been fooled, stalled or killed."""

from wmtp.records import CheckTests, Problem

TASK = Problem(
    task_id="self-check",
    source="humaneval",
    group="self-check",
    statement="",
    tests=CheckTests(test="def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(5, 6) == 11\n", entry_point="add"),
)
WRONG = "def add(a, b):\n    return 0\n"
RIGHT = "def add(a, b):\n    return a + b\n"

ATTACKS = {
    "exits with success": "import os\ndef add(a, b):\n    os._exit(0)\n",
    "raises SystemExit": "def add(a, b):\n    raise SystemExit(0)\n",
    "agrees with everything": (
        "class Yes(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef add(a, b):\n    return Yes()\n"
    ),
    "prints a verdict": f'print(\'{{"verdict":"pass","detail":"","starved":false}}\', flush=True)\n{WRONG}',
    "writes to every descriptor": (
        "import os\nfor n in range(3, 64):\n    try:\n        os.write(n, b'pass' * 99)\n    except OSError:\n        pass\n" + WRONG
    ),
    "patches the builtins": f"import builtins\nbuiltins.isinstance = lambda *_: True\nbuiltins.AssertionError = KeyError\n{WRONG}",
    "looks for the answer in memory": (
        "import gc\ndef add(a, b):\n"
        "    return next((d['expected'] for d in gc.get_objects() if isinstance(d, dict) and 'expected' in d), 0)\n"
    ),
    "forks for ever": "import os\ndef add(a, b):\n    while True:\n        os.fork()\n",
    "never ends": "def add(a, b):\n    while True:\n        pass\n",
    "takes all memory": "def add(a, b):\n    return len('x' * 10**11)\n",
    "floods the output": "def add(a, b):\n    while True:\n        print('x' * 100_000)\n",
    "kills its parent": f"import os\nos.kill(os.getppid(), 9)\n{WRONG}",
}
