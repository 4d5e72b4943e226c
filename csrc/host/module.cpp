// Python module `_host`: the numerics that CPU and CUDA kernels share, on NumPy arrays and without torch, so that they
// can be checked and used alone; and what this library was compiled with.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "rmtkernels/sliding_window.h"
#include "rmtkernels/spectrum.h"

namespace py = pybind11;

namespace {

using Eigenvalues = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Table = Eigenvalues;

// Checked once for all: what the kernels guarantee by construction.
int checked_size(const Eigenvalues& lambda, int64_t dim) {
  if (lambda.ndim() != 1 || lambda.size() > rmtkernels::kMaxWindow || dim < 1)
    throw std::invalid_argument("eigenvalues must be 1-D, at most " + std::to_string(rmtkernels::kMaxWindow) +
                                ", dim positive");
  const double* values = lambda.data();
  for (py::ssize_t i = 0; i < lambda.size(); ++i)
    if (!(values[i] >= 0) || (i > 0 && values[i] > values[i - 1]))
      throw std::invalid_argument("eigenvalues must be in descending order and not negative");
  return int(lambda.size());
}

// The table of laws for `window` and `dim`, as rmtkernels/ops/law_table.py makes it.
const double* checked_table(const Table& table, int64_t window, int n) {
  if (window < n || window > rmtkernels::kMaxWindow || table.ndim() != 1 ||
      table.size() != rmtkernels::law_table_size(window))
    throw std::invalid_argument("table must be the law table of a window of at least as many eigenvalues");
  return table.data();
}

py::array_t<float> spectral_descriptors(const Eigenvalues& lambda, int64_t dim, int64_t window, const Table& table,
                                        int noise, double log_trace, double mean_share, double overlap) {
  const int n = checked_size(lambda, dim);
  const double* laws = checked_table(table, window, n);
  py::array_t<float> out(rmtkernels::kDescriptors);
  rmtkernels::spectral_descriptors(lambda.data(), n, dim, window, noise, laws, {log_trace, mean_share, overlap},
                                   out.mutable_data());
  return out;
}

double tracy_widom_log_survival(double s, const Table& table) {
  if (table.size() < rmtkernels::kTracyWidomPoints) throw std::invalid_argument("table must be a law table");
  return rmtkernels::tracy_widom_log_survival(table.data(), s);
}

py::dict build_report() {
  py::dict report;
  report["compiler"] = __VERSION__;
  report["cpp_standard"] = int64_t(__cplusplus);
  report["max_window"] = rmtkernels::kMaxWindow;
  report["descriptors"] = int(rmtkernels::kDescriptors);
  return report;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Numerics shared by the CPU and CUDA kernels, on NumPy arrays.";
  m.def("spectral_descriptors", &spectral_descriptors, py::arg("eigenvalues"), py::arg("dim"), py::arg("window"),
        py::arg("table"), py::arg("noise"), py::arg("log_trace"), py::arg("mean_share"), py::arg("overlap"),
        "Descriptors of eigenvalues in descending order; see rmtkernels.spectrum_descriptors.");
  m.def("tracy_widom_log_survival", &tracy_widom_log_survival, py::arg("s"), py::arg("table"),
        "ln P(TW_1 > s) from a law table.");
  m.def("upper_edge", &rmtkernels::upper_edge, py::arg("variance"), py::arg("n"), py::arg("dim"),
        "Upper edge of the Marchenko-Pastur bulk of n eigenvalues of rows of width dim.");
  m.def("build_report", &build_report, "What this library was compiled with.");
}
