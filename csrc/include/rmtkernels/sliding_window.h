// sliding_window: the rules every backend shares.
//
// A stream is one sequence seen at one layer. It keeps its last `window` rows in a ring of `window` slots and the Gram
// matrix of the slots. Eigenvalues do not depend on the order of rows, so the ring is never unrolled. A new row changes
// one row and one column of the Gram matrix; entries are computed from stored rows and never accumulated: no drift.
//
// The layers of a sequence move together: a row whose squared norm is not finite in float32 (NaN, Inf, overflow) in any
// layer is skipped in all of them, so that slot s means the same token everywhere.
#pragma once

#include "rmtkernels/portability.h"

namespace rmtkernels {

// Columns of `seen`, one row of counters per sequence.
enum SeenColumn : int {
  kSeenRows = 0,      // rows accepted since the last reset
  kSeenRejected = 1,  // rows skipped because they were not finite
  kSeenSlot = 2,      // slot of the row offered last, -1 if it was skipped
  kSeenColumns = 3
};

// Whole sequences, for window_gram: element d of row t of sequence b is data[b * batch_stride + t * step_stride + d *
// dim_stride].
struct GramRows {
  const void* data;
  const bool* mask;  // null: every row is offered
  int64_t batch_stride, step_stride, dim_stride, mask_batch_stride, mask_step_stride;
  int64_t batch, steps, dim, window;
};

inline namespace RMT_ISA {

// Slot that the next accepted row of a sequence takes.
RMT_HD int64_t window_slot(int64_t rows_seen, int64_t window) { return rows_seen % window; }

// Slots in use: they are always the first ones.
RMT_HD int64_t window_rows(int64_t rows_seen, int64_t window) { return rows_seen < window ? rows_seen : window; }

// The squared norm doubles as the Gram matrix's diagonal entry, so it must fit float32. NaN fails the comparison.
RMT_HD bool norm_is_finite(double squared_norm) { return squared_norm <= 3.4028234663852886e38; }

}  // namespace RMT_ISA
}  // namespace rmtkernels
