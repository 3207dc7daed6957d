// Forward by row.
#include "rows.cuh"

namespace ncmi::cuda {

template <class T>
void launch_terms(const TermsArgs<T>& args, Stream stream) {
  const int64_t columns = args.centroids.columns;
  const bool can_be_wide = aligned(args.centroids) && aligned(args.center) && aligned(args.grad);
  with_row_kernel<T>(args.input, columns, can_be_wide, [&](auto in, auto kept) {
    using In = typename decltype(in)::type;
    constexpr int k = decltype(kept)::value;
    if (args.grad) {
      if constexpr (sizeof(In) != 2) {  // the gradient of a half-precision input waits for the upstream gradient
        if (args.centroids.centroid_to_sample)
          launch_rows<In, k>(terms_kernel<In, T, k, true, true>, args, columns, stream);
        else
          launch_rows<In, k>(terms_kernel<In, T, k, false, true>, args, columns, stream);
      }
    } else if (args.centroids.centroid_to_sample) {
      launch_rows<In, k>(terms_kernel<In, T, k, true, false>, args, columns, stream);
    } else {
      launch_rows<In, k>(terms_kernel<In, T, k, false, false>, args, columns, stream);
    }
  });
}

template void launch_terms(const TermsArgs<float>&, Stream);
template void launch_terms(const TermsArgs<double>&, Stream);

}  // namespace ncmi::cuda
