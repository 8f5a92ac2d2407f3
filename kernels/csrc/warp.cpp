// sam2fast::warp_image and sam2fast::warp_masks on the CPU. What they compute, and why in this way: kernels/warp/README.md;
// the ground truth is kernels/warp/reference.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "bands.h"
#include "pixels.h"

namespace sam2fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowsOfThread = 64;  // handed out at a time
constexpr int64_t kMargin = 16;        // bytes behind a buffer: vectors and words are read whole

// Output pixel (x, y) to source coordinates, [2, 3].
struct Affine {
  double m[6];

  explicit Affine(const Tensor& matrix) {
    STD_TORCH_CHECK(
        matrix.scalar_type() == ScalarType::Double && matrix.dim() == 2 && matrix.size(0) == 2 && matrix.size(1) == 3 &&
            matrix.is_contiguous(),
        "warp: the matrix must be float64 [2, 3], contiguous");
    std::memcpy(m, matrix.const_data_ptr(), sizeof(m));
    for (double value : m) STD_TORCH_CHECK(std::isfinite(value), "warp: the matrix must be finite");
  }

  // Pixels [begin, end) of row y lie inside a source rectangle that reaches from `low` to `high` (pixel centers).
  struct Span {
    int64_t begin, end;
  };
  Span inside(int64_t y, int64_t side, const double (&low)[2], const double (&high)[2]) const {
    double begin = 0, end = static_cast<double>(side);
    for (int axis = 0; axis < 2; ++axis) {
      const double slope = m[3 * axis], start = m[3 * axis + 1] * static_cast<double>(y) + m[3 * axis + 2];
      if (slope == 0) {
        if (!(low[axis] <= start && start < high[axis])) return {0, 0};
        continue;
      }
      const double a = (low[axis] - start) / slope, b = (high[axis] - start) / slope;
      // low <= start + slope x < high, for either sign of the slope
      begin = std::max(begin, slope > 0 ? std::ceil(a) : std::floor(b) + 1);
      end = std::min(end, slope > 0 ? std::ceil(b) : std::floor(a) + 1);
    }
    if (!(begin < end)) return {0, 0};
    return {static_cast<int64_t>(begin), static_cast<int64_t>(end)};
  }

  // The row from pixel `begin` on, with coordinates relative to (left, top).
  Line line(int64_t y, int64_t begin, int64_t left, int64_t top) const {
    const double x = static_cast<double>(begin), row = static_cast<double>(y);
    return {
        static_cast<float>(m[0] * x + m[1] * row + m[2] - static_cast<double>(left)),
        static_cast<float>(m[3] * x + m[4] * row + m[5] - static_cast<double>(top)), static_cast<float>(m[0]),
        static_cast<float>(m[3])};
  }
};

// Words of an image uint8 [H, W, 3] with one more row and column, copies of the last.
class Image {
 public:
  explicit Image(const Tensor& image) : height_(image.size(0)), width_(image.size(1)), words_(size()) {
    const auto* bytes = static_cast<const uint8_t*>(image.const_data_ptr());
    const int64_t stride = width_ + 1;
    for_each_row(height_, kRowsOfThread, [&] {
      return [&](int64_t row) {
        uint32_t* words = words_.data() + row * stride;
        pixel_loops().pack(bytes + row * image.stride(0), width_, words);
        words[width_] = words[width_ - 1];
      };
    });
    std::copy_n(words_.data() + (height_ - 1) * stride, stride, words_.data() + height_ * stride);
  }
  Source<uint32_t> source() const { return {words_.data(), width_ + 1, height_, width_}; }

 private:
  size_t size() const { return static_cast<size_t>((height_ + 1) * (width_ + 1) + kMargin); }
  int64_t height_, width_;
  std::vector<uint32_t> words_;
};

// Rows of a map without rotation and shear. Columns are located once for all rows, and each row of the source is
// stretched once for all output rows between it and the next.
class Stretched {
 public:
  Stretched(const Source<uint32_t>& source, const Affine& affine, int64_t begin, int64_t end)
      : source_(source), affine_(affine), begin_(begin), count_(end - begin) {
    const auto padded = static_cast<size_t>(count_ + kMargin);
    place_.resize(padded);
    right_.resize(padded);
    pixel_loops().locate_axis(affine.line(0, begin, 0, 0), source.width, count_, place_.data(), right_.data());
  }

  // What one thread keeps: the last two rows of the source.
  struct Kept {
    int64_t row[2] = {-1, -1};
    std::vector<uint32_t> red_blue[2], green[2];
  };

  void write(int64_t y, const float* factors, Kept& kept, uint8_t* red, uint8_t* green, uint8_t* blue) const {
    int32_t row, below;
    pixel_loops().locate_axis({affine_.line(y, begin_, 0, 0).y, 0, 0, 0}, source_.height, 1, &row, &below);
    const uint32_t* red_blue[2];
    const uint32_t* greens[2];
    for (int k = 0; k < 2; ++k) {
      const int slot = (row + k) & 1;
      stretch(row + k, slot, kept);
      red_blue[k] = kept.red_blue[slot].data();
      greens[k] = kept.green[slot].data();
    }
    pixel_loops().blend(
        red_blue, greens, static_cast<float>(below) * (1.0f / 256.0f), factors, count_, red, green, blue);
  }

 private:
  void stretch(int64_t row, int slot, Kept& kept) const {
    if (kept.row[slot] == row) return;
    kept.row[slot] = row;
    kept.red_blue[slot].resize(place_.size());
    kept.green[slot].resize(place_.size());
    pixel_loops().stretch(
        source_.data + row * source_.stride, place_.data(), right_.data(), count_, kept.red_blue[slot].data(),
        kept.green[slot].data());
  }

  Source<uint32_t> source_;
  const Affine& affine_;
  int64_t begin_, count_;
  std::vector<int32_t> place_, right_;
};

// Coordinates are int32 in 1/256 of a pixel, places in the source int32.
void check_size(const char* name, const Tensor& image) {
  const int64_t height = image.size(0), width = image.size(1);
  STD_TORCH_CHECK(
      std::max(height, width) < (int64_t{1} << 23) && (height + 1) * (width + 1) < (int64_t{1} << 31), name,
      ": an image must have at most 2^23 - 1 pixels a side and below 2^31 in all, it has ", height, " x ", width);
}

void warp_image(Tensor out, Tensor image, Tensor matrix, Tensor color, Tensor fill) {
  STD_TORCH_CHECK(
      image.scalar_type() == ScalarType::Byte && image.dim() == 3 && image.size(2) == 3 && image.stride(2) == 1 &&
          image.stride(1) == 3 && image.size(0) > 0 && image.size(1) > 0,
      "warp_image: the image must be uint8 [H, W, 3], rows contiguous, not empty");
  check_size("warp_image", image);
  STD_TORCH_CHECK(
      out.scalar_type() == ScalarType::Byte && out.dim() == 3 && out.size(0) == 3 && out.is_contiguous(),
      "warp_image: the result must be uint8 [3, S, S'], contiguous");
  STD_TORCH_CHECK(
      color.scalar_type() == ScalarType::Float && color.dim() == 2 && color.size(0) == 3 && color.size(1) == 4 &&
          color.is_contiguous() && fill.scalar_type() == ScalarType::Byte && fill.numel() == 3 && fill.is_contiguous(),
      "warp_image: color must be float32 [3, 4] and fill uint8 [3], contiguous");
  const Affine affine(matrix);
  const int64_t rows = out.size(1), columns = out.size(2);
  auto* planes = static_cast<uint8_t*>(out.mutable_data_ptr());
  const auto* factors = static_cast<const float*>(color.const_data_ptr());
  const auto* outside = static_cast<const uint8_t*>(fill.const_data_ptr());
  const Image packed(image);
  const Source<uint32_t> source = packed.source();
  const double low[2] = {-0.5, -0.5};
  const double high[2] = {static_cast<double>(source.width) - 0.5, static_cast<double>(source.height) - 0.5};
  std::optional<Stretched> stretched;
  if (affine.m[1] == 0 && affine.m[3] == 0) {
    // The columns that are inside in any row.
    constexpr double kFar = std::numeric_limits<double>::infinity();
    const auto [begin, end] = affine.inside(0, columns, {low[0], -kFar}, {high[0], kFar});
    stretched.emplace(source, affine, begin, end);
  }
  for_each_row(rows, kRowsOfThread, [&] {
    return [&, kept = Stretched::Kept()](int64_t y) mutable {
      const auto [begin, end] = affine.inside(y, columns, low, high);
      uint8_t* row[3];
      for (int c = 0; c < 3; ++c) {
        row[c] = planes + (c * rows + y) * columns;
        std::memset(row[c], outside[c], static_cast<size_t>(begin));
        std::memset(row[c] + end, outside[c], static_cast<size_t>(columns - end));
        row[c] += begin;
      }
      if (begin == end) return;
      if (stretched) {
        stretched->write(y, factors, kept, row[0], row[1], row[2]);
      } else {
        pixel_loops().sample(source, affine.line(y, begin, 0, 0), factors, end - begin, row[0], row[1], row[2]);
      }
    };
  });
}

// The rectangle of codes other than 0, cut out, with one more row and column around where the image goes on, and copies
// of the last row and column behind.
class Codes {
 public:
  explicit Codes(const Tensor& codes) : height_(codes.size(0)), width_(codes.size(1)) {
    const auto* data = static_cast<const uint8_t*>(codes.const_data_ptr());
    std::vector<uint8_t> any(static_cast<size_t>(width_));
    int64_t first = height_, last = -1;
    for (int64_t y = 0; y < height_; ++y) {
      const uint8_t* row = data + y * codes.stride(0);
      uint8_t found = 0;
      for (int64_t x = 0; x < width_; ++x) {
        found |= row[x];
        any[x] |= row[x];
      }
      if (found) {
        first = std::min(first, y);
        last = y;
      }
    }
    if (last < 0) return;
    const auto used = [](uint8_t code) { return code != 0; };
    const int64_t leftmost = std::find_if(any.begin(), any.end(), used) - any.begin();
    const int64_t rightmost = width_ - 1 - (std::find_if(any.rbegin(), any.rend(), used) - any.rbegin());
    top_ = std::max<int64_t>(first - 1, 0);
    left_ = std::max<int64_t>(leftmost - 1, 0);
    rows_ = std::min(last + 2, height_) - top_;
    columns_ = std::min(rightmost + 2, width_) - left_;
    fill(data + top_ * codes.stride(0) + left_, codes.stride(0));
  }

  bool empty() const { return rows_ == 0; }
  int64_t left() const { return left_; }
  int64_t top() const { return top_; }
  // A rectangle that does not end at the edge of the image ends in a row of zeros, behind which nothing is found.
  void limits(double (&low)[2], double (&high)[2]) const {
    low[0] = static_cast<double>(left_) - 0.5;
    low[1] = static_cast<double>(top_) - 0.5;
    high[0] = static_cast<double>(left_ + columns_) - 0.5;
    high[1] = static_cast<double>(top_ + rows_) - 0.5;
  }
  Source<uint8_t> source() const { return {codes_.data(), stride(), rows_, columns_}; }
  const uint8_t* cells() const { return cells_.data(); }

 private:
  int64_t stride() const { return columns_ + 1; }

  void fill(const uint8_t* data, int64_t step) {
    codes_.resize(static_cast<size_t>((rows_ + 1) * stride() + kMargin));
    cells_.resize(codes_.size());
    for (int64_t y = 0; y <= rows_; ++y) {
      uint8_t* row = codes_.data() + y * stride();
      std::memcpy(row, data + std::min(y, rows_ - 1) * step, static_cast<size_t>(columns_));
      row[columns_] = row[columns_ - 1];
      if (y > 0) pixel_loops().join(row - stride(), row, columns_, cells_.data() + (y - 1) * stride());
    }
  }

  int64_t height_, width_, top_ = 0, left_ = 0, rows_ = 0, columns_ = 0;
  std::vector<uint8_t> codes_, cells_;
};

void warp_masks(Tensor out, Tensor codes, Tensor matrix) {
  STD_TORCH_CHECK(
      codes.scalar_type() == ScalarType::Byte && codes.dim() == 2 && codes.stride(1) == 1 && codes.numel() > 0,
      "warp_masks: codes must be uint8 [H, W], rows contiguous, not empty");
  check_size("warp_masks", codes);
  STD_TORCH_CHECK(
      out.scalar_type() == ScalarType::Bool && out.dim() == 3 && out.size(0) <= 8 && out.is_contiguous(),
      "warp_masks: the result must be bool [N, S, S'], contiguous, N at most 8");
  const Affine affine(matrix);
  const int64_t objects = out.size(0), rows = out.size(1), columns = out.size(2);
  auto* planes = static_cast<uint8_t*>(out.mutable_data_ptr());
  const Codes cut(codes);
  if (cut.empty()) {
    std::memset(planes, 0, static_cast<size_t>(out.numel()));
    return;
  }
  const Source<uint8_t> source = cut.source();
  double low[2], high[2];
  cut.limits(low, high);
  for_each_row(rows, kRowsOfThread, [&] {
    return [&, line = std::vector<uint8_t>(static_cast<size_t>(columns))](int64_t y) mutable {
      const auto [begin, end] = affine.inside(y, columns, low, high);
      pixel_loops().vote(source, cut.cells(), affine.line(y, begin, cut.left(), cut.top()), end - begin, line.data());
      for (int64_t n = 0; n < objects; ++n) {
        uint8_t* row = planes + (n * rows + y) * columns;
        std::memset(row, 0, static_cast<size_t>(begin));
        pixel_loops().extract(line.data(), static_cast<int>(n), end - begin, row + begin);
        std::memset(row + end, 0, static_cast<size_t>(columns - end));
      }
    };
  });
}

}  // namespace
}  // namespace sam2fast

STABLE_TORCH_LIBRARY_IMPL(sam2fast, CPU, m) {
  m.impl("warp_image.cpp", TORCH_BOX(&sam2fast::warp_image));
  m.impl("warp_masks.cpp", TORCH_BOX(&sam2fast::warp_masks));
}
