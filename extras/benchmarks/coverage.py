"""How often the intervals of evaluate.py hold the truth, where the truth is known.

    python -m extras.benchmarks.coverage            7 minutes
    python -m extras.benchmarks.coverage --tiny     seconds; shows that it runs

Simulated test sets: each tile is answered rightly with the true recall of its class, which is the
same in all classes, so that the true balanced accuracy is that recall. Printed, in per cent of the
simulations, for intervals that promise 95:

    held     the interval of evaluate.py holds the truth
    plain    so does one of resamples alone, without the tiles that evaluate.py adds
    equal    two models of the same recall, which share half of their errors: "within noise"
    width    of evaluate.py's interval, in points, the mean

Where tiles come in groups (of a patient, say), half of a group's tiles share their luck; "unaware"
is what the interval holds when the groups are not told.
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor

import evaluate
from data import make_parser, natural, positive, run_program
from evaluate import Figure, Tally

RECALLS = (0.6, 0.8, 0.95, 0.99)
METRIC = "balanced_accuracy"


class Setting(NamedTuple):
    """Test tiles of each class; how many make a group."""

    counts: tuple[int, ...]
    group: int = 1


SETTINGS = [
    Setting((160, 40)),
    Setting((40, 10)),
    Setting((1600, 400)),
    Setting((50,) * 6),
    Setting((320, 80), group=10),
]


def draw_luck(setting: Setting, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), one a test tile (n,): where it is below the recall, an answer is right."""
    n = sum(setting.counts)
    luck = torch.rand(n, generator=generator)
    if setting.group > 1:
        of_group = torch.rand(n // setting.group, generator=generator)
        shared = torch.rand(n, generator=generator) < 0.5
        luck[shared] = of_group.repeat_interleave(setting.group)[shared]
    return luck


def draw_pair(setting: Setting, generator: torch.Generator) -> dict[Figure, Tally]:
    """The answers of two models at every recall, which share half of their luck."""
    truth = torch.arange(len(setting.counts)).repeat_interleave(torch.tensor(setting.counts))
    one = draw_luck(setting, generator)
    other = draw_luck(setting, generator)
    shared = torch.rand(len(truth), generator=generator) < 0.5
    other[shared] = one[shared]
    tallies = {}
    for model, luck in (("one", one), ("other", other)):
        for recall in RECALLS:
            wrong = (truth + 1) % len(setting.counts)
            predicted = torch.where(luck < recall, truth, wrong)
            tally = evaluate.tally_answers(predicted, truth)[METRIC]
            tallies[Figure(model, round(100 * recall), "class", "knn", METRIC)] = tally
    return tallies


def holds(draws: Tensor, truth: float) -> bool:
    """Whether the interval of a figure holds its true value."""
    low, high = evaluate.interval(draws)
    return low <= truth <= high


def simulate(setting: Setting, times: int, seed: int) -> dict[float, dict[str, float]]:
    """{recall: {"held": per cent of the simulations, ...}}; see the top."""
    counts = {}
    pairs = {}
    for recall in RECALLS:
        counts[recall] = {"held": 0, "plain": 0, "equal": 0, "width": 0, "unaware": 0}
        dim = round(100 * recall)
        pairs[recall] = (("one", dim), ("other", dim))
    alone = torch.arange(sum(setting.counts))
    groups = alone // setting.group
    for k in range(times):
        tallies = draw_pair(setting, torch.Generator().manual_seed(seed + k))
        draws = evaluate.resample(tallies, groups, k)
        differences = evaluate.compare(pairs, tallies, draws, groups, k)
        unaware = draws
        if setting.group > 1:
            unaware = evaluate.resample(tallies, alone, k)
        weights = evaluate.draw_weights(groups, k)
        for recall, difference in zip(RECALLS, differences, strict=True):
            figure = Figure(*pairs[recall][0], "class", "knn", METRIC)
            tally = tallies[figure]
            plain = evaluate.mean_ratio(weights @ tally.part.float(), weights @ tally.whole.float())
            low, high = evaluate.interval(draws[figure])
            count = counts[recall]
            count["held"] += low <= recall <= high
            count["plain"] += holds(plain, recall)
            count["equal"] += difference["verdict"] == "within noise"
            count["width"] += high - low
            count["unaware"] += holds(unaware[figure], recall)
    found = {}
    for recall, count in counts.items():
        found[recall] = {key: 100 * value / times for key, value in count.items()}
    return found


def main() -> None:
    """The command line."""
    parser = make_parser("python -m extras.benchmarks.coverage", __doc__)
    add = parser.add_argument
    add("--times", type=positive, default=500, help="simulations of each setting (default: 500)")
    add("--seed", type=natural, default=0, help="(default: 0)")
    add("--tiny", action="store_true", help="4 simulations of each")
    args = parser.parse_args()
    times = 4 if args.tiny else args.times
    began = time.monotonic()
    print(f"{times} simulations each, {evaluate.RESAMPLES} resamples, torch {torch.__version__}")
    print(f"{'test tiles of each class':32}recall   held  plain  equal  width  unaware")
    for setting in SETTINGS:
        name = " + ".join(str(count) for count in setting.counts)
        if setting.group > 1:
            name += f", in groups of {setting.group}"
        for recall, found in simulate(setting, times, args.seed).items():
            line = f"{name:32}{recall:>6}"
            for key in ("held", "plain", "equal", "width"):
                line += f"{found[key]:>7.1f}"
            if setting.group > 1:
                line += f"{found['unaware']:>9.1f}"
            print(line, flush=True)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    run_program(main)
