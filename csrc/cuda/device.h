// The device of an operator's tensors, made the current one, and its current stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels.h"

namespace ncmi::cuda {

class Device {
 public:
  explicit Device(const torch::stable::Tensor& t) : index_(t.get_device_index()), guard_(index_) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }
  int32_t type() const { return aoti_torch_device_type_cuda(); }
  int32_t index() const { return index_; }
  Stream stream() const { return stream_; }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_ = nullptr;
};

}  // namespace ncmi::cuda
