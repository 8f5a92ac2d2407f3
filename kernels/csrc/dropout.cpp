// sam2fast::relu_dropout, sam2fast::dropout_add and their gradients on the CPU; the ground truth is
// kernels/dropout/reference.py.

#include "dropout.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "bands.h"
#include "bilinear.h"

namespace sam2fast {
namespace {

constexpr int64_t kRowsOfThread = 16;  // handed out at a time

void check(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 2 && is_kernel_dtype(x.scalar_type()) && x.is_contiguous(), name,
      " must be float32, bfloat16 or float16 [R, C], contiguous");
}

// Reads rows as float32 (in place where they are), and writes them in the dtype of the result.
struct RowReader {
  explicit RowReader(const Tensor& x)
      : data(static_cast<const char*>(x.const_data_ptr())),
        width(x.size(1)),
        format(format_of(x.scalar_type())),
        row(format == Format::float32 ? 0 : width) {}
  const float* at(int64_t index) {
    const char* source = data + index * width * bytes_of(format);
    if (format == Format::float32) return reinterpret_cast<const float*>(source);
    row_loops().load(source, format, 1, width, row.data());
    return row.data();
  }
  const char* data;
  int64_t width;
  Format format;
  std::vector<float> row;
};

// Rows of `result` computed by body(index, out), where `make` returns each thread a body of its own.
template <typename Make>
Tensor compute_rows(const Tensor& shape, ScalarType dtype, const Make& make) {
  const int64_t rows = shape.size(0), width = shape.size(1);
  Tensor result = torch::stable::new_empty(shape, {rows, width}, dtype);
  auto* data = static_cast<char*>(result.mutable_data_ptr());
  const Format format = format_of(dtype);
  for_each_row(rows, kRowsOfThread, [&] {
    return [&, body = make(), row = std::vector<float>(width)](int64_t index) mutable {
      char* target = data + index * width * bytes_of(format);
      float* out = format == Format::float32 ? reinterpret_cast<float*>(target) : row.data();
      body(index, out);
      if (format != Format::float32) row_loops().store(out, width, format, target);
    };
  });
  return result;
}

Tensor relu_dropout(Tensor x, double dropout, Tensor seed) {
  check(x, "relu_dropout: x");
  const DropoutRows rows(seed, dropout);
  return compute_rows(x, x.scalar_type(), [&] {
    return [&, reader = RowReader(x)](int64_t index, float* out) mutable {
      dense_loops().rectify(reader.at(index), reader.width, rows.row(index), out);
    };
  });
}

Tensor relu_dropout_backward(Tensor grad, Tensor out, double dropout) {
  check(grad, "relu_dropout_backward: grad");
  check(out, "relu_dropout_backward: out");
  STD_TORCH_CHECK(
      grad.size(0) == out.size(0) && grad.size(1) == out.size(1),
      "relu_dropout_backward: grad and out differ in shape");
  const auto scale = static_cast<float>(1.0 / (1.0 - dropout));
  return compute_rows(out, out.scalar_type(), [&] {
    return [&, gradients = RowReader(grad), results = RowReader(out)](int64_t index, float* slope) mutable {
      const float *gradient = gradients.at(index), *result = results.at(index);
      dense_loops().rectified_slope(gradient, result, gradients.width, scale, slope);
    };
  });
}

Tensor dropout_add(Tensor residual, Tensor x, double dropout, Tensor seed) {
  check(residual, "dropout_add: residual");
  check(x, "dropout_add: x");
  STD_TORCH_CHECK(
      residual.size(0) == x.size(0) && residual.size(1) == x.size(1), "dropout_add: residual and x differ in shape");
  const DropoutRows rows(seed, dropout);
  return compute_rows(residual, residual.scalar_type(), [&] {
    return [&, base = RowReader(residual), reader = RowReader(x)](int64_t index, float* out) mutable {
      dense_loops().drop(reader.at(index), reader.width, rows.row(index), out);
      const float* added = base.at(index);
      for (int64_t i = 0; i < base.width; ++i) out[i] += added[i];
    };
  });
}

Tensor dropout_add_backward(Tensor grad, double dropout, Tensor seed, ScalarType dtype) {
  check(grad, "dropout_add_backward: grad");
  STD_TORCH_CHECK(is_kernel_dtype(dtype), "dropout_add_backward: the result must be float32, bfloat16 or float16");
  const DropoutRows rows(seed, dropout);
  return compute_rows(grad, dtype, [&] {
    return [&, reader = RowReader(grad)](int64_t index, float* out) mutable {
      dense_loops().drop(reader.at(index), reader.width, rows.row(index), out);
    };
  });
}

}  // namespace
}  // namespace sam2fast

STABLE_TORCH_LIBRARY_IMPL(sam2fast, CPU, m) {
  m.impl("relu_dropout.cpp", TORCH_BOX(&sam2fast::relu_dropout));
  m.impl("relu_dropout_backward.cpp", TORCH_BOX(&sam2fast::relu_dropout_backward));
  m.impl("dropout_add.cpp", TORCH_BOX(&sam2fast::dropout_add));
  m.impl("dropout_add_backward.cpp", TORCH_BOX(&sam2fast::dropout_add_backward));
}
