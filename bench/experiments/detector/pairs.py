"""`python -m bench.experiments.detector.pairs dialogue`: right and wrong answers of equal length to the same prompt.

The prompt alone is at chance by construction, and so is the length. Windows hold answer tokens only. Without --final
the validation part stands in for the test part, and nothing is written.
"""

import argparse
import json
from pathlib import Path

from bench.experiments.detector.comparison import compare
from bench.experiments.detector.report import counts, prepared, result_path, write
from bench.experiments.detector.tried import VARIANTS

IMPROVED = {
    "EigenTrack GRU with vectors": "these, and the probe of means so far",
    "EigenTrack GRU with vectors and attention": "all of these and the probe",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=["dialogue", "qa", "facts"])
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--final", action="store_true", help="judge on the test part, and write the result")
    arguments = parser.parse_args()
    data = prepared(arguments.set, arguments.cache)
    improved = {name: VARIANTS[variant] for name, variant in IMPROVED.items()}
    result = {"counts": counts(data)} | compare(data, improved, "test" if arguments.final else "validation")
    if arguments.final:
        write(result_path(arguments.set), f"pairs {arguments.set} --final", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
