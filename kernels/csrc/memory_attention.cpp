// The steps of sam2fast::memory_attention on the CPU between its matrix products; kernels/memory_attention/cpu.py calls
// them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "bands.h"
#include "bilinear.h"
#include "dense.h"
#include "dropout.h"

namespace sam2fast {
namespace {

constexpr int64_t kRowsOfThread = 8;  // handed out at a time

void check_vector(const Tensor& vector, int64_t rows) {
  STD_TORCH_CHECK(
      vector.dim() == 1 && vector.size(0) == rows && (rows < 2 || vector.stride(0) == 1) &&
          vector.scalar_type() == ScalarType::Float,
      "memory_attention: row statistics must be float32, one for each row of scores");
}

void check_rows(const Tensor& scores) {
  STD_TORCH_CHECK(
      scores.dim() == 2 && scores.scalar_type() == ScalarType::Float &&
          (scores.size(1) < 2 || scores.stride(1) == 1) &&
          (scores.size(0) < 2 || scores.stride(0) >= scores.size(1)),
      "memory_attention: scores must be float32 [B, M], with contiguous rows");
}

Tensor rotate_rows(
    Tensor x, Tensor cos, Tensor sin, int64_t num_unrotated, double scale, bool inverse, ScalarType dtype) {
  STD_TORCH_CHECK(
      x.dim() == 2 && is_kernel_dtype(x.scalar_type()) && is_kernel_dtype(dtype),
      "memory_attention: queries and keys must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(
      cos.is_contiguous() && sin.is_contiguous() && cos.scalar_type() == ScalarType::Float &&
          sin.scalar_type() == ScalarType::Float && cos.dim() == 2 && cos.size(1) * 2 == x.size(1),
      "memory_attention: rotary tables must be float32 [hw, D / 2], contiguous");
  const int64_t rows = x.size(0), width = x.size(1), angles = cos.size(0);
  const int64_t placed = angles ? rows - num_unrotated : 0;
  Tensor result = torch::stable::new_empty(x, {rows, width}, dtype);
  auto* out = static_cast<char*>(result.mutable_data_ptr());
  const auto* source = static_cast<const char*>(x.const_data_ptr());
  const auto* cosines = static_cast<const float*>(cos.const_data_ptr());
  const auto* sines = static_cast<const float*>(sin.const_data_ptr());
  const Format from = format_of(x.scalar_type()), to = format_of(dtype);
  const int64_t row_stride = x.stride(0) * bytes_of(from), stride = x.stride(1);
  const auto factor = static_cast<float>(scale);
  for_each_row(rows, kRowsOfThread, [&] {
    return [&, row_in = std::vector<float>(width), row_out = std::vector<float>(width),
            still = std::vector<float>(width / 2), ones = std::vector<float>(width / 2, 1.0f),
            turn = std::vector<float>(width / 2)](int64_t row) mutable {
      row_loops().load(source + row * row_stride, from, stride, width, row_in.data());
      const float* c = ones.data();
      const float* s = still.data();
      if (row < placed) {
        c = cosines + row % angles * (width / 2);
        s = sines + row % angles * (width / 2);
        if (inverse) {
          for (int64_t i = 0; i < width / 2; ++i) turn[i] = -s[i];
          s = turn.data();
        }
      }
      dense_loops().rotate(row_in.data(), c, s, width / 2, factor, row_out.data());
      row_loops().store(row_out.data(), width, to, out + row * width * bytes_of(to));
    };
  });
  return result;
}

void attention_weights(Tensor scores, Tensor seed, int64_t first, double dropout, Tensor lse, Tensor row_sum) {
  check_rows(scores);
  check_vector(lse, scores.size(0));
  check_vector(row_sum, scores.size(0));
  const DropoutRows rows(seed, dropout);
  const int64_t keys = scores.size(1), stride = scores.stride(0);
  auto* data = static_cast<float*>(scores.mutable_data_ptr());
  auto* lses = static_cast<float*>(lse.mutable_data_ptr());
  auto* sums = static_cast<float*>(row_sum.mutable_data_ptr());
  for_each_row(scores.size(0), kRowsOfThread, [&] {
    return [&](int64_t row) {
      const WeightSums found = dense_loops().weigh(data + row * stride, keys, rows.row(first + row));
      lses[row] = found.lse;
      sums[row] = found.dropped;
    };
  });
}

void attention_slopes(
    Tensor scores, Tensor slopes, Tensor seed, int64_t first, double dropout, Tensor lse, Tensor delta,
    Tensor grad_row_sum) {
  check_rows(scores);
  check_rows(slopes);
  STD_TORCH_CHECK(
      slopes.size(0) == scores.size(0) && slopes.size(1) == scores.size(1),
      "memory_attention: scores and slopes differ in shape");
  for (const Tensor* vector : {&lse, &delta, &grad_row_sum}) check_vector(*vector, scores.size(0));
  const DropoutRows rows(seed, dropout);
  const int64_t keys = scores.size(1), stride = scores.stride(0), slope_stride = slopes.stride(0);
  auto* data = static_cast<float*>(scores.mutable_data_ptr());
  auto* gradients = static_cast<float*>(slopes.mutable_data_ptr());
  const auto* lses = static_cast<const float*>(lse.const_data_ptr());
  const auto* deltas = static_cast<const float*>(delta.const_data_ptr());
  const auto* row_gradients = static_cast<const float*>(grad_row_sum.const_data_ptr());
  for_each_row(scores.size(0), kRowsOfThread, [&] {
    return [&](int64_t row) {
      dense_loops().slope(
          data + row * stride, gradients + row * slope_stride, keys, lses[row], deltas[row], row_gradients[row],
          rows.row(first + row));
    };
  });
}

}  // namespace
}  // namespace sam2fast

STABLE_TORCH_LIBRARY_IMPL(sam2fast, CPU, m) {
  m.impl("rotate_rows.cpp", TORCH_BOX(&sam2fast::rotate_rows));
  m.impl("attention_weights.cpp", TORCH_BOX(&sam2fast::attention_weights));
  m.impl("attention_slopes.cpp", TORCH_BOX(&sam2fast::attention_slopes));
}
