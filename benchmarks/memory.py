"""Memory of a whole run through Ray, over its length: driver, Ray, workers and loader processes.

    python -m benchmarks.memory [--steps N] [--workers N]

Runs the recipe tiny_cpu on drawn pictures and sums, every few seconds, the proportional set size
(PSS: pages that processes share are counted once) of the command and all that descends from it.
Linux only. Prints the sums over the run and the growth between its second and its last quarter.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster.processes import descendants
from data.synthetic import write_scenes

PICTURES = 400
INTERVAL_S = 3.0


def main() -> None:
    """Runs the job and prints its memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_scenes(place / "pictures", seed=0, count=PICTURES)
        subprocess.run(_line("shards", "write", place / "pictures", place / "shards"), check=True)
        job = subprocess.Popen(
            _line(
                "pretrain", "tiny_cpu", f"run={place / 'run'}", f"data.shards={place / 'shards'}",
                f"loop.steps={arguments.steps}", f"resources.workers={arguments.workers}",
                "loop.evaluate_every=null",
            )
        )  # fmt: skip
        samples = list(_samples(job, place / "run"))
    if job.returncode or len(samples) < 8:
        sys.exit(f"the job ended with status {job.returncode} after {len(samples)} samples")
    _tell(samples, arguments.workers)


def _samples(job: "subprocess.Popen[bytes]", run: Path) -> list[dict[str, float]]:
    """GiB by kind of process, from the run's first checkpoint to its end."""
    found = []
    while job.poll() is None:
        time.sleep(INTERVAL_S)
        if any((run / "checkpoints").glob("*/manifest.json")):
            found.append(_by_kind(job.pid))
    # The last samples see the job come down.
    return found[:-3]


def _by_kind(root: int) -> dict[str, float]:
    sums = {"workers": 0.0, "loaders": 0.0, "Ray and the command": 0.0}
    for pid in descendants(root):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        kind = "Ray and the command"
        if "RayTrainWorker" in command:
            kind = "workers"
        elif "forkserver" in command:
            kind = "loaders"
        pss = next((line for line in rollup.splitlines() if line.startswith("Pss:")), "Pss: 0 kB")
        sums[kind] += int(pss.split()[1]) / 2**20
    return sums


def _tell(samples: list[dict[str, float]], workers: int) -> None:
    totals = [sum(sample.values()) for sample in samples]
    quarter = len(samples) // 4
    print(f"tiny_cpu, {workers} workers, {len(samples)} samples; GiB, median")
    for kind in samples[0]:
        print(f"  {kind:22} {statistics.median(sample[kind] for sample in samples):6.2f}")
    print(f"  {'together':22} {statistics.median(totals):6.2f}   most {max(totals):.2f}")
    second = statistics.median(totals[quarter : 2 * quarter])
    last = statistics.median(totals[-quarter:])
    print(
        f"  from the second to the last quarter: {second:.2f} -> {last:.2f} ({last - second:+.3f})"
    )


def _line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "querypatch", *map(str, arguments)]


if __name__ == "__main__":
    main()
