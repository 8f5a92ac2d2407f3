// Dropout of rows by the counter hash of kernels/dropout/hash.py.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "dense.h"

namespace sam2fast {

class DropoutRows {
 public:
  DropoutRows(const torch::stable::Tensor& seed, double probability)
      : threshold_(static_cast<uint32_t>(probability * 4294967296.0)),
        scale_(static_cast<float>(1.0 / (1.0 - probability))) {
    STD_TORCH_CHECK(probability >= 0.0 && probability < 1.0, "the probability of dropout must be in [0, 1)");
    STD_TORCH_CHECK(
        seed.numel() == 1 && seed.scalar_type() == torch::headeronly::ScalarType::Long,
        "the seed of dropout must be an int64 scalar");
    seed_ = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  }

  Dropout row(int64_t index) const {
    const auto low = static_cast<uint32_t>(seed_), high = static_cast<uint32_t>(seed_ >> 32);
    return {mix(mix(low ^ static_cast<uint32_t>(index)) + high), threshold_, scale_};
  }

 private:
  static uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
  }

  uint64_t seed_ = 0;
  uint32_t threshold_;
  float scale_;
};

}  // namespace sam2fast
