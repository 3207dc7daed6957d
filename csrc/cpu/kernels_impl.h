// The CPU kernels, by theme, and the table of them. Included once for each instruction set by
// kernels_{default,avx2,avx512}.cpp, which define NCMI_KERNEL_TABLE and NCMI_KERNEL_NAME and set the compiler's target
// before the include: each file gets its own copy, as all that these headers define is in an anonymous namespace or
// static.

#include "center.h"
#include "centroid_grad.h"
#include "centroid_stats.h"
#include "centroid_step.h"
#include "focus.h"
#include "input_grad.h"
#include "terms.h"

namespace ncmi::cpu {
namespace {

template <class T>
constexpr Kernels<T> table() {
  return {.terms = terms<T>,
          .input_grad = input_grad,
          .centroid_rows = centroid_rows<T>,
          .centroid_columns = centroid_columns<T>,
          .rows_of_classes = rows_of_classes<T>,
          .centroid_sums = centroid_sums<T>,
          .centroid_grad = centroid_grad<T>,
          .centroid_step = centroid_step<T>,
          .totals = totals<T>,
          .focus_table = focus_table<T>,
          .focus_rows = focus_rows<T>,
          .focus_nearest = focus_nearest<T>,
          .focus_weights = focus_weights<T>,
          .focus_sums = focus_sums<T>,
          .column_sums = column_sums<T>};
}

}  // namespace

extern const KernelTable NCMI_KERNEL_TABLE{NCMI_KERNEL_NAME, table<float>(), table<double>()};

}  // namespace ncmi::cpu
