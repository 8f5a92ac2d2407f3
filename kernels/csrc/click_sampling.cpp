// sam2fast::click_uniform and sam2fast::click_center on the CPU. Derivation: kernels/click_sampling/README.md;
// kernels/click_sampling/reference.py is the ground truth.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <tuple>

#include "bands.h"
#include "bilinear.h"

namespace sam2fast {
namespace {

// Returns the factor of the upsampling.
int64_t check(const Tensor& logits, const Tensor& targets, bool packed) {
  STD_TORCH_CHECK(
      logits.dim() == 3 && is_kernel_dtype(logits.scalar_type()) && logits.size(1) > 0 && logits.size(2) > 0,
      "click_sampling: logits must be float32, bfloat16 or float16 [N, h, w]");
  STD_TORCH_CHECK(
      targets.dim() == 3 && targets.size(0) == logits.size(0) &&
          (targets.scalar_type() == ScalarType::Byte || (!packed && targets.scalar_type() == ScalarType::Bool)),
      "click_sampling: targets must be bool or uint8 [N, H, W], or packed uint8 [N, H, ceil(W / 8)]");
  const int64_t factor = targets.size(1) / logits.size(1), width = factor * logits.size(2);
  STD_TORCH_CHECK(
      factor > 0 && targets.size(1) == factor * logits.size(1) && targets.size(2) == (packed ? (width + 7) / 8 : width),
      "click_sampling: the sides of targets must be one multiple of those of logits");
  return factor;
}

// One click on each object, as the operators return it.
struct Clicks {
  Tensor coords, positive;

  explicit Clicks(const Tensor& logits)
      : coords(torch::stable::new_empty(logits, {logits.size(0), 2}, ScalarType::Long)),
        positive(torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Bool)) {}

  void set(int64_t n, int64_t x, int64_t y, bool is_positive) {
    coord_data_[2 * n] = x, coord_data_[2 * n + 1] = y;
    positive_data_[n] = is_positive;
  }

 private:
  int64_t* coord_data_ = static_cast<int64_t*>(coords.mutable_data_ptr());
  bool* positive_data_ = static_cast<bool*>(positive.mutable_data_ptr());
};

// Predictions and truth of the objects, row by row; one for each thread. `logits` are [N, 1, h, w].
class Rows {
 public:
  Rows(const Axis& rows, const Axis& columns, const Tensor& logits, const Targets& truth)
      : upsampler_(rows, columns), width_(columns.full()), logits_(logits), truth_(truth), scratch_(columns.full()) {}

  // Loads what the full-resolution rows [first, last) of object n need.
  void load(int64_t n, int64_t first, int64_t last) {
    n_ = n;
    upsampler_.load(plane_of(logits_, n, 0), first, last);
  }
  const float* logits(int64_t y) { return upsampler_.row(y); }
  const uint8_t* target(int64_t y) { return truth_.row(n_, y, width_, scratch_.data()); }
  int64_t width() const { return width_; }

 private:
  Upsampler upsampler_;
  int64_t width_, n_ = 0;
  const Tensor& logits_;
  const Targets& truth_;
  std::vector<uint8_t> scratch_;
};

// Clicks on pixel floor(uniform * size), counted row by row, of the wrong pixels, or of the background where none is
// wrong.
void pick(Rows& rows, const RowCounts* counts, int64_t height, double uniform, int64_t n, Clicks& clicks) {
  int64_t wrong = 0, background = 0;
  for (int64_t y = 0; y < height; ++y) wrong += counts[y].wrong, background += counts[y].background;
  const int64_t size = wrong > 0 ? wrong : background;
  if (size == 0) return clicks.set(n, 0, 0, false);
  const auto pixels = [&](int64_t y) { return wrong > 0 ? counts[y].wrong : counts[y].background; };
  // The product may round up to `size`.
  int64_t rank = std::clamp<int64_t>(static_cast<int64_t>(uniform * static_cast<double>(size)), 0, size - 1);
  int64_t y = 0;
  for (; rank >= pixels(y); ++y) rank -= pixels(y);

  rows.load(n, y, y + 1);
  const float* logits = rows.logits(y);
  const uint8_t* target = rows.target(y);
  int64_t x = 0;
  for (; x < rows.width() - 1; ++x) {
    // The background is where predicting everything would be wrong.
    const bool predicted = wrong > 0 ? logits[x] > 0.0f : true;
    if (predicted != (target[x] != 0) && rank-- == 0) break;
  }
  clicks.set(n, x, y, wrong > 0 && target[x] != 0);
}

std::tuple<Tensor, Tensor> click_uniform(Tensor logits, Tensor targets, bool packed, Tensor uniform) {
  const int64_t factor = check(logits, targets, packed), objects = logits.size(0);
  STD_TORCH_CHECK(
      uniform.dim() == 1 && uniform.size(0) == objects && uniform.scalar_type() == ScalarType::Double,
      "click_uniform: uniform must be float64 [N]");
  logits = torch::stable::unsqueeze(logits, 1);
  const Axis rows(logits.size(2), factor), columns(logits.size(3), factor);
  const Targets truth(targets, packed);
  std::vector<RowCounts> counts(objects * rows.full());
  for_each_band(Bands(logits), [&] {
    return [&, own = Rows(rows, columns, logits, truth)](const Band& band) mutable {
      const int64_t top = band.first * factor, bottom = band.last * factor;
      own.load(band.n, top, bottom);
      for (int64_t y = top; y < bottom; ++y)
        counts[band.n * rows.full() + y] = row_loops().count(own.logits(y), own.target(y), own.width());
    };
  });

  uniform = torch::stable::contiguous(uniform);
  const auto* draws = static_cast<const double*>(uniform.const_data_ptr());
  Clicks clicks(logits);
  Rows own(rows, columns, logits, truth);
  for (int64_t n = 0; n < objects; ++n) pick(own, &counts[n * rows.full()], rows.full(), draws[n], n, clicks);
  return {clicks.coords, clicks.positive};
}

struct Deepest {
  int64_t squared = 0, x = 0, y = 0;
};

// Squared Euclidean depth along a run of one kind of wrong pixels in a row. The pixels before and behind the run have
// depth 0, and nothing beyond them can be nearer than they are.
class Envelope {
 public:
  explicit Envelope(int64_t width) : sites_(width + 2) {}

  // `column_depth` is that of the `length` pixels of the run, which starts at `left` in row `y`.
  void search(const int32_t* column_depth, int64_t length, int64_t left, int64_t y, Deepest& best) {
    build(column_depth, length);
    size_t k = 0;
    for (int64_t x = 1; x <= length; ++x) {
      while (k + 1 < size_ && sites_[k + 1].from <= x) ++k;
      const int64_t across = x - sites_[k].x, squared = sites_[k].squared + across * across;
      if (squared > best.squared) best = {squared, left + x - 1, y};
    }
  }

 private:
  // The parabola squared + (x - site)^2 is the lowest one from `from` to where the next begins.
  struct Site {
    int64_t x, squared, from;
  };

  // Whole-number form of Felzenszwalb and Huttenlocher's lower envelope. Positions 0 and length + 1 frame the run.
  void build(const int32_t* column_depth, int64_t length) {
    sites_[0] = {0, 0, 0};
    size_ = 1;
    for (int64_t x = 1; x <= length + 1; ++x) {
      const int64_t depth = x <= length ? column_depth[x - 1] : 0, squared = depth * depth;
      int64_t from = first_below(sites_[size_ - 1], x, squared);
      while (size_ > 1 && from <= sites_[size_ - 1].from) from = first_below(sites_[--size_ - 1], x, squared);
      if (from <= length) sites_[size_++] = {x, squared, from};
    }
  }

  // From which position on the parabola of a later site lies below that of `site`.
  static int64_t first_below(const Site& site, int64_t x, int64_t squared) {
    const int64_t rise = squared + x * x - site.squared - site.x * site.x;
    return rise < 0 ? 0 : rise / (2 * (x - site.x)) + 1;
  }

  std::vector<Site> sites_;
  size_t size_ = 0;
};

// The deepest missed and the deepest false pixel of one object at a time; the first of equal ones, row by row.
class Center {
 public:
  Center(int64_t height, int64_t width) : height_(height), width_(width), depth_(height * width), envelope_(width) {}

  void click(Rows& rows, int64_t n, Clicks& clicks) {
    fill_columns(rows, n);
    Deepest missed, extra;
    for (int64_t y = 0; y < height_; ++y) {
      const int32_t* depth = row(y);
      for (int64_t x = 0, end; x < width_; x = end) {
        end = x + 1;
        if (depth[x] == 0) continue;
        Deepest& best = depth[x] > 0 ? missed : extra;
        int64_t highest = std::abs(depth[x]);
        for (; end < width_ && depth[end] != 0 && (depth[end] > 0) == (depth[x] > 0); ++end)
          highest = std::max<int64_t>(highest, std::abs(depth[end]));
        // No pixel is deeper than its column, or than half of the run.
        highest = std::min(highest, (end - x + 1) / 2);
        if (highest * highest > best.squared) envelope_.search(depth + x, end - x, x, y, best);
      }
    }
    const bool positive = missed.squared > extra.squared;
    const Deepest& chosen = positive ? missed : extra;
    clicks.set(n, chosen.x, chosen.y, positive);
  }

 private:
  int32_t* row(int64_t y) { return depth_.data() + y * width_; }

  void fill_columns(Rows& rows, int64_t n) {
    const std::vector<int32_t> outside(width_);
    rows.load(n, 0, height_);
    for (int64_t y = 0; y < height_; ++y)
      loops_.depth_from_above(rows.logits(y), rows.target(y), width_, y > 0 ? row(y - 1) : outside.data(), row(y));
    for (int64_t y = height_ - 1; y >= 0; --y)
      loops_.depth_from_below(y < height_ - 1 ? row(y + 1) : outside.data(), width_, row(y));
  }

  const RowLoops& loops_ = row_loops();
  int64_t height_, width_;
  std::vector<int32_t> depth_;
  Envelope envelope_;
};

std::tuple<Tensor, Tensor> click_center(Tensor logits, Tensor targets, bool packed) {
  const int64_t factor = check(logits, targets, packed);
  logits = torch::stable::unsqueeze(logits, 1);
  const Axis rows(logits.size(2), factor), columns(logits.size(3), factor);
  const Targets truth(targets, packed);
  Clicks clicks(logits);
  for_each_index(logits.size(0), [&] {
    return [&, own = Rows(rows, columns, logits, truth), center = Center(rows.full(), columns.full())](
               int64_t n) mutable { center.click(own, n, clicks); };
  });
  return {clicks.coords, clicks.positive};
}

}  // namespace
}  // namespace sam2fast

STABLE_TORCH_LIBRARY_IMPL(sam2fast, CPU, m) {
  m.impl("click_uniform.cpp", TORCH_BOX(&sam2fast::click_uniform));
  m.impl("click_center.cpp", TORCH_BOX(&sam2fast::click_center));
}
