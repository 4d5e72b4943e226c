// Chooses the instruction set at run time: RMTKERNELS_ISA=auto|avx2|baseline, or set_cpu_isa().
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace rmtkernels {

#define RMT_DECLARE_KERNELS(isa)                                                                               \
  namespace isa {                                                                                              \
  void load_row(float*, const void*, DType, int64_t, int64_t);                                                 \
  double row_norm(const float*, int64_t);                                                                      \
  void dot_rows(double*, const float*, const void*, DType, int64_t, int64_t);                                  \
  void eigvalsh_f32(const float*, float*, int64_t, int64_t, int64_t);                                          \
  void eigvalsh_f64(const double*, double*, int64_t, int64_t, int64_t);                                        \
  void descriptors(const DescriptorArgs&, int64_t, int64_t);                                                   \
  double squared_norm(const void*, DType, int64_t);                                                            \
  void add_rows(double*, const RowList&, int64_t, int64_t);                                                    \
  int64_t panel_width(bool);                                                                                   \
  void pack_rows(void*, bool, int64_t, const RowList&, const double*, int64_t, int64_t, int64_t);              \
  void add_scatter(void*, const void*, bool, int64_t, int64_t, const PanelBlock&);                             \
  void scale_lower(void*, bool, int64_t, double, int64_t, int64_t);                                            \
  void load_activations(float*, const void*, DType, bool, int64_t, int64_t);                                   \
  void row_products(const RowProducts&, int64_t, int64_t);                                                     \
  void multiply_f32(const MultiplyArgs&, int64_t, int64_t);                                                    \
  void multiply_f64(const MultiplyArgs&, int64_t, int64_t);                                                    \
  void multiply_gram_f32(const MultiplyArgs&, int64_t, int64_t);                                               \
  void multiply_gram_f64(const MultiplyArgs&, int64_t, int64_t);                                               \
  static const Kernels table = {load_row,     row_norm,          dot_rows,         eigvalsh_f32, eigvalsh_f64, \
                                descriptors,  squared_norm,      add_rows,         panel_width,  pack_rows,    \
                                add_scatter,  scale_lower,       load_activations, row_products, multiply_f32, \
                                multiply_f64, multiply_gram_f32, multiply_gram_f64};                           \
  }

RMT_DECLARE_KERNELS(baseline)
#if defined(RMT_HAVE_AVX2)
RMT_DECLARE_KERNELS(avx2)
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* table;
  bool (*supported)();
};

const Isa kIsas[] = {
// best first
#if defined(RMT_HAVE_AVX2)
    {"avx2", &avx2::table,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {"baseline", &baseline::table, [] { return true; }},
};

const Isa* find_isa(const char* name) {
  const bool any = std::strcmp(name, "auto") == 0;
  for (const Isa& isa : kIsas)
    if ((any || std::strcmp(name, isa.name) == 0) && isa.supported()) return &isa;
  return nullptr;
}

std::atomic<const Isa*>& current() {
  // A wrong value in the environment is reported by Python when the package is imported (rmtkernels/_native.py).
  static std::atomic<const Isa*> isa{[] {
    const char* wanted = std::getenv("RMTKERNELS_ISA");
    const Isa* found = wanted ? find_isa(wanted) : nullptr;
    return found ? found : find_isa("auto");
  }()};
  return isa;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed)->table; }
const char* cpu_isa() { return current().load()->name; }
bool cpu_isa_available(const char* name) { return find_isa(name) != nullptr; }
bool set_cpu_isa(const char* name) {
  const Isa* isa = find_isa(name);
  if (isa) current().store(isa);
  return isa != nullptr;
}

}  // namespace rmtkernels
