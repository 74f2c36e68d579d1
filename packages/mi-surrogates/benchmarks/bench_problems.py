"""How many runs on the problems with a known optimum end within five per cent of its information.

`python benchmarks/bench_problems.py [--seeds 10] [--iterations 20] [PROBLEM ...]`
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch

from mi_surrogates import MIObjective, optimize
from mi_surrogates.problems import PROBLEMS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problems", nargs="*", metavar="PROBLEM")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # "the simulator may ignore theta": the status says it
    print("| problem | within 5 % | median regret | largest regret | ended by | CPU s a run |")
    print("|---|---|---|---|---|---|")
    for name in arguments.problems or PROBLEMS:
        problem, regrets, ends = PROBLEMS[name], [], []
        begin = time.process_time()
        for seed in range(arguments.seeds):
            result = optimize(
                problem.simulator,
                problem.make_space(),
                MIObjective(problem.method, **problem.options),
                surrogate="quadratic",
                iterations=arguments.iterations,
                seed=seed,
                progress=False,
            )
            regrets.append(max(0.0, 1 - problem.information(result.theta) / problem.best))
            ends.append(result.status)
        spent = (time.process_time() - begin) / arguments.seeds
        good = sum(regret <= 0.05 for regret in regrets)
        middle = sorted(regrets)[len(regrets) // 2]
        how = ", ".join(f"{each} {ends.count(each)}" for each in sorted(set(ends)))
        print(
            f"| {name} | {good} of {arguments.seeds} | {middle:.2%} | {max(regrets):.2%} | {how} | "
            f"{spent:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
