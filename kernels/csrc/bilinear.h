// Low-resolution logits seen as full-resolution rows, one at a time (the geometry is described in rows.h), and the
// masks that they are compared with.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rows.h"

namespace sam2fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Which two low-resolution rows a full-resolution row lies between: (1 - weight) * low + weight * high.
struct Tap {
  int64_t low, high;
  float weight;
};

inline Tap tap(int64_t full, int64_t factor, int64_t size) {
  const int64_t twice = 2 * full + 1 - factor;  // position times 2 s
  const int64_t cell = twice < 0 ? -1 : twice / (2 * factor);
  const float weight = static_cast<float>(twice - cell * 2 * factor) / static_cast<float>(2 * factor);
  return {std::max<int64_t>(cell, 0), std::min(cell + 1, size - 1), weight};
}

// One axis of the upsampling, and where things lie in the buffers of its rows.
struct Axis {
  int64_t size, factor;
  std::vector<float> weights;  // of the s indices of a cell

  Axis(int64_t size, int64_t factor) : size(size), factor(factor), weights(factor) {
    for (int64_t k = 0; k < factor; ++k)
      weights[k] = static_cast<float>(2 * k + (factor % 2 == 0)) / static_cast<float>(2 * factor);
  }
  AxisView view() const { return {size, factor, weights.data()}; }
  int64_t full() const { return size * factor; }
  int64_t buffer() const { return (size + 1) * factor; }  // a full-resolution row with the whole of its border cells
  int64_t offset() const { return factor - factor / 2; }  // where index 0 lies in that buffer
};

inline bool is_kernel_dtype(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline Format format_of(ScalarType kernel_dtype) {
  if (kernel_dtype == ScalarType::Float) return Format::float32;
  return kernel_dtype == ScalarType::BFloat16 ? Format::bfloat16 : Format::float16;
}

inline int64_t bytes_of(Format format) { return format == Format::float32 ? 4 : 2; }

// One [h, w] plane of a tensor of any kernel dtype and strides.
struct Plane {
  const void* data;
  ScalarType type;
  int64_t row_stride, column_stride;  // in elements

  // `width` elements of row `row` in float32.
  void load_row(int64_t row, int64_t width, float* out) const {
    const Format format = format_of(type);
    const auto* source = static_cast<const char*>(data) + bytes_of(format) * row * row_stride;
    row_loops().load(source, format, column_stride, width, out);
  }
};

// Plane [n, m] of [N, M, h, w].
inline Plane plane_of(const Tensor& tensor, int64_t n, int64_t m) {
  const int64_t offset = n * tensor.stride(0) + m * tensor.stride(1);
  const auto* data = static_cast<const char*>(tensor.const_data_ptr());
  return {data + bytes_of(format_of(tensor.scalar_type())) * offset, tensor.scalar_type(), tensor.stride(2),
          tensor.stride(3)};
}

// A few consecutive low-resolution rows in float32, from which full-resolution rows are made one at a time.
class Upsampler {
 public:
  Upsampler(const Axis& rows, const Axis& columns)
      : rows_(rows), columns_(columns), blended_(columns.size + 2), buffer_(columns.buffer()) {}

  // Loads the samples that the full-resolution rows [first, last) lie between.
  void load(const Plane& plane, int64_t first, int64_t last) {
    start_ = tap(first, rows_.factor, rows_.size).low;
    const int64_t stop = tap(last - 1, rows_.factor, rows_.size).high + 1;
    samples_.resize((stop - start_) * stride());
    for (int64_t i = start_; i < stop; ++i) {
      float* padded = sample(i);
      plane.load_row(i, columns_.size, padded + 1);
      padded[0] = padded[1];
      padded[columns_.size + 1] = padded[columns_.size];
    }
  }

  // Logits of full-resolution row `row`, valid until the next call; `columns.full()` of them.
  const float* row(int64_t row) {
    if (rows_.factor == 1) return sample(row) + 1;
    const Tap between = tap(row, rows_.factor, rows_.size);
    loops_.blend(sample(between.low), sample(between.high), between.weight, stride(), blended_.data());
    loops_.expand(columns_.view(), blended_.data(), buffer_.data());
    return buffer_.data() + columns_.offset();
  }

 private:
  int64_t stride() const { return columns_.size + 2; }
  float* sample(int64_t i) { return samples_.data() + (i - start_) * stride(); }

  const RowLoops& loops_ = row_loops();
  const Axis& rows_;
  const Axis& columns_;
  int64_t start_ = 0;
  std::vector<float> samples_, blended_, buffer_;
};

// Ground-truth masks [N, H, W] as bytes (any strides) or as bits [N, H, ceil(W / 8)].
struct Targets {
  const uint8_t* data;
  int64_t stride[3];
  bool packed;

  Targets(const Tensor& targets, bool packed)
      : data(static_cast<const uint8_t*>(targets.const_data_ptr())),
        stride{targets.stride(0), targets.stride(1), targets.stride(2)},
        packed(packed) {}

  // Row of object n as bytes that are 0 in the background; `scratch` [width] holds it where it is not stored so.
  const uint8_t* row(int64_t n, int64_t row, int64_t width, uint8_t* scratch) const {
    const uint8_t* source = data + n * stride[0] + row * stride[1];
    if (!packed && stride[2] == 1) return source;
    for (int64_t x = 0; x < width; ++x)
      scratch[x] = packed ? (source[x / 8 * stride[2]] >> (x % 8)) & 1 : source[x * stride[2]];
    return scratch;
  }
};

}  // namespace sam2fast
