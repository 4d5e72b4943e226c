"""Laws of random matrices: what noise and planted signal look like in a spectrum. Unit variance; scale by sigma^2."""

from rmtkernels.laws.marchenko_pastur import (
    marchenko_pastur_atom,
    marchenko_pastur_cdf,
    marchenko_pastur_cell_means,
    marchenko_pastur_density,
    marchenko_pastur_edges,
    marchenko_pastur_median,
    marchenko_pastur_quantile,
)
from rmtkernels.laws.noise import noise_variance
from rmtkernels.laws.spiked import bbp_threshold, sample_to_spike, spike_overlap, spike_to_sample
from rmtkernels.laws.tracy_widom import (
    TRACY_WIDOM_MEAN,
    TRACY_WIDOM_VARIANCE,
    tracy_widom_cdf,
    tracy_widom_center_scale,
    tracy_widom_density,
    tracy_widom_log_survival,
    tracy_widom_quantile,
    tracy_widom_survival,
)
from rmtkernels.laws.tracy_widom_table import LOG_SURVIVAL as TRACY_WIDOM_LOG_SURVIVAL
from rmtkernels.laws.tracy_widom_table import TABLE_START as TRACY_WIDOM_TABLE_START
from rmtkernels.laws.tracy_widom_table import TABLE_STEP as TRACY_WIDOM_TABLE_STEP
from rmtkernels.laws.tracy_widom_table import TAIL_SERIES as TRACY_WIDOM_TAIL_SERIES

__all__ = [
    "TRACY_WIDOM_LOG_SURVIVAL",
    "TRACY_WIDOM_MEAN",
    "TRACY_WIDOM_TABLE_START",
    "TRACY_WIDOM_TABLE_STEP",
    "TRACY_WIDOM_TAIL_SERIES",
    "TRACY_WIDOM_VARIANCE",
    "bbp_threshold",
    "marchenko_pastur_atom",
    "marchenko_pastur_cdf",
    "marchenko_pastur_cell_means",
    "marchenko_pastur_density",
    "marchenko_pastur_edges",
    "marchenko_pastur_median",
    "marchenko_pastur_quantile",
    "noise_variance",
    "sample_to_spike",
    "spike_overlap",
    "spike_to_sample",
    "tracy_widom_cdf",
    "tracy_widom_center_scale",
    "tracy_widom_density",
    "tracy_widom_log_survival",
    "tracy_widom_quantile",
    "tracy_widom_survival",
]
