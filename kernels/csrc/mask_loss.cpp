// sam2fast::mask_sums and its gradient on the CPU. Formulas: kernels/mask_loss/README.md; the ground truth is
// kernels/mask_loss/reference.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "bands.h"
#include "bilinear.h"

namespace sam2fast {
namespace {

FocalOptions focal_options(double gamma, double alpha) {
  const bool balanced = alpha >= 0;
  return {
      static_cast<float>(gamma), balanced ? static_cast<float>(alpha) : 1.0f,
      balanced ? static_cast<float>(1 - alpha) : 1.0f};
}

// Returns the factor of the upsampling.
int64_t check(const Tensor& logits, const Tensor& targets, bool packed) {
  STD_TORCH_CHECK(
      logits.dim() == 4 && is_kernel_dtype(logits.scalar_type()) && logits.size(2) > 0 && logits.size(3) > 0,
      "mask_sums: logits must be float32, bfloat16 or float16 [N, M, h, w]");
  STD_TORCH_CHECK(
      targets.dim() == 3 && targets.size(0) == logits.size(0) &&
          (targets.scalar_type() == ScalarType::Byte || (!packed && targets.scalar_type() == ScalarType::Bool)),
      "mask_sums: targets must be bool or uint8 [N, H, W], or packed uint8 [N, H, ceil(W / 8)]");
  const int64_t height = logits.size(2), width = logits.size(3), factor = targets.size(1) / height;
  const int64_t columns = packed ? (factor * width + 7) / 8 : factor * width;
  STD_TORCH_CHECK(
      factor > 0 && targets.size(1) == factor * height && targets.size(2) == columns,
      "mask_sums: the sides of targets must be one multiple of those of logits");
  return factor;
}

struct BandSums {
  double focal = 0, p = 0, p_inside = 0;
  int64_t intersection = 0, mask = 0, target = 0;

  void operator+=(const RowSums& row) {
    focal += row.focal, p += row.p, p_inside += row.p_inside;
    intersection += row.intersection, mask += row.mask, target += row.target;
  }
  void operator+=(const BandSums& band) {
    focal += band.focal, p += band.p, p_inside += band.p_inside;
    intersection += band.intersection, mask += band.mask, target += band.target;
  }
};

std::tuple<Tensor, Tensor> mask_sums(Tensor logits, Tensor targets, bool packed, double gamma, double alpha) {
  const int64_t factor = check(logits, targets, packed);
  const FocalOptions options = focal_options(gamma, alpha);
  const Axis rows(logits.size(2), factor), columns(logits.size(3), factor);
  const Targets truth(targets, packed);
  const Bands bands(logits);
  std::vector<BandSums> band_sums(bands.count());

  for_each_band(bands, [&] {
    return [&, upsampler = Upsampler(rows, columns), scratch = std::vector<uint8_t>(columns.full())](
               const Band& band) mutable {
      const int64_t top = band.first * factor, bottom = band.last * factor;
      upsampler.load(plane_of(logits, band.n, band.m), top, bottom);
      BandSums sums;
      for (int64_t y = top; y < bottom; ++y)
        sums += row_loops().sum(
            upsampler.row(y), truth.row(band.n, y, columns.full(), scratch.data()), columns.full(), options);
      band_sums[band.index] = sums;
    };
  });

  Tensor sums = torch::stable::new_empty(logits, {logits.size(0), logits.size(1), 3}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(logits, {logits.size(0), logits.size(1), 3}, ScalarType::Long);
  auto* sum_data = static_cast<float*>(sums.mutable_data_ptr());
  auto* count_data = static_cast<int64_t*>(counts.mutable_data_ptr());
  for (int64_t plane = 0; plane < bands.planes; ++plane) {
    BandSums total;
    for (int64_t band = 0; band < bands.per_plane; ++band) total += band_sums[plane * bands.per_plane + band];
    const double values[] = {total.focal, total.p, total.p_inside};
    const int64_t pixels[] = {total.intersection, total.mask, total.target};
    for (int64_t i = 0; i < 3; ++i) {
      sum_data[3 * plane + i] = static_cast<float>(values[i]);
      count_data[3 * plane + i] = pixels[i];
    }
  }
  return {sums, counts};
}

// Gradient of the upsampled logits, for `gather_gradient`.
class LossGradient {
 public:
  LossGradient(
      const Tensor& logits, const Targets& targets, const FocalOptions& options, const Slopes* slopes, const Axis& rows,
      const Axis& columns)
      : logits_(logits),
        targets_(targets),
        options_(options),
        slopes_(slopes),
        width_(columns.full()),
        upsampler_(rows, columns),
        scratch_(width_) {}

  bool start(const Band& band, int64_t top, int64_t bottom) {
    object_ = band.n;
    slope_ = slopes_[band.plane];
    // Candidates that were not chosen and absent objects.
    if (slope_.focal == 0 && slope_.p == 0 && slope_.p_inside == 0) return false;
    upsampler_.load(plane_of(logits_, band.n, band.m), top, bottom);
    return true;
  }

  void row(int64_t y, float* out) {
    const uint8_t* target = targets_.row(object_, y, width_, scratch_.data());
    row_loops().differentiate(upsampler_.row(y), target, width_, options_, slope_, out);
  }

 private:
  const Tensor& logits_;
  const Targets& targets_;
  const FocalOptions& options_;
  const Slopes* slopes_;  // of each plane
  int64_t width_;
  Upsampler upsampler_;
  std::vector<uint8_t> scratch_;
  int64_t object_ = 0;
  Slopes slope_{};
};

Tensor mask_sums_backward(
    Tensor grad_sums, Tensor logits, Tensor targets, bool packed, double gamma, double alpha) {
  const int64_t factor = check(logits, targets, packed);
  STD_TORCH_CHECK(
      grad_sums.dim() == 3 && grad_sums.scalar_type() == ScalarType::Float && grad_sums.size(0) == logits.size(0) &&
          grad_sums.size(1) == logits.size(1) && grad_sums.size(2) == 3,
      "mask_sums_backward: grad_sums must be float32 [N, M, 3]");
  grad_sums = torch::stable::contiguous(grad_sums);
  const auto* slopes = static_cast<const Slopes*>(grad_sums.const_data_ptr());
  const FocalOptions options = focal_options(gamma, alpha);
  const Axis rows(logits.size(2), factor), columns(logits.size(3), factor);
  const Targets truth(targets, packed);
  return gather_gradient(
      logits, rows, columns, [&] { return LossGradient(logits, truth, options, slopes, rows, columns); });
}

}  // namespace
}  // namespace sam2fast

STABLE_TORCH_LIBRARY_IMPL(sam2fast, CPU, m) {
  m.impl("mask_sums.cpp", TORCH_BOX(&sam2fast::mask_sums));
  m.impl("mask_sums_backward.cpp", TORCH_BOX(&sam2fast::mask_sums_backward));
}
