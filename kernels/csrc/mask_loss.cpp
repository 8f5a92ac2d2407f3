// sam2fast::mask_sums and its gradient on the CPU. Formulas: kernels/mask_loss/README.md; kernels/mask_loss/reference.py
// is the ground truth.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <tuple>

#include "bilinear.h"

namespace sam2fast {
namespace {

// Work is cut into bands of this many low-resolution rows, whatever the number of threads, so that sums and gradients do
// not depend on it.
constexpr int64_t kBand = 32;

FocalOptions focal_options(double gamma, double alpha) {
  const bool balanced = alpha >= 0;
  return {
      static_cast<float>(gamma), balanced ? static_cast<float>(alpha) : 1.0f,
      balanced ? static_cast<float>(1 - alpha) : 1.0f};
}

struct Shape {
  int64_t objects, candidates, height, width, factor, bands;
  int64_t tasks() const { return objects * candidates * bands; }
};

Shape check(const Tensor& logits, const Tensor& targets, bool packed) {
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
  return {logits.size(0), logits.size(1), height, width, factor, (height + kBand - 1) / kBand};
}

int threads_for(int64_t tasks) {
  // torch's own thread count: 1 in a data loader's worker, where a forked OpenMP pool would hang.
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(tasks, torch::stable::get_num_threads())));
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
  const Shape shape = check(logits, targets, packed);
  const FocalOptions options = focal_options(gamma, alpha);
  const Axis rows(shape.height, shape.factor), columns(shape.width, shape.factor);
  const Targets truth(targets, packed);
  std::vector<BandSums> bands(shape.tasks());

  [[maybe_unused]] const int threads = threads_for(shape.tasks());
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Upsampler upsampler(rows, columns);
    std::vector<uint8_t> scratch(columns.full());
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < shape.tasks(); ++task) {
      const int64_t plane = task / shape.bands, n = plane / shape.candidates;
      const int64_t first = task % shape.bands * kBand * shape.factor;
      const int64_t last = std::min(first + kBand * shape.factor, rows.full());
      upsampler.load(plane_of(logits, n, plane % shape.candidates), first, last);
      BandSums sums;
      for (int64_t y = first; y < last; ++y)
        sums += row_loops().sum(upsampler.row(y), truth.row(n, y, columns.full(), scratch.data()), columns.full(), options);
      bands[task] = sums;
    }
  }

  const int64_t planes = shape.objects * shape.candidates;
  Tensor sums = torch::stable::new_empty(logits, {shape.objects, shape.candidates, 3}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(logits, {shape.objects, shape.candidates, 3}, ScalarType::Long);
  auto* sum_data = static_cast<float*>(sums.mutable_data_ptr());
  auto* count_data = static_cast<int64_t*>(counts.mutable_data_ptr());
  for (int64_t plane = 0; plane < planes; ++plane) {
    BandSums total;
    for (int64_t band = 0; band < shape.bands; ++band) total += bands[plane * shape.bands + band];
    const double values[] = {total.focal, total.p, total.p_inside};
    const int64_t pixels[] = {total.intersection, total.mask, total.target};
    for (int64_t i = 0; i < 3; ++i) {
      sum_data[3 * plane + i] = static_cast<float>(values[i]);
      count_data[3 * plane + i] = pixels[i];
    }
  }
  return {sums, counts};
}

// Gradient of the low-resolution rows [first, last) of one plane, gathered from every full-resolution row that they
// touch; rows at the edges of a band are computed for both bands.
class GradientBand {
 public:
  GradientBand(const Axis& rows, const Axis& columns)
      : rows_(rows),
        columns_(columns),
        upsampler_(rows, columns),
        truth_(columns.full()),
        full_(columns.buffer()),
        left_(columns.size + 1),
        right_(columns.size + 1),
        reduced_(columns.size) {}

  // Returns [last - first, w].
  const std::vector<float>& run(
      const Plane& plane, const Targets& targets, int64_t n, const FocalOptions& options, const Slopes& slopes,
      int64_t first, int64_t last) {
    const int64_t factor = rows_.factor, width = columns_.full();
    // Cells first - 1 to last - 1.
    const int64_t top = std::max<int64_t>(0, factor * (first - 1) + factor / 2);
    const int64_t bottom = std::min(rows_.full(), factor * last + factor / 2);
    upsampler_.load(plane, top, bottom);
    gradient_.assign((last - first) * columns_.size, 0.0f);
    for (int64_t y = top; y < bottom; ++y) {
      // Outside the image `full_` stays 0.
      loops_.differentiate(
          upsampler_.row(y), targets.row(n, y, width, truth_.data()), width, options, slopes,
          full_.data() + columns_.offset());
      loops_.reduce(columns_.view(), full_.data(), left_.data(), right_.data(), reduced_.data());
      const Tap between = tap(y, factor, rows_.size);
      add(between.low, 1.0f - between.weight, first, last);
      add(between.high, between.weight, first, last);
    }
    return gradient_;
  }

 private:
  void add(int64_t row, float weight, int64_t first, int64_t last) {
    if (row < first || row >= last) return;
    float* out = gradient_.data() + (row - first) * columns_.size;
    for (int64_t j = 0; j < columns_.size; ++j) out[j] += weight * reduced_[j];
  }

  const RowLoops& loops_ = row_loops();
  const Axis& rows_;
  const Axis& columns_;
  Upsampler upsampler_;
  std::vector<uint8_t> truth_;
  std::vector<float> full_, left_, right_, reduced_, gradient_;
};

Tensor mask_sums_backward(
    Tensor grad_sums, Tensor logits, Tensor targets, bool packed, double gamma, double alpha) {
  const Shape shape = check(logits, targets, packed);
  STD_TORCH_CHECK(
      grad_sums.dim() == 3 && grad_sums.scalar_type() == ScalarType::Float && grad_sums.size(0) == shape.objects &&
          grad_sums.size(1) == shape.candidates && grad_sums.size(2) == 3,
      "mask_sums_backward: grad_sums must be float32 [N, M, 3]");
  grad_sums = torch::stable::contiguous(grad_sums);
  const auto* slope_data = static_cast<const float*>(grad_sums.const_data_ptr());
  const FocalOptions options = focal_options(gamma, alpha);
  const Axis rows(shape.height, shape.factor), columns(shape.width, shape.factor);
  const Targets truth(targets, packed);
  Tensor gradient =
      torch::stable::new_empty(logits, {shape.objects, shape.candidates, shape.height, shape.width});
  auto* out = static_cast<char*>(gradient.mutable_data_ptr());
  const int64_t element = logits.scalar_type() == ScalarType::Float ? 4 : 2;

  [[maybe_unused]] const int threads = threads_for(shape.tasks());
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    GradientBand band(rows, columns);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < shape.tasks(); ++task) {
      const int64_t plane = task / shape.bands, n = plane / shape.candidates;
      const int64_t first = task % shape.bands * kBand, last = std::min(first + kBand, shape.height);
      const Slopes slopes{slope_data[3 * plane], slope_data[3 * plane + 1], slope_data[3 * plane + 2]};
      char* rows_out = out + (plane * shape.height + first) * shape.width * element;
      const int64_t count = (last - first) * shape.width;
      // Candidates that were not chosen and absent objects.
      if (slopes.focal == 0 && slopes.p == 0 && slopes.p_inside == 0) {
        std::memset(rows_out, 0, count * element);
        continue;
      }
      const auto& values =
          band.run(plane_of(logits, n, plane % shape.candidates), truth, n, options, slopes, first, last);
      store_row(values.data(), count, logits.scalar_type(), rows_out);
    }
  }
  return gradient;
}

}  // namespace
}  // namespace sam2fast

STABLE_TORCH_LIBRARY_IMPL(sam2fast, CPU, m) {
  m.impl("mask_sums.cpp", TORCH_BOX(&sam2fast::mask_sums));
  m.impl("mask_sums_backward.cpp", TORCH_BOX(&sam2fast::mask_sums_backward));
}
