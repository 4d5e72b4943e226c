"""`python -m rmtkernels`: the environment and build report."""

import argparse

from rmtkernels.report import collect, render, to_json


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rmtkernels", description="What is built, what runs where, and why not."
    )
    parser.add_argument("--json", action="store_true", help="print the report for machines")
    arguments = parser.parse_args()
    report = collect()
    print(to_json(report) if arguments.json else render(report))


if __name__ == "__main__":
    main()
