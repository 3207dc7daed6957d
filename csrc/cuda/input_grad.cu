// Backward by row.
#include "rows.cuh"

namespace ncmi::cuda {

template <class T>
void launch_input_grad(const InputGradArgs<T>& args, Stream stream) {
  const int64_t columns = args.centroids.columns;
  const bool can_be_wide =
      aligned(args.centroids) && aligned(args.center) && aligned(args.reference) && aligned(args.grad);
  with_row_kernel<T>(args.input, columns, can_be_wide, [&](auto in, auto kept) {
    using In = typename decltype(in)::type;
    constexpr int k = decltype(kept)::value;
    if (args.centroids.centroid_to_sample)
      launch_rows<In, k>(input_grad_kernel<In, T, k, true>, args, columns, stream);
    else
      launch_rows<In, k>(input_grad_kernel<In, T, k, false>, args, columns, stream);
  });
}

template void launch_input_grad(const InputGradArgs<float>&, Stream);
template void launch_input_grad(const InputGradArgs<double>&, Stream);

}  // namespace ncmi::cuda
