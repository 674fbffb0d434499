"""python -m bench.repro [TARGET...]: wall time of `dvc repro --force` by stage, and the most memory that its processes hold at once.

Memory is the sum of proportional set sizes (shared pages counted once), sampled twice a second; Linux only.
"""

import re
import subprocess
import sys
import threading
import time

import psutil

EVERY_SECONDS = 0.5


def held(root: psutil.Process) -> int:
    """Bytes of `root` and all below it."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def main() -> None:
    started = time.monotonic()
    command = ["dvc", "repro", "--force", *sys.argv[1:]]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak, stage = [0, ""], [""]

    def watch() -> None:
        root = psutil.Process(running.pid)
        while running.poll() is None:
            now = held(root)
            if now > peak[0]:
                peak[:] = [now, stage[0]]
            time.sleep(EVERY_SECONDS)

    threading.Thread(target=watch, daemon=True).start()
    begun: list[tuple[str, float]] = []
    for line in running.stdout:
        if match := re.search(r"Running stage '([^']+)'", line):
            stage[0] = match[1]
            begun.append((match[1], time.monotonic()))
    code = running.wait()
    ends = [at for _, at in begun[1:]] + [time.monotonic()]
    for (name, at), end in zip(begun, ends):
        print(f"{end - at:7.1f} s  {name}")
    print(f"{time.monotonic() - started:7.1f} s  in all; peak {peak[0] / 2**30:.2f} GiB in {peak[1]}; exit code {code}")
    sys.exit(code)


if __name__ == "__main__":
    main()
