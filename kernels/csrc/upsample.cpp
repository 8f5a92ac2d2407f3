// sam2fast::upsample and its gradient on the CPU. Formulas: kernels/upsample/README.md; the ground truth is
// kernels/upsample/reference.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "bands.h"
#include "bilinear.h"

namespace sam2fast {
namespace {

Response check(const Tensor& logits, int64_t factor, int64_t activation, double scale, double bias) {
  STD_TORCH_CHECK(
      logits.dim() == 4 && is_kernel_dtype(logits.scalar_type()) && logits.size(2) > 0 && logits.size(3) > 0,
      "upsample: logits must be float32, bfloat16 or float16 [N, M, h, w]");
  STD_TORCH_CHECK(factor > 0, "upsample: the factor must be at least 1");
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "upsample: the activation must be 0, 1 or 2");
  return {static_cast<Activation>(activation), static_cast<float>(scale), static_cast<float>(bias)};
}

Tensor upsample(Tensor logits, int64_t factor, int64_t activation, double scale, double bias, ScalarType dtype) {
  const Response response = check(logits, factor, activation, scale, bias);
  STD_TORCH_CHECK(is_kernel_dtype(dtype), "upsample: the result must be float32, bfloat16 or float16");
  const Axis rows(logits.size(2), factor), columns(logits.size(3), factor);
  const Format format = format_of(dtype);
  Tensor result =
      torch::stable::new_empty(logits, {logits.size(0), logits.size(1), rows.full(), columns.full()}, dtype);
  auto* data = static_cast<char*>(result.mutable_data_ptr());
  const int64_t row_bytes = columns.full() * bytes_of(format);
  for_each_band(Bands(logits), [&] {
    return [&, upsampler = Upsampler(rows, columns)](const Band& band) mutable {
      const int64_t top = band.first * factor, bottom = band.last * factor;
      upsampler.load(plane_of(logits, band.n, band.m), top, bottom);
      for (int64_t y = top; y < bottom; ++y) {
        char* out = data + (band.plane * rows.full() + y) * row_bytes;
        row_loops().respond(upsampler.row(y), columns.full(), response, format, out);
      }
    };
  });
  return result;
}

// Gradient of the upsampled logits, for `gather_gradient`.
class ResponseGradient {
 public:
  ResponseGradient(
      const Tensor& grad, const Tensor& logits, const Response& response, const Axis& rows, const Axis& columns)
      : grad_(grad),
        logits_(logits),
        response_(response),
        width_(columns.full()),
        upsampler_(rows, columns),
        scratch_(width_) {}

  bool start(const Band& band, int64_t top, int64_t bottom) {
    if (response_.activation == Activation::binary) return false;
    plane_ = plane_of(grad_, band.n, band.m);
    if (response_.activation == Activation::sigmoid) upsampler_.load(plane_of(logits_, band.n, band.m), top, bottom);
    return true;
  }

  void row(int64_t y, float* out) {
    plane_.load_row(y, width_, scratch_.data());
    const float* logits = response_.activation == Activation::sigmoid ? upsampler_.row(y) : nullptr;
    row_loops().trace_back(scratch_.data(), logits, width_, response_, out);
  }

 private:
  const Tensor& grad_;
  const Tensor& logits_;
  const Response& response_;
  int64_t width_;
  Upsampler upsampler_;
  std::vector<float> scratch_;
  Plane plane_{};
};

Tensor upsample_backward(Tensor grad, Tensor logits, int64_t factor, int64_t activation, double scale) {
  const Response response = check(logits, factor, activation, scale, 0.0);
  const Axis rows(logits.size(2), factor), columns(logits.size(3), factor);
  STD_TORCH_CHECK(
      grad.dim() == 4 && is_kernel_dtype(grad.scalar_type()) && grad.size(0) == logits.size(0) &&
          grad.size(1) == logits.size(1) && grad.size(2) == rows.full() && grad.size(3) == columns.full(),
      "upsample_backward: grad must be float32, bfloat16 or float16 [N, M, factor * h, factor * w]");
  return gather_gradient(
      logits, rows, columns, [&] { return ResponseGradient(grad, logits, response, rows, columns); });
}

}  // namespace
}  // namespace sam2fast

STABLE_TORCH_LIBRARY_IMPL(sam2fast, CPU, m) {
  m.impl("upsample.cpp", TORCH_BOX(&sam2fast::upsample));
  m.impl("upsample_backward.cpp", TORCH_BOX(&sam2fast::upsample_backward));
}
