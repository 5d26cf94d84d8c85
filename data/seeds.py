"""What comes out for every training seed: the demo's experiment on the models of each, as one Markdown table.

    for seed in 0 1 2; do python data/train_pair.py --seed $seed --out /tmp/pairs/$seed; done
    python data/seeds.py /tmp/pairs/0 /tmp/pairs/1 /tmp/pairs/2

The first rows are means over the six emotions (token accuracy, test split), the others honesty (MC1).
"""

import argparse
import sys
from pathlib import Path

from contrans_tl.demo import run_demo
from contrans_tl.evaluation import TransferReport
from contrans_tl.report import write_report

ARMS = ("base", "transplanted", "uniform", "random_weighting", "paper", "native", "shuffled_map", "random", "random_source")
ARMS += ("other_concept", "sign_flipped", "neutral_corpus")


def row(seed: str, target: str, what: str, reports: list[TransferReport]) -> str:
    """Means of every arm over the reports, and of the transplanted arm's increase of neutral-text loss."""
    values = [sum(report.arms[arm][report.metric].value for report in reports) / len(reports) for arm in ARMS]
    loss = sum(report.arms["transplanted"]["loss_increase"].value for report in reports) / len(reports)
    return f"| {seed} | {target} | {what} | " + " | ".join(f"{value:.2f}" for value in values) + f" | {loss:+.2f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The demo's experiment for several training seeds.")
    parser.add_argument("folders", type=Path, nargs="+", help="each with source, target-llama and target-gpt2")
    parser.add_argument("--out", type=Path, help="keep each seed's report.json and report.html below this folder")
    args = parser.parse_args()
    header = ["seed", "target", "concept", *(arm.replace("_", " ") for arm in ARMS), "loss increase"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    emotions, honesty = [], []
    for folder in args.folders:
        experiment = run_demo(folder)
        if args.out:
            write_report(experiment, args.out / folder.name)
        for target, reports in experiment.reports.items():
            six = [report for report in reports.values() if report.concept != "honesty"]
            emotions.append(row(folder.name, target, "six emotions", six))
            honesty.append(row(folder.name, target, "honesty", [reports["honesty"]]))
        print(f"{folder}: {experiment.about['seconds']} s", file=sys.stderr)
    print("\n".join(emotions + honesty))
