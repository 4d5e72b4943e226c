"""What two languages write down twice must agree: names and order of descriptors, limits, columns, choices."""

import re
from pathlib import Path

import torch

from rmtkernels import DESCRIPTORS
from rmtkernels.laws.tracy_widom_table import LOG_SURVIVAL, TABLE_START, TABLE_STEP
from rmtkernels.ops import law_table
from rmtkernels.ops.covariance import TOTALS
from rmtkernels.ops.sliding_window import MAX_WINDOW
from rmtkernels.ops.spectrum import _JOINT, _NOISE
from rmtkernels.reference import spectrum as reference
from tests.helpers import covariance_of, empty_state, normal, pushed

HEADERS = Path(__file__).resolve().parents[2] / "csrc" / "include" / "rmtkernels"


def constants(header: str) -> dict[str, int]:
    """The enumerators and integer constants of a header, evaluated in order."""
    text = re.sub(r"//.*", "", (HEADERS / header).read_text(encoding="utf-8"))
    values: dict[str, int] = {}
    for name, expression in re.findall(r"\b(k[A-Z]\w*)\s*=\s*([\w +-]+?)\s*[,;}\n]", text):
        value = 0
        for sign, term in re.findall(r"([+-]?)\s*(\w+)", expression):
            if not (term.isdigit() or term in values):
                break
            value += (-1 if sign == "-" else 1) * (int(term) if term.isdigit() else values[term])
        else:
            values[name] = value
    return values


def test_descriptors_stand_in_the_order_of_the_header() -> None:
    header = constants("spectrum.h")
    leading = header["kLeading"]
    names = {
        "kShare": [f"share_{i + 1}" for i in range(leading)],
        "kShareTop5": ["share_top5"],
        "kRatio": [f"ratio_{i + 1}" for i in range(leading - 1)],
        "kLogTrace": ["log_trace"],
        "kMeanShare": ["mean_share"],
        "kEntropy": ["entropy"],
        "kParticipation": ["participation"],
        "kVariance": ["variance"],
        "kSkewness": ["skewness"],
        "kLogMedian": ["log_median"],
        "kEarlyEnrichment": ["early_enrichment"],
        "kMpKl": ["mp_kl"],
        "kMpWasserstein": ["mp_wasserstein"],
        "kTracyWidom": ["tracy_widom"],
        "kTracyWidomLogSurvival": ["tracy_widom_log_survival"],
        "kOverlap": ["overlap"],
        "kAboveEdge": ["above_edge"],
    }
    order = sorted(names, key=lambda name: header[name])
    assert [name for enumerator in order for name in names[enumerator]] == list(DESCRIPTORS)
    for enumerator in order:
        assert DESCRIPTORS[header[enumerator]] == names[enumerator][0]
    assert header["kDescriptors"] == len(DESCRIPTORS) == reference._DESCRIPTORS


def test_limits_and_choices_agree() -> None:
    header = constants("spectrum.h")
    assert header["kMaxWindow"] == MAX_WINDOW
    assert {None: header["kPerLayer"], "none": header["kJointRaw"], "trace": header["kJointTrace"]} == _JOINT
    assert {"median": header["kNoiseMedian"], "trace": header["kNoiseTrace"]} == _NOISE


def test_the_law_table_has_the_layout_of_the_header() -> None:
    header = constants("spectrum.h")
    text = (HEADERS / "spectrum.h").read_text(encoding="utf-8")
    assert f"kTracyWidomStart = {TABLE_START}, kTracyWidomStep = {TABLE_STEP};" in text
    assert f"kBinStart = {law_table.BIN_START}, kBinStep = {law_table.BIN_STEP};" in text
    assert header["kTracyWidomPoints"] == len(LOG_SURVIVAL)
    assert (header["kBins"], header["kLawCells"]) == (law_table.BINS, law_table.ROW)
    assert (reference._BINS, reference._BIN_START) == (law_table.BINS, law_table.BIN_START)
    assert (reference._BIN_STEP, reference._BIN_FLOOR) == (law_table.BIN_STEP, law_table.FLOOR)


def test_the_resolution_is_that_of_the_reference() -> None:
    text = (HEADERS / "spectrum.h").read_text(encoding="utf-8")
    assert "kResolution = 1.0 / (1 << 20)" in text
    assert reference._RESOLUTION == 1.0 / (1 << 20)


def test_columns_of_seen() -> None:
    header = constants("sliding_window.h")
    rows = normal(1, 5, 3)
    rows[0, 1, 0] = torch.nan
    seen = pushed(empty_state(1, 1, 3, 3), [rows]).seen[0]
    assert len(seen) == header["kSeenColumns"]
    assert (seen[header["kSeenRows"]], seen[header["kSeenRejected"]], seen[header["kSeenSlot"]]) == (4, 1, 0)


def test_entries_of_totals() -> None:
    header = constants("covariance.h")
    rows = normal(5, 3)
    rows[1, 0] = torch.nan
    totals = covariance_of(rows).totals
    assert len(totals) == header["kCovarianceTotals"] == TOTALS
    names = ("kTotalWeight", "kTotalSquares", "kTotalRows", "kTotalRejected", "kTotalDecays")
    assert [totals[header[name]].item() for name in names] == [4, 4, 4, 1, 0]
